"""Commands that several hosts run together: what joins them, who prints, and how they end."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import rich.console

from fedjax_lite.cli.errors import LostProcessError, UsageError
from fedjax_lite.xla import hosts

# A host that is silent for so long is taken for dead, and the others are ended.
HEARTBEAT_S = 30
# So long do processes that end wait for the others to end as well.
_SHUTDOWN_S = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Options of commands that several hosts can run together.

    Attributes:
      distributed: Run together with the other processes that SLURM or Open MPI has started, over
        the devices of all hosts. They must share the folder.
      coordinator: Where neither has started them, HOST:PORT of process 0, the same for all.
      num_hosts: How many processes there are, with --coordinator.
      host: Which of them this is, from 0, with --coordinator.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_hosts: int | None = None
    host: int | None = None


def join(options: Hosts) -> None:
    """Joins the processes that the options tell of; from then on, the first one alone prints.

    Raises:
      UsageError: The options are incomplete, or the others cannot be reached.
    """
    given = (options.coordinator, options.num_hosts, options.host)
    if given == (None, None, None) and not options.distributed:
        return
    if None in given and given != (None, None, None):
        raise UsageError("--coordinator, --num-hosts and --host go together; give all three")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, which ends a run after a round.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            # Where SLURM is found as well, it would choose devices.
            cluster_detection_method=None if options.distributed else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        told = str(error).partition("\n")[0].rstrip(".")
        way_out = "have SLURM or Open MPI start all processes, or give --coordinator HOST:PORT,"
        raise UsageError(
            f"the other hosts cannot be joined ({told}); {way_out} --num-hosts and --host"
        ) from None
    _print_once()


def _print_once() -> None:
    """Leaves stdout to the first process, and to what is printed in Python."""
    sys.stdout.flush()
    stdout = os.dup(sys.stdout.fileno()) if hosts.is_first() else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)  # Gloo tells there who is connected with whom.
    sys.stdout = os.fdopen(stdout, "w")


def new_console(*, stderr: bool) -> rich.console.Console:
    """A console, of which only that of the first process can be seen."""
    return rich.console.Console(stderr=stderr, quiet=not hosts.is_first())


def of_first(make: Callable[[], Path]) -> Path:
    """The folder that the first process makes, or what it raises, for all of them."""
    made = hosts.all_or_none(lambda: str(make()) if hosts.is_first() else "")
    return Path(hosts.shared(made))


def lost(error: Exception, goes_on: str) -> Exception:
    """What to raise in place of an error: itself, or that a process is lost."""
    if not hosts.may_be_lost(error):
        return error
    told = str(error).partition("\n")[0]
    return LostProcessError(
        f"process {jax.process_index()} of {jax.process_count()} has lost another one ({told});"
        f" {goes_on}, on as many hosts as there are"
    )


def end_lost() -> NoReturn:
    """Ends the process, once JAX has told which other one is lost, or has not."""
    sys.stdout.flush()
    time.sleep(2 * HEARTBEAT_S)  # JAX ends it before.
    os._exit(1)

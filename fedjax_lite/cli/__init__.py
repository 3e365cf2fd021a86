"""The command line."""

import contextlib
import io
import itertools
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union

import jax

import fedjax_lite
from fedjax_lite._extras import require
from fedjax_lite.cli.cache import SWITCH, keep_programs
from fedjax_lite.cli.errors import (
    InterruptedRunError,
    LostProcessError,
    UsageError,
    exit_code,
)
from fedjax_lite.runs.interrupts import signals_raised
from fedjax_lite.xla.hosts import OtherProcessError, is_first


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exit codes: 0, done; 2, a wrong option, a folder that cannot be written, too little memory or a
    missing package, told in one line on stderr; 130, 143 and 129, interrupted by Ctrl-C, SIGTERM
    and SIGHUP.
    """
    with signals_raised(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _main(args)


def _main(args: Sequence[str] | None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        versions = f"jax {jax.__version__}, Python {platform.python_version()}"
        print(f"fedjax-lite {fedjax_lite.__version__}, {versions}")
        return
    try:
        for module in ("tyro", "rich", "matplotlib"):
            require(module, "run")
        require("matplotlib", "run").use("Agg")  # Pictures go to files.
        from fedjax_lite.cli.baseline import Baseline, baseline
        from fedjax_lite.cli.config import settings_from_file
        from fedjax_lite.cli.data import Data, data
        from fedjax_lite.cli.eval import Eval, evaluate
        from fedjax_lite.cli.listing import List, list_choices
        from fedjax_lite.cli.plot import Plot, plot
        from fedjax_lite.cli.quickstart import Quickstart, quickstart
        from fedjax_lite.cli.sweep import Sweep, sweep
        from fedjax_lite.cli.train import Train, train

        functions: dict[type, Callable[[Any], None]] = {
            Quickstart: quickstart,
            Train: train,
            Sweep: sweep,
            Eval: evaluate,
            Plot: plot,
            Baseline: baseline,
            Data: data,
            List: list_choices,
        }
        commands = {options.__name__.lower(): options for options in functions}
        defaults = {}
        configured = {name: commands[name] for name in ("quickstart", "train", "sweep", "baseline")}
        given = settings_from_file(args, configured)
        if given is not None:
            path, arguments = given
            try:
                defaults[args[0]] = _parse([args[0], *arguments], commands)
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from None
        options = _parse(args, commands, defaults)
        keep_programs()
        functions[type(options)](options)
    except (UsageError, ImportError, MemoryError, OtherProcessError) as error:
        print(f"fedjax-lite: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"fedjax-lite: {error}", file=sys.stderr)
        # What is still in the buffer of a closed pipe would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"fedjax-lite: {interrupt or 'interrupted'}", file=sys.stderr, flush=True)
        # XLA may be compiling: to tear it down now would crash.
        os._exit(exit_code(interrupt))
    except InterruptedRunError as error:
        if not _is_other():
            print(f"fedjax-lite: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except LostProcessError as error:
        from fedjax_lite.cli.hosts import end_lost

        print(f"fedjax-lite: {error}", file=sys.stderr, flush=True)
        end_lost()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, where Python would add that of the code."""
    if not _is_other():
        print(f"fedjax-lite: {message}", file=sys.stderr)


def _is_other() -> bool:
    """Whether another process tells the same."""
    return jax.distributed.is_initialized() and not is_first()


def _parse(
    args: Sequence[str],
    commands: Mapping[str, type],
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The options of the command that is asked for."""
    import tyro

    def subcommand(name: str) -> Any:
        default = {"default": defaults[name]} if defaults and name in defaults else {}
        return Annotated[commands[name], tyro.conf.subcommand(name, **default)]

    union: Any = Union[tuple(map(subcommand, commands))]  # noqa: UP007
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                union,
                prog="fedjax-lite",
                description="Federated-learning simulation as pure JAX functions; --version tells"
                f" which versions. Compiled programs are kept for the next run; {SWITCH}=off in the"
                " environment keeps none.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        command = next((name for name in commands if name in args), "")
        message = _first_paragraph(complaint.getvalue())
        raise UsageError(f"{message}; see {f'fedjax-lite {command}'.strip()} --help") from None


def _first_paragraph(box: str) -> str:
    """The message of a complaint that tyro draws as a box with a title, in Unicode or ASCII."""
    lines = [line.strip("│ ") for line in box.strip().splitlines()[1:]]
    paragraphs = itertools.groupby(lines, key=lambda line: line.strip("─-╰╯") != "")
    return next((" ".join(group) for is_text, group in paragraphs if is_text), "").rstrip(".")

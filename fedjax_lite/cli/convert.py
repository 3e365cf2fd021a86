"""`fedjax-lite data convert`: a data set of any format as memory-mapped `.npy` files."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import rich.console
from tyro.conf import Positional

from fedjax_lite.cli.brief import told_briefly
from fedjax_lite.cli.errors import InterruptedRunError, UsageError
from fedjax_lite.cli.source import Source
from fedjax_lite.data import formats, preprocess
from fedjax_lite.runs.progress import bar

_SECONDS_PER_LINE = 10
_PREPROCESS = {
    "emnist": preprocess.emnist,
    "cifar": preprocess.cifar(),
    "shakespeare": preprocess.shakespeare(),
}


@told_briefly
@dataclasses.dataclass(frozen=True)
class Convert(Source):
    """Convert a data set to a folder of .npy files, which opens at once at any size.

    A conversion that was interrupted or killed goes on when the same command is run again.

    Attributes:
      destination: The folder to write; it must not exist.
      preprocess: What fedjax_lite.data.preprocess does for a benchmark: emnist, cifar (crops of
        24 x 24) or shakespeare (sequences of 80 characters).
    """

    destination: Positional[Path]
    preprocess: Literal["emnist", "cifar", "shakespeare"] | None = None


def convert(options: Convert) -> None:
    """Runs the command.

    Raises:
      UsageError: The source cannot be read, or the destination exists.
      InterruptedRunError: Ctrl-C was pressed; the next run goes on from there.
    """
    written = 0
    try:
        with _progress() as show:

            def progress(done: int, total: int | None) -> None:
                nonlocal written
                written = done
                show(done, total)

            dataset = formats.convert(
                options.source,
                options.destination,
                format=options.format,
                transform=_PREPROCESS.get(options.preprocess or ""),
                transform_name=options.preprocess or "",
                progress=progress,
                **options.options(),
            )
    except ValueError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt as interrupt:
        raise InterruptedRunError(
            f"interrupted after {written} clients; run the same command again to go on", interrupt
        ) from None
    print(
        f"{dataset.num_clients} clients with {dataset.offsets[-1]} examples in"
        f" {options.destination}"
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    """A function that shows how far it is on stderr: a bar on a terminal, else a line at times."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        shown = time.monotonic()

        def show_line(done: int, total: int | None) -> None:
            nonlocal shown
            if time.monotonic() - shown > _SECONDS_PER_LINE:
                shown = time.monotonic()
                print(f"{done}/{total or '?'} clients", file=console.file, flush=True)

        yield show_line
        return
    with bar("clients", console) as counting:
        task = counting.add_task("", total=None)
        yield lambda done, total: counting.update(task, completed=done, total=total)

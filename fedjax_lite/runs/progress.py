"""How far a run is."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress

from fedjax_lite.xla import hosts

_MOST_SHOWN = 3  # Metrics of an evaluation, so that a line stays one.
Show = Callable[[int, str, bool], None]


@contextlib.contextmanager
def progress(num_rounds: int, *, stderr: bool, what: str = "round") -> Iterator[Show]:
    """`show(done, text, loud)`: in a bar on a terminal, else in lines of the rounds that are loud.

    Of several processes, the first one shows it.

    Args:
      num_rounds: Number of rounds.
      stderr: Whether stdout is kept for something else.
      what: What is counted, if not rounds.
    """
    if not hosts.is_first():
        yield lambda done, text, loud: None
        return
    console = rich.console.Console(stderr=stderr)
    if not (console.is_terminal or console.is_jupyter):

        def show_line(done: int, text: str, loud: bool) -> None:
            if loud:
                print(f"{what} {done}/{num_rounds}  {text}", file=console.file, flush=True)

        yield show_line
        return
    with bar(what, console) as counting:
        task = counting.add_task("", total=num_rounds)
        yield lambda done, text, loud: counting.update(task, completed=done, description=text)


@contextlib.contextmanager
def shown(num_rounds: int) -> Iterator[Callable[[dict[str, Any], bool], None]]:
    """`show(row, is_evaluation)` of rows: in words, the last evaluation, or the loss of rounds."""
    with progress(num_rounds, stderr=False) as show:
        text, evaluated = "", False

        def show_row(row: dict[str, Any], is_evaluation: bool) -> None:
            nonlocal text, evaluated
            evaluated |= is_evaluation
            if is_evaluation:
                numbers = {name: x for name, x in row.items() if isinstance(x, float)}
                numbers.pop("seconds", None)
                told = list(numbers.items())[:_MOST_SHOWN]
                text = "  ".join(f"{name} {value:.4g}" for name, value in told)
            elif not evaluated:
                text = f"loss {row['loss']:.4g}"
            show(row["round"], text, is_evaluation)

        yield show_row


def bar(what: str, console: rich.console.Console) -> rich.progress.Progress:
    """A bar with a count of something before it, and the task's description and times after it."""
    return rich.progress.Progress(
        rich.progress.TextColumn(what),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )

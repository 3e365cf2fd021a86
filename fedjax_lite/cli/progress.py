"""How far a run is."""

import contextlib
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

Show = Callable[[int, str, bool], None]


@contextlib.contextmanager
def progress(num_rounds: int, *, stderr: bool) -> Iterator[Show]:
    """`show(done, text, loud)`: in a bar on a terminal, else in lines of the rounds that are loud.

    Args:
      num_rounds: Number of rounds.
      stderr: Whether stdout is kept for something else.
    """
    console = rich.console.Console(stderr=stderr)
    if not console.is_terminal:

        def show_line(done: int, text: str, loud: bool) -> None:
            if loud:
                print(f"round {done}/{num_rounds}  {text}", file=console.file, flush=True)

        yield show_line
        return
    with bar("round", console) as counting:
        task = counting.add_task("", total=num_rounds)
        yield lambda done, text, loud: counting.update(task, completed=done, description=text)


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

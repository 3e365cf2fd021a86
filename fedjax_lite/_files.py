"""Files that outlive a process: replaced all or nothing, in folders that one process writes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # On Windows nothing keeps a second process out.
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once it is written and on disk."""
    partial = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file, all or nothing."""
    with replacing(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a folder.

    The lock is the operating system's: it ends with the process, however that ends. File systems
    without locks have none.

    Args:
      path: The file that is locked, in the folder; it is made, and stays.

    Raises:
      BlockingIOError: Another process has it.
    """
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # POSIX allows either.
                raise BlockingIOError(
                    f"{path.parent} is being written by another process; wait for its end, or"
                    " choose another folder."
                ) from None
            except OSError:
                pass
        yield

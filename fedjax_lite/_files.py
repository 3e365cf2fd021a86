"""Files that outlive a process: replaced all or nothing, in folders that one process writes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(0)  # The first byte, also of an empty file.
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# The system tells apart processes, and not what runs in one of them: what would lock a file again
# there would have the lock, and its end would give up that of both.
_held: set[Path] = set()
_guard = threading.Lock()


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
    """Keeps other processes, and all else in this one, from writing a folder.

    The lock is the operating system's: it ends with the process, however that ends. File systems
    without locks have none.

    Args:
      path: The file that is locked, in the folder; it is made, and stays.

    Raises:
      BlockingIOError: Something else has it.
    """
    resolved = path.resolve()
    with _guard:
        if resolved in _held:
            raise BlockingIOError(
                f"{path.parent} is being written by another run in this process; wait for its end,"
                " or choose another folder."
            )
        _held.add(resolved)
    try:
        with path.open("a") as file:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):  # POSIX allows either.
                raise BlockingIOError(
                    f"{path.parent} is being written by another process; wait for its end, or"
                    " choose another folder."
                ) from None
            except OSError:
                pass
            yield
    finally:
        _held.discard(resolved)

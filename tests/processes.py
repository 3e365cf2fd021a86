"""Commands in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import time

# Tests that run in the background of a shell are deaf to Ctrl-C, and so are their children; to a
# closed terminal, those of `nohup`.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from fedjax_lite.cli import main
main(sys.argv[1:])
"""


_HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another_process(lock):
    """A lock file, locked by a process that is killed at the end."""
    command = [sys.executable, "-S", "-c", _HOLDER, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def in_two(work):
    """Runs `work(process)` in two forks of this process; prints their ids, and their exit codes.

    What both import is imported once. Nothing must have been computed, which a fork of JAX does not
    survive.
    """
    ids = []
    for process in range(2):
        pid = os.fork()
        if pid == 0:
            work(process)
            sys.exit()
        ids.append(pid)
    print(*ids, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ids))


def contents(folder):
    """All that is below a folder, byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def interrupted(*args, once, by=signal.SIGINT):
    """Runs `fedjax-lite` with arguments and presses Ctrl-C once `once()`: exit code and stderr.

    Or sends it another signal.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not once():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(by)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, stderr

"""Processes of their own, forked from one that has imported what they need, for seconds."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["optax", "orbax.checkpoint", "fedjax_lite.cli.train"])


def start(folder, work, *args):
    """Runs `work(*args)` in a process; what it writes goes to the files `out` and `err`."""
    process = _FORKS.Process(target=_run, args=(folder, work, args), daemon=True)
    process.start()
    return process


def _run(folder, work, args):
    redirect(folder / "out", folder / "err")
    os.setsid()  # To be killed with all that it forks.
    try:
        work(*args)
    finally:
        atexit._run_exitfuncs()  # As any process does, but those of `multiprocessing`.


def redirect(out, err):
    """Lets this process write to files."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)


def ended(process, timeout=600):
    """The exit code of a process."""
    try:
        process.join(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.exitcode


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


def in_two(work, *args):
    """Runs `work(process, *args)` in two forks of this process; prints their ids and exit codes.

    What both import is imported once. Nothing must have been computed, which a fork of JAX does not
    survive.
    """
    ids = []
    for process in range(2):
        pid = os.fork()
        if pid == 0:
            work(process, *args)
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


def interrupted(folder, *args, once, by=signal.SIGINT):
    """Runs `fedjax-lite` with arguments and presses Ctrl-C once `once()`: exit code and stderr.

    Or sends it another signal.
    """
    process = start(folder, _in_the_foreground, *map(str, args))
    deadline = time.monotonic() + 120
    while not once():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, by)
    return ended(process, timeout=60), (folder / "err").read_text()


def _in_the_foreground(*args):
    """A command that signals come through to.

    Tests that run in the background of a shell are deaf to Ctrl-C, and so are their children; to a
    closed terminal, those of `nohup`.
    """
    from fedjax_lite.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    main(args)

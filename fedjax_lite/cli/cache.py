"""Compiled programs, kept from one command to the next."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

import jax

SWITCH = "FEDJAX_LITE_COMPILATION_CACHE"
"""Environment variable: `off` leaves JAX's compilation cache alone."""

_MOST_BYTES = 2**30  # A program takes 10 kB to 1 MB: thousands of them.


def keep_programs() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder.

    A second run of the same settings then compiles nothing. Left alone are a cache that the user
    has set up by JAX's own variables, and all of it if the environment variable
    `FEDJAX_LITE_COMPILATION_CACHE` is `off`. What cannot be read or written is compiled as ever.
    Where `zstandard` is installed, nothing is kept: JAX then compresses by it, without a checksum,
    and a program of which a bit has changed would crash the process.
    """
    theirs = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return
    if any(name in os.environ for name in theirs):
        return
    if any(map(importlib.util.find_spec, ("zstandard", "compression"))):  # The latter: 3.14.
        return
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    try:
        folder = _user_cache() / "fedjax_lite" / f"programs-{_machine()}"
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder.
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # All of them: a command compiles many small programs, and waits for each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _user_cache() -> Path:
    """Where programs of a user keep what they can make again."""
    if sys.platform == "win32":
        usual, variable = Path.home() / "AppData" / "Local", "LOCALAPPDATA"
    elif sys.platform == "darwin":
        usual, variable = Path.home() / "Library" / "Caches", "XDG_CACHE_HOME"
    else:
        usual, variable = Path.home() / ".cache", "XDG_CACHE_HOME"
    return Path(os.environ.get(variable) or usual)


def _machine() -> str:
    """What sets processors apart: a home folder may be shared by machines of several kinds.

    JAX's keys have its version and the flags of XLA, but not the instructions of a CPU.
    """
    told = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += next((line for line in lines if line.startswith(("flags", "Features"))), "")
        told += next((line for line in lines if line.startswith("model name")), "")
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _prune(folder: Path) -> None:
    """Removes the oldest programs beyond a gigabyte."""
    found = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in folder.iterdir())
    excess = sum(size for _, size, _ in found) - _MOST_BYTES
    for _, size, path in found:
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size

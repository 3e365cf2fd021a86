import gc
import importlib.metadata
import importlib.util
import os
import signal
import tempfile

# Tests compile much and compute little: LLVM need not try hard, nor split each program into modules
# that cores compile side by side, and XLA:CPU's older emitters do, by which tests take 40 % less
# time though rounds run up to three times as long. They are gone from jaxlib 0.11, which ends a
# program that asks for them.
flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
# PyTorch need not spread over cores that other test processes are busy on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands keep compiled programs in the user's cache folder, not so those that are tested.
os.environ["FEDJAX_LITE_COMPILATION_CACHE"] = "off"

import jax
import pytest

from fedjax_lite.xla.memory import make_room_for_programs

# Eight virtual devices where the backend is the CPU; elsewhere, what the machine has. What does not
# ask for a mesh runs on one of them, for which programs compile in three quarters of the time.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_device", jax.devices()[0])
# What one process of a test run has compiled, another one need not.
if "PYTEST_XDIST_WORKER" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="fedjax-lite-programs-")
    os.environ["FEDJAX_LITE_TESTED_PROGRAMS"] = programs.name
jax.config.update("jax_compilation_cache_dir", os.environ["FEDJAX_LITE_TESTED_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def without_a_last_value(monkeypatch):
    """Doctests leave theirs in `builtins._`, which tyro looks up as the name of a translation."""
    monkeypatch.delattr("builtins._", raising=False)


@pytest.fixture
def computed_before(monkeypatch):
    """A process of tests has computed something: it is too late to set up the CPU."""
    monkeypatch.setattr("fedjax_lite.configure_cpu", lambda: None)


@pytest.fixture
def in_the_foreground():
    """Signals that what runs in the background of a shell ignores come through."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def with_room_for_programs():
    """Forgets what has been compiled for other files, if that is much."""
    make_room_for_programs()


def pytest_collection_modifyitems(items):
    """Examples of what an extra is for are left out where it is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        reason = "dp-accounting comes with the extra `privacy`"
        for item in items:
            if item.nodeid.startswith("fedjax_lite/privacy/"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure():
    """What is left at the end need not be looked through once more, as pytest does five times."""
    gc.freeze()


# Traced programs are many objects that stay: to look through all of them at every turn takes long.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

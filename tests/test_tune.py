import math
import time

import jax
import pytest

import fedjax_lite as fl

KEY = jax.random.key(0)


def pretend(lanes):
    """A round that takes longer, the further it is from 4 lanes; 16 do not fit."""

    def round(key, state, cohort):
        if lanes == 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        time.sleep(0.01 * abs(lanes - 4))
        return state, None

    return fl.FederatedAlgorithm(init=None, round=round)


def test_finds_the_fastest_that_fits():
    cohort = fl.cohort(KEY, fl.data.halfspace(), 20)
    tuned = fl.tune_lanes(pretend, KEY, None, cohort)
    assert tuned.lanes == 4
    assert list(tuned.seconds) == [1, 2, 4, 8, 16]
    assert tuned.seconds[16] == math.inf
    assert str(tuned).startswith("4 lanes are the fastest (1: ")


def test_other_errors_pass():
    def build(lanes):
        def round(key, state, cohort):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

        return fl.FederatedAlgorithm(init=None, round=round)

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        fl.tune_lanes(build, KEY, None, None, candidates=[1])


def test_refuses_candidates_that_are_none():
    with pytest.raises(ValueError, match="candidates is empty; pass at least one"):
        fl.tune_lanes(pretend, KEY, None, None, candidates=[])
    with pytest.raises(ValueError, match="candidates is 0; choose an integer at least 1"):
        fl.tune_lanes(pretend, KEY, None, None, candidates=[0])

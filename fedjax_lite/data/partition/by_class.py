"""Label skew that is exact: clients with a few classes each."""

from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from fedjax_lite import _validate
from fedjax_lite.data.partition._deal import classes, clients, deal, generator


def pathological(
    labels: ArrayLike,
    num_clients: int,
    *,
    classes_per_client: int,
    assignment: Literal["first-deterministic", "random", "deterministic"] = "first-deterministic",
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    """Every client has examples of exactly so many classes.

    Clients are given their classes first; then the shuffled examples of each class are dealt
    to the clients that have it, in numbers that differ by one at most.

    | `assignment` | classes of client i, of C in sorted order |
    |---|---|
    | `"first-deterministic"` | class i mod C, the others at random |
    | `"random"` | all at random, without replacement |
    | `"deterministic"` | i, i + 1, ..., modulo C |

    Source: Li et al. (2022), "Federated Learning on Non-IID Data Silos: An Experimental Study",
    whose "quantity-based label imbalance" gives the first class in turn.

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients.
      classes_per_client: Number of classes of each client.
      assignment: Who gets which classes.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, a class fell to no client, or
        it has fewer examples than clients.

    >>> labels = np.array([0, 0, 1, 1, 2, 2])
    >>> [labels[rows].tolist() for rows in pathological(labels, 3, classes_per_client=1, seed=0)]
    [[0, 0], [1, 1], [2, 2]]
    """
    labels = classes("labels", labels)
    names, class_index, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    num_clients = clients(num_clients, labels.size)
    classes_per_client = _validate.integer(
        "classes_per_client", classes_per_client, minimum=1, maximum=names.size
    )
    _validate.choice("assignment", assignment, ("first-deterministic", "random", "deterministic"))
    rng = generator(seed)
    turn = (np.arange(names.size) - np.arange(num_clients)[:, None]) % names.size
    # Each client has the classes of the lowest rank.
    rank = turn if assignment == "deterministic" else rng.random(turn.shape)
    if assignment == "first-deterministic":
        rank[turn == 0] = -1
    own = np.zeros(turn.shape, np.int64)
    chosen = np.argpartition(rank, classes_per_client - 1)[:, :classes_per_client]
    np.put_along_axis(own, chosen, 1, axis=1)

    owners = own.sum(0)
    if not owners.all():
        raise ValueError(
            f"assignment is {assignment!r}: class {names[owners == 0][0]} fell to none of"
            f" {num_clients} clients; raise num_clients or classes_per_client, or choose another"
            " assignment or seed."
        )
    if (owners > class_sizes).any():
        c = int(np.argmax(owners > class_sizes))
        raise ValueError(
            f"class {names[c]} has {class_sizes[c]} examples for {owners[c]} clients; lower"
            " num_clients or classes_per_client."
        )
    extra = np.cumsum(own, axis=0) <= class_sizes % owners
    return deal(class_index, own * (class_sizes // owners + extra), rng)


def shards(
    labels: ArrayLike,
    num_clients: int,
    *,
    shards_per_client: int = 2,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    """Sorts the rows by label, cuts them into shards, and deals the shards out at random.

    Rows of a class are shuffled before. The sizes of the shards differ by one at most, and a
    shard holds several classes where a class ends within it.

    Source: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", section 3: 200 shards of 300 MNIST digits for 100 clients.

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients.
      shards_per_client: Number of shards of each client.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, or there are fewer rows than
        shards.

    >>> labels = np.repeat(np.arange(4), 10)
    >>> [np.unique(labels[rows]).size for rows in shards(labels, 2, seed=0)]
    [2, 2]
    """
    labels = classes("labels", labels)
    num_clients = clients(num_clients, labels.size)
    shards_per_client = _validate.integer("shards_per_client", shards_per_client, minimum=1)
    num_shards = num_clients * shards_per_client
    if num_shards > labels.size:
        raise ValueError(
            f"shards_per_client is {shards_per_client}: {num_shards} shards for {labels.size} rows;"
            " lower shards_per_client or num_clients."
        )
    rng = generator(seed)
    order = rng.permutation(labels.size)
    order = order[np.argsort(labels[order], kind="stable")]
    blocks = np.array_split(order, num_shards)
    dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.sort(np.concatenate([blocks[shard] for shard in hand])) for hand in dealt]


def similarity(
    labels: ArrayLike,
    num_clients: int,
    *,
    iid_fraction: float,
    num_hostile: int = 0,
    seed: int | np.random.Generator,
) -> list[np.ndarray]:
    r"""A fraction $s$ of the rows is dealt at random, and the others in blocks, sorted by label.

    Clients have nearly as many rows of each kind. If the first ones are hostile, whose data no one
    else lacks, the rows go to those that follow; each hostile client has a random selection of
    them, as large as an honest one's.

    Sources: Karimireddy et al. (2020), "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning", section 7, "$s$ % similarity"; with hostile clients, ByzFL and Karimireddy et al.
    (2022), "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing".

    Args:
      labels: `[rows]`, the class of each row.
      num_clients: Number of clients, hostile ones included.
      iid_fraction: $s$, from 0, where all rows are sorted, to 1, where none is.
      num_hostile: How many clients are hostile, the first ones, as an integer says in
        `hostile_clients`.
      seed: Seed, or the generator to draw from.

    Returns:
      For each client, the sorted indices of its rows. Each row has exactly one honest client.

    Raises:
      ValueError: Labels are real values, an argument is out of range, or there are fewer rows than
        honest clients.

    >>> labels = np.repeat(np.arange(4), 10)
    >>> dealt = similarity(labels, 5, iid_fraction=0.0, num_hostile=1, seed=0)
    >>> [np.unique(labels[rows]).tolist() for rows in dealt[1:]], dealt[0].size
    ([[0], [1], [2], [3]], 10)
    """
    labels = classes("labels", labels)
    num_clients = _validate.integer("num_clients", num_clients, minimum=1)
    num_hostile = _validate.integer("num_hostile", num_hostile, minimum=0, maximum=num_clients - 1)
    honest = clients(num_clients - num_hostile, labels.size)
    if not 0 <= iid_fraction <= 1:
        raise ValueError(f"iid_fraction is {iid_fraction}; choose a number from 0 to 1.")
    rng = generator(seed)
    order = rng.permutation(labels.size)
    num_sorted = labels.size - round(iid_fraction * labels.size)
    by_label = order[:num_sorted][np.argsort(labels[order[:num_sorted]], kind="stable")]
    # The larger blocks of one kind go with the smaller of the other.
    parts = zip(
        np.array_split(by_label, honest),
        reversed(np.array_split(order[num_sorted:], honest)),
        strict=True,
    )
    dealt = [np.sort(np.concatenate(part)) for part in parts]
    size = labels.size // honest
    chosen = [np.sort(rng.choice(labels.size, size, replace=False)) for _ in range(num_hostile)]
    return [*chosen, *dealt]

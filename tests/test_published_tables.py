"""Tables that are a page of data each, and the clients that they are about."""

import jax
import numpy as np
import pytest
from problems import forms_of_a_round
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from test_mnist import write_mnist

import fedjax_lite as fl
from fedjax_lite.data import published_splits
from fedjax_lite.experiments.build import build
from fedjax_lite.experiments.published import TABLES
from fedjax_lite.experiments.published.table import runs_of
from fedjax_lite.experiments.settings import Settings

IMAGES = np.random.default_rng(0).integers(0, 256, (2000, 28, 28)).astype(np.uint8)
LABELS = (np.arange(2000) % 10).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2,000 images to train on, and the first 20 of them to test on."""
    path = tmp_path_factory.mktemp("mnist")
    write_mnist(path, IMAGES, LABELS, sizes=(2000, 20))
    return path


def twins():
    """Three clients, who are tested on what they train on."""
    features = {"x": np.ones((4, 28, 28, 1), np.float32), "y": np.array([0, 1, 2, 9], np.int32)}
    dataset = fl.FederatedDataset.from_clients(dict.fromkeys(range(3), features))
    return dataset, dataset


# In place of data sets that the images do not suffice for, and of models that take long to trace.
SMALL = {
    "bucketing-mnist": lambda folder: {"model": "logistic"},
    "byzfl-mnist": lambda folder: {"model": "logistic"},
    "ifca-rotated-mnist": lambda folder: {
        "dataset": f"rotated_mnist({str(folder)!r}, num_clients=8, num_examples=5)"
    },
    "niid-bench-fmnist": lambda folder: {},
    "pfllib-fmnist": lambda folder: {"dataset": twins()},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_cell_can_be_run(name, folder):
    table, small, algorithms, partitions = TABLES[name], SMALL[name](folder), set(), set()
    for cell in table.cells:
        settings = runs_of(table, cell, folder)[0].settings
        assert str(folder) in settings["dataset"]
        algorithm = settings["algorithm"], settings.get("reducer")
        partition = settings.get("partition")
        if algorithm in algorithms and partition in partitions:
            continue
        built = build(Settings(**{**settings, **small}))
        if algorithm not in algorithms and (cell.is_quick or "reducer" not in settings):
            state, after, _ = forms_of_a_round(built)
            shapes = [jax.tree.map(np.shape, one.params) for one in (after, state)]
            assert shapes[0] == shapes[1]
        if table.measure.metric == "accuracy":
            assert built.server_has_all
        else:
            assert built.held_out.client_ids == tuple(range(built.population.num_clients))
        algorithms.add(algorithm)
        partitions.add(partition)


def test_what_is_tested_on_is_as_noisy_as_what_is_trained_on(folder):
    table = TABLES["niid-bench-fmnist"]
    cell = next(cell for cell in table.cells if cell.name == "FedAvg / noise 0.1")
    built = build(runs_of(table, cell, folder)[0].of_train)
    assert built.held_out.num_examples.tolist() == [2] * 10
    plain = IMAGES[:20].reshape(20, -1) / 255
    for i in range(10):
        for x in built.held_out[i]["x"].reshape(2, -1):
            noise = np.square(plain - x).mean(1).min()  # Its image is the one that is nearest.
            np.testing.assert_allclose(noise, 0.1 * (i + 1) / 10, rtol=0.25)


def test_images_are_turned_by_cluster(folder):
    train, test = fl.data.rotated_mnist(folder, 8, num_examples=7, seed=3)
    assert train.num_examples.tolist() == [7] * 8
    assert test.num_examples.tolist() == [10] * 8
    images = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    for turns in range(4):
        found = []
        for client in (2 * turns, 2 * turns + 1):
            for x, y in zip(*train[client].values(), strict=True):
                upright = np.rot90(np.rint(255 * x[..., 0]).astype(np.uint8), -turns)
                found.append(images[upright.tobytes()])
                assert LABELS[found[-1]] == y
        assert len(set(found)) == 14
        x = np.concatenate([test[client]["x"][..., 0] for client in (2 * turns, 2 * turns + 1)])
        np.testing.assert_allclose(x, np.rot90(IMAGES[:20], turns, axes=(1, 2)) / 255, rtol=1e-6)
    assert not np.array_equal(train[0]["y"], train[2]["y"])
    for arguments, message in (
        ({"num_clients": 6}, "num_clients is 6; choose a multiple of 4"),
        ({"num_clients": 8, "num_examples": 1001}, "num_examples is 1001"),
    ):
        with pytest.raises(ValueError, match=message):
            fl.data.rotated_mnist(folder, **arguments)


def test_digits_become_rarer(folder):
    for examples, size in zip(fl.data.long_tailed_mnist(folder), (2000, 20), strict=True):
        kept = [i for i in range(size) if i // 10 < int(size // 10 * 0.5 ** (i % 10))]
        assert examples["y"].tolist() == LABELS[kept].tolist()
        expected = (IMAGES[kept] / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(examples["x"][..., 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="decay is 0; choose"):
        fl.data.long_tailed_mnist(folder, decay=0)


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    found = fl.data.digits_images()
    np.testing.assert_array_equal(16 * found["x"], images)
    np.testing.assert_array_equal(found["y"], labels)


def test_pfllib_deals_as_its_code_does(monkeypatch):
    """Its steps, on NumPy's global generator and by scikit-learn."""
    labels = np.random.default_rng(0).integers(0, 10, 7000)
    found = published_splits._deal_as_pfllib(labels, 5, 0.1)
    np.random.seed(1)  # noqa: NPY002
    smallest = 0
    while smallest < 40:
        own = [[] for _ in range(5)]
        for label in range(10):
            of_class = np.where(labels == label)[0]
            np.random.shuffle(of_class)  # noqa: NPY002
            p = np.random.dirichlet(np.repeat(0.1, 5))  # noqa: NPY002
            p = np.array([q * (len(rows) < 7000 / 5) for q, rows in zip(p, own, strict=True)])
            p = (np.cumsum(p / p.sum()) * len(of_class)).astype(int)[:-1]
            own = [a + b.tolist() for a, b in zip(own, np.split(of_class, p), strict=True)]
        smallest = min(map(len, own))
    for rows, expected in zip(found, own, strict=True):
        train, test = train_test_split(expected, train_size=0.75, shuffle=True)
        assert rows.tolist() == test + train
    images = {"x": np.zeros((4, 28, 28, 1), np.float32), "y": np.arange(4, dtype=np.int32)}
    monkeypatch.setattr(published_splits, "fashion_mnist", lambda *_: (images, images))
    monkeypatch.setattr(
        published_splits, "_deal_as_pfllib", lambda *_: [np.arange(8), np.array([5, 0, 3, 7, 1])]
    )
    train, test = fl.data.pfllib_fashion_mnist("anywhere")
    assert (train[1]["y"].tolist(), test[1]["y"].tolist()) == ([3, 3, 1], [1, 0])
    assert (train[0]["x"] == -1).all()


def test_too_few_images_for_pfllib_are_refused():
    with pytest.raises(ValueError, match="has 2020 examples, of which 100 draws each left a"):
        published_splits._deal_as_pfllib(np.zeros(2020, np.int64), 20, 0.1)

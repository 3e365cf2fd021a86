import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_lite as fl


def test_from_arrays_groups_rows_by_client():
    dataset = fl.FederatedDataset.from_arrays(
        {"x": np.arange(10).reshape(5, 2), "y": [0, 1, 2, 3, 4]}, ["b", "a", "b", "c", "a"]
    )
    assert dataset.client_ids == ("a", "b", "c")
    assert dataset.num_examples.tolist() == [2, 2, 1]
    assert dataset["a"]["y"].tolist() == [1, 4]
    assert dataset["b"]["x"].tolist() == [[0, 1], [4, 5]]


def test_from_clients_keeps_order_and_empty_clients():
    dataset = fl.FederatedDataset.from_clients(
        {"z": {"x": [1.0]}, "a": {"x": np.zeros(0)}, "m": {"x": [2.0, 3.0]}}
    )
    assert dataset.client_ids == ("z", "a", "m")
    assert dataset.offsets.tolist() == [0, 1, 1, 3]


def test_what_is_printed_has_shapes_and_counts():
    features = {"x": np.ones((3, 2), np.float32), "y": np.arange(3)}
    dataset = fl.FederatedDataset.from_clients({"a": features, "b": {}})
    resident, streamed = dataset.resident(), dataset.streamed(2, row_capacity=3)
    examples = "2 clients, 3 examples, x: float32[2], y: int"
    assert repr(dataset) == f"FederatedDataset({examples}64)"
    assert repr(resident) == f"ResidentPopulation({examples}32)"
    assert repr(streamed).startswith(f"StreamedPopulation({examples}64, cohort_capacity=2, row_")
    generated = fl.data.GeneratedPopulation(num_clients=9, num_examples=len, sample=dict)
    assert repr(generated) == "GeneratedPopulation(9 clients)"
    ids = np.arange(4)
    assert repr(fl.cohort_of(resident, ids % 2)) == (
        "Cohort(client_ids=int32[4], num_examples=int32[4], offsets=int32[4],"
        " examples={x: float32[3, 2], y: int32[3]}, num_clients=2)"
    )
    assert repr(fl.samplers.Selection(ids, ids / 4, np.int32(0))) == (
        "Selection(client_ids=int64[4], probabilities=float64[4], num_dropped=int32)"
    )
    assert repr(fl.ClientEvaluation({"loss": ids}, ids, {"loss": 1.5})) == (
        "ClientEvaluation(clients={loss: int64[4]}, num_examples=int64[4], pooled={loss: 1.5})"
    )
    # JAX prints trees that have anything in the place of arrays.
    without = jax.tree.map(lambda leaf: 0, resident)
    assert repr(without) == "ResidentPopulation(examples={x: 0, y: 0}, offsets=0)"


def test_resident_population_holds_the_same_rows():
    dataset = fl.FederatedDataset.from_clients({0: {"x": [1.0]}, 1: {"x": [2.0, 3.0]}})
    population = dataset.resident()
    assert population.num_clients == 2
    assert population.examples["x"].tolist() == [1, 2, 3]


def small():
    return fl.FederatedDataset.from_clients({"a": {"x": [0.0, 1.0, 2.0]}, "b": {"x": [3.0]}})


def replaced(**parts):
    dataset = small()
    fields = {"examples": dataset.examples, "offsets": dataset.offsets, "client_ids": ("a", "b")}
    return fl.FederatedDataset(**{**fields, **parts})


def test_from_clients_takes_clients_without_names_and_without_rows():
    dataset = fl.FederatedDataset.from_clients([{"x": []}, {"x": [[1, 2]]}, {}, {"x": [[3, 4]]}])
    assert dataset.client_ids == (0, 1, 2, 3)
    assert dataset.num_examples.tolist() == [0, 1, 0, 1]
    assert dataset.examples["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: fl.FederatedDataset.from_clients({}), ValueError, "clients is empty"),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [[1], [2, 3]]}}),
            ValueError,
            "client 'a': feature 'x' has rows of different lengths; pad them",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": {"left": [1], "right": [2]}}}),
            TypeError,
            "client 'a': feature 'x' is a dict of .*; give each array a name .* 'x_left'",
        ),
        (
            lambda: fl.FederatedDataset.from_clients([{}, {"x": []}]),
            ValueError,
            "the dataset is empty: 2 clients with 0 examples",
        ),
        (
            lambda: fl.FederatedDataset.from_clients([(np.zeros(2), np.zeros(2))]),
            TypeError,
            r"clients\[0\] is of type tuple; pass a dict of features by name",
        ),
        (
            lambda: fl.FederatedDataset.from_clients([1, 2]),
            TypeError,
            r"clients\[0\] is of type int; pass a dict",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [1]}, None: {"x": [2]}}),
            ValueError,
            "client_ids names no client in 1 rows, the first of them row 1, counted from 0; name",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({np.nan: {"x": [1]}}),
            ValueError,
            "client_ids names no client in 1 rows",
        ),
        (lambda: fl.FederatedDataset.from_clients(3), TypeError, "clients is of type int; pass a"),
        (
            lambda: fl.FederatedDataset.from_clients({0: {"x": []}}),
            ValueError,
            "the dataset is empty: 1 clients with 0 examples",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [1]}, "b": {"z": [1]}}),
            ValueError,
            "client 'b' has features {'z'",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [[1]]}, "b": {"x": [1]}}),
            ValueError,
            "client 'b' has features .* give all clients the same",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [1, 2], "y": [1]}}),
            ValueError,
            r"client 'a' has features of shapes {'x': \(2,\), 'y': \(1,\)}",
        ),
        (
            lambda: fl.FederatedDataset.from_arrays({"x": [1, 2], "y": [1]}, [0, 1]),
            ValueError,
            r"examples has features of shapes {'x': \(2,\), 'y': \(1,\)}; give all",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [[1], [2]], "y": 1}, [[0], [1]]),
            ValueError,
            r"examples has features of shapes {'x': \(2, 1\), 'y': \(\)}; give all",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": [1, 2]}),
            TypeError,
            r"client 'a' is of type list; pass a non-empty dict",
        ),
        (
            lambda: fl.FederatedDataset.from_arrays({"mask": [1]}, [0]),
            ValueError,
            'examples has a feature named "mask"',
        ),
        (
            lambda: fl.FederatedDataset.from_arrays({"x": [1, 2]}, [0]),
            ValueError,
            r"client_ids has shape \(1,\) beside 2 rows",
        ),
        (
            lambda: fl.FederatedDataset.from_arrays({"x": ["one", "two"]}, [0, 1]),
            ValueError,
            "feature 'x' has dtype <U3; encode it as numbers",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [1, 2]}, [[0], [2]]),
            ValueError,
            "rows holds indices from 0 to 2 into 2 rows",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [1, 2]}, [[0], [1]], client_ids=["a"]),
            ValueError,
            "client_ids names 1 clients while rows has 2",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [1, 2]}, [[0], [1]], client_ids=[7, 7]),
            ValueError,
            "client_ids names client 7 2 times",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [1, 2]}, [[True, False]]),
            ValueError,
            r"rows\[0\] has shape \(2,\) and dtype bool; pass a list of row indices",
        ),
        (
            lambda: fl.FederatedDataset.from_rows({"x": [1, 2]}, [[0.5]]),
            ValueError,
            r"rows\[0\] has shape \(1,\) and dtype float64",
        ),
        (
            lambda: fl.FederatedDataset.from_arrays({"x": [1, 2]}, [1, "1"]),
            ValueError,
            r"client_ids mixes the types \['int', 'str'\]",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({0: {"x": [2**40]}}).resident(),
            ValueError,
            "feature 'x' holds integers that do not fit int32",
        ),
        (
            lambda: fl.FederatedDataset.from_clients([("a", {"x": [1]}), ("a", {"x": [2]})]),
            ValueError,
            "client_ids names client 'a' 2 times",
        ),
        (
            lambda: fl.FederatedDataset.from_clients({"a": {"x": [1]}, "b": {"x": ["2"]}}),
            ValueError,
            "client 'b': feature 'x' has dtype <U1; encode it as numbers",
        ),
        (lambda: small().select(["a", "z"]), ValueError, "client_ids holds 'z', which is none"),
        (lambda: small().select(["a", "a"]), ValueError, "client_ids names client 'a' 2 times"),
        (lambda: small().select([]), ValueError, "the dataset is empty: 0 clients"),
        (lambda: small().split_clients(1.0, seed=0), ValueError, "fraction is 1.0; choose"),
        (lambda: small().split_clients(0.1, seed=0), ValueError, "which holds out 0; choose"),
        (lambda: small().split_examples(np.nan, seed=0), ValueError, "fraction is nan; choose"),
        (
            lambda: small().split_examples(0.1, seed=0),
            ValueError,
            "fraction is 0.1, less than one example of each client .the largest has 3.",
        ),
        (
            lambda: small().map(lambda features: {"x": features["x"][:-1]}),
            ValueError,
            "feature 'x' has 3 rows where the clients have 4 examples",
        ),
        (
            lambda: small().map(lambda features: {"x": features["x"], "y": features["x"][1:]}),
            ValueError,
            "the result of function has features of shapes",
        ),
        (lambda: small().map(lambda features: None), TypeError, "function is of type NoneType"),
        (
            lambda: fl.FederatedDataset.concatenate([small(), small()]),
            ValueError,
            "client_ids names client 'a' 2 times",
        ),
        (
            lambda: fl.FederatedDataset.concatenate(
                [small(), small().map(lambda features: {"x": features["x"].astype(int)})]
            ),
            ValueError,
            r"datasets\[1\] has features .*int64.* where datasets\[0\] has",
        ),
        (lambda: fl.FederatedDataset.concatenate([]), ValueError, "datasets is empty"),
        (lambda: replaced(offsets=np.array([0, 3, 5])).validate(), ValueError, "has 4 rows where"),
        (
            lambda: replaced(offsets=np.array([0, 5, 4])).validate(),
            ValueError,
            "offsets falls at client 'b', which would have -1",
        ),
        (lambda: replaced(offsets=np.array([1, 4])).validate(), ValueError, "offsets has shape"),
        (
            lambda: replaced(examples={"x": np.array([0, 1, np.nan, np.nan])}).validate(),
            ValueError,
            "feature 'x' holds NaN in 2 examples of 2 clients, 1 of them of client 'a'",
        ),
        (lambda: fl.data.halfspace(2**31), ValueError, "num_clients is 2147483648"),
        (lambda: fl.FederatedDataset.from_clients({0: {"x": [1]}})[3], KeyError, "no client 3"),
        (lambda: fl.data.halfspace(0), ValueError, "num_clients is 0"),
        (lambda: fl.data.halfspace(max_batches=4), ValueError, "max_batches is 4"),
        (lambda: fl.data.digits(held_out=1.0), ValueError, r"held_out is 1.0"),
    ],
)
def test_refuses_bad_data(build, error, message):
    with pytest.raises(error, match=message):
        build()


def ragged(sizes, seed=0):
    """Clients whose rows say whose they are: x = (client, index within the client)."""
    return fl.FederatedDataset.from_clients(
        {f"c{i}": {"x": np.stack([np.full(n, i), np.arange(n)], 1)} for i, n in enumerate(sizes)}
    )


def test_select_gathers_clients_in_the_order_given():
    dataset = ragged([3, 0, 2, 4])
    chosen = dataset.select(["c3", "c1", "c0"])
    assert chosen.client_ids == ("c3", "c1", "c0")
    for name in chosen.client_ids:
        np.testing.assert_array_equal(chosen[name]["x"], dataset[name]["x"])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_split_examples_deals_each_row_once(sizes, fraction, seed):
    expected = [min(round(fraction * n), max(n - 1, 0)) for n in sizes]
    if sum(expected) == 0:
        return
    dataset = ragged(sizes)
    train, held_out = dataset.split_examples(fraction, seed=seed)
    assert train.client_ids == held_out.client_ids == dataset.client_ids
    assert held_out.num_examples.tolist() == expected
    for name in dataset.client_ids:
        kept, held = train[name]["x"].tolist(), held_out[name]["x"].tolist()
        assert (kept, held) == (sorted(kept), sorted(held))
        assert sorted(kept + held) == dataset[name]["x"].tolist()
    again, _ = dataset.split_examples(fraction, seed=seed)
    np.testing.assert_array_equal(train.examples["x"], again.examples["x"])


def test_split_examples_holds_out_every_row_equally_often():
    dataset = ragged([5, 8])
    draws = 400
    counts = np.zeros((2, 8))
    for seed in range(draws):
        rows = dataset.split_examples(0.5, seed=seed)[1].examples["x"]
        counts[rows[:, 0], rows[:, 1]] += 1
    for row, (held, size) in zip(counts, ((2, 5), (4, 8)), strict=True):
        share = held / size
        error = np.sqrt(draws * share * (1 - share))
        assert (abs(row[:size] - draws * share) < 5 * error).all()


def test_split_clients_deals_each_client_once():
    dataset = ragged([1, 2, 3, 4, 5, 6, 7])
    train, held_out = dataset.split_clients(0.3, seed=0)
    assert held_out.num_clients == 2  # 2.1, rounded
    order = {name: i for i, name in enumerate(dataset.client_ids)}
    for part in (train, held_out):
        assert list(part.client_ids) == sorted(part.client_ids, key=order.get)
        for name in part.client_ids:
            np.testing.assert_array_equal(part[name]["x"], dataset[name]["x"])
    assert set(train.client_ids) | set(held_out.client_ids) == set(dataset.client_ids)
    assert dataset.split_clients(0.3, seed=0)[1].client_ids == held_out.client_ids
    drawn = {dataset.split_clients(0.3, seed=seed)[1].client_ids for seed in range(20)}
    assert len(drawn) > 10


def test_concatenate_is_the_inverse_of_a_split():
    dataset = ragged([1, 0, 3, 2])
    both = fl.FederatedDataset.concatenate(dataset.split_clients(0.5, seed=0))
    again = both.select(dataset.client_ids)
    np.testing.assert_array_equal(again.examples["x"], dataset.examples["x"])
    np.testing.assert_array_equal(again.offsets, dataset.offsets)


def test_features_and_map():
    dataset = ragged([2, 1]).map(lambda features: {"y": features["x"][:, 0].astype(np.float32)})
    assert dataset.features["y"].shape == ()
    assert dataset.features["y"].dtype == np.float32
    assert dataset["c1"]["y"].tolist() == [1]


def test_validate_counts_nan_in_any_floating_dtype():
    for dtype in (np.float16, np.complex64, ml_dtypes.bfloat16):
        feature = np.ones((4, 2, 2), dtype)
        replaced(examples={"x": feature}).validate()
        feature[3, 1, 0] = np.nan
        replaced(examples={"x": feature}).validate(allow_nan=True)
        with pytest.raises(ValueError, match=r"NaN in 1 examples of 1 clients, 1 .* client 'b'"):
            replaced(examples={"x": feature}).validate()


def test_digits_split_every_image_once():
    dataset, held_out = fl.data.digits()
    assert dataset.num_clients == 50
    assert len(held_out["y"]) == 359  # a fifth of 1797
    assert dataset.num_examples.sum() == 1797 - 359
    images = np.concatenate([dataset.examples["x"], held_out["x"]])
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    again, _ = fl.data.digits()
    np.testing.assert_array_equal(dataset.examples["x"], again.examples["x"])
    other, _ = fl.data.digits(seed=1)
    assert (dataset.offsets != other.offsets).any()


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    num_clients=st.integers(1, 80),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_dirichlet_deals_every_row_once(labels, num_clients, alpha, seed):
    rows = fl.partition.dirichlet(labels, num_clients, alpha=alpha, min_examples=0, seed=seed)
    assert len(rows) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(labels)))
    again = fl.partition.dirichlet(labels, num_clients, alpha=alpha, min_examples=0, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))


def class_shares(alpha, num_draws=2000, num_clients=4):
    """Client 0's share of the one class, over many draws."""
    labels = np.zeros(1000, int)
    draws = [
        fl.partition.dirichlet(labels, num_clients, alpha=alpha, min_examples=0, seed=seed)
        for seed in range(num_draws)
    ]
    return np.array([len(rows[0]) / 1000 for rows in draws])


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_moments_of_the_distribution(alpha):
    shares = class_shares(alpha)
    # A share of Dir_4(a) is Beta(a, 3a): mean 1/4, variance (1/4)(3/4) / (4a + 1).
    variance = 3 / 16 / (4 * alpha + 1)
    assert abs(shares.mean() - 1 / 4) < 5 * np.sqrt(variance / shares.size)
    error = np.sqrt(((shares - shares.mean()) ** 2).var() / shares.size)
    assert abs(shares.var() - variance) < 5 * error
    # The check is sharp enough to reject four times the concentration.
    assert abs(shares.var() - 3 / 16 / (16 * alpha + 1)) > 5 * error


def test_dirichlet_limits():
    labels = np.repeat(np.arange(5), 200)
    concentrated = fl.partition.dirichlet(labels, 10, alpha=1e-4, min_examples=0, seed=0)
    assert sum(len(rows) > 0 for rows in concentrated) <= 5
    even = fl.partition.dirichlet(labels, 10, alpha=1e8, seed=0)
    assert {len(rows) for rows in even} == {100}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, r"labels has shape \(0,\)"),
        ({"labels": [[1]]}, r"labels has shape \(1, 1\)"),
        ({"num_clients": 0}, "num_clients is 0"),
        ({"alpha": 0.0}, "alpha is 0.0; choose a positive"),
        ({"alpha": np.nan}, "alpha is nan"),
        ({"min_examples": 3}, "min_examples is 3 for 2 clients, but there are only 4 rows"),
        ({"alpha": 1e-6, "min_examples": 2}, "alpha is 1e-06: 10 draws each left a client"),
    ],
)
def test_dirichlet_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.partition.dirichlet(
            **{"labels": [0, 0, 0, 0], "num_clients": 2, "alpha": 1.0, "seed": 0, **arguments}
        )

"""Preprocessing of the benchmarks, against slow references, on small files in their formats."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from writers import fedjax_data, write_fedjax, write_hdf5, write_tff

import fedjax_lite as fl
from fedjax_lite.data import preprocess


def objects(*texts):
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def test_emnist_from_either_file(tmp_path):
    rng = np.random.default_rng(0)
    data = {
        f"f{i}00_01": {
            "pixels": rng.uniform(size=(n, 28, 28)).astype(np.float32),
            "label": rng.integers(0, 62, n),
        }
        for i, n in ((21, 3), (26, 5))
    }
    fedjax = write_fedjax(
        tmp_path / "fedjax.sqlite",
        [(f"{7:016x}:{n}".encode(), fedjax_data(f), len(f["label"])) for n, f in data.items()],
    )
    rows = {
        name: [{"pixels": x, "label": y} for x, y in zip(f["pixels"], f["label"], strict=True)]
        for name, f in data.items()
    }
    tff = write_tff(tmp_path / "tff.sqlite", rows, "all_test")
    write_tff(tff, {"f2100_01": rows["f2100_01"][:1]}, "digits_only_test")
    for path in (fedjax, tff):
        with pytest.raises(ValueError, match=r"has 2 clients with 8 examples where .* 3400 with"):
            fl.data.emnist(path, "test")
        dataset = fl.data.emnist(path, "test", check_sizes=False)
        assert dataset.features["x"] == jax.ShapeDtypeStruct((28, 28, 1), jnp.float32)
        assert dataset.features["y"] == jax.ShapeDtypeStruct((), jnp.int32)
        pixels = np.concatenate([f["pixels"] for f in data.values()])
        assert sorted(dataset.examples["x"].sum((1, 2, 3))) == pytest.approx(
            sorted((1 - pixels).sum((1, 2)))
        )
        with_domain = fl.data.emnist(path, "test", domain=True, check_sizes=False)
        assert with_domain.features["domain"] == jax.ShapeDtypeStruct((), jnp.int32)
        assert with_domain.examples["domain"].tolist() == [0] * 3 + [1] * 5
    digits = fl.data.emnist(tff, "test", only_digits=True, check_sizes=False)
    assert digits.num_examples.tolist() == [1]
    converted = fl.data.emnist(fedjax, destination=tmp_path / "new", check_sizes=False)
    np.testing.assert_array_equal(
        converted.examples["x"], fl.data.emnist(fedjax, check_sizes=False).examples["x"]
    )


@pytest.mark.parametrize("number", [0, 2099, 2100, 2599, 2600, 9999])
def test_domains_of_emnist_follow_the_writers_number(number):
    assert preprocess.emnist_domain(f"f{number:04}_12") == (number not in range(2100, 2600))


@pytest.mark.parametrize(
    ("load", "urls"),
    [
        (fl.data.emnist, ["fedjax/emnist/federated_emnist_train.sqlite", "emnist_all.sqlite.lzma"]),
        (fl.data.cifar100, ["https://storage.googleapis.com/tff-datasets-public/cifar100.sqlite"]),
        (fl.data.shakespeare, ["shakespeare_train.sqlite", "public/shakespeare.sqlite.lzma"]),
        (lambda path: fl.data.stackoverflow(path, ["a"]), ["stackoverflow_train.sqlite"]),
        (fl.data.cifar10, ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]),
    ],
)
def test_a_missing_file_names_where_to_fetch_it(tmp_path, load, urls):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "missing")
    assert all(url in str(caught.value) for url in urls)


def test_cifar_is_cropped_and_standardised():
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    images[1] = 7  # Uniform: the standard deviation is 0.
    images[2] = 0
    images[2, 16, 16, 0] = 1  # Nearly so: it is below the floor.
    for crop, margin in ((24, 4), (32, 0), (31, 0)):
        x = preprocess.cifar(crop)({"image": images.reshape(4, -1), "label": np.arange(4)})["x"]
        assert (x.shape, x.dtype) == ((4, crop, crop, 3), np.float32)
        for i in range(4):
            window = images[i, margin : margin + crop, margin : margin + crop].astype(np.float64)
            floor = 1 / np.sqrt(crop * crop * 3)
            expected = (window - window.mean()) / max(window.std(), floor)
            np.testing.assert_allclose(x[i], expected, atol=2e-5)
        assert (x[1] == 0).all()
    assert images[2].std() < 1 / np.sqrt(32 * 32 * 3)


def test_cifar100_from_tff(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"image": rng.integers(0, 256, (32, 32, 3)), "label": label, "coarse_label": coarse}
        for label, coarse in ((5, 0), (99, 13))
    ]
    path = write_tff(tmp_path / "a.sqlite", {"0": rows})
    write_tff(path, {"0": rows}, "test")
    dataset = fl.data.cifar100(path, "test", crop=32, check_sizes=False)
    expected = preprocess.standardize(np.stack([row["image"] for row in rows]))
    np.testing.assert_allclose(
        dataset["0"]["x"], expected[np.argsort(dataset["0"]["y"] != [5, 99])], atol=1e-5
    )
    assert dataset["0"]["y"].tolist() == [5, 99]
    assert dataset["0"]["coarse"].tolist() == [0, 13]
    assert dataset.features["coarse"].dtype == np.int32


def test_random_crop_takes_every_window_and_its_mirror():
    image = jnp.arange(4 * 3 * 2.0).reshape(1, 4, 3, 2)
    windows = {
        np.asarray(crop).tobytes()
        for row in range(3)
        for column in range(2)
        for crop in (
            image[0, row : row + 2, column : column + 2],
            image[0, row : row + 2, column : column + 2][:, ::-1],
        )
    }
    crops = jax.jit(preprocess.random_crop, static_argnums=2)(
        jax.random.key(0), jnp.repeat(image, 300, 0), 2
    )
    assert {np.asarray(crop).tobytes() for crop in crops} == windows


def test_cifar10_puts_the_channel_last(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (10_000, 3073), np.uint8)
    rows[:, 0] %= 10
    for name in ("data_batch_1", "test_batch"):
        rows.tofile(tmp_path / f"{name}.bin")
    for i in range(2, 6):
        (tmp_path / f"data_batch_{i}.bin").hardlink_to(tmp_path / "data_batch_1.bin")
    train, test = fl.data.cifar10(tmp_path)
    assert train["image"].shape == (50_000, 32, 32, 3)
    for i, row, column, channel in ((0, 0, 1, 2), (9_999, 31, 5, 0), (77, 3, 30, 1)):
        assert (
            test["image"][i, row, column, channel]
            == rows[i, 1 + 1024 * channel + 32 * row + column]
        )
    np.testing.assert_array_equal(test["label"], rows[:, 0])
    rows[5, 0] = 10
    rows.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match=r"test_batch.bin is no batch of 10,000 images"):
        fl.data.cifar10(tmp_path)


def shakespeare_reference(snippets, length):
    """Symbol by symbol."""
    vocabulary = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]"
    vocabulary += "!%)-159\r"
    text = []
    for snippet in snippets:
        text.append(1)
        for byte in snippet:
            known = chr(byte) in vocabulary
            text.append(3 + vocabulary.index(chr(byte)) if known else 89)
        text.append(2)
    pairs = list(itertools.pairwise(text))
    while len(pairs) % length:
        pairs.append((0, 0))
    x, y = np.array(pairs, np.int32).reshape(-1, length, 2).transpose(2, 0, 1)
    return {"x": x, "y": y}


@pytest.mark.parametrize("length", [1, 3, 80])
def test_shakespeare_equals_the_reference(length):
    rng = np.random.default_rng(length)
    for sizes in ([4, 1], [0], [0, 5, 0], [200, 17, 80], [3]):
        snippets = objects(*(rng.integers(0, 256, n).astype(np.uint8).tobytes() for n in sizes))
        features = preprocess.shakespeare(length)({"snippets": snippets})
        expected = shakespeare_reference(snippets, length)
        for name in ("x", "y"):
            assert features[name].dtype == np.int32
            np.testing.assert_array_equal(features[name], expected[name])
    nothing = preprocess.shakespeare(length)({"snippets": objects()})
    assert nothing["x"].shape == nothing["y"].shape == (0, length)


def test_shakespeare_from_either_file(tmp_path):
    snippets = objects(b"To be, or not to be", b"that is", b"")
    expected = shakespeare_reference(snippets, 4)
    fedjax = write_fedjax(tmp_path / "a.sqlite", [(b"H", fedjax_data({"snippets": snippets}), 3)])
    hdf5 = write_hdf5(tmp_path / "a.h5", {"H": {"snippets": [text.decode() for text in snippets]}})
    for path in (fedjax, hdf5):
        dataset = fl.data.shakespeare(path, sequence_length=4, check_sizes=False)
        for name in ("x", "y"):
            np.testing.assert_array_equal(dataset.examples[name], expected[name])
        with pytest.raises(
            ValueError, match=r"has 1 clients with 3 examples where .* 715 with 16068"
        ):
            fl.data.shakespeare(path, sequence_length=4)


def test_stackoverflow_equals_the_reference(tmp_path):
    (tmp_path / "words").write_text("the 100\ncat 50\nsat 20\nrare 1\n")
    vocabulary = preprocess.read_vocabulary(tmp_path / "words", 3)
    assert vocabulary == ["the", "cat", "sat"]
    with pytest.raises(ValueError, match="has 4 words; lower size"):
        preprocess.read_vocabulary(tmp_path / "words", 5)
    sentences = [b"the cat sat on the mat", b"", b"cat", b"the cat sat", b"the cat sat the"]
    path = write_tff(
        tmp_path / "a.sqlite",
        {"u": [{"tokens": objects(text), "score": 1} for text in sentences]},
        "heldout",
    )
    for length in (1, 4, 8):
        dataset = fl.data.stackoverflow(
            path, vocabulary, "held_out", max_length=length, check_sizes=False
        )
        for i, text in enumerate(sentences[::2] + sentences[1::2]):
            ids = [{"the": 3, "cat": 4, "sat": 5}.get(word, 6) for word in text.decode().split(" ")]
            symbols = [1, *ids, 2]
            for name, row in (("x", symbols[:-1]), ("y", symbols[1:])):
                expected = (row + [0] * length)[:length]
                assert dataset["u"][name][i].tolist() == expected


def test_unknown_words_share_ids_as_in_tensorflow():
    pytest.importorskip("farmhash")
    # The example in the documentation of tf.lookup.StaticVocabularyTable.
    transform = preprocess.stackoverflow(["emerson", "lake", "palmer"], num_oov_buckets=5)
    x = transform({"tokens": objects(b"emerson lake palmer king crimson")})["x"]
    assert x[0, 1:6].tolist() == [3 + i for i in (0, 1, 2, 6, 7)]


def test_several_buckets_need_the_hash(monkeypatch):
    monkeypatch.setitem(sys.modules, "farmhash", None)
    with pytest.raises(ImportError, match=r"num_oov_buckets is 2, .* run: pip install pyfarmhash"):
        preprocess.stackoverflow(["a"], num_oov_buckets=2)


def test_questions_and_answers_are_domains(tmp_path):
    rows = [{"tokens": objects(b"a"), "type": objects(kind)} for kind in (b"question", b"answer")]
    path = write_tff(tmp_path / "a.sqlite", {"u": rows}, "train")
    dataset = fl.data.stackoverflow(path, ["a"], domain=True, check_sizes=False)
    assert dataset["u"]["domain"].tolist() == [0, 1]
    assert dataset.features["domain"].dtype == np.int32
    assert "domain" not in fl.data.stackoverflow(path, ["a"], check_sizes=False).features
    with pytest.raises(ValueError, match="feature 'type' holds b'wiki', not question or answer"):
        preprocess.stackoverflow(["a"], domain=True)(
            {"tokens": objects(b"a"), "type": objects(b"wiki")}
        )


def test_tags_of_posts_as_in_tensorflow_federated(tmp_path):
    """The mean of one-hot words of sentence and title, without the unknown; and known tags."""
    vocabulary, tags = ["how", "to", "jit", "a"], ["jax", "python"]
    posts = [
        (b"how to jit a loop", b"jit loop", b"jax|c++|python"),
        (b"a a a", b"to", b"python"),
        (b"unknown", b"words", b"rust"),
    ]
    rows = [{"tokens": objects(t), "title": objects(h), "tags": objects(g)} for t, h, g in posts]
    path = write_tff(tmp_path / "a.sqlite", {"u": rows}, "train")
    with pytest.raises(ValueError, match="1 clients with 3 examples where the published data set"):
        fl.data.stackoverflow_tags(path, vocabulary, tags)
    dataset = fl.data.stackoverflow_tags(path, vocabulary, tags, max_length=8, check_sizes=False)
    x, y = dataset["u"]["x"], dataset["u"]["y"]
    assert (x.shape, x.dtype, y.dtype) == ((3, 8), np.int32, bool)

    params = {
        "kernel": np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32),
        "bias": np.array([0.5, -1.0], np.float32),
    }
    batch = {"x": x, "y": y, "mask": np.ones(3, bool)}
    model = fl.models.stackoverflow_tags(4, 2)
    run = lambda params, batch: (
        model.loss(params, {}, batch, None)[0],
        model.metrics(params, {}, batch),
    )
    losses, found = jax.device_get(jax.jit(run)(params, batch))
    for i, (text, title, names) in enumerate(posts[::2] + posts[1::2]):  # As in the file.
        words = (text + b" " + title).decode().split()
        bag = np.mean([[word == known for known in vocabulary] for word in words], axis=0)
        known = np.array([tag in names.decode().split("|") for tag in tags])
        p = 1 / (1 + np.exp(-(bag @ params["kernel"] + params["bias"])))
        np.testing.assert_array_equal(y[i], known)
        expected = -(known * np.log(p) + ~known * np.log(1 - p)).sum()
        np.testing.assert_allclose([losses[i], found["loss"][i]], expected, rtol=1e-5)
        assert found["accuracy"][i] == known[p.argmax()]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: preprocess.cifar(33), "crop is 33"),
        (lambda: preprocess.shakespeare(0), "sequence_length is 0"),
        (lambda: preprocess.emnist_domain(2109), "client_id is 2109; pass one of EMNIST's"),
        (lambda: preprocess.emnist_domain("f210_72"), "client_id is 'f210_72'; pass one of EMN"),
        (lambda: preprocess.stackoverflow(["a"], num_oov_buckets=0), "num_oov_buckets is 0; cho"),
        (lambda: preprocess.stackoverflow_tags(["a"], ["b", "b"]), "tags has 2 words, but 1 dis"),
        (lambda: preprocess.stackoverflow_tags(["a"], ["b"], 0), "max_length is 0"),
        (lambda: preprocess.stackoverflow(["a", "a"]), "vocabulary has 2 words, but 1 distinct"),
        (lambda: preprocess.emnist({"x": np.zeros(1)}), r"it has features \['x'\] and no 'pixels'"),
        (
            lambda: preprocess.emnist({"pixels": np.zeros((2, 783)), "label": np.zeros(2)}),
            r"feature 'pixels' has shape \(2, 783\)",
        ),
    ],
)
def test_preprocessing_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_convert_command_preprocesses(tmp_path):
    from fedjax_lite.cli.convert import Convert, convert
    from fedjax_lite.cli.errors import UsageError

    path = write_hdf5(tmp_path / "a.h5", {"H": {"snippets": ["To be, or not to be"]}})
    options = {"source": path, "destination": tmp_path / "new"}
    with pytest.raises(UsageError, match="client 'H': feature 'snippets' has dtype object; encode"):
        convert(Convert(**options))
    convert(Convert(**options, preprocess="shakespeare"))
    expected = shakespeare_reference([b"To be, or not to be"], 80)
    np.testing.assert_array_equal(
        fl.FederatedDataset.open(tmp_path / "new")["H"]["x"], expected["x"]
    )

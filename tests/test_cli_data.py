import commands
import numpy as np
import pytest

from fedjax_lite.cli import main
from fedjax_lite.runs.plot.classes import class_distribution

SIZES = (6, 1, 3)
LABELS = [0, 0, 0, 0, 2, 2, 5, 0, 2, 5]


@pytest.fixture
def path(tmp_path):
    """Client a: classes 0, 0, 0, 0, 2, 2; b: 5; c: 0, 2, 5."""
    file = tmp_path / "small.npz"
    owner = np.repeat(["a", "b", "c"], SIZES)
    np.savez(file, client_ids=owner, x=np.zeros((10, 4, 2), np.float32), y=np.array(LABELS))
    return file


def report(capsys, *args):
    return commands.report(capsys, "data", "describe", *args)


def refusal(capsys, *args):
    return commands.refusal(capsys, "data", *args)


def test_describe_counts_what_there_is(path, capsys):
    told = report(capsys, path)
    assert (told["clients"], told["empty_clients"], told["examples"]) == (3, 0, 10)
    sizes = told["examples_per_client"]
    assert (sizes["mean"], sizes["min"], sizes["median"], sizes["max"]) == (10 / 3, 1, 3, 6)
    assert sizes["q25"] == np.quantile(SIZES, 0.25)
    assert told["features"]["x"] == {"shape": [4, 2], "dtype": "float32"}
    labels = told["labels"]
    assert (labels["feature"], labels["classes"]) == ("y", 3)
    assert [labels["classes_per_client"][name] for name in ("min", "median", "max")] == [1, 2, 3]
    # All: .5, .3, .2. Client a: 4, 2, 0 where 3, 1.8, 1.2 are expected: 1.2 of 6 are astray;
    # b: 0, 0, 1 of .5, .3, .2: .8; c: 1, 1, 1 of 1.5, .9, .6: .5.
    assert labels["skew"] == pytest.approx((1.2 + 0.8 + 0.5) / 10)


def test_skew_tells_iid_clients_from_others(tmp_path, capsys):
    rng = np.random.default_rng(0)
    owner = np.arange(20_000) % 100
    for name, labels in (("iid", rng.integers(0, 10, 20_000)), ("skewed", owner % 10)):
        np.savez(tmp_path / name, client_ids=owner, y=labels)
    iid = report(capsys, tmp_path / "iid.npz")["labels"]
    skewed = report(capsys, tmp_path / "skewed.npz")["labels"]
    # Of 200 examples, E|count - 20| is about sqrt(2 / pi) x sqrt(200 x .09).
    expected = 10 * np.sqrt(2 / np.pi * 18) / 2 / 200
    assert iid["skew"] == pytest.approx(expected, rel=0.05)
    assert iid["skew_if_iid"] == pytest.approx(expected, rel=0.05)
    assert skewed["skew"] == pytest.approx(0.9)
    assert skewed["skew_if_iid"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_classes_are_whole_numbers_of_any_type(tmp_path, capsys, dtype):
    file = tmp_path / "[red].npz"
    np.savez(file, client_ids=[1, 2, 2], y=np.array([0, 1, 0], dtype))
    assert report(capsys, file)["labels"]["classes"] == 2
    main(["data", "describe", str(file)])
    assert "[red].npz" in capsys.readouterr().out.replace("\n", "")


def test_describe_without_classes(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", client_ids=[1, 2], y=[0.5, 1.5], z=[1, 2])
    assert report(capsys, tmp_path / "a.npz")["labels"] is None
    assert report(capsys, tmp_path / "a.npz", "--label", "z")["labels"]["classes"] == 2
    assert "dtype float64; choose a feature" in refusal(
        capsys, "describe", tmp_path / "a.npz", "--label", "y"
    )


def test_describe_names_the_columns_of_a_table(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("who,a,b,c\nx,1,2,0\ny,3,4,1\n")
    options = (tmp_path / "a.csv", "--client-column", "who", "--columns", "x=*", "y=c")
    told = report(capsys, *options)
    assert told["features"]["x"] == {"shape": [2], "dtype": "int64"}
    assert (told["clients"], told["labels"]["classes"]) == (2, 2)
    assert "--columns is 'x'; write each feature once" in refusal(
        capsys, "describe", tmp_path / "a.csv", "--columns", "x"
    )
    main(["data", "convert", str(options[0]), str(tmp_path / "new"), *options[1:]])
    assert "2 clients with 2 examples" in capsys.readouterr().out
    assert report(capsys, tmp_path / "new")["features"] == told["features"]


def test_describe_as_text(path, capsys):
    main(["data", "describe", str(path)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for words in ("clients", "4 x 2, float32", "3 of y", "0.250"):
        assert words in text


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_plot_writes_a_picture(path, tmp_path, suffix):
    out = tmp_path / f"classes.{suffix}"
    main(["data", "plot", str(path), "--out", str(out)])
    assert out.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[suffix])
    assert out.stat().st_size > 5000


@pytest.mark.parametrize("num_classes", [3, 62])
def test_bars_are_as_high_as_the_counts(num_classes):
    counts = np.random.default_rng(0).integers(0, 9, (5, num_classes))
    axes = class_distribution(
        counts, range(num_classes), "abcde", label="digit", title="five clients"
    )
    bars = [[bar.get_height() for bar in container] for container in axes.containers]
    np.testing.assert_array_equal(np.transpose(bars), counts)
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    np.testing.assert_array_equal(tops, counts.sum(1))
    assert [text.get_text() for text in axes.get_xticklabels()] == list("abcde")
    assert axes.get_title() == "five clients"
    assert (axes.get_legend() is None) == (num_classes == 62)


@pytest.mark.parametrize("num_clients", [100, 1001])
def test_the_heat_map_loses_no_client(num_clients):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, (num_clients, 4)) * rng.integers(0, 2, (num_clients, 1))
    axes = class_distribution(counts, range(4), range(num_clients), label="y", title="many")
    top = axes.figure.axes[0]
    cells = axes.collections[0]
    widths = np.diff(cells.get_coordinates()[0, :, 0])
    assert widths.sum() == num_clients
    # Shares and sizes, summed over clients, are those of the counts.
    sizes = counts.sum(1)
    shares = (counts / np.maximum(sizes, 1)[:, None]).sum(0)
    np.testing.assert_allclose(cells.get_array() @ widths, shares)
    heights, edges, _ = top.patches[0].get_data()
    np.testing.assert_allclose(heights @ np.diff(edges), counts.sum())
    if num_clients == 100:
        main_class = cells.get_array().argmax(0)[cells.get_array().sum(0) > 0]
        assert (np.diff(main_class) >= 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has no known format; pass format="),
        (b"PK\x03\x04 broken", "cannot be read as .npz: File is not a zip file"),
        ({"x": [1]}, "it has the arrays ['x'] and no 'client_ids'"),
        ({"x": np.array([None]), "client_ids": [1]}, "Object arrays cannot be loaded"),
    ],
)
def test_files_that_are_no_data_set_are_told_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "data.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        np.savez(file, **content)
    assert message in refusal(capsys, "describe", file)


def test_wrong_options_are_told_in_one_line(path, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert "--label is 'z'; choose one of x, y" in refusal(
        capsys, "plot", path, "--out", out, "--label", "z"
    )
    assert "--label is 'x', of shape (10, 4, 2)" in refusal(
        capsys, "plot", path, "--out", out, "--label", "x"
    )
    assert not out.exists()
    assert "cannot be written: No such file or directory" in refusal(
        capsys, "plot", path, "--out", tmp_path / "none" / "a.png"
    )
    assert "a.xyz cannot be written: Format 'xyz' is not supported" in refusal(
        capsys, "plot", path, "--out", tmp_path / "a.xyz"
    )
    assert "--out" in refusal(capsys, "plot", path)
    assert "describe, plot" in refusal(capsys)

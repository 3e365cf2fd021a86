import json
import math

import commands
import matplotlib.pyplot as plt
import numpy as np
import pytest
from processes import contents

from fedjax_lite.cli import main
from fedjax_lite.runs import reading
from fedjax_lite.runs.plot import lines as drawing
from fedjax_lite.runs.plot.of_runs import panels


def write(folder, *, seed=0, values=(0.5, 0.25), clients=None, wrap=True, tail="", **settings):
    folder.mkdir()
    settings = {"dataset": "digits", "seed": seed, **settings}
    config = {"config": settings, "git": None} if wrap else {**settings, "versions": {}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"kind": "round", "round": r + 1, "loss": 9.0} for r in range(len(values))]
    kind = {"kind": "evaluation"} if wrap else {}
    rows += [
        {**kind, "round": 10 * i, "loss": value, "accuracy": 1 - value}
        for i, value in enumerate(values)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (folder / "metrics.jsonl").write_text(text)
    if clients:
        (folder / "clients.json").write_text(json.dumps({"accuracy": clients}))
    return folder


def lines(folders):
    groups = reading.group_seeds([reading.read_run(folder) for folder in folders])
    names = reading.name_groups(groups)
    return {
        panel.name: {curve.label: curve for _, curve in panel.curves}
        for panel in panels(groups, names)
    }


def refusal(capsys, *args):
    return commands.refusal(capsys, "plot", *args)


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved, by name."""
    found = {}
    monkeypatch.setattr(drawing, "save", lambda figure, path: found.update({path.name: figure}))
    yield found
    for figure in found.values():
        plt.close(figure)


def test_runs_that_differ_in_the_seed_alone_are_one_line(tmp_path):
    for seed, values in enumerate([(0.5, 0.25), (0.7, 0.35), (0.9, 0.9, 0.9)]):
        write(tmp_path / f"a{seed}", seed=seed, values=values, alpha=0.1)
    write(tmp_path / "b", alpha=1.0)
    drawn = lines(sorted(tmp_path.iterdir()))["loss"]
    assert list(drawn) == ["alpha 0.1", "alpha 1"]
    # Two evaluations are all that the three have in common.
    np.testing.assert_array_equal(drawn["alpha 0.1"].x, [0, 10])
    np.testing.assert_array_equal(drawn["alpha 0.1"].values, [[0.5, 0.25], [0.7, 0.35], [0.9, 0.9]])


def test_the_same_run_twice_is_two_lines(tmp_path):
    folders = [write(tmp_path / name) for name in ("before", "after")]
    assert list(lines(folders)["accuracy"]) == ["before", "after"]


def test_the_band_is_the_standard_deviation_of_the_seeds(tmp_path, figures):
    values = np.array([[0.5, 0.2], [0.7, 0.4], [0.9, 0.3]])
    folders = [write(tmp_path / str(i), seed=i, values=v) for i, v in enumerate(values)]
    main(["plot", *map(str, folders), "--out", str(tmp_path)])
    (axes,) = figures["loss.png"].axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), values.mean(0))
    corners = axes.collections[0].get_paths()[0].vertices
    edges = [values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)]
    for x, low, high in zip((0, 10), *edges, strict=True):
        at = corners[corners[:, 0] == x, 1]
        np.testing.assert_allclose([at.min(), at.max()], [low, high])
    (legend,) = figures["loss.png"].legends
    (text,) = legend.get_texts()
    assert "standard deviation of 3 seeds" in text.get_text()


def test_clients_are_drawn_from_the_worst_to_the_best(tmp_path):
    folder = write(tmp_path / "a", clients=[0.9, 0.1, 0.5, math.nan, 0.3, 0.7])
    (curve,) = lines([folder])["clients"].values()
    np.testing.assert_allclose(curve.values[0, ::25], [0.1, 0.3, 0.5, 0.7, 0.9])


def test_a_run_that_was_killed_or_resumed(tmp_path):
    again = json.dumps({"kind": "evaluation", "round": 10, "loss": 0.125}) + "\n"
    folder = write(tmp_path / "a", tail=again + '{"kind": "evalua')
    (curve,) = lines([folder])["loss"].values()
    np.testing.assert_array_equal(curve.values, [[0.5, 0.125]])


def test_rows_of_the_quickstart_are_evaluations(tmp_path):
    (curve,) = lines([write(tmp_path / "a", wrap=False)])["accuracy"].values()
    np.testing.assert_array_equal(curve.values, [[0.5, 0.75]])


@pytest.mark.parametrize("values", [(0.5,), (0.5, math.nan, math.nan), (math.nan,), (1.0, 1e30)])
def test_short_and_diverging_runs_are_drawn(tmp_path, figures, values):
    main(["plot", str(write(tmp_path / "a", values=values)), "--out", str(tmp_path)])
    (axes,) = figures["loss.png"].axes
    (text,) = [text.get_text() for text in axes.texts]
    finite = [value for value in values if not math.isnan(value)]
    if len(finite) < len(values):
        assert text == f"NaN from {10 * len(finite)}"
    else:
        assert text == f"{values[-1]:#.3g}"
        assert axes.get_yscale() == ("log" if values[-1] > 100 else "linear")
    assert axes.get_xlim()[1] >= 10 * (len(values) - 1)


def test_sixteen_lines_are_all_different(tmp_path, figures):
    folders = [write(tmp_path / f"{i:02}", alpha=i) for i in range(drawing.MAX_CURVES)]
    main(["plot", *map(str, folders), "--out", str(tmp_path / "all.png")])
    for axes in figures["all.png"].axes:
        drawn = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        assert len(drawn) == drawing.MAX_CURVES == 16


def test_pictures_are_written_where_they_are_said_to_be(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "a", clients=[0.1, 0.9])
    other = write(tmp_path / "b", alpha=1)
    main(["plot", str(folder), "--out", str(tmp_path / "new")])
    main(["plot", str(folder), str(other), "--out", str(tmp_path / "new" / "both.pdf")])
    files = capsys.readouterr().out.split()
    names = ["new/loss.png", "new/accuracy.png", "new/clients.png", "new/both.pdf"]
    assert files == [str(tmp_path / name) for name in names]
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    # By default in the current folder, and never in that of the run.
    before = contents(folder)
    monkeypatch.chdir(tmp_path / "new")
    main(["plot", str(folder)])
    assert capsys.readouterr().out == "a.png\n"
    assert (tmp_path / "new" / "a.png").stat().st_size > 5000
    monkeypatch.chdir(folder)
    assert "the current folder is that of the run; choose one" in refusal(capsys, ".")
    assert contents(folder) == before


def test_tells_which_runs_are_left_out_and_why(tmp_path, capsys, figures):
    folders = [write(tmp_path / name, alpha=i, clients=[0.1]) for i, name in enumerate("abcd")]
    (folders[1] / "clients.json").write_text('{"accu')
    (folders[2] / "clients.json").unlink()
    (folders[3] / "metrics.jsonl").write_text('{"kind": "round", "round": 1, "loss": 9.0}\n')
    main(["plot", *map(str, folders), "--out", str(tmp_path / "all.png")])
    assert capsys.readouterr().err.splitlines() == [
        f"fedjax-lite: {folders[1]} is left out of clients: clients.json cannot be read",
        f"fedjax-lite: {folders[2]} is left out of clients: clients.json is missing, which train"
        " writes at its end",
        f"fedjax-lite: {folders[3]} is left out of loss and accuracy: it holds no evaluation of"
        " them",
    ]
    assert [len(axes.lines) for axes in figures["all.png"].axes] == [3, 3, 2]
    seeds = [write(tmp_path / f"seed{i}", seed=i, clients=[0.1]) for i in range(2)]
    (seeds[0] / "clients.json").unlink()
    (seeds[0] / "metrics.jsonl").write_text("")
    found = [curve.values for panel in lines(seeds).values() for curve in panel.values()]
    assert [len(values) for values in found] == [1, 1, 1]


def test_what_is_no_run_is_told_in_one_line(tmp_path, capsys):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", tail="oops\n")
    assert "no folder is given" in refusal(capsys)
    assert "c holds no metrics.jsonl; choose" in refusal(capsys, tmp_path / "c")
    assert "metrics.jsonl, line 5 is no row" in refusal(capsys, b)
    assert "--out is missing" in refusal(capsys, a, a)
    assert "--labels has 2 names for 1 lines" in refusal(capsys, a, "--labels", "x", "y")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, a, "--out", tmp_path / "file" / "x")
    assert "cannot be written" in refusal(capsys, a, "--out", tmp_path / "x.docx")
    (a / "metrics.jsonl").write_text("")
    assert "holds no metrics so far" in refusal(capsys, a)
    (a / "config.json").write_text("[]")
    assert "is no JSON object" in refusal(capsys, a)

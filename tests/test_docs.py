"""The programs of the README and of the documentation run, and their commands are commands."""

import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.experiments.settings import Settings, calls_of

ROOT = Path(__file__).parents[1]
PAGES = {
    path.stem: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text, *languages):
    return [block for language, block in FENCED.findall(text) if language in languages]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # Some write records and checkpoints.
    monkeypatch.setattr(fl, "configure_cpu", lambda: None)  # Here, JAX has computed something.
    yield
    plt.close("all")


# Pages about what an extra is for, and what it brings.
EXTRAS = {"accounting": "dp_accounting", "coming_from": "dp_accounting"}


def run(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} comes with the extra `privacy`")
    names = {}
    for program in blocks(PAGES[name], "python"):
        exec(program, names)
    return names


def printed_losses(capsys):
    return list(map(float, re.findall(r"'loss': Array\(([\d.]+)", capsys.readouterr().out)))


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"README", "index", "algorithms"}))
def test_the_programs_of_a_page_run(name, alone):
    names = run(name)
    assert names or not blocks(PAGES[name], "python")


def test_the_first_programs_learn(alone, capsys):
    names = run("index")
    assert max(printed_losses(capsys)) < 0.5
    assert names["infos"].loss.shape == (8, 100)
    assert float(names["infos"].loss[:, -1].max()) < 0.5
    assert names["losses"].shape == (8,)
    assert names["slopes"][0] < 0  # a higher rate would have learned more


def test_the_algorithms_learn(alone, capsys):
    names = run("algorithms")
    assert max(printed_losses(capsys)) < 0.5
    assert names["info"].update_norm > 0


def test_the_algorithm_of_the_guide_is_a_page_and_its_file_is_enough_for_a_shell(alone, capsys):
    file = blocks(PAGES["own_algorithm"], "python")[0]
    assert len([line for line in file.splitlines() if line.strip()]) <= 45
    Path("fed_cm.py").write_text(file)
    small = ["--dataset=synthetic", "--num-clients=6", "--model=logistic", "--rounds=2", "--json"]
    train, sweep = blocks(PAGES["own_algorithm"], "sh")[0].splitlines()
    main([*shlex.split(train)[1:], "--cohort-size=3", *small])
    result = json.loads(capsys.readouterr().out)
    assert result["loss"][-1] < result["loss"][0]
    configured = json.loads((Path(result["out"]) / "config.json").read_text())["config"]
    assert configured["algorithm"].startswith("fed_cm.py:fed_cm(learning_rate=0.1, alpha=0.3, ")
    main([*shlex.split(sweep)[1:], "--cohort-size=3", *small])
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len({run["loss"][-1] for run in runs}) == 3


def test_the_program_of_the_readme_is_the_first_one():
    (program,) = blocks(PAGES["README"], "python")
    assert program == blocks(PAGES["index"], "python")[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 18


def commands():
    for name, text in PAGES.items():
        for block in blocks(text, "", "sh"):
            for line in block.replace("\\\n", "").splitlines():
                if line.startswith("fedjax-lite "):
                    yield pytest.param(shlex.split(line)[1:], id=f"{name}: {line[12:60]}")


FUNCTIONS = {
    "baseline": "baseline.baseline",
    "data": "data.data",
    "eval": "eval.evaluate",
    "list": "listing.list_choices",
    "plot": "plot.plot",
    "quickstart": "quickstart.quickstart",
    "sweep": "sweep.sweep",
    "train": "train.train",
}


@pytest.mark.parametrize("args", list(commands()))
def test_the_commands_are_commands(args, monkeypatch):
    asked = []
    monkeypatch.setattr(f"fedjax_lite.cli.{FUNCTIONS[args[0]]}", asked.append)
    if "--resume" in args:  # Of a run that is not here.
        place = args.index("--resume")
        args = args[:place] + args[place + 2 :]
    main(args)
    (options,) = asked
    if args[0] in ("train", "sweep") and ".py:" not in "".join(args):
        names = [field.name for field in dataclasses.fields(Settings)]
        calls_of(Settings(**{name: getattr(options, name) for name in names}))


def test_the_two_commands_are_there():
    assert "pip install -e '.[run]' && fedjax-lite quickstart" in PAGES["README"]
    assert "pip install -e '.[test]' && pytest" in PAGES["README"]


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("README", r"\[`(\w+)`\]\(fedjax_lite/algorithms/(\w+)\.py\)"),
        ("algorithms", r"\[`fl\.(\w+)`\]\(\S+#fedjax_lite\.algorithms\.(\w+)\.\1\)"),
    ],
)
def test_tables_of_algorithms_have_every_one_and_where_it_is(page, link):
    factories = {name: getattr(fl, name) for name in fl.algorithms.__all__}
    made = {
        name: factory.__module__.rpartition(".")[2]
        for name, factory in factories.items()
        if getattr(factory, "__annotations__", {}).get("return") is fl.FederatedAlgorithm
    }
    del made["federated_algorithm"]
    assert sorted(re.findall(link, PAGES[page])) == sorted(made.items())


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        folder = ROOT if name == "README" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                made = re.sub(
                    r"^examples/(\w+)\.md$", r"../examples/\1.py", target
                )  # For the site.
                assert (folder / made).exists(), (name, target)


def test_the_figure_of_a_round_can_be_drawn(tmp_path):
    program = (ROOT / "docs" / "figures.py").read_text()
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "figures.py").write_text(program)
    with mpl.rc_context():
        runpy.run_path(str(tmp_path / "docs" / "figures.py"), run_name="__main__")
    mpl.use("Agg")
    drawn = (tmp_path / "docs" / "images" / "round.svg").read_text()
    assert drawn.count("<path") > 100

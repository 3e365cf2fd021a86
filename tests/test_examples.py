"""The programs of `examples/` run, and are notebooks.

Each has one line `num_rounds = N`, which is made `num_rounds = 2` here.
"""

import importlib.util
import re
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

import fedjax_lite as fl

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
EXTRAS = {"private_training": "dp_accounting"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_ends_with_numbers_and_a_picture(name, monkeypatch, tmp_path, capsys):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} comes with the extra `privacy`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fl, "configure_cpu", lambda: None)  # Here, JAX has computed something.
    program, count = re.subn(
        r"^num_rounds = \d+$", "num_rounds = 2", EXAMPLES[name].read_text(), flags=re.MULTILINE
    )
    assert count == 1
    exec(compile(program, EXAMPLES[name], "exec"), {})
    plt.close("all")
    printed = [float(x) for x in re.findall(r"\b\d+\.\d+", capsys.readouterr().out)]
    assert printed
    assert Path(f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_site_has_what_an_example_draws(name):
    assert (ROOT / "docs" / "images" / "examples" / f"{name}.png").exists()
    assert f"examples/{name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_an_example_is_a_page_and_a_notebook():
    jupytext = pytest.importorskip("jupytext", reason="jupytext comes with the extra `docs`")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    path = EXAMPLES["first_simulation"]
    notebook = notebooks.read(path)
    nbformat.validate(nbformat.reads(jupytext.writes(notebook, fmt="ipynb"), as_version=4))
    page = notebooks.page(notebook, path)
    assert page.startswith("# A first simulation\n")
    program = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert [line for line in code.splitlines() if line and line[0] != "#"] == program

"""The README's programs run, and its commands are the ones that are tested."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

import fedjax_lite as fl

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_programs_run_and_learn(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # One of them leaves checkpoints.
    monkeypatch.setattr(fl, "configure_cpu", lambda: None)  # Here, JAX has computed something.
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(programs) == 7
    names = {}
    for program in programs:
        exec(program, names)
    printed = re.findall(r"'loss': Array\(([\d.]+)", capsys.readouterr().out)
    assert max(map(float, printed)) < 0.5
    assert names["infos"].loss.shape == (8, 100)
    assert float(names["infos"].loss[:, -1].max()) < 0.5
    assert names["losses"].shape == (16,)
    assert names["result"].history.evaluations[-1]["loss"] < 0.5
    assert names["slope"] < 0  # a higher rate would have learned more
    state = names["algorithm"].init({"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)})
    _, info = names["algorithm"].round(jax.random.key(0), state, names["cohort"])
    assert info.update_norm > 0


def test_the_first_program_has_about_fifteen_lines():
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in program.splitlines() if line.strip()]) <= 18


def test_the_commands_are_there():
    assert "pip install -e '.[run]' && fedjax-lite quickstart" in README
    assert "pip install -e '.[test]' && pytest" in README

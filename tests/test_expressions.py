"""Settings as calls: what is read, filled in and refused, and that nothing is ever evaluated."""

import inspect
import sys

import optax
import pytest

import fedjax_lite as fl
from fedjax_lite.cli import main
from fedjax_lite.experiments import expressions
from fedjax_lite.experiments.expressions import Role
from fedjax_lite.experiments.settings import Settings, calls_of
from fedjax_lite.experiments.tables import LISTED, OPTIMIZERS, ROLES, SCHEDULES

ALGORITHM = ROLES["algorithm"]
OPTIMIZER = ROLES["client_optimizer"]


@pytest.mark.parametrize(
    ("role", "text", "expected"),
    [
        (ALGORITHM, "fed-avg", "fed_avg()"),
        (ALGORITHM, " fed_avg ( num-epochs = 2 ) ", "fed_avg(num_epochs=2)"),
        (ALGORITHM, "apfl(layerwise=True, alpha=.5)", "apfl(layerwise=True, alpha=0.5)"),
        (ALGORITHM, "fed_avg(weighting='uni-form')", "fed_avg(weighting='uni-form')"),
        (OPTIMIZER, "sgd(1e-3, 0.9)", "sgd(learning_rate=0.001, momentum=0.9)"),
        (OPTIMIZER, "sgd(-1)", "sgd(learning_rate=-1)"),
        (
            OPTIMIZER,
            "sgd(cosine-decay-schedule(0.1, 100), momentum=0.9)",
            "sgd(learning_rate=cosine_decay_schedule(init_value=0.1, decay_steps=100),"
            " momentum=0.9)",
        ),
        (
            OPTIMIZER,
            "chain(clip_by_global_norm(1.0), sgd)",
            "chain(clip_by_global_norm(max_norm=1.0), sgd())",
        ),
        (
            OPTIMIZER,
            "sgd(piecewise_constant_schedule(1.0, {10: 0.5, 20: 0.1}))",
            "sgd(learning_rate=piecewise_constant_schedule(init_value=1.0,"
            " boundaries_and_scales={10: 0.5, 20: 0.1}))",
        ),
        # What the program fills in has no place among arguments without a name.
        (ROLES["model"], "mlp((64, 32))", "mlp(hidden=(64, 32))"),
        (ROLES["sampler"], "uniform(20)", "uniform(cohort_size=20)"),
        (ROLES["dataset"], "read('a(b).csv')", "read(path='a(b).csv')"),
        (ROLES["dataset"], "read('a', columns={'x': ['b', \"c\"]})", None),
    ],
)
def test_calls_are_read_and_written(role, text, expected):
    call = expressions.parse(role, text)
    if expected is not None:
        assert str(call) == expected
    # What is written says the same, also with every default.
    completed = expressions.complete(call, role.known)
    for one in (call, completed):
        assert expressions.parse(role, str(one)) == one
    assert expressions.complete(completed, role.known) == completed


HOSTILE = [
    "__import__('os').system('touch pwned')",
    "open('pwned', 'w')",
    "exec('x')",
    "eval",
    "fed_avg.__globals__",
    "fed_avg.__class__()",
    "().__class__.__base__.__subclasses__()",
    "fed_avg()()",
    "fed_avg(num_epochs=().__class__)",
    "fed_avg(num_epochs=[1][0])",
    "fed_avg(num_epochs=1 + 1)",
    "fed_avg(num_epochs=2 ** 99999999)",
    "fed_avg(num_epochs=not 1)",
    "fed_avg(num_epochs=1 if 1 else 2)",
    "fed_avg(num_epochs=1 < 2)",
    "fed_avg(num_epochs=(x := 1))",
    "fed_avg(num_epochs=[i for i in (1,)])",
    "fed_avg(num_epochs={i for i in (1,)})",
    "fed_avg(num_epochs=(lambda: 1)())",
    "fed_avg(weighting=f'{1}')",
    "fed_avg(weighting=b'x')",
    "fed_avg(num_epochs=1j)",
    "fed_avg(num_epochs=...)",
    "fed_avg(num_epochs={1, 2})",
    "fed_avg(num_epochs={**{}})",
    "fed_avg(*(1,))",
    "fed_avg(**{'num_epochs': 1})",
    "fed_avg(num_epochs=num_epochs)",
    "fed_avg(num_epochs=print)",
    "fed_avg(num_epochs=1e999)",
    "fed_avg(num_epochs=1); import os",
    "import os",
    "await fed_avg",
    "yield",
    "1",
    "'fed_avg'",
    "(fed_avg, scaffold)",
    "fed_avg, scaffold",
    "fed_avg(",
    "fed_avg(num_epochs=)",
    "fed_avg\x00",
    "(" * 5000 + ")" * 5000,
    "-" * 5000 + "1",
    "fed_avg(num_epochs=" + "9" * 9000 + ")",
    "fed_avg(" + "num_epochs=1, " * 5000 + ")",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_is_evaluated(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^algorithm "):
        expressions.parse(ALGORITHM, text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("role", "text", "message"),
    [
        (ALGORITHM, "scafold", "scafold is none of the algorithms; did you mean scaffold?"),
        (ALGORITHM, "sgd", "sgd is none of the algorithms; did you mean fed_sgd?"),
        (ALGORITHM, "federated_algorithm", "is none of the algorithms"),
        (ALGORITHM, "fed_avg(epochs=1)", "has no argument epochs; did you mean num_epochs?"),
        (ALGORITHM, "fed_sgd(momentum=1)", "fed_sgd has no argument momentum; it takes model, "),
        (ALGORITHM, "fed_prox(0.1)", "fed_prox takes no arguments without a name; write mu=0.1"),
        (OPTIMIZER, "sgd(1, 2, learning_rate=3)", "learning_rate is given twice; write it once"),
        (OPTIMIZER, "sgd(1, 2, 3, 4, 5)", "sgd takes 4 arguments without a name."),
        (OPTIMIZER, "_private", "_private is none of the optimizers"),
    ],
)
def test_what_there_is_not_is_told_with_what_is_close(role, text, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace(".", r"\.")):
        expressions.parse(role, text)


def test_what_is_missing_is_told():
    with pytest.raises(ValueError, match=r"fed_prox needs mu; write fed_prox\(mu=\.\.\.\)"):
        calls_of(Settings(algorithm="fed_prox"))
    with pytest.raises(ValueError, match=r"adam needs learning_rate; write adam\(learning_rate="):
        calls_of(Settings(client_optimizer="adam"))
    role = Role("box", {"box": lambda size: size / 0}, "boxes")
    with pytest.raises(ValueError, match="box needs size"):
        expressions.build(role, expressions.parse(role, "box"))
    with pytest.raises(ZeroDivisionError):  # No error of an argument: a bug.
        expressions.build(role, expressions.parse(role, "box(1)"))


def test_errors_are_those_of_the_function():
    role = ROLES["updates"]
    call = expressions.parse(role, "clip_by_norm(-1.0)")
    with pytest.raises(ValueError, match=r"updates is 'clip_by_norm.*': max_norm is -1\.0; choose"):
        expressions.build(role, call)


def test_what_is_known_is_filled_in_where_it_is_taken():
    seen = {}

    def net(num_classes, width=8, **rest):
        seen.update(num_classes=num_classes, width=width, rest=rest)

    role = Role("model", {"net": net}, "models", frozenset({"num_classes", "input_shape"}))
    known = {"num_classes": 3, "input_shape": (2,)}
    expressions.build(role, expressions.parse(role, "net(16, depth=2)"), known)
    assert seen == {"num_classes": 3, "width": 16, "rest": {"depth": 2}}
    expressions.build(role, expressions.parse(role, "net(num_classes=5)"), known)
    assert (seen["num_classes"], seen["width"]) == (5, 8)


FILE = """from __future__ import annotations
import dataclasses
from beside import WIDTH

@dataclasses.dataclass
class Net:
    width: int

def net(width=WIDTH):
    if width < 0:
        raise ValueError(f"width is {width}")
    return Net(width)

def _private():
    return None
"""


def test_functions_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("WIDTH = 7")
    (tmp_path / "my-nets.py").write_text(FILE)
    role = ROLES["model"]

    def made(text):
        return expressions.build(role, expressions.parse(role, text))

    path = list(sys.path)
    assert made("my-nets.py:net").width == 7
    assert made("./my-nets.py:net(width=3)").width == 3
    assert made(f"{tmp_path}/my-nets.py:net(4)").width == 4
    # The file is imported once, and beside what else it imports.
    assert type(made("my-nets.py:net")) is type(made(f"{tmp_path}/my-nets.py:net"))
    assert sys.path == path
    assert str(expressions.parse(role, "my-nets.py:net(4)")) == "my-nets.py:net(width=4)"
    for text, message in (
        ("my-nets.py:net(-1)", r"my-nets.py, line 11: ValueError: width is -1"),
        ("my-nets.py:nett", r"my-nets.py has no function nett; did you mean net\?"),
        ("my-nets.py:WIDTH", "has no function WIDTH"),
        ("other.py:net", "there is no file other.py; write its path"),
    ):
        with pytest.raises(ValueError, match=message):
            made(text)
    for name, text, message in (
        ("syntax.py", "x = 1\ndef f(:\n", "syntax.py, line 2: SyntaxError"),
        ("raises.py", "x = 1\n\n1 / 0\n", "raises.py, line 3: ZeroDivisionError: division by zero"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            made(f"{name}:f")


def test_names_are_those_of_the_python_api():
    assert set(ALGORITHM.table) == {
        *("ada_fed_prox", "agnostic_fed_avg", "apfl", "ditto", "fed_avg", "fed_dyn"),
        *("fed_ex_lora", "fed_exp", "fed_nova", "fed_ntd", "fed_prox", "fed_rep", "fed_sam"),
        *("fed_sgd", "fed_shuffle", "gaussian_mixture", "ifca", "k_means", "mime", "mime_lite"),
        *("moon", "p_fed_me", "per_fed_avg", "q_fed_avg", "scaffold"),
    }
    for name, function in ALGORITHM.table.items():
        assert getattr(fl, name) is function
    for name, more, *modules in (
        ("model", {"frozen", "lora", "sharpness_aware"}, fl.models),
        ("sampler", set(), fl.samplers, fl.durations),
    ):
        assert set(ROLES[name].table) == more | {
            n for module in modules for n in dir(module) if inspect.isfunction(vars(module)[n])
        }
    assert set(ROLES["partition"].table) == set(dir(fl.partition))
    for setting, kind in (("updates", fl.UpdateTransform), ("reducer", fl.Reducer)):
        made = {
            name
            for name, function in inspect.getmembers(fl.updates, inspect.isfunction)
            if inspect.get_annotations(function)["return"] is kind
        }
        assert set(ROLES[setting].table) == made - {"chain"}
    assert {"clip_by_norm", "quantize_uniform"} < set(ROLES["updates"].table)
    assert {"trimmed_mean", "sign_flip", "weighted_mean"} < set(ROLES["reducer"].table)
    for name in ("sgd", "adam", "lamb", "lars", "yogi", "chain", "clip_by_global_norm", "adamw"):
        assert OPTIMIZERS[name] is getattr(optax, name)
    for name in ("cosine_decay_schedule", "exponential_decay", "join_schedules"):
        assert SCHEDULES[name] is getattr(optax, name)
    assert "inject_hyperparams" not in SCHEDULES
    assert OPTIMIZERS["fed_adam"] is fl.server_optimizers.fed_adam


def listed(capsys, *args):
    main(["list", *args])
    return capsys.readouterr().out


def test_everything_is_listed(capsys):
    everything = listed(capsys)
    for plural, role in LISTED.items():
        assert f"{plural}: {', '.join(role.table)}\n" in everything
        text = listed(capsys, plural)
        assert len(text.splitlines()) == 2 * len(role.table)
    algorithms = listed(capsys, "algorithms")
    assert "fed_prox(*, mu, weighting='examples', personal=None, " in algorithms
    assert (
        "    FedProx: FedAvg whose clients are pulled towards the server's params.\n" in algorithms
    )
    told = listed(capsys, "fed-prox")
    assert told.startswith("fed_prox(*, mu, ")
    assert inspect.getdoc(fl.fed_prox) in told
    with pytest.raises(SystemExit):
        main(["list", "scafold"])
    assert capsys.readouterr().err == "fedjax-lite: there is no scafold; did you mean scaffold?\n"

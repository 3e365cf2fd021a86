"""The public names and their parameters: what users' code relies on."""

import inspect

import fedjax_lite as fl

NAMES = {
    "clients_mesh": ["num_devices"],
    "cohort": ["key", "population", "cohort_size", "capacity"],
    "configure_cpu": ["num_devices"],
    "evaluate": ["model", "state", "examples"],
    "fed_avg": [
        *("model", "client_optimizer", "server_optimizer", "batch_size", "num_epochs"),
        *("num_steps", "shuffle", "weighting", "on_nonfinite", "lanes", "mesh"),
        "rewrite_convolutions",
    ],
    "fed_sgd": [
        *("model", "server_optimizer", "reduction", "weighting", "batch_size", "on_nonfinite"),
        *("lanes", "mesh", "rewrite_convolutions"),
    ],
    "function_model": ["loss", "init", "metrics"],
    "linen_model": ["module", "example", "loss", "metrics", "inputs"],
    "nnx_model": ["create", "loss", "metrics", "inputs"],
    "replicate": ["tree", "mesh"],
    "ClientResult": ["update", "weight", "metrics", "model_state"],
    "ClientUpdate": ["init", "step", "final"],
    "Cohort": ["client_ids", "num_examples", "offsets", "examples", "sample"],
    "FederatedAlgorithm": ["init", "round"],
    "FederatedDataset": ["examples", "offsets", "client_ids"],
    "Model": ["init", "loss", "metrics"],
    "RoundInfo": [
        *("loss", "update_norm", "num_clients", "num_examples", "num_empty", "num_nonfinite"),
        *("skipped", "clients"),
    ],
    "ServerState": ["params", "model_state", "opt_state", "round"],
}
MODULES = {"data", "models", "partition"}


def test_public_names_and_parameters():
    public = {name for name in vars(fl) if not name.startswith("_")}
    submodules = {name for name in public if inspect.ismodule(getattr(fl, name))}
    assert public - submodules == set(NAMES)
    assert submodules >= MODULES
    for name, parameters in NAMES.items():
        assert list(inspect.signature(getattr(fl, name)).parameters) == parameters, name


def test_every_public_function_is_documented():
    for name in NAMES:
        assert inspect.getdoc(getattr(fl, name))
    for module in MODULES:
        for name, value in vars(getattr(fl, module)).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                assert "Args:" in (inspect.getdoc(value) or ""), name

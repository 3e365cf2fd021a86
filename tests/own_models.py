"""Models of one's own for the command line, whose metrics are not a loss and an accuracy."""

import jax.numpy as jnp

import fedjax_lite as fl


def regression(input_shape):
    """The class as a number, with half of its squared error as the loss, and no metric of it."""

    def predict(params, batch):
        return batch["x"].reshape(batch["x"].shape[0], -1) @ params["kernel"] + params["bias"]

    def error(params, batch):
        return predict(params, batch) - batch["y"]

    def init(key):
        return {"kernel": jnp.zeros(input_shape[0]), "bias": jnp.zeros(())}

    return fl.function_model(
        lambda params, batch: error(params, batch) ** 2 / 2,
        init,
        lambda params, batch: {"absolute_error": jnp.abs(error(params, batch))},
        predict,
    )


def without_metrics(input_shape):
    """The same, which tells nothing but its loss, and that in training alone."""
    return regression(input_shape)._replace(metrics=lambda *args: {}, predict=None)

"""Small models: linear regression, softmax regression, and networks of one hidden layer."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from reference.vectors import Vector


class Model(NamedTuple):
    """The mean loss of a batch, and its gradient."""

    loss: object
    grad: object


def _squares(params, x, y):
    return ((x @ params["w"] + params["b"] - y) ** 2 / 2).mean()


def _squares_grad(params, x, y):
    residual = x @ params["w"] + params["b"] - y
    return Vector({"w": x.T @ residual / len(y), "b": residual.mean()})


regression = Model(_squares, _squares_grad)
"""Params `w` `[features]` and `b` `[]`; half of the squared error."""


def _log_softmax(logits):
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _cross_entropy(params, x, y, shift=0.0):
    log_probabilities = _log_softmax(x @ params["w"] + params["b"] + shift)
    return -log_probabilities[np.arange(len(y)), y].mean()


def _cross_entropy_grad(params, x, y, shift=0.0):
    error = np.exp(_log_softmax(x @ params["w"] + params["b"] + shift))
    error[np.arange(len(y)), y] -= 1
    return Vector({"w": x.T @ error / len(y), "b": error.mean(0)})


softmax = Model(_cross_entropy, _cross_entropy_grad)
"""Params `w` `[features, classes]` and `b` `[classes]`; cross-entropy of shifted logits."""


def tensors(params, *, requires_grad=False):
    """Params, or any arrays, as tensors."""
    return {
        name: torch.tensor(np.asarray(a), requires_grad=requires_grad) for name, a in params.items()
    }


def autograd(loss):
    """The gradient of a loss of tensors, by PyTorch, as a function of arrays."""

    def grad(params, x, y):
        leaves = tensors(params, requires_grad=True)
        value = loss(leaves, torch.tensor(x), torch.tensor(y))
        gradients = torch.autograd.grad(value, list(leaves.values()))
        return Vector(zip(leaves, gradients, strict=True))

    return grad


def forward(params, x):
    """The hidden features and the logits of a network `base` (tanh), `head`, in tensors."""
    features = torch.tanh(x @ params["base_w"] + params["base_b"])
    return features, features @ params["head_w"] + params["head_b"]


def _network_loss(params, x, y):
    return functional.cross_entropy(forward(params, x)[1], y)


def _network_value(params, x, y):
    return _network_loss(tensors(params), torch.tensor(x), torch.tensor(y)).item()


network = Model(_network_value, autograd(_network_loss))
"""Params `base_w`, `base_b`, `head_w`, `head_b`; cross-entropy."""


def normalised_grad(params, state, x, y, *, decay=0.8, epsilon=1e-3):
    """Gradient and next state of a network with BatchNorm between `base` and ReLU, `head`.

    Its params are those of `network`, and `norm_scale` and `norm_bias`; its state, the running
    statistics `norm_mean` and `norm_var`, the biased variance as in flax. The loss is half of the
    squared error of the only output.
    """
    leaves = tensors(params, requires_grad=True)
    hidden = torch.tensor(x) @ leaves["base_w"] + leaves["base_b"]
    center, variance = hidden.mean(0), hidden.var(0, correction=0)
    hidden = (hidden - center) / (variance + epsilon).sqrt()
    hidden = torch.relu(hidden * leaves["norm_scale"] + leaves["norm_bias"])
    output = (hidden @ leaves["head_w"] + leaves["head_b"])[:, 0]
    loss = ((output - torch.tensor(y)) ** 2 / 2).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    seen = Vector({"norm_mean": center.detach(), "norm_var": variance.detach()})
    state = decay * Vector(state) + (1 - decay) * seen
    return Vector(zip(leaves, gradients, strict=True)), state

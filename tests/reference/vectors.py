"""Params that add up like vectors, and what all algorithms do with them."""

import operator
from types import SimpleNamespace as Round

import numpy as np

__all__ = ["Round", "Vector", "client_weight", "mean", "norm", "taking_part"]


class Vector(dict):
    """A dict of float64 arrays with the arithmetic of vectors, coordinate by coordinate."""

    __array_ufunc__ = None  # NumPy's scalars leave their arithmetic with vectors to this class.

    def __init__(self, arrays):
        super().__init__({name: np.asarray(a, np.float64) for name, a in dict(arrays).items()})

    def _combine(self, operation, other):
        if not isinstance(other, dict):
            return Vector({name: operation(a, other) for name, a in self.items()})
        assert self.keys() == other.keys()
        return Vector({name: operation(a, other[name]) for name, a in self.items()})

    def __add__(self, other):
        return self._combine(operator.add, other)

    def __sub__(self, other):
        return self._combine(operator.sub, other)

    def __mul__(self, other):
        return self._combine(operator.mul, other)

    def __truediv__(self, other):
        return self._combine(operator.truediv, other)

    def __pow__(self, power):
        return self._combine(operator.pow, power)

    __rmul__ = __mul__

    def only(self, names):
        """The arrays of these names."""
        return Vector({name: a for name, a in self.items() if name in names})

    def without(self, names):
        """All arrays but those of these names."""
        return Vector({name: a for name, a in self.items() if name not in names})

    def replace(self, other):
        """Itself, with the arrays of another in place of those of the same names."""
        assert other.keys() <= self.keys()
        return Vector({**self, **other})


def norm(vector):
    """The L2 norm over all arrays together."""
    return sum((a**2).sum() for a in vector.values()) ** 0.5


def mean(vectors, weights=None):
    """The weighted mean, or the plain one."""
    weights = [1.0] * len(vectors) if weights is None else weights
    total = 0.0 * vectors[0]
    for weight, vector in zip(weights, vectors, strict=True):
        total = total + weight * vector
    return total / sum(weights)


def client_weight(weighting, num_examples):
    """What a client weighs in the mean over a cohort."""
    return {"examples": float(num_examples), "uniform": 1.0}[weighting]


def taking_part(clients, cohort, batches):
    """Those of a cohort who have examples, with their batches of the round."""
    pairs = zip(cohort, batches, strict=True)
    return [(k, steps) for k, steps in pairs if len(clients[k][0]) > 0]

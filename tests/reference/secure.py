"""Secure aggregation in Python's integers, which know no bits and never wrap around."""

import numpy as np


def to_integers(x, weight, *, max_value, max_weight, num_bits):
    """A client's integers, to the nearest, and that of its weight; and how many were clipped."""
    x, largest = np.asarray(x, np.float64), 2 ** (num_bits - 1) - 1
    unit = round(largest * min(weight / max_weight, 1.0))
    clipped = np.minimum(np.maximum(x, -max_value), max_value)
    # To the nearest, of two to the even one.
    integers = [round(float(v)) for v in unit * clipped / max_value]
    return integers, unit, int((x > max_value).sum()), int((x < -max_value).sum())


def signed(total, modulus):
    """The number closest to zero that leaves the same rest."""
    rest = total % modulus
    return rest - modulus if rest >= modulus / 2 else rest


def weighted_mean(updates, weights, *, modulus_bits, denominator=None, **form):
    """What the server makes of the sums of the clients' integers."""
    sent = [to_integers(x, w, **form)[:2] for x, w in zip(updates, weights, strict=True)]
    modulus = 2**modulus_bits
    sums = [signed(sum(column), modulus) for column in zip(*(q for q, _ in sent), strict=True)]
    total = np.array(sums, np.float64) * form["max_value"]
    if denominator is None:
        return total / signed(sum(unit for _, unit in sent), modulus)
    largest = 2 ** (form["num_bits"] - 1) - 1
    return total * form["max_weight"] / (largest * denominator)


def neighbours(order, degree):
    """Of each client on a ring in this order, those at most half the degree away."""
    size = len(order)
    return {
        client: {
            other
            for there, other in enumerate(order)
            if there != here and min((here - there) % size, (there - here) % size) <= degree // 2
        }
        for here, client in enumerate(order)
    }


def is_lost(graph, arrived, threshold):
    """Whether one of the keys that the server needs has too few shares among those who arrived.

    Of a client that arrived, it needs the key of its own mask; of another one, those of the pairs
    that it makes with neighbours who arrived.
    """
    for client, others in graph.items():
        holders = {client, *others}
        there = holders & arrived
        needed = client in arrived or bool(others & arrived)
        if needed and len(there) < threshold * len(holders):
            return True
    return False

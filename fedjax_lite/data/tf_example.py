"""Decodes serialized `tf.train.Example` messages, without TensorFlow.

Only as much of the protocol-buffer wire format as an Example needs:
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

import numpy as np

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def parse(message: bytes) -> dict[str, np.ndarray]:
    """The features of an example, `[values]` by name: int64, float32, or bytes as objects.

    Raises:
      ValueError: The message is no Example, or is truncated.
    """
    features = {}
    for _, container in _fields(message, {1: {_LENGTH}}):
        for _, entry in _fields(container, {1: {_LENGTH}}):
            parts = dict(_fields(entry, {1: {_LENGTH}, 2: {_LENGTH}}))
            features[parts.get(1, b"").decode()] = _values(parts.get(2, b""))
    return features


def _values(feature: bytes) -> np.ndarray:
    lists = list(_fields(feature, {1: {_LENGTH}, 2: {_LENGTH}, 3: {_LENGTH}}))
    if len(lists) != 1:
        raise ValueError("a feature of a tf.train.Example has no list of values, or several")
    ((kind, content),) = lists
    if kind == 1:
        strings = [value for _, value in _fields(content, {1: {_LENGTH}})]
        array = np.empty(len(strings), object)
        array[:] = strings
        return array
    # Numbers are packed into one field; some writers give each a field of its own.
    packed = b"".join(
        v for _, v in _fields(content, {1: {_LENGTH, _FIXED32 if kind == 2 else _VARINT}})
    )
    return np.frombuffer(packed, "<f4").astype(np.float32) if kind == 2 else _varints(packed)


def _fields(message: bytes, expected: dict[int, set[int]]) -> Iterator[tuple[int, bytes]]:
    """Number and content of each expected field; others are skipped, as the format asks."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            start, (_, at) = at, _varint(message, at)
        elif wire_type in (_LENGTH, _FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
            if wire_type == _LENGTH:
                size, at = _varint(message, at)
            start, at = at, at + size
        else:
            raise ValueError(f"a tf.train.Example has a field of wire type {wire_type}")
        if at > len(message):
            raise ValueError("a tf.train.Example is truncated")
        if number in expected:
            if wire_type not in expected[number]:
                raise ValueError(f"field {number} of a tf.train.Example has wire type {wire_type}")
            yield number, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer of 7 bits per byte, lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("a tf.train.Example is truncated")


def _varints(packed: bytes) -> np.ndarray:
    """`_varint` for many at once, as int64."""
    digits = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(digits < 0x80)
    if digits.size == 0:
        return np.zeros(0, np.int64)
    starts = np.append(0, ends[:-1] + 1) if ends.size else ends
    lengths = ends - starts + 1
    if not ends.size or ends[-1] != digits.size - 1 or lengths.max() > 10:
        raise ValueError("a tf.train.Example is truncated")
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    shifted = (digits & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(shifted, starts).view(np.int64)

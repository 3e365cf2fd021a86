"""Decodes the clients of a FedJAX file: zlib of msgpack of arrays, never a pickle."""

import math
import zlib
from types import ModuleType
from typing import Any

import numpy as np

from fedjax_lite.data import checks

# Extension types of fedjax/core/serialization.py.
_NDARRAY, _BYTES_NDARRAY = 1, 4


def unpack(msgpack: ModuleType, data: Any, max_bytes: int) -> dict[str, np.ndarray]:
    """The features of a client, `[rows, ...]` by name; text as bytes in arrays of objects.

    Raises:
      ValueError: The data is truncated or not what FedJAX writes, or exceeds `max_bytes`.
    """
    if not isinstance(data, bytes):
        raise ValueError(f"its data is of type {type(data).__name__}, not a BLOB")
    decompressor = zlib.decompressobj()
    try:
        packed = decompressor.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"its data cannot be decompressed: {error}") from None
    if len(packed) > max_bytes:
        raise ValueError(f"its data decompresses to more than max_client_bytes ({max_bytes})")
    if not decompressor.eof:
        raise ValueError("its data is truncated")

    def array(code: int, content: bytes) -> np.ndarray:
        if code not in (_NDARRAY, _BYTES_NDARRAY):
            raise ValueError(f"its data has a msgpack extension of type {code}, which is no array")
        return _numbers(msgpack, content) if code == _NDARRAY else _strings(msgpack, content)

    try:
        features = msgpack.unpackb(packed, ext_hook=array, max_array_len=0, max_map_len=1024)
    except (msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"its data is no msgpack: {error}") from None
    if not isinstance(features, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in features.items()
    ):
        raise ValueError("its data is no dict of arrays")
    return features


def _numbers(msgpack: ModuleType, content: bytes) -> np.ndarray:
    """An array written as (shape, name of the dtype, bytes in row-major order)."""
    parts = msgpack.unpackb(content, raw=True, max_array_len=64, max_map_len=0)
    if not isinstance(parts, list) or [type(part) for part in parts] != [list, bytes, bytes]:
        raise ValueError("an array is not written as shape, dtype and bytes")
    shape, name, values = parts
    dtype = checks.NUMERIC.get(name.decode())
    if dtype is None:
        raise ValueError(f"an array has dtype {name!r}, which is none of numbers")
    if _size(shape) * dtype.itemsize != len(values):
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)


def _strings(msgpack: ModuleType, content: bytes) -> np.ndarray:
    """An array of bytes written as (shape, list of all entries)."""
    unpacker = msgpack.Unpacker(raw=True, max_buffer_size=len(content), max_array_len=64)
    unpacker.feed(content)
    if unpacker.read_array_header() != 2:
        raise ValueError("an array of bytes is not written as shape and entries")
    shape = unpacker.unpack()
    if (count := unpacker.read_array_header()) != _size(shape):
        raise ValueError(f"an array of bytes of shape {shape} has {count} entries")
    # Entry by entry: a list would be allocated at the length that a hostile header claims.
    entries = [unpacker.unpack() for _ in range(count)]
    if not all(isinstance(entry, bytes) for entry in entries):
        raise ValueError("an array of bytes has entries of another type")
    array = np.empty(count, object)
    array[:] = entries
    return array.reshape(shape)


def _size(shape: Any) -> int:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has shape {shape!r}")
    return math.prod(shape)

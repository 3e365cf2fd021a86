"""Writes files of the field's formats by other means than the package's."""

import contextlib
import sqlite3
import zlib

import h5py
import msgpack
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def fedjax_array(array):
    """As fedjax/core/serialization.py does."""
    if array.dtype == object:
        content = msgpack.packb((array.shape, list(array.flatten())), use_bin_type=True)
        return msgpack.ExtType(4, content)
    content = (array.shape, array.dtype.name, array.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def fedjax_data(features):
    return zlib.compress(msgpack.packb({k: fedjax_array(v) for k, v in features.items()}))


def write_fedjax(path, rows):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY,"
            " data BLOB NOT NULL, num_examples INTEGER NOT NULL)"
        )
        connection.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows)
    return path


def example_class():
    """tf.train.Example as in tensorflow/core/example/{example,feature}.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        new = file.message_type.add(name=name)
        for number, (label, kind, key) in enumerate(fields, 1):
            of = {"type": kind} if isinstance(kind, int) else {"type_name": kind, "type": 11}
            new.field.add(name=key, number=number, label=label, **of)
        return new

    repeated, optional = field.LABEL_REPEATED, field.LABEL_OPTIONAL
    message("BytesList", (repeated, field.TYPE_BYTES, "value"))
    message("FloatList", (repeated, field.TYPE_FLOAT, "value"))
    message("Int64List", (repeated, field.TYPE_INT64, "value"))
    feature = message(
        "Feature",
        (optional, ".t.BytesList", "bytes_list"),
        (optional, ".t.FloatList", "float_list"),
        (optional, ".t.Int64List", "int64_list"),
    )
    feature.oneof_decl.add(name="kind")
    for part in feature.field:
        part.oneof_index = 0
    features = message("Features", (repeated, ".t.Features.FeatureEntry", "feature"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=optional, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=optional, type=11, type_name=".t.Feature")
    message("Example", (optional, ".t.Features", "features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = example_class()


def example_proto(features):
    example = Example()
    for name, values in features.items():
        array = np.asarray(values).reshape(-1)
        kind = {"f": "float_list", "i": "int64_list", "O": "bytes_list"}[array.dtype.kind]
        getattr(example.features.feature[name], kind).value.extend(array.tolist())
    return example.SerializeToString()


def write_tff(path, data, split="train", sizes=None):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS examples (split_name TEXT NOT NULL,"
            " client_id TEXT NOT NULL, serialized_example_proto BLOB NOT NULL)"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS client_metadata (client_id TEXT NOT NULL,"
            " split_name TEXT NOT NULL, num_examples INTEGER NOT NULL)"
        )
        rows = [
            (split, name, row if isinstance(row, bytes) else example_proto(row))
            for name, rows in data.items()
            for row in rows
        ]
        # One example of each client in turn, as no reader may rely on the order of the table.
        connection.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows[::2] + rows[1::2])
        connection.executemany(
            "INSERT INTO client_metadata VALUES (?, ?, ?)",
            [(name, split, (sizes or {}).get(name, len(rows))) for name, rows in data.items()],
        )
    return path


def write_hdf5(path, data):
    with h5py.File(path, "w") as file:
        for name, features in data.items():
            for feature, values in features.items():
                file.create_dataset(f"examples/{name}/{feature}", data=values)
    return path

"""Any format: found out from the file, read, or converted to a folder of `.npy` files."""

import contextlib
import hashlib
import inspect
import json
import os
import shlex
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_lite import _validate
from fedjax_lite.data import frames, hdf5, huggingface, leaf, mnist, sqlite, tables
from fedjax_lite.data.checks import Transform
from fedjax_lite.data.dataset import FederatedDataset
from fedjax_lite.data.idx import is_idx
from fedjax_lite.data.sources import Columns, Source, chosen, collect, loaded, name_of
from fedjax_lite.data.writer import Writer

FORMATS: dict[str, Callable[..., contextlib.AbstractContextManager[Source]]] = {
    "csv": tables.table,
    "fedjax_sqlite": sqlite.fedjax_sqlite,
    "huggingface": huggingface.huggingface,
    "idx": mnist.idx,
    "leaf": leaf.leaf,
    "npz": tables.npz,
    "parquet": frames.pandas,
    "tff_hdf5": hdf5.tff_hdf5,
    "tff_sqlite": sqlite.tff_sqlite,
}

# The first bytes of compressed files, and what decompresses them; .lzma files have no mark, but
# nearly all are written with these properties.
_COMPRESSED = {b"\xfd7zXZ": "xz", b"]\0\0": "xz", b"\x1f\x8b": "gzip", b"BZh": "bzip2"}


def read(
    path: Any,
    format: str | None = None,  # noqa: A002
    *,
    columns: Columns | None = None,
    transform: Transform | None = None,
    **options: Any,
) -> FederatedDataset:
    """Reads a data set of any known format.

    Args:
      path: A file or folder; a folder that `FederatedDataset.save` wrote is opened, not read. Or
        a `datasets.Dataset`, or a pandas `DataFrame`.
      format: csv, fedjax_sqlite, huggingface, idx, leaf, npz, parquet, tff_hdf5 or tff_sqlite;
        found out from the content if left out. What IDX files hold belongs to nobody, and becomes
        one client: the training examples of a folder that `mnist` reads, or those of another
        `split`; of a single file, `y` if it has one axis and else `x`.
      columns: Features by name, each one that the file has or, for a vector, several:
        `{"x": ["x1", "x2"], "y": "label"}`; "*" stands for all that are not named. All as they
        are if left out.
      transform: Applied to the features of each client that has rows; see the reader of the
        format.
      **options: Those of the reader of the format, such as `client_column` for `read_csv`, or
        `split` for `read_tff_sqlite`.

    Raises:
      ValueError: The format is unknown, or the file is damaged.
      TypeError: `path` is no path, and no table of a kind that is known.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/clients.npz", x=[1, 2, 3], client_ids=["b", "a", "b"])
    ...     dataset = read(f"{folder}/clients.npz")
    >>> dataset["b"]["x"].tolist()
    [1, 3]
    """
    transform = chosen(columns, transform)
    if format is None and _is_path(path) and (Path(path) / "meta.json").exists():
        _known(path, "of save()", options, ["verify"])
        dataset = FederatedDataset.open(path, **options)
        return dataset if transform is None else dataset.map(transform)
    with _open(path, detect(path, format), columns, options) as source:
        return collect(path, source, transform)


def convert(
    source: Any,
    destination: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    columns: Columns | None = None,
    transform: Transform | None = None,
    transform_name: str = "",
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> FederatedDataset:
    """Converts a data set of any known format to the folder that `FederatedDataset.open` maps.

    Works client by client, so that memory is bounded by the largest client (LEAF: the largest
    file; CSV and `.npz`: the table). The folder appears once it is complete. If the process is
    killed, a hidden folder is left beside `destination`, and the same call goes on from there; it
    starts anew if the source or an option has changed. Code cannot be compared: with a
    `transform`, a conversion goes on only if it has a name, the same in both calls.

    Args:
      source: See `read`; what is no path is written anew after each interruption.
      destination: The folder to write, which must not exist.
      format: See `read`.
      columns: See `read`.
      transform: Applied to the features of each client; see `read`.
      transform_name: What the transform does, its settings included.
      progress: Called after each client with the numbers of clients written and of all clients,
        the latter None if the source does not tell.
      **options: See `read`.

    Returns:
      The folder, opened.

    Raises:
      ValueError: The source cannot be read, or `destination` exists.
    """
    format = detect(source, format)  # noqa: A001
    named = (transform is None or bool(transform_name)) and _is_path(source)
    what = {**options, "transform": transform_name, "columns": columns}
    transform = chosen(columns, transform)
    fingerprint = _fingerprint(Path(source), format, what) if named else ""
    with (
        _open(source, format, columns, options) as (clients, total),
        Writer(destination, fingerprint=fingerprint) as writer,
    ):
        written = writer.num_clients
        try:
            for index, (client_id, load) in enumerate(clients):
                if index >= written:
                    writer.append(client_id, loaded(client_id, load, transform))
                if progress is not None:
                    progress(index + 1, total)
        except ValueError as error:
            raise ValueError(f"{name_of(source)}: {error}") from None
    return FederatedDataset.open(destination)


def _open(
    path: Any,
    format: str,  # noqa: A002
    columns: Columns | None,
    options: dict[str, Any],
) -> contextlib.AbstractContextManager[Source]:
    _, *known = inspect.signature(FORMATS[format]).parameters
    if format == "npz" and "client_column" in options:  # Its columns are arrays.
        options = {**options, "client_ids": options["client_column"]}
        del options["client_column"]
    _known(path, format, options, known)
    if "columns" in known:
        options = {**options, "columns": columns}
    return FORMATS[format](path, **options)


def _known(
    path: Any,
    format: str,  # noqa: A002
    options: Mapping[str, Any],
    known: Sequence[str],
) -> None:
    if unknown := set(options) - set(known):
        raise ValueError(
            f"{name_of(path)} is of format {format}, which has no option {min(unknown)!r}; its"
            f" options are {', '.join(known)}."
        )


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike))


def _fingerprint(source: Path, format: str, options: dict[str, Any]) -> str:  # noqa: A002
    """Changes when what would be converted does."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) or [source]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    what = json.dumps([str(source.resolve()), format, options, stats], default=repr)
    return hashlib.sha256(what.encode()).hexdigest()


def detect(path: Any, format: str | None = None) -> str:  # noqa: A002
    """The format asked for, or else that of the content.

    Raises:
      ValueError: The format is unknown, or the file is compressed.
      TypeError: `path` is no path, and no table of a kind that is known.
    """
    if not _is_path(path):
        return _detect_table(path)
    path = Path(path)
    if format is not None:
        _validate.choice("format", format, FORMATS)
        if path.is_file() and format != "idx":
            with path.open("rb") as file:
                _refuse_compressed(path, file.read(64))
        return format
    if (path / "meta.json").exists():
        raise ValueError(f"{path} is such a folder already; open it with FederatedDataset.open().")
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return "huggingface"
        if any(path.glob("*.json")):
            return "leaf"
        if mnist.is_mnist(path):
            return "idx"
        raise ValueError(f"{path} is a folder of no known format; pass a file, or format=.")
    try:
        with path.open("rb") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf")  # A byte-order mark.
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path.") from None
    if start.startswith(b"SQLite format 3\0"):
        return _sqlite_format(path)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "tff_hdf5"
    if start.startswith(b"PK\x03\x04"):
        return "npz"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.lstrip().startswith(b"{"):
        return "leaf"
    if is_idx(path):
        return "idx"
    _refuse_compressed(path, start)
    if path.suffix == ".csv":
        return "csv"
    empty = "" if start else "is empty, and "
    raise ValueError(
        f"{path} {empty}has no known format; pass format=, one of {', '.join(FORMATS)}."
    )


def _detect_table(table: Any) -> str:
    """The format of an object of another library, told by what it has."""
    if hasattr(table, "iloc"):
        return "parquet"
    if hasattr(table, "with_format") and hasattr(table, "column_names"):
        if isinstance(table, Mapping):
            raise ValueError(f"the data set holds the splits {list(table)}; pass one of them.")
        if not hasattr(table, "num_rows"):
            raise TypeError(
                f"path is of type {type(table).__name__}, a stream; pass a datasets.Dataset, such"
                " as Dataset.from_list(list(stream))."
            )
        return "huggingface"
    if hasattr(table, "to_pandas"):
        raise TypeError(f"path is of type {type(table).__name__}; pass its to_pandas().")
    raise TypeError(
        f"path is of type {type(table).__name__}; pass the path of a file or folder, a"
        " datasets.Dataset or a pandas DataFrame, or arrays to FederatedDataset.from_arrays."
    )


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed; decompress it first: {program} --decompress --keep"
                f" {shlex.quote(str(path))}"
            )


def _sqlite_format(path: Path) -> str:
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as c:
            names = {name for (name,) in c.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise ValueError(f"{path} is a damaged SQLite file: {error}; fetch it anew.") from None
    return "fedjax_sqlite" if "federated_data" in names else "tff_sqlite"

"""Labels of a parquet column: integers with class names in the schema's metadata, or strings."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fedpeft.data.interface import Indices
from fedpeft.errors import DataInvalid


def read_labels(
    schema: pa.Schema, name: str, column: Sequence[pa.Array], where: str
) -> tuple[tuple[str, ...], Indices]:
    """Returns class names and labels of a column that came in batches.

    Integers without class names get their decimal figures as names, so that a label map can name them.

    Raises:
        DataInvalid: If a label is missing, negative, or beyond the class names, or the column holds something else.
    """
    kind = schema.field(name).type
    values = pa.chunked_array(column, kind)
    if values.null_count:
        row = next(i for i, value in enumerate(values) if not value.is_valid)
        raise DataInvalid(f"{where}: row {row} has no value in label column {name!r}")
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        values = values.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names, labels = np.unique(np.asarray(values.to_pylist(), dtype=object).astype(str), return_inverse=True)
        return tuple(map(str, names)), _frozen(labels)
    if not pa.types.is_integer(kind):
        raise DataInvalid(f"{where}: label column {name!r} is {kind}; integers or strings are read")
    return _integers(schema, name, values.to_numpy().astype(np.int64), where)


def _integers(schema: pa.Schema, name: str, labels: Indices, where: str) -> tuple[tuple[str, ...], Indices]:
    names = class_names(schema, name)
    if names is None:
        known, labels = np.unique(labels, return_inverse=True)
        return tuple(str(value) for value in known), _frozen(labels)
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        row = int(outside[0])
        raise DataInvalid(f"{where}: row {row} has label {labels[row]}; the file names classes 0 to {len(names) - 1}")
    return names, _frozen(labels)


def _frozen(labels: Indices) -> Indices:
    labels = np.ascontiguousarray(labels, np.int64)
    labels.flags.writeable = False
    return labels


def class_names(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """Returns the ClassLabel names of a column from the metadata key `huggingface`, or None if it has none.

    Raises:
        DataInvalid: If the metadata is there but malformed, or names a class twice.
    """
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        feature = json.loads(raw)["info"]["features"].get(name, {})
        names = feature.get("names")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataInvalid("the schema's metadata key `huggingface` does not hold info.features as JSON") from None
    if names is None:
        return None
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise DataInvalid(f"the class names of column {name!r} in the schema's metadata are not a list of strings")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataInvalid(f"the schema's metadata names class {twice[0]!r} of column {name!r} twice")
    return tuple(names)


def metadata(features: dict[str, dict[str, object]]) -> dict[bytes, bytes]:
    """Returns schema metadata that says what columns are, as the `datasets` library writes it."""
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}

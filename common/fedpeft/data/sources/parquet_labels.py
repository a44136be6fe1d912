"""Labels of a parquet column: integers with class names in the schema's metadata, strings, or truth values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fedpeft.data.sources.interface import Indices
from fedpeft.errors import DataInvalid

NO_LABEL = "(no label)"
"""The class of rows that have none, so that a label map can name it."""


class Labels(NamedTuple):
    """The labels of a column.

    Attributes:
        class_names: See `Source.class_names`.
        labels: See `Source.labels`.
        unnamed: See `Source.unnamed`.
    """

    class_names: tuple[str, ...]
    labels: Indices
    unnamed: frozenset[str]


def read_labels(schema: pa.Schema, name: str, column: Sequence[pa.Array], where: str) -> Labels:
    """Returns class names and labels of a column that came in batches.

    What has no name in the schema is a class of its own, which no run has and a label map can name: an integer by its
    decimal figures (-1, 255), a missing value as `NO_LABEL`.

    Raises:
        DataInvalid: If a label is not whole, or the column holds something else.
    """
    values = pa.chunked_array(column, schema.field(name).type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.string())  # false, true
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        known = np.asarray(values.drop_null().to_pylist(), dtype=object).astype(str)
        names, labels = np.unique(known, return_inverse=True)
        return Labels(*_with_missing(tuple(map(str, names)), labels, values), frozenset())
    if pa.types.is_floating(kind):  # what pandas makes of integers where one is missing
        values = _whole(values, where)
    elif not pa.types.is_integer(kind):
        raise DataInvalid(f"{where}: label column {name!r} is {kind}; whole numbers or strings are read")
    numbers = values.drop_null().to_numpy()
    if numbers.size and int(numbers.max()) >= 2**63:
        raise DataInvalid(f"{where}: label column {name!r} holds {numbers.max()}; numbers below 2^63 are read")
    numbers = numbers.astype(np.int64)
    named = class_names(schema, name) or ()
    all_names, positions = _integers(named, numbers)
    return Labels(*_with_missing(all_names, positions, values), frozenset(all_names[len(named) :] if named else ()))


def _whole(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Returns floating-point labels as integers; what is not a number is missing."""
    numbers = values.to_numpy()
    missing = np.isnan(numbers)
    odd = np.flatnonzero(~missing & ~((numbers == np.rint(numbers)) & (np.abs(numbers) < 2**53)))
    if len(odd):
        raise DataInvalid(f"{where}: row {odd[0]} has label {numbers[odd[0]]:g}; whole numbers or strings are read")
    return pa.chunked_array([pa.array(np.where(missing, 0, numbers).astype(np.int64), mask=missing)])


def _integers(names: tuple[str, ...], numbers: Indices) -> tuple[tuple[str, ...], Indices]:
    """Returns names with those of the numbers that have none, ascending, behind them; and positions among all."""
    unnamed = np.unique(numbers[(numbers < 0) | (numbers >= len(names))])
    labels = numbers.copy()
    outside = np.isin(numbers, unnamed)
    labels[outside] = len(names) + np.searchsorted(unnamed, numbers[outside])
    return (*names, *(str(number) for number in unnamed)), labels


def _with_missing(names: tuple[str, ...], known: Indices, values: pa.ChunkedArray) -> tuple[tuple[str, ...], Indices]:
    """Gives missing values, for which `known` has no label, a class of their own if there are any."""
    if not values.null_count:
        return names, _frozen(known)
    missing = np.asarray(values.is_null().to_numpy(), np.bool_)
    labels = np.full(len(values), len(names), np.int64)
    labels[~missing] = known
    return (*names, NO_LABEL), _frozen(labels)


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


def named(value: Any, names: Sequence[str]) -> Any:
    """Returns the name of a ClassLabel's number; -1 and a missing value are None, a text is its own name.

    A number beyond the names is its decimal figures, as among the labels.
    """
    if value is None or value == -1 or value != value:
        return None
    if isinstance(value, str):
        return value
    return names[int(value)] if 0 <= value < len(names) else str(int(value))


def metadata(features: dict[str, dict[str, object]]) -> dict[bytes, bytes]:
    """Returns schema metadata that says what columns are, as the `datasets` library writes it."""
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}

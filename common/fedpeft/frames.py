"""Results as data frames of pandas, and as tables of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fedpeft.errors import LocalError

if TYPE_CHECKING:
    import pandas


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Returns a data frame with a row for each mapping.

    Raises:
        LocalError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise LocalError("a data frame needs pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame(list(rows))


def table_html(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of HTML; everything in it is text."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

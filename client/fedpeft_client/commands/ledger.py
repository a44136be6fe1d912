"""`fedpeft-client ledger`: shows the owner what left this device, when, where to, and how many bytes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from fedpeft.errors import SettingsInvalid
from fedpeft.formatting import size
from fedpeft.process.output import note, say, say_json, say_table
from fedpeft_client.egress.entries import FILE, Contents, read, unreadable_text
from fedpeft_client.egress.view import Row, rows, totals
from fedpeft_client.error_policy import Exit
from fedpeft_client.state import state_flag

_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_COLUMNS = ("WHEN", "KIND", "RUN", "ROUND", "PAYLOAD", "WIRE", "OUTCOME")
_RIGHT = ("ROUND", "PAYLOAD", "WIRE")


def main(arguments: list[str]) -> int:
    """Shows the ledger of a state directory; a client may be using it.

    Raises:
        SettingsInvalid: If no state directory, or no time, was named.
        StateInvalid: If there is no ledger.
    """
    given = _parser().parse_args(arguments)
    contents = read(state_flag.named(given.state_dir) / FILE)
    since = _since(given.since, datetime.now(UTC))
    found = [row for row in rows(contents.booked.values()) if row.at >= since]
    if given.run:
        found = [row for row in found if row.entry.run == given.run]
    sums = totals(found)
    if given.json:
        transfers = [row.as_json() for row in found]
        say_json({"transfers": transfers, "totals": sums, "unreadable_lines": contents.unreadable})
    else:
        _show(found, sums, _nothing(contents))
    if contents.unreadable:
        note(unreadable_text(contents.unreadable))
    return Exit.DONE


def _nothing(contents: Contents) -> str:
    """Returns what is said where there is no row: no more than what the ledger proves."""
    if contents.unreadable:
        return "no entry to show"
    return "nothing that matches has left this device" if contents.booked else "nothing has left this device"


def _show(found: Sequence[Row], sums: Mapping[str, Mapping[str, int]], nothing: str) -> None:
    if not found:
        say(nothing)
        return
    cells = [row.cells() for row in found]
    filled = [i for i in range(len(_COLUMNS)) if any(row[i] for row in cells)]  # a column of nothing says nothing
    columns, shown = [_COLUMNS[i] for i in filled], [[row[i] for i in filled] for row in cells]
    say_table(columns, shown, right=_RIGHT, below=[row.text() for row in found])
    say("")
    lines = [
        [kind, f"{s['transfers']:,}", size(s["payload_bytes"]), size(s["wire_bytes"])]
        for kind, s in sorted(sums.items(), key=lambda item: item[0] == "all")
    ]
    say_table(("TOTAL", "TRANSFERS", "PAYLOAD", "WIRE"), lines, right=("TRANSFERS", "PAYLOAD", "WIRE"))


def _since(text: str | None, now: datetime) -> datetime:
    """Returns the time that is meant by 7d, or by a date.

    Raises:
        SettingsInvalid: If it is neither.
    """
    if text is None:
        return datetime.min.replace(tzinfo=UTC)
    try:
        if span := _SPAN.fullmatch(text):
            return now - timedelta(seconds=int(span[1]) * _SECONDS[span[2]])
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SettingsInvalid(f"--since: {text!r} is neither a span such as 7d, 12h, 30m nor a date") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-client ledger",
        description="Shows everything that left this device: what, when, and how many bytes. "
        "A client may be using the state directory meanwhile.",
        epilog="Example: fedpeft-client ledger --state-dir /var/lib/fedpeft --since 7d",
    )
    state_flag.add(parser)
    parser.add_argument("--since", metavar="TIME", help="only what left since then: 7d, 12h, or a date; all if absent")
    parser.add_argument("--run", metavar="ID", help="only what left for this run")
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")
    return parser

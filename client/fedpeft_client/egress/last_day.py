"""Bytes that left in the last 24 hours, for a policy's limit on the bytes of a day."""

from __future__ import annotations

from collections import OrderedDict
from datetime import datetime, timedelta

DAY = timedelta(days=1)


class LastDay:
    """The entries of the last 24 hours, by when they were over: a last byte may have left as late as that."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, tuple[datetime, int]] = OrderedDict()

    def count(self, number: str, at: datetime, size_bytes: int) -> None:
        """Takes what is known of an entry at a time, which is no earlier than that of any other one."""
        self._recent.pop(number, None)
        self._recent[number] = at, size_bytes
        while next(iter(self._recent.values()))[0] < at - DAY:
            self._recent.popitem(last=False)

    def left_since(self, begin: datetime) -> int:
        """Returns how many bytes left since a time of the last 24 hours."""
        return sum(size for at, size in self._recent.values() if at >= begin)

    def falls_below(self, most: int, now: datetime) -> datetime:
        """Returns when no more than `most` bytes will have left in the 24 hours before, if nothing more leaves."""
        total = self.left_since(now - DAY)
        for at, size in self._recent.values():
            if total <= most:
                break
            if at >= now - DAY:
                total, now = total - size, at + DAY
        return now

"""A mapping that is bounded: a server may name as many runs and tickets as it likes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedDict(OrderedDict[Key, Value]):
    """A dictionary of the keys that were put last, the oldest first.

    Args:
        most: Keys that are kept.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def put(self, key: Key, value: Value) -> Key | None:
        """Puts a value under a key, new or not; returns the key that was let go for it, or None."""
        self[key] = value
        self.move_to_end(key)
        return self.popitem(last=False)[0] if len(self) > self._most else None

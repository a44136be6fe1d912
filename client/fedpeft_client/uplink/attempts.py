"""Failures counted by key, for the keys that failed last: a server may name as many as it likes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from fedpeft_client.state.bounded import BoundedDict

MOST = 256
"""Keys that are counted; of more, the one that failed longest ago is forgotten."""

Key = TypeVar("Key", bound=Hashable)


class Attempts(Generic[Key]):
    """Failed attempts in a row, by key."""

    def __init__(self) -> None:
        self._failed: BoundedDict[Key, int] = BoundedDict(MOST)

    def failed(self, key: Key) -> int:
        """Counts a failed attempt; returns how many there were."""
        count = self._failed.get(key, 0) + 1
        self._failed.put(key, count)
        return count

    def forget(self, key: Key) -> None:
        """Begins to count anew."""
        self._failed.pop(key, None)

    def __len__(self) -> int:
        return len(self._failed)

"""Throttle: the same thing said once in a while, with how often it was left unsaid."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from fedpeft_server.access import bounds

Key = TypeVar("Key", bound=Hashable)


class Throttle(Generic[Key]):
    """Remembers when each kind of message was last said, and how often it was not since.

    Args:
        quiet_s: Seconds for which a kind is not repeated.
        clock: Monotonic seconds.
    """

    def __init__(self, quiet_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet_s = quiet_s
        self._clock = clock
        self._said: OrderedDict[Key, tuple[float, int]] = OrderedDict()

    def suppressed(self, key: Key) -> int | None:
        """Returns how often the kind was left unsaid since it was said, if it is to be said now; None if it is not."""
        now = self._clock()
        last, count = self._said.pop(key, (-math.inf, 0))
        quiet = now - last < self._quiet_s
        self._said[key] = (last, count + 1) if quiet else (now, 0)
        if len(self._said) > bounds.MOST_REMEMBERED:
            self._said.popitem(last=False)
        return None if quiet else count

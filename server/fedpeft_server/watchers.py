"""Watchers of runs: each is told that its run changed, and of which versions there are new figures."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Changes:
    """Changes of a run that one watcher has not been told yet."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._scored: set[int] = set()

    def tell(self, scored: int | None) -> None:
        """Notes a change."""
        if scored is not None:
            self._scored.add(scored)
        self._changed.set()

    async def come(self) -> None:
        """Waits until there is one."""
        await self._changed.wait()

    def take(self) -> set[int]:
        """Returns the versions with new figures, and begins anew."""
        scored, self._scored = self._scored, set()
        self._changed.clear()
        return scored


class Watchers:
    """The watchers of all runs."""

    def __init__(self) -> None:
        self._of: dict[str, set[Changes]] = defaultdict(set)

    def watch(self, run: str) -> Changes:
        """Returns where the changes of a run are told; end with `unwatch`."""
        changes = Changes()
        self._of[run].add(changes)
        return changes

    def unwatch(self, run: str, changes: Changes) -> None:
        """Ends a watch."""
        self._of[run].discard(changes)
        if not self._of[run]:
            del self._of[run]

    def announce(self, run: str, scored: int | None = None) -> None:
        """Tells the watchers of a run that it changed; `scored` is the version that has new figures, if one has."""
        for changes in self._of.get(run, ()):
            changes.tell(scored)

"""Shards: files of one data set that say how many they are (`train-00000-of-00002.parquet`), and are all there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedpeft.errors import DataInvalid

_SHARD = re.compile(r"(?P<of>.*?)[-_.]?(?P<number>\d+)-of-(?P<count>\d+)", re.IGNORECASE)
_NAMED = 3


def check_shards(place: Path, files: Sequence[Path]) -> None:
    """Refuses shards of which some are missing, or that were written twice: rows would be lost, or read twice.

    Args:
        place: The folder or pattern, for the message.
        files: The files of one data set.

    Raises:
        DataInvalid: If the shards are not whole; names those that are missing.
    """
    found: dict[str, dict[int, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
    for file in files:
        if shard := _SHARD.fullmatch(file.stem):
            found[shard["of"]][int(shard["count"])][int(shard["number"])] = file
    for name, by_count in found.items():
        if len(by_count) > 1:
            counts = " and ".join(f"{count:,}" for count in sorted(by_count))
            raise DataInvalid(
                f"{place} holds shards of {counts} files under one name ({name or 'none'}), so rows may be there "
                "twice; keep those that were written last"
            )
        ((count, shards),) = by_count.items()
        # From 0 as `datasets` counts, or from 1 as others do.
        first = 1 if count in shards and 0 not in shards else 0
        missing = count - len(shards.keys() & set(range(first, first + count)))
        if missing:
            example = next(iter(shards.values()))
            gaps = [n for n in range(first, first + min(count, 10_000)) if n not in shards][:_NAMED]
            more = f" and {missing - len(gaps):,} more" if missing > len(gaps) else ""
            raise DataInvalid(
                f"{place} lacks {missing:,} of {count:,} shards, as {example.name} counts them: "
                f"number {', '.join(map(str, gaps))}{more}; fetch them, or name one file to read it alone"
            )

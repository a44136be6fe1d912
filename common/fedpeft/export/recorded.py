"""The digest that an adapter file must have, from the records that lie beside it."""

from __future__ import annotations

from pathlib import Path

from fedpeft.errors import BlobCorrupt
from fedpeft.rounds import record

RECORDS = "records.jsonl"


def recorded_sha256(adapter: Path, run: str, version: int) -> str | None:
    """Returns the digest of a version's adapter file, hexadecimal; None where no record beside it says one.

    Args:
        adapter: The file; the records of its run are RECORDS in the same folder, as a simulation leaves them.
        run: Id of the run that the file says it is of; records of another run say nothing.
        version: The version that the file says it is.

    Raises:
        BlobCorrupt: If a line there is not the record of a round, or the records of that run end before the version.
        OSError: If the records are there and cannot be read.
    """
    path = adapter.with_name(RECORDS)
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = record.parse(line.rstrip("\n"))
            except BlobCorrupt as error:
                raise BlobCorrupt(f"{path}, line {number}: {error.message}") from None
            if found.run != run:
                return None
            if found.round == version:
                return found.adapter_sha256
            if found.round == 1 and version == 0:
                return found.base_sha256
    if version > 0:
        raise BlobCorrupt(
            f"{path} ends before version {version}, which {adapter.name} is, so that is of other records; move it away "
            "from these to use it without"
        )
    return None

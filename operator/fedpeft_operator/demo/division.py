"""Division of a demo's data: a client for each vendor of drawings, or one's own images dealt out at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpeft.data.overlap import overlap
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import Partition, iid, natural
from fedpeft.data.sources.interface import Indices, Selection, Source
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import SettingsInvalid
from fedpeft.formatting import counted
from fedpeft.process import output

COLUMN = "vendor"
"""The column whose values are the clients, where there is one."""
CLIENTS = 4
"""Clients where there is none, and no flag says how many."""
HELD_OUT_OF = 5
"""One image of so many is held out, where no held-out ones are named."""
SEED = 0


def divide(
    train: Path, test: Path | None, clients: int | None, folder: Path, held_out: Path
) -> tuple[dict[str, int], Path]:
    """Writes the images of each client, and those to be held out unless they are there.

    Args:
        train: The data; all of them, if no held-out ones are named.
        test: Held-out images.
        clients: Number of clients; with vendors, those that have most.
        folder: The clients' data, made here.
        held_out: Likewise, of the evaluator if `test` is None.

    Returns:
        Images by client, and the place of the held-out ones.

    Raises:
        SettingsInvalid: If there are fewer vendors, or images, than clients.
        DataInvalid: If data cannot be read.
    """
    whole = open_source(train)
    rows, aside = (np.arange(len(whole), dtype=np.int64), None) if test else _parted(len(whole))
    tested = Selection(whole, aside) if aside is not None else open_source(test or train)
    shared = overlap([("", Selection(whole, rows))], 1, tested)
    if shared.images or shared.not_compared:
        output.note(str(shared))
    has_vendors = COLUMN in whole.schema.names
    parts = _by_vendor(whole, rows, clients, train) if has_vendors else _dealt(rows, clients or CLIENTS, train)
    record = write_parts(train, parts, folder, source=whole)
    names = {client["name"]: client["examples"] for client in record["clients"]}
    if aside is not None:
        write_parts(train, Partition((aside,), ("held-out",), "iid", seed=SEED), held_out, source=whole)
        output.say(f"{train}: {counted(len(whole), 'image')}, of which {len(aside):,} are held out for the evaluator")
    output.say("clients: " + ", ".join(f"{name} ({counted(count, 'image')})" for name, count in names.items()))
    return names, test or held_out / "held-out"


def _parted(images: int) -> tuple[Indices, Indices]:
    """Draws the images that are held out; returns the rows of the others, and theirs."""
    order = np.random.default_rng(SEED).permutation(images).astype(np.int64)
    held = max(1, images // HELD_OUT_OF)
    return np.sort(order[held:]), np.sort(order[:held])


def _by_vendor(whole: Source, rows: Indices, clients: int | None, train: Path) -> Partition:
    vendors = whole.column(COLUMN)
    found = natural([vendors[row] for row in rows], COLUMN)
    wanted = len(found.names) if clients is None else clients
    if wanted > len(found.names):
        raise SettingsInvalid(f"--clients {wanted}: {train} has drawings of {len(found.names)} vendors")
    most = sorted(range(len(found.names)), key=lambda k: -len(found.parts[k]))[:wanted]
    kept = sorted(most)
    return replace(found, parts=tuple(rows[found.parts[k]] for k in kept), names=tuple(found.names[k] for k in kept))


def _dealt(rows: Indices, clients: int, train: Path) -> Partition:
    if clients > len(rows):
        raise SettingsInvalid(f"--clients {clients}: {train} has {counted(len(rows), 'image')} to train on")
    dealt = iid(len(rows), clients, SEED)
    return replace(dealt, parts=tuple(rows[part] for part in dealt.parts))

"""`fedpeft run verify`: whether a run's history is what its records say; replays it where the updates are at hand."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import BlobCorrupt, SettingsInvalid, StateInvalid, VersionRemoved
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.session import Session, run_async, session_of

if TYPE_CHECKING:
    from fedpeft.api.operator_client import OperatorClient
    from fedpeft.api.verification import Replay
    from fedpeft.rounds.commit import RunHeader
    from fedpeft.rounds.record import Record
    from fedpeft.v1 import run_pb2

EPILOG = epilog(
    "fedpeft run verify run-0a1b2c3d4e5f",
    "fedpeft run verify run-0a1b2c3d4e5f --spool server-data/spool",
    hint="The second one is for the server's machine, when the server was started with --keep-updates.",
    ends=OF_NAMED,
)


def verify(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `run list` shows it.")],
    spool: Annotated[
        Path | None,
        typer.Option(
            "--spool", metavar="DIR", help="Fold every round again from the updates kept here (DATA_DIR/spool)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every round's record and version, and with the kept updates fold them again to the same bits."""
    if spool is not None and not spool.is_dir():
        raise SettingsInvalid(f"--spool {spool} is not a folder; name DATA_DIR/spool of a server with --keep-updates")
    say = (lambda line: None) if as_json else output.say
    found = run_async(verified(session_of(context), run, spool, say))
    if as_json:
        output.say_json(found)
    elif found["rounds"]:
        output.say(f"{run} agrees with its records; the last one has sha256 {found['last_record_sha256']}")
    else:
        output.say(f"{run} has no committed round yet: there is nothing to verify")


async def verified(session: Session, run: str, spool: Path | None, say: Callable[[str], None]) -> views.Json:
    """Verifies a run, a line a round; returns what it found.

    Raises:
        BlobCorrupt: With the first thing that does not agree.
        StateInvalid: If an update that is to be folded again is not in `spool`.
    """
    from fedpeft.api.verification import check_records

    async with session.client() as server:
        found, _ = await server.run(run)
        relayed = not _makes_versions(found)  # then a round is committed before its parent's version is here
        rounds = [r for r in await server.rounds(run) if r.record and (relayed or r.number <= found.version)]
        read = [(r.record, r.record_sha256) for r in rounds]
        records = check_records(run, found.version, read, makes_versions=not relayed)
        with tempfile.TemporaryDirectory(prefix="fedpeft-verify-") as scratch:
            header = _header(found)
            replay = _replay(header, spool, Path(scratch), records) if spool else None
            base = Path(scratch, "version-0")
            if records and not relayed:
                await _download(server, run, 0, records[0].base_sha256, base)
            for record in records:
                there = True
                if record.rolled_back_to is not None:
                    there = await _check_rollback(server, header, records, record, Path(scratch))
                if relayed:
                    found_there = await _check_sum(server, record, Path(scratch), replay)
                else:
                    base, found_there = await _check(server, record, base, replay)
                say(f"round {record.round}: {_agreement(replay, there=there and found_there, relayed=relayed)}")
    return {
        "run": run,
        "rounds": [_row(record, r.record_sha256, spool is not None) for record, r in zip(records, rounds, strict=True)],
        "last_record_sha256": rounds[-1].record_sha256 if rounds else "",
    }


def _agreement(replay: Replay | None, *, there: bool, relayed: bool) -> str:
    """Returns what was found to agree of a round, which nothing else was found of; `there` are its versions."""
    version = "the version before it" if relayed else "version"
    if not there:
        return f"record {'and replay agree' if replay else 'agrees'}; a version was removed by the server's retention"
    if replay is None:
        return f"record and {version} agree"
    noise = ", up to the noise, which nobody can draw again" if replay.noised else ""
    return f"record, {version} and replay agree{noise}"


async def _check(server: OperatorClient, record: Record, base: Path, replay: Replay | None) -> tuple[Path, bool]:
    """Checks the version of a round; returns its file, for the next one, and False if the server has it no more.

    Raises:
        StateInvalid: If the server has the version no more from which the round is to be folded again, and it cannot be
            made again.
    """
    version, there = base.with_name(f"version-{record.round}"), True
    try:
        await _download(server, record.run, record.round, record.adapter_sha256, version)
    except VersionRemoved:
        there = False
    if replay:
        if record.rolled_back_to is None and not await asyncio.to_thread(base.exists):
            raise StateInvalid(
                f"round {record.round} cannot be folded again: version {record.round - 1}, from which it starts, was "
                "removed by the server's retention, and cannot be made again; verify without --spool"
            )
        await asyncio.to_thread(replay.fold, record, base)
        if not there and (made := replay.made(record)):
            await asyncio.to_thread(shutil.copyfile, made, version)
    await asyncio.to_thread(base.unlink, missing_ok=True)
    return version, there


async def _check_sum(server: OperatorClient, record: Record, scratch: Path, replay: Replay | None) -> bool:
    """Checks the version of a parent's server from which a round began; with a replay also the sum that it made.

    Returns False if the server has the version no more; the sum is made of the updates alone.
    """
    base, there = scratch / "base", True
    try:
        await _download(server, record.run, record.round - 1, record.base_sha256, base)
    except VersionRemoved:
        there = False
    if replay:
        await asyncio.to_thread(replay.fold, record, base)
    await asyncio.to_thread(base.unlink, missing_ok=True)
    return there


async def _check_rollback(
    server: OperatorClient, header: RunHeader, records: Sequence[Record], record: Record, scratch: Path
) -> bool:
    """Checks that a round which went back to an earlier version made a version of its tensors.

    Returns False if the server has the earlier one no more.
    """
    from fedpeft.api.verification import check_rollback
    from fedpeft.rounds.commit import Stored

    to, path = record.rolled_back_to or 0, scratch / "earlier"
    sha256 = records[to - 1].adapter_sha256 if to else records[0].base_sha256
    try:
        await _download(server, record.run, to, sha256, path)
    except VersionRemoved:
        return False
    await asyncio.to_thread(check_rollback, header, record, Stored(path, sha256), scratch)
    await asyncio.to_thread(path.unlink)
    return True


async def _download(server: OperatorClient, run: str, version: int, sha256: str, path: Path) -> None:
    found = (await server.download(run, path, version=version)).sha256.hex()
    if found != sha256:
        number = max(version, 1)
        raise BlobCorrupt(f"round {number}: version {version} of {run} has sha256 {found}; the record says {sha256}")


def _makes_versions(run: run_pb2.Run) -> bool:
    """Returns False if a parent's server makes the versions of a run."""
    from fedpeft.rounds.policies import policy_of

    return policy_of(_header(run).config.rounds).makes_versions


def _header(run: run_pb2.Run) -> RunHeader:
    from fedpeft.rounds.commit import RunHeader
    from fedpeft.rpc.wire import config_from_proto, spec_from_proto

    return RunHeader(run.id, config_from_proto(run.config), spec_from_proto(run.spec), run.backbone_fingerprint)


def _replay(header: RunHeader, spool: Path, scratch: Path, records: Sequence[Record]) -> Replay:
    from fedpeft.api.verification import Replay

    return Replay(header, spool, scratch, records)


def _row(record: Record, sha256: str, replayed: bool) -> views.Json:
    return {
        "round": record.round,
        "record_sha256": sha256,
        "adapter_sha256": record.adapter_sha256,
        **({"sum_sha256": record.sum_sha256} if record.sum_sha256 else {}),
        "clients": [counted.client for counted in record.contributions],
        "replayed": replayed,
    }

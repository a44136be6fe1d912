"""`fedpeft run export`: an adapter version as a file, or a folder, that loads elsewhere."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import ConfigInvalid, SettingsInvalid
from fedpeft.privacy.statement import in_words
from fedpeft.process import durable, output
from fedpeft_operator.cli.epilogs import OF_NAMED, epilog
from fedpeft_operator.cli.path_checks import check_file, check_folder
from fedpeft_operator.cli.session import Session, require, run_async, session_of
from fedpeft_operator.cli.weights import Weights, check_needed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fedpeft.export.model_card import Provenance
    from fedpeft.peft import TunedModel
    from fedpeft.v1 import operator_service_pb2 as pb
    from fedpeft.v1 import run_pb2

EPILOG = epilog("fedpeft run export run-0a1b2c3d4e5f --format timm --out emoji-timm.safetensors", ends=OF_NAMED)


class Format(StrEnum):
    """Format of an exported adapter version."""

    SAFETENSORS = "safetensors"
    TIMM = "timm"
    PEFT = "peft"


def export(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `run list` shows it.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write; for peft, the folder.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="safetensors: the adapter alone, as stored; timm: the whole model; peft: a Hugging Face peft folder.",
        ),
    ] = Format.SAFETENSORS,
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", min=0, help="The version; the newest if absent.")
    ] = None,
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter version as safetensors, a timm state dict, or a `peft` folder."""
    replaces = check_place(out, form)
    written = run_async(exported(session_of(context), run, out, form, version, weights))
    note_replaced(out, replaces=replaces)
    number, sha256 = written.version, written.sha256.hex()
    if as_json:
        said = {"run": run, "version": number, "format": str(form), "out": str(out), "adapter_sha256": sha256}
        output.say_json(said)
    else:
        output.say(f"version {number} of {run} is in {out} ({form}); adapter sha256 {sha256}")


async def exported(
    session: Session, run: str, out: Path, form: Format, version: int | None = None, weights: Path | None = None
) -> pb.DownloadHeader:
    """Writes an adapter version; returns the number, size and digest of the adapter file that the server has.

    Raises:
        BackboneMismatch: If the weights here are not those that the run was made with.
        ConfigInvalid: If the run's method has no such form.
        StateInvalid: If `out` cannot be written.
    """
    if form is Format.SAFETENSORS:
        async with session.client() as server:
            with output.progress("downloading") as progress:
                return await server.download(run, out, version=version, progress=progress)
    require("train", "torch", "timm", "peft")
    with beside(out) as scratch:
        adapter = scratch / "adapter.safetensors"
        async with session.client() as server:
            found, _ = await server.run(run)
            check_form(found.spec.method, form)
            rounds = await server.rounds(run, records=False)
            with output.progress("downloading") as progress:
                header = await server.download(run, adapter, version=version, progress=progress)
        provenance = _provenance(found, header.version, rounds)
        write(_tuned(found, adapter, weights), form, provenance, scratch / "whole", out)
        return header


def check_place(out: Path, form: Format) -> bool:
    """Finds a place that cannot be written before anything is fetched or built.

    Returns:
        True if a file with content is there, which would be replaced.

    Raises:
        SettingsInvalid: If it cannot be written.
    """
    if form is not Format.PEFT:
        check_file(out, form)
        if form is Format.TIMM and out.exists() and not out.is_file():
            raise SettingsInvalid(f"--out {out} is a device or a pipe; timm is written as a file")
        return out.is_file() and out.stat().st_size > 0
    check_folder(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsInvalid(f"--out {out} exists already; peft is written as a folder that is new or empty")
    return False


def note_replaced(out: Path, *, replaces: bool) -> None:
    """Says that what was written took the place of a file, if it did."""
    if replaces:
        output.note(f"fedpeft: {out} was there and is replaced")


def check_form(method: str, form: Format) -> None:
    """Finds a form that a method does not have before anything is downloaded."""
    if form is not Format.PEFT:
        return
    from fedpeft.peft import methods

    if methods.get(method).peft_form is None:
        with_form = ", ".join(name for name in methods.names() if methods.get(name).peft_form)
        raise ConfigInvalid(
            f"--format peft is for {with_form}; this run tunes {method}: keep the adapter file (safetensors) itself"
        )


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Gives a folder beside a place to be written, so that what is finished there can be renamed into place."""
    with ExitStack() as stack:
        with durable.refusals(f"writing {out}"):
            scratch = stack.enter_context(durable.scratch(out))
        yield scratch


def _tuned(run: run_pb2.Run, adapter: Path, weights: Path | None) -> TunedModel:
    """Returns the run's model with an adapter version, its backbone proved equal."""
    from fedpeft.export.restored import restored
    from fedpeft.rpc.wire import config_from_proto

    config = config_from_proto(run.config)
    check_needed(config.model, weights)
    return restored(config, run.backbone_fingerprint, adapter, weights)


def _provenance(run: run_pb2.Run, version: int, rounds: Iterable[run_pb2.Round]) -> Provenance:
    """Returns how a version came about, from the rounds up to it."""
    from fedpeft.export.model_card import Provenance

    until = [round_ for round_ in views.committed(rounds) if round_.number <= version]
    counted = [client for round_ in until for client in views.counted(round_)]
    return Provenance(
        run=run.id,
        version=version,
        rounds=run.config.rounds.count,
        clients=len(set(counted)),
        updates=len(counted),
        wire_bytes_up=sum(round_.wire_bytes_up for round_ in until),
        wire_bytes_down=sum(round_.wire_bytes_down for round_ in until),
        metrics=dict(until[-1].metrics if until else run.initial_metrics),
        privacy=in_words(stated) if (stated := views.privacy(run, (r.metrics for r in until))) else "",
    )


def write(tuned: TunedModel, form: Format, provenance: Provenance | None, partial: Path, out: Path) -> None:
    """Writes a model in full before it appears under its name."""
    from fedpeft.export.formats import as_peft, as_timm

    with durable.refusals(f"writing {out}"):
        if form is Format.TIMM:
            as_timm(tuned, partial)
        else:
            as_peft(tuned, partial, provenance)
        durable.settle(partial, out)

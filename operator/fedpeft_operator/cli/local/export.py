"""`fedpeft export`: an adapter file, from wherever it came, as a model that loads elsewhere; asks no server."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.errors import BlobCorrupt, ModelInvalid, SettingsInvalid
from fedpeft.process import durable, output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.run.export import Format, beside, check_form, check_place, note_replaced, write
from fedpeft_operator.cli.session import require
from fedpeft_operator.cli.weights import Weights, check_needed

if TYPE_CHECKING:
    from fedpeft.adapters.adapter_file import AdapterInfo
    from fedpeft.config import RunConfig

EPILOG = epilog(
    "fedpeft export simulated/adapter.safetensors --format timm --out emoji-timm.safetensors",
    hint="The file is one that `fedpeft simulate`, `fedpeft demo` or `fedpeft run export` wrote; it names its run. "
    "Where the records of that run lie beside it (records.jsonl), its digest must be the recorded one.",
)


class ModelFormat(StrEnum):
    """Format of a model that is made of an adapter file."""

    TIMM = "timm"
    PEFT = "peft"


def export(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter version, adapter.safetensors.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write; for peft, the folder.")],
    model_format: Annotated[
        ModelFormat, typer.Option("--format", help="timm: the whole model; peft: a Hugging Face peft folder.")
    ] = ModelFormat.TIMM,
    weights: Weights = None,
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="HEX", help="Digest that FILE must have, as `run export` printed it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter file as a timm state dict or a `peft` folder, without a server."""
    form = Format(model_format)
    wanted = None if sha256 is None else _digest(sha256)
    replaces = check_place(out, form)
    if replaces and adapter.exists() and out.samefile(adapter):
        raise SettingsInvalid(f"--out {out} is the adapter file itself, which would be lost; name another file")
    require("train", "torch", "timm", "peft")
    info, config = _read(adapter)
    found = _checked(adapter, info, wanted)
    check_form(info.method, form)
    check_needed(config.model, weights)
    from fedpeft.export.restored import restored

    with beside(out) as scratch:
        write(restored(config, info.backbone, adapter, weights, found), form, None, scratch / "whole", out)
    note_replaced(out, replaces=replaces)
    if as_json:
        said = {"run": info.run, "version": info.version, "format": str(form), "out": str(out), "adapter_sha256": found}
        output.say_json(said)
    else:
        output.say(f"version {info.version} of {info.run} is in {out} ({form}); adapter sha256 {found}")


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise SettingsInvalid(f"--sha256 {text[:80]!r} is not a SHA-256: 64 hexadecimal digits")
    return text.lower()


def _checked(adapter: Path, info: AdapterInfo, wanted: str | None) -> str:
    """Returns the digest of an adapter file, which is the wanted one and that of its record, where there are such.

    Raises:
        BlobCorrupt: If it is another.
        OSError: If a file cannot be read.
    """
    from fedpeft.export.recorded import RECORDS, recorded_sha256

    found = durable.sha256(adapter).hex()
    recorded = recorded_sha256(adapter, info.run, info.version)
    for digest, whose in ((wanted, "--sha256"), (recorded, f"the record of it in {adapter.with_name(RECORDS)}")):
        if digest not in (None, found):
            raise BlobCorrupt(f"{adapter} was changed: its sha256 is {found}, and {whose} says {digest}")
    return found


def _read(adapter: Path) -> tuple[AdapterInfo, RunConfig]:
    """Returns what an adapter file says of itself, and the run file in it.

    Raises:
        SettingsInvalid: If it is a folder.
        ModelInvalid: If it is not such a file, or its run file cannot be understood here.
    """
    if adapter.is_dir():
        raise SettingsInvalid(f"{adapter} is a folder; name the file in it, such as {adapter / 'adapter.safetensors'}")
    import json

    from fedpeft.adapters.adapter_file import open_adapter
    from fedpeft.config import parse_config
    from fedpeft.errors import ConfigInvalid

    with open_adapter(adapter) as file:
        info = file.info
    try:
        config = parse_config(json.loads(info.extra["config"]), accepted=True)
    except (KeyError, ValueError, ConfigInvalid) as error:
        fault = error.message if isinstance(error, ConfigInvalid) else "it is missing or damaged"
        raise ModelInvalid(f"{adapter} does not hold the run file of its run: {fault}") from None
    for what, said, meant in (("model", info.model, config.model.name), ("method", info.method, config.peft.method)):
        if said != meant:
            raise ModelInvalid(f"{adapter} was changed: its {what} is {said!r}, and {meant!r} in the run file in it")
    return info, config

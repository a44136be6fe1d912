"""`fedpeft export`: an adapter file, from wherever it came, as a model that loads elsewhere; asks no server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.cli import output
from fedpeft.cli.epilogs import epilog
from fedpeft.cli.exporting import Format, beside, check_form, check_place, write
from fedpeft.cli.session import require
from fedpeft.cli.weights import Weights, check_needed
from fedpeft.errors import ModelInvalid, SettingsInvalid

if TYPE_CHECKING:
    from fedpeft.adapter_file import AdapterInfo
    from fedpeft.config import RunConfig

EPILOG = epilog(
    "fedpeft export simulated/adapter.safetensors --format timm --out emoji-timm.safetensors",
    hint="The file is one that `fedpeft simulate`, `fedpeft demo` or `fedpeft run export` wrote; it names its run.",
)


def export(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter version, adapter.safetensors.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write; for peft, the folder.")],
    form: Annotated[
        Format, typer.Option("--format", help="timm: the whole model; peft: a Hugging Face LoRA folder.")
    ] = Format.TIMM,
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter file as a timm state dict or a `peft` folder, without a server."""
    if form is Format.SAFETENSORS:
        raise SettingsInvalid(f"{adapter} is safetensors already; take --format timm or peft, or copy it")
    check_place(out, form)
    require("train", "torch", "timm", "peft")
    info, config = _read(adapter)
    check_form(info.method, form)
    check_needed(config.model, weights)
    from fedpeft.restored import restored

    with beside(out) as scratch:
        write(restored(config, info.backbone, adapter, weights), form, None, scratch / "whole", out)
    if as_json:
        output.say_json({"run": info.run, "version": info.version, "format": str(form), "out": str(out)})
    else:
        output.say(f"version {info.version} of {info.run} is in {out} ({form})")


def _read(adapter: Path) -> tuple[AdapterInfo, RunConfig]:
    """Returns what an adapter file says of itself, and the run file in it.

    Raises:
        ModelInvalid: If it is not such a file, or its run file cannot be understood here.
    """
    import json

    from fedpeft.adapter_file import open_adapter
    from fedpeft.config import parse_config
    from fedpeft.errors import ConfigInvalid

    with open_adapter(adapter) as file:
        info = file.info
    try:
        return info, parse_config(json.loads(info.extra["config"]))
    except (KeyError, ValueError, ConfigInvalid) as error:
        fault = error.message if isinstance(error, ConfigInvalid) else "it is missing or damaged"
        raise ModelInvalid(f"{adapter} does not hold the run file of its run: {fault}") from None

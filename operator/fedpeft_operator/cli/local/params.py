"""`fedpeft params`: what each PEFT method tunes and sends, counted on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.errors import ModelInvalid, SettingsInvalid
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.session import require

VARIANTS: tuple[tuple[str, str, Mapping[str, object]], ...] = (
    ("adapter-per-block", "adapter", {"shared": False}),
    ("prompt-shallow", "prompt", {"deep": False}),
)
"""Beside every method with its defaults: (name shown, method, options)."""

EPILOG = epilog("fedpeft params --model vit_base_patch16_224 --classes 100")


def params(
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="timm's name of the model.")],
    classes: Annotated[int, typer.Option("--classes", metavar="N", min=2, max=100_000, help="Number of classes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what each PEFT method tunes and sends one way; needs no weights."""
    require("train", "torch", "timm")
    try:
        rows = counted(model, classes)
    except ModelInvalid as error:
        raise SettingsInvalid(f"--model: {error.message.removeprefix('model.name: ')}") from None
    if as_json:
        output.say_json(rows)
        return
    full = next(int(row["parameters"]) for row in rows if row["method"] == "full")
    output.say_table(
        ("METHOD", "PARAMETERS", "MIB ONE WAY", "OF FULL"),
        [
            (
                row["method"],
                f"{row['parameters']:,}",
                formatting.mib(row["payload_bytes"]),
                f"{100 * row['parameters'] / full:.2f} %",
            )
            for row in rows
        ],
        right=("PARAMETERS", "MIB ONE WAY", "OF FULL"),
    )


def counted(model: str, classes: int) -> list[views.Json]:
    """Returns method, parameters and payload bytes (dense float32, one way) of every method and variant, largest first.

    Raises:
        ModelInvalid: If timm has no such model, or no method fits it.
    """
    from fedpeft.peft import count, methods

    cases = [(name, name, dict[str, object]()) for name in methods.names()] + list(VARIANTS)
    rows = []
    for shown, method, options in cases:
        parameters = count(model, method, options, classes)
        payload_bytes = parameters * views.BYTES_PER_PARAMETER
        rows.append({"method": shown, "parameters": parameters, "payload_bytes": payload_bytes})
    return sorted(rows, key=lambda row: -row["parameters"])

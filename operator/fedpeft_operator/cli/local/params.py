"""`fedpeft params`: what each PEFT method tunes and sends, counted on the model itself."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.errors import ConfigInvalid, ModelInvalid, SettingsInvalid
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.session import require

EPILOG = epilog("fedpeft params --model vit_base_patch16_224 --classes 100")


def params(
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="timm's name of the model.")],
    classes: Annotated[int, typer.Option("--classes", metavar="N", min=2, max=100_000, help="Number of classes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what each PEFT method tunes and sends one way; needs no weights."""
    require("train", "torch", "timm")
    output.note(f"building {model} without weights, and every method on it ...")
    try:
        rows = counted(model, classes)
    except ModelInvalid as error:
        raise SettingsInvalid(f"--model: {error.message.removeprefix('model.name: ')}") from None
    if as_json:
        output.say_json(rows)
        return
    full = rows[0]["parameters"]  # nothing tunes more than the whole model
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
    """Returns method, parameters and payload bytes of every method and variant that fits the model, largest first.

    The bytes are those of a round's largest update, dense float32.

    Raises:
        ModelInvalid: If timm has no such model.
        ConfigInvalid: If no method fits it.
    """
    from fedpeft.peft import methods, timm_spec

    cases = [(name, name, dict[str, object]()) for name in methods.names()]
    cases += [
        (shown, name, dict(options))
        for name in methods.names()
        for shown, options in methods.get(name).variants.items()
    ]
    rows, left_out = [], dict[str, ConfigInvalid]()
    for shown, method, options in cases:
        try:
            spec = timm_spec(model, method, options, classes)
        except ConfigInvalid as error:
            left_out[shown] = error
            continue
        payload_bytes = spec.largest_update * views.BYTES_PER_PARAMETER
        rows.append({"method": shown, "parameters": spec.parameters, "payload_bytes": payload_bytes})
    if not rows:
        raise left_out[cases[0][0]]
    for shown, fault in left_out.items():
        output.note(f"fedpeft: {shown} is left out: {fault.message.removeprefix('peft.method: ')}")
    return sorted(rows, key=lambda row: -row["parameters"])

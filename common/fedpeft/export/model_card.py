"""The README of an exported adapter: what it is, how it came about, how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from fedpeft.formatting import counted

if TYPE_CHECKING:
    from fedpeft.models.backbones import Backbone
    from fedpeft.peft.tuned import TunedModel

MIB = 1024 * 1024
MOST_CLASSES = 20
"""Classes that are named; adapter versions at rest name all."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Provenance of an adapter version. Clients are counted, never named: who takes part may be private.

    Attributes:
        run: Id of the run.
        version: The adapter version; as many rounds were committed.
        rounds: Rounds of the whole run.
        clients: Clients of whom at least one update was counted.
        updates: Updates that were counted.
        wire_bytes_up: Bytes from the clients in those rounds, whole messages.
        wire_bytes_down: Likewise, to the clients.
        metrics: Figures of the version on held-out data: `accuracy` (0 to 1), `loss` (nats), `examples`.
        privacy: Guarantee of the run up to the version, in words; empty without one.
    """

    run: str
    version: int
    rounds: int
    clients: int
    updates: int
    wire_bytes_up: int
    wire_bytes_down: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    privacy: str = ""


def card(tuned: TunedModel, fingerprint: str, provenance: Provenance | None = None) -> str:
    """Returns the Markdown of an adapter's card, with the front matter that model hubs read.

    Args:
        tuned: The model and its method, which has a form in the `peft` library.
        fingerprint: Of the backbone, hexadecimal.
        provenance: Origin of the adapter, as far as it is known.
    """
    model, form = tuned.backbone.config, tuned.method.peft_form
    assert form is not None
    title = f"{form.noun[0].upper()}{form.noun[1:]} for image classification, tuned by federated learning"
    about = ModelCardData(
        base_model=f"timm/{model.name}",
        library_name="peft",
        pipeline_tag="image-classification",
        tags=["federated-learning", form.tag, "timm", "fedpeft"],
    )
    return "\n".join(
        [
            "---",
            about.to_yaml(),
            "# license: yours to say, once you share this adapter; the base model's own licence goes with it",
            "---",
            "",
            f"# {title}",
            "",
            f"The data of the clients never left them: they trained {form.change} and the head of one frozen model,",
            "and a server averaged their changes. Made with FedPEFT.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in _rows(tuned, fingerprint, provenance)),
            "",
            "## Loading it",
            "",
            f"It needs the package `{form.library}`.",
            "",
            "```python",
            *_code(tuned),
            "```",
            "",
            _about_weights(model.weights, model.depth is not None),
            "",
        ]
    )


def _rows(tuned: TunedModel, fingerprint: str, provenance: Provenance | None) -> list[tuple[str, str]]:
    backbone = tuned.backbone
    named = json.dumps(backbone.config.classes[:MOST_CLASSES], ensure_ascii=False).replace("|", "\\|")
    more = len(backbone.config.classes) - MOST_CLASSES
    options = tuned.method.options.model_dump(mode="json")
    rows = [
        ("model", f"`{backbone.config.name}`, {backbone.parameters:,} parameters"),
        ("method", ", ".join([tuned.spec.method, *(f"{k} {json.dumps(v)}" for k, v in options.items())])),
        ("tuned", f"{tuned.spec.parameters:,} parameters"),
        *_input(backbone),
        ("classes", f"{len(backbone.config.classes)}: `{named}`" + (f" and {more:,} more" if more > 0 else "")),
    ]
    if provenance is not None:
        updates = counted(provenance.updates, "update was", "updates were")
        up, down = provenance.wire_bytes_up / MIB, provenance.wire_bytes_down / MIB
        rows += [
            ("run", f"`{provenance.run}`, version {provenance.version} of {counted(provenance.rounds, 'round')}"),
            ("clients", f"{provenance.clients:,}, of whom {updates} counted"),
            ("sent", f"{up:.2f} MiB up, {down:.2f} MiB down, whole messages of all clients"),
            ("held-out data", _figures(provenance.metrics)),
            *([("differential privacy", provenance.privacy)] if provenance.privacy else []),
        ]
    return [*rows, ("backbone", f"SHA-256 of the frozen tensors `{fingerprint}`")]


def _input(backbone: Backbone) -> list[tuple[str, str]]:
    images = backbone.images
    if images is None:
        return []
    size = f"{images.image_size} x {images.image_size} pixels, {images.interpolation}"
    return [("input", f"{size}, mean {_numbers(images.mean)}, standard deviation {_numbers(images.std)}")]


def _figures(metrics: Mapping[str, float]) -> str:
    if "accuracy" not in metrics:
        return "not scored"
    examples = f" on {counted(metrics['examples'], 'image')}" if "examples" in metrics else ""
    loss = f", loss {metrics['loss']:.3f}" if "loss" in metrics else ""
    return f"accuracy {100 * metrics['accuracy']:.1f} %{loss}{examples}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _code(tuned: TunedModel) -> list[str]:
    from fedpeft.models.families import timm_arguments

    config = tuned.backbone.config
    arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(config).items())
    source = {"hub": ", pretrained=True", "none": ""}.get(
        config.weights, ', pretrained=True, pretrained_cfg_overlay={"file": "BACKBONE"}'
    )
    return [
        "import timm",
        "from peft import PeftModel",
        "",
        f"backbone = timm.create_model({config.name!r}{source}{arguments})",
        'model = PeftModel.from_pretrained(backbone, ".").eval()  # "." is this folder',
    ]


def _about_weights(weights: str, cut: bool) -> str:
    if weights == "none":
        return (
            'The run started from random weights (`weights = "none"`), which timm does not draw again: take the whole\n'
            "model instead, `fedpeft run export ID --format timm`."
        )
    where = "" if weights == "hub" else "`BACKBONE` is the file of weights that the run was created with. "
    shorter = "timm names the blocks beyond the model's depth as unexpected keys; that is right. " if cut else ""
    return f"{where}{shorter}The whole model in one file: `fedpeft run export ID --format timm`."

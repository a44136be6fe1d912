"""The run files that a new run may begin with, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A run file: what it is, and its text."""

    title: str
    text: str


_HEAD = """\
name = "{name}"

[model]
name = "{model}"
weights = "{weights}"
image_size = {size}
classes = ["smileys", "people"]   # by name: each site maps its own labels to these
"""
_TAIL = """
[rounds]
count = 10
clients = 5

[training]
epochs = 1
batch_size = 32
learning_rate = {rate}
"""


def _text(name: str, method: str, rate: float, *, model: str, size: int, weights: str = "hub") -> str:
    head = _HEAD.format(name=name, model=model, weights=weights, size=size)
    return f"{head}\n[peft]\n{method}\n{_TAIL.format(rate=rate)}"


EXAMPLES: dict[str, Example] = {
    "bias": Example(
        "bias tuning of DINOv2 ViT-S/14",
        _text("emoji", 'method = "bias"', 0.01, model="vit_small_patch14_dinov2", size=56),
    ),
    "lora": Example(
        "LoRA on ViT-B/16",
        _text("emoji-lora", 'method = "lora"\nrank = 8', 0.01, model="vit_base_patch16_224", size=224),
    ),
    "trial": Example(
        "a small trial with random weights",
        _text("trial", 'method = "full"', 0.001, model="vit_tiny_patch16_224", size=32, weights="none"),
    ),
}

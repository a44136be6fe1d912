"""Methods that the Hugging Face `peft` library has: LoRA, what derives from it, and VeRA; one file each."""

from fedpeft.peft.tuners.tuner import ADAPTER, BESIDE, Targets, Tuner, target_layers

__all__ = ["ADAPTER", "BESIDE", "Targets", "Tuner", "target_layers"]

"""Bias tuning (BitFit, arXiv 2106.10199): every bias, those of the norms and the patch embedding included."""

from __future__ import annotations

from fedpeft.peft.method import Method, MethodOptions, methods


@methods.register("bias")
class Bias(Method[MethodOptions]):
    """Tunes every parameter that is named bias."""

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return name.rpartition(".")[2] == "bias"

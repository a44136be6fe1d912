"""Full fine-tuning: everything is tuned and sent. The yardstick, not PEFT."""

from __future__ import annotations

from fedpeft.peft.method import Method, MethodOptions, methods


@methods.register("full")
class Full(Method[MethodOptions]):
    """Tunes every parameter."""

    whole_model_trains = True

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return True

"""Head tuning (linear probing): the classifier alone."""

from __future__ import annotations

from fedpeft.peft.method import Method, MethodOptions, methods


@methods.register("head")
class Head(Method[MethodOptions]):
    """Tunes nothing beside the head."""

    needs = ("head",)

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return False

"""Section `[peft]` of the run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedpeft.config.section import OptionedSection


class PeftConfig(OptionedSection):
    """`[peft]`: the method; its options stand beside it and are checked by the method itself."""

    method: Annotated[str, Field(min_length=1, max_length=64)]
    """Registered name of the method: full, head, bias, adapter, prompt, lora..."""

"""Section `[privacy]` of the run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedpeft.config.section import Section


class PrivacyConfig(Section):
    """`[privacy]`: bounds on what one client can contribute; none if absent."""

    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Largest Euclidean norm of an update over all its tensors: the client scales it down, the server refuses more."""

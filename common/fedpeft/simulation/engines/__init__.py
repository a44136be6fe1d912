"""Engines of a simulation: where the jobs of its clients are computed. One file each, which registers itself."""

from __future__ import annotations

from fedpeft.simulation.engines.engine import Engine, engine_named, engines

__all__ = ["Engine", "engine_named", "engines"]

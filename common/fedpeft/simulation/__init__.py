"""Simulation: a run file's federation on one machine, without a network, with the code of server and client.

`clients_of` finds the clients in the data, `reading_of` how it is read, `simulate` holds the run.
"""

from __future__ import annotations

from fedpeft.simulation.clients import clients_of, reading_of
from fedpeft.simulation.run import simulate

__all__ = ["clients_of", "reading_of", "simulate"]

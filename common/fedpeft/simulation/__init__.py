"""Simulation: a run file's federation on one machine, without a network, with the code of server and client.

`clients_of` finds the clients in the data, `reading_of` how it is read, `simulate` holds the run. `check_run` is what
is refused of a run file, `check_clients` of the clients, `check_folder` of the folder of results, `check_apart` of its
place.
"""

from __future__ import annotations

from fedpeft.simulation.clients import clients_of, reading_of
from fedpeft.simulation.out_folder import check_apart, check_folder
from fedpeft.simulation.run import check_clients, check_run, is_resumable, simulate

__all__ = [
    "check_apart",
    "check_clients",
    "check_folder",
    "check_run",
    "clients_of",
    "is_resumable",
    "reading_of",
    "simulate",
]

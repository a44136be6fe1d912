"""Simulation: a run file's federation on one machine, without a network, with the code of server and client.

`clients_of` finds the clients in the data, `reading_of` how it is read, `simulate` holds the run;
`check_clients` is what it refuses of them, `check_folder` of the folder of its results, `check_apart` of its place.
"""

from __future__ import annotations

from fedpeft.simulation.clients import clients_of, reading_of
from fedpeft.simulation.out_folder import check_apart, check_folder
from fedpeft.simulation.run import check_clients, is_resumable, simulate

__all__ = ["check_apart", "check_clients", "check_folder", "clients_of", "is_resumable", "reading_of", "simulate"]

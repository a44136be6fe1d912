"""FedPEFT: federated parameter-efficient fine-tuning of foundation models.

    import fedpeft

    server = fedpeft.connect("127.0.0.1:7070")
    run = server.create("emoji.toml").wait()
    model = run.load_timm()

docs/python.md shows it in full. Importing the package imports nothing else; each name brings what it needs.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.api.remote import Change as Change
    from fedpeft.api.remote import Round as Round
    from fedpeft.api.remote import Run as Run
    from fedpeft.api.remote import Server as Server
    from fedpeft.api.remote import connect as connect
    from fedpeft.api.simulated import SimulatedRound as SimulatedRound
    from fedpeft.api.simulated import Simulation as Simulation
    from fedpeft.api.simulated import simulate as simulate
    from fedpeft.config import RunConfig as RunConfig
    from fedpeft.config import load_run_file as load_run_file
    from fedpeft.errors import FedpeftError as FedpeftError
    from fedpeft.studies.study import Study as Study
    from fedpeft.studies.study import study as study

__version__ = version("fedpeft")
PROTOCOL = 1
"""Version of the wire protocol in `protos/fedpeft/v1`."""

_HOMES = {
    "Change": "fedpeft.api.remote",
    "FedpeftError": "fedpeft.errors",
    "Round": "fedpeft.api.remote",
    "Run": "fedpeft.api.remote",
    "RunConfig": "fedpeft.config",
    "Server": "fedpeft.api.remote",
    "SimulatedRound": "fedpeft.api.simulated",
    "Simulation": "fedpeft.api.simulated",
    "Study": "fedpeft.studies.study",
    "connect": "fedpeft.api.remote",
    "load_run_file": "fedpeft.config",
    "simulate": "fedpeft.api.simulated",
    "study": "fedpeft.studies.study",
}
"""Module of each name of the package; it is imported when the name is first used."""

__all__ = [
    "PROTOCOL",
    "Change",
    "FedpeftError",
    "Round",
    "Run",
    "RunConfig",
    "Server",
    "SimulatedRound",
    "Simulation",
    "Study",
    "__version__",
    "connect",
    "load_run_file",
    "simulate",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

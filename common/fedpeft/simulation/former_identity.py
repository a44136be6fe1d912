"""The identity that simulations of 0.1.0's development wrote, with paths in it: what they left goes on, where it lies.

Nothing writes it any more; this file can go once no such simulation is waited for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedpeft.rounds.commit import RunHeader
from fedpeft.rpc import wire
from fedpeft.simulation.clients import Clients, Data
from fedpeft.simulation.engines import Engine
from fedpeft.simulation.report import Json


def former_identity(header: RunHeader, engine: Engine) -> Json:
    """Returns that of a simulation."""
    import torch

    inputs = engine.trainer.inputs
    return {
        "format": 1,
        "run": header.run,
        "config": wire.config_to_proto(header.config).SerializeToString(deterministic=True).hex(),
        "backbone": header.fingerprint,
        "clients": _clients_digest(inputs.clients),
        "evaluation": [_evaluation_digest(inputs.evaluation), inputs.held_out],
        "ranks": list(inputs.ranks),
        "reading": str(inputs.reading),
        "label_map": str(inputs.label_map),
        "device": inputs.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({"arithmetic": engine.arithmetic} if engine.arithmetic else {}),
    }


def _evaluation_digest(data: Path | Data | None) -> str:
    return str(data) if data is None or isinstance(data, Path) else _clients_digest({"evaluation": data})


def _clients_digest(clients: Clients) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(clients.items()):
        digest.update(f"{name}\0{data if isinstance(data, Path) else len(data)}\0".encode())
        if not isinstance(data, Path):
            digest.update(data.labels.astype("<i8").tobytes())
    return digest.hexdigest()

"""All checks, in the order in which they are made: what others need comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedpeft.errors import FedpeftError
from fedpeft_operator.doctor.client_side import check_data, check_device, check_state, check_weights
from fedpeft_operator.doctor.disk import check_disks
from fedpeft_operator.doctor.findings import Finding, Setup, fault
from fedpeft_operator.doctor.identities import check_identity, check_server_certificates
from fedpeft_operator.doctor.network import check_network
from fedpeft_operator.doctor.server_side import check_database, check_limits, check_ports
from fedpeft_operator.doctor.server_state import check_server_state
from fedpeft_operator.doctor.versions import check_versions

Check = Callable[[Setup], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "identity": check_identity,
    "certificates": check_server_certificates,
    "server": check_network,
    "server's state": check_server_state,
    "disk": check_disks,
    "open files": check_limits,
    "database": check_database,
    "ports": check_ports,
    "state": check_state,
    "data": check_data,
    "device": check_device,
    "weights": check_weights,
}
"""By what is said to be at fault if a check itself fails."""


def examine(setup: Setup) -> Iterator[Finding]:
    """Yields what every check finds, as it finds it; an error of this project is a fault with its own cure in it."""
    for name, check in CHECKS.items():
        try:
            yield from check(setup)
        except FedpeftError as error:
            sentence, _, cure = error.message.rpartition("; ")
            yield fault(name, sentence or error.message, cure if sentence else "see docs/errors.md")
        except OSError as error:
            yield fault(name, str(error), "check the path and the permissions")

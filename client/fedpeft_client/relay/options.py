"""Options of a relay: the edge's server, and the rounds that it holds there. Light, for the settings read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedpeft.config import LEAST_DEADLINE_S
from fedpeft.errors import IdentityInvalid
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.process.addresses import Address

_IMAGES = "is about images, and a client with --relay has none of its own"
_COMPUTING = "is about computing, which a client with --relay leaves to the edge's own clients"
OF_OTHERS = {
    "evaluate": "does not go with --relay, which sends sums; an evaluator is a client of the parent's server by itself",
    "dry_run": "does not go with --relay, which says at its start whether the edge's server answers and lets it in",
    **dict.fromkeys(("weights", "device", "threads", "rank", "checkpointing"), _COMPUTING),
    **dict.fromkeys(("label_map", "image_column", "label_column", "max_image_pixels"), _IMAGES),
}
"""Settings that a relay has not, and why."""
OF_RELAY = ("relay_identity", "relay_clients", "relay_quorum", "relay_deadline_s", "relay_examples")
"""Settings of a relay."""

KEPT_FREE = 0.25
"""Share of the parent's deadline that an edge whose own is not given leaves for the ways of version and sum."""


@dataclass(frozen=True)
class RelayOptions:
    """Options of a relay.

    Attributes:
        server: HOST:PORT of the edge's server.
        client: Id of this agent at the parent's server.
        clients: Clients whose updates a round of the edge wants.
        quorum: Fewest updates that its sum is made of at its deadline; None for the run file's default.
        deadline_s: Seconds from its opening to its deadline; None for what follows from the parent's.
        examples: Most examples that its clients have together; None if that is not said.
        identity: Folder of an operator's key and certificate at the edge's server; None for plain text.
    """

    server: str
    client: str
    clients: int
    quorum: int | None = None
    deadline_s: float | None = None
    examples: int | None = None
    identity: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns it for the way to the worker."""
        return asdict(self) | {"identity": None if self.identity is None else str(self.identity)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `as_json` returned."""
        folder = data["identity"]
        return cls(**{**data, "identity": None if folder is None else Path(folder)})

    def deadline_of(self, parent_s: float) -> float:
        """Returns the deadline of the edge's rounds, seconds.

        A sum that is there after the parent's deadline counts for nothing, so one that is given ends with it at the
        latest.

        Args:
            parent_s: The deadline of the parent's rounds, seconds.
        """
        if self.deadline_s is not None:
            return min(self.deadline_s, parent_s)
        return max(LEAST_DEADLINE_S, (1 - KEPT_FREE) * parent_s)


def check_together(data: Path | None, relay: str | None, given: Mapping[str, Any]) -> None:
    """Checks that a client either has data or relays, and has the settings of what it does.

    Args:
        data: The setting.
        relay: Likewise.
        given: The other settings of `OF_OTHERS` and `OF_RELAY` that are not the defaults, by name.

    Raises:
        ValueError: With the first fault.
    """
    if data is None and relay is None:
        raise ValueError(
            "--data is missing: name the images of this site; or, for the agent of an edge, its server with --relay"
        )
    if data is not None and relay is not None:
        raise ValueError("--data and --relay exclude each other: a relay sends the sums of its edge, and has no data")
    for name, why in (OF_OTHERS if relay is not None else dict.fromkeys(OF_RELAY, "needs --relay")).items():
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} {why}")
    if relay is None:
        return
    clients, quorum = given.get("relay_clients"), given.get("relay_quorum")
    if clients is None:
        raise ValueError("--relay-clients is missing: the number of clients whose updates a round of the edge wants")
    if quorum is not None and quorum > clients:
        raise ValueError(f"--relay-quorum {quorum} is more than --relay-clients {clients}")


def check_address(relay: str, server: str) -> None:
    """Checks that the edge's server is not the parent's, as far as their addresses say that.

    Raises:
        ValueError: If both are the same.
    """
    edge, parent = Address.parse(relay), Address.parse(server)
    if edge == parent or (edge.is_loopback and parent.is_loopback and edge.port == parent.port):
        raise ValueError(
            f"--relay {relay} is the server that this client is a client of; name the edge's own server, which has "
            "clients of its own"
        )


def check_identity(relay: str, folder: Path | None, *, insecure: bool) -> None:
    """Checks as whom the edge's server is called.

    Raises:
        IdentityInvalid: If the folder cannot be used, or holds no operator's certificate.
        ValueError: If plain text would leave this machine unasked.
    """
    if folder is not None:
        subject = Identity.load(folder).subject
        if subject.role is not Role.OPERATOR:
            raise IdentityInvalid(
                f"the certificate in {folder} is that of {subject}; a relay calls the edge's server as an operator of "
                "it (fedpeft enroll)"
            )
    elif not Address.parse(relay).is_loopback and not insecure:
        raise ValueError(
            f"relay {relay} is not on this machine and the connection is plain text; name an operator's identity with "
            "--relay-identity, use a loopback address, or say --insecure if the network between is trusted"
        )

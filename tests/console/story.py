"""History of the federation that the tests of the pages look at."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import pytest

from fedpeft.v1 import federation_service_pb2 as fed

from .federation import Federation

TRAINERS = ("fxemoji", "noto", "openmoji", "twemoji")
WRONG = "fluent"
"""The client gone wrong: its norms are many times the others'."""
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>"
"""A client's text that wants to be HTML."""


@dataclass(frozen=True)
class Story:
    """The runs that were held: `live` is in its round 7 of 12, `done` is completed, `paused` waits."""

    federation: Federation
    live: str
    done: str
    paused: str


def tell(federation: Federation) -> Story:
    """Plays the story; takes a few seconds."""
    sizes = {"fxemoji": 257, "noto": 625, "openmoji": 640, "twemoji": 699, WRONG: 617}
    federation.join(*(federation.site(name, size) for name, size in sizes.items()))
    federation.join("evaluator", role=fed.CLIENT_ROLE_EVALUATOR)
    done = _done(federation)
    paused = federation.create("skin-lesions", 5, 3)
    federation.ask(lambda server: server.pause(paused, "waiting for the ethics board"))
    return Story(federation, _live(federation), done, paused)


def _done(federation: Federation) -> str:
    run = federation.create("pilot", 3, 4)
    federation.score("evaluator", run, 0)
    for number in range(1, 4):
        federation.play((*TRAINERS[:3], "twemoji"), number)
        federation.score("evaluator", run, number)
    return run


def _live(federation: Federation) -> str:
    everybody = (*TRAINERS, WRONG)
    run = federation.create("emoji", 12, 5, quorum=3)
    federation.score("evaluator", run, 0)
    for number in range(1, 7):
        tickets = federation.tickets(*everybody)
        if number == 4:
            federation.do(federation.sites["noto"].withdraw(tickets.pop("noto"), NASTY))
        if number == 5:
            _refuse(federation, tickets.pop("openmoji"))
        federation.push(tickets, number, {WRONG: 9.0} if number in (3, 6) else None)
        federation.score("evaluator", run, number)
    tickets = federation.tickets(*everybody)
    federation.push({name: tickets[name] for name in ("fxemoji", "noto", WRONG)}, 7)
    return run


def _refuse(federation: Federation, ticket: str) -> None:
    """Sends an update that is not finite, which is refused for good."""
    with pytest.raises(grpc.aio.AioRpcError, match="not finite"):
        federation.do(federation.sites["openmoji"].push(ticket, float("nan"), 2.0, 5))

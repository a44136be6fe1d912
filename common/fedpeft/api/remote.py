"""FedPEFT in a program or a notebook: create a run, watch it, export its result.

    import fedpeft

    server = fedpeft.connect("127.0.0.1:7070")
    run = server.create("emoji.toml")
    for change in run.watch():
        print(change)
    model = run.load_timm()

Nothing here is asynchronous; `fedpeft.api.operator_client` is. Every call raises the classes of `fedpeft.errors`.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from fedpeft.api import blocking, views
from fedpeft.api.caller import choose
from fedpeft.api.following import RunSnapshot, follow
from fedpeft.api.narration import Narrator
from fedpeft.api.operator_client import OperatorClient
from fedpeft.api.tables import rounds_html, runs_html
from fedpeft.arguments import path_of
from fedpeft.rpc import grpc_core
from fedpeft.v1 import operator_service_pb2, run_pb2

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from peft import PeftModel
    from torch import nn

    from fedpeft.config import FindClasses, RunConfig
    from fedpeft.peft import TunedModel

T = TypeVar("T")
RunFile: TypeAlias = "str | Path | Mapping[str, Any] | RunConfig"


class Scored:
    """A round's figures by name, for `Round` and `fedpeft.api.simulated.SimulatedRound`.

    Attributes:
        metrics: All that there are.
    """

    metrics: Mapping[str, float]

    @property
    def accuracy(self) -> float | None:
        """On held-out data, 0 to 1; None while, or if, it is not scored."""
        return self.metrics.get("accuracy")

    @property
    def loss(self) -> float | None:
        """On held-out data; None while, or if, it is not scored."""
        return self.metrics.get("loss")

    @property
    def train_loss(self) -> float | None:
        """Mean over the clients' data; None before the commit."""
        return self.metrics.get("train_loss")


@dataclass(frozen=True)
class Round(Scored):
    """A round as it is known: committed, or in progress.

    Attributes:
        number: 1, 2, ...; the result is adapter version `number`.
        phase: waiting, open, aggregating or committed.
        clients: Ids of those whose updates are counted.
        awaited: Ids of those whose updates are awaited.
        refused: Reasons of refused updates, by client id.
        metrics: `accuracy` (0 to 1), `loss`, `accuracy/CLASS` of the evaluator, `train_loss` of the clients.
        seconds: From the first ticket to the commit; None before.
        bytes_up: Whole messages from the clients.
        bytes_down: Whole messages to the clients.
        full_bytes: Bytes that full fine-tuning would have sent each way.
    """

    number: int
    phase: str
    clients: tuple[str, ...]
    awaited: tuple[str, ...]
    refused: Mapping[str, str]
    metrics: Mapping[str, float]
    seconds: float | None
    bytes_up: int
    bytes_down: int
    full_bytes: int


@dataclass(frozen=True)
class Change:
    """Something new of a run that is watched.

    Attributes:
        text: News, a sentence a line.
        rounds: The rounds that changed.
        connected: True while the server answers; while it does not, it is asked again and again.
    """

    text: str
    rounds: tuple[Round, ...]
    connected: bool

    def __str__(self) -> str:
        return self.text


class Server:
    """A FedPEFT server, as an operator sees it. Made by `connect`."""

    def __init__(self, address: str, client: Callable[[], OperatorClient]) -> None:
        self.address = address
        self._client = client

    @property
    def runs(self) -> list[Run]:
        """Every run, oldest first; the rounds of one are asked for when they are looked at."""
        return [Run(self._client, RunSnapshot(found), listed=True) for found in self._ask(lambda c: c.runs())]

    def run(self, run: str) -> Run:
        """Returns a run by its id; raises `RunNotFound`."""
        return Run(self._client, RunSnapshot(self._ask(lambda c: c.run(run))[0])).refresh()

    def clients(self) -> list[operator_service_pb2.Client]:
        """Returns every client that ever registered, by id."""
        return self._ask(lambda c: c.clients())

    def create(self, run: RunFile, weights: str | Path | None = None) -> Run:
        """Builds adapter version 0 of a run and creates the run.

        Args:
            run: A run file, what one says as nested mappings, or a `RunConfig`.
            weights: A weights file, or a folder of them, that stands here for the one the run names.

        Raises:
            ConfigInvalid: If the run file is wrong; every field that is, is named.
            ModelInvalid: If the model or its weights cannot be had.
        """
        from fedpeft.api.initial_version import first_version

        config = configured(run)
        first = first_version(config, None if weights is None else path_of(weights, "weights"))
        made = self._ask(
            lambda c: c.create_run(config, first.spec, first.fingerprint, first.tensors, first.model_parameters)
        )
        return Run(self._client, RunSnapshot(made))

    def _ask(self, call: Callable[[OperatorClient], Coroutine[Any, Any, T]]) -> T:
        return blocking.do(_asked(self._client, call))

    def __repr__(self) -> str:
        return f"<fedpeft server {self.address}>"

    def _repr_html_(self) -> str:
        return runs_html(self.address, self._ask(lambda c: c.runs()))


class Run:
    """A run, as it was known when it was last asked for: `watch`, `wait` and `refresh` bring it up to date."""

    def __init__(self, client: Callable[[], OperatorClient], snapshot: RunSnapshot, *, listed: bool = False) -> None:
        self._client = client
        self._snapshot = snapshot
        self._lacks_rounds = listed

    @property
    def _known(self) -> RunSnapshot:
        """Snapshot with its rounds; a list of runs brings none, so they are asked for once."""
        if self._lacks_rounds:
            self.refresh()
        return self._snapshot

    @property
    def id(self) -> str:
        """The server's id of it."""
        return self._snapshot.run.id

    @property
    def name(self) -> str:
        """The label of the run file."""
        return self._snapshot.run.config.name

    @property
    def state(self) -> str:
        """running, paused, completed or stopped."""
        return views.state(self._snapshot.run)

    @property
    def finished(self) -> bool:
        """True if it is completed or stopped."""
        return self._snapshot.finished

    @property
    def reason(self) -> str:
        """Reason why it is paused, or the event that it waits for; may be empty."""
        return self._snapshot.run.reason

    @property
    def version(self) -> int:
        """The newest adapter version."""
        return self._snapshot.run.version

    @property
    def created_at(self) -> datetime:
        """Time of its creation, in UTC."""
        return self._snapshot.run.created_at.ToDatetime(UTC)

    @property
    def method(self) -> str:
        """The PEFT method."""
        return self._snapshot.run.spec.method

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return list(self._snapshot.run.config.model.classes)

    @property
    def parameters(self) -> int:
        """Values that are tuned."""
        return views.adapter_parameters(self._snapshot.run.spec)

    @property
    def model_parameters(self) -> int:
        """Values of the whole model."""
        return self._snapshot.run.model_parameters

    @property
    def initial_metrics(self) -> dict[str, float]:
        """Figures of adapter version 0, as in `Round.metrics`."""
        return dict(self._snapshot.run.initial_metrics)

    @property
    def rounds(self) -> list[Round]:
        """The committed rounds, by number."""
        return [_round(each, self._snapshot.run) for each in self._known.committed]

    @property
    def current(self) -> Round | None:
        """The round in progress; None once the run is over."""
        current = self._known.current
        return None if current is None else _round(current, self._snapshot.run)

    @property
    def accuracy(self) -> float | None:
        """Of the newest version that was scored, 0 to 1."""
        return _newest(self._known, "accuracy")

    @property
    def loss(self) -> float | None:
        """Of the newest version that was scored, on held-out data."""
        return _newest(self._known, "loss")

    @property
    def bytes_up(self) -> int:
        """Whole messages from the clients in all committed rounds."""
        return sum(each.bytes_up for each in self.rounds)

    @property
    def bytes_down(self) -> int:
        """Whole messages to the clients in all committed rounds."""
        return sum(each.bytes_down for each in self.rounds)

    @property
    def full_bytes(self) -> int:
        """Bytes that full fine-tuning would have sent each way in these rounds."""
        return sum(each.full_bytes for each in self.rounds)

    @property
    def declines(self) -> dict[str, list[str]]:
        """Reasons of the clients that do not take part, by id."""
        return {decline.client: list(decline.reasons) for decline in self._snapshot.run.declines}

    def refresh(self) -> Run:
        """Asks the server once; returns this run."""
        found, rounds = blocking.do(_asked(self._client, partial(_looked, run=self.id)))
        self._snapshot = RunSnapshot(found, {each.number: each for each in rounds})
        self._lacks_rounds = False
        return self

    def watch(self) -> Iterator[Change]:
        """Yields what is new, beginning with what is known, until the run is over; goes on when the server restarts."""
        narrator = Narrator()
        following: AsyncGenerator[RunSnapshot, None] = follow(self._client, self.id)  # type: ignore[assignment]
        for snapshot in blocking.stream(following):
            self._snapshot, self._lacks_rounds = snapshot, False
            text = "\n".join(narrator.lines(snapshot))
            if text or snapshot.changed:
                rounds = tuple(_round(snapshot.rounds[n], snapshot.run) for n in sorted(snapshot.changed))
                yield Change(text, rounds, not snapshot.lost)

    def wait(self) -> Run:
        """Returns this run once it is completed or stopped, and scored to the end if there is an evaluator."""
        for _ in self.watch():
            pass
        return self

    def pause(self, reason: str = "") -> Run:
        """Lets no new round open."""
        return self._steered(lambda c: c.pause(self.id, reason))

    def resume(self) -> Run:
        """Lets rounds open again."""
        return self._steered(lambda c: c.resume(self.id))

    def stop(self, reason: str = "") -> Run:
        """Ends the run for good; what is committed stays."""
        return self._steered(lambda c: c.stop(self.id, reason))

    def roll_back(self, version: int, reason: str = "") -> Run:
        """Takes the run back to an earlier version, as a new one; the round in progress is over."""
        return self._steered(lambda c: c.roll_back(self.id, version, reason))

    def save(self, path: str | Path, version: int | None = None) -> int:
        """Writes an adapter version as a safetensors file, the newest if none is named; returns its number."""
        header = blocking.do(
            _asked(self._client, lambda c: c.download(self.id, path_of(path, "path"), version=version))
        )
        return header.version

    def adapter(self, version: int | None = None) -> dict[str, NDArray[np.float32]]:
        """Returns an adapter version's tensors by name."""
        from safetensors.numpy import load_file

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adapter.safetensors")
            self.save(path, version)
            return load_file(path)

    def load(self, version: int | None = None, weights: str | Path | None = None) -> TunedModel:
        """Returns the run's model with an adapter version in it, its backbone proved to be the run's.

        Args:
            version: The newest if none is named.
            weights: A weights file, or a folder of them, that stands here for the one the run names.

        Raises:
            BackboneMismatch: If the weights here are not those that the run was made with.
        """
        from fedpeft.export.restored import restored
        from fedpeft.rpc.wire import config_from_proto

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adapter.safetensors")
            self.save(path, version)
            run, given = self._snapshot.run, None if weights is None else path_of(weights, "weights")
            return restored(config_from_proto(run.config), run.backbone_fingerprint, path, given)

    def load_timm(self, version: int | None = None, weights: str | Path | None = None) -> nn.Module:
        """Returns the tuned model as a plain model of timm; arguments and errors as `load`.

        Raises:
            ConfigInvalid: If the method's tensors have no place in timm's model (adapter, adaptformer, prompt).
        """
        from fedpeft.export.formats import timm_model

        return timm_model(self.load(version, weights))

    def load_peft(self, version: int | None = None, weights: str | Path | None = None) -> PeftModel:
        """Returns the tuned model as one of the `peft` library; arguments and errors as `load`.

        Raises:
            ConfigInvalid: If that library has no form of the run's method.
        """
        from fedpeft.export.formats import peft_model

        return peft_model(self.load(version, weights))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `fedpeft run show --json` prints."""
        snapshot = self._known
        return views.run_json(snapshot.run, snapshot.rounds.values(), snapshot.current)

    def _steered(self, call: Callable[[OperatorClient], Coroutine[Any, Any, run_pb2.Run]]) -> Run:
        blocking.do(_asked(self._client, call))
        return self.refresh()

    def __repr__(self) -> str:
        accuracy = _newest(self._snapshot, "accuracy")  # a list of runs is shown without a call for each
        scored = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
        return f"<fedpeft run {self.id} {self.name!r}: {self.state} at version {self.version}{scored}>"

    def _repr_html_(self) -> str:
        return rounds_html(self._known)


def _newest(snapshot: RunSnapshot, figure: str) -> float | None:
    """Returns a figure of the newest version that has it."""
    for each in reversed(snapshot.committed):
        if figure in each.metrics:
            return each.metrics[figure]
    return snapshot.run.initial_metrics.get(figure)


def connect(server: str | None = None, *, identity: str | Path | None = None, insecure: bool = False) -> Server:
    """Connects to a server.

    Args:
        server: HOST:PORT; the identity's own server if absent, or the one on this machine.
        identity: The identity folder to call with; your own, from `fedpeft enroll`, if it is for this server.
        insecure: True if plain text may leave this machine.

    Raises:
        SettingsInvalid: If that is no address, or plain text would leave this machine unasked.
        IdentityInvalid: If the identity cannot be used.
        ServerUnreachable: If no server answers there.
    """
    grpc_core.silence()
    caller = choose(server, path_of(identity, "identity") if identity else None, insecure=insecure)
    client = partial(OperatorClient, caller.server, caller.identity)
    blocking.do(_asked(client, lambda c: c.check()))
    return Server(caller.server, client)


def configured(run: RunFile, classes: FindClasses | None = None) -> RunConfig:
    """Returns a run file, or what one says, as a `RunConfig`.

    Args:
        run: That.
        classes: Asked for the classes of a run that names none.

    Raises:
        ConfigInvalid: If it is wrong.
        SettingsInvalid: If it is none of these.
    """
    from fedpeft.config import RunConfig, load_run_file, parse_config, with_classes

    if isinstance(run, RunConfig):
        return run
    if isinstance(run, Mapping):
        return parse_config(run if classes is None else with_classes(run, classes))
    return load_run_file(path_of(run, "run"), classes=classes)


async def _asked(client: Callable[[], OperatorClient], call: Callable[[OperatorClient], Coroutine[Any, Any, T]]) -> T:
    async with client() as server:
        return await call(server)


async def _looked(server: OperatorClient, run: str) -> tuple[run_pb2.Run, list[run_pb2.Round]]:
    return (await server.run(run))[0], await server.rounds(run, records=False)


def _round(message: run_pb2.Round, run: run_pb2.Run) -> Round:
    clients = views.counted(message)
    refused = {t.client: t.reason for t in message.tickets if t.state == run_pb2.TICKET_STATE_REFUSED}
    return Round(
        number=message.number,
        phase=views.phase(message),
        clients=tuple(clients),
        awaited=tuple(views.awaited(message)),
        refused=refused,
        metrics=dict(message.metrics),
        seconds=views.seconds(message),
        bytes_up=message.wire_bytes_up,
        bytes_down=message.wire_bytes_down,
        full_bytes=views.full_bytes(run, len(clients)),
    )

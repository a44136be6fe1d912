"""A real daemon and a real console, each a process of its own, and sites that speak the protocol as a test tells them.

The sites train nothing: their updates are drawn, so that a test decides who is like the others and who is not.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import parse_config
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import federation_service_pb2_grpc, tensor_pb2

from ..conftest import preloaded_environment, process_itself
from ..ports import free_port

T = TypeVar("T")
WAIT_S = 30.0
SPEC = AdapterSpec.of("bias", [TensorSpec("blocks.0.bias", (700,)), TensorSpec("head.weight", (9, 500))])
MODEL_PARAMETERS = 5_526_000
LINK = re.compile(r"(http://\S+/login\?key=\S+)")


def wait_for(reached: Callable[[], T], what: str, seconds: float = WAIT_S) -> T:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := reached():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


class Process:
    """A child with a log."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-m", *arguments]
        environment = {**os.environ, **preloaded_environment(), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal that is not passed on to a fork: to freeze it, and to thaw it."""
        os.kill(process_itself(self.process.pid), number)

    def cpu_s(self) -> float:
        """Returns the processor time that it has used, in seconds."""
        times = psutil.Process(process_itself(self.process.pid)).cpu_times()
        return times.user + times.system

    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Site:
    """One client of the federation, a step at a time."""

    def __init__(self, channel: grpc.aio.Channel, name: str, examples: int = 500) -> None:
        self.name, self.examples = name, examples
        self._stub = federation_service_pb2_grpc.FederationServiceStub(channel)
        instance = name.encode().hex().ljust(32, "0")[:32]
        self._metadata = ((wire.CLIENT_KEY, name), (wire.INSTANCE_KEY, instance))

    async def register(self, role: int = fed.CLIENT_ROLE_TRAINER) -> None:
        about = fed.Capabilities(software="fedpeft", device="cpu", examples=self.examples)
        request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=role, capabilities=about)
        await self._stub.Register(request, metadata=self._metadata)

    async def look(self) -> fed.AwaitRoundResponse:
        """Asks for work; accepts every run that is offered first."""
        while True:
            answer = await self._stub.AwaitRound(fed.AwaitRoundRequest(), metadata=self._metadata)
            if not answer.HasField("offer"):
                return answer
            await self.answer(answer.offer.run.id)

    async def answer(self, run: str, *reasons: str) -> None:
        verdict = fed.ANSWER_DECLINED if reasons else fed.ANSWER_ACCEPTED
        request = fed.AnswerOfferRequest(run=run, answer=verdict, reasons=reasons, examples=self.examples)
        await self._stub.AnswerOffer(request, metadata=self._metadata)

    async def offered(self) -> str:
        """Waits for an offer without answering it; returns its run."""
        while True:
            answer = await self._stub.AwaitRound(fed.AwaitRoundRequest(), metadata=self._metadata)
            if answer.HasField("offer"):
                return str(answer.offer.run.id)

    async def ticket(self) -> str:
        """Waits until it is sampled, and pulls the version that the round starts from."""
        while True:
            answer = await self.look()
            if answer.HasField("training"):
                task = answer.training
                request = fed.PullAdapterRequest(run=task.run, version=task.version)
                async for _ in self._stub.PullAdapter(request, metadata=self._metadata):
                    pass
                return str(task.ticket)

    async def push(self, ticket: str, norm: float, loss: float, seed: int, spec: AdapterSpec = SPEC) -> None:
        """Sends an update of a given norm."""
        generator = np.random.default_rng(seed)
        arrays: dict[str, NDArray[np.float32]] = {
            t.name: generator.standard_normal(t.shape).astype(np.float32) for t in spec.sent(1)
        }
        length = float(np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays.values())))
        scaled = {name: (array * np.float32(norm / length)) for name, array in arrays.items()}
        manifest, data = payload.encode(scaled, spec.sent(1), "float32")
        message = wire.manifest_to_proto(manifest)
        metrics = {"loss": loss, "seconds": 2.0}
        head = fed.UpdateHeader(ticket=ticket, manifest=message, examples=self.examples, metrics=metrics)

        async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
            yield fed.PushUpdateRequest(header=head)
            yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=data))

        await self._stub.PushUpdate(requests(), metadata=self._metadata)

    async def withdraw(self, ticket: str, reason: str) -> None:
        await self._stub.Withdraw(fed.WithdrawRequest(ticket=ticket, reason=reason), metadata=self._metadata)

    async def score(self, run: str, version: int, metrics: Mapping[str, float]) -> None:
        request = fed.PushEvaluationRequest(run=run, version=version, split="test", metrics=metrics)
        await self._stub.PushEvaluation(request, metadata=self._metadata)


class Federation:
    """The daemon, its sites, and consoles of it; everything asynchronous runs in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.sites: dict[str, Site] = {}
        self._consoles = 0
        self._started: list[Process] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._channel: grpc.aio.Channel | None = None
        self.daemon = self.start_daemon()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def do(self, work: Coroutine[Any, Any, T], seconds: float = WAIT_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def start_daemon(self) -> Process:
        """Starts the daemon; again on the same port and folder if it was ended."""
        where = ("--data-dir", str(self.folder / "server"), "--listen", self.address, "--metrics", "")
        daemon = Process(self.folder / "server.log", "fedpeft_server", *where)
        self._started.append(daemon)

        async def ready() -> None:
            if self._channel is not None:
                await self._channel.close()
            # Of its own: what other channels of this process know of an earlier daemon is none of its business.
            self._channel = grpc.aio.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])
            async with asyncio.timeout(WAIT_S):
                await self._channel.channel_ready()

        self.do(ready())
        return daemon

    def console(self, *flags: str) -> tuple[Process, str]:
        """Starts a console; returns it with its login link."""
        self._consoles += 1
        command = ("fedpeft_operator.app", "--server", self.address, "console", "--listen", "127.0.0.1:0", *flags)
        process = self.start(f"console-{self._consoles}", *command)
        found = wait_for(lambda: LINK.search(process.text()) or process.process.poll(), "the console's link")
        assert isinstance(found, re.Match), process.text()
        return process, found[1]

    def start(self, name: str, *arguments: str) -> Process:
        """Starts another process of the federation."""
        process = Process(self.folder / f"{name}.log", *arguments)
        self._started.append(process)
        return process

    def ask(self, question: Callable[[OperatorClient], Coroutine[Any, Any, T]]) -> T:
        """Asks the daemon as an operator."""

        async def asking() -> T:
            async with OperatorClient(self.address) as server:
                return await question(server)

        return self.do(asking())

    def create(self, name: str, rounds: int, clients: int, **options: Any) -> str:
        """Creates a run without building a model."""
        config = parse_config(
            {
                "name": name,
                "model": {"name": "vit_tiny_patch16_224", "weights": "none", "classes": [f"c{i}" for i in range(9)]},
                "peft": {"method": "bias"},
                "rounds": {"count": rounds, "clients": clients, **options},
            }
        )
        tensors = {t.name: np.zeros(t.shape, np.float32) for t in SPEC.shared}
        run = self.ask(lambda server: server.create_run(config, SPEC, "ab" * 32, tensors, MODEL_PARAMETERS))
        return run.id

    def join(self, *sites: Site | str, role: int = fed.CLIENT_ROLE_TRAINER) -> None:
        """Registers sites."""
        assert self._channel is not None
        for site in sites:
            made = Site(self._channel, site) if isinstance(site, str) else site
            self.sites[made.name] = made
            self.do(made.register(role))

    def site(self, name: str, examples: int) -> Site:
        assert self._channel is not None
        return Site(self._channel, name, examples)

    def tickets(self, *names: str) -> dict[str, str]:
        """Waits until all of some sites are sampled; returns their tickets."""

        async def all_of_them() -> Sequence[str]:
            return await asyncio.gather(*(self.sites[name].ticket() for name in names))

        return dict(zip(names, self.do(all_of_them()), strict=True))

    def push(self, tickets: Mapping[str, str], number: int, factors: Mapping[str, float] | None = None) -> None:
        """Sends an update for each ticket: usual norms shrink with the rounds, `factors` make some of them unusual."""
        for place, (name, ticket) in enumerate(sorted(tickets.items())):
            norm = 2.0 / number**0.5 * (0.9 + 0.05 * place) * (factors or {}).get(name, 1.0)
            loss = 2.2 / number**0.4 + 0.03 * place
            self.do(self.sites[name].push(ticket, norm, loss, 100 * number + place))

    def play(self, names: Sequence[str], number: int, factors: Mapping[str, float] | None = None) -> None:
        """Holds a round in which every site sends an update."""
        self.push(self.tickets(*names), number, factors)

    def version(self, run: str) -> int:
        return self.ask(lambda server: server.run(run))[0].version

    def score(self, judge: str, run: str, version: int) -> None:
        wait_for(lambda: self.version(run) >= version, f"version {version}")
        accuracy = 0.11 + 0.5 * (1 - 0.8**version)
        by_class = {f"accuracy/c{i}": min(1.0, accuracy * (0.55 + 0.1 * i)) for i in range(9)}
        metrics = {"accuracy": accuracy, "loss": 2.3 - accuracy, "examples": 900.0, **by_class}
        self.do(self.sites[judge].score(run, version, metrics))

    def close(self) -> None:
        for process in reversed(self._started):
            process.end()
        if self._channel is not None:
            self.do(self._channel.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

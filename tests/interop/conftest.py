"""The client in JavaScript as a process that a test drives line by line, against a real daemon on loopback."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ..server.conftest import Daemon, StartDaemon, secured, start

__all__ = ["Node", "NodeClient", "Refused", "secured", "start"]

FOLDER = Path(__file__).parent
ANSWER_S = 90.0


class Refused(Exception):
    """A status that the client in JavaScript was answered with, or a fault of its own (code LOCAL)."""

    def __init__(self, fault: dict[str, Any]) -> None:
        super().__init__(f"{fault['code']} {fault.get('reason', '')}: {fault['message']}")
        self.code: str = fault["code"]
        self.reason: str = fault.get("reason", "")
        self.message: str = fault["message"]
        self.fields: list[str] = fault.get("fields", [])


class NodeClient:
    """One process of `client.js`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, op: str, **given: object) -> Any:
        """Has one operation done and returns what it answers.

        Raises:
            Refused: If the operation failed.
        """
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.write(json.dumps({"op": op, **given}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise AssertionError((await self._process.stderr.read()).decode())
        said = json.loads(line)
        if "error" in said:
            raise Refused(said["error"])
        return said["answer"]


Node = Callable[..., Awaitable[NodeClient]]


@pytest.fixture(scope="session")
def program() -> str:
    """Node with the packages that the client needs."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed; on Debian: apt install nodejs npm, then: make interop")
    if not (FOLDER / "node_modules" / "@grpc" / "grpc-js").is_dir():
        pytest.skip("the npm packages of tests/interop are not installed: make interop")
    return found


@pytest.fixture
async def node(program: str) -> AsyncIterator[Node]:
    """Starts clients in JavaScript; `server` connects one to a daemon in plain text."""
    async with AsyncExitStack() as stack:

        async def begin(name: str = "", server: Daemon | None = None) -> NodeClient:
            process = await asyncio.create_subprocess_exec(
                program,
                str(FOLDER / "client.js"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=2**26,
            )

            async def end() -> None:
                assert process.stdin
                process.stdin.close()
                try:
                    async with asyncio.timeout(10):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()

            stack.push_async_callback(end)
            client = NodeClient(process)
            if server is not None:
                await client("connect", server=f"127.0.0.1:{server.server.ports.port}", name=name)
            return client

        yield begin


@pytest.fixture
async def daemon(start: StartDaemon) -> Daemon:
    return await start()

"""A console with an identity: its role decides what is offered, and the server has the last word."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.identity import folder
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.process.addresses import Address
from fedpeft_operator.console.serving import serve
from fedpeft_operator.console.settings import Settings

from ..server.secured import Federation, federation
from .federation import LINK
from .test_guard import Browser

pytestmark = pytest.mark.usefixtures("preloaded")

HOUR = timedelta(hours=1)


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Federation]:
    async with federation(tmp_path) as made:
        yield made


def viewer(secured: Federation, where: Path) -> Identity:
    """Writes the identity folder of somebody who may only look."""
    key = folder.take_key(where)
    certificate = secured.authority.issue(Subject(Role.VIEWER, "vera"), key.public_key(), HOUR)
    folder.write(where, secured.address, [secured.authority.certificate], [certificate])
    return Identity.load(where)


async def log_in(link: str) -> Browser:
    browser = Browser(re.sub(r"^http://|/login.*$", "", link))
    assert (await asyncio.to_thread(browser.log_in, link)).status == 303
    return browser


async def test_the_command_of_a_viewer_offers_nothing_to_steer(secured: Federation, tmp_path: Path) -> None:
    viewer(secured, tmp_path / "vera")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedpeft_operator.app", "--identity", str(tmp_path / "vera")),
        *("console", "--listen", "127.0.0.1:0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        found = LINK.search((await process.stdout.readline()).decode())
    assert found is not None
    browser = await log_in(found[1])
    page = await asyncio.to_thread(browser.send, "GET", "/")
    assert page.status == 200
    assert ">Viewer<" in page.text
    assert "No runs yet." in page.text
    assert 'href="/new"' not in page.text
    assert (await asyncio.to_thread(browser.send, "GET", "/audit")).status == 200
    joining = (await asyncio.to_thread(browser.send, "GET", "/clients")).text
    assert "fedpeft-client enroll @FILE" in joining and "fedpeft-client --server" not in joining
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 10) == 143


async def test_what_the_server_refuses_is_said_in_its_words(secured: Federation, tmp_path: Path) -> None:
    vera = viewer(secured, tmp_path / "vera")
    link: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = Settings(secured.address, Address("127.0.0.1", 0))
    serving = asyncio.create_task(serve(settings, lambda: OperatorClient(secured.address, vera), link.set_result))
    browser = await log_in(await link)
    refused = await asyncio.to_thread(browser.form, "/runs/run-0123456789ab/stop")
    assert refused.status == 403
    assert "viewer" in refused.text
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)

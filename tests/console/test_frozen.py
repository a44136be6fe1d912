"""A server that is there and says nothing: pages come all the same, and say so within seconds."""

from __future__ import annotations

import http.client
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import uvicorn

from fedpeft.api import operator_client
from fedpeft.api.operator_client import OperatorClient
from fedpeft.process.addresses import Address
from fedpeft_operator.console.app import console
from fedpeft_operator.console.feeds import directory
from fedpeft_operator.console.serving import login_link
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings

from ..ports import free_port
from .federation import Federation, wait_for
from .test_guard import Browser

pytestmark = pytest.mark.xdist_group("console")

AWAY = "No FedPEFT server answers"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


@pytest.fixture
def browser(own: Federation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A browser of a console in this process, which has a fifth of the usual patience."""
    monkeypatch.setattr(operator_client, "LOOK_S", 1.0)
    monkeypatch.setattr(directory, "LONGEST_PAUSE_S", 1.0)
    settings = Settings(own.address, Address("127.0.0.1", free_port()))
    sessions = SessionStore(may_write=True)
    app = console(settings, partial(OperatorClient, own.address), sessions)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=settings.listen.port, log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started, "the console")
    found = Browser(f"127.0.0.1:{settings.listen.port}")
    assert found.log_in(login_link(settings, sessions)).status == 303
    yield found
    server.should_exit = True
    thread.join()


def freeze(federation: Federation) -> None:
    federation.daemon.send(signal.SIGSTOP)


def thaw(federation: Federation) -> None:
    federation.daemon.send(signal.SIGCONT)


def banner(browser: Browser, path: str, when: Callable[[str], bool]) -> float:
    """Reads a page's events until its banner is as it should be; returns how many seconds that took."""
    with closing(http.client.HTTPConnection(browser.netloc, timeout=20)) as connection:
        connection.request("GET", path, headers={"Cookie": browser.cookie})
        answer, began = connection.getresponse(), time.monotonic()
        while time.monotonic() - began < 20:
            line = answer.readline().decode()
            if line.startswith("data: "):
                found = json.loads(line.removeprefix("data: "))
                if found["id"] == "connection" and when(found["html"]):
                    return time.monotonic() - began
    raise AssertionError(f"the banner of {path} did not become what it should")


def is_shown(html: str) -> bool:
    return AWAY in re.sub(r"\s+", " ", html)


def test_a_frozen_server_is_said_on_every_page_and_found_again(own: Federation, browser: Browser) -> None:
    run = own.create("waits", 2, 2)
    for path in ("/", f"/runs/{run}", "/audit"):
        assert browser.send("GET", path).status == 200
    freeze(own)
    began = time.monotonic()
    audit = browser.send("GET", "/audit")
    assert (audit.status, AWAY in audit.text) == (503, True)
    assert time.monotonic() - began < 5
    assert banner(browser, "/events", is_shown) < 5
    assert banner(browser, f"/runs/{run}/events", is_shown) < 5, "its watch is silent too, as a watch may be"
    began = time.monotonic()
    assert "waits" in browser.send("GET", "/").text
    assert AWAY in browser.send("GET", f"/runs/{run}").text
    assert browser.send("GET", f"/runs/{run}/versions/0").status == 503
    assert browser.form(f"/runs/{run}/pause").status == 503
    assert time.monotonic() - began < 8
    thaw(own)
    assert banner(browser, "/events", lambda html: not is_shown(html)) < 5
    assert banner(browser, f"/runs/{run}/events", lambda html: not is_shown(html)) < 5


def test_a_look_that_took_long_once_puts_the_next_one_off_for_seconds_only(
    own: Federation, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_client, "LOOK_S", 5.0)
    freeze(own)
    threading.Timer(2.0, thaw, [own]).start()
    assert AWAY not in browser.send("GET", "/").text
    own.daemon.end()
    assert banner(browser, "/events", is_shown) < 8

"""The console while its server is away, and with a run that has a long history."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..server.long_history import write_run
from .federation import Federation, wait_for
from .test_guard import Browser

pytestmark = pytest.mark.xdist_group("console")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Federation]:
    """A federation whose daemon may be ended, with a run of 1,000 rounds behind it."""
    (tmp_path / "server").mkdir()
    write_run(tmp_path / "server", "run-longlonglong", 1000, 8)
    made = Federation(tmp_path)
    yield made
    made.close()


def logged_in(federation: Federation, link: str = "") -> Browser:
    link = link or federation.console()[1]
    browser = Browser(re.sub(r"^http://|/login.*$", "", link))
    assert browser.log_in(link).status == 303
    return browser


def test_a_thousand_rounds_are_fast_and_a_server_that_was_away_is_found_again(own: Federation) -> None:
    process, link = own.console()
    browser = logged_in(own, link)
    browser.send("GET", "/runs/run-longlonglong")
    used = process.cpu_s() + own.daemon.cpu_s()
    page = browser.send("GET", "/runs/run-longlonglong?page=3")
    assert process.cpu_s() + own.daemon.cpu_s() - used < 1.0
    assert page.status == 200
    assert len(page.text) < 250_000
    assert "Page 3 of 40, 1,000 rounds" in page.text
    assert '<tr role="row" id="round-950">' in page.text

    run = own.create("waits", 2, 2)
    assert "Waiting" in browser.send("GET", f"/runs/{run}").text
    own.daemon.end()
    away = "No FedPEFT server answers"
    wait_for(lambda: away in browser.send("GET", f"/runs/{run}").text, "the console to miss the server")
    assert "waits" in browser.send("GET", f"/runs/{run}").text
    wait_for(lambda: away in browser.send("GET", "/").text, "the overview to miss the server")
    refused = browser.form(f"/runs/{run}/pause")
    assert refused.status == 503
    assert away in refused.text
    own.start_daemon()
    wait_for(lambda: away not in browser.send("GET", f"/runs/{run}").text, "the console to find the server")
    wait_for(lambda: away not in browser.send("GET", "/").text, "the overview to find the server")
    assert browser.form(f"/runs/{run}/pause").status == 303


def test_a_stream_sends_what_changes_and_nothing_else(federation: Federation) -> None:
    browser = logged_in(federation)
    federation.join("streamed-1", "streamed-2")
    run = federation.create("streamed", 1, 2)
    connection = http.client.HTTPConnection(browser.netloc, timeout=20)
    connection.request("GET", f"/runs/{run}/events", headers={"Cookie": browser.cookie})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")

    def fragment() -> tuple[str, str]:
        while not (line := answer.readline().decode()).startswith("data: "):
            assert line, "the stream ended"
        found = json.loads(line.removeprefix("data: "))
        return found["id"], found["html"]

    first = {fragment()[0] for _ in range(18)}
    assert first >= {
        "head",
        "stage",
        "aside",
        "evaluation",
        "rollback-said",
        "series",
        "members",
        "rounds",
        "configuration",
        "end",
        "said-norms",
        "said-spent",
    }
    federation.play(("streamed-1", "streamed-2"), 1)
    changed = {}
    while "rounds" not in changed or "version 1" not in changed["rounds"]:
        name, html = fragment()
        changed[name] = html
    assert "connection" not in changed
    connection.close()

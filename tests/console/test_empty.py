"""The pages of a federation where nothing, or little, has happened yet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.v1 import federation_service_pb2 as fed

from .federation import Federation, wait_for
from .test_feeds import logged_in
from .test_guard import Browser

pytestmark = pytest.mark.xdist_group("console")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


def shown(browser: Browser, path: str) -> str:
    """Returns a page's words, without marks and line breaks."""
    page = browser.send("GET", path)
    assert page.status == 200, page.text
    return " ".join(re.sub(r"<[^>]+>", " ", page.text).split())


def test_pages_with_nothing_to_show_say_so_and_what_to_do(own: Federation) -> None:
    browser = logged_in(own)
    overview = shown(browser, "/")
    assert "No runs yet." in overview and "Active 0 no client is online" in overview
    assert f"fedpeft-client --server {own.address} --name NAME" in shown(browser, "/clients")
    assert "1 entry, each with the digest of the previous one" in shown(browser, "/audit")


def test_a_run_that_waits_says_for_whom_once(own: Federation) -> None:
    browser, run = logged_in(own), own.create("alone", 2, 2)
    waits = "Waits for clients: 0 of 2 available."
    wait_for(lambda: waits in shown(browser, f"/runs/{run}"), "the reason of the wait")
    assert f"of {run}" not in shown(browser, f"/runs/{run}")
    wait_for(lambda: f"Round 1: {waits}" in shown(browser, "/"), "the reason on the card")
    own.join("one", "two")
    own.tickets("one", "two")
    wait_for(lambda: "Training loss - available once committed" in shown(browser, f"/runs/{run}/rounds/1"), "round 1")
    assert "Accuracy - not scored yet" in shown(browser, f"/runs/{run}/rounds/1")


def test_an_evaluator_is_not_shown_as_a_client_that_failed_to_be_sampled(own: Federation) -> None:
    own.join("judge", role=fed.CLIENT_ROLE_EVALUATOR)
    page = shown(logged_in(own), "/clients/judge")
    assert "An evaluator is never sampled" in page and "An evaluator sends metrics, not updates" in page
    assert "Sampled" not in page and "awaited now" not in page


def test_the_audit_log_of_a_server_that_is_away_is_not_to_be_had_and_says_so(own: Federation) -> None:
    browser = logged_in(own)
    shown(browser, "/audit")
    own.daemon.end()
    answer = browser.send("GET", "/audit")
    assert answer.status == 503
    assert "No FedPEFT server answers" in answer.text

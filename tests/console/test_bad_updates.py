"""Excluded updates, a client that is set aside, and a rollback: shown and acted on in a real browser.

The tests are of one run, and go through its life in the order in which they stand here.
"""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from fedpeft.v1.federation_service_pb2 import AwaitRoundResponse

from .conftest import Looked
from .federation import Federation, Site, wait_for
from .test_pages import violations

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.xdist_group("console")]

HONEST = ("bad-a", "bad-b", "bad-c")
MALLORY = "bad-mallory"
POISON = 1000.0
"""Its norms over what they would be; an update is excluded from 30 times the median on."""


@pytest.fixture(scope="module")
def run(federation: Federation) -> str:
    """A run whose first three rounds excluded an update of the same client; no version is scored yet."""
    federation.join(*HONEST, MALLORY)
    made = federation.create("poisoned", 6, 4, quorum=3)
    for number in range(1, 4):
        federation.play((*HONEST, MALLORY), number, {MALLORY: POISON})
        wait_for(lambda number=number: federation.version(made) >= number, f"version {number}")  # type: ignore[misc]
    return made


async def test_excluded_updates_stand_on_the_page_of_their_round(operator: Looked, run: str) -> None:
    page = await operator.page(f"/runs/{run}/rounds/3")
    section = page.get_by_role("region", name="Excluded updates")
    await expect(section).to_contain_text(
        re.compile(r"Limit of the norm: \d+\.\d+, 30 times \d\.\d+, the median norm of this round and those before\.")
    )
    row = section.get_by_role("row").filter(has_text=MALLORY)
    await expect(row).to_contain_text(re.compile(r"1\d{3}\s*\d\d\.\d+ \S\s*its norm .* is more than 30 times"))
    await expect(section.get_by_role("row")).to_have_count(2)
    ticket = page.get_by_role("region", name="Tickets").get_by_role("row").filter(has_text=MALLORY)
    await expect(ticket).to_contain_text("excluded")
    await page.goto(f"{operator.base}/runs/{run}")
    await expect(page.locator("#round-3")).to_contain_text("1 excluded")
    await expect(page.locator(f"#member-{MALLORY}")).to_contain_text("excluded in rounds 1, 2, 3: its norm")


async def test_a_viewer_sees_who_is_set_aside_and_has_no_button(viewer: Looked, run: str) -> None:
    page = await viewer.page(f"/runs/{run}")
    await expect(page.get_by_role("region", name="Set aside")).to_contain_text(MALLORY)
    await expect(page.locator("#end")).to_be_empty()
    await expect(page.locator("#tiles")).to_contain_text("Rounds")
    assert await page.get_by_role("button").count() == 0
    assert await page.locator("dialog").count() == 0
    token = await page.evaluate("fetch('/access').then((answer) => answer.text())")
    token = re.search(r'name="csrf" value="([^"]+)"', token)[1]  # type: ignore[index]
    fields = {"csrf": token, "client": MALLORY, "version": "1", "confirmation": run}
    for verb in ("readmit", "rollback"):
        answer = await page.request.post(
            f"{viewer.base}/runs/{run}/{verb}", form=fields, headers={"Origin": viewer.base}
        )
        assert answer.status == 403 and "This session is read-only" in await answer.text()


@pytest.mark.parametrize("verb", ["readmit", "rollback"])
async def test_a_form_without_the_sessions_token_changes_nothing(operator: Looked, run: str, verb: str) -> None:
    page = await operator.page("/access")
    fields = {"csrf": "guessed", "client": MALLORY, "version": "1", "confirmation": run}
    answer = await page.request.post(
        f"{operator.base}/runs/{run}/{verb}", form=fields, headers={"Origin": operator.base}
    )
    assert answer.status == 403


async def test_a_client_that_is_set_aside_is_readmitted(operator: Looked, federation: Federation, run: str) -> None:
    page = await operator.page("/clients")
    await expect(page.locator(f"#client-{MALLORY}")).to_contain_text("set aside")
    await page.goto(f"{operator.base}/clients/{MALLORY}")
    await expect(page.locator("#about").get_by_role("button", name=f"Readmit in {run}")).to_be_visible()
    await page.goto(operator.base)
    await expect(page.locator(f"#card-{run}")).to_contain_text(f"Set aside: {MALLORY}")
    await page.goto(f"{operator.base}/runs/{run}")
    aside = page.get_by_role("region", name="Set aside")
    await expect(aside).to_contain_text(re.compile(rf"{MALLORY} · round 3: its norm .* is more than 30 times"))
    await aside.get_by_role("button", name=f"Readmit {MALLORY}").click()
    dialog = page.get_by_role("dialog", name=f"Readmit {MALLORY}?")
    await expect(dialog).to_contain_text("It is sampled again as the others are.")
    assert await violations(page) == []
    await dialog.get_by_role("button", name="Readmit").click()
    await expect(page).to_have_url(f"{operator.base}/runs/{run}")
    await expect(page.get_by_role("region", name="Set aside")).to_have_count(0)
    assert list(federation.ask(lambda server: server.run(run))[0].set_aside) == []
    await page.goto(f"{operator.base}/audit")
    await expect(page.get_by_role("row").filter(has_text="client.readmitted")).to_contain_text(MALLORY)


async def test_a_client_is_readmitted_from_its_own_page(operator: Looked, federation: Federation, run: str) -> None:
    other = federation.create("poisoned too", 4, 4, quorum=3)
    federation.ask(lambda server: server.pause(run))  # its sites are asked for one run at a time
    for number in range(1, 4):
        federation.play((*HONEST, MALLORY), number, {MALLORY: POISON})
        wait_for(lambda number=number: federation.version(other) >= number, f"version {number}")  # type: ignore[misc]
    page = await operator.page(f"/clients/{MALLORY}")
    await page.locator("#about").get_by_role("button", name=f"Readmit in {other}").click()
    await page.get_by_role("dialog").get_by_role("button", name="Readmit").click()
    await expect(page).to_have_url(f"{operator.base}/clients/{MALLORY}")
    await expect(page.locator("#about")).not_to_contain_text("set aside")
    federation.ask(lambda server: server.stop(other))
    federation.ask(lambda server: server.resume(run))


async def test_a_run_is_rolled_back_once_its_id_is_typed(operator: Looked, federation: Federation, run: str) -> None:
    page = await operator.page(f"/runs/{run}")
    await page.get_by_role("button", name="Roll back", exact=True).click()
    dialog = page.get_by_role("dialog", name="Roll back poisoned")
    await expect(dialog).to_contain_text("Version 4 is created with the tensors and the strategy's state")
    await expect(dialog).to_contain_text(
        "The rollback takes the place of one of the 6 rounds: 2 rounds remain after it."
    )
    assert await violations(page) == []
    await dialog.get_by_label("Version to go back to").fill("1")
    await dialog.get_by_label("Reason, for the audit log").fill("poisoned in round 2")
    confirmation = dialog.get_by_label("To confirm, type")
    await confirmation.fill("poisoned")
    await dialog.get_by_role("button", name="Roll back").click()
    await expect(dialog).to_be_visible()  # the browser does not send what is not the id
    assert federation.version(run) == 3
    await confirmation.fill(run)
    await dialog.get_by_role("button", name="Roll back").click()
    await expect(page.locator("#round-4")).to_contain_text("rollback to version 1")
    assert federation.version(run) == 4
    await page.locator("#round-4 th a").click()
    await expect(page.locator("main")).to_contain_text(
        "version 4 has the tensors and the strategy's state of version 1"
    )
    await page.goto(f"{operator.base}/audit")
    await expect(page.get_by_role("row").filter(has_text="run.rolled_back")).to_contain_text("poisoned in round 2")


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"version": "1", "confirmation": "poisoned"}, 400, "To confirm, type its id"),
        ({"version": "one", "confirmation": ""}, 400, "must be a whole number"),
        ({"version": "99", "confirmation": ""}, 404, "it can go back to an earlier one"),
    ],
)
async def test_a_rollback_that_is_wrong_is_refused_in_words(
    operator: Looked, run: str, fields: dict[str, str], status: int, words: str
) -> None:
    page = await operator.page("/access")
    token = await page.locator('input[name="csrf"]').first.input_value()
    sent = {"csrf": token, **fields, "confirmation": fields["confirmation"] or run}
    answer = await page.request.post(
        f"{operator.base}/runs/{run}/rollback", form=sent, headers={"Origin": operator.base}
    )
    assert (answer.status, words in await answer.text()) == (status, True)


async def test_the_evaluators_backlog_and_last_figures_stand_on_the_page(
    operator: Looked, federation: Federation, run: str
) -> None:
    page = await operator.page(f"/runs/{run}")
    section = page.get_by_role("region", name="Evaluation")
    await expect(section).to_contain_text("No evaluator takes part in this run")
    judge = "bad-judge"
    federation.join(judge, role=2)
    task = federation.do(_only(federation.sites[judge], run))
    row = page.locator(f"#evaluator-{judge}")
    await expect(row).to_contain_text(re.compile(r"scoring version \d+"))
    await expect(row).to_contain_text("0 of")
    version = task.evaluation.version
    federation.score(judge, task.evaluation.run, version)
    await expect(section).to_contain_text(
        re.compile(rf"Version {version}: accuracy \d+\.\d %, loss \d\.\d+ on 900 examples\.")
    )
    await expect(row).to_contain_text("1 of")
    federation.ask(lambda server: server.stop(run))


async def _only(judge: Site, run: str) -> AwaitRoundResponse:
    """Accepts one run and declines those offered before it; returns the judge's first task."""
    while (offered := await judge.offered()) != run:
        await judge.answer(offered, "another run")
    await judge.answer(run)
    return await judge.look()

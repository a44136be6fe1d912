"""The pictures of docs/console.md: real clients that train on the emoji drawings, and one that sends noise on purpose.

Taken only when FEDPEFT_SCREENSHOTS names the folder for them (`make screenshots`); FEDPEFT_SCREENSHOT_WEIGHTS may name
the backbone that experiments/emoji/backbone.py writes, which is fetched otherwise. Takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from PIL import Image
from playwright.async_api import Browser, expect

from fedpeft.rpc import wire

from .conftest import DESK, PHONE, Looked, known
from .federation import Federation, wait_for

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.xdist_group("console"), pytest.mark.timeout(3600)]

EMOJI = Path(__file__).parents[2] / "experiments" / "emoji"
ROUNDS, SHOWN = 12, 7
NOISE = "fluent"
"""The client that sends noise in place of updates, in two rounds loud noise."""
LOUD = 7.0
RESPONSE_TIMEOUT_S = 1800.0


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("FEDPEFT_SCREENSHOTS")
    if not named:
        pytest.skip("FEDPEFT_SCREENSHOTS does not name a folder for the pictures (make screenshots)")
    path = Path(named).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def emoji(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, str]]:
    """A federation of real clients whose run has had `SHOWN` rounds."""
    here = tmp_path_factory.mktemp("emoji")
    weights = os.environ.get("FEDPEFT_SCREENSHOT_WEIGHTS") or str(here / "vit_small_patch14_dinov2.9.safetensors")
    if not Path(weights).is_file():
        subprocess.run([sys.executable, str(EMOJI / "backbone.py"), "--out", weights], check=True)
    data = str(EMOJI / "data" / "train.parquet")
    split = ("partition", data, "--partition", "natural", "--column", "vendor", "--out", str(here / "sites"))
    subprocess.run([sys.executable, "-m", "fedpeft_operator.app", *split], check=True)
    text = (EMOJI / "demo.toml").read_text()
    text = text.replace("count = 10", f"count = {ROUNDS}").replace("epochs = 1", "steps = 8")
    (here / "emoji.toml").write_text(text)
    made = Federation(here)
    try:
        yield made, held(made, here, weights)
    finally:
        made.close()


def held(federation: Federation, here: Path, weights: str) -> str:
    """Holds the run up to round `SHOWN`, and leaves the next one open."""
    sites = sorted(path.name for path in (here / "sites").iterdir() if path.is_dir())
    for name in sites:
        if not name.startswith(NOISE):
            client(federation, name, here / "sites" / name, weights)
    client(federation, "evaluator", EMOJI / "data" / "test.parquet", weights, "--evaluate")
    federation.join(federation.site(NOISE, 617))
    command = ("--server", federation.address, "run", "create", str(here / "emoji.toml"), "--weights", weights)
    subprocess.run([sys.executable, "-m", "fedpeft_operator.app", *command], check=True)
    run = federation.ask(lambda server: server.runs())[0]
    spec, site = wire.spec_from_proto(run.spec), federation.sites[NOISE]
    for number in range(1, SHOWN + 1):
        ticket = federation.do(site.ticket(), RESPONSE_TIMEOUT_S)
        others = wait_for(lambda: received(federation, run.id), "the others' updates", RESPONSE_TIMEOUT_S)
        norm = median(others) * (LOUD if number in (4, 6) else 1.0)
        federation.do(site.push(ticket, norm, 2.2, number, spec))
        wait_for(lambda number=number: federation.version(run.id) >= number, f"version {number}", RESPONSE_TIMEOUT_S)  # type: ignore[misc]
    federation.do(site.ticket(), RESPONSE_TIMEOUT_S)
    return run.id


def received(federation: Federation, run: str) -> list[float]:
    """Returns the norms of the round in progress once all clients but the noisy one have sent theirs."""
    last = federation.ask(lambda server: server.rounds(run))[-1]
    norms = [ticket.update_norm for ticket in last.tickets if ticket.update_norm]
    return norms if len(norms) == len(last.tickets) - 1 else []


def client(federation: Federation, name: str, data: Path, weights: str, *flags: str) -> None:
    where = ("--server", federation.address, "--name", name, "--data", str(data), "--weights", weights)
    state = ("--state-dir", str(federation.folder / "state" / name), "--threads", "1")
    federation.start(name, "fedpeft_client", *where, *state, *flags)


async def test_pictures_for_the_docs(browser: Browser, folder: Path, emoji: tuple[Federation, str]) -> None:
    federation, run = emoji
    _, link = federation.console()
    looked = await known(browser, link.partition("/login")[0], link)
    scored = f"version {SHOWN})"
    for name, path, phone, scheme in (
        ("console-run", f"/runs/{run}", False, "light"),
        ("console-run-dark", f"/runs/{run}", False, "dark"),
        ("console-run-phone", f"/runs/{run}", True, "light"),
        ("console-overview", "/", False, "light"),
        ("console-client", f"/clients/{NOISE}", False, "light"),
        ("console-audit", "/audit", False, "dark"),
    ):
        await picture(looked, path, folder / f"{name}.png", phone=phone, scheme=scheme, awaited=scored)
        assert size(folder / f"{name}.png")[0] == (PHONE if phone else DESK)["width"]
    await faults(looked, folder / "console-new-run.png")
    assert size(folder / "console-new-run.png")[0] == DESK["width"]
    looked.check()


def size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        image.verify()
        return image.size


async def picture(looked: Looked, path: str, file: Path, *, phone: bool, scheme: str, awaited: str) -> None:
    page = await looked.page(path)
    await page.set_viewport_size(PHONE if phone else DESK)  # type: ignore[arg-type]
    await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    if path.startswith("/runs/"):
        await expect(page.locator("#said-accuracy")).to_contain_text(awaited, timeout=RESPONSE_TIMEOUT_S * 1000)
    await page.wait_for_timeout(500)
    await page.screenshot(path=file, full_page=not phone and "/audit" not in path)
    await page.close()


async def faults(looked: Looked, file: Path) -> None:
    page = await looked.page("/new")
    text = (EMOJI / "demo.toml").read_text().replace("clients = 5", "clients = 0").replace('"sgd"', '"sdg"')
    await page.get_by_label("Run file (TOML)").fill(text)
    await page.get_by_role("button", name="Check").click()
    await expect(page.get_by_role("heading", name="2 errors")).to_be_visible()
    await page.screenshot(path=file)
    await page.close()

"""One federation, one console and one browser for all tests of the pages."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from .federation import Federation, Process
from .story import Story, tell

WAIT_S = 30
"""Longest wait for a page; the machine may be busy."""
AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
PHONE = {"width": 400, "height": 800}
expect.set_options(timeout=WAIT_S * 1000)
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def story(federation: Federation) -> Story:
    return tell(federation)


@dataclass
class Console:
    """A running console.

    Attributes:
        base: Its address.
        link: Its first login link.
        process: The process.
        key_spent: True once the link was used.
    """

    base: str
    link: str
    process: Process


@pytest.fixture(scope="session")
def console(federation: Federation) -> Console:
    process, link = federation.console()
    return Console(link.partition("/login")[0], link, process)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()


@dataclass
class Looked:
    """A browser that is logged in, and what it has seen.

    Attributes:
        context: Its cookies.
        base: The console's address.
        hosts: Everybody it asked anything.
        complaints: Messages of its console: errors, and violations of the content security policy.
    """

    context: BrowserContext
    base: str
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    async def page(self, path: str = "/") -> Page:
        page = await self.context.new_page()
        page.set_default_timeout(WAIT_S * 1000)
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        await page.goto(self.base + path)
        return page

    def check(self) -> None:
        """Checks that nothing was asked of another host, and that nothing went wrong in the page."""
        assert self.hosts <= {urlsplit(self.base).netloc}
        assert [said for said in self.complaints if not said.startswith("Failed to load resource")] == []


async def known(browser: Browser, base: str, link: str) -> Looked:
    context = await browser.new_context(viewport=DESK, color_scheme="light")  # type: ignore[arg-type]
    page = await context.new_page()
    await page.goto(link)
    assert page.url == f"{base}/"
    await page.close()
    return Looked(context, base)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session(browser: Browser, console: Console) -> AsyncIterator[Looked]:
    looked = await known(browser, console.base, console.link)
    yield looked
    await looked.context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def operator(session: Looked) -> AsyncIterator[Looked]:
    """An operator's browser; what it asked and what went wrong in it is looked at after every test."""
    session.hosts.clear()
    session.complaints.clear()
    yield session
    for page in session.context.pages:
        await page.close()
    session.check()


@pytest_asyncio.fixture(loop_scope="session")
async def viewer(operator: Looked, browser: Browser) -> AsyncIterator[Looked]:
    """A viewer's browser, let in by a link that the operator made."""
    page = await operator.page("/access")
    await page.get_by_role("button", name="Link for a viewer").click()
    looked = await known(browser, operator.base, await page.locator("#link").inner_text())
    yield looked
    await looked.context.close()
    looked.check()

"""Access to the console, which every user of the machine and every web page in the same browser reaches."""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address
from fedpeft_operator.console.app import LOOKED_AT, SENT
from fedpeft_operator.console.serving import login_link, serve
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings

from .federation import Federation
from .story import Story

pytestmark = pytest.mark.xdist_group("console")


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    text: str


@dataclass
class Browser:
    """A client that sends requests as it is told, and no header by itself but Host."""

    netloc: str
    cookie: str = ""
    token: str = ""

    def send(self, method: str, path: str, body: str = "", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.netloc, timeout=20)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            given.setdefault("Cookie", self.cookie)
        if method == "POST":
            given.setdefault("Origin", f"http://{self.netloc}")
            given.setdefault("Content-Type", "application/x-www-form-urlencoded")
        connection.request(method, path, body or None, given)
        answer = connection.getresponse()
        found = Answer(answer.status, answer.headers, answer.read().decode(errors="replace"))
        connection.close()
        return found

    def form(self, path: str, **fields: str) -> Answer:
        return self.send("POST", path, urlencode({"csrf": self.token, **fields}))

    def log_in(self, link: str) -> Answer:
        answer = self.send("GET", link.removeprefix(f"http://{self.netloc}"))
        self.cookie = answer.headers.get("Set-Cookie", "").partition(";")[0]
        page = self.send("GET", "/access")
        found = re.search(r'name="csrf" value="([^"]+)"', page.text)
        self.token = found[1] if found else ""
        return answer


@pytest.fixture(scope="module")
def link(federation: Federation) -> Iterator[str]:
    process, link = federation.console()
    yield link
    process.end()


@pytest.fixture(scope="module")
def stranger(link: str) -> Browser:
    return Browser(urlsplit(link).netloc)


@pytest.fixture(scope="module")
def browser(link: str) -> Browser:
    browser = Browser(urlsplit(link).netloc)
    assert browser.send("HEAD", link.removeprefix(f"http://{browser.netloc}")).status == 403  # a look spends nothing
    answer = browser.log_in(link)
    assert answer.status == 303
    assert re.search(r"fedpeft-console-\d+=\S+; HttpOnly; Path=/; SameSite=strict", answer.headers["Set-Cookie"])
    assert browser.send("GET", "/").status == 200
    return browser


def test_a_link_works_once(browser: Browser, link: str) -> None:
    again = Browser(browser.netloc)
    answer = again.log_in(link)
    assert answer.status == 403
    assert "has already been used" in answer.text
    assert again.send("GET", "/").status == 401


@pytest.mark.parametrize("path", [path for path, _ in LOOKED_AT if path != "/login"])
def test_nothing_is_shown_to_a_stranger(stranger: Browser, path: str) -> None:
    answer = stranger.send("GET", path)
    assert answer.status == 401
    assert "You are not logged in" in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "user@localhost", ""])
def test_a_name_that_is_not_ours_is_not_answered(browser: Browser, host: str) -> None:
    assert browser.send("GET", "/", Host=host).status == 421
    assert browser.send("GET", "/login?key=x", Host=host).status == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "https://{}", "http://{}.evil.example"])
def test_a_form_of_another_page_is_refused(browser: Browser, story: Story, origin: str) -> None:
    body = urlencode({"csrf": browser.token})
    answer = browser.send("POST", f"/runs/{story.live}/stop", body, Origin=origin.format(browser.netloc))
    assert answer.status == 403
    assert "was not sent from a page of the console" in answer.text


@pytest.mark.parametrize("path", [path for path, _ in SENT])
def test_a_form_without_its_token_is_refused(browser: Browser, path: str) -> None:
    for token in ("", "x", browser.token + "x"):
        answer = browser.send("POST", path, urlencode({"csrf": token}))
        assert answer.status == 403
        assert "form belongs to another session" in answer.text


def test_a_cookie_of_another_console_is_nobody(browser: Browser) -> None:
    name = browser.cookie.partition("=")[0]
    for cookie in (f"{name}=x", f"other={browser.cookie.partition('=')[2]}", "=;=;", "\x01"):
        assert browser.send("GET", "/", Cookie=cookie).status == 401


def test_a_viewer_may_not_send_any_form_that_writes(browser: Browser, story: Story) -> None:
    made = re.search(r'id="link">([^<]+)<', browser.form("/access", role="viewer").text)
    assert made
    viewer = Browser(browser.netloc)
    assert viewer.log_in(made[1]).status == 303
    assert viewer.send("GET", f"/runs/{story.live}").status == 200
    for path in (f"/runs/{story.live}/{verb}" for verb in ("pause", "resume", "stop")):
        assert viewer.form(path).status == 403
    assert viewer.form("/new", action="create", text="x").status == 403
    assert viewer.send("GET", "/new").status == 403
    assert viewer.form("/access", role="operator").status == 403
    assert viewer.form("/logout").status == 303
    assert viewer.send("GET", "/").status == 401


def test_every_answer_carries_the_headers(browser: Browser, story: Story) -> None:
    for path in ("/", f"/runs/{story.live}", "/static/live.js", "/nowhere", "/login?key=x"):
        headers = browser.send("GET", path).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "Server" not in headers
    assert browser.send("GET", "/").headers["Cache-Control"] == "no-store"


def test_no_page_has_a_script_or_a_style_of_its_own(browser: Browser, story: Story) -> None:
    for path in ("/", f"/runs/{story.live}", f"/runs/{story.live}/rounds/4", "/clients", "/clients/noto", "/new"):
        text = browser.send("GET", path).text
        assert not re.search(
            r"<script(?![^>]*\bsrc=)|<style| style=| on[a-z]+=|https?://", text.replace("onerror=", "")
        )


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/"])
def test_only_the_static_files_are_static(stranger: Browser, path: str) -> None:
    assert stranger.send("GET", path).status in (401, 404)


@pytest.mark.parametrize(
    "path", ["/runs/nope", "/runs/run-x/rounds/x", "/clients/nobody", "/?page=x", "/clients?page=-1"]
)
def test_what_is_not_there_is_said_in_words(browser: Browser, path: str) -> None:
    answer = browser.send("GET", path)
    assert answer.status == 404
    assert 'role="alert"' in answer.text


def test_a_page_beyond_the_last_is_the_last(browser: Browser) -> None:
    assert browser.send("GET", "/?page=999").status == 200


def test_a_long_body_is_not_read(browser: Browser) -> None:
    answer = browser.send("POST", "/new", "x", Content_Length="1048577")
    assert answer.status == 413


def test_a_body_in_chunks_is_not_read_whatever_length_it_says(browser: Browser) -> None:
    body = "1\r\nx\r\n0\r\n\r\n"
    assert browser.send("POST", "/new", body, Transfer_Encoding="chunked").status == 413
    assert browser.send("POST", "/new", body, Transfer_Encoding="chunked", Content_Length="1").status == 413


def test_the_server_s_word_is_shown(browser: Browser, story: Story) -> None:
    answer = browser.form(f"/runs/{story.done}/pause")
    assert answer.status == 409
    assert f"{story.done}" in answer.text
    assert "completed" in answer.text
    assert browser.form("/runs/run-nope/stop").status == 404
    assert browser.send("GET", f"/runs/{story.done}/versions/99").status == 404


def test_where_a_console_may_listen(tmp_path_factory: pytest.TempPathFactory) -> None:
    pem = tmp_path_factory.mktemp("pem") / "x.pem"
    pem.touch()
    with pytest.raises(SettingsInvalid, match="reached from the network"):
        Settings.checked("s:1", "0.0.0.0:7080")
    with pytest.raises(SettingsInvalid, match="go together"):
        Settings.checked("s:1", "127.0.0.1:7080", key=pem)
    with pytest.raises(SettingsInvalid, match="no such file"):
        Settings.checked("s:1", "127.0.0.1:7080", certificate=pem, key=pem.with_name("gone.pem"))
    with pytest.raises(SettingsInvalid, match="HOST:PORT"):
        Settings.checked("s:1", "7080")
    wide = Settings.checked("s:1", "0.0.0.0:7080", certificate=pem, key=pem, names=("Lab.example",))
    assert wide.scheme == "https"
    assert [wide.is_ours(host) for host in ("lab.example", "10.0.0.5", "[::1]", "evil.example")] == [True] * 3 + [False]


async def test_a_key_that_is_none_is_said_before_a_link(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("not a key")
    settings = Settings.checked("127.0.0.1:7070", "127.0.0.1:0", certificate=pem, key=pem)
    links: list[str] = []
    with pytest.raises(SettingsInvalid, match="cannot be used"):
        await serve(settings, lambda: OperatorClient("127.0.0.1:7070"), links.append)
    assert links == []


def test_a_loopback_console_has_loopback_names() -> None:
    settings = Settings("s:1", Address("127.0.0.1", 7080))
    names = ("localhost", "127.0.0.1", "[::1]", "10.0.0.5", "evil.example")
    assert [settings.is_ours(name) for name in names] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("listen", "names", "shown"),
    [
        ("127.0.0.1:0", (), "127.0.0.1"),
        ("0.0.0.0:0", (), "localhost"),
        ("[::]:0", (), "localhost"),
        ("0.0.0.0:0", ("fed.example.org", "fed"), "fed.example.org"),
        ("10.0.0.5:0", ("fed.example.org",), "10.0.0.5"),
    ],
)
def test_the_printed_link_names_a_host_that_can_be_opened_and_is_answered(
    listen: str, names: tuple[str, ...], shown: str
) -> None:
    settings = Settings.checked("s:1", listen, names=names, insecure=True)
    link = urlsplit(login_link(settings, SessionStore(may_write=True)))
    assert link.hostname == shown
    assert settings.is_ours(shown) and settings.is_ours(socket.gethostname()) == (listen != "127.0.0.1:0")


def test_a_console_on_every_address_prints_a_link_that_works_and_says_so(federation: Federation) -> None:
    process, link = federation.console("--listen", "0.0.0.0:0", "--insecure")
    try:
        browser = Browser(urlsplit(link).netloc)
        assert urlsplit(link).hostname == "localhost"
        assert browser.log_in(link).status == 303
        assert browser.send("GET", "/").status == 200
        assert "it listens on every address" in process.text()
    finally:
        process.end()

"""Wrong settings of an object store, and stores that refuse: one sentence, which says what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import obstore
import pytest

from fedpeft.errors import FedpeftError, StateInvalid, StoreUnavailable
from fedpeft_server.store.blobs import object_store
from fedpeft_server.store.blobs.blobs import Blobs

from ...ports import free_port
from ..object_store import ACCESS

KEY = "runs/run-1/versions/000001.safetensors"


@pytest.fixture(autouse=True)
def access(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables by which an S3 is found, but its endpoint."""
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)


def one_sentence(error: FedpeftError) -> str:
    """Returns an error's message, which nobody needs more than one line for."""
    assert "\n" not in error.message and "Debug source" not in error.message and len(error.message) < 400
    return error.message


@pytest.mark.parametrize("name", ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "localhost", "", "http://", "ftp://h", "http://a b", "http://h?x=1", "http://h\n"]
)
def test_an_endpoint_that_is_none_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str
) -> None:
    monkeypatch.setenv(name, endpoint)
    with pytest.raises(StateInvalid, match=rf"^--blobs s3://bkt/v: {name} .* is not http://HOST:PORT or https") as told:
        Blobs("s3://bkt/v", flag="--blobs")
    assert one_sentence(told.value)


@pytest.mark.parametrize(
    ("url", "name"), [("gs://bkt", "GOOGLE_BASE_URL"), ("az://c", "AZURE_ENDPOINT"), ("S3://b", "AWS_ENDPOINT")]
)
def test_so_it_is_with_other_stores(monkeypatch: pytest.MonkeyPatch, url: str, name: str) -> None:
    monkeypatch.setenv(name, "127.0.0.1:9000")
    with pytest.raises(StateInvalid, match=rf"^blob store {url}: {name} '127.0.0.1:9000' is not http://HOST:PORT"):
        Blobs(url)


@pytest.mark.parametrize("value", [None, "false", "0"])
def test_plain_http_must_be_allowed(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9000")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    if value is not None:
        monkeypatch.setenv("AWS_ALLOW_HTTP", value)
    with pytest.raises(StateInvalid, match=r"AWS_ENDPOINT 'http://127.0.0.1:9000' .* needs AWS_ALLOW_HTTP=true$"):
        Blobs("s3://bkt/v")


def test_what_is_missing_in_the_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        StateInvalid, match=r"^--blobs az://c/v: .*Account must be specified; check its variables"
    ) as told:
        Blobs("az://c/v", flag="--blobs")
    assert one_sentence(told.value)


@pytest.mark.parametrize(
    ("debug", "says"),
    [
        (
            'message: "Connection refused"',
            "is not reached (Connection refused); see whether it runs, and whether AWS_END",
        ),
        ("InvalidMessage(InvalidContentType)", "is not reached (it does not speak TLS); see whether it runs"),
        ("InvalidCertificate(UnknownIssuer)", "is not reached (no known authority signed its certificate); see"),
    ],
)
@pytest.mark.parametrize("host", ["s3.invalid", "169.254.169.254"])
def test_a_store_and_what_gives_credentials_are_told_apart(host: str, debug: str, says: str) -> None:
    """With texts as obstore 0.12 gives them: neither TLS nor the address of a cloud's credentials is at hand."""
    text = (
        f"Generic S3 error: Error performing PUT https://{host}/latest/api/token in 4.8ms, max_retries: "
        f"10, retry_timeout: 180s  - HTTP error: error sending request\n\nDebug source:\nGeneric {{ {debug} }}"
    )
    found = object_store.sentence("s3://bkt", OSError(text))
    if host == "s3.invalid":
        assert says in found
    else:
        assert found.startswith("no credentials are in the environment, and none are had from https://169.254.169.254")


@pytest.fixture
def panicking(monkeypatch: pytest.MonkeyPatch) -> Blobs:
    """An S3 whose endpoint the library panics over, as it does over whatever is not looked at before."""
    blobs = Blobs("s3://bkt/v", flag="--blobs")
    blobs._store = obstore.store.S3Store("bkt", endpoint="127.0.0.1:9000", client_options={"allow_http": True})
    return blobs


CALLS: list[Callable[[Blobs], object]] = [
    lambda blobs: blobs.put(KEY, b"x"),
    lambda blobs: list(blobs.pieces(KEY)),
    lambda blobs: list(blobs.keys("runs")),
    lambda blobs: blobs.has(KEY),
    lambda blobs: blobs.has_any("runs"),
    lambda blobs: blobs.delete([KEY]),
    lambda blobs: blobs.delete_prefix("runs/run-1/"),
    Blobs.try_writing,
]


@pytest.mark.parametrize("call", CALLS)
def test_a_panic_of_the_library_is_a_refusal(panicking: Blobs, call: Callable[[Blobs], object]) -> None:
    with pytest.raises(
        StoreUnavailable, match=r"--blobs s3://bkt/v failed: its library failed \(.*AWS_ENDPOINT"
    ) as told:
        call(panicking)
    assert one_sentence(told.value)


@pytest.mark.parametrize("call", [call for number, call in enumerate(CALLS) if number not in (3, 5)])
def test_a_bucket_that_does_not_exist_is_named(s3: str, call: Callable[[Blobs], object]) -> None:
    sentence = (
        r"--updates s3://missing/u failed: http://127.0.0.1:\d+ answers 404 Not Found \(NoSuchBucket\); make the "
        r"bucket missing, or correct its name or AWS_ENDPOINT$"
    )
    with pytest.raises(StoreUnavailable, match=sentence) as told:
        call(Blobs("s3://missing/u", flag="--updates"))
    assert one_sentence(told.value)


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    blobs = Blobs("s3://bkt")
    blobs._store = obstore.store.from_url("s3://bkt", retry_config={"max_retries": 0})
    with pytest.raises(StoreUnavailable) as told:
        blobs.put(KEY, b"x")
    assert re.search(
        rf" failed: {endpoint} is not reached \(Connection refused\); see whether it runs, and "
        "whether AWS_ENDPOINT names it$",
        one_sentence(told.value),
    )


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (403, "<Error><Code>InvalidAccessKeyId</Code></Error>", r"\(InvalidAccessKeyId\); check the credentials"),
        (403, '{"error": {"message": "no access"}}', r"403 Forbidden \(no access\); check the credentials"),
        (
            404,
            "<html>\n<h1>a web server</h1>",
            r"404 Not Found; make the bucket bkt, or correct its name or AWS_ENDPOINT",
        ),
        (400, "x" * 5000, "400 Bad Request; check the place, AWS_ENDPOINT and the permissions"),
    ],
)
def test_what_a_store_answers_is_said_in_short(
    monkeypatch: pytest.MonkeyPatch, status: int, body: str, says: str, tmp_path: Path
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(StoreUnavailable, match=says) as told:
                Blobs("s3://bkt", tmp_path / "cache").put(KEY, b"x")
        finally:
            server.shutdown()
    assert one_sentence(told.value)

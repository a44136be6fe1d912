"""Object stores: made of a URL and the environment, and what one of them says, as one short sentence.

obstore's errors are texts of several lines with all that its library knows; some wrong settings end it with a panic.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from obstore.store import from_url

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables that say where the stores of a scheme are reached; the last one is named where none is set."""
_HTTP = {"s3": "AWS_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
"""Variables that allow an endpoint of plain http."""
_TRUE = ("1", "true", "on", "yes", "y")
_PERFORMING = re.compile(r"Error performing [A-Z]+ (?P<url>\S+) in .*? - (?P<said>.*)", re.DOTALL)
_STATUS = re.compile(r"Server returned non-2xx status code: (?P<status>\d+[^:]*):(?P<body>.*)", re.DOTALL)
_CODE = re.compile(r"<Code>([^<]*)</Code>|\"message\": *\"([^\"]*)\"")
_CAUSE = re.compile(r'message: "([^"]*)"|"(failed to lookup[^"]*)"')
_TLS = {
    "InvalidMessage": "it does not speak TLS",
    "UnknownIssuer": "no known authority signed its certificate",
    "NotValidForName": "its certificate is for another name",
}
"""Words of the library about TLS, and what they mean."""
_GIVES_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Hosts that give credentials to machines of a cloud; they are asked where none are in the environment."""
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
MOST = 200
"""Most characters of a store's own words."""


class StorePanicked(Exception):  # met where the library is called, and seen by nobody
    """The library of object stores panicked in a call."""


def opened(url: str) -> Any:
    """Returns the object store of a URL, with its settings from the environment; nothing is sent yet.

    Raises:
        ValueError: If the URL or a variable of the environment is wrong.
        obstore.exceptions.BaseError: If obstore says so.
    """
    scheme = _scheme(url)
    for name in _ENDPOINTS.get(scheme, ()):
        if (endpoint := os.environ.get(name)) is not None:
            _check_endpoint(scheme, name, endpoint)
    try:
        with panics():
            return from_url(url)
    except StorePanicked as error:
        raise ValueError(str(error)) from None


def _check_endpoint(scheme: str, name: str, endpoint: str) -> None:
    parts = urlsplit(endpoint)
    is_url = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    if not is_url or not endpoint.isprintable() or " " in endpoint:
        raise ValueError(f"{name} {endpoint!r} is not http://HOST:PORT or https://HOST:PORT; correct or unset it")
    allowing = _HTTP.get(scheme, "")
    if parts.scheme == "http" and allowing and os.environ.get(allowing, "").lower() not in _TRUE:
        if scheme == "az" and os.environ.get("AZURE_STORAGE_USE_EMULATOR"):  # which is reached so
            return
        raise ValueError(f"{name} {endpoint!r} is plain http, which needs {allowing}=true")


@contextmanager
def panics() -> Iterator[None]:
    """Turns a panic of the library into an error: as it comes it is no Exception, and would end the server.

    Raises:
        StorePanicked: In its place.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class of its own in each module that Rust makes
            raise
        raise StorePanicked(f"its library failed ({_short(str(error))})") from None


def lacks_bucket(error: BaseException) -> bool:
    """Returns True if an error of obstore says that there is no such bucket, or container."""
    return any(words in str(error) for words in _NO_BUCKET)


def sentence(url: str, error: BaseException) -> str:
    """Returns what an error of obstore says, and what to do about it, as the end of a sentence.

    Args:
        url: The URL of the store.
        error: Its error.
    """
    names = _ENDPOINTS.get(_scheme(url), ("its endpoint",))
    endpoint = next((name for name in names if name in os.environ), names[-1])
    said, _, debug = str(error).partition("Debug source:")
    performing = _PERFORMING.search(said)
    if performing is None:
        return f"{_short(said)}; check the place, {endpoint} and the permissions"
    there = "{0.scheme}://{0.netloc}".format(urlsplit(performing["url"]))
    if urlsplit(performing["url"]).hostname in _GIVES_CREDENTIALS:
        return f"no credentials are in the environment, and none are had from {there}; give some that may write there"
    status = _STATUS.search(performing["said"])
    if status is None:
        return f"{there} is not reached ({_cause(said, debug)}); see whether it runs, and whether {endpoint} names it"
    code = _CODE.search(status["body"])
    answer = f"{there} answers {status['status']}" + (f" ({_short(code[1] or code[2])})" if code else "")
    if lacks_bucket(error) or isinstance(error, FileNotFoundError):
        return f"{answer}; make the bucket {urlsplit(url).netloc}, or correct its name or {endpoint}"
    if status["status"].startswith(("401", "403")):
        return f"{answer}; check the credentials in the environment, and what they permit"
    return f"{answer}; check the place, {endpoint} and the permissions"


def _cause(said: str, debug: str) -> str:
    """Returns why a request was not answered."""
    if words := [meaning for word, meaning in _TLS.items() if word in debug]:
        return words[0]
    found = _CAUSE.search(debug)
    return _short(found[1] or found[2] if found else said.rpartition(" - ")[2].removeprefix("HTTP error: "))


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _short(text: str) -> str:
    """Returns words in one line, cut where they are too many."""
    words = " ".join(text.split())
    return words if len(words) <= MOST else f"{words[:MOST]}..."

"""Addresses: HOST:PORT and nothing else, and which of them only this machine reaches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.process.addresses import Address


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:7070", "127.0.0.1", 7070, True),
        ("127.8.0.1:1", "127.8.0.1", 1, True),
        ("localhost:65535", "localhost", 65_535, True),
        ("[::1]:80", "::1", 80, True),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, False),
        ("0.0.0.0:7070", "0.0.0.0", 7070, False),
        ("example.org:80", "example.org", 80, False),
    ],
)
def test_what_an_address_is(text: str, host: str, port: int, loopback: bool) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:٣",
        "::1:80",
        "http://host:80",
        "a b:80",
        "host:-1",
        "h:1\n",
    ],
)
def test_what_an_address_is_not(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT, for example"):
        Address.parse(text)


def test_a_free_port_must_be_allowed() -> None:
    assert Address.parse("127.0.0.1:0", free=True).port == 0


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert (
        text in (f"{address.host}:{address.port}", f"[{address.host}]:{address.port}")
        or text.rpartition(":")[2][0] == "0"
    )

"""Addresses of servers and databases, and places of files: what is one, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.process.addresses import Address, check_database_url, check_place, folder_of


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


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///relative.db",
        "sqlite:////absolute/a b.db",
        "sqlite+pysqlite:////absolute.db?timeout=5",
        "sqlite:///file:/absolute.db?uri=true&mode=rw",
        "postgres://host/name",
        "postgresql://user@host:5432/name",
        "postgresql+psycopg://user:p%40ss%3Aw%2Frd@[::1]:5432/name?sslmode=require",
        "postgresql://user@/name?host=/run/postgresql",
        "postgresql://user@/name?host=@abstract&user=a@b",
        "postgresql://me@site:secret@host/name",
        "postgresql://",
    ],
)
def test_what_a_url_of_a_database_is(url: str) -> None:
    assert check_database_url(url) == url


@pytest.mark.parametrize("url", ["hello", "/srv/x.db", "mysql://h/x", "postgresql:/u@h/x", "postgresql+asyncpg://h/x"])
def test_what_a_url_of_a_database_is_not(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"):
        check_database_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host:abc/name",
        "postgresql://user@host:0/name",
        "postgresql://user@host:65536/name",
        "postgresql://user@host:٣/name",
        "postgresql://user@[::1/name",
        "postgresql://user:geh@eim@host/name",
        "postgresql://user:geh%40x:geh@eim@host/name",
        "postgresql://user:x@geh:eim@host/name",
        "postgresql://user:x@geh/eim@host/name",
        "postgresql://user:x@geh?eim@host/name",
        "postgresql://user:x@geh?ei=m@host/name",
        "postgresql://user/geheim@host/name",
    ],
)
def test_a_url_that_ends_too_early_hints_at_the_password_and_shows_none_of_it(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as told:
        check_database_url(url)
    assert not any(part in str(told.value) for part in ("geh", "eim", "user", "abc", "65536"))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///%3Amemory%3A",
        "sqlite:///file::memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:/x.db?uri=true&mode=memory",
        "sqlite:///x.db?mode=memory",
        "sqlite://?mode=memory",
    ],
)
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"in memory.*sqlite:///PATH"):
        check_database_url(url)


def test_a_file_of_sqlite_named_as_by_its_own_urls_must_be_meant_so() -> None:
    with pytest.raises(ValueError, match="uri=true"):
        check_database_url("sqlite:///file:/srv/x.db")


@pytest.mark.parametrize("url", ["sqlite:///a\0b", "sqlite:///a\udcffb", "postgresql://u\0@h/x"])
def test_a_url_of_a_database_is_text(url: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a URL"):
        check_database_url(url)


@pytest.mark.parametrize(
    ("place", "folder"),
    [
        ("versions", "versions"),
        ("/srv/versions", "/srv/versions"),
        ("../versions", "../versions"),
        ("./s3:/bkt", "s3:/bkt"),
        ("./s3://bkt", "s3:/bkt"),
        ("backup-12:30/x", "backup-12:30/x"),
        ("/srv/s3://x", "/srv/s3:/x"),
        ("file:///srv/a%20b", "/srv/a b"),
        ("s3://bkt", None),
        ("S3://bkt", None),
        ("s3://my.bkt-1/a b/\u00fc/", None),
        ("gs://my_bkt/versions", None),
        ("az://$web/versions", None),
    ],
)
def test_what_a_place_of_files_is(
    place: str, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_place(place) == place
    assert folder_of(place) == (None if folder is None else Path(folder).absolute())


@pytest.mark.parametrize(
    "place",
    [
        "s3:/bkt",
        "s3:bkt",
        "s3://",
        "s3:///x",
        "s3://bkt/../x",
        "s3://bkt/x/..",
        "s3://bkt/./x",
        "s3://bkt/%2e%2E/x",
        "s3://bkt//x",
        "s3://bkt/x?y=z",
        "s3://bkt/x#y",
        "s3://key:secret@bkt/x",
        "s3://bkt:9000/x",
        "s3://bkt/x\ny",
        "gs:/bkt",
        "az:bkt",
    ],
)
def test_an_object_store_is_its_scheme_and_a_bucket(place: str) -> None:
    scheme = place[:2]
    with pytest.raises(ValueError, match=rf"an object store is {scheme}://BUCKET or {scheme}://BUCKET/FOLDER") as told:
        check_place(place)
    assert f"./{scheme}:" in str(told.value) and "secret" not in str(told.value)


@pytest.mark.parametrize("place", ["http://host/x", "https://host", "ftp:/x", "s4://bkt", "s3a://bkt", "memory:///"])
def test_other_schemes_are_no_places(place: str) -> None:
    scheme = place.partition(":")[0]
    with pytest.raises(ValueError, match=rf"{scheme}: is none of file://, s3://, gs:// and az://.*\./{scheme}:"):
        check_place(place)


@pytest.mark.parametrize("place", ["file:/srv", "file:srv", "file://srv/x", "file://"])
def test_a_file_url_has_an_absolute_path(place: str) -> None:
    with pytest.raises(ValueError, match="file:///PATH"):
        check_place(place)

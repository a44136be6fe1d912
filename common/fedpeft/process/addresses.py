"""Addresses at which a server listens, or is reached, those of databases, and places of files."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote

LAST_PORT = 65_535

_FORM = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^:/\s\[\]]+)):([0-9]{1,5})")
_SQLITE, _POSTGRESQL = ("sqlite", "sqlite+pysqlite"), ("postgres", "postgresql", "postgresql+psycopg")
_DATABASES = "sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"
_USER = re.compile(r"^[^:/]*(?::[^@]*)?@")
"""User and password in the URL of a database, as SQLAlchemy takes them apart."""
_HOST = re.compile(r"(?:\[[^/]+\]|[^:]*)(?::(?P<port>.*))?")
_WITH_AT = ("host", "user", "password", "options", "application_name")
"""Parameters of PostgreSQL whose value may have an @."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_STORES = ("s3", "gs", "az")
_BUCKET = re.compile(r"//[\w$][\w.$-]*(?P<path>/[^?#\x00-\x1f]*)?")


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT.

    Attributes:
        host: A name, or an IPv4 or IPv6 address, without brackets.
        port: 1 to 65535; 0 asks for a free one, where that was allowed.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, free: bool = False) -> Self:
        """Reads HOST:PORT; an IPv6 address stands in brackets.

        Args:
            text: The given address.
            free: True if port 0 is allowed.

        Raises:
            ValueError: If it is not of that form.
        """
        match = _FORM.fullmatch(text)
        if not match or not (0 if free else 1) <= int(match[3]) <= LAST_PORT:
            raise ValueError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:7070")
        return cls(match[1] or without_root(match[2]), int(match[3]))

    @property
    def is_loopback(self) -> bool:
        """True if only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_every(self) -> bool:
        """True if it is every address of this machine, which only a server can be told to listen on."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def without_root(host: str) -> str:
    """Returns a host name without the dot of the root at its end, which no certificate has."""
    return host.removesuffix(".") if len(host) > 1 else host


def check_endpoint(text: str) -> str:
    """Checks http://HOST:PORT or https://HOST:PORT, and returns it.

    Raises:
        ValueError: If it is not of that form.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in ("http", "https"):
        raise ValueError(f"{text!r} is not http://HOST:PORT or https://HOST:PORT")
    Address.parse(rest)
    return text


def check_database_url(text: str) -> str:
    """Checks the URL of a database as far as that goes without a connection, and returns it.

    The message shows no part of it: a password that has an @ is taken for the host, the port or the name.

    Raises:
        ValueError: If it is none of SQLite and PostgreSQL, cannot be taken apart, or is of a database in memory.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in (*_SQLITE, *_POSTGRESQL):
        raise ValueError(f"the URL is not {_DATABASES}")
    if "\0" in text or text != text.encode(errors="replace").decode():
        raise ValueError("there is a character that cannot stand in a URL")
    if scheme in _SQLITE:
        _check_sqlite(*rest.partition("?")[::2])
    else:
        _check_postgresql(*_USER.sub("", rest).partition("?")[::2])
    return text


def _check_sqlite(place: str, query: str) -> None:
    path, given = unquote(place), parse_qs(query)
    if path in ("", "/") or ":memory:" in path or "memory" in given.get("mode", ()):
        raise ValueError("the database would be in memory, and lost with the process; name a file, sqlite:///PATH")
    if not path.startswith("/"):
        raise ValueError("sqlite:// is followed by / and a path: sqlite:///relative.db, sqlite:////absolute.db")
    if path.startswith("/file:") and "uri" not in given:
        raise ValueError("file: is a part of the path without uri=true; add that, or leave out file:")


def _check_postgresql(place: str, query: str) -> None:
    authority = place.partition("/")[0]
    host = _HOST.fullmatch(authority)
    port = host["port"] if host else "none"
    is_port = not port or (port.isascii() and port.isdigit() and 1 <= int(port) <= LAST_PORT)
    pieces = [piece for piece in query.split("&") if piece.partition("=")[0] not in _WITH_AT]
    if not is_port or "@" in place or any("@" in piece for piece in pieces):
        raise ValueError(
            f"{'an @ is in the wrong place' if is_port else f'the port is not a number from 1 to {LAST_PORT}'}; the "
            "URL is postgresql://USER:PASSWORD@HOST:PORT/NAME, and an @, : or / in USER and PASSWORD must be "
            "percent-encoded (%40, %3A, %2F)"
        )


def folder_of(place: str) -> Path | None:
    """Returns the folder that a place of files is, absolute; None for the URL of an object store."""
    if place.startswith("file://"):
        return Path(unquote(place.removeprefix("file://"))).absolute()
    given = _SCHEME.match(place)
    return None if given and given[2].startswith("//") else Path(place).absolute()


def check_place(place: str) -> str:
    """Checks a place of files, a folder or a URL of an object store, as far as that goes without it, and returns it.

    Raises:
        ValueError: If it is neither, or a folder whose name is too much like a URL.
    """
    scheme, rest = match.groups() if (match := _SCHEME.fullmatch(place)) else ("", place)
    cure = f"a folder of that name is ./{scheme}:..."
    if scheme.lower() in _STORES:
        bucket = _BUCKET.fullmatch(rest)
        folders = unquote(bucket["path"] or "").removesuffix("/").split("/")[1:] if bucket else [".."]
        if not {"", ".", ".."}.isdisjoint(folders):
            raise ValueError(
                f"an object store is {scheme}://BUCKET or {scheme}://BUCKET/FOLDER, without . and .. among its "
                f"folders, ?, # or an access key; {cure}"
            )
    elif scheme == "file" and not rest.startswith("///"):
        raise ValueError(f"the URL of a folder is file:///PATH; {cure}")
    elif scheme != "file" and scheme and rest.startswith("/"):
        raise ValueError(f"{scheme}: is none of file://, s3://, gs:// and az://; {cure}")
    return place


def check_folder(place: str) -> str:
    """Checks that the path of a folder is none of a URL, which would become a folder's name, and returns it.

    Raises:
        ValueError: If it is.
    """
    given = _SCHEME.match(place)
    if given and given[2].startswith("/"):
        raise ValueError(
            f"{given[1]}: is not the name of a folder of this machine; one of that name is ./{given[1]}:..."
        )
    return place

"""The life of a console process: a socket, a link for whoever started it, and uvicorn until it is told to end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import uvicorn

from fedpeft.api.operator_client import Connect
from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address
from fedpeft_operator.console.app import console
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings

BACKLOG = 128
LAST_WORDS_S = 1
"""Time that open pages get at the end, seconds: their event streams would never end by themselves."""


async def serve(settings: Settings, connect: Connect, say: Callable[[str], None]) -> None:
    """Serves until a signal ends it.

    Args:
        settings: Its address, and the rights of its users.
        connect: Makes a client of the server.
        say: Called with the login link, once browsers are served there.

    Raises:
        SettingsInvalid: If the address is not to be had.
    """
    with closing(_listen(settings.listen)) as listener:
        await _serve(listener, settings, connect, say)


async def _serve(listener: socket.socket, settings: Settings, connect: Connect, say: Callable[[str], None]) -> None:
    port = listener.getsockname()[1]
    settings = replace(settings, listen=Address(settings.listen.host, port))
    sessions = SessionStore(settings.may_write)
    config = uvicorn.Config(
        console(settings, connect, sessions),
        http="h11",  # not whatever parser happens to be installed: they answer bad requests differently
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    try:
        config.load()
    except OSError as error:  # of files that cannot be read, or hold something else
        raise SettingsInvalid(
            f"--tls-certificate {settings.certificate} and --tls-key {settings.key} cannot be used: {error}"
        ) from None
    say(login_link(settings, sessions))
    await uvicorn.Server(config).serve(sockets=[listener])


def login_link(settings: Settings, sessions: SessionStore) -> str:
    """Returns an address that lets one browser in, once."""
    host = settings.link_host
    named = f"[{host}]" if ":" in host else host
    return f"{settings.scheme}://{named}:{settings.listen.port}/login?key={sessions.new_key(may_write=True)}"


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsInvalid(f"--listen: cannot listen on {address.host}:{address.port}: {error.strerror}") from None
    return listener

"""Channels to a server: TLS with the certificate of an identity, or plain text to this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from fedpeft.identity import certificates, keys
from fedpeft.process.addresses import Address
from fedpeft.rpc.proxies import proxy_of

if TYPE_CHECKING:
    from cryptography import x509

    from fedpeft.identity.folder import Identity

Options = Sequence[tuple[str, str | int]]

_ANY_ADDRESS = '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'
"""Of a name's addresses each connection tries the first in an order of its own (gRFC A62): with a name server
or a hosts file that always gives them in the same order, one of several servers would have every client otherwise."""

_OPTIONS: Options = [
    ("grpc.use_local_subchannel_pool", 1),  # two channels never share a connection: another certificate is another one
    ("grpc.service_config", _ANY_ADDRESS),
]

NO_RETRIES = ("grpc.enable_retries", 0)
"""An option for channels whose calls are counted: what gRPC repeats by itself nobody sees; whoever calls repeats."""


def open_channel(server: str, identity: Identity | None = None, options: Options = ()) -> grpc.aio.Channel:
    """Opens a channel, inside a running event loop.

    Args:
        server: HOST:PORT. With TLS, HOST must be among the names of the server's certificate.
        identity: Identity of the caller, and the authorities that it trusts; None for plain text.
        options: Channel arguments of gRPC.

    Raises:
        SettingsInvalid: If the environment names something as a proxy that is none.
    """
    every = [*_OPTIONS, *_proxied(server, secured=identity is not None), *options]
    if identity is None:
        return grpc.aio.insecure_channel(server, options=every)
    credentials = grpc.ssl_channel_credentials(
        certificates.to_pem(*identity.authority),
        keys.to_pem(identity.key),
        certificates.to_pem(*identity.chain),
    )
    return grpc.aio.secure_channel(server, credentials, options=every)


def open_unnamed(server: str, authority: Sequence[x509.Certificate], options: Options = ()) -> grpc.aio.Channel:
    """Opens a channel on which the server is known and the caller is not: where devices enroll."""
    credentials = grpc.ssl_channel_credentials(certificates.to_pem(*authority))
    every = [*_OPTIONS, *_proxied(server, secured=True), *options]
    return grpc.aio.secure_channel(server, credentials, options=every)


def _proxied(server: str, *, secured: bool) -> Options:
    """Returns the options for the proxy on the way; what gRPC reads by itself makes no exception for this machine."""
    proxy = proxy_of(Address.parse(server), secured=secured)
    if proxy is None:
        return [("grpc.enable_http_proxy", 0)]
    return [("grpc.enable_http_proxy", 1), ("grpc.http_proxy", proxy.url)]

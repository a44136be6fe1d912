"""The way to a server, by bare sockets: what can be told of it before anything is proved."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass, replace

from cryptography import x509

from fedpeft.process.addresses import Address
from fedpeft.rpc.proxies import Proxy, proxy_of

STEP_S = 2.0
"""Longest that one step waits for the other side."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of an HTTP/2 client: its preface and empty settings."""
_LONGEST_HEADER = 16_384
_SETTINGS = 4
"""The type of the frame that an HTTP/2 server says first."""


class Fault(Exception):
    """Reason why a server is not reached; the message is a sentence that says what to do."""


class PermanentFault(Fault):
    """A fault that stays until somebody mends it: the server is not merely away."""


class SpeaksTls(PermanentFault):
    """The server speaks TLS, and is called in plain text."""


class Closed(Fault):
    """Nobody listens on the port."""


@dataclass(frozen=True)
class ConnectionProbe:
    """The way to one server.

    Attributes:
        server: HOST:PORT.
        deadline: End of the search for a fault, on the monotonic clock.
        secured: True if the server is called over TLS, which decides which proxy is on the way.
    """

    server: str
    deadline: float
    secured: bool = False

    @property
    def address(self) -> Address:
        """The server's address."""
        return Address.parse(self.server)

    def step_s(self) -> float:
        """Returns how long the next step may wait."""
        return max(0.05, min(STEP_S, self.deadline - time.monotonic()))

    def connect(self) -> socket.socket:
        """Returns a socket that is connected to the server, through the proxy if there is one on the way.

        Raises:
            Fault: If the name is not known, the port closed, or nobody answers.
        """
        proxy = proxy_of(self.address, secured=self.secured)
        if proxy is None:
            return self._connect()
        try:
            line = replace(self, server=str(proxy.address))._connect()
        except Fault as fault:
            raise Fault(f"the proxy on the way to {self.server} is not reached: {fault}") from None
        try:
            line.settimeout(self.step_s())
            line.sendall(proxy.request(self.server))
            status = _status(line)
        except (OSError, ValueError):
            line.close()
            raise Fault(
                f"the proxy {proxy.address} does not answer when it is asked for {self.server}: check HTTPS_PROXY, or "
                "name the server in NO_PROXY if it is reached directly"
            ) from None
        if not 200 <= status < 300:
            line.close()
            raise _refused_by(proxy, self.server, status)
        return line

    def _connect(self) -> socket.socket:
        host, port = self.address.host, self.address.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Fault(
                f"the name {host} is not known here ({error.strerror}): check the address, or this machine's name "
                "service"
            ) from None
        refused: OSError = OSError("no address")
        for family, kind, protocol, _, where in found:
            line = socket.socket(family, kind, protocol)
            line.settimeout(self.step_s())
            try:
                line.connect(where)
                return line
            except OSError as error:
                line.close()
                refused = error
        raise self._not_connected(refused)

    def _not_connected(self, error: OSError) -> Fault:
        if isinstance(error, ConnectionRefusedError):
            return Closed(
                f"the machine {self.address.host} is there, but nothing listens on port {self.address.port}: start "
                "fedpeft-server, or check the port and what forwards it"
            )
        if isinstance(error, TimeoutError):
            return self.silent("does not answer at all")
        return Fault(
            f"there is no way to {self.server} ({error.strerror or error}): check the network, the VPN and the routes"
        )

    def first_bytes(self) -> bytes:
        """Speaks HTTP/2 in plain text and returns the beginning of the answer; nothing if the line is closed.

        Raises:
            Fault: If there is no connection, or no answer.
        """
        with closing(self.connect()) as line:
            try:
                line.settimeout(self.step_s())
                line.sendall(_PREFACE)
                return line.recv(64)
            except TimeoutError:
                raise self.silent("accepts the connection but sends nothing") from None
            except ConnectionError:
                return b""

    def judge(self, first: bytes) -> None:
        """Checks that an answer begins as that of a gRPC server in plain text.

        Raises:
            Fault: If it does not.
        """
        if first.startswith(b"HTTP/"):
            status = first.split(b"\r\n")[0].decode("ascii", "replace")
            raise PermanentFault(
                f"a web server or HTTP proxy answers at {self.server} ({status!r}), not FedPEFT: check the port, or "
                "let the proxy pass it through as plain TCP"
            )
        if not first:
            raise Fault(
                f"something at {self.server} takes the connection and closes it: a proxy or load balancer between that "
                "has no server behind it, perhaps"
            )
        if first[3:4] != bytes([_SETTINGS]):
            raise PermanentFault(
                f"what answers at {self.server} is not a FedPEFT server: check the address and the port"
            )

    def peer_certificate(self) -> x509.Certificate | None:
        """Returns the certificate that the server shows, which proves nothing; None if it shows none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with closing(context.wrap_socket(self.connect(), server_hostname=self.address.host)) as secure:
                data = secure.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(data) if data else None
        except (OSError, ValueError, Fault):
            return None

    def silent(self, what: str) -> Fault:
        """Returns the fault of somebody who does not answer."""
        return Fault(
            f"{self.server} {what}: a firewall or proxy between may drop the connection, or the server hangs; let port "
            f"{self.address.port} through as plain TCP"
        )


def _status(line: socket.socket) -> int:
    """Reads a proxy's answer to the end of its header, and returns its status.

    Raises:
        ValueError: If it is not an answer of HTTP.
    """
    header = b""
    while b"\r\n\r\n" not in header:
        some = line.recv(1)  # not a byte more: the next ones are the server's
        header += some
        if not some or len(header) > _LONGEST_HEADER:
            raise ValueError("no HTTP answer")
    return int(header.split(b" ", 2)[1])


def _refused_by(proxy: Proxy, server: str, status: int) -> Fault:
    """Returns the fault of a proxy that makes no connection."""
    if status == 407:
        return PermanentFault(
            f"the proxy {proxy.address} wants a user and password: HTTPS_PROXY=http://USER:PASSWORD@{proxy.address}"
        )
    return Fault(
        f"the proxy {proxy.address} makes no connection to {server} (HTTP {status}): ask who runs it to let CONNECT to "
        "that port through, or name the server in NO_PROXY if it is reached directly"
    )

"""`fedpeft console`: the federation in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.session import require, run_async, session_of

EPILOG = epilog(
    "fedpeft console",
    "fedpeft --server 10.0.0.5:7070 console --listen 127.0.0.1:8080 --read-only",
    hint="Ctrl-C ends it. The server may be started later: until then the pages say that it is away.",
)


def console(
    context: typer.Context,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Address to serve on; port 0 takes a free one.")
    ] = "127.0.0.1:7080",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show runs, but let nobody create, pause or stop one.")
    ] = False,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="HOST", help="A host name that browsers may use for it.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", metavar="PEM", help="Certificate chain, to serve with TLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--tls-key", metavar="PEM", help="Its private key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve plain text over the network: an eavesdropper can take over.")
    ] = False,
) -> None:
    """Show the federation in a browser; prints a link with which one browser logs in, once."""
    require("console", "starlette", "uvicorn", "jinja2", "python_multipart")
    from fedpeft_operator.console.serving import serve
    from fedpeft_operator.console.settings import Settings

    session = session_of(context)
    settings = Settings.checked(
        session.server,
        listen,
        read_only=read_only or not session.may_write,
        names=tuple(name or ()),
        certificate=certificate,
        key=key,
        insecure=insecure,
        secured=session.secured,
    )
    if not settings.listen.is_loopback and settings.certificate is None:
        output.note("INSECURE: login links and cookies cross the network in plain text, where others can read them")

    def say(link: str) -> None:
        output.say(f"console of {session.server}: {link}")
        if settings.is_everywhere:
            output.note(
                "it listens on every address: from another machine, use this one's name in place of "
                f"{settings.link_host}; from outside a container, the port that it is published as"
            )
        output.note("the link works once; its pages give others under Access; Ctrl-C ends the console")

    run_async(serve(settings, session.client, say))

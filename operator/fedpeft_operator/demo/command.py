"""`fedpeft demo`: a whole federation on this machine, from nothing to an adapter, a report and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.session import require

EPILOG = epilog(
    "fedpeft demo --out demo-out",
    "fedpeft demo --out demo-out --rounds 3 --clients 2",
    "fedpeft demo --out demo-out --data photos",
    hint="Ctrl-C ends it and all its processes.",
    ends=(Exit.INTERRUPTED,),
)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results, the logs and all state.")],
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", min=1, help="Number of rounds; as in the run file if absent.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            "--clients",
            metavar="N",
            min=1,
            help="Number of clients; if absent one for each vendor, else 4.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images of one's own: a folder of class folders, parquet, or hub:NAME/SPLIT, of which a fifth is held "
            "out; or a folder of train.parquet and test.parquet.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="hub|PATH", help="timm's weights from its hub, or a file; the demo's own if absent."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Port of the server; 0: a free one.")
    ] = 0,
    metrics_port: Annotated[
        int,
        typer.Option("--metrics-port", metavar="PORT", min=0, max=65535, help="Port of its metrics; 0: a free one."),
    ] = 0,
) -> None:
    """Watch a federation of processes fine-tune a vision transformer on this machine.

    A server, a client for each vendor of emoji drawings, and an evaluator, each a process of its own. Leaves
    report.json, accuracy.png, adapter.safetensors and the logs in --out.
    """
    require("demo", "torch", "timm", "pyarrow", "matplotlib", "sqlalchemy", "obstore")
    from fedpeft_operator.demo.federation import plan_of, run_until_signalled

    plan = plan_of(out, rounds, clients, data, weights, port, metrics_port)
    if not run_until_signalled(plan):
        raise typer.Exit(Exit.INTERRUPTED)
    output.say(f"results: {out / 'report.json'}, {out / 'accuracy.png'}, {out / 'adapter.safetensors'}")

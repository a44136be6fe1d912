"""`fedpeft partition`: writes what each of several clients has of a data set, and says how skewed that came out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import SettingsInvalid
from fedpeft.formatting import counted
from fedpeft.process import output
from fedpeft_operator.cli.columns import ImageColumn, LabelColumn
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.session import require

if TYPE_CHECKING:
    from fedpeft.data.partitions import Partition
    from fedpeft.data.sources.interface import Source

SHOWN = 20
"""Clients listed for people; partition.json has them all."""

EPILOG = epilog(
    "fedpeft partition train.parquet --partition dirichlet --clients 10 --alpha 0.5 --out sites",
    "fedpeft partition train.parquet --column vendor --out sites",
)


class Scheme(StrEnum):
    """Scheme by which rows are assigned to clients."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    QUANTITY = "quantity"
    NATURAL = "natural"


def partition(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Parquet file, folder of parquet files, or image folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write, with a folder or file for each client.")
    ],
    given: Annotated[
        Scheme | None,
        typer.Option(
            "--partition",
            help="iid; dirichlet: label skew; quantity: size skew; natural: one client for each value of "
            "--column. If absent: natural with --column, else iid.",
            show_default=False,
        ),
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="N", min=1, help="Number of clients; for all but natural.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="A", help="Above 0, for dirichlet and quantity: smaller is more skewed."),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", metavar="NAME", help="Column whose values are the clients, for natural.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draws.")] = 0,
    index: Annotated[
        bool, typer.Option("--index", help="Write index files that name rows of SOURCE in place of copies.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print partition.json.")] = False,
) -> None:
    """Divide a data set among clients."""
    scheme = given or (Scheme.IID if column is None else Scheme.NATURAL)
    _check(scheme, clients, alpha, column)
    require("train", "pyarrow")
    from fedpeft.data.partition_writer import write_parts
    from fedpeft.data.sources.inventory import Inventory
    from fedpeft.data.sources.opening import open_source

    whole = open_source(source, image_column, label_column)
    split = _split(whole, scheme, clients or 1, 0.0 if alpha is None else alpha, column or "", seed)
    record = write_parts(source, split, out, index=index, image=image_column, label=label_column, source=whole)
    if as_json:
        output.say_json(record)
        return
    for line in [*_lines(record, out), *Inventory.of_dict(record["source"]).lines()]:
        output.say(line)


def _check(scheme: Scheme, clients: int | None, alpha: float | None, column: str | None) -> None:
    """Finds a flag that is missing for the scheme, or that it would ignore."""
    wants = {
        "--clients": (clients, scheme is not Scheme.NATURAL),
        "--alpha": (alpha, scheme in (Scheme.DIRICHLET, Scheme.QUANTITY)),
        "--column": (column, scheme is Scheme.NATURAL),
    }
    for flag, (value, wanted) in wants.items():
        if wanted and value is None:
            raise SettingsInvalid(f"--partition {scheme} needs {flag}")
        if value is not None and not wanted:
            raise SettingsInvalid(f"--partition {scheme} takes no {flag}; leave it out")


def _split(source: Source, scheme: Scheme, clients: int, alpha: float, column: str, seed: int) -> Partition:
    from fedpeft.data import partitions

    match scheme:
        case Scheme.IID:
            return partitions.iid(len(source), clients, seed)
        case Scheme.DIRICHLET:
            return partitions.dirichlet(source.labels, clients, alpha, seed)
        case Scheme.QUANTITY:
            return partitions.quantity(len(source), clients, alpha, seed)
        case Scheme.NATURAL:
            return partitions.natural(source.column(column), column)


def _lines(record: views.Json, out: Path) -> list[str]:
    """Returns what is said of a partition: who has what, and its realised skew."""
    skew = record["skew"]
    clients = counted(len(record["clients"]), "client")
    lines = [f"{record['rows']:,} rows for {clients} ({record['variant']}) are in {out}"]
    lines += [f"  {client['name']}: {client['examples']:,}" for client in record["clients"][:SHOWN]]
    if len(record["clients"]) > SHOWN:
        lines.append(f"  and {len(record['clients']) - SHOWN:,} more, in partition.json")
    return [
        *lines,
        f"label skew: total variation {skew['total_variation']:.3f}, Jensen-Shannon {skew['jensen_shannon']:.3f} bits, "
        f"{skew['classes_per_client']:.1f} classes a client",
        f"size skew: {skew['smallest']:,} to {skew['largest']:,} rows, Gini {skew['gini']:.3f}, "
        f"as good as {skew['effective_clients']:.1f} equal clients",
    ]

"""`fedpeft partition`: writes what each of several clients has of a data set, and says how skewed that came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.api import views
from fedpeft.errors import SettingsInvalid
from fedpeft.formatting import counted
from fedpeft.partition_schemes import OPTIONS, Scheme, Variant, variant_fault
from fedpeft.process import output
from fedpeft_operator.cli.columns import ImageColumn, LabelColumn
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.session import require

SHOWN = 20
"""Clients listed for people; partition.json has them all."""

EPILOG = epilog(
    "fedpeft partition train.parquet --partition dirichlet --clients 10 --alpha 0.5 --out sites",
    "fedpeft partition train.parquet --column vendor --out sites",
)


Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="Parquet file, folder of parquet files, image folder, or hub:NAME/SPLIT."),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write, with a folder or file for each client.")
]
Given = Annotated[
    Scheme | None,
    typer.Option(
        "--partition",
        help="iid; dirichlet: label skew; shards: few classes a client; quantity: size skew; natural: one client "
        "for each value of --column. If absent: natural with --column, else iid.",
        show_default=False,
    ),
]
Clients = Annotated[
    int | None, typer.Option("--clients", metavar="N", min=1, help="Number of clients; for all but natural.")
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", metavar="A", help="Above 0, for dirichlet and quantity: smaller is more skewed."),
]
GivenVariant = Annotated[
    Variant | None,
    typer.Option(
        "--variant",
        help="Of dirichlet: class-first, balanced or client-first; of quantity: dirichlet or lognormal sizes. The "
        "first if absent.",
        show_default=False,
    ),
]
Shards = Annotated[int | None, typer.Option("--shards", metavar="N", min=1, help="Shards of each client, for shards.")]
Examples = Annotated[
    int | None, typer.Option("--examples", metavar="N", min=1, help="Rows that are drawn first; all if absent.")
]
Column = Annotated[
    str | None, typer.Option("--column", metavar="NAME", help="Column whose values are the clients, for natural.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draws.")]
Index = Annotated[bool, typer.Option("--index", help="Write index files that name rows of SOURCE in place of copies.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print partition.json.")]


def partition(
    source: Source,
    out: Out,
    given: Given = None,
    clients: Clients = None,
    alpha: Alpha = None,
    variant: GivenVariant = None,
    shards: Shards = None,
    examples: Examples = None,
    column: Column = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    index: Index = False,
    as_json: AsJson = False,
) -> None:
    """Divide a data set among clients."""
    scheme: Scheme = given or ("iid" if column is None else "natural")
    _check(scheme, clients, alpha, column, shards, variant)
    require("train", "pyarrow")
    from fedpeft.data.division import Division
    from fedpeft.data.partition_writer import write_parts
    from fedpeft.data.sources.hub import local_path
    from fedpeft.data.sources.inventory import Inventory
    from fedpeft.data.sources.opening import open_source

    source = local_path(source)
    whole = open_source(source, image_column, label_column)
    rule = Division(scheme, clients or 1, alpha or 0.0, variant, shards or 2, column, examples)
    split = rule.of(whole, seed)
    record = write_parts(source, split, out, index=index, image=image_column, label=label_column, source=whole)
    if as_json:
        output.say_json(record)
        return
    for line in [*_lines(record, out), *Inventory.of_dict(record["source"]).lines()]:
        output.say(line)


def _check(
    scheme: Scheme,
    clients: int | None,
    alpha: float | None,
    column: str | None,
    shards: int | None,
    variant: Variant | None,
) -> None:
    """Finds a flag that is missing for the scheme, or that it would ignore."""
    takes = OPTIONS[scheme] if scheme == "natural" else ("clients", *OPTIONS[scheme])
    given = {"clients": clients, "alpha": alpha, "column": column, "shards": shards}
    for option, value in given.items():
        if option in takes and value is None:
            raise SettingsInvalid(f"--partition {scheme} needs --{option}")
        if option not in takes and value is not None:
            raise SettingsInvalid(f"--partition {scheme} takes no --{option}; leave it out")
    if fault := variant_fault(scheme, variant):
        raise SettingsInvalid(f"--partition {fault}")


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

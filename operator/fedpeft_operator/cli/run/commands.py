"""`fedpeft run`: list, show, pause, resume, stop, delete; those of a module of their own are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.api.round_table import of_json
from fedpeft.privacy.statement import in_words
from fedpeft.process import output
from fedpeft.rounds.metric_values import ROLLED_BACK_TO
from fedpeft_operator.cli.epilogs import OF_NAMED, OF_SERVER, epilog
from fedpeft_operator.cli.round_rows import OF_SHOW, say_rounds
from fedpeft_operator.cli.run import create, export, track, verify, watch
from fedpeft_operator.cli.session import Session, run_async, session_of

if TYPE_CHECKING:
    from fedpeft.v1 import run_pb2

app = typer.Typer(no_args_is_help=True, help="Runs: create, watch, control and export.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The run's id, as `run list` shows it.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Reason, kept with the run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list", epilog=epilog("fedpeft run list", ends=OF_SERVER))
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List all runs, oldest first."""
    rows = run_async(_rows(session_of(context)))
    if as_json:
        output.say_json(rows)
        return
    output.say_table(
        ("RUN", "NAME", "STATE", "VERSION", "OF", "METHOD", "MODEL", "CREATED"),
        [
            (
                row["run"],
                row["name"],
                row["state"],
                row["version"],
                row["rounds"],
                row["method"],
                row["model"],
                row["created_at"],
            )
            for row in rows
        ],
        right=("VERSION", "OF"),
    )


@app.command("show", epilog=epilog("fedpeft run show run-0a1b2c3d4e5f --json", ends=OF_NAMED))
def show(context: typer.Context, run: Id, as_json: AsJson = False) -> None:
    """Show a run: its state, its committed rounds with their bytes, the round in progress."""
    whole = run_async(shown_run(session_of(context), run))
    if as_json:
        output.say_json(whole)
        return
    for line in _headline(whole):
        output.say(line)
    if whole["rounds"]:
        _say_rounds(whole["rounds"])
    if whole["in_progress"]:
        output.say(_progress_line(whole["in_progress"]))


@app.command("pause", epilog=epilog("fedpeft run pause run-0a1b2c3d4e5f --reason 'a new disk'", ends=OF_NAMED))
def pause(context: typer.Context, run: Id, reason: Reason = "", as_json: AsJson = False) -> None:
    """Let no new round open; the open one goes on."""
    _steer(session_of(context), "pause", run, reason, as_json)


@app.command("resume", epilog=epilog("fedpeft run resume run-0a1b2c3d4e5f", ends=OF_NAMED))
def resume(context: typer.Context, run: Id, as_json: AsJson = False) -> None:
    """Let rounds open again."""
    _steer(session_of(context), "resume", run, "", as_json)


@app.command("stop", epilog=epilog("fedpeft run stop run-0a1b2c3d4e5f --reason 'accurate enough'", ends=OF_NAMED))
def stop(context: typer.Context, run: Id, reason: Reason = "", as_json: AsJson = False) -> None:
    """End a run for good; what is committed stays."""
    _steer(session_of(context), "stop", run, reason, as_json)


@app.command(
    "rollback",
    epilog=epilog(
        "fedpeft run rollback run-0a1b2c3d4e5f --to 12 --reason 'poisoned in round 13'",
        hint="Nothing is removed: the earlier version's tensors become a new version, and run verify checks it. It "
        "takes the place of a round: in the last one it completes the run.",
        ends=OF_NAMED,
    ),
)
def rollback(
    context: typer.Context,
    run: Id,
    to: Annotated[
        int, typer.Option("--to", metavar="VERSION", min=0, help="The earlier version, as run show lists it.")
    ],
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Take a run back to an earlier adapter version; the round in progress ends."""
    row = views.run_row(run_async(_rolled_back(session_of(context), run, to, reason)))
    if as_json:
        output.say_json(row)
    else:
        last = ": it was the last one" if row["version"] == row["rounds"] else ""
        output.say(f"{run} is {row['state']} at version {row['version']}, which has the tensors of version {to}{last}")


async def _rolled_back(session: Session, run: str, to: int, reason: str) -> run_pb2.Run:
    async with session.client() as server:
        return await server.roll_back(run, to, reason)


@app.command("delete", epilog=epilog("fedpeft run delete run-0a1b2c3d4e5f", ends=OF_NAMED))
def delete(context: typer.Context, run: Id, as_json: AsJson = False) -> None:
    """Remove a completed or stopped run with all its versions and records."""
    run_async(_delete(session_of(context), run))
    if as_json:
        output.say_json({"run": run, "deleted": True})
    else:
        output.say(f"{run} is deleted")


app.command("create", epilog=create.EPILOG)(create.create)
app.command("watch", epilog=watch.EPILOG)(watch.watch)
app.command("track", epilog=track.EPILOG)(track.track)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("verify", epilog=verify.EPILOG)(verify.verify)


async def _rows(session: Session) -> list[views.Json]:
    async with session.client() as server:
        return [views.run_row(run) for run in await server.runs()]


async def shown_run(session: Session, run: str) -> views.Json:
    """Returns a run as `fedpeft run show --json` prints it."""
    async with session.client() as server:
        found, _ = await server.run(run)
        rounds = await server.rounds(run, records=found.config.HasField("privacy"))  # they hold the events
        return views.run_json(found, rounds, views.in_progress(found, rounds))


async def _delete(session: Session, run: str) -> None:
    async with session.client() as server:
        await server.delete(run)


def _steer(session: Session, verb: str, run: str, reason: str, as_json: bool) -> None:
    """Calls one of pause, resume, stop, and says what the run's state is afterwards."""
    row = views.run_row(run_async(_steered(session, verb, run, reason)))
    if as_json:
        output.say_json(row)
    else:
        output.say(f"{run} is {row['state']}" + (f": {row['reason']}" if row["reason"] else ""))


async def _steered(session: Session, verb: str, run: str, reason: str) -> run_pb2.Run:
    async with session.client() as server:
        match verb:
            case "pause":
                return await server.pause(run, reason)
            case "stop":
                return await server.stop(run, reason)
            case _:
                return await server.resume(run)


def _headline(whole: views.Json) -> list[str]:
    """Returns what is said of a run before its rounds."""
    config = whole["config"]
    tuned, model = whole["adapter_parameters"], whole["model_parameters"]
    share = f" of {model:,} ({100 * tuned / model:.2f} %)" if model else ""
    reason = f": {whole['reason']}" if whole["reason"] else ""
    return [
        f"{whole['run']} {whole['name']!r} is {whole['state']}{reason}",
        f"  {whole['method']} on {config['model']['name']}, {tuned:,} parameters{share}",
        f"  version {whole['version']} of {config['rounds']['count']}, created {whole['created_at'] or '-'}",
        *([f"  privacy: {in_words(whole['privacy'])}"] if "privacy" in whole else []),
        *(f"  {c} is set aside: its updates are refused; fedpeft client readmit {c}" for c in whole["set_aside"]),
        *(f"  {d['client']} declined: {'; '.join(d['reasons'])}" for d in whole["declines"]),
        *(f"  {each['client']}: {each['description']}" for each in whole["progress"]),
        *(f"  evaluator {views.evaluator_line(row)}" for row in whole["evaluators"]),
        *(f"  {line}" for row in whole["evaluators"] for line in views.failed_lines(row)),
    ]


def _say_rounds(rounds: list[views.Json]) -> None:
    say_rounds(map(of_json, rounds), OF_SHOW)
    for row in rounds:
        if (to := row["metrics"].get(ROLLED_BACK_TO)) is not None:
            output.say(f"round {row['version']} folded no update: it rolled the run back to version {to:.0f}")


def _progress_line(row: views.Json) -> str:
    if row["phase"] == "waiting":  # nobody was asked yet; the run's reason says how many are missing
        return f"round {row['round']} has not begun"
    awaited = ", ".join(row["awaited"]) or "nobody"
    deadline = f"; deadline {row['deadline']}" if row["deadline"] else ""
    return f"round {row['round']} is {row['phase']}: {len(row['received'])} received, waiting for {awaited}{deadline}"

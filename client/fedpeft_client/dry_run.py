"""`--dry-run`: checks everything that a round needs, and says in a few lines what would happen."""

from __future__ import annotations

from fedpeft.errors import FedpeftError
from fedpeft_client.agent import Agent
from fedpeft_client.exits import UNFIT
from fedpeft_client.fitness import Report
from fedpeft_client.runs import KnownRun
from fedpeft_client.settings import Settings


async def dry_run(agent: Agent, settings: Settings) -> None:
    """Registers, proves every run, prints what was found on stdout, and trains nothing.

    Raises:
        FedpeftError: The first thing that is wrong, after everything was checked and printed.
    """
    hello = await agent.register()
    _line("server", settings.server)
    _line("device", f"{hello['device']}, {hello['threads']} threads, torch {hello['torch']}")
    _line("data", f"{settings.data}: {hello['rows']:,} images of {len(hello['labels'])} classes")
    if not agent.runs:
        _line("runs", "none yet; the client would wait for one")
    first: FedpeftError | None = None
    for run in agent.runs.values():
        print(f"\n{run.id} ({run.config.name})")
        try:
            _describe(run, await agent.fitness.prove(run), settings.evaluate)
        except UNFIT as error:
            _line("unfit", str(error))
            first = first or error
    if first is not None:
        raise first


def _describe(run: KnownRun, report: Report, evaluates: bool) -> None:
    tuned, whole = run.spec.parameters, report["model_parameters"]
    low, high = run.upload_bounds(run.version + 1)
    size = f"{high:,} bytes" if low == high else f"at most {high:,} bytes"
    _line("model", f"{run.config.model.name}, backbone {run.fingerprint[:16]} as the run's")
    _line("method", f"{run.spec.method}: {tuned:,} of {whole:,} parameters")
    _line("examples", f"{report['examples']:,}: " + _counts(report["classes"]))
    if report["dropped"]:
        _line("dropped", f"{report['dropped']:,} images that the label map leaves out")
    if evaluates:
        _line("would", "score every committed version on these examples")
    else:
        _line("would", f"train in each round it is sampled for, and send {size} ({run.config.codec.encoding})")


def _counts(classes: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(classes.items())[:20]]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more classes" if more else "")


def _line(key: str, text: str) -> None:
    print(f"{key:>10}  {text}")

"""The page of a run, and of one round of it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.errors import Unavailable
from fedpeft_operator.console.context import ConsoleContext, context_of
from fedpeft_operator.console.feeds.facts import RoundFacts
from fedpeft_operator.console.feeds.run_feed import RunFeed
from fedpeft_operator.console.guard import Refused, session_of
from fedpeft_operator.console.live import stream
from fedpeft_operator.console.pages.request_values import page_number, path_id, path_number
from fedpeft_operator.console.renderer import Fragments
from fedpeft_operator.console.shown.captions import captions
from fedpeft_operator.console.shown.configuration import configuration
from fedpeft_operator.console.shown.evaluation import evaluation
from fedpeft_operator.console.shown.excluded import Exclusions, exclusions
from fedpeft_operator.console.shown.members import members
from fedpeft_operator.console.shown.outliers import WINDOW, norms
from fedpeft_operator.console.shown.pagination import paginate
from fedpeft_operator.console.shown.run import awaited, declines, head, stage, tiles, versions
from fedpeft_operator.console.shown.series import series
from fedpeft_operator.console.shown.set_aside import set_aside

ROUNDS_A_PAGE = 25
MOST_MEMBERS = 50
"""Clients that are listed; those with remarks come first."""


async def run(request: Request) -> Response:
    """Shows a run."""
    context, feed, page = context_of(request), await _feed(request), page_number(request)
    fragments = draw(context, feed, page, session_of(request).may_write)
    name = feed.snapshot.run.config.name if feed.snapshot else feed.run
    return context.renderer.page(
        request,
        "run.html",
        name,
        fragments=fragments,
        run=feed.run,
        name=name,
        window=WINDOW,
        versions=versions(feed.snapshot.run, feed.rounds) if feed.snapshot else [],
        events=f"/runs/{feed.run}/events?page={page}",
    )


async def events(request: Request) -> Response:
    """Sends what changes of it."""
    context, feed, page = context_of(request), await _feed(request), page_number(request)
    may_write = session_of(request).may_write
    return stream(request, lambda: draw(context, feed, page, may_write), lambda: [feed.run])


def draw(context: ConsoleContext, feed: RunFeed, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of a run's page."""
    # A watch may be silent for long; whether the server is there, the directory asks.
    lost = (feed.lost or context.directory.lost) if feed.error is None else feed.error.message
    connection = {"connection": context.renderer.fragment("connection.html", lost=lost)}
    if feed.snapshot is None:
        return connection
    about_rounds = feed.cached(("rounds", page), lambda: _about_rounds(context, feed, page))
    about_run = feed.cached(("run", may_write), lambda: _about_run(context, feed, may_write))
    # How far clients and evaluators are changes all the time: from the last look at all runs, not from the watch.
    run = context.directory.runs.get(feed.run, feed.snapshot.run)
    far = {
        "awaited": context.renderer.fragment("run/awaited.html", awaited=awaited(run)),
        "evaluation": context.renderer.fragment(
            "run/evaluation.html", evaluation=evaluation(run, feed.rounds), run=feed.run
        ),
    }
    return {**connection, **about_rounds, **about_run, **far}


async def round_(request: Request) -> Response:
    """Shows one round of a run, with all its tickets."""
    context, feed, page = context_of(request), await _feed(request), page_number(request)
    number = path_number(request, "number")
    facts = next((facts for facts in feed.rounds if facts.number == number), None)
    if facts is None or feed.snapshot is None:
        raise Refused(404, f"{feed.run} has no round {number}; its newest round is {len(feed.rounds)}.")
    known = feed.cached("norms", lambda: list(norms(feed.rounds)))
    ratios = {norm.client: norm for norm in known if norm.round == number}
    classes = {
        name.removeprefix("accuracy/"): value for name, value in facts.metrics.items() if name.startswith("accuracy/")
    }
    return context.renderer.page(
        request,
        "round.html",
        f"Round {number} of {feed.snapshot.run.config.name}",
        run=feed.run,
        name=feed.snapshot.run.config.name,
        round=facts,
        tickets=paginate(facts.tickets, page, 100),
        excluded=await _exclusions(context, feed.run, facts),
        norms=ratios,
        classes=sorted(classes.items(), key=lambda item: item[1]),
        last=len(feed.rounds),
    )


async def _exclusions(context: ConsoleContext, run: str, facts: RoundFacts) -> Exclusions | None:
    """Returns the excluded updates of a round; its record, which alone has the limit, is read only if there are any."""
    if not facts.of("excluded"):
        return None
    try:
        found = (
            await context.connection.ask(lambda server: server.round(run, facts.number)) if facts.is_committed else None
        )
    except Unavailable:  # the page says so already, and has the reasons without it
        found = None
    return exclusions(facts, found.record if found else "")


def _about_run(context: ConsoleContext, feed: RunFeed, may_write: bool) -> dict[str, str]:
    snapshot, renderer = feed.snapshot, context.renderer
    assert snapshot is not None
    return {
        "head": renderer.fragment("run/head.html", head=head(snapshot.run), may_write=may_write),
        "aside": renderer.fragment(
            "run/aside.html", aside=set_aside(snapshot.run, feed.rounds), run=feed.run, may_write=may_write
        ),
        "end": renderer.fragment("run/end.html", head=head(snapshot.run), may_write=may_write),
        "rollback-said": renderer.fragment("run/rollback.html", head=head(snapshot.run)),
        "configuration": renderer.fragment(
            "run/configuration.html",
            configuration=configuration(snapshot.run),
            head=head(snapshot.run),
            may_write=may_write,
        ),
        "stage": renderer.fragment(
            "run/stage.html",
            stage=stage(snapshot, feed.rounds),
            head=head(snapshot.run),
            declines=declines(snapshot.run),
        ),
        "tiles": renderer.fragment("tiles.html", tiles=tiles(snapshot, feed.rounds)),
    }


def _about_rounds(context: ConsoleContext, feed: RunFeed, page: int) -> dict[str, str]:
    snapshot, renderer = feed.snapshot, context.renderer
    assert snapshot is not None
    initial = dict(snapshot.run.initial_metrics)
    committed = [facts for facts in feed.rounds if facts.is_committed]
    found = members(feed.rounds)
    said = {f"said-{name}": text for name, text in captions(feed.rounds, initial).items()}
    return {
        **{name: renderer.fragment("text.html", text=text) for name, text in said.items()},
        "series": renderer.fragment("series.html", series=series(feed.rounds, initial)),
        "members": renderer.fragment(
            "run/members.html", members=found[:MOST_MEMBERS], hidden=max(0, len(found) - MOST_MEMBERS), run=feed.run
        ),
        "rounds": renderer.fragment(
            "run/rounds.html",
            page=paginate(list(reversed(committed)), page, ROUNDS_A_PAGE),
            run=feed.run,
            initial=initial,
        ),
    }


async def _feed(request: Request) -> RunFeed:
    """Returns the feed of the run that is asked for.

    Raises:
        FedpeftError: If it cannot be followed.
    """
    context, run = context_of(request), path_id(request, "run")
    if not await context.directory.knows_run(run):
        raise Refused(404, f"Run {run} does not exist; the overview lists all runs.")
    feed = context.feeds.of(run, force=True)
    await context.ready([run])
    if feed.error is not None:
        raise feed.error
    return feed

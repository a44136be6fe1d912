"""The page of a run, and of one round of it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fedpeft.console.desk import Desk, desk_of
from fedpeft.console.feed import RunFeed
from fedpeft.console.guard import Refused, session_of
from fedpeft.console.live import stream
from fedpeft.console.pages.asked import page_number, path_id, path_number
from fedpeft.console.paper import Fragments
from fedpeft.console.shown.captions import captions
from fedpeft.console.shown.configuration import configuration
from fedpeft.console.shown.members import members
from fedpeft.console.shown.outliers import WINDOW, norms
from fedpeft.console.shown.pages import leaf
from fedpeft.console.shown.run import awaited, declines, head, stage, tiles
from fedpeft.console.shown.series import series

ROUNDS_A_PAGE = 12
MOST_MEMBERS = 50
"""Clients that are listed; those that are not like the others come first."""


async def run(request: Request) -> Response:
    """Shows a run."""
    desk, feed, page = desk_of(request), await _feed(request), page_number(request)
    fragments = draw(desk, feed, page, session_of(request).may_write)
    name = feed.picture.run.config.name if feed.picture else feed.run
    return desk.paper.page(
        request,
        "run.html",
        name,
        fragments=fragments,
        run=feed.run,
        name=name,
        window=WINDOW,
        events=f"/runs/{feed.run}/events?page={page}",
    )


async def events(request: Request) -> Response:
    """Sends what changes of it."""
    desk, feed, page = desk_of(request), await _feed(request), page_number(request)
    may_write = session_of(request).may_write
    return stream(request, lambda: draw(desk, feed, page, may_write), lambda: [feed.run])


def draw(desk: Desk, feed: RunFeed, page: int, may_write: bool) -> Fragments:
    """Returns the fragments of a run's page."""
    # A watch may be silent for long; whether the server is there, the directory asks.
    lost = (feed.lost or desk.directory.lost) if feed.error is None else feed.error.message
    connection = {"connection": desk.paper.fragment("connection.html", lost=lost)}
    if feed.picture is None:
        return connection
    about_rounds = feed.made(("rounds", page), lambda: _about_rounds(desk, feed, page))
    about_run = feed.made(("run", may_write), lambda: _about_run(desk, feed, may_write))
    # How far clients are changes all the time: from the last look at all runs, not from the watch.
    run = desk.directory.runs.get(feed.run, feed.picture.run)
    far = {"awaited": desk.paper.fragment("run/awaited.html", awaited=awaited(run))}
    return {**connection, **about_rounds, **about_run, **far}


async def round_(request: Request) -> Response:
    """Shows one round of a run, with all its tickets."""
    desk, feed, page = desk_of(request), await _feed(request), page_number(request)
    number = path_number(request, "number")
    facts = next((facts for facts in feed.rounds if facts.number == number), None)
    if facts is None or feed.picture is None:
        raise Refused(404, f"{feed.run} has no round {number}; it has had {len(feed.rounds)}.")
    ratios = {norm.client: norm for norm in norms(feed.rounds) if norm.round == number}
    classes = {
        name.removeprefix("accuracy/"): value for name, value in facts.metrics.items() if name.startswith("accuracy/")
    }
    return desk.paper.page(
        request,
        "round.html",
        f"Round {number} of {feed.picture.run.config.name}",
        run=feed.run,
        name=feed.picture.run.config.name,
        round=facts,
        tickets=leaf(facts.tickets, page, 100),
        norms=ratios,
        classes=sorted(classes.items(), key=lambda item: item[1]),
        last=len(feed.rounds),
    )


def _about_run(desk: Desk, feed: RunFeed, may_write: bool) -> dict[str, str]:
    picture, paper = feed.picture, desk.paper
    assert picture is not None
    return {
        "head": paper.fragment("run/head.html", head=head(picture.run), may_write=may_write),
        "end": paper.fragment("run/end.html", head=head(picture.run), may_write=may_write),
        "configuration": paper.fragment(
            "run/configuration.html",
            configuration=configuration(picture.run),
            head=head(picture.run),
            may_write=may_write,
        ),
        "stage": paper.fragment(
            "run/stage.html", stage=stage(picture, feed.rounds), head=head(picture.run), declines=declines(picture.run)
        ),
        "tiles": paper.fragment("tiles.html", tiles=tiles(picture, feed.rounds)),
    }


def _about_rounds(desk: Desk, feed: RunFeed, page: int) -> dict[str, str]:
    picture, paper = feed.picture, desk.paper
    assert picture is not None
    initial = dict(picture.run.initial_metrics)
    committed = [facts for facts in feed.rounds if facts.is_committed]
    found = members(feed.rounds)
    said = {f"said-{name}": text for name, text in captions(feed.rounds, initial).items()}
    return {
        **{name: paper.fragment("text.html", text=text) for name, text in said.items()},
        "series": paper.fragment("series.html", series=series(feed.rounds, initial)),
        "members": paper.fragment(
            "run/members.html", members=found[:MOST_MEMBERS], hidden=max(0, len(found) - MOST_MEMBERS), run=feed.run
        ),
        "rounds": paper.fragment(
            "run/rounds.html",
            leaf=leaf(list(reversed(committed)), page, ROUNDS_A_PAGE),
            run=feed.run,
            initial=initial,
        ),
    }


async def _feed(request: Request) -> RunFeed:
    """Returns the feed of the run that is asked for.

    Raises:
        FedpeftError: If it cannot be followed.
    """
    desk, run = desk_of(request), path_id(request, "run")
    if not await desk.directory.knows_run(run):
        raise Refused(404, f"There is no run {run}; the overview lists those there are.")
    feed = desk.feeds.of(run, again=True)
    await desk.looked([run])
    if feed.error is not None:
        raise feed.error
    return feed

"""Keeping a page up to date: its fragments over server-sent events, each as often as it changes.

An event `fragment` is JSON `{"id": ..., "html": ...}`. What changes faster than `BREATH_S` is sent once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import StreamingResponse

from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.guard import Refused, session_of
from fedpeft_operator.console.renderer import Fragments

BREATH_S = 0.25
SIGN_OF_LIFE_S = 15.0
"""Longest silence, so that a browser finds a dead console and a console a browser that is gone."""

Draw = Callable[[], Fragments]


def stream(request: Request, draw: Draw, runs: Callable[[], Sequence[str]]) -> StreamingResponse:
    """Returns the events of a page.

    Args:
        request: Of the browser.
        draw: Returns the page's fragments as they are now.
        runs: Returns the runs that are looked at.

    Raises:
        Refused: If too many pages are open.
    """
    if not context_of(request).sessions.may_open(session_of(request)):
        raise Refused(503, "Too many pages are open; close one and reload this page.")
    return StreamingResponse(_events(request, draw, runs), media_type="text/event-stream")


async def _events(request: Request, draw: Draw, runs: Callable[[], Sequence[str]]) -> AsyncIterator[str]:
    context, session = context_of(request), session_of(request)
    sent: dict[str, str] = {}
    with ExitStack() as held:
        held.enter_context(context.sessions.page_open(session))
        held.enter_context(context.directory.in_use())
        held.enter_context(context.feeds.in_use(runs()))
        while context.sessions.get(session.id) is not None:
            count = context.signal.count
            for event in _changed(draw(), sent):
                yield event
            if not await context.signal.wait(count, SIGN_OF_LIFE_S):
                yield ": still here\n\n"
            await asyncio.sleep(BREATH_S)


def _changed(fragments: Fragments, sent: dict[str, str]) -> list[str]:
    """Returns the events for what is not as it was sent, and notes it as sent."""
    events = []
    for name, html in fragments.items():
        if sent.get(name) != html:
            sent[name] = html
            events.append(f"event: fragment\ndata: {json.dumps({'id': name, 'html': html})}\n\n")
    return events

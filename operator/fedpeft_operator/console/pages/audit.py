"""The audit log, newest first."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.pages.request_values import page_number
from fedpeft_operator.console.shown.audit import rows

ENTRIES_A_PAGE = 50


async def audit(request: Request) -> Response:
    """Shows a page of the log, up to the entry `until` or the newest."""
    context = context_of(request)
    newest = await context.audit.newest()
    until = min(page_number(request, "until"), newest) if "until" in request.query_params else newest
    entries = await context.audit.until(until, ENTRIES_A_PAGE)
    return context.renderer.page(
        request, "audit.html", "Audit log", entries=rows(entries), until=until, newest=newest, size=ENTRIES_A_PAGE
    )

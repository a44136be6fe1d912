"""HTML from templates: every page is rendered here, and every value is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from fedpeft import __version__, formatting
from fedpeft_operator.console.guard import session_of
from fedpeft_operator.console.sentences import sentence

Fragments = Mapping[str, str]
"""Parts of a page that are kept up to date, HTML by the id of the element that holds it."""


class Renderer:
    """Renders pages and their fragments.

    Args:
        server: HOST:PORT of the federation's server, named on every page.
        secured: True if it wants certificates, so that a device enrolls before it starts.
    """

    def __init__(self, server: str, secured: bool) -> None:
        self._templates = Environment(
            loader=PackageLoader("fedpeft_operator.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(server=server, secured=secured, version=__version__)
        self._templates.filters.update(
            {
                "size": formatting.size,
                "percent": formatting.percent,
                "counted": formatting.counted,
                "number": _number,
                "figure": _figure,
                "when": _when,
                "ago": _ago,
                "as_json": _json,
                "sentence": sentence,
            }
        )

    def page(
        self,
        request: Request,
        template: str,
        title: str,
        *,
        fragments: Fragments | None = None,
        status: int = 200,
        **values: Any,
    ) -> HTMLResponse:
        """Returns a whole page.

        Args:
            request: Request that it answers; the session's rights decide which forms are offered.
            template: Its file.
            title: Of the browser's tab.
            fragments: Its parts that are kept up to date.
            status: HTTP status.
            values: Values of the template's names.
        """
        parts = {name: Markup(html) for name, html in (fragments or {}).items()}
        text = self._templates.get_template(template).render(
            title=title, session=session_of(request), path=request.url.path, parts=parts, **values
        )
        return HTMLResponse(text, status)

    def fragment(self, template: str, **values: Any) -> str:
        """Returns a part of a page."""
        return self._templates.get_template(template).render(**values)


def _number(value: float | None, digits: int = 0) -> str:
    """Returns a number with thousands apart, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _figure(value: float | None) -> str:
    """Returns a number with four digits that say something, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def _when(stamp: str | None) -> Markup:
    """Returns a time in UTC; the page's script puts it into the reader's own zone."""
    if not stamp:
        return Markup("-")
    shown = stamp[:19].replace("T", " ")
    return Markup('<time datetime="{}" data-when>{} UTC</time>').format(stamp, shown)


def _ago(stamp: str | None) -> Markup:
    """Returns a time that the page's script shows as the time since or until then."""
    if not stamp:
        return Markup("-")
    shown = stamp[:19].replace("T", " ")
    return Markup('<time datetime="{}" data-ago>{} UTC</time>').format(stamp, shown)


def _json(value: Any) -> str:
    """Returns JSON for an attribute, where it is escaped like any text."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

"""One model is built at a time, and whoever comes meanwhile is told so at once."""

from __future__ import annotations

import re

import httpx

from fedpeft.api.operator_client import OperatorClient
from fedpeft_operator.console.app import console
from fedpeft_operator.console.session_store import SessionStore
from fedpeft_operator.console.settings import Settings


async def test_a_run_that_comes_while_another_is_built_is_not_waited_for() -> None:
    sessions = SessionStore(may_write=True)
    app = console(Settings.checked("s:1", "127.0.0.1:7080"), lambda: OperatorClient("127.0.0.1:1"), sessions)
    origin = "http://127.0.0.1:7080"
    key = sessions.new_key(may_write=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=origin, timeout=20) as browser:
        assert (await browser.get(f"/login?key={key}")).status_code == 303
        found = re.search(r'name="csrf" value="([^"]+)"', (await browser.get("/access")).text)
        assert found
        form = {"csrf": found[1], "action": "create", "text": "name = 'kept'", "request_id": "1"}
        async with app.state.context.building:
            answer = await browser.post("/new", data=form, headers={"Origin": origin})
        assert answer.status_code == 503
        assert "another run is being built" in answer.text and "kept" in answer.text
        assert (await browser.post("/new", data=form, headers={"Origin": origin})).status_code == 422

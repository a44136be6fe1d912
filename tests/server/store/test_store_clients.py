"""Clients in the database."""

from __future__ import annotations

from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import ClientRow


class TestClients:
    def test_registering_again_keeps_when_it_was_first_seen(self, database: Database) -> None:
        assert database.client("b") is None
        database.see_clients([ClientRow("b", "0" * 32, "trainer", b"\x00\xff", 1.0, 1.0)])
        database.see_clients([ClientRow("a", "1" * 32, "evaluator", b"", 2.0, 2.0)])
        database.see_clients([ClientRow("b", "2" * 32, "trainer", b"\x01", 3.0, 3.0)])
        database.touch_clients({"a": 9.0, "stranger": 9.0})
        database.touch_clients({})
        first, second = database.clients()
        assert (first.id, first.role, first.last_seen) == ("a", "evaluator", 9.0)
        assert (second.id, second.instance, second.capabilities) == ("b", "2" * 32, b"\x01")
        assert (second.first_seen, second.last_seen, second.updates) == (1.0, 3.0, 0)
        assert database.client("b") == second

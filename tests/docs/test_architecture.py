"""The page that leads along one update names functions that exist, in at most twelve stops, and every room."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

from fedpeft.registry import registry_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^(\d+)\. `(fedpeft[\w.]+)`", PAGE, re.MULTILINE)
MOST = 16
"""Modules side by side in a package, its `__init__` not counted."""


def test_every_stop_is_a_function_that_exists() -> None:
    assert [int(number) for number, _ in STOPS] == list(range(1, len(STOPS) + 1)) and 1 < len(STOPS) <= 12
    for _, name in STOPS:
        assert callable(resolve_name(name)), name


def packages() -> dict[str, list[str]]:
    """Returns the modules of each package, by its path below its root."""
    found: dict[str, list[str]] = {}
    for root in ("common", "server", "client", "operator"):
        for path in (ROOT / root).rglob("*.py"):
            if not {"v1", "versions"} & {*path.parts} and path.name != "__init__.py":
                found.setdefault(path.parent.relative_to(ROOT / root).as_posix(), []).append(path.name)
    return found


def test_the_page_names_every_room() -> None:
    rooms = {folder.split("/")[1] for folder in packages() if "/" in folder and "migrations" not in folder}
    assert {room for room in rooms if f"`{room}`" not in PAGE} == set()


def test_no_package_has_more_modules_than_one_sees_at_a_glance() -> None:
    assert {folder: len(modules) for folder, modules in packages().items() if len(modules) > MOST} == {}


def test_every_interface_with_entry_points_names_all_that_is_registered() -> None:
    rows = re.findall(r"^\| `\w+`: [^|]+ \| `([\w/]+)/` \| `(fedpeft\.\w+)` \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 8
    for folder, group, residents in rows:
        registry = registry_of(folder.replace("/", "."))
        assert registry.group == group
        assert residents.split(", ") == registry.names() or group == "fedpeft.tasks"

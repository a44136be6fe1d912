"""Writes the dashboards as Grafana reads them, into dashboards/; `--check` fails when one is stale."""

import json
import sys
from pathlib import Path

from fedpeft_dashboards.clients_and_bytes import clients_and_bytes
from fedpeft_dashboards.daemon import daemon
from fedpeft_dashboards.federation import federation
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "dashboards"
DASHBOARDS = (federation, clients_and_bytes, daemon)


def text(board: Dashboard) -> str:
    """Returns a dashboard as JSON; panels are numbered in their order, so that links to one go on working."""
    built = board.build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    data = json.loads(json.dumps(built, cls=JSONEncoder))
    for variable in data["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):  # of interval variables only; the builders write them for all
            del variable[name]
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    """Writes, or compares."""
    fresh = {FOLDER / f"{make.__name__.replace('_', '-')}.json": text(make()) for make in DASHBOARDS}
    if "--check" in sys.argv[1:]:
        there = {path: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
        stale = sorted(path.name for path in fresh.keys() | there.keys() if fresh.get(path) != there.get(path))
        for name in stale:
            print(f"deploy/grafana/dashboards/{name} is stale; run `.venv/bin/python deploy/grafana/generate.py`")
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path, content in fresh.items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

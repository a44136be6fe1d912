"""A day of a federation of a million devices, computed and simulated, from the unit costs of one daemon.

Devices come once on most days for some hours, wait in long polls, are sampled into rounds, train, and send updates. The
computed figures are means, written down as formulas in `computed`; the simulation draws each device's day and each
round, and counts what happens in each second. docs/scaling.md shows both; a test makes its tables from here again.

    federation.py [--devices 1000000] [--runs 4] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COSTS: dict[str, Any] = json.loads((Path(__file__).parent / "unit_costs.json").read_text(encoding="utf-8"))
DAY_S = 86_400
PEAK_S = 60
"""Peaks are means of a minute."""
DRAWS = 1000
"""A sample is given up after so many draws of eight times as many devices."""
LIMITS = {"memory_gb": 8.0, "transactions_s": 1000.0, "bucket_requests_s": 3500.0}
"""Assumed: memory of a machine, transactions of a PostgreSQL on its own disk, requests of an S3 under one prefix."""
PRICES = {"daemon_h": 0.10, "database_month": 300.0, "million_puts": 5.0, "gigabyte_out": 0.09}
"""Assumed, in dollars: list prices of a large cloud; two cores and 8 GB for a daemon."""
SHOWN = {
    "present": ("devices that are there (not a second's)", 1),
    "arrivals": ("devices that come", 1),
    "polls": ("polls that end with nothing", 1),
    "pulls": ("versions sent", 1),
    "uploads": ("updates received", 1),
    "cores": ("processor time of all daemons, cores", 1),
    "cores_joins": ("of that for coming", 1),
    "cores_polls": ("for polls", 1),
    "cores_updates": ("for versions and updates", 1),
    "cores_folds": ("for folds", 1),
    "cores_seats": ("for what daemons tell each other", 1),
    "cores_sampling": ("for sampling", 1),
    "cores_counting": ("for counting the registered devices by their silence", 1),
    "transactions_s": ("transactions of the database, reading ones too", 1),
    "statements_s": ("SQL statements", 1),
    "bucket_requests_s": ("requests to the bucket", 1),
    "up_bytes_s": ("MB from devices", 1e6),
    "down_bytes_s": ("MB to devices", 1e6),
    "memory_of_daemon_bytes": ("memory of a daemon, GB (not a second's)", 1e9),
}
"""Rows of the first table: what each is called, and its unit."""

Seconds = NDArray[np.float64]
Devices = NDArray[np.int64]


@dataclass(frozen=True)
class Scenario:
    """Assumptions about devices, runs and machines.

    Attributes:
        devices: Registered devices.
        daily: Share of them that comes on a day.
        hours: Mean hours for which one stays; lognormal.
        spread: Deviation of the logarithm of those.
        evening_h: Local hour at which devices come, in the mean; they are charged over night.
        evening_spread_h: Deviation of it.
        zones: Share of the devices by hours east of Greenwich.
        runs: Runs at the same time.
        clients: Updates of a round.
        over_selection: Devices sampled beyond those, as a share.
        train_s: Median time from the version's arrival to the first byte of the update; lognormal.
        train_spread: Deviation of the logarithm of it.
        dropped: Share of the sampled that never send.
        link_bytes_s: Bytes that a device sends, and receives, in a second.
        transfers: Uploads, and as many downloads, that a daemon serves at once (`--max-transfers`).
        busy: Share of a core at which a daemon counts as full.
        waiting: Most devices that wait with one daemon; so many were measured.
    """

    devices: int = 1_000_000
    daily: float = 0.7
    hours: float = 7.0
    spread: float = 0.4
    evening_h: float = 22.5
    evening_spread_h: float = 1.5
    zones: Mapping[int, float] = field(default_factory=lambda: {-8: 0.1, -5: 0.2, 0: 0.15, 1: 0.3, 5: 0.1, 8: 0.15})
    runs: int = 4
    clients: int = 1000
    over_selection: float = 0.3
    train_s: float = 240.0
    train_spread: float = 0.6
    dropped: float = 0.1
    link_bytes_s: float = 625_000.0
    transfers: int = 8
    busy: float = 0.5
    waiting: int = 10_000

    @property
    def sampled(self) -> int:
        """Devices that are given a ticket in a round."""
        return round(self.clients * (1 + self.over_selection))


@dataclass(frozen=True)
class Load:
    """Events of a second: means of a day, or of the busiest minute of each.

    Attributes:
        present: Devices that are there.
        arrivals: Devices that come.
        polls: Polls that end with nothing.
        pulls: Versions that are sent.
        uploads: Updates that get a receipt.
        rounds: Rounds that are committed.
    """

    present: float
    arrivals: float
    polls: float
    pulls: float
    uploads: float
    rounds: float


def computed(s: Scenario) -> Load:
    """Returns the means of a day, as a formula gives them."""
    present = s.devices * s.daily * s.hours / 24
    reached = s.clients / (s.sampled * (1 - s.dropped))  # of those that send, the share that the round waits for
    slowest = s.train_s * math.exp(s.train_spread * _quantile(reached)) + 2 * transfer_s(s)
    rounds = s.runs / (slowest + s.clients * COSTS["processor_s"]["commit"])
    return Load(
        present,
        s.devices * s.daily / DAY_S,
        present / COSTS["longest_hold_s"],
        rounds * s.sampled,
        rounds * s.clients,
        rounds,
    )


def transfer_s(s: Scenario) -> float:
    """Returns the seconds that an update takes on a device's link."""
    return float(COSTS["payload_bytes"]) / s.link_bytes_s


def _quantile(share: float) -> float:
    """Returns the quantile of the standard normal distribution, by bisection."""
    low, high = -8.0, 8.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < share else (low, middle)
    return low


@dataclass
class Simulation:
    """A day, second by second, after a day that fills the federation; `of_second` are counts."""

    scenario: Scenario
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._length = 2 * DAY_S
        self.present = self._present()
        self.pulls, self.uploads, self.commits = (np.zeros(self._length) for _ in range(3))

    def _present(self) -> Seconds:
        """Draws when each device is there, on two days; returns how many are, in each second."""
        s, rng = self.scenario, self._rng
        zones = rng.choice(list(s.zones), s.devices, p=list(s.zones.values()))
        self._begins, self._ends = [], []
        moves = np.zeros(self._length + 1)
        self.arrivals = np.zeros(self._length)
        for day in (-1, 0, 1):
            comes = rng.random(s.devices) < s.daily
            local = rng.normal(s.evening_h, s.evening_spread_h, s.devices)
            begins = (day * 24 + local - zones) * 3600
            stays = np.exp(rng.normal(math.log(s.hours) - s.spread**2 / 2, s.spread, s.devices)) * 3600
            begins, ends = np.where(comes, begins, np.inf), np.where(comes, begins + stays, -np.inf)
            self._begins.append(begins)
            self._ends.append(ends)
            there = comes & (ends > 0) & (begins < self._length)
            first, last = (
                np.clip(begins[there], 0, self._length).astype(int),
                np.clip(ends[there], 0, self._length).astype(int),
            )
            np.add.at(moves, first, 1)
            np.add.at(moves, last, -1)
            new = first[(begins[there] >= 0) & (first < self._length)]
            np.add.at(self.arrivals, new, 1)
        return np.cumsum(moves)[:-1]

    def _sample(self, now: float, number: int) -> tuple[Devices, Seconds]:
        """Draws devices that are there and not at work; returns them, and when each of them leaves.

        Raises:
            RuntimeError: If hardly any are.
        """
        chosen: list[int] = []
        leaves: list[float] = []
        for _ in range(DRAWS):
            if len(chosen) == number:
                return np.array(chosen), np.array(leaves)
            drawn = self._rng.integers(0, self.scenario.devices, 8 * number)
            ends = np.full(drawn.size, -np.inf)
            for begin, end in zip(self._begins, self._ends, strict=True):
                ends = np.where((begin[drawn] <= now) & (end[drawn] > now), end[drawn], ends)
            free = (ends > now) & (self._busy_until[drawn] <= now)
            for device, end in zip(drawn[free], ends[free], strict=True):
                if len(chosen) < number and self._busy_until[device] <= now:
                    self._busy_until[device] = np.inf
                    chosen.append(int(device))
                    leaves.append(float(end))
        raise RuntimeError(f"{len(chosen)} of {number} devices are there and free after {DRAWS} draws")

    def run(self, daemons: int) -> None:
        """Holds the rounds of both days."""
        s = self.scenario
        self._busy_until = np.zeros(s.devices)
        due = [(float(60 * number), number) for number in range(s.runs)]
        while due:
            now, number = heapq.heappop(due)
            done = self._round(now, daemons)
            if done < self._length:
                self.commits[int(done)] += 1
                heapq.heappush(due, (done, number))

    def _round(self, now: float, daemons: int) -> float:
        """Holds a round that opens now; returns when its version is there."""
        s, rng = self.scenario, self._rng
        chosen, leaves = self._sample(now, s.sampled)
        turns = np.arange(s.sampled) // (daemons * s.transfers)
        pulled = now + (turns + 1) * transfer_s(s)
        self._count(self.pulls, pulled)
        trained = pulled + s.train_s * np.exp(s.train_spread * rng.standard_normal(s.sampled))
        sent = trained + transfer_s(s)
        sends = (rng.random(s.sampled) >= s.dropped) & (sent < leaves)
        self._busy_until[chosen] = np.where(sends, sent, np.minimum(trained, leaves))
        receipts = np.sort(sent[sends])[: s.clients]
        self._count(self.uploads, receipts)
        return float(receipts[-1]) + s.clients * COSTS["processor_s"]["commit"]

    def _count(self, into: Seconds, at: Seconds) -> None:
        at = at[at < self._length].astype(int)
        np.add.at(into, at, 1)

    def load(self, *, peak: bool) -> Load:
        """Returns the means of the second day, or those of its busiest minutes."""

        def of(counts: Seconds) -> float:
            minutes = counts[DAY_S:].reshape(-1, PEAK_S).mean(axis=1)
            return float(minutes.max() if peak else minutes.mean())

        each = (self.present, self.arrivals, self.present / COSTS["longest_hold_s"])
        return Load(*map(of, each), of(self.pulls), of(self.uploads), of(self.commits))


def needs(s: Scenario, load: Load, daemons: int) -> dict[str, float]:
    """Returns what a load takes: cores, memory, transactions, requests and bytes."""
    cpu, rows, bucket, memory = (
        COSTS["processor_s"],
        COSTS["transactions"],
        COSTS["bucket_requests"],
        COSTS["memory_bytes"],
    )
    joins = load.arrivals * (cpu["register"] + cpu["accept"])
    polls = load.polls * cpu["poll"]
    work = load.pulls * (cpu["sample"] + cpu["pull"]) + load.uploads * cpu["push"]
    folds = load.uploads * cpu["commit"]
    # Every daemon hears of each device that comes, goes, is sampled or done, and samples from all that wait.
    seats = 2 * (load.arrivals + load.pulls) * cpu["seat"] * daemons
    sampling = load.rounds * load.present * cpu["sampling_waiting"]
    counting = s.devices * cpu["count_known"] / COSTS["count_every_s"] * daemons
    statements = COSTS["statements"]
    size, wire = COSTS["payload_bytes"], COSTS["wire_over_payload"]
    of_update = load.uploads * (rows["push"] + rows["commit"]) + load.pulls * rows["pull"]
    return {
        "cores": joins + polls + work + folds + seats + sampling + counting,
        "cores_joins": joins,
        "cores_polls": polls,
        "cores_updates": work,
        "cores_folds": folds,
        "cores_seats": seats,
        "cores_sampling": sampling,
        "cores_counting": counting,
        "memory_of_daemon_bytes": memory["daemon"]
        + s.devices * memory["known"]
        + load.present / daemons * memory["waiting"],
        "transactions_s": load.arrivals * (rows["register"] + rows["accept"])
        + of_update
        + daemons * COSTS["background"]["transactions_s"],
        "statements_s": load.arrivals * (statements["register"] + statements["accept"])
        + load.uploads * (statements["push"] + statements["commit"])
        + load.pulls * statements["pull"]
        + daemons * COSTS["background"]["statements_s"],
        "bucket_requests_s": load.uploads * sum(bucket.values()),
        "up_bytes_s": load.uploads * size * wire["up"] + load.polls * COSTS["poll_bytes"],
        "down_bytes_s": load.pulls * size * wire["down"] + load.polls * COSTS["poll_bytes"],
    }


def daemons_for(s: Scenario, load: Load) -> dict[str, int]:
    """Returns the daemons that each resource asks for; the largest is needed.

    Raises:
        ValueError: If no number of daemons is enough, because each hears of every device.
    """
    by_waiting = math.ceil(load.present / s.waiting)
    alone = needs(s, load, 1)
    each = alone["cores_seats"] + alone["cores_counting"]
    shared = alone["cores"] - each
    if each >= s.busy:
        raise ValueError(f"no number of daemons is enough: each needs {each:.2f} cores to hear of all devices")
    by_cores = math.ceil(shared / (s.busy - each))
    by_transfers = math.ceil(max(load.pulls, load.uploads) * transfer_s(s) / s.transfers)
    return {"waiting": by_waiting, "cores": by_cores, "transfers": by_transfers}


def cost(s: Scenario, load: Load, daemons: int) -> dict[str, float]:
    """Returns the dollars of a month, by `PRICES`."""
    used, month_s = needs(s, load, daemons), 30 * DAY_S
    puts = load.uploads * (COSTS["bucket_requests"]["put"] + COSTS["bucket_requests"]["list"])
    return {
        "daemons": daemons * PRICES["daemon_h"] * 720,
        "database": PRICES["database_month"],
        "bucket requests": puts * month_s * PRICES["million_puts"] / 1e6,
        "bytes to devices": used["down_bytes_s"] * month_s * PRICES["gigabyte_out"] / 1e9,
    }


def room(s: Scenario, peak: Load, daemons: int) -> list[tuple[str, float, float, str]]:
    """Returns the limits, the use of each at the peak, what it is measured in, with the fullest first."""
    used = needs(s, peak, daemons)
    limits = [
        ("devices that wait with one daemon", peak.present / daemons, s.waiting, "devices"),
        (
            "transfers of a daemon at once",
            max(peak.pulls, peak.uploads) * transfer_s(s) / daemons,
            s.transfers,
            "transfers",
        ),
        ("a daemon's core", used["cores"] / daemons, s.busy, "cores"),
        ("a daemon's memory", used["memory_of_daemon_bytes"] / 1e9, LIMITS["memory_gb"], "GB"),
        ("the daemon that folds a run", peak.uploads / s.runs * COSTS["processor_s"]["commit"], s.busy, "cores"),
        ("the database", used["transactions_s"], LIMITS["transactions_s"], "transactions a second"),
        ("the bucket", used["bucket_requests_s"], LIMITS["bucket_requests_s"], "requests a second"),
    ]
    return sorted(limits, key=lambda limit: -limit[1] / limit[2])


def report(s: Scenario, seed: int = 0) -> dict[str, Any]:
    """Returns all figures of the page."""
    mean = computed(s)
    simulation = Simulation(s, seed)
    daemons = max(daemons_for(s, replace(mean, present=float(simulation.present[DAY_S:].max()))).values())
    simulation.run(daemons)
    found, peak = simulation.load(peak=False), simulation.load(peak=True)
    loads = {"computed": mean, "simulated": found, "busiest minute": peak}
    return {
        "daemons": daemons_for(s, peak),
        "load": {name: vars(load) for name, load in loads.items()},
        "needs": {name: needs(s, load, daemons) for name, load in loads.items()},
        "room": room(s, peak, daemons),
        "cost": cost(s, found, daemons),
    }


def tables(found: dict[str, Any]) -> str:
    """Returns the tables of the page."""
    lines = ["| a second | computed | simulated | busiest minute |", "|---|--:|--:|--:|"]
    for part in ("load", "needs"):
        columns = list(found[part].values())
        for name, (title, unit) in SHOWN.items():
            if name in columns[0]:
                lines.append(f"| {title} | " + " | ".join(_figure(column[name] / unit) for column in columns) + " |")
    lines += ["", "| limit | in the busiest minute | limit at | room |", "|---|--:|--:|--:|"]
    for what, used, limit, unit in found["room"]:
        lines.append(f"| {what}, {unit} | {_figure(used)} | {_figure(limit)} | {_figure(limit / used)} x |")
    wanted = ", ".join(f"{number} for {what}" for what, number in found["daemons"].items())
    dollars = ", ".join(f"{what} {_figure(value)}" for what, value in found["cost"].items())
    total = _figure(sum(found["cost"].values()))
    lines += ["", f"Daemons: {wanted}. Dollars a month: {dollars}; {total} together.", ""]
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Returns three digits of a figure."""
    return f"{float(f'{value:.3g}'):,.10g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=Scenario.devices)
    parser.add_argument("--runs", type=int, default=Scenario.runs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    found = report(Scenario(devices=chosen.devices, runs=chosen.runs), chosen.seed)
    if chosen.json:
        print(json.dumps(found, indent=1))
        return
    print(tables(found))


if __name__ == "__main__":
    main()

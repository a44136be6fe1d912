"""Flower and NVFlare, with a process of each killed after two rounds."""

from __future__ import annotations

import time
from pathlib import Path

import flower
import nv_flare
from outcome import AWAY_S, CLIENTS, ROUNDS, Outcome, last_round
from processes import Work, wait_for

WORK = Work(ROUNDS, CLIENTS, values=1000, client_s=1.0)
TOLERANCE = 1e-5
"""Each client adds one a round; means of three in float32 are off by less."""


def measure_flower(folder: Path, programs: Path, port: int, isolation: str, victim: str) -> Outcome:
    """Kills a process after two rounds, starts it again as a service manager would, and tells what came of it."""
    with flower.federation(folder, programs, port, isolation, WORK) as (found, processes):
        wait_for(lambda: len(found.rounds()) >= 2, "two rounds")
        time.sleep(1)
        killed_at = time.monotonic()
        if victim == "ServerApp":
            found.kill_server_app()
        else:
            processes.kill("superlink")
            time.sleep(AWAY_S)
            processes.start("superlink")
        ended = ("finished", "failed", "stopped")
        pause_s = last_round(
            lambda: len(found.rounds()), lambda: any(word in found.status() for word in ended), killed_at
        )
        rounds = found.rounds()
        last = wait_for(found.status, "the status")
        time.sleep(5)
        status = found.status() if "running" in last else last
        updates, value = sum(count for _, _, count, _ in rounds), rounds[-1][1]
        return Outcome(len(rounds), updates, status, abs(value - ROUNDS) < TOLERANCE, pause_s)


def measure_nvflare(folder: Path, programs: Path, victim: str) -> Outcome:
    """Kills a process after two rounds, and tells what came of it; nobody but NVFlare's scripts starts it again."""
    with nv_flare.federation(folder, programs, WORK) as (found, _):
        wait_for(lambda: found.ended() >= 2, "two rounds")
        time.sleep(1)
        killed_at = time.monotonic()
        found.kill(victim)
        pause_s = last_round(found.ended, lambda: "FINISHED" in found.status(), killed_at)
        rounds = found.ended()
        return Outcome(rounds, rounds * CLIENTS, found.status(), abs(found.value() - ROUNDS) < TOLERANCE, pause_s)

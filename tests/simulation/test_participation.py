"""Simulated clients that fail, are late, are refused or set aside, as on a server."""

import json

import numpy as np

from fedpeft.api import views
from fedpeft.errors import TrainingFailed
from fedpeft.rounds import conduct, state_machine
from fedpeft.rounds.commit import RoundEmptied
from fedpeft.simulation import simulate
from fedpeft.simulation.versions import Versions
from fedpeft.tracking import Tracking
from fedpeft.training import local_round
from fedpeft.v1 import run_pb2

from .simulated_runs import clients, config, failing, tensors


def test_a_client_that_trains_in_vain_is_replaced(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 1, "clients": 2, "seed": 11}), clients(folders)
    first, second = state_machine.sample(names, 2, 11, 1)
    failing(monkeypatch, {first})
    row = simulate(settings, names, tmp_path)["rounds"][0]
    assert len(row["clients"]) == 2
    assert second in row["clients"]
    given_up = next(t for t in row["tickets"] if t["client"] == first)
    assert given_up["state"] == "withdrawn"
    assert given_up["reason"].startswith("TRAINING_FAILED: the loss is nan")
    assert (given_up["examples"], given_up["weight"], given_up["payload_bytes_up"]) == (0, 0.0, 0)
    assert given_up["payload_bytes_down"] > 0


def test_what_a_client_got_before_it_gave_its_ticket_back_counts_when_it_is_given_it_again(
    tmp_path, folders, monkeypatch
):
    names, failed = clients(folders), []
    real = local_round.LoadedRun.train

    def train(self, job, *arguments, **options):
        if job.client == "client-1" and not failed:
            failed.append(job)
            raise TrainingFailed("the device was away")
        return real(self, job, *arguments, **options)

    monkeypatch.setattr(local_round.LoadedRun, "train", train)
    (row,) = simulate(config(rounds={"count": 1, "clients": 4, "quorum": 4}), names, tmp_path)["rounds"]
    assert (len(row["clients"]), row["extensions"]) == (4, 1)
    (sent,) = {ticket["payload_bytes_down"] for ticket in row["tickets"]}
    assert sent > 0
    assert row["payload_bytes_down"] == 4 * sent


def test_who_interrupts_the_wait_for_trackers_has_the_results(tmp_path, folders):
    class Slow(Tracking):
        def end(self, state):
            if state == "completed":
                assert json.loads((tmp_path / "report.json").read_text())["state"] == state
                raise KeyboardInterrupt

    report = simulate(config(rounds={"count": 1, "clients": 4}), clients(folders), tmp_path, tracking=Slow())
    assert report["state"] == "completed"


def test_a_quorum_is_enough_and_less_pauses_the_run(tmp_path, folders, monkeypatch):
    names = clients(folders)
    failing(monkeypatch, {"client-1"}, {2})
    enough = config(rounds={"count": 2, "clients": 4, "quorum": 3})
    all_four = config(rounds={"count": 3, "clients": 4, "quorum": 4, "max_extensions": 2})
    report = simulate(enough, names, tmp_path / "enough")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3]
    report = simulate(all_four, names, tmp_path / "paused")
    assert (report["state"], report["version"], report["round"]) == ("paused", 1, 2)
    assert report["reason"] == (
        "round 2 has 3 of the 4 updates it needs after 2 extensions; still awaited: nobody"
        "; the ticket of client-1 was withdrawn: TRAINING_FAILED: the loss is nan in step 1"
    )
    progress = report["in_progress"]
    assert progress.keys() == views.progress_json(run_pb2.Round()).keys()
    assert (progress["extensions"], len(progress["received"])) == (2, 3)
    assert tensors(tmp_path / "paused")[0].version == 1


def test_a_run_that_says_no_quorum_goes_on_without_one_of_its_clients_as_a_server_does(tmp_path, folders, monkeypatch):
    names = clients(folders)
    report = simulate(config(rounds={"count": 2, "clients": 5}), names, tmp_path / "missing")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 4]
    failing(monkeypatch, {"client-1"}, {2})
    report = simulate(config(rounds={"count": 2, "clients": 4}), names, tmp_path / "fails")
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3]


def test_who_is_late_is_drawn_from_the_seed_and_keeps_the_update_for_later(tmp_path, folders, monkeypatch):
    kept = {}
    real = local_round.prepare

    def watched(delta, residual, *arguments):
        kept.setdefault("residuals", []).append(bool(residual))
        return real(delta, residual, *arguments)

    monkeypatch.setattr(local_round, "prepare", watched)
    over = {"count": 6, "clients": 2, "over_selection": 1.0}
    report = simulate(config(rounds=over), clients(folders), tmp_path / "feedback")
    late = [{t["client"] for t in row["tickets"] if t["state"] == "late"} for row in report["rounds"]]
    assert [len(names) for names in late] == [2] * 6
    assert len(set(map(frozenset, late))) > 1
    # Who was late has all of that update in its residual, dense or not.
    assert kept["residuals"][:4] == [False] * 4
    assert sum(kept["residuals"][4:8]) == 2
    deaf = config(rounds=over, codec={"error_feedback": False})
    kept.clear()
    report = simulate(deaf, clients(folders), tmp_path / "deaf")
    assert len(kept["residuals"]) == 12
    assert all(t["payload_bytes_down"] > 0 for row in report["rounds"] for t in row["tickets"])


def test_an_update_that_is_wrong_is_refused_and_its_residual_dropped(tmp_path, folders, monkeypatch):
    names, real = clients(folders), local_round.prepare
    calls: list[bool] = []

    def spoiled(delta, residual, *arguments):
        update = real(delta, residual, *arguments)
        calls.append(bool(residual))
        if len(calls) == 5:
            wrong = bytearray(update.payload)
            wrong[-4:] = np.float32(np.nan).tobytes()
            object.__setattr__(update, "payload", bytes(wrong))
        return update

    monkeypatch.setattr(local_round, "prepare", spoiled)
    settings = config(rounds={"count": 3, "clients": 4, "quorum": 3}, codec={"up": "sparse", "density": 0.1})
    report = simulate(settings, names, tmp_path)
    (refused,) = [t for t in report["rounds"][1]["tickets"] if t["state"] == "refused"]
    assert refused["reason"].startswith("PAYLOAD_INVALID: tensor")
    assert refused["payload_bytes_up"] > 0
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 3, 4]
    assert sorted(calls[8:]) == [False, True, True, True]


def test_a_client_that_did_not_deliver_is_sampled_last_as_on_a_server(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 6, "clients": 2, "seed": 11}), clients(folders)
    first, _ = state_machine.sample(names, 2, 11, 1)
    failing(monkeypatch, {first})
    sampled = [{t["client"] for t in row["tickets"]} for row in simulate(settings, names, tmp_path)["rounds"]]
    assert first in sampled[0]
    assert all(first not in clients for clients in sampled[1 : 1 + conduct.REST_ROUNDS])


def test_a_client_whose_updates_are_refused_again_and_again_is_set_aside(tmp_path, folders, monkeypatch):
    settings, names = config(rounds={"count": 5, "clients": 4, "quorum": 3, "seed": 1}), clients(folders)
    real = local_round.LoadedRun.train

    def spoiled(self, job, *arguments, **options):
        trained = real(self, job, *arguments, **options)
        if job.client == "client-1":
            nan = np.float32(np.nan).tobytes()
            object.__setattr__(trained.prepared, "payload", trained.prepared.payload[:-4] + nan)
        return trained

    monkeypatch.setattr(local_round.LoadedRun, "train", spoiled)
    report = simulate(settings, names, tmp_path)
    states = [next(t["state"] for t in row["tickets"] if t["client"] == "client-1") for row in report["rounds"]]
    assert states == ["refused"] * 5
    assert report["set_aside"] == ["client-1"]


def test_a_late_client_trains_once_though_its_round_is_folded_twice(tmp_path, folders, monkeypatch):
    real, trained = Versions.fold, []
    emptied = []

    def empty_at_first(self, book, *rest):
        if not emptied:
            emptied.extend(ticket.client for ticket, _ in book.counted)
            raise RoundEmptied({ticket.id: "too large" for ticket, _ in book.counted})
        real(self, book, *rest)

    train = local_round.LoadedRun.train

    def counted(self, job, *arguments, **options):
        trained.append(job.client)
        return train(self, job, *arguments, **options)

    monkeypatch.setattr(Versions, "fold", empty_at_first)
    monkeypatch.setattr(local_round.LoadedRun, "train", counted)
    settings = config(rounds={"count": 1, "clients": 2, "over_selection": 0.5, "quorum": 1})
    report = simulate(settings, clients(folders), tmp_path)
    states = {ticket["client"]: ticket["state"] for ticket in report["rounds"][0]["tickets"]}
    assert sorted(states.values()) == ["late", "received", "refused", "refused"]
    assert all(states[client] == "refused" for client in emptied)
    assert sorted(trained) == sorted(states)

"""Clients' answers to the offers of runs: those that may be sampled, and the others with their reasons.

An answer outlives client and server; a client that registers again is asked again, and until it has answered it is not
sampled, though its earlier answer is still shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedpeft.rounds.conduct import GOOD, Conduct
from fedpeft_server.store.rows import AnswerRow


class Participation:
    """The answers of all clients, by run.

    Args:
        known: Those of the database; they stand, so that a restart of the server asks nobody again.
    """

    def __init__(self, known: Iterable[AnswerRow] = ()) -> None:
        self._given: dict[str, dict[str, AnswerRow]] = defaultdict(dict)
        self._due: dict[str, set[str]] = defaultdict(set)
        self._asked: dict[str, list[str]] = defaultdict(list)  # sorted
        self._runs_of: dict[str, set[str]] = defaultdict(set)  # by client, those that it answered for
        self._declines: dict[str, list[str]] = defaultdict(list)  # sorted: those whose answer is a decline
        self._poor: dict[str, dict[str, Conduct]] = defaultdict(dict)  # by run, those that are not GOOD
        self._aside: dict[str, list[str]] = defaultdict(list)  # sorted: of those, the ones that are set aside
        for answer in known:
            self._keep(answer)
            self._judge(answer.run, answer.client, answer.conduct)

    def answer(self, run: str, client: str) -> AnswerRow | None:
        """Returns what a client answered last for a run; None if it did not."""
        return self._given.get(run, {}).get(client)

    def put(self, answer: AnswerRow) -> None:
        """Takes an answer that is durable; how the client used its tickets before stands."""
        answer = replace(answer, conduct=self.conduct(answer.run, answer.client))
        self._keep(answer)
        self._due[answer.run].discard(answer.client)
        _discard(self._asked[answer.run], answer.client)

    def ask_again(self, client: str) -> None:
        """Makes every answer of a client, which began anew, one that is due again."""
        for run in self._runs_of.get(client, ()):
            self._due[run].add(client)

    def mark_offered(self, run: str, client: str) -> None:
        """Records that a client was offered a run; its answer is awaited from now on."""
        _add(self._asked[run], client)

    def dismiss(self, client: str) -> None:
        """Awaits no answer of a client any more: it left or was revoked."""
        for asked in self._asked.values():
            _discard(asked, client)

    def is_due(self, run: str, client: str) -> bool:
        """Returns True if a client has yet to answer for a run."""
        return client not in self._given.get(run, {}) or client in self._due.get(run, ())

    def accepted(self, run: str, client: str) -> bool:
        """Returns True if a client takes part in a run."""
        return not self.is_due(run, client) and self._given[run][client].accepted

    def declined(self, run: str, client: str) -> bool:
        """Returns True if a client, asked since it began, does not take part in a run."""
        return not self.is_due(run, client) and not self._given[run][client].accepted

    def declines(self, run: str) -> Iterator[AnswerRow]:
        """Yields the declines of a run by client, those that are due again included; each is looked up in its turn."""
        return (self._given[run][client] for client in self._declines.get(run, ()))

    def declined_by(self, run: str) -> int:
        """Returns how many clients `declines` names."""
        return len(self._declines.get(run, ()))

    def awaited(self, run: str) -> Sequence[str]:
        """Returns the clients that were offered a run and have not answered yet, by id; not a copy."""
        return self._asked.get(run, ())

    def of(self, client: str, order: Mapping[str, int]) -> list[AnswerRow]:
        """Returns a client's answers for the runs that have a place in an order, in that order."""
        found = [run for run in self._runs_of.get(client, ()) if run in order]
        return [self._given[run][client] for run in sorted(found, key=order.__getitem__)]

    def examples(self, run: str, client: str) -> int:
        """Returns how many examples a client said it has of a run's classes; 0 if it did not say."""
        answer = self._given.get(run, {}).get(client)
        return answer.examples if answer else 0

    def accepted_by(self, client: str) -> list[str]:
        """Returns the runs that a client accepted the last time that it was asked."""
        return [run for run in self._runs_of.get(client, ()) if self._given[run][client].accepted]

    def conduct(self, run: str, client: str) -> Conduct:
        """Returns how a client used its last tickets of a run."""
        return self._poor.get(run, {}).get(client, GOOD)

    def conducts(self, run: str) -> Mapping[str, Conduct]:
        """Returns the conduct of the clients that did not use theirs well, by client."""
        return self._poor.get(run, {})

    def set_aside(self, run: str) -> Sequence[str]:
        """Returns the clients that are set aside in a run, by id; not a copy."""
        return self._aside.get(run, ())

    def aside(self, run: str) -> int:
        """Returns how many clients are set aside in a run."""
        return len(self._aside.get(run, ()))

    def put_conducts(self, run: str, conducts: Mapping[str, Conduct]) -> None:
        """Takes how clients used their tickets, which is durable."""
        for client, conduct in conducts.items():
            if client not in self._given.get(run, {}):
                continue  # so it is not in the database either
            self._given[run][client] = replace(self._given[run][client], conduct=conduct)
            self._judge(run, client, conduct)

    def forget(self, run: str) -> None:
        """Forgets a run that was deleted."""
        for client in self._given.pop(run, {}):
            self._runs_of[client].discard(run)
            if not self._runs_of[client]:
                del self._runs_of[client]
        self._due.pop(run, None)
        self._asked.pop(run, None)
        self._declines.pop(run, None)
        self._poor.pop(run, None)
        self._aside.pop(run, None)

    def _judge(self, run: str, client: str, conduct: Conduct) -> None:
        if conduct == GOOD:
            self._poor[run].pop(client, None)
        else:
            self._poor[run][client] = conduct
        (_add if conduct.is_aside else _discard)(self._aside[run], client)

    def _keep(self, answer: AnswerRow) -> None:
        self._given[answer.run][answer.client] = answer
        self._runs_of[answer.client].add(answer.run)
        (_discard if answer.accepted else _add)(self._declines[answer.run], answer.client)


def _add(names: list[str], name: str) -> None:
    """Adds a name to a sorted list, if it is not in it."""
    place = bisect_left(names, name)
    if place == len(names) or names[place] != name:
        names.insert(place, name)


def _discard(names: list[str], name: str) -> None:
    """Removes a name from a sorted list, if it is in it."""
    place = bisect_left(names, name)
    if place < len(names) and names[place] == name:
        del names[place]

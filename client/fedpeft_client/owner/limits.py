"""Limits of the policy on work now: the hour, the charge, the temperature, the bytes of a day.

`forbidden` is pure; `Limits` looks at the clock, the sensors and the ledger, and waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar

from fedpeft.errors import RefusedByPolicy
from fedpeft.process.logs import Log
from fedpeft.process.race import first_of
from fedpeft_client.egress.last_day import DAY
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics, State
from fedpeft_client.owner.policy import Policy, TimeRules, opens_at
from fedpeft_client.owner.sensors import battery, temperatures
from fedpeft_client.timing import TIMING, Timing

SENSORS_AGAIN = timedelta(minutes=1)
"""Time until a battery or a sensor that forbade work is looked at again."""

T = TypeVar("T")


@dataclass(frozen=True)
class Conditions:
    """State of the machine.

    Attributes:
        now: Its local time.
        battery_percent: Charge, on battery power; None if it is plugged in or has no battery.
        temperature_c: Of the hottest sensor; None if there is none.
    """

    now: datetime
    battery_percent: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Forbidden:
    """Reason why nothing is done now, as a sentence for the server, and when to look again."""

    text: str
    until: datetime


def forbidden(policy: Policy, here: Conditions) -> Forbidden | None:
    """Returns why a policy allows no work under some conditions, if it does not."""
    rules = policy.times
    if rules.hours is not None and (opens := opens_at(rules.hours, here.now)) > here.now:
        return Forbidden("its owner allows no work at this hour", opens)
    least, hottest = rules.min_battery_percent, rules.max_temperature_c
    later = here.now + SENSORS_AGAIN
    if least is not None and here.battery_percent is not None and here.battery_percent < least:
        return Forbidden("its battery is below its owner's limit", later)
    if hottest is not None and here.temperature_c is not None and here.temperature_c > hottest:
        return Forbidden("it is hotter than its owner allows", later)
    return None


def conditions() -> Conditions:
    """Looks at this machine."""
    charge = battery()
    percent = None if charge is None or charge.plugged else charge.percent
    return Conditions(datetime.now(), percent, max(temperatures().values(), default=None))


class Limits:
    """A policy's limits on work now, asked before work is taken and while it is done.

    Args:
        policy: The policy.
        egress_log: Log of the bytes sent so far.
        metrics: Metrics that show waiting.
        log: Log for waiting.
        look: Returns the state of the machine.
        waits: True to wait for work that is not allowed now; else that ends it.
        timing: The client's.
    """

    def __init__(
        self,
        policy: Policy,
        egress_log: EgressLog,
        metrics: Metrics,
        log: Log,
        look: Callable[[], Conditions] = conditions,
        *,
        waits: bool = True,
        timing: Timing = TIMING,
    ) -> None:
        self._check_s = timing.limits_check_s
        self._policy = policy
        self._egress_log = egress_log
        self._metrics = metrics
        self._log = log
        self._look = look
        self._waits = waits

    def against(self, more_bytes: int = 0) -> Forbidden | None:
        """Returns why nothing may be done now, or not what would send `more_bytes`."""
        return self._forbidden() or self._over_budget(more_bytes)

    def _forbidden(self) -> Forbidden | None:
        return None if self._policy.times == TimeRules() else forbidden(self._policy, self._look())

    def _over_budget(self, more_bytes: int) -> Forbidden | None:
        most = self._policy.transfer.max_bytes_a_day
        if most is None or self._egress_log.day.left_since(datetime.now(UTC) - DAY) + more_bytes <= most:
            return None
        free = self._egress_log.day.falls_below(max(most - more_bytes, 0), datetime.now(UTC))
        return Forbidden("the bytes that its owner allows a day are used up", free.astimezone().replace(tzinfo=None))

    async def permit(self, more_bytes: int = 0) -> None:
        """Waits until work is allowed that would send so many bytes, and says so once.

        Raises:
            RefusedByPolicy: If it is not allowed now, and not to be waited for.
        """
        await self._rest(lambda: self.against(more_bytes))

    async def permit_upload(self, more_bytes: int) -> bool:
        """Waits until so many bytes may be sent, at whatever hour: the work is done; raises as `permit`.

        Returns:
            True if it had to wait.
        """
        return await self._rest(lambda: self._over_budget(more_bytes))

    async def _rest(self, against: Callable[[], Forbidden | None]) -> bool:
        said = ""
        while (stop := against()) is not None:
            if not self._waits:
                raise RefusedByPolicy(
                    f"{stop.text}; start it again after {stop.until:%Y-%m-%d %H:%M}, or without --once"
                )
            if stop.text != said:
                said = stop.text
                self._log.info("paused by the policy", reason=said, until=stop.until.isoformat(" ", "minutes"))
            with self._metrics.during(State.RESTING):
                await asyncio.sleep(self._check_s)
        if said:
            self._log.info("resumed")
        return bool(said)

    async def while_permitted(self, work: Coroutine[Any, Any, T]) -> T:
        """Does work; leaves it once the policy no longer allows it.

        Raises:
            RefusedByPolicy: If it was left.
        """
        return await first_of(work, self._watch())

    async def _watch(self) -> NoReturn:
        while True:
            if (stop := self._forbidden()) is not None:
                raise RefusedByPolicy(stop.text)
            await asyncio.sleep(self._check_s)

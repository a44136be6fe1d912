"""Battery and temperature sensors of this machine, as far as its system shows them."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Charge:
    """A battery: how full it is, and whether the machine is on mains power."""

    percent: float
    plugged: bool


def battery() -> Charge | None:
    """Returns the battery of this machine; None where there is none, or the system shows none."""
    found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if found is None else Charge(float(found.percent), bool(found.power_plugged))


def temperatures() -> dict[str, float]:
    """Returns the sensors of this machine by name, in degrees Celsius; none where the system shows none."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return {
        f"{chip}/{sensor.label or number}": float(sensor.current)
        for chip, several in sensors.items()
        for number, sensor in enumerate(several)
    }

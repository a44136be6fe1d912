"""Metrics of a client's machine, read whenever Prometheus asks.

The GPU is asked through NVIDIA's management library, which needs no CUDA context: the agent holds no GPU memory. What
is not there has no series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import psutil
import pynvml
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedpeft_client.owner.sensors import battery, temperatures

_TEXTS: Mapping[str, tuple[str, str]] = {
    "cpu_seconds": ("process", "CPU time of agent and worker."),
    "memory_bytes": ("process", "Resident memory of agent and worker."),
    "gpu_memory_used_bytes": ("", "GPU memory in use, by all processes."),
    "gpu_memory_total_bytes": ("", "GPU memory that there is."),
    "gpu_utilisation_ratio": ("", "Share of time in which the GPU worked, 0 to 1."),
    "gpu_temperature_celsius": ("", "Temperature of the GPU."),
    "gpu_power_watts": ("", "Power that the GPU draws."),
    "battery_percent": ("", "Charge of the battery."),
    "power_plugged": ("", "1 on mains power, 0 on battery."),
    "temperature_celsius": ("sensor", "What the sensors of this machine say."),
}
"""Label and explanation, by name."""

_GPU: Mapping[str, Callable[[object], float]] = {
    "gpu_memory_used_bytes": lambda device: pynvml.nvmlDeviceGetMemoryInfo(device).used,
    "gpu_memory_total_bytes": lambda device: pynvml.nvmlDeviceGetMemoryInfo(device).total,
    "gpu_utilisation_ratio": lambda device: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    "gpu_temperature_celsius": lambda device: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
    "gpu_power_watts": lambda device: pynvml.nvmlDeviceGetPowerUsage(device) / 1000,
}
"""Arguments of nvidia-smi."""

Values = Mapping[str, float]


class MachineCollector(Collector):
    """CPU and memory of the client's processes, GPU, battery, sensors.

    Args:
        gpu: Says which GPU it trains on, by NVIDIA's name of it; empty for none.
    """

    def __init__(self, gpu: Callable[[], str]) -> None:
        self._gpu = gpu
        self._own = psutil.Process()

    def describe(self) -> Iterable[Metric]:
        """Returns every metric that there may be, without a value."""
        return [_family(name, {}) for name in _TEXTS]

    def collect(self) -> Iterable[Metric]:
        """Returns those that there are, now."""
        found = {**self._processes(), **_gpu(self._gpu()), **_battery(), "temperature_celsius": temperatures()}
        return [_family(name, values) for name, values in found.items() if values]

    def _processes(self) -> dict[str, Values]:
        seconds, memory = {}, {}
        for name, several in (("agent", [self._own]), ("worker", self._own.children())):
            used = list(_usages(several))
            if used:
                seconds[name] = sum(cpu for cpu, _ in used)
                memory[name] = float(sum(resident for _, resident in used))
        return {"cpu_seconds": seconds, "memory_bytes": memory}


def _family(name: str, values: Values) -> Metric:
    """Returns a metric with its values by label; a metric without a label has the empty one."""
    label, text = _TEXTS[name]
    kind = CounterMetricFamily if name.endswith("_seconds") else GaugeMetricFamily
    family = kind(f"fedpeft_client_{name}", text, labels=[label] if label else [])
    for key, value in sorted(values.items()):
        family.add_metric([key] if label else [], value)
    return family


def _usages(processes: Iterable[psutil.Process]) -> Iterator[tuple[float, int]]:
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                yield times.user + times.system, process.memory_info().rss
        except psutil.Error:
            continue  # it has ended


def _battery() -> dict[str, Values]:
    if (charge := battery()) is None:
        return {}
    return {"battery_percent": {"": charge.percent}, "power_plugged": {"": float(charge.plugged)}}


def _gpu(identity: str) -> dict[str, Values]:
    found: dict[str, Values] = {}
    if not identity:
        return found
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return found  # the driver has no such library
    try:
        device = pynvml.nvmlDeviceGetHandleByUUID(identity)
        for name, ask in _GPU.items():
            try:
                found[name] = {"": float(ask(device))}
            except pynvml.NVMLError:
                continue  # this GPU does not tell
    except pynvml.NVMLError:
        return found  # a part of a GPU, which has another name
    finally:
        pynvml.nvmlShutdown()
    return found

"""What the machine of a client is like, looked up whenever Prometheus asks.

The GPU is asked through NVIDIA's management library, which needs no CUDA context: the agent holds no GPU memory. What
is not there has no series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import psutil
import pynvml
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedpeft_client.limits import temperatures


class MachineCollector(Collector):
    """CPU and memory of the client's processes, GPU, battery, sensors.

    Args:
        gpu: Identity of the GPU that it trains on, as CUDA gives it; empty for none.
    """

    def __init__(self, gpu: Callable[[], str]) -> None:
        self._gpu = gpu
        self._own = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        """Returns what there is to say now."""
        yield from self._processes()
        yield from _gpu(self._gpu())
        yield from _battery()
        if found := temperatures():
            heat = GaugeMetricFamily(
                "fedpeft_client_temperature_celsius", "Sensors of this machine.", labels=["sensor"]
            )
            for name, value in sorted(found.items()):
                heat.add_metric([name], value)
            yield heat

    def _processes(self) -> Iterator[Metric]:
        seconds = CounterMetricFamily("fedpeft_client_cpu_seconds", "CPU time of agent and worker.", labels=["process"])
        memory = GaugeMetricFamily(
            "fedpeft_client_memory_bytes", "Resident memory of agent and worker.", labels=["process"]
        )
        workers = self._own.children()
        for name, several in (("agent", [self._own]), ("worker", workers)):
            used = [both for process in several if (both := _usage(process))]
            if used:
                seconds.add_metric([name], sum(cpu for cpu, _ in used))
                memory.add_metric([name], sum(resident for _, resident in used))
        yield seconds
        yield memory


def _usage(process: psutil.Process) -> tuple[float, int] | None:
    try:
        with process.oneshot():
            times = process.cpu_times()
            return times.user + times.system, process.memory_info().rss
    except psutil.Error:
        return None  # it has ended


def _battery() -> Iterator[Metric]:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None:
        yield GaugeMetricFamily("fedpeft_client_battery_percent", "Charge of the battery.", value=battery.percent)
        plugged = float(bool(battery.power_plugged))
        yield GaugeMetricFamily("fedpeft_client_power_plugged", "1 on mains power, 0 on battery.", value=plugged)


def _gpu(identity: str) -> Iterator[Metric]:
    if not identity:
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return  # the driver has no such library
    try:
        device = pynvml.nvmlDeviceGetHandleByUUID(identity)
        for name, text, look in _GPU:
            try:
                yield GaugeMetricFamily(f"fedpeft_client_gpu_{name}", text, value=float(look(device)))
            except pynvml.NVMLError:
                continue  # this GPU does not tell
    except pynvml.NVMLError:
        return
    finally:
        pynvml.nvmlShutdown()


_GPU: tuple[tuple[str, str, Callable[[object], float]], ...] = (
    (
        "memory_used_bytes",
        "GPU memory in use, of all processes.",
        lambda device: pynvml.nvmlDeviceGetMemoryInfo(device).used,
    ),
    ("memory_total_bytes", "GPU memory.", lambda device: pynvml.nvmlDeviceGetMemoryInfo(device).total),
    (
        "utilisation_ratio",
        "Share of time in which the GPU worked, 0 to 1.",
        lambda device: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    ),
    (
        "temperature_celsius",
        "Temperature of the GPU.",
        lambda device: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
    ),
    ("power_watts", "Power that the GPU draws.", lambda device: pynvml.nvmlDeviceGetPowerUsage(device) / 1000),
)
"""Name, explanation, and how to ask for it."""

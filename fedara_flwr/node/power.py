"""What a process of a device takes, what the device uses and how warm it gets, as far as it tells. No torch."""

from __future__ import annotations

import logging
import resource
from functools import lru_cache
from typing import Any

import psutil

from fedara_flwr.node.busy import COLDEST, WARMEST

logger = logging.getLogger(__name__)
ENERGY_WINDOW = "training"


def peak_memory() -> float:
    """The most memory that this process has had so far, resident, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@lru_cache(maxsize=1)
def _monitor() -> Any:
    """Zeus's monitor of this machine (extra `energy`); None where it is not installed or finds nothing to read."""
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None
    try:
        monitor = ZeusMonitor(approx_instant_energy=True)
    except Exception as error:  # drivers, permissions
        _warn(error)
        return None
    return monitor if monitor.gpu_indices or monitor.cpu_indices or monitor.soc_is_present else None


def _warn(error: Exception) -> None:
    """Say why energy is not measured; the round goes on without the figure."""
    logger.warning("energy is not measured (%s: %s)", type(error).__name__, error)


class PowerMeter:
    """Measures the energy used between its making and `read`; one at a time in a process."""

    def __init__(self) -> None:
        self._monitor = _monitor()
        if self._monitor is not None:
            try:
                self._monitor.begin_window(ENERGY_WINDOW, restart=True)
            except Exception as error:
                _warn(error)
                self._monitor = None

    def read(self) -> dict[str, float]:
        """Metrics: `joules` since the start, of the whole board on a Jetson, else of GPUs, CPU packages and memory, whoever
        used them; `temperature` of the warmest sensor, °C.
        """
        metrics = {}
        if self._monitor is not None:
            try:
                if (joules := _joules(self._monitor.end_window(ENERGY_WINDOW))) is not None:
                    metrics["joules"] = joules
            except Exception as error:
                _warn(error)
        sensors: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()  # Linux and FreeBSD have it
        readings = (sensor.current for group in sensors.values() for sensor in group)
        if warm := [reading for reading in readings if reading and COLDEST <= reading <= WARMEST]:  # 0, -274: switched off
            metrics["temperature"] = float(max(warm))
        return metrics


def _joules(measured: Any) -> float | None:
    """The sum of one zeus Measurement; None where it holds no figure."""
    board = getattr(measured.soc_energy, "total_energy_mj", None)
    if board is not None:
        return float(board) / 1000
    groups = (measured.gpu_energy, measured.cpu_energy, measured.dram_energy)
    parts = [value for group in groups for value in (group or {}).values()]
    return float(sum(parts)) if parts else None

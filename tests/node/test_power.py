"""Energy and temperature of a device, with a stand-in for zeus: this machine has no meter."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from fedara_flwr.node import power


class Monitor:
    """What zeus.monitor.ZeusMonitor shows of itself."""

    gpu_indices, cpu_indices, soc_is_present = [0], [], False

    def __init__(self, **options):
        self.windows = []

    def begin_window(self, key, restart):
        self.windows.append(key)

    def end_window(self, key):
        self.windows.remove(key)
        return measured(gpu_energy={0: 12.5, 1: 2.5}, cpu_energy={0: 4.0})


def measured(**values):
    return SimpleNamespace(**{"gpu_energy": {}, "cpu_energy": None, "dram_energy": None, "soc_energy": None} | values)


@pytest.fixture
def zeus(monkeypatch):
    """Installs a monitor; nothing of it stays."""

    def install(monitor):
        module = ModuleType("zeus.monitor")
        module.ZeusMonitor = monitor
        monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
        monkeypatch.setitem(sys.modules, "zeus.monitor", module)

    power._monitor.cache_clear()
    yield install
    power._monitor.cache_clear()


def test_energy_is_that_of_all_that_is_measured(zeus):
    zeus(Monitor)
    assert power.PowerMeter().read()["joules"] == 19.0
    assert power.PowerMeter().read()["joules"] == 19.0  # the monitor is made once, its window ends


def test_a_board_s_own_total_holds_all_of_it():
    board = SimpleNamespace(total_energy_mj=7500.0, gpu_energy_mj=3000.0)
    assert power._joules(measured(gpu_energy={0: 3.0}, soc_energy=board)) == 7.5
    assert power._joules(measured(cpu_energy={0: 1.0}, dram_energy={0: 0.5}, soc_energy=SimpleNamespace())) == 1.5
    assert power._joules(measured()) is None


@pytest.mark.parametrize("broken", ["__init__", "begin_window", "end_window"])
def test_a_broken_meter_costs_only_its_figure(zeus, broken, caplog):
    def fail(self, *words, **options):
        raise PermissionError("RAPL")

    zeus(type("Broken", (Monitor,), {broken: fail}))
    assert "joules" not in power.PowerMeter().read()
    assert "energy is not measured (PermissionError: RAPL)" in caplog.text


def test_nothing_to_measure_and_nothing_installed(zeus, monkeypatch):
    zeus(type("Blind", (Monitor,), {"gpu_indices": []}))
    assert "joules" not in power.PowerMeter().read()
    power._monitor.cache_clear()
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    assert "joules" not in power.PowerMeter().read()


def test_the_warmest_sensor(monkeypatch):
    sensors = {"cpu": [SimpleNamespace(current=51.0), SimpleNamespace(current=48.5)], "gpu": [SimpleNamespace(current=62.5)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    assert power.PowerMeter().read()["temperature"] == 62.5
    for nothing in ({}, {"off": [SimpleNamespace(current=reading) for reading in (0.0, -274.0, None)]}):
        monkeypatch.setattr(psutil, "sensors_temperatures", lambda told=nothing: told, raising=False)
        assert "temperature" not in power.PowerMeter().read()

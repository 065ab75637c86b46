"""`fedara-busy`, by made-up files of a kernel and stand-ins for programs of Termux and NetworkManager."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedara_flwr.cli.deploy import own
from fedara_flwr.node import busy
from fedara_flwr.node.settings import NodeSettings

PHONE = {"present": True, "percentage": 80, "plugged": "PLUGGED_AC", "status": "CHARGING", "temperature": 31.4}
WIFI = {"ip": "192.168.1.7", "ssid": "<unknown ssid>", "supplicant_state": "COMPLETED"}


class Machine:
    """A kernel's files in a folder, and programs that are in PATH alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "bin"
        for name in ("bin", "power_supply", "thermal", "hwmon"):
            (folder / name).mkdir()
        for name in ("sh", "env", "sleep"):
            (self.programs / name).symlink_to(shutil.which(name))

    def files(self, place: str, **contents: str | bytes) -> None:
        where = self.folder / place
        where.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (where / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def battery(self, name: str = "BAT0", **contents: str | bytes) -> None:
        self.files(f"power_supply/{name}", **{"type": "Battery\n"} | contents)

    def mains(self, online: str, name: str = "AC", kind: str = "Mains") -> None:
        self.files(f"power_supply/{name}", type=kind, online=online)

    def zone(self, number: int, temp: str | bytes, kind: str | bytes = "cpu-thermal\n") -> None:
        self.files(f"thermal/thermal_zone{number}", type=kind, temp=temp)

    def program(self, name: str, script: str) -> None:
        file = self.programs / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def says(self, name: str, what: object) -> None:
        (self.folder / f"{name}.txt").write_text(what if isinstance(what, str) else json.dumps(what))
        self.program(name, f'while IFS= read -r line || [ -n "$line" ]; do echo "$line"; done <{self.folder}/{name}.txt')


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(tmp_path)
    for name in ("power_supply", "thermal", "hwmon"):
        constant = "POWER" if name == "power_supply" else name.upper()
        monkeypatch.setattr(busy, constant, tmp_path / name)
    monkeypatch.setenv("PATH", str(made.programs))
    return made


@pytest.fixture
def check(machine, capsys):
    """(exit code, the line) of a command line."""

    def call(words: str) -> tuple[int, str]:
        code = busy.main(words.split())
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        return code, said.strip()

    return call


# -- the kernel's files ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "busy_at_30", "said"),
    [
        ({"capacity": "29\n"}, 0, "battery at 29 %"),
        ({"capacity": "30\n"}, 1, "free: battery at 30 %"),
        ({"capacity": "0"}, 0, "battery at 0 %"),
        ({"capacity": "104"}, 1, "free: battery at 100 %"),
        ({"energy_now": "12000000", "energy_full": "48000000"}, 0, "battery at 25 %"),
        ({"capacity": "", "charge_now": "3000000", "charge_full": "4000000"}, 1, "free: battery at 75 %"),
        ({"capacity": "255", "charge_now": "3000000", "charge_full": "0"}, 0, "does not tell its charge"),
        ({"capacity": "-1"}, 0, "does not tell its charge"),
        ({"capacity": "Unknown"}, 0, "does not tell its charge"),
        ({"capacity": b"\xff\xfe"}, 0, "does not tell its charge"),
        ({"capacity": "9" * 5000}, 0, "does not tell its charge"),
        ({}, 0, "--battery-below cannot be checked: the battery does not tell its charge"),
    ],
)
def test_a_battery_s_charge(machine, check, files, busy_at_30, said):
    machine.battery(**files)
    code, line = check("--battery-below 30")
    assert code == busy_at_30 and said in line


def test_several_batteries_count_by_their_mean(machine, check):
    machine.battery("BAT0", capacity="5", status="Discharging")
    machine.battery("BAT1", capacity="95", status="Unknown")
    assert check("--battery-below 50") == (1, "free: battery at 50 %")
    assert check("--battery-below 51") == (0, "battery at 50 %")
    machine.battery("BAT1", capacity="")
    assert check("--battery-below 30")[0] == 0


def test_what_is_no_battery_of_the_device(machine, check):
    """A mouse's, an empty bay, a charger; none at all is no "free"."""
    nothing = (0, f"the battery cannot be checked: no battery in {machine.folder}/power_supply")
    assert check("--battery-below 30") == check("--discharging") == nothing
    machine.battery("mouse", scope="Device\n", capacity="3", status="Discharging")
    machine.battery("BAT1", present="0\n", capacity="0", status="Unknown")
    machine.mains("1\n")
    assert check("--battery-below 30") == check("--discharging") == nothing
    machine.battery("BAT0", capacity="90", status="Charging")
    assert check("--battery-below 30 --discharging") == (1, "free: battery at 90 %; battery charging")
    shutil.rmtree(machine.folder / "power_supply")
    assert check("--discharging") == nothing


@pytest.mark.parametrize(
    ("statuses", "mains", "code", "said"),
    [
        (["Discharging\n"], None, 0, "battery discharging"),
        (["Discharging"], "1", 0, "battery discharging"),  # a charger too weak
        (["Charging"], "0", 1, "free: battery charging"),
        (["Full"], None, 1, "free: battery full"),
        (["Not charging"], None, 1, "free: battery not charging"),
        (["Full"], "0", 0, "not plugged in"),
        (["Not charging"], "1", 1, "free: plugged in"),
        (["Unknown"], "1", 1, "free: plugged in"),
        (["Unknown"], "2", 1, "free: plugged in"),
        (["Unknown"], "0", 0, "not plugged in"),
        (["Unknown"], None, 0, "--discharging cannot be checked: the battery's status is 'unknown'"),
        (["Unknown"], "", 0, "--discharging cannot be checked: the battery's status is 'unknown'"),
        ([""], None, 0, "--discharging cannot be checked: the battery's status is 'not told'"),
        ([b"\xff"], None, 0, "--discharging cannot be checked: the battery's status is '\ufffd'"),
        (["Unknown", "Discharging"], None, 0, "battery discharging"),
        (["Not charging", "Charging"], "1", 1, "free: battery charging"),
        (["Full", "Unknown"], None, 0, "--discharging cannot be checked: the battery's status is 'unknown'"),
    ],
)
def test_whether_it_lives_on_its_battery(machine, check, statuses, mains, code, said):
    for number, status in enumerate(statuses):
        machine.battery(f"BAT{number}", status=status)
    if mains is not None:
        machine.mains(mains)
    assert check("--discharging") == (code, said)


def test_one_of_several_supplies_is_enough(machine, check):
    machine.battery(status="Unknown")
    machine.mains("0")
    machine.mains("1", "usb", "USB_C")
    assert check("--discharging") == (1, "free: plugged in")


@pytest.mark.parametrize(
    ("temp", "code", "said"),
    [
        ("421\n", 0, "battery at 42.1 °C"),
        ("400", 1, "free: battery at 40.0 °C"),
        ("-50", 1, "free: battery at -5.0 °C"),
        ("-2740", 0, "the battery does not tell its temperature"),
        ("0", 0, "the battery does not tell its temperature"),
        ("", 0, "the battery does not tell its temperature"),
    ],
)
def test_a_battery_s_own_temperature(machine, check, temp, code, said):
    machine.battery(temp=temp)
    got, line = check("--battery-hotter-than 40")
    assert got == code and line.endswith(said)


@pytest.mark.parametrize(
    ("temp", "celsius"),
    [
        ("45500\n", 45.5),
        ("-5000", -5.0),
        ("1000", 1.0),
        ("45", 45.0),  # whole degrees
        ("-7", -7.0),
        ("455", 45.5),  # tenths
        ("149000", 149.0),
    ],
)
def test_units_of_a_sensor(machine, temp, celsius):
    machine.zone(0, temp)
    assert list(busy.sensors()) == [("cpu-thermal", celsius)]


@pytest.mark.parametrize(
    "temp", ["0", "0\n", "-274000", "-273150", "255000", "2147483647", "", "hot", "45.5.5", b"\xff\xfe", "1e4"]
)
def test_a_sensor_that_does_not_measure(machine, check, temp):
    machine.zone(0, temp)
    assert check("--hotter-than 80") == (0, "--hotter-than cannot be checked: no sensor shows a temperature")
    machine.zone(1, "50000", "gpu")
    assert check("--hotter-than 80") == (1, "free: gpu at 50.0 °C")


def test_the_warmest_sensor_counts_of_those_that_are_named(machine, check):
    machine.zone(0, "61000", "cpu-0\n")
    machine.zone(1, "72500", "cpu-1\n")
    machine.zone(2, "85000", b"soc \xff\n")
    machine.files(
        "hwmon/hwmon3", name="k10temp\n", temp1_input="79900\n", temp1_label="Tctl\n", temp2_input="", fan1_input="1200"
    )
    assert check("--hotter-than 80") == (0, "soc \ufffd at 85.0 °C")
    assert check("--hotter-than 85") == (1, "free: soc \ufffd at 85.0 °C")
    assert check("--hotter-than 80 --sensor cpu-*") == (1, "free: cpu-1 at 72.5 °C")
    assert check("--hotter-than 70 --sensor cpu-0 --sensor k10*") == (0, "k10temp Tctl at 79.9 °C")
    names = "cpu-0, cpu-1, k10temp Tctl, soc \ufffd"
    assert check("--hotter-than 80 --sensor gpu") == (
        0,
        f"--hotter-than cannot be checked: no sensor is named so; there are {names}",
    )


@given(st.binary(max_size=30))
def test_no_file_breaks_a_sensor(content):
    """Whatever stands there is a temperature that a device can have, or nothing."""
    value = busy._number(" ".join(content.decode(errors="replace").split()))
    assert value is None or abs(value) < 10**18


@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_a_reading_is_one_that_a_device_can_have(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("thermal")
    zone = folder / "thermal_zone0"
    zone.mkdir()
    (zone / "temp").write_text(f"{value}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(busy, "THERMAL", folder)
        patch.setattr(busy, "HWMON", folder / "none")
        read = list(busy.sensors())
    assert all(busy.COLDEST <= celsius <= busy.WARMEST and name == "thermal_zone0" for name, celsius in read)
    assert bool(read) == (value != 0 and any(busy.COLDEST <= value / unit <= busy.WARMEST for unit in units(value)))
    shutil.rmtree(folder)


def units(value: int) -> list[int]:
    return [1] if abs(value) <= 150 else [10] if abs(value) < 1000 else [1000]


# -- Termux ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words", "code", "said"),
    [
        (
            {},
            "--battery-below 30 --discharging --battery-hotter-than 40",
            1,
            "free: battery at 80 %; battery charging; battery at 31.4 °C",
        ),
        ({"percentage": 29}, "--battery-below 30", 0, "battery at 29 %"),
        ({"percentage": None, "level": 10, "scale": 50}, "--battery-below 30", 0, "battery at 20 %"),
        ({"percentage": None}, "--battery-below 30", 0, "does not tell its charge"),
        ({"percentage": "80"}, "--battery-below 30", 0, "does not tell its charge"),
        ({"percentage": float("nan")}, "--battery-below 30", 0, "does not tell its charge"),
        ({"percentage": True}, "--battery-below 30", 0, "does not tell its charge"),
        ({"percentage": -1, "level": -1, "scale": -1}, "--battery-below 30", 0, "does not tell its charge"),
        ({"percentage": None, "level": 50, "scale": 0}, "--battery-below 30", 0, "does not tell its charge"),
        ({"status": "DISCHARGING", "plugged": "UNPLUGGED"}, "--discharging", 0, "battery discharging"),
        ({"status": "FULL", "plugged": "PLUGGED_WIRELESS"}, "--discharging", 1, "free: plugged in"),
        ({"status": "NOT_CHARGING", "plugged": "UNPLUGGED"}, "--discharging", 0, "not plugged in"),
        ({"status": "UNKNOWN", "plugged": "PLUGGED_8"}, "--discharging", 1, "free: plugged in"),
        ({"status": "UNKNOWN", "plugged": "PLUGGED_-1"}, "--discharging", 0, "the battery's status is 'unknown'"),
        ({"status": None, "plugged": None}, "--discharging", 0, "the battery's status is 'none'"),
        ({"temperature": 42.1}, "--battery-hotter-than 42", 0, "battery at 42.1 °C"),
        ({"temperature": -8}, "--battery-hotter-than 42", 1, "free: battery at -8.0 °C"),
        ({"temperature": -214748364.8}, "--battery-hotter-than 42", 0, "does not tell its temperature"),
        ({"temperature": float("inf")}, "--battery-hotter-than 42", 0, "does not tell its temperature"),
        ({"present": False}, "--discharging", 0, "termux-battery-status knows of no battery"),
    ],
)
def test_a_phone_s_battery(machine, check, changes, words, code, said):
    machine.battery(capacity="1", status="Discharging")  # not looked at
    machine.says("termux-battery-status", PHONE | changes)
    got, line = check(words)
    assert got == code and line.endswith(said)


@pytest.mark.parametrize("said", ["", "{", "[]", "null", "[" * 100_000, '"' + "\ufffd" * 10, "12"])
def test_an_answer_that_is_none(machine, check, said):
    machine.says("termux-battery-status", said)
    assert check("--discharging") == (0, "the battery cannot be checked: termux-battery-status gives no JSON object")


def test_programs_that_fail(machine, check, monkeypatch):
    """The one of Termux hangs where its app is not installed; warnings of the linker stand beside its answer."""
    machine.program("termux-battery-status", "exit 3")
    assert check("--discharging") == (0, "the battery cannot be checked: termux-battery-status failed with exit code 3")
    machine.program("termux-battery-status", "sleep 60 & sleep 60")
    monkeypatch.setattr(busy, "ANSWER_SECONDS", 0.3)
    began = time.monotonic()
    hung = "the battery cannot be checked: termux-battery-status did not answer in 0.3 s (is the app Termux:API installed?)"
    assert check("--discharging --battery-below 30 --battery-hotter-than 40") == (0, hung)
    assert time.monotonic() - began < 3  # asked once
    monkeypatch.setattr(busy, "ANSWER_SECONDS", 10.0)
    machine.program("termux-battery-status", f"echo 'WARNING: linker' >&2; echo '{json.dumps(PHONE)}'")
    assert check("--discharging") == (1, "free: battery charging")


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (WIFI, 1, "free: Wi-Fi"),
        (WIFI | {"supplicant_state": "DISCONNECTED"}, 0, "no Wi-Fi"),
        (WIFI | {"supplicant_state": "ASSOCIATING"}, 0, "no Wi-Fi"),
        ({"API_ERROR": "No current connection"}, 0, "termux-wifi-connectioninfo does not tell whether Wi-Fi is connected"),
        ("", 0, "termux-wifi-connectioninfo gives no JSON object"),
    ],
)
def test_a_phone_s_network(machine, check, said, code, words):
    machine.says("termux-wifi-connectioninfo", said)
    got, line = check("--metered")
    assert got == code and line.endswith(words)


# -- NetworkManager ----------------------------------------------------------------------------------------------------------
def devices(*states: tuple[str, str, str]) -> str:
    return "\n\n".join(
        f"GENERAL.DEVICE:{name}\nGENERAL.STATE:{state}\nGENERAL.METERED:{metered}" for name, state, metered in states
    )


LO, ON, OFF = ("lo", "100 (connected (externally))", "unknown"), "100 (connected)", "30 (disconnected)"


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (devices(LO, ("wlan0", ON, "no (guessed)"), ("eth0", OFF, "yes")), 1, "free: wlan0 is not metered"),
        (devices(LO, ("wlan0", ON, "yes (guessed)")), 0, "wlan0 is metered"),
        (devices(("eth0", ON, "no"), ("wwan0", ON, "yes"), LO), 0, "wwan0 is metered"),
        (devices(("eth0", ON, "unknown"), LO), 0, "NetworkManager does not say whether a connected device is metered"),
        (devices(("eth0", OFF, "no"), LO), 0, "NetworkManager does not say whether a connected device is metered"),
        (devices(("lo", ON, "no")), 0, "NetworkManager does not say whether a connected device is metered"),
        ("", 0, "NetworkManager does not say whether a connected device is metered"),
    ],
)
def test_a_network_by_networkmanager(machine, check, said, code, words):
    machine.says("nmcli", said)
    got, line = check("--metered")
    assert got == code and line.endswith(words)


def test_no_networkmanager_or_one_that_is_down(machine, check):
    none = "--metered cannot be checked: neither nmcli (NetworkManager) nor termux-wifi-connectioninfo is here"
    assert check("--metered") == (0, none)
    machine.program("nmcli", "echo 'Error: NetworkManager is not running.'; exit 8")
    assert check("--metered") == (0, "--metered cannot be checked: nmcli failed with exit code 8")
    machine.program("nmcli", '[ "$LC_ALL" = C ] && echo "GENERAL.DEVICE:w\nGENERAL.STATE:100\nGENERAL.METERED:no"')
    assert check("--metered") == (1, "free: w is not metered")


# -- the program -------------------------------------------------------------------------------------------------------------
def test_all_reasons_are_told(machine, check):
    machine.says("termux-battery-status", PHONE | {"percentage": 12, "temperature": 44})
    machine.zone(0, "90000")
    words = "--battery-below 30 --discharging --battery-hotter-than 42 --hotter-than 80 --metered"
    none = "--metered cannot be checked: neither nmcli (NetworkManager) nor termux-wifi-connectioninfo is here"
    assert check(words) == (0, f"battery at 12 %; battery at 44.0 °C; cpu-thermal at 90.0 °C; {none}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name at least one check: --help lists them"),
        ("--battery-below nan", "argument --battery-below: nan: allowed is 1 to 100"),
        ("--battery-below 0", "argument --battery-below: 0: allowed is 1 to 100"),
        ("--hotter-than 80000", "argument --hotter-than: 80000: allowed is 1 to 150"),
        ("--hotter-than warm", "argument --hotter-than: invalid number value: 'warm'"),
        ("--sensor cpu --metered", "--sensor needs --hotter-than"),
        ("--discharge", "unrecognized arguments: --discharge"),
    ],
)
def test_a_wrong_command_line_is_neither_busy_nor_free(machine, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        busy.main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fedara-busy: {said}\n"


def test_a_fault_of_its_own_is_not_free(machine, check, monkeypatch):
    monkeypatch.setattr(busy, "sensors", lambda: 1 / 0)
    assert check("--hotter-than 80") == (2, "fedara-busy failed (ZeroDivisionError: division by zero)")


def test_as_a_node_runs_it(machine, tmp_path):
    """The reason is what the server is shown; no torch and nothing else of the package is loaded."""
    package = Path(busy.__file__).parents[2]
    script = tmp_path / "bin" / "fedara-busy"
    path = f"import sys; sys.path.insert(0, {str(package)!r})"
    script.write_text(f"#!{sys.executable}\n{path}\nfrom fedara_flwr.node.busy import main\nsys.exit(main())\n")
    script.chmod(0o755)
    machine.says("termux-battery-status", PHONE | {"percentage": 12})
    assert NodeSettings.read({"busy-when": "fedara-busy --battery-below 30"}).busy() == "battery at 12 %"
    assert NodeSettings.read({"busy-when": "fedara-busy --battery-below 10"}).busy() == ""
    wrong = NodeSettings.read({"busy-when": "fedara-busy --battery"}).busy()
    assert wrong == "busy-when failed with exit code 2: fedara-busy: unrecognized arguments: --battery"
    code = "import sys, fedara_flwr.node.busy; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'flwr', 'pydantic')))"
    env = os.environ | {"PYTHONPATH": str(package)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


@pytest.mark.parametrize(
    ("command", "level", "found"),
    [
        ("", "ok", "none: the node trains whenever it is asked"),
        ("sh -c 'exit 1'", "ok", "free, by sh -c 'exit 1'"),
        ("sh -c 'echo hot'", "warning", "busy: hot"),
        ("sh -c 'exit 3'", "problem", "busy-when failed with exit code 3: "),
        ("sh -c 'echo --metered cannot be checked: no'", "problem", "--metered cannot be checked: no"),
    ],
)
def test_what_deploy_check_says_of_it(command, level, found):
    finding = own.busy_when(NodeSettings.read({"busy-when": command}))
    assert (finding.level, finding.found, bool(finding.advice)) == (level, found, level != "ok")

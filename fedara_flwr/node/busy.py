"""`fedara-busy`: is the battery low or hot, the machine hot, the network metered? For node-config `busy-when`: docs/phone.md.

Exit code 0 means busy, with the reasons in one line; 1 free, with what was read; 2 that the command line is wrong. A check
that is asked for and cannot be read is a reason, too. The standard library alone: it is started before every round.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from fedara_flwr.node.command import ask

POWER, THERMAL, HWMON = (Path("/sys/class") / name for name in ("power_supply", "thermal", "hwmon"))
FILE_BYTES, ANSWER_BYTES = 4096, 1 << 20  # that are read of a file, of a program's answer
ANSWER_SECONDS = 4.0  # for a program; two of them have to end before busy-when's own limit
COLDEST, WARMEST = -40.0, 150.0  # °C that a sensor of a device may show; others are not measured


class Unreadable(Exception):
    """Something that was asked for cannot be read here; says why."""


@dataclass(frozen=True)
class Battery:
    """What one battery tells.

    Attributes:
        percent: charge, 0 to 100; None where it is not told.
        status: the kernel's word in small letters: "charging", "discharging", "full", "not charging", "unknown", …
        celsius: its own temperature; None where it is not told.
    """

    percent: float | None
    status: str
    celsius: float | None


@dataclass(frozen=True)
class Power:
    """The device's own batteries, at least one, and whether it hangs on external power; None where nothing tells that."""

    batteries: tuple[Battery, ...]
    plugged: bool | None


# -- what the system tells -------------------------------------------------------------------------------------------------
def _text(path: Path) -> str:
    """What stands in a small file, on one line; '' where it cannot be read."""
    try:
        with path.open("rb") as file:
            return " ".join(file.read(FILE_BYTES).decode(errors="replace").split())
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None


def _celsius(value: float) -> float | None:
    """A temperature; an exact 0, and what no device has (-274), come from sensors that are off."""
    return value if value and COLDEST <= value <= WARMEST else None


def _percent(value: Any) -> float | None:
    """A charge; some batteries go a little beyond their 100."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return min(float(value), 100.0) if number and 0 <= value <= 110 else None


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _charge(battery: Path) -> float | None:
    if (percent := _percent(_number(_text(battery / "capacity")))) is not None:
        return percent
    for kind in ("energy", "charge"):
        now, full = (_number(_text(battery / f"{kind}_{what}")) for what in ("now", "full"))
        if now is not None and full:
            return _percent(100 * now / full)
    return None


def _linux_power() -> Power:
    """What the kernel tells in /sys/class/power_supply; batteries of mice and the like are none of the device's."""
    batteries, mains = [], []
    for supply in _entries(POWER, "*"):
        kind = _text(supply / "type")
        if _text(supply / "scope") == "Device":
            continue
        if kind in ("Battery", "UPS"):
            if _text(supply / "present") != "0":
                tenths = _number(_text(supply / "temp"))
                celsius = None if tenths is None else _celsius(tenths / 10)
                batteries.append(Battery(_charge(supply), _text(supply / "status").lower(), celsius))
        elif (online := _number(_text(supply / "online"))) is not None:
            mains.append(online > 0)
    if not batteries:
        raise Unreadable(f"no battery in {POWER}")
    return Power(tuple(batteries), any(mains) if mains else None)


def _answer(program: str, *words: str) -> str:
    """What a program writes to standard output, in the C locale.

    Raises:
        Unreadable: it fails, or does not answer in time.
    """
    try:
        code, text = ask(("env", "LC_ALL=C", program, *words), ANSWER_SECONDS, ANSWER_BYTES, errors=False)
    except subprocess.TimeoutExpired:
        advice = " (is the app Termux:API installed?)" if program.startswith("termux-") else ""
        raise Unreadable(f"{program} did not answer in {ANSWER_SECONDS:g} s{advice}") from None
    if code:
        raise Unreadable(f"{program} failed with exit code {code}")
    return text


def _termux(program: str) -> dict[str, Any]:
    """The answer of one of Termux:API's programs, a JSON object."""
    try:
        answer = json.loads(_answer(program))
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Unreadable(f"{program} gives no JSON object")
    return answer


def _termux_power() -> Power:
    said = _termux("termux-battery-status")
    if said.get("present") is False:
        raise Unreadable("termux-battery-status knows of no battery")
    percent = _percent(said.get("percentage"))
    if percent is None:  # left out at 0 %
        level, scale = (_percent(said.get(name)) for name in ("level", "scale"))
        percent = _percent(100 * level / scale) if level is not None and scale else None
    warm = said.get("temperature")
    celsius = _celsius(float(warm)) if isinstance(warm, int | float) and not isinstance(warm, bool) else None
    plugged = str(said.get("plugged"))
    on_power = True if re.fullmatch(r"PLUGGED_([A-Z]+|[1-9]\d*)", plugged) else False if plugged == "UNPLUGGED" else None
    return Power((Battery(percent, str(said.get("status")).lower().replace("_", " "), celsius),), on_power)


def power() -> Power:
    """The device's batteries, by Termux where that is here (Android shows apps no /sys/class/power_supply).

    Raises:
        Unreadable: there is no battery, or nothing tells of one.
    """
    return _termux_power() if shutil.which("termux-battery-status") else _linux_power()


def sensors() -> Iterator[tuple[str, float]]:
    """Name and °C of each sensor that shows a temperature.

    The kernel's unit is a thousandth of a degree; some vendors' zones have whole degrees or tenths, which the size tells.
    """
    files = [(_text(zone / "type") or zone.name, zone / "temp") for zone in _entries(THERMAL, "thermal_zone*")]
    for file in _entries(HWMON, "hwmon*/temp*_input"):
        label = _text(file.with_name(file.name.replace("_input", "_label")))
        files.append((f"{_text(file.with_name('name')) or file.parent.name} {label}".strip(), file))
    for name, file in files:
        value = _number(_text(file))
        if value is not None:
            unit = 1 if abs(value) <= WARMEST else 10 if abs(value) < 1000 else 1000
            if (celsius := _celsius(value / unit)) is not None:
                yield name, celsius


# -- the checks: (is it so?, what was read) ----------------------------------------------------------------------------------
Found = tuple[bool, str]


def battery_below(found: Power, percent: float) -> Found:
    """Whether the battery, the mean of several, has less charge than `percent`."""
    charges = [battery.percent for battery in found.batteries]
    known = [charge for charge in charges if charge is not None]
    if len(known) < len(charges):
        raise Unreadable("the battery does not tell its charge")
    charge = sum(known) / len(known)
    return charge < percent, f"battery at {charge:.0f} %"


def discharging(found: Power) -> Found:
    """Whether the device lives on its battery: one discharges, or nothing is plugged in and none is charging."""
    statuses = [battery.status for battery in found.batteries]
    for status in ("discharging", "charging"):
        if status in statuses:
            return status == "discharging", f"battery {status}"
    if found.plugged is not None:
        return not found.plugged, "plugged in" if found.plugged else "not plugged in"
    for status in statuses:
        if status not in ("full", "not charging"):
            raise Unreadable(f"the battery's status is {status or 'not told'!r}")
    return False, f"battery {statuses[0]}"


def battery_hotter_than(found: Power, celsius: float) -> Found:
    """Whether the warmest battery is warmer than `celsius`."""
    warm = [battery.celsius for battery in found.batteries if battery.celsius is not None]
    if not warm:
        raise Unreadable("the battery does not tell its temperature")
    return max(warm) > celsius, f"battery at {max(warm):.1f} °C"


def hotter_than(celsius: float, patterns: Sequence[str]) -> Found:
    """Whether the warmest of the sensors whose names match one of `patterns`, of all without any, is warmer than `celsius`."""
    known = list(sensors())
    asked = [sensor for sensor in known if not patterns or any(fnmatchcase(sensor[0], pattern) for pattern in patterns)]
    if not asked:
        names = ", ".join(sorted({name for name, _ in known}))
        raise Unreadable(f"no sensor is named so; there are {names}" if known else "no sensor shows a temperature")
    name, warmest = max(asked, key=lambda sensor: sensor[1])
    return warmest > celsius, f"{name} at {warmest:.1f} °C"


def metered() -> Found:
    """Whether the network may cost by volume: no Wi-Fi on a phone, else what NetworkManager says of any connected device."""
    if shutil.which("termux-wifi-connectioninfo"):
        state = _termux("termux-wifi-connectioninfo").get("supplicant_state")
        if not isinstance(state, str):
            raise Unreadable("termux-wifi-connectioninfo does not tell whether Wi-Fi is connected")
        return state != "COMPLETED", "Wi-Fi" if state == "COMPLETED" else "no Wi-Fi"
    if not shutil.which("nmcli"):
        raise Unreadable("neither nmcli (NetworkManager) nor termux-wifi-connectioninfo is here")
    fields = "GENERAL.DEVICE,GENERAL.STATE,GENERAL.METERED"
    device, connected, free = "", False, ""
    for line in _answer("nmcli", "--terse", "--fields", fields, "device", "show").splitlines():
        name, _, value = line.partition(":")
        if name == "GENERAL.DEVICE":
            device = value
        elif name == "GENERAL.STATE":
            connected = value.startswith("100")
        elif name == "GENERAL.METERED" and connected and device != "lo":
            if value.startswith("yes"):
                return True, f"{device} is metered"
            free = device if value.startswith("no") else free
    if not free:
        raise Unreadable("NetworkManager does not say whether a connected device is metered")
    return False, f"{free} is not metered"


# -- the program -------------------------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fedara-busy: {message}\n")  # one line: the first is all that the server is shown


def _within(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= most:  # not so for nan, either
            raise argparse.ArgumentTypeError(f"{text}: allowed is {least:g} to {most:g}")
        return value

    return number


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("fedara-busy", description="Exit code 0 if one of these is so, or cannot be read.", allow_abbrev=False)
    charge, heat = _within(1, 100), _within(1, WARMEST)
    parser.add_argument("--battery-below", type=charge, metavar="PERCENT", help="charge, of several batteries their mean")
    parser.add_argument("--discharging", action="store_true", help="the device lives on its battery")
    parser.add_argument("--battery-hotter-than", type=heat, metavar="CELSIUS", help="the battery's own temperature")
    parser.add_argument("--hotter-than", type=heat, metavar="CELSIUS", help="the warmest of the machine's sensors")
    parser.add_argument("--sensor", action="append", default=[], metavar="NAME", help="of these alone; * and ? match any")
    parser.add_argument("--metered", action="store_true", help="mobile data, or a network that NetworkManager calls metered")
    options = parser.parse_args(arguments)
    if options.sensor and options.hotter_than is None:
        parser.error("--sensor needs --hotter-than")
    if not any(vars(options).values()):  # no number is 0
        parser.error("name at least one check: --help lists them")
    return options


def look(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What speaks against training now, and what was read that does not."""
    busy: list[str] = []
    free: list[str] = []

    def check(name: str, found: Callable[[], Found]) -> None:
        try:
            so, words = found()
        except Unreadable as error:
            busy.append(f"{name} cannot be checked: {error}")
        else:
            (busy if so else free).append(words)

    if options.battery_below or options.discharging or options.battery_hotter_than:
        try:
            batteries = power()  # once: it may take seconds
        except Unreadable as error:
            busy.append(f"the battery cannot be checked: {error}")
        else:
            if options.battery_below:
                check("--battery-below", lambda: battery_below(batteries, options.battery_below))
            if options.discharging:
                check("--discharging", lambda: discharging(batteries))
            if options.battery_hotter_than:
                check("--battery-hotter-than", lambda: battery_hotter_than(batteries, options.battery_hotter_than))
    if options.hotter_than:
        check("--hotter-than", lambda: hotter_than(options.hotter_than, options.sensor))
    if options.metered:
        check("--metered", metered)
    return busy, free


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, print one line, and give the exit code."""
    options = _options(arguments)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        busy, free = look(options)
    except Exception as error:  # Python's own exit code for it would be 1: free
        print(f"fedara-busy failed ({type(error).__name__}: {error})")
        return 2
    print("; ".join(busy) if busy else f"free: {'; '.join(free)}")
    return 1 if not busy else 0


if __name__ == "__main__":
    sys.exit(main())

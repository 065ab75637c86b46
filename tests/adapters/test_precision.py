"""`model.dtype = 'auto'`: what a machine computes faster in, once and for all of its processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import backbone

from fedara_flwr.adapters import precision

FASTEST = precision.fastest_type  # the tests' own is always float32


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(precision, "fastest_type", FASTEST)
    return tmp_path / "home" / precision.KEPT


def gains(monkeypatch, *values):
    told = iter(values)
    monkeypatch.setattr(precision, "_gain", lambda device: next(told))


@pytest.mark.parametrize("gain, found", [(2.0, "bfloat16"), (1.2, "bfloat16"), (1.19, "float32"), (0.1, "float32")])
def test_the_faster_type_is_taken_and_kept(home, monkeypatch, gain, found):
    gains(monkeypatch, gain)
    assert precision.fastest_type("cpu") == found
    assert list(json.loads(home.read_text()).values()) == [found]
    assert precision.fastest_type("cpu") == found  # no second product


def test_another_processor_and_another_torch_have_their_own(home, monkeypatch):
    gains(monkeypatch, 2.0, 0.5, 0.5)
    assert precision.fastest_type("cpu") == "bfloat16"
    monkeypatch.setattr(precision, "_processor", lambda device: "another")
    assert precision.fastest_type("cpu") == "float32"
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert precision.fastest_type("cpu") == "float32"
    assert len(json.loads(home.read_text())) == 3


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b'{"x": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_made_anew(home, monkeypatch, content):
    home.parent.mkdir()
    home.write_bytes(content)
    gains(monkeypatch, 2.0)
    assert precision.fastest_type("cpu") == "bfloat16"
    assert "bfloat16" in json.loads(home.read_text()).values()


@pytest.mark.parametrize("value", ["float16", "int8", "auto", "", 1, ["bfloat16"], {}])
def test_a_kept_value_that_is_none_is_not_taken(home, monkeypatch, caplog, value):
    home.parent.mkdir()
    home.write_text(json.dumps({f"{precision._processor('cpu')}, torch {torch.__version__}": value, "other": "float32"}))
    gains(monkeypatch, 2.0)
    assert precision.fastest_type("cpu") == "bfloat16"
    assert "allowed are 'float32', 'bfloat16'" in caplog.text
    assert sorted(json.loads(home.read_text()).values()) == ["bfloat16", "float32"]


def test_what_another_process_kept_meanwhile_stands(home, monkeypatch):
    def slower(device):
        home.parent.mkdir()
        home.write_text(json.dumps({f"{precision._processor('cpu')}, torch {torch.__version__}": "float32"}))
        return 2.0

    monkeypatch.setattr(precision, "_gain", slower)
    assert precision.fastest_type("cpu") == "float32"


AT_ONCE = """
import sys, time
from fedara_flwr.adapters import precision
def gain(device):
    print("timed", flush=True)
    sys.stdin.readline()
    return float(sys.argv[1])
precision._gain = gain
print(precision.fastest_type("cpu"))
"""


def test_processes_that_time_at_once_take_one_outcome(tmp_path):
    environment = os.environ | {"FLWR_HOME": str(tmp_path / "new"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-c", AT_ONCE], subprocess.PIPE
    started = [
        subprocess.Popen([*command, gain], stdin=pipe, stdout=pipe, text=True, env=environment) for gain in ("2", "0.5", "2")
    ]
    assert {process.stdout.readline() for process in started} == {"timed\n"}
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1


def test_a_home_that_cannot_be_written_is_said(home, monkeypatch, caplog):
    home.parent.write_text("a file")
    gains(monkeypatch, 2.0)
    assert precision.fastest_type("cpu") == "bfloat16"
    assert "cannot be kept" in caplog.text


def test_the_product_is_really_timed():
    assert 0.001 < precision._gain("cpu") < 1000


def test_a_large_checkpoint_in_16_bits_is_not_made_twice_as_large(monkeypatch):
    monkeypatch.setattr(precision, "fastest_type", lambda device: "float32")
    monkeypatch.setattr(precision, "_memory", lambda device: 16_000)
    for stored, parameters, found in [
        (torch.bfloat16, 1000, "float32"),  # 4,000 bytes, a quarter
        (torch.float16, 1001, "bfloat16"),
        (torch.float32, 10_000, "float32"),  # it is as large as that already
    ]:
        assert precision.number_type("cpu", parameters, stored) == found


@pytest.mark.parametrize("found", ["float32", "bfloat16"])
def test_a_backbone_says_what_it_became(tiny_models, monkeypatch, found):
    monkeypatch.setattr(precision, "fastest_type", lambda device: found)
    loaded = backbone(tiny_models["bert"], dtype="auto")
    frozen = {p.dtype for name, p in loaded.model.named_parameters() if name.startswith("bert.encoder")}
    assert loaded.dtype == found and frozen == {getattr(torch, found)}


def test_an_explicit_type_times_nothing(tiny_models, monkeypatch):
    monkeypatch.setattr(precision, "fastest_type", lambda device: pytest.fail("timed"))
    assert backbone(tiny_models["bert"], dtype="float32").dtype == "float32"

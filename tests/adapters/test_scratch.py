"""The scratch file: the same bits back, bounded, without a name, and no error whatever the disk does."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, backbone, random_arrays
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_prefix import collate, equal, load, rows, states
from test_session import PadOnly, plan

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.adapters.scratch import SLOT, Scratch
from fedara_flwr.client import session
from fedara_flwr.client.train import ClientData, train
from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.allocation import last_blocks
from fedara_flwr.tasks import Encoded, read_settings

PER_MB = (1 << 20) // SLOT


def tensor(nbytes, seed=0, dtype=torch.float32):
    """Any bits, NaN among them."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), generator=numbers, dtype=torch.uint8).view(dtype)


def bits(found):
    return found.contiguous().view(-1).view(torch.uint8)


# -- the file ------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbytes", [8, SLOT - 8, SLOT, SLOT + 8, 5 * SLOT])
def test_the_same_bits_come_back(dtype, nbytes):
    scratch, written = Scratch(1), tensor(nbytes, dtype=dtype).view(2, -1)
    scratch.put("between", tensor(SLOT))
    scratch.put("it", written)
    found = scratch.get("it")
    assert found.dtype == dtype and found.shape == written.shape
    assert torch.equal(bits(found), bits(written))
    assert scratch.nbytes == SLOT + -(-nbytes // SLOT) * SLOT


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "clear"]), st.integers(0, 7)), max_size=60))
@hypothesis_settings(max_examples=60, deadline=None)
def test_it_is_a_dictionary_that_forgets_what_was_used_least_recently(calls):
    """1 MiB has 64 slots; the tensor of key k fills 5·k + 3 of them: 38 the largest, 164 all."""
    scratch, slots, model = Scratch(1), {k: 5 * k + 3 for k in range(8)}, OrderedDict()
    for call, key in calls:
        if call == "clear" and key == 0:
            scratch.clear()
            model.clear()
        elif call == "put":
            scratch.put(key, tensor(slots[key] * SLOT - 12, seed=key))
            while key not in model and sum(slots[k] for k in model) + slots[key] > PER_MB:
                model.popitem(last=False)
            model[key] = True
            model.move_to_end(key)
        elif call == "get":
            found = scratch.get(key)
            assert (found is not None) == (key in model)
            if found is not None:
                model.move_to_end(key)
                assert torch.equal(bits(found), bits(tensor(slots[key] * SLOT - 12, seed=key)))
        assert list(scratch._held) == list(model)
        assert scratch.nbytes == SLOT * sum(slots[k] for k in model) <= 1 << 20


def test_what_is_larger_than_the_file_is_not_kept_and_drives_nothing_out():
    scratch = Scratch(1)
    scratch.put("small", tensor(SLOT))
    scratch.put("large", tensor((1 << 20) + 8))
    assert list(scratch._held) == ["small"]
    scratch.put("whole", tensor(1 << 20))
    assert list(scratch._held) == ["whole"]


def test_the_file_does_not_outgrow_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch(1)
    for key in range(300):
        scratch.put(key, tensor((key % 9 + 1) * SLOT - 4, seed=key))
    assert os.fstat(scratch._file.fileno()).st_size <= 1 << 20


def test_it_has_no_name_and_gives_its_room_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch(1)
    assert scratch._file is None, "nothing is opened before it is needed"
    scratch.put(1, tensor(SLOT))
    facts = os.fstat(scratch._file.fileno())
    assert facts.st_nlink == 0 and facts.st_dev == tmp_path.stat().st_dev and list(tmp_path.iterdir()) == []
    scratch.clear()
    assert scratch._file is None and scratch.nbytes == 0 and scratch.get(1) is None
    scratch.put(1, tensor(SLOT, seed=5))
    assert torch.equal(bits(scratch.get(1)), bits(tensor(SLOT, seed=5)))


def test_none_wanted_opens_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    scratch = Scratch(0)
    scratch.put(1, tensor(8))
    assert scratch.get(1) is None and not caplog.records


KEEPER = """
import sys, torch
from fedara_flwr.adapters.scratch import Scratch
scratch = Scratch(64)
for key in range(40):
    scratch.put(key, torch.rand(1 << 17))
print(scratch.nbytes, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_nothing_is_left_of_a_killed_process(tmp_path):
    """20 MiB: forty tensors of 2^17 float32."""
    code = [sys.executable, "-c", KEEPER]
    with subprocess.Popen(
        code,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert int(process.stdout.readline()) == 20 << 20
            links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert [link for link in links if link.startswith(str(tmp_path)) and link.endswith("(deleted)")]
            assert list(tmp_path.iterdir()) == []
        finally:
            process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


# -- a disk that fails ------------------------------------------------------------
@contextmanager
def files_end_at(nbytes):
    """The system refuses to write beyond: the last write before is cut short, the next fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 2 * SLOT, 2 * SLOT + 1, 3 * SLOT - 1])
def test_a_full_disk_turns_it_off_with_one_warning(caplog, room):
    scratch = Scratch(1)
    with files_end_at(room):
        for key in range(5):
            scratch.put(key, tensor(SLOT))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "train.cache-disk-mb is off" in caplog.text and len(caplog.text.splitlines()) == 1
    scratch.put(9, tensor(SLOT))
    assert scratch._file is None and scratch.nbytes == 0
    assert all(scratch.get(key) is None for key in range(10))
    assert len(caplog.records) == 1


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    scratch = Scratch(1)
    for key in range(3):
        scratch.put(key, tensor(SLOT))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and scratch.get(0) is None


def test_a_file_that_was_cut_off(caplog):
    """Of two rows the first lies behind the cut, too: its last byte does."""
    for key in (0, 1):
        scratch = Scratch(1)
        scratch.put(0, tensor(SLOT))
        scratch.put(1, tensor(SLOT))
        os.ftruncate(scratch._file.fileno(), SLOT - 1)
        assert scratch.get(key) is None and scratch.nbytes == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_half_of_what_is_free_stays_free(monkeypatch):
    """20 slots are free: 10 may be taken, so the eleventh row drives out the first."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * SLOT + 5))
    scratch = Scratch(1)
    for key in range(11):
        scratch.put(key, tensor(SLOT))
    assert scratch.nbytes == 10 * SLOT and list(scratch._held) == list(range(1, 11))


# -- under the frozen prefix ------------------------------------------------------------
def ran(adapted, ids):
    """How many times the lowest block runs for these rows, and what comes."""
    calls = []
    hook = adapted.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = states(adapted, ids)
    hook.remove()
    return len(calls), found


@pytest.mark.parametrize("cache", ["exact", "half"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_rows_from_disk_have_the_same_bits(tiny_models, name, dtype, cache):
    """Nothing fits in memory, so all that is served comes from disk; at rising boundaries and falling ones."""
    memory, disk = (AdaptedModel(backbone(tiny_models[name], dtype=dtype), cache, *sizes) for sizes in ((64, 0), (0, 1)))
    ids = rows()
    for lowest in (1, 2, 3, 1):
        for adapted in (memory, disk):
            load(adapted, lowest)
        expected = states(memory, ids)
        assert equal(states(disk, ids), expected)
        count, found = ran(disk, ids)
        assert count == 0 and equal(found, expected)
        assert disk._prefix.nbytes == 0 and disk._prefix._disk.nbytes
    assert memory._prefix._disk.nbytes == 0


def test_a_rising_boundary_starts_from_disk(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]), "exact", 0, 1)
    attended = []
    for i, block in enumerate(adapted.backbone.blocks):
        block.attention.register_forward_pre_hook(lambda *_, i=i: attended.append(i))
    for lowest, expected in ((1, [0]), (3, [1, 2]), (2, [1]), (3, [])):
        load(adapted, lowest)
        attended.clear()
        states(adapted, [[5, 6, 7]])
        assert attended == expected


def test_memory_first_then_disk_then_run_again(tiny_models):
    """1 MiB in memory holds 16 rows of 64 KiB, 1024 tokens of 16 float32, and as many on disk: of 40 rows 24 to 39 and 8 to 23.

    Row 8 comes up from disk, so 24 goes down and drives out 9; that is run again, so 25 goes down and drives out 10.
    """
    adapted = AdaptedModel(backbone(tiny_models["llama"]), "exact", 1, 1)
    ids = [[5 + i] * 1024 for i in range(40)]
    load(adapted, 1)
    for row in ids:
        states(adapted, [row])
    assert adapted._prefix.nbytes == adapted._prefix._disk.nbytes == 1 << 20
    for row, expected in ((39, 0), (8, 0), (9, 1), (24, 0), (7, 1)):
        assert ran(adapted, [ids[row]])[0] == expected


def test_a_row_that_comes_and_goes_is_written_once(tiny_models, monkeypatch):
    adapted = AdaptedModel(backbone(tiny_models["bert"]), "exact", 0, 1)
    load(adapted, 1)
    written = []
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: written.append(1) or write(*arguments))
    for _ in range(3):
        states(adapted, rows(count=6))
    assert len(written) == 6


def test_another_delta_forgets_what_is_on_disk(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]), "exact", 0, 1)
    found = []
    for seed in (1, 2):
        rng, spec = np.random.default_rng(seed), adapted.spec
        sizes = (sum(getattr(module, side) for module in spec.modules) for side in ("d_out", "d_in"))
        left, right = (rng.normal(0, 0.1, size).astype(np.float32) for size in sizes)
        adapted.set_delta(Piece((1,) * len(spec.modules), {"B": left, "A": right}))
        assert adapted._prefix._disk.nbytes == 0
        load(adapted, 2)
        found.append(adapted.below(collate(rows())))
    assert not torch.allclose(*found)


def test_a_round_is_the_same_from_memory_from_disk_and_on_a_full_disk(tiny_models, caplog):
    ids = rows(count=12)
    data = ClientData(Encoded(ids, [i % len(LABELS) for i in range(12)]), Encoded(ids[:4], [0, 1, 2, 0]))
    found = []
    for sizes, room in (((64, 0), None), ((0, 1), None), ((0, 1), 3 * SLOT)):
        adapted = AdaptedModel(backbone(tiny_models["bert"]), "exact", *sizes)
        mask = last_blocks(adapted.spec, RankMask.full([4] * 18), 2)
        orders, arrays = plan(mask, evaluate=True), random_arrays(adapted.spec, mask)
        with files_end_at(room if room is not None else resource.RLIM_INFINITY):
            update = train(Learner(adapted, TASKS["classification"], PadOnly()), data, orders, arrays, "1")
        metrics = {name: update.metrics[name] for name in ("loss", "eval-loss", "tokens")}
        found.append((metrics, {part: vector.tobytes() for part, vector in update.arrays.items()}))
    assert found[1] == found[0] and found[2] == found[0]
    assert len([record for record in caplog.records if "train.cache-disk-mb is off" in record.getMessage()]) == 1


def test_a_session_has_the_disk_its_settings_give_it(tiny_bert):
    sessions = [
        session.resident(read_settings({"model.name": str(tiny_bert), "train.cache-disk-mb": size}), LABELS) for size in (2, 0)
    ]
    assert [one.adapted._prefix._disk._limit for one in sessions] == [2 * PER_MB, 0]

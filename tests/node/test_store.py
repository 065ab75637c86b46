"""The node's stores: pieces of the delta, and what one client keeps from round to round (Kept)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_wire import MASK, random_arrays

from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.kept import Kept
from fedara_flwr.node.kept import KeptStore
from fedara_flwr.node.store import MissingPieces, NodeStore


def piece(seed, numbers=50):
    values = np.random.default_rng(seed).normal(size=numbers).astype(np.float32)
    return Piece((), {"dense": values})


FACTORS = Piece((2, 0, 1), {"B": np.arange(7, dtype=np.float32), "A": -np.arange(9, dtype=np.float32)})


def same(first, second):
    return first.ranks == second.ranks and all(np.array_equal(first.arrays[k], second.arrays[k]) for k in second.arrays)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_what_is_put_comes_back_in_the_order_asked(tmp_path):
    store, some = NodeStore(tmp_path / "a" / "b"), [piece(0), FACTORS, piece(1)]
    for one in some:
        store.put(one)
        store.put(one)
    digests = [p.digest for p in some]
    for order in (digests, digests[::-1]):
        assert all(same(p, some[digests.index(d)]) for p, d in zip(store.get(order), order, strict=True))
    assert names(tmp_path / "a" / "b") == {f"{digest}.safetensors" for digest in digests}
    assert list(store.get([])) == list(NodeStore(tmp_path / "none").get([])) == []


def truncate(file):
    file.write_bytes(file.read_bytes()[:-4])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


def noise(file):
    file.write_bytes(b"\xff" * 300)


def another(file):
    NodeStore(file.parent).put(piece(9))
    os.replace(file.parent / f"{piece(9).digest}.safetensors", file)


def other_ranks(file):
    from safetensors.numpy import save_file

    save_file(FACTORS.arrays, file, metadata={"ranks": "[1, 0, 2]"})


def no_ranks(file):
    from safetensors.numpy import save_file

    save_file(FACTORS.arrays, file)


def nested_ranks(file):
    from safetensors.numpy import save_file

    save_file(FACTORS.arrays, file, metadata={"ranks": "7"})


@pytest.mark.parametrize("spoil", [truncate, flip, empty, noise, another, other_ranks, no_ranks, nested_ranks, Path.unlink])
def test_a_spoilt_file_is_removed_and_reported_missing(tmp_path, spoil):
    store = NodeStore(tmp_path)
    store.put(FACTORS)
    store.put(piece(1))
    spoil(tmp_path / f"{FACTORS.digest}.safetensors")
    with pytest.raises(MissingPieces) as error:
        list(store.get([piece(1).digest, FACTORS.digest]))
    assert error.value.digests == (FACTORS.digest,)
    assert names(tmp_path) == {f"{piece(1).digest}.safetensors"}
    store.put(FACTORS)
    assert same(next(store.get([FACTORS.digest])), FACTORS)


@pytest.mark.parametrize(
    "digest", ["../../secret", "", "0" * 63, "0" * 65, "F" * 64, "/" + "0" * 63, "0" * 63 + "\n", "..", "0" * 63 + "\u0663"]
)
def test_a_name_that_is_no_sha256_never_becomes_a_path(tmp_path, digest):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is no sha256"):
        list(NodeStore(tmp_path / "a" / "b").get([digest]))
    assert secret.read_bytes() == b"mine"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **options):
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("fedara_flwr.node.store.save_file", full)
    with pytest.raises(OSError, match="no space"):
        NodeStore(tmp_path).put(FACTORS)
    assert names(tmp_path) == set()


def test_pieces_read_longest_ago_make_room(tmp_path):
    """Four files of about 4,000 bytes under a limit of 13,000: room for three."""
    store, some = NodeStore(tmp_path, limit=13_000), [piece(seed, 1000) for seed in range(4)]
    for age, one in enumerate(some[:3]):
        store.put(one)
        os.utime(tmp_path / f"{one.digest}.safetensors", (1000 + age, 1000 + age))
    list(store.get([some[0].digest]))  # now the one read last
    store.put(some[3])
    assert names(tmp_path) == {f"{some[i].digest}.safetensors" for i in (0, 2, 3)}
    with pytest.raises(MissingPieces):
        list(store.get([some[1].digest]))


def test_a_piece_above_the_limit_is_kept_alone(tmp_path):
    store = NodeStore(tmp_path, limit=100)
    store.put(FACTORS)
    store.put(piece(1))
    assert names(tmp_path) == {f"{piece(1).digest}.safetensors"}
    assert same(next(store.get([piece(1).digest])), piece(1))


WORKER = """
import sys
from pathlib import Path
import numpy as np
from fedara_flwr.node.store import MissingPieces, NodeStore
from fedara_flwr.model.deltas import Piece
store, found = NodeStore(Path(sys.argv[1]), limit=int(sys.argv[2])), 0
pieces = [Piece((), {"dense": np.full(500, seed, np.float32)}) for seed in range(8)]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(150):
    piece = pieces[(turn * int(sys.argv[3])) % 8]
    store.put(piece)
    try:
        found += list(store.get([piece.digest]))[0].arrays["dense"][0] == piece.arrays["dense"][0]
    except MissingPieces:
        pass
print(found)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("limit, least", [(10**9, 150), (5000, 1)])
def test_two_processes_at_once(tmp_path, limit, least):
    """With room for all, nothing is ever missing; where they evict each other's pieces, nothing but that happens."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(limit), stride],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for stride in ("3", "5")
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    outcomes = [worker.communicate("go\n", timeout=60) for worker in workers]
    for worker, (out, err) in zip(workers, outcomes, strict=True):
        assert worker.returncode == 0, err[-2000:]
        assert int(out) >= least
    assert all(name.endswith(".safetensors") for name in names(tmp_path))


# -- what one client keeps of one run -------------------------------------------------------------------------------
def kept_of(seed, entries=0):
    return Kept(random_arrays(MASK, seed=seed), MASK, draw_seed=2**62, entries=entries)


def same_kept(found, expected):
    if found is None:
        return expected is None
    facts = (found.mask, found.draw_seed, found.entries) == (expected.mask, expected.draw_seed, expected.entries)
    return facts and all(np.array_equal(found.arrays[part], values) for part, values in expected.arrays.items())


def test_a_round_that_is_done_again_starts_from_the_same(tmp_path):
    store, kept = KeptStore(tmp_path, "run", "3"), {number: kept_of(number) for number in (2, 3, 5, 9)}
    assert store.take(1) is None
    for number, one in kept.items():
        store.put(one, number)
    assert same_kept(store.take(10), kept[9]) and len(list(store.folder.iterdir())) == 3
    assert same_kept(store.take(9), kept[5])
    store.put(kept_of(77), 9)
    assert same_kept(store.take(10), kept_of(77)) and same_kept(store.take(9), kept[5])
    assert same_kept(store.take(5), kept[3])
    assert store.take(3) is None and list(store.folder.iterdir()) == []


def test_no_run_and_no_client_sees_anothers(tmp_path):
    names = [("run", "3"), ("run", "4"), ("other", "3"), ("run\x1f3", ""), ("../..", "/etc/x\0y")]
    for seed, (run, key) in enumerate(names):
        KeptStore(tmp_path / "a", run, key).put(kept_of(seed, seed), 1)
    assert [KeptStore(tmp_path / "a", run, key).take(2).entries for run, key in names] == list(range(5))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and len(list((tmp_path / "a").iterdir())) == 5
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o700}


def test_what_is_lost_or_damaged_is_zero(tmp_path):
    """Every byte flipped, a file cut off, an empty one. The older file is in an upload already and never taken instead."""
    store = KeptStore(tmp_path, "run", "3")
    store.put(kept_of(1), 1)
    store.put(kept_of(2), 2)
    file = store.folder / "2.safetensors"
    data = file.read_bytes()
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    for bad in (*flipped, data[:-4], b""):
        file.write_bytes(bad)
        assert store.take(3) is None
    store.put(kept_of(3), 3)
    assert same_kept(store.take(4), kept_of(3))


def test_a_full_disk_costs_what_was_to_be_kept_alone(tmp_path, monkeypatch, caplog):
    """The older file must not stay as if it were the last one."""
    store = KeptStore(tmp_path, "run", "3")
    store.put(kept_of(1), 1)

    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        store.put(kept_of(2), 2)
    assert "No space left" in caplog.text and store.take(3) is None


def test_those_who_wrote_longest_ago_make_room(tmp_path):
    """A file has 1,200 bytes and three are reckoned with: three clients of 1,200 and a new one are 7,200 of at most 6,500."""
    stores = [KeptStore(tmp_path, "run", str(key), limit=6500) for key in range(4)]
    for age, store in enumerate(stores[:3]):
        store.put(Kept({"head": np.zeros(260, np.float32)}, MASK), 1)
        assert 1100 < (store.folder / "1.safetensors").stat().st_size < 1500
        os.utime(store.folder, (1000 - age, 1000 - age))
    stores[3].put(Kept({"head": np.zeros(260, np.float32)}, MASK), 1)
    assert [store.take(2) is None for store in stores] == [False, False, True, False]


def size_of(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_room_is_made_at_every_put(tmp_path):
    """Four clients' first files of 1,200 bytes and two more to come for one of them fit into 8,000; their second files do not.
    What is kept later, or is larger than before, makes room as the first did, and the folder never outgrows its limit."""
    limit, most = 8000, 0
    stores = [KeptStore(tmp_path, "run", str(key), limit) for key in range(4)]
    for number in range(1, 6):
        for store in stores:
            store.put(Kept({"head": np.full(260, number, np.float32)}, MASK), number)
            most = max(most, size_of(tmp_path))
            assert size_of(tmp_path) <= limit
            assert store.take(number + 1).arrays["head"].tolist() == [number] * 260
        if number == 1:
            assert all(store.take(2) is not None for store in stores)
    assert most > 4 * 1200 and len(list(tmp_path.iterdir())) < 4


@pytest.mark.parametrize(("limit", "rounds"), [(30_000, (2, 3, 4)), (20_000, (3, 4)), (10_000, (4,)), (3000, ())])
def test_what_one_client_keeps_is_within_the_limit_too(tmp_path, caplog, limit, rounds):
    """A file has 8,200 bytes: fewer rounds of it, or none, and a line says so."""
    small, large = KeptStore(tmp_path, "run", "1", limit), KeptStore(tmp_path, "run", "2", limit)
    small.put(Kept({"head": np.zeros(4, np.float32)}, MASK), 1)
    for number in (1, 2, 3, 4):
        large.put(Kept({"head": np.full(2000, number, np.float32)}, MASK), number)
        assert size_of(tmp_path) <= limit
    assert {path.name for path in large.folder.glob("*")} == {f"{number}.safetensors" for number in rounds}
    assert (large.take(5) is not None) == bool(rounds) and ("there is room for 3000" in caplog.text) == (not rounds)


def test_what_killed_processes_left_is_removed(tmp_path):
    """A file that another process is writing stays."""
    root, old = tmp_path / "store", time.time() - 7200
    pieces, kept, other = NodeStore(root), KeptStore(root / "parts", "run", "1"), KeptStore(root / "parts", "run", "2")
    other.put(kept_of(1), 1)
    pieces.put(piece(1))
    left = [root / "a.part", other.folder / "next.part"]
    written = root / "b.part"
    for file in (*left, written):
        file.write_bytes(b"half")
    for file in left:
        os.utime(file, (old, old))
    pieces.put(FACTORS)
    kept.put(kept_of(2), 1)
    assert not any(file.exists() for file in left) and written.exists()


def test_a_store_is_its_user_s_alone(tmp_path):
    KeptStore(tmp_path / "a" / "parts", "run", "1").put(kept_of(1), 1)
    NodeStore(tmp_path / "b").put(FACTORS)
    folders = [tmp_path / "a", tmp_path / "b", *(tmp_path / "a").rglob("*/")]
    assert len(folders) == 4 and all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)


@pytest.mark.parametrize("fails", ["write", "replace", "folder"])
@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_a_disk_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch, caplog, fails, earlier):
    store, other = KeptStore(tmp_path / "parts", "run", "3"), KeptStore(tmp_path / "parts", "run", "4")
    other.put(kept_of(9), 1)
    for number in range(1, earlier + 1):
        store.put(kept_of(number), number)
    write = Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(Path, "write_bytes", half)
        elif fails == "replace":
            patch.setattr("fedara_flwr.node.kept.os.replace", full)
        else:
            patch.setattr(Path, "mkdir", full)
        store.put(kept_of(5), 5)
    assert "parts of a client cannot be kept: they are lost ([Errno 28] No space left on device)" in caplog.text
    assert not list(tmp_path.rglob("*.part")) and store.take(6) is None
    assert same_kept(other.take(2), kept_of(9))
    store.put(kept_of(6), 6)
    assert same_kept(store.take(7), kept_of(6)) and names(store.folder) == {"6.safetensors"}

"""The node's store of delta pieces, and what the ClientApp keeps there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedara_flwr.model.deltas import Piece
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

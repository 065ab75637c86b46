"""The order of a client's rows: how many batches, how large, and how much of them is padding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedara_flwr.client.train import batches
from fedara_flwr.training import LocalTraining


def plan(steps: int = 0, epochs: int = 1, batch_size: int = 16) -> LocalTraining:
    return LocalTraining(steps=steps, epochs=epochs, batch_size=batch_size)


def draw(lengths: list[int], order: LocalTraining, seed: int = 0) -> list[list[int]]:
    return [rows.tolist() for rows in batches(lengths, order, np.random.default_rng(seed))]


def some_lengths(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 65, count).tolist()


def cells(lengths: list[int], drawn: list[list[int]]) -> int:
    """Tokens with padding."""
    return sum(len(rows) * max(lengths[i] for i in rows) for rows in drawn)


sizes = given(count=st.integers(1, 60), batch_size=st.integers(1, 20), number=st.integers(1, 20), seed=st.integers(0, 99))


@hypothesis_settings(max_examples=150, deadline=None)
@sizes
def test_by_steps(count, batch_size, number, seed):
    drawn = draw(some_lengths(count), plan(steps=number, batch_size=batch_size), seed)
    assert len(drawn) == number
    assert {len(rows) for rows in drawn} == {min(batch_size, count)}
    assert {i for rows in drawn for i in rows} <= set(range(count))


@hypothesis_settings(max_examples=150, deadline=None)
@sizes
def test_by_epochs(count, batch_size, number, seed):
    drawn = draw(some_lengths(count), plan(epochs=number, batch_size=batch_size), seed)
    per_epoch = -(-count // batch_size)
    assert len(drawn) == number * per_epoch
    for start in range(0, len(drawn), per_epoch):
        epoch = drawn[start : start + per_epoch]
        assert sorted(i for rows in epoch for i in rows) == list(range(count))
        assert sorted(len(rows) for rows in epoch)[1:] == [min(batch_size, count)] * (per_epoch - 1)


def test_steps_win_over_epochs():
    assert len(draw(some_lengths(10), plan(steps=3, epochs=7, batch_size=2))) == 3


def test_fewer_rows_than_the_batch():
    """Ten rows and a batch of 16: every step sees each row once."""
    drawn = draw(some_lengths(10), plan(steps=8, batch_size=16))
    assert [sorted(rows) for rows in drawn] == [list(range(10))] * 8


def test_one_row():
    assert draw([9], plan(steps=3)) == [[0], [0], [0]]


@pytest.mark.parametrize("count", [16, 32, 64, 160])
def test_no_row_twice_in_a_batch(count):
    """Rows come from one permutation after another; no batch of 16 spans two where 16 divides their number."""
    for seed in range(5):
        drawn = draw(some_lengths(count), plan(steps=16, batch_size=16), seed)
        assert {len(set(rows)) for rows in drawn} == {16}


@pytest.mark.parametrize("count", [20, 53, 100])
def test_no_row_more_than_twice_in_a_batch(count):
    """A batch is no larger than a permutation, so it touches two of them at most."""
    for seed in range(5):
        drawn = draw(some_lengths(count), plan(steps=16, batch_size=16), seed)
        assert max(n for rows in drawn for n in Counter(rows).values()) <= 2


@pytest.mark.parametrize(("count", "steps"), [(32, 4), (32, 16), (48, 30)])
def test_rows_are_used_equally(count, steps):
    """steps * 16 draws are whole permutations here, so every row comes equally often."""
    drawn = draw(some_lengths(count), plan(steps=steps, batch_size=16))
    assert set(Counter(i for rows in drawn for i in rows).values()) == {steps * 16 // count}
    assert len({i for rows in drawn for i in rows}) == count


def test_a_seed_gives_one_order():
    lengths = some_lengths(100)
    for order in (plan(steps=9), plan(epochs=3)):
        assert draw(lengths, order, 5) == draw(lengths, order, 5)
        assert draw(lengths, order, 5) != draw(lengths, order, 6)


def test_epochs_differ():
    drawn = draw(some_lengths(64), plan(epochs=2))
    assert {frozenset(rows) for rows in drawn[:4]} != {frozenset(rows) for rows in drawn[4:]}


@pytest.mark.parametrize("order", [plan(epochs=1), plan(steps=32)])
def test_grouping_shortens_padding(order):
    """Lengths uniform in 5..64: the longest of 16 random ones is about 61, against a mean of 34.5.

    Sorted among 128, a batch spans an eighth of the lengths, 7.5: about 38, that is 0.63 of 61.
    """
    lengths = some_lengths(512)
    shuffled = np.random.default_rng(1).permutation(512).reshape(32, 16).tolist()
    drawn = draw(lengths, order)
    assert sum(len(rows) for rows in drawn) == 512
    assert cells(lengths, drawn) < 0.7 * cells(lengths, shuffled)


def test_batches_are_not_in_order_of_length():
    """Short batches must not always come first: the first of eight is the shortest in about an eighth of the seeds."""
    lengths = some_lengths(128)
    first = 0
    for seed in range(80):
        means = [np.mean([lengths[i] for i in rows]) for rows in draw(lengths, plan(epochs=1), seed)]
        assert len(means) == 8
        first += means[0] == min(means)
    assert 1 <= first <= 30


def test_rows_of_one_length_are_shuffled():
    """Where there is nothing to group, batches are those of a random order."""
    drawn = draw([7] * 64, plan(epochs=1))
    assert [i for rows in drawn for i in rows] != list(range(64))
    assert {frozenset(rows) for rows in drawn} != {frozenset(range(s, s + 16)) for s in range(0, 64, 16)}

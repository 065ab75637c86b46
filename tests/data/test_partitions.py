"""Who holds what: five ways to share rows among clients, the server's splits, and a client's own held-out rows."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from data_helper import federation, shares
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.config import DataSettings
from fedara_flwr.data import docstrings
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.federation import federation as dealing
from fedara_flwr.data.federation import hold_out
from fedara_flwr.data.partitions import partition
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings

KINDS = ("iid", "dirichlet", "pathological", "length", "natural")
DEFAULT = read_settings({}).data
kinds = pytest.mark.parametrize("kind", KINDS)


def setting(kind: str, **options: float) -> DataSettings:
    return DataSettings(name="docstrings", partition=kind, id_column="owner" if kind == "natural" else "", **options)


def rows(counts: list[int], owners: int = 7) -> Examples:
    """`counts[i]` rows of label i, in mixed order, each with one of some owners."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    labels = np.random.default_rng(0).permutation(labels)
    names = tuple(f"owner {i % owners}" for i in range(len(labels)))
    return Examples(tuple(f"text {i}" for i in range(len(labels))), labels, owners=names)


def texts(examples: Examples, parts: list[np.ndarray]) -> list[list[str]]:
    """The texts of each client, sorted."""
    return [sorted(examples.take(part).texts) for part in parts]


def label_counts(examples: Examples, parts: list[np.ndarray], labels: int) -> np.ndarray:
    """Shape (clients, labels)."""
    return np.array([np.bincount(examples.groups[part], minlength=labels) for part in parts])


@st.composite
def examples_of(draw: st.DrawFn) -> Examples:
    """1 to 40 rows, texts repeated now and then."""
    count = draw(st.integers(1, 40))
    sized = {"min_size": count, "max_size": count}
    return Examples(
        tuple(draw(st.lists(st.text(max_size=3), **sized))),
        np.array(draw(st.lists(st.integers(0, 4), **sized)), dtype=np.int64),
        owners=tuple(draw(st.lists(st.sampled_from("abcdefghi"), **sized))),
    )


cases = given(
    examples=examples_of(),
    kind=st.sampled_from(KINDS),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**62 - 1),
    alpha=st.sampled_from([0.001, 0.1, 0.5, 100.0]),
    per_client=st.integers(1, 4),
    data=st.data(),
)


@settings(max_examples=200, deadline=None)
@cases
def test_any_partition(examples, kind, clients, seed, alpha, per_client, data):
    """Disjoint, together all rows, repeatable, and the same texts whatever the order of the rows."""
    options = setting(kind, dirichlet_alpha=alpha, labels_per_client=per_client)
    parts = partition(examples, options, clients, seed)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in part) == list(range(len(examples)))
    assert all(part.dtype == np.int64 and list(part) == sorted(part) for part in parts)

    again = partition(examples, options, clients, seed)
    assert [part.tolist() for part in again] == [part.tolist() for part in parts]

    moved = examples.take(data.draw(st.permutations(range(len(examples)))))
    assert texts(moved, partition(moved, options, clients, seed)) == texts(examples, parts)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_other_seed_other_clients(kind):
    examples = rows([30, 30, 30, 30])
    first, second = (texts(examples, partition(examples, setting(kind), 5, seed)) for seed in (0, 1))
    assert first != second


@kinds
def test_more_clients_than_rows(kind):
    examples = rows([2, 1])
    parts = partition(examples, setting(kind), 10, 0)
    sizes = [len(part) for part in parts]
    assert len(sizes) == 10 and sum(sizes) == 3
    assert sizes.count(0) >= 7


@kinds
def test_no_rows(kind):
    empty = rows([1]).take([])
    assert [len(part) for part in partition(empty, setting(kind), 3, 0)] == [0, 0, 0]


def test_one_client_gets_all():
    examples = rows([3, 4])
    for kind in KINDS:
        assert [part.tolist() for part in partition(examples, setting(kind), 1, 0)] == [list(range(7))]


# iid


def test_iid_sizes_differ_by_one_at_most():
    assert [len(part) for part in partition(rows([10]), setting("iid"), 3, 0)] == [4, 3, 3]


def test_iid_mixes_labels():
    """300 of each of three labels over three clients: about 100 each, standard deviation 8.2; 50 is six of them."""
    examples = rows([300, 300, 300])
    counts = label_counts(examples, partition(examples, setting("iid"), 3, 0), 3)
    assert np.abs(counts - 100).max() < 50


# dirichlet


def test_dirichlet_with_huge_alpha_is_even():
    """Shares of Dir(1e8) are a quarter each within 1e-4, so 20 and 40 rows go 5 and 10 to each of four clients."""
    examples = rows([20, 40])
    parts = partition(examples, setting("dirichlet", dirichlet_alpha=1e8), 4, 0)
    assert label_counts(examples, parts, 2).tolist() == [[5, 10]] * 4


def test_dirichlet_with_tiny_alpha_gives_a_label_to_one_client():
    examples = rows([20, 40, 30])
    parts = partition(examples, setting("dirichlet", dirichlet_alpha=1e-5), 4, 0)
    counts = label_counts(examples, parts, 3)
    assert counts.max(axis=0).tolist() == [20, 40, 30]


def skew(alpha: float, seed: int) -> float:
    """Mean over labels of the largest share that one of ten clients holds; 0.1 when even, 1 at most."""
    examples = rows([60] * 8)
    counts = label_counts(examples, partition(examples, setting("dirichlet", dirichlet_alpha=alpha), 10, seed), 8)
    return float((counts.max(axis=0) / 60).mean())


def test_dirichlet_skew_falls_with_alpha():
    for seed in range(5):
        values = [skew(alpha, seed) for alpha in (0.05, 0.5, 5.0, 500.0)]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0.5 and values[-1] < 0.2


def test_dirichlet_shares_follow_the_distribution():
    """The share of one of two clients is Beta(1, 1): uniform, with mean 1/2 and standard deviation 0.289.

    Over 300 seeds the mean's own deviation is 0.017, that of the standard deviation about 0.008; both have five of them.
    """
    examples = rows([200])
    options = setting("dirichlet", dirichlet_alpha=1.0)
    values = [len(partition(examples, options, 2, seed)[0]) / 200 for seed in range(300)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.085)
    assert np.std(values) == pytest.approx(0.289, abs=0.04)


# pathological


def test_pathological_by_hand():
    """4 labels × 30 rows in 6 × 2 shards of 10: each of one label, so a client sees one or two."""
    examples = rows([30, 30, 30, 30])
    counts = label_counts(examples, partition(examples, setting("pathological"), 6, 0), 4)
    assert set(counts.ravel().tolist()) <= {0, 10, 20}
    assert counts.sum(axis=1).tolist() == [20] * 6
    assert (counts > 0).sum(axis=1).max() == 2


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    clients=st.integers(1, 8),
    per_client=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_pathological_sees_few_labels(counts, clients, per_client, seed):
    """S shards of sorted rows hold S + (labels - 1) runs of one label at most, a cut for each change of label."""
    examples = rows(counts)
    parts = partition(examples, setting("pathological", labels_per_client=per_client), clients, seed)
    seen = (label_counts(examples, parts, len(counts)) > 0).sum(axis=1)
    assert seen.sum() <= clients * per_client + len(counts) - 1
    if min(counts) >= -(-sum(counts) // (clients * per_client)):  # then a shard crosses one boundary at most
        assert seen.max() <= 2 * per_client
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= per_client  # shards differ by one row


def test_pathological_of_one_label_each():
    examples = rows([12, 12, 12])
    parts = partition(examples, setting("pathological", labels_per_client=1), 3, 0)
    assert sorted(label_counts(examples, parts, 3).tolist(), reverse=True) == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]


def test_pathological_deals_shards_at_random():
    """The first client does not always get the first labels: of ten seeds, more than three pairs of labels."""
    examples = rows([30, 30, 30, 30])
    seen = set()
    for seed in range(10):
        counts = label_counts(examples, partition(examples, setting("pathological"), 6, seed), 4)
        seen.add(tuple(np.flatnonzero(counts[0])))
    assert len(seen) > 3


# length


def test_length_by_hand():
    """Of 1 to 12 characters in 6 stretches of two: a client of one stretch has two neighbours, of two stretches two pairs."""
    examples = Examples(tuple("x" * n for n in (7, 2, 11, 4, 9, 1, 12, 5, 3, 10, 6, 8)))
    sizes = examples.sizes()
    alone = partition(examples, setting("length", labels_per_client=1), 6, 0)
    assert sorted(sorted(sizes[part].tolist()) for part in alone) == [[n, n + 1] for n in range(1, 12, 2)]
    for part in partition(examples, setting("length"), 3, 0):
        own = sorted(sizes[part].tolist())
        assert len(own) == 4 and all(own[i] % 2 == 1 and own[i + 1] == own[i] + 1 for i in (0, 2))


def test_length_counts_pairs_and_what_stands_for_the_text():
    assert Examples(("ab", "c"), pairs=("d", "efgh")).sizes().tolist() == [3, 5]
    assert Examples(("ab", "c"), identities=("a longer one", "c")).sizes().tolist() == [12, 1]


# categories, where there are no groups


def test_categories_deal_out_as_groups_do():
    by_group = rows([30, 30, 30])
    names = tuple("abc"[group] for group in by_group.groups)
    by_category = Examples(by_group.texts, categories=names)
    for kind in ("dirichlet", "pathological"):
        expected, found = (partition(examples, setting(kind), 4, 0) for examples in (by_group, by_category))
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    numbers, found_names = by_category.kinds(())
    assert found_names == ("a", "b", "c") and numbers.tolist() == by_group.groups.tolist()


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_nothing_to_go_by(kind):
    with pytest.raises(
        ConfigError, match=f"^data.partition = '{kind}': .* no label to go by, allowed are 'iid', 'length', and"
    ):
        partition(Examples(("a", "b")), setting(kind), 2, 0)


# natural


def test_natural_by_hand():
    """Owners in the order of their names, wrapped round: ann, cy and eve to client 0, bob and dan to client 1."""
    names = ("eve", "dan", "cy", "bob", "ann", "bob", "eve")
    examples = Examples(tuple(f"text {i}" for i in range(7)), np.zeros(7, dtype=np.int64), owners=names)
    parts = partition(examples, setting("natural"), 2, 0)
    assert [part.tolist() for part in parts] == [[0, 2, 4, 6], [1, 3, 5]]


@settings(max_examples=50, deadline=None)
@given(examples=examples_of(), clients=st.integers(1, 12), seed=st.integers(0, 100))
def test_natural_keeps_owners_whole(examples, clients, seed):
    holders: dict[str, set[int]] = {}
    for client, part in enumerate(partition(examples, setting("natural"), clients, seed)):
        for i in part:
            holders.setdefault(examples.owners[i], set()).add(client)
    assert all(len(clients) == 1 for clients in holders.values())
    assert len(set().union(*holders.values())) == min(clients, len(holders))


def test_natural_without_owners():
    """The docstrings have no owners: one line, before any round."""
    with pytest.raises(ConfigError, match="natural|id-column"):
        shares(setting("natural"), 0, 4)


# federation


def test_federation_of_docstrings():
    everything, labels = docstrings.load()
    dealt = federation(DEFAULT, 5)
    parts = (dealt.pool, dealt.validation, dealt.test)
    assert sum(len(part) for part in parts) == len(everything)
    assert sorted(t for part in parts for t in part.texts) == sorted(everything.texts)
    assert dealt.labels == labels
    assert len(dealt.test) == round(0.15 * len(everything))
    assert len(dealt.validation) == round(0.1 * (len(everything) - len(dealt.test)))
    assert dealt.digest == dealt.pool.digest()


def test_federation_keeps_labels_with_texts():
    everything, _ = docstrings.load()
    label_of = dict(zip(everything.texts, everything.groups.tolist(), strict=True))
    dealt = federation(DEFAULT, 5)
    for part in (dealt.pool, dealt.validation, dealt.test):
        assert [label_of[text] for text in part.texts] == part.groups.tolist()


def test_federation_depends_on_the_seed():
    assert federation(DEFAULT, 5).digest != federation(DEFAULT, 6).digest
    dealing.cache_clear()
    first = federation(DEFAULT, 5)
    dealing.cache_clear()
    assert federation(DEFAULT, 5).digest == first.digest


def test_federation_needs_a_row_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One training row leaves the server nothing to evaluate on; said at the start, by one line."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pd.DataFrame({"text": ["one", "two"], "label": ["a", "b"]}).to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(ConfigError):
        federation(DataSettings(path=str(tmp_path / "d.csv")), 0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "length"])
def test_shares_deal_out_the_pool(kind):
    parts = shares(setting(kind), 5, 20)
    assert len(parts) == 20
    assert sorted(np.concatenate(parts)) == list(range(len(federation(setting(kind), 5).pool)))


def test_at_most_so_many_rows_are_held_out():
    """Those of the smaller bound are among those of the larger, and what clients share does not depend on it."""
    bounds = [DEFAULT.model_copy(update={"validation_rows": n, "test_rows": 2 * n}) for n in (0, 50, 20)]
    everything, fifty, twenty = (federation(bound, 5) for bound in bounds)
    assert everything.digest == fifty.digest == twenty.digest
    assert (len(fifty.validation), len(fifty.test), len(twenty.validation), len(twenty.test)) == (50, 100, 20, 40)
    assert set(twenty.validation.texts) < set(fifty.validation.texts) < set(everything.validation.texts)


# a client's own held-out rows


def test_hold_out_nothing_by_default():
    examples = rows([5, 5])
    train, own = hold_out(examples, DataSettings(), 0, "client")
    assert train.texts == examples.texts and len(own) == 0


def test_hold_out_share():
    examples = rows([20, 20])
    train, own = hold_out(examples, DataSettings(client_validation=0.25), 0, "client")
    assert len(own) == 10 and len(train) == 30
    assert sorted(train.texts + own.texts) == sorted(examples.texts)
    again = hold_out(examples, DataSettings(client_validation=0.25), 0, "client")
    assert again[1].texts == own.texts


def test_hold_out_differs_by_client_and_seed():
    examples, options = rows([20, 20]), DataSettings(client_validation=0.25)
    own = {hold_out(examples, options, seed, key)[1].texts for seed, key in ((0, "a"), (0, "b"), (1, "a"))}
    assert len(own) == 3


def test_hold_out_leaves_a_row_to_train_on():
    options = DataSettings(client_validation=0.9)
    assert [len(part) for part in hold_out(rows([1]), options, 0, "a")] == [1, 0]
    assert [len(part) for part in hold_out(rows([0]), options, 0, "a")] == [0, 0]
    assert [len(part) for part in hold_out(rows([2]), options, 0, "a")] == [1, 1]
    assert [len(part) for part in hold_out(rows([10]), options, 0, "a")] == [1, 9]

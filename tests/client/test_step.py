"""A step in parts is the step of the whole batch: loss, gradients, scores, FLOPs; and needs no more memory than a part."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, TASKS, backbone, mean_loss, pairs, random_arrays, some_rows, usual
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs_helper import config, prepare, start
from test_backbone_part import work
from test_capacity import FULL, LAYERS, LENGTH, RANK, ROWS, backward_flops, calibrate, forward_flops
from test_session import PadOnly, plan
from test_tasks import Reader, rows_of_many_lengths

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.adapters.learner import Learner, cut
from fedara_flwr.client import session
from fedara_flwr.client.capacity import saved_bytes
from fedara_flwr.client.step import Spent, backward
from fedara_flwr.client.terms import find
from fedara_flwr.client.train import ClientData, batches, train
from fedara_flwr.model.ranks import RankMask, unpack_order
from fedara_flwr.strategies.base import Client
from fedara_flwr.tasks import Encoded

PARTS = ("B", "E", "A", "head")
UNLABELLED = -100


@pytest.fixture(scope="module")
def bert(tiny_models):
    return AdaptedModel(backbone(tiny_models["bert"]))


# -- cutting ------------------------------------------------------------
def test_parts_by_hand():
    """Of at most 10 tokens: 3·3 = 9, 2·5 = 10, 2·9 = 18 is too many, and 20 is alone whatever the bound is."""
    lengths = [20, 3, 2, 5, 3, 5, 9]
    order = [2, 1, 4, 3, 5, 6, 0]
    assert cut(order, lengths, 10) == [[2, 1, 4], [3, 5], [6], [0]]
    assert cut(order, lengths, 1) == [[row] for row in order]
    assert cut(order, lengths, 7 * 20) == cut(order, lengths, 0) == [order]
    assert cut(order, lengths, 7 * 20 - 1) == [order[:-1], order[-1:]]
    assert cut([], lengths, 10) == []


def cells(part, lengths):
    return len(part) * max(lengths[row] for row in part)


def fewest(order, lengths, tokens):
    """By trying every place to cut."""
    best = [0]
    for end in range(1, len(order) + 1):
        fits = [s for s in range(end) if end - s == 1 or cells(order[s:end], lengths) <= tokens]
        best.append(1 + min(best[s] for s in fits))
    return best[-1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 200))
@hypothesis_settings(max_examples=200, deadline=None)
def test_parts_keep_the_bound_and_are_as_few_as_can_be(lengths, tokens):
    order = np.argsort(lengths, kind="stable").tolist()
    found = cut(order, lengths, tokens)
    assert [row for part in found for row in part] == order
    assert all(len(part) == 1 or cells(part, lengths) <= tokens for part in found)
    assert len(found) == fewest(order, lengths, tokens)


def test_a_steps_rows_come_by_length():
    """So that its parts have little padding."""
    lengths = np.random.default_rng(0).integers(2, 60, 100).tolist()
    for order in (plan(RankMask.full([1]), steps=20), plan(RankMask.full([1]), steps=0, epochs=2)):
        for rows in batches(lengths, order.train, np.random.default_rng(1)):
            assert [lengths[i] for i in rows] == sorted(lengths[i] for i in rows)


# -- the same step ------------------------------------------------------------
def ragged(task, labelled=True):
    """Nine rows of 2 to 12 tokens; of their words every other has a tag, those of some rows have none."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 97, n).tolist() for n in (2, 3, 3, 4, 6, 7, 9, 12, 12)]
    if task.name == "classification":
        return Encoded(ids, [i % 3 for i in range(9)])
    if task.name != "token-classification":
        return some_rows(task, ids, rng)
    keep = [[labelled and row not in (0, 4, 7) and place % 2 == row % 2 for place in range(len(ids[row]))] for row in range(9)]
    return Encoded(ids, [[int(rng.integers(3)) if k else UNLABELLED for k in row] for row in keep])


def model_of(path, task, cache="off"):
    return AdaptedModel(Backbone(str(path), task, LABELS, pad_token_id=0), cache, 64)


def step(adapted, task, data, tokens, terms=(), lowest=0, watch=None):
    """Loss, gradients and what it took; every value moved since the terms were made."""
    spec = adapted.spec
    mask = RankMask.full([2 if module.block >= lowest else 0 for module in spec.modules])
    adapted.load(random_arrays(spec, mask), mask, (2.0,) * len(spec.modules), frozenset(PARTS))
    adapted.model.train(False)
    made = [find(name)(adapted, **values) for name, values in terms]
    parameters = [p for part in PARTS for p in adapted.parameters(part)]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(0.01 * (i % 3))
    spent, lengths = Spent(), [len(row) for row in data.ids]
    pieces = cut(range(len(data)), lengths, tokens)
    batches_ = [Learner(adapted, task, PadOnly()).batch(data, part) for part in pieces]
    with watch or nullcontext():
        loss = backward(Learner(adapted, task, None), batches_, made, spent)
    return loss, [p.grad for p in parameters], spent.tokens, pieces


TERMS = [("prox", {"mu": 0.5}), ("orthogonality", {"weight": 0.3})]


@pytest.mark.parametrize("terms", [[], TERMS], ids=["plain", "penalties"])
@pytest.mark.parametrize("tokens", [1, 12, 25, 60])
@pairs(["bert", "deberta-v3", "llama"])
def test_loss_and_gradients_of_parts_and_of_the_whole(tiny_models, name, task, tokens, terms):
    adapted, data = model_of(tiny_models[name], task), ragged(task)
    expected_loss, expected, whole, _ = step(adapted, task, data, 0, terms)
    loss, found, taken, cut = step(adapted, task, data, tokens, terms)
    assert len(cut) > 1 and whole == 9 * 12
    assert taken == sum(cells(part, [len(row) for row in data.ids]) for part in cut) < whole
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert len(found) == len(expected) > 4 and not loss.requires_grad
    for gradient, other in zip(found, expected, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-6 * max(1.0, float(other.abs().max())))


def test_the_loss_of_parts_by_hand():
    """Logits 0 for all three labels but the right one's a: log(e^a + 2) - a, with a = 0, 1, 2 in rows of 1, 2, 2 tagged words.

    Their mean over five words is (1·l0 + 2·l1 + 2·l2) / 5, over three rows (l0 + l1 + l2) / 3; both lie apart.
    """
    losses = [np.log(np.exp(a) + 2) - a for a in range(3)]
    ids, words = [[5], [5, 5, 5], [5, 5, 5]], [[1], [1, 1, UNLABELLED], [UNLABELLED, 1, 1]]

    class Fixed:
        """The logits of row r, told by its one `labels`, are r for label 1."""

        device = torch.device("cpu")

        def __init__(self, tokens):
            self.weight, self.tokens, self.calls = torch.ones((), requires_grad=True), tokens, 0

        def below(self, batch):
            return None

        def outputs(self, batch, below):
            values = torch.zeros(*batch["input_ids"].shape, 3)
            values[..., 1] = self.calls
            self.calls += 1
            return SimpleNamespace(logits=self.weight * (values if self.tokens else values[:, 0]))

    for name, labels, expected in (
        ("token-classification", words, (losses[0] + 2 * losses[1] + 2 * losses[2]) / 5),
        ("classification", [1, 1, 1], sum(losses) / 3),
    ):
        task = TASKS[name]
        one_by_one = [task.collate(PadOnly(), [row], [label]) for row, label in zip(ids, labels, strict=True)]
        spent = Spent()
        loss = backward(Learner(Fixed(name != "classification"), task, None), one_by_one, [], spent)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert spent.tokens == 1 + 3 + 3


def test_a_batch_without_any_tag_has_no_loss_and_no_gradient(tiny_models):
    task = TASKS["token-classification"]
    adapted, data = model_of(tiny_models["bert"], task), ragged(task, labelled=False)
    for tokens in (0, 12):
        loss, found, _, _ = step(adapted, task, data, tokens)
        assert float(loss) == 0 and all(not gradient.any() for gradient in found)


def test_parts_of_kept_states(tiny_models):
    """Above a frozen prefix."""
    task = TASKS["classification"]
    data, (plain, kept) = ragged(task), (model_of(tiny_models["bert"], task, cache) for cache in ("off", "exact"))
    expected_loss, expected, _, _ = step(plain, task, data, 0, lowest=2)
    loss, found, _, _ = step(kept, task, data, 25, lowest=2)
    assert kept._prefix.nbytes
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-6)


# -- memory ------------------------------------------------------------
class Live:
    """Bytes that autograd holds, now and at most: each storage once for as long as something saved is in it."""

    def __init__(self, model):
        self.model, self.own, self.held, self.most = model, set(), {}, 0

    @contextmanager
    def watch(self):
        self.own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor):
            yield

    def pack(self, tensor):
        live, storage = self, tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()

        class Saved:
            def __init__(self):
                self.tensor = tensor
                live.held.setdefault(address, [0, nbytes])[0] += 1
                live.most = max(live.most, sum(size for count, size in live.held.values() if count))

            def __del__(self):
                live.held[address][0] -= 1
                if not live.held[address][0]:
                    del live.held[address]

        return Saved() if address not in self.own else SimpleNamespace(tensor=tensor)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_autograd_never_holds_more_than_the_largest_part_needs(tiny_models, task):
    """Nine rows of up to 12 tokens in parts of 25 at most: 24 tokens in the largest against 108 in the whole."""
    adapted, data = model_of(tiny_models[usual(task)], task), ragged(task)
    lengths = [len(row) for row in data.ids]

    def most(tokens):
        live = Live(adapted.model)
        cut = step(adapted, task, data, tokens, watch=live.watch())[3]
        assert not live.held
        return live.most, cut

    alone = []
    (found, cut), (whole, _) = most(25), most(0)
    for part in cut:
        learner = Learner(adapted, task, PadOnly())
        batch = learner.batch(data, part)
        with saved_bytes(adapted.model) as kept:
            loss = mean_loss(task, task.outputs(learner, batch), batch)
        alone.append(sum(kept.values()))
        del loss
    assert max(cells(part, lengths) for part in cut) == 24 and len(cut) > 2
    assert found <= 1.05 * max(alone), "the weight of a part's loss is all that comes on top"
    assert found < 0.35 * whole


# -- a round ------------------------------------------------------------
def client_of(lengths):
    rng = np.random.default_rng(3)
    ids = [rng.integers(5, 97, n).tolist() for n in lengths]
    return ClientData(Encoded(ids, rng.integers(0, 3, len(ids)).tolist()), Encoded(ids[:5], [0, 1, 2, 0, 1]))


def votes(update, mask):
    return unpack_order(update.reports["slot-vote"], mask.count).astype(int)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.05},
        {"terms": {"prox": {"mu": 0.5}, "orthogonality": {"weight": 0.1}}},
        {"vote": {"budget": 5.0, "importance": "magnitude"}},
    ],
)
def test_a_round_in_parts(tiny_models, changes):
    """Arrays and the order of all slots by their score; clipping sees the norm of the whole, or it would cut each part's."""
    adapted, data = AdaptedModel(backbone(tiny_models["bert"])), client_of([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    mask = RankMask.full([RANK] * 18)
    arrays = random_arrays(adapted.spec, mask)
    found = []
    for tokens in (0, 26):
        orders = plan(mask, dropout=False, evaluate=True, batch_size=6, batch_tokens=tokens, **changes)
        found.append(train(Learner(adapted, TASKS["classification"], PadOnly()), data, orders, arrays, "1"))
    whole, cut = found
    for part in whole.arrays:
        assert np.abs(whole.arrays[part] - arrays[part]).max() > 5e-3
        np.testing.assert_allclose(cut.arrays[part], whole.arrays[part], atol=1e-4)
    # scores that differ by less than rounding may change places
    assert np.abs(votes(cut, mask) - votes(whole, mask)).max() <= 1
    for name in ("loss", "loss-last", "eval-loss", "eval-accuracy"):
        assert cut.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4)
    assert cut.metrics["steps"] == whole.metrics["steps"] == 3


def test_tokens_of_a_round_by_hand(tiny_models):
    """Rows of 2, 3, 4, 10 in one batch: padded 4·10 = 40; in parts of 12, 3·4 + 10 = 22; in parts of 1, 2 + 3 + 4 + 10."""
    adapted, data = AdaptedModel(backbone(tiny_models["bert"])), client_of([10, 3, 4, 2])
    mask = RankMask.full([RANK] * 18)
    arrays = random_arrays(adapted.spec, mask)
    for tokens, expected in ((0, 40), (40, 40), (39, 22), (12, 22), (1, 19)):
        orders = plan(mask, steps=2, batch_tokens=tokens)
        update = train(Learner(adapted, TASKS["classification"], PadOnly()), data, orders, arrays, "1")
        assert update.metrics["tokens"] == 2 * expected


def test_only_drawn_positions_change_in_parts_too(tiny_models):
    """Gradient masks see the whole step."""
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    whole, cut = (work(adapted, "slora", dropout=False, batch_tokens=tokens) for tokens in (0, 9))
    assert cut.metrics["tokens"] < whole.metrics["tokens"]
    close = np.isclose(cut.arrays["backbone"], whole.arrays["backbone"], atol=1e-4)
    assert close.mean() > 0.95, "Adam's first step is the sign of a gradient that may be rounding alone"


@pytest.mark.parametrize("tokens", [LENGTH, 2 * LENGTH, 3 * LENGTH])
def test_flops_are_those_of_the_whole_step(bert, tokens):
    """All rows have LENGTH tokens, so parts add up to the formula of the whole, and three steps to three times that."""
    rows = np.random.default_rng(0).integers(5, 97, (12, LENGTH)).tolist()
    data = ClientData(Encoded(rows, [0, 1, 2] * 4), Encoded([], []))
    trained = frozenset({"B", "A", "head"})
    orders = plan(FULL, batch_size=ROWS, batch_tokens=tokens, dropout=False, vote=None, sent=trained)
    arrays = random_arrays(bert.spec, FULL)
    metrics = train(Learner(bert, TASKS["classification"], PadOnly()), data, orders, arrays, "1", simulated=True).metrics
    assert metrics["flops-forward"] == pytest.approx(3 * forward_flops(LAYERS))
    assert metrics["flops-backward"] == pytest.approx(3 * backward_flops(LAYERS))
    assert metrics["tokens"] == 3 * ROWS * LENGTH


def test_calibration_in_parts(bert):
    """The FLOPs of the whole step, and bytes of half of it: two rows of four at once."""
    whole, cut = (calibrate(bert, tokens=tokens) for tokens in (0, 2 * LENGTH))
    for name in ("flops-forward", "flops-backward", "blocks"):
        assert cut[name] == whole[name]
    trained = 12 * sum(RANK * (module.d_in + module.d_out) for module in bert.spec.modules)
    kept = [LAYERS * found["bytes-block"] - trained for found in (cut, whole)]
    assert 0.45 < kept[0] / kept[1] < 0.65


# -- evaluation and whole runs ------------------------------------------------------------
def test_predict_in_parts():
    plain = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])
    ids, labels = rows_of_many_lengths(75)
    reader = Reader()
    assert Learner(reader, TASKS["classification"], plain).evaluate(Encoded(ids, labels), 100)["accuracy"] == 1
    assert max(rows * longest for rows, longest in reader.shapes) <= 100 and sum(rows for rows, _ in reader.shapes) == 75
    assert max(rows for rows, _ in reader.shapes) <= 32


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_evaluation_in_parts(tiny_models, task):
    adapted, data = model_of(tiny_models[usual(task)], task), ragged(task)
    step(adapted, task, data, 0)
    assert Learner(adapted, task, PadOnly()).evaluate(data, 20) == pytest.approx(
        Learner(adapted, task, PadOnly()).evaluate(data), rel=1e-5
    )


def test_a_run_in_parts(tiny_bert, monkeypatch):
    """Clients, their evaluation, the server's and LEGEND's calibration; no batch is larger than the bound."""
    seen = []
    real = AdaptedModel.outputs
    monkeypatch.setattr(AdaptedModel, "outputs", lambda self, batch, *rest: seen.append(batch) or real(self, batch, *rest))
    changes = {"method": "legend", "num_server_rounds": 2, "data__client_validation": 0.3}
    changes |= {"train__batch_size": 8}
    losses, largest = [], []
    for tokens in (0, 40):
        seen.clear()
        session._resident.clear()
        strategy = start(config(tiny_bert, train__batch_tokens=tokens, **changes))
        losses.append([line["loss"] for line in strategy.lines if line["type"] == "client"])
        largest.append(max(batch["input_ids"].numel() for batch in seen))
    assert largest[0] == 32 * 16 and largest[1] <= 40
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_plan_carries_the_bound(tiny_bert):
    loop, _ = prepare(config(tiny_bert, train__batch_tokens=77))
    assert loop.method.plan(loop.state, Client("0")).train.batch_tokens == 77

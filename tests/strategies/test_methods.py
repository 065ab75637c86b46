"""Every registered method, two rounds in-process on a tiny model: what all of them must keep, whatever they do."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs_helper import ShuffledGrid, config, prepare

from fedara_flwr import strategies
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.deltas import Weights
from fedara_flwr.model.parts import SLOT_PARTS
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server import loop as rounds
from fedara_flwr.wire.plan import Update

METHODS = sorted(strategies.built_in())
every_method = pytest.mark.parametrize("method", METHODS)
EXACT = ("float32", "float32")
OPTIONS = dict.fromkeys(("hetlora", "flexlora", "flora", "fedex-lora"), "ranks = [1, 2, 4]") | {"slora": "sparse-rounds = 0.5"}
STOCK = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
from peft import PeftModel
base, ids, folders = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), sys.argv[3:]
for folder in folders:
    if folder.endswith("/adapter"):
        model = PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=12), folder)
    else:
        model = Auto.from_pretrained(folder)
    with torch.no_grad():
        print("LOGITS", json.dumps(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
assert not any(name.startswith("fedara") for name in sys.modules)
"""


def flat(tiny_bert, method, wire=EXACT):
    rounds = {"num_server_rounds": 2, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}
    formats = {"wire__down": wire[0], "wire__up": wire[1]}
    return config(tiny_bert, method=method, strategy__options=OPTIONS.get(method, ""), **rounds, **formats)


def logits(model, weights):
    model.load(weights)
    ids = torch.arange(5, 19).view(2, 7)
    with torch.no_grad():
        return model.adapted.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits.numpy()


def bytes_in(form, spec, part, mask, entries):
    """32, 16, 8 or 4 bits a number, and for the last two 4 bytes a row."""
    size, rows = spec.length(part, mask, entries), len(spec.row_lengths(part, mask, entries))
    return {"float32": 4 * size, "float16": 2 * size, "int8": size + 4 * rows, "int4": (size + 1) // 2 + 4 * rows}[form]


def pieces_in(content):
    """Bytes of the numbers of the delta's pieces in a message."""
    pieces = [record for name, record in content.array_records.items() if name != "arrays"]
    return sum(len(array.data) - 128 for piece in pieces for array in piece.values())


class Spied:
    """A finished run with what it sent and merged, by round and client."""

    def __init__(self, tiny_bert, method, grid_class=InProcessGrid, wire=EXACT):
        self.loop, grid = prepare(flat(tiny_bert, method, wire), grid_class)
        loop, self.plans, self.updates, self.fetched = self.loop, {}, {}, {}
        self.own = dict(vars(loop.method))
        self.own_copied = {name: deepcopy(value) for name, value in self.own.items() if name != "model"}
        self.start = loop.method.weights(loop.state)
        make = rounds.merger_of

        def spied_merger(method, state, settings, plans, planned):
            merger, work = make(method, state, settings, plans, planned), loop.work
            add = merger.add
            for node, plan, message in zip(work.asked, plans, work.messages, strict=True):
                key = work.number, node.key
                self.plans[key], self.fetched[key] = plan, pieces_in(message.content)

            def spied_add(key, update, weight):
                self.updates[work.number, key] = update
                add(key, update, weight)

            merger.add = spied_add
            return merger

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounds, "merger_of", spied_merger)
            loop.start(grid, loop.initial_arrays(), 2)


@pytest.fixture(scope="module")
def runs(tiny_bert):
    found = {}

    def run(method, wire=EXACT):
        if (method, wire) not in found:
            found[method, wire] = Spied(tiny_bert, method, wire=wire)
        return found[method, wire]

    return run


@every_method
def test_starts_as_the_backbone(runs, method):
    """Adapters, deltas and backbone differences cancel or are zero: the head on the pre-trained model."""
    run = runs(method)
    empty, model = RankMask.full([0] * len(run.loop.spec.modules)), run.loop.method.model
    bare = Weights({"head": run.start.arrays["head"]}, empty, run.start.scales)
    np.testing.assert_allclose(logits(model, run.start), logits(model, bare), atol=2e-6)


@every_method
def test_learns_something_finite_from_every_reply(runs, method):
    run = runs(method)
    state, model = run.loop.state, run.loop.method.model
    assert state.server_round == 2 and len(run.updates) == 6
    assert all(np.isfinite(vector).all() for vector in state.arrays.values())
    change = logits(model, run.loop.method.weights(state)) - logits(model, run.start)
    assert np.isfinite(change).all() and np.abs(change).max() > 1e-5


@every_method
@pytest.mark.parametrize("wire", [EXACT, ("int8", "int4"), ("int4", "float16")], ids="-".join)
def test_bytes_follow_the_formula(runs, method, wire):
    """What a format takes for what the plan carries and the update holds; 4 bytes for each number of pieces that were sent.

    Values of a head go down in eight bits where the others do in four.
    """
    run, (down_form, up_form) = runs(method, wire), wire
    down_forms = {"head": "int8"} if down_form == "int4" else {}
    spec = run.loop.spec
    lines = [line for line in run.loop.lines if line["type"] == "client"]
    assert len(lines) == 6
    for line in lines:
        key = line["round"], line["client"]
        plan, update = run.plans[key], run.updates[key]
        down = {part: bytes_in(down_forms.get(part, down_form), spec, part, plan.mask, plan.entries) for part in plan.carries}
        up = {part: bytes_in(up_form, spec, part, update.mask, plan.entries) for part in update.arrays}
        parts = (*SLOT_PARTS, "head", "backbone")
        assert {p: line["bytes-down"].get(p, 0) for p in parts} == {p: down.get(p, 0) for p in parts}
        assert {p: line["bytes-up"].get(p, 0) for p in parts} == {p: up.get(p, 0) for p in parts}
        assert line["bytes-down"].get("delta", 0) == run.fetched[key]
        assert set(update.arrays) == {p for p in plan.sent if p not in SLOT_PARTS or update.mask.count}
        assert wire == EXACT or 0 < line["coding-error"] < 0.3
    first = next(line for line in run.loop.lines if line["type"] == "round")
    assert wire == EXACT or (0 < first["coding-error"] < 0.3 and 0 < first["client-coding-error"] < 0.3)
    assert all(np.isfinite(vector).all() for vector in run.loop.state.arrays.values())


@every_method
def test_order_of_replies_is_irrelevant(runs, tiny_bert, method):
    first, second = runs(method), Spied(tiny_bert, method, ShuffledGrid)
    one, two = first.loop.state, second.loop.state
    assert one.mask == two.mask and one.bytes_total == two.bytes_total
    assert one.arrays.keys() == two.arrays.keys()
    assert all(np.array_equal(one.arrays[part], two.arrays[part]) for part in one.arrays)
    pieces = [state.delta.composed() for state in (one, two)]
    assert (pieces[0] and pieces[0].digest) == (pieces[1] and pieces[1].digest)


def test_what_is_left_loads_in_stock_peft_or_transformers(runs, tiny_bert, tmp_path):
    """One fresh process without this package loads them all; where the backbone changed it is a whole model."""
    expected, folders = {}, {}
    for method in METHODS:
        loop = runs(method).loop
        model = loop.method.model
        expected[method] = logits(model, loop.method.weights(loop.state))
        folders[method] = model.export(tmp_path / method, loop.method.exported(loop.state))
    whole = {method for method, folder in folders.items() if folder.name == "model"}
    assert whole == {"head", "full", "flora", "fedex-lora"}
    ids = json.dumps(torch.arange(5, 19).view(2, 7).tolist())
    arguments = [sys.executable, "-c", STOCK, str(tiny_bert), ids, *map(str, folders.values())]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("LOGITS")]
    for method, values in zip(folders, found, strict=True):
        np.testing.assert_allclose(np.array(values), expected[method], atol=5e-6, err_msg=method)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("head", "full", "slora")])
def test_a_client_without_a_layer_does_not_change_it(runs, method):
    """Two clients, the second owns nothing of module 0: what it sends makes no difference there.

    Where clients of unequal rank are padded with zeros or summed, its absence counts as zero, but never its values.
    """
    loop = runs(method).loop
    spec, mask = loop.spec, loop.state.mask
    rng = np.random.default_rng(0)
    trained = loop.method.parts

    def update(mask, scale):
        values = {p: (scale * rng.normal(size=spec.length(p, mask))).astype(np.float32) for p in trained}
        return Update(values, mask, 5, {})

    bits = mask.bits.copy()
    bits[mask.modules == 0] = False
    first, absent = update(mask, 1.0), RankMask(mask.ranks, bits)
    second = update(absent, 1.0)
    third = replace(second, arrays={p: -v if p != "head" else v for p, v in second.arrays.items()})  # the same norm
    results = []
    for other in (second, third):
        merger = rounds.merger_of(loop.method, loop.state, loop.settings, [], 0)
        merger.add("a", first, 5)
        merger.add("b", other, 5)
        merged = merger.result()
        results.append({p: merged[p][: spec.widths(p)[0] * mask.alive[0]] for p in ("B", "A")})
    for part in ("B", "A"):
        np.testing.assert_allclose(results[0][part], results[1][part], atol=1e-6)


@every_method
def test_a_method_has_no_state_of_its_own(runs, method):
    """What changes from round to round is in the State that its hooks are given: after a run it holds what it held before."""
    run = runs(method)
    now = vars(run.loop.method)
    assert set(now) == {"settings", "model", "spec", "options", "parts"} == set(run.own)
    assert all(now[name] is value for name, value in run.own.items())
    assert all(now[name] == value for name, value in run.own_copied.items())


@every_method
def test_says_what_it_is(method):
    cls = strategies.find(method)
    assert cls.title and len(cls.title) < 100 and cls.__module__.startswith("fedara_flwr.strategies.")
    assert cls.paper.startswith("arXiv") or method == "head"

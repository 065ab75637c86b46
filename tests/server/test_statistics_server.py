"""The head before round 1 in whole runs: what it equals, who may not tell, what is counted, and going on from there."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import DECODER, MINILM
from data_helper import statistics_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from runs_helper import CLIENTS, WALL_CLOCK, ShuffledGrid, config, exported, prepare, start, stopped_in_round, written
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, LlamaConfig

from fedara_flwr import engine
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.adapters.features import features
from fedara_flwr.data.federation import shares
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.statistics import FAR, merge, solve, temperature
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.server.loop import RunFailed
from fedara_flwr.strategies.base import Client
from fedara_flwr.training import DRAWN_HEAD, SOLVED_HEAD

UNCAPPED = {"strategy__weight_cap": 0.0}
CLOSE = 1e-5  # sums travel in float32, and solving multiplies what they lose
LABELS = ("amber", "blue", "cyan", "green", "pink", "red", "tan", "white")


def save(path, network):
    """The network with MiniLM's tokenizer, and data beside it."""
    network.save_pretrained(path)
    load_tokenizer(MINILM).save_pretrained(path)
    rng, rows = np.random.default_rng(0), ["text,label"]
    for i in range(560):
        label, other = rng.choice(LABELS, 2)
        rows.append(f"{label} {'thing ' * (i % 5)}{other if i % 3 == 0 else ''} number {i},{label}")
    (path / "data.csv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny BERT whose weights are large enough for features that differ; a fresh one has nearly equal ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(load_tokenizer(MINILM))
    return save(
        tmp_path_factory.mktemp("tiny") / "bert",
        AutoModel.from_config(BertConfig(vocab_size=vocabulary, initializer_range=0.3, max_position_embeddings=64, **sizes)),
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = DECODER | {"vocab_size": len(load_tokenizer(MINILM)), "initializer_range": 0.3}
    return save(tmp_path_factory.mktemp("tiny") / "llama", AutoModel.from_config(LlamaConfig(**sizes)))


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory):
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def said():
    """Lines of the package's log as they come, whoever else has it shown."""
    lines, logger = [], logging.getLogger("fedara_flwr")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def flat(model, **changes):
    data = {"data__path": str(model / "data.csv"), "data__test": 0.2, "data__validation": 0.2}
    return config(model, **{"head__start": "statistics", **data, **changes})


def begun(flat, grid_class=InProcessGrid, change=lambda grid: None, rounds=0, **options):
    """A loop whose head is solved, where that can be, and evaluated, and that did so many rounds."""
    loop, grid = prepare(flat, grid_class, **options)
    change(grid)
    with nullcontext() if rounds else suppress(RunFailed):  # without a round, a head that is not solved ends the run
        loop.start(grid, loop.initial_arrays(), rounds)
    return loop


def start_of(loop):
    (line,) = [line for line in loop.lines if line["type"] == "start"]
    return line


def head(loop):
    return loop.state.arrays["head"]


def drawn(loop):
    return drawn_head(loop.spec, loop.settings.seed)


def told(loop, scatter=True, cap=np.inf):
    """Statistics of every client, made here from the rows that it is dealt."""
    model, settings = loop.method.model, loop.settings
    pool, found = model.federation.pool, {}
    for key, rows in enumerate(shares(settings.data, settings.seed, model.task, CLIENTS)):
        data = model.learner.encode(pool.take(rows), settings.data.max_length)
        parts = list(features(model.learner, data, drawn(loop)))
        entered, classes = (np.concatenate([getattr(one, name) for one in parts]) for name in ("features", "classes"))
        one = statistics_of(entered, classes, len(model.labels), scatter)
        found[str(key)] = one.weighted(min(1.0, cap / len(rows)))
    return found


def solved(loop, statistics, far=20.0):
    """The head that these statistics give, packed."""
    places = loop.method.model.places()
    weights, biases, _ = solve(merge(statistics, far), places.bias is not None)
    factor = temperature(places.features @ weights.T + biases, places.classes, places.bias is not None)
    packed = drawn(loop).astype(np.float64)
    packed[places.weight] = (factor * weights).ravel()
    if places.bias is not None:
        packed[places.bias] = factor * biases
    return packed


def apart(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def evaluated(loop, packed):
    state = replace(loop.state, arrays=loop.state.arrays | {"head": packed.astype(np.float32)})
    return loop.method.model.evaluate(loop.method.weights(state))


class Answers(InProcessGrid):
    """Replies to the question for sums pass through `tamper(client's number, reply) -> reply`; what is asked is counted."""

    def __init__(self, *args, tamper=lambda number, reply: reply, **options):
        super().__init__(*args, **options)
        self.tamper, self.asked = tamper, Counter()

    def _call(self, message):
        reply, kind = super()._call(message), message.metadata.message_type
        self.asked[kind] += 1
        return self.tamper(message.metadata.dst_node_id - 1000, reply) if kind == "query.statistics" else reply


def silenced(*numbers, **more):
    """A change of the grid: these nodes tell no sums."""

    def change(grid):
        for number in numbers:
            grid.contexts[1000 + number].node_config.update(more or {"statistics": False})

    return change


# -- what it equals -------------------------------------------------------------------------------------------------
def test_it_is_the_head_of_all_rows_in_one_place(model):
    loop = begun(flat(model, **UNCAPPED))
    parts = told(loop)
    pooled = sum(one.counts for one in parts.values())
    expected = solved(loop, parts)
    assert apart(head(loop), expected) < CLOSE
    line = start_of(loop)
    assert line["head"]["rows"] == pooled.sum() and line["head"]["clients"] == line["good"] == CLIENTS
    np.testing.assert_allclose(line["head"]["shares"], pooled / pooled.sum())
    assert 0 < line["head"]["shrinkage"] < 1 and 0 < line["head"]["temperature"] <= 1
    scores = evaluated(loop, expected)
    assert line["accuracy"] == scores["accuracy"] and line["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    random = evaluated(loop, drawn(loop))
    assert line["loss"] < random["loss"] and line["accuracy"] > random["accuracy"]


def test_all_rows_under_one_client_give_the_same(model):
    """Skew costs nothing: however the rows are dealt, the covariance within classes and the means are theirs."""
    loop = begun(flat(model, **UNCAPPED))
    even = begun(flat(model, data__partition="iid", **UNCAPPED))
    assert apart(head(even), head(loop)) < CLOSE


def test_of_means_alone(model):
    loop = begun(flat(model, head__start="means", **UNCAPPED))
    assert apart(head(loop), solved(loop, told(loop, scatter=False))) < CLOSE
    assert start_of(loop)["head"]["start"] == "means"
    whole = begun(flat(model, **UNCAPPED))
    up = [start_of(one)["bytes"]["up.statistics"] for one in (loop, whole)]
    assert up[1] - up[0] == CLIENTS * 4 * 16 * 17 // 2


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_the_bits_do_not_depend_on_who_answers_first(model, form):
    changes = {"wire__up": form}
    expected = head(begun(flat(model, **changes)))
    for seed in (1, 2):
        assert np.array_equal(head(begun(flat(model, **changes), ShuffledGrid, seed=seed)), expected)


@pytest.mark.parametrize("method", ["fedlora", "full", "head", "federa"])
def test_it_is_the_same_for_every_method(model, method):
    ours, theirs = begun(flat(model)), begun(flat(model, method=method))
    assert np.array_equal(head(ours), head(theirs))
    assert start_of(theirs)["loss"] == pytest.approx(start_of(ours)["loss"], rel=1e-4)
    assert start_of(theirs)["bytes"]["up"] == start_of(ours)["bytes"]["up"]


@pytest.mark.parametrize("cap", [1.0, 1.2])
def test_no_client_weighs_more_than_the_cap(model, cap):
    loop = begun(flat(model, strategy__weight_cap=cap))
    examples = sorted(loop.roster.examples.values())
    most = cap * examples[(len(examples) - 1) // 2]
    assert examples[-1] > most, "no client is above the cap"
    assert start_of(loop)["head"]["rows"] == pytest.approx(sum(min(n, most) for n in examples))
    assert apart(head(loop), solved(loop, told(loop, cap=most))) < CLOSE
    assert apart(head(loop), head(begun(flat(model, **UNCAPPED)))) > 1e-3


def test_in_eight_bits_it_is_nearly_the_same(model):
    exact, coarse, four = (begun(flat(model, wire__up=form, **UNCAPPED)) for form in ("float32", "int8", "int4"))
    assert 1e-6 < apart(head(coarse), head(exact)) < 0.5
    assert start_of(coarse)["accuracy"] > start_of(exact)["accuracy"] - 0.1
    assert start_of(coarse)["bytes"]["up.statistics"] < 0.5 * start_of(exact)["bytes"]["up.statistics"]
    assert np.array_equal(head(four), head(coarse))  # sums never travel in four bits


def test_of_a_decoder_whose_layer_has_no_bias(decoder):
    loop = begun(flat(decoder, **UNCAPPED))
    assert len(head(loop)) == 16 * len(LABELS)
    assert apart(head(loop), solved(loop, told(loop))) < CLOSE
    assert start_of(loop)["accuracy"] == evaluated(loop, solved(loop, told(loop)))["accuracy"]
    assert start_of(loop)["loss"] < evaluated(loop, drawn(loop))["loss"]


def test_the_layers_before_the_last_stay_as_they_were_drawn(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(load_tokenizer(MINILM)),
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 1,
        "n_heads": 2,
        "initializer_range": 0.3,
    }
    path = save(tmp_path / "distilbert", AutoModel.from_config(DistilBertConfig(**sizes)))
    loop = begun(flat(path, **UNCAPPED))
    places = loop.method.model.places()
    last = set(range(places.weight.start, places.weight.stop)) | set(range(places.bias.start, places.bias.stop))
    changed = set(np.flatnonzero(head(loop) != drawn(loop)).tolist())
    assert len(last) == 17 * len(LABELS) < len(head(loop)) and changed <= last and len(changed) > 0.9 * len(last)
    assert apart(head(loop), solved(loop, told(loop))) < 0.01  # a head of N(0, 0.02²) before it: features are nearly equal


def tagged(path):
    rng, rows = np.random.default_rng(0), []
    for i in range(150):
        tags = [["O", "B-PER", "B-LOC"][rng.integers(3)] for _ in range(rng.integers(2, 6))]
        rows.append({"text": [f"{tag[2:] or 'word'}{i % 9}" for tag in tags], "label": tags})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__task": "token-classification", "data__path": str(path)}


def test_of_tags_every_word_counts(model, tmp_path):
    loop = begun(flat(model, **tagged(tmp_path / "tags.jsonl"), **UNCAPPED))
    words = sum(one.rows for one in told(loop).values())
    assert start_of(loop)["head"]["rows"] == words > sum(loop.roster.examples.values())
    assert apart(head(loop), solved(loop, told(loop))) < CLOSE
    capped = begun(flat(model, **tagged(tmp_path / "tags.jsonl"), strategy__weight_cap=1.0))
    assert start_of(capped)["head"]["rows"] < words


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_a_task_without_classes_has_a_drawn_head_and_a_line_says_so(model, tmp_path, said, task):
    label = {"regression": lambda i: i / 7, "multi-label": lambda i: ["a", "b"][: i % 3]}[task]
    rows = [{"text": f"text number {i}", "label": label(i)} for i in range(150)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data__task": task, "data__path": str(tmp_path / "d.jsonl"), "data__partition": "iid"}
    loop = begun(flat(model, **data))
    assert np.array_equal(head(loop), drawn(loop)) and not loop.state.solved and "head" not in start_of(loop)
    assert f"head.start = 'statistics': data.task = {task!r} has no classes, its head is drawn" in said


def test_the_head_of_a_finished_checkpoint(model, tmp_path, said):
    """Its last layer is solved anew; where that cannot be, it stays the checkpoint's."""
    names = dict(enumerate(LABELS))
    finished = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(LABELS), id2label=names)
    save(tmp_path, finished)
    loop = begun(flat(tmp_path))
    assert loop.state.solved and not np.array_equal(head(loop), drawn(loop))
    weights = torch.cat([finished.classifier.weight.flatten(), finished.classifier.bias]).detach().numpy()
    assert np.array_equal(drawn(loop), weights)
    loop = begun(flat(tmp_path, strategy__min_replies=CLIENTS + 1))
    assert np.array_equal(head(loop), drawn(loop)) and any(line.endswith("are needed; it is the checkpoint's") for line in said)


def test_a_model_of_which_nothing_can_be_solved_has_a_drawn_head_and_a_line_says_so(model, monkeypatch, said):
    loop, grid = prepare(flat(model), Answers)
    monkeypatch.setattr(type(loop.method.model.backbone), "last_linear", "")
    loop.start(grid, loop.initial_arrays(), 1)
    assert np.array_equal(drawn(loop), drawn_head(loop.spec, loop.settings.seed)) and not loop.state.solved
    assert any(
        line.endswith("has no linear layer with an output for each label, allowed is 'random'; it is drawn") for line in said
    )
    assert not grid.asked["query.statistics"] and loop.state.server_round == 1


def test_a_random_head_asks_nobody(model):
    loop, grid = prepare(flat(model, head__start="random"), Answers)
    with pytest.raises(RunFailed):
        loop.start(grid, loop.initial_arrays(), 0)
    assert np.array_equal(head(loop), drawn(loop)) and not grid.asked and start_of(loop)["sampled"] == []
    assert start_of(loop)["bytes-total"] == 0


# -- who tells ------------------------------------------------------------------------------------------------------
def test_so_many_clients_are_asked(model):
    loop, grid = prepare(flat(model, head__clients=2, **UNCAPPED), Answers)
    loop.start(grid, loop.initial_arrays(), 0)
    line = start_of(loop)
    assert grid.asked["query.statistics"] == grid.asked["query.ready"] == line["good"] == line["head"]["clients"] == 2
    parts = told(loop)
    assert apart(head(loop), solved(loop, {key: parts[key] for key in line["sampled"]})) < CLOSE
    again = begun(flat(model, head__clients=2, **UNCAPPED), ShuffledGrid)
    assert start_of(again)["sampled"] == line["sampled"] and np.array_equal(head(again), head(loop))
    other = begun(flat(model, head__clients=99, **UNCAPPED))
    assert start_of(other)["good"] == CLIENTS


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"statistics": False}, "node-config statistics"),
        ({"update-clip": 1.5}, "node-config update-clip"),
        ({"busy-when": "true"}, "busy"),
    ],
    ids=str,
)
def test_a_node_that_does_not_tell_is_left_out_with_a_line(model, said, settings, why):
    expected = told(begun(flat(model, **UNCAPPED)))
    loop = begun(flat(model, **UNCAPPED), change=silenced(1, **settings), rounds=1)
    del expected["1"]
    assert start_of(loop)["head"]["clients"] == CLIENTS - 1
    packed = [line for line in said if line.startswith("client 1 tells no sums for the head: refused: ")]
    if why == "busy":  # it is not even asked
        assert not packed and "1" not in start_of(loop)["sampled"]
    else:
        assert len(packed) == 1 and packed[0].endswith(why) and "1" in start_of(loop)["sampled"]
    assert loop.state.server_round == 1 and loop.lines[-1]["type"] in ("round", "client")
    start_only = begun(flat(model, **UNCAPPED), change=silenced(1, **settings))
    assert apart(head(start_only), solved(start_only, expected)) < CLOSE


def test_a_node_with_its_metrics_held_back_tells_all_the_same(model):
    loop = begun(flat(model), change=silenced(1, metrics=""))
    assert start_of(loop)["head"]["clients"] == CLIENTS
    assert np.array_equal(head(loop), head(begun(flat(model))))


def record(reply):
    return reply.content.array_records["sums"]


def numbers(name, change):
    def fault(reply):
        array = record(reply)[name]
        values = np.frombuffer(array.data[128:], dtype=array.dtype).copy()
        record(reply)[name] = Array(np.ascontiguousarray(change(values)))

    return fault


def replaced(content):
    def fault(reply):
        reply.content.clear()
        reply.content.update(content)

    return fault


def metric(**values):
    def fault(reply):
        for name, value in values.items():
            reply.content["metrics"][name.replace("_", "-")] = value

    return fault


RUBBISH = {
    "empty": (replaced(RecordDict({})), "records"),
    "another answer": (replaced(RecordDict({"ready": ConfigRecord({"busy": "x"})})), "records"),
    "an empty record": (replaced(RecordDict({"sums": ArrayRecord({})})), "parts"),
    "no metrics": (lambda reply: reply.content.pop("metrics"), "num-examples"),
    "many examples": (metric(num_examples=10**9), "num-examples"),
    "no examples": (metric(num_examples=0), "num-examples"),
    "examples as text": (lambda reply: reply.content.update({"metrics": ConfigRecord({"num-examples": "3"})}), "num-examples"),
    "nan metric": (metric(tokens=float("nan")), "not-finite"),
    "list metric": (metric(tokens=[1.0]), "metrics"),
    "many metrics": (metric(**{f"m{i}": 1.0 for i in range(500)}), "metrics"),
    "many rows": (numbers("counts", lambda v: v + 10**6), "counts"),
    "negative rows": (numbers("counts", lambda v: -v), "counts"),
    "nan means": (numbers("means", lambda v: v * np.nan), "not-finite"),
    "far means": (numbers("means", lambda v: v * 0 + 1e7), "means"),
    "short means": (numbers("means", lambda v: v[:-1]), "shape"),
    "negative squares": (numbers("scatter", lambda v: -v - 1), "scatter"),
    "wide scatter": (numbers("scatter", lambda v: v * 0 + np.finfo(np.float32).max), "scatter"),
    "a refusal that forges lines": (
        replaced(RecordDict({"statistics": ConfigRecord({"refused": "no\nhead solved\x1b[31m" + "x" * 10**6})})),
        "refused",
    ),
}


@pytest.fixture(scope="module")
def without_two(model):
    """The head that is solved where client 2 tells nothing."""
    return head(begun(flat(model), change=silenced(2)))


def from_client(number, fault):
    def tamper(asked, reply):
        if asked != number:
            return reply
        return fault(reply) or reply

    return tamper


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_left_out_with_a_line(model, without_two, said, name):
    fault, reason = RUBBISH[name]
    loop = begun(flat(model), Answers, tamper=from_client(2, lambda reply: fault(reply) and None))
    assert np.array_equal(head(loop), without_two)
    (line,) = [line for line in said if "tells no sums" in line]
    assert line.startswith(f"client 2 tells no sums for the head: {reason}: ") and len(line) < 450 and line.isprintable()
    assert [one["client"] for one in loop.lines if one["type"] == "client"] == ["0", "1", "3", "4", "5"]
    sent = start_of(loop)
    assert sent["bytes"]["down"] + sent["bytes"]["up"] == sent["bytes-total"]
    json.dumps(loop.lines, allow_nan=False)


def test_an_error_is_left_out_with_its_last_line(model, without_two, said):
    def fault(reply):
        error = Message(Error(2, "Traceback\n  File x\nValueError: \x1b[31mno" + "x" * 10**6), reply_to=reply)
        for name in ("_message_id", "_reply_to_message_id"):
            error.metadata.__dict__[name] = reply.metadata.__dict__[name]
        return InProcessGrid._from(error, Message(RecordDict({}), 1002, "query.statistics"))

    loop = begun(flat(model), Answers, tamper=from_client(2, fault), rounds=1)
    assert loop.state.server_round == 1 and start_of(loop)["good"] == CLIENTS - 1
    (line,) = [line for line in said if "tells no sums" in line]
    assert "client 2 tells no sums for the head: error-2: ValueError: " in line and len(line) < 450 and "\x1b" not in line
    assert np.array_equal(head(begun(flat(model), Answers, tamper=from_client(2, fault))), without_two)


def test_an_answer_from_another_node_is_left_out(model, without_two, said):
    def fault(reply):
        reply.metadata.__dict__["_src_node_id"] = 1004

    loop = begun(flat(model), Answers, tamper=from_client(2, fault))
    assert np.array_equal(head(loop), without_two)
    assert "client 2 tells no sums for the head: sender: answered by node 1004, asked was 1002" in said


class Broken(Answers):
    """What client 2 answers cannot be inflated, or does not come."""

    def __init__(self, *args, silent, **options):
        super().__init__(*args, **options)
        self.silent = silent

    def pull_messages(self, message_ids):
        message_ids = list(message_ids)
        for message_id in message_ids:
            message = self._waiting[message_id]
            if message.metadata.message_type == "query.statistics" and message.metadata.dst_node_id == 1002:
                if self.silent:
                    return []
                raise ValueError("garbage\n\x1b[31m" + "x" * 10**6)
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("silent", [False, True])
def test_no_answer_or_none_that_can_be_read_is_left_out(model, without_two, said, silent):
    loop = begun(flat(model, strategy__round_timeout=4.0), Broken, silent=silent)
    assert np.array_equal(head(loop), without_two)
    (line,) = [line for line in said if "tells no sums" in line]
    assert ("no reply in 4 s" if silent else "unreadable: ValueError: garbage") in line and len(line) < 450
    assert line.isprintable()


def test_a_client_cannot_name_what_is_the_servers(model):
    """Its metrics are in its line, but not over the line's own names."""
    lie = metric(**{"type": 1.0, "round": 9, "client": 3.0, "bytes-down": 1.0, "bytes-up": 1.0, "modelled-seconds": 1e9})
    loop = begun(flat(model), Answers, tamper=from_client(2, lambda reply: lie(reply)))
    line = next(line for line in loop.lines if line.get("client") == "2")
    assert line["type"] == "client" and line["round"] == 0 and sum(line["bytes-up"].values()) > 1
    assert line["modelled-seconds"] < 1e9
    assert np.array_equal(head(loop), head(begun(flat(model))))


def test_where_all_refuse_the_head_stays_drawn_and_learns_at_its_own_rate(model, said):
    loop = begun(flat(model), change=silenced(*range(CLIENTS)), rounds=1)
    line = start_of(loop)
    assert not loop.state.solved and "head" not in line and line["good"] == 0 and len(line["sampled"]) == CLIENTS
    assert loop.method.plan(loop.state, Client("0", 9)).train.head_learning_rate == DRAWN_HEAD
    assert "head: sums of 0 clients, strategy.min-replies = 1 are needed; it is drawn" in said
    assert loop.state.server_round == 1
    start_only = begun(flat(model), change=silenced(*range(CLIENTS)))
    assert np.array_equal(head(start_only), drawn(start_only))
    assert start_of(start_only)["loss"] == evaluated(start_only, drawn(start_only))["loss"]


def test_a_solved_head_learns_at_a_tenth_of_that(model):
    loop = begun(flat(model))
    assert loop.method.plan(loop.state, Client("0", 9)).train.head_learning_rate == SOLVED_HEAD
    given = begun(flat(model, train__head_learning_rate=0.5))
    assert given.method.plan(given.state, Client("0", 9)).train.head_learning_rate == 0.5


def test_too_few_good_replies_solve_nothing(model):
    loop = begun(flat(model, strategy__min_replies=3), change=silenced(0, 1, 2, 3))
    assert np.array_equal(head(loop), drawn(loop)) and not loop.state.solved
    assert start_of(loop)["good"] == 2 and [line["client"] for line in loop.lines if line["type"] == "client"] == ["4", "5"]
    enough = begun(flat(model, strategy__min_replies=2), change=silenced(0, 1, 2, 3))
    assert enough.state.solved["clients"] == 2


def test_labels_of_which_nobody_told_are_named(model, said):
    loop = begun(flat(model, data__partition="pathological", data__labels_per_client=1), change=silenced(1, 2, 3, 4, 5))
    missing = [label for label, share in zip(loop.method.model.labels, loop.state.solved["shares"], strict=True) if not share]
    assert len(missing) > 5
    (line,) = [line for line in said if line.startswith("head: no client told of")]
    assert line == f"head: no client told of {len(missing)} of 8 labels: {', '.join(missing[:5])}, …"


@pytest.mark.parametrize("robust", ["median", "multi-krum"])
def test_a_robust_run_leaves_a_liar_out(model, robust):
    lie = numbers("means", lambda values: values * -1e5)
    options = {"data__partition": "iid"}

    def both(rule):
        honest = begun(flat(model, strategy__robust=rule, **options))
        lied = begun(flat(model, strategy__robust=rule, **options), Answers, tamper=from_client(2, lambda reply: lie(reply)))
        return start_of(honest)["accuracy"], start_of(lied)["accuracy"]

    assert np.ptp(both(robust)) < 0.1 and np.ptp(both("mean")) < 0.1  # strategy.norm-bound sees what is so gross
    options["strategy__norm_bound"] = 0.0
    assert np.ptp(both(robust)) < 0.1 < np.ptp(both("mean"))


def test_a_robust_head_is_that_of_the_believable_sums(model):
    loop = begun(flat(model, strategy__robust="trimmed-mean", **UNCAPPED))
    assert apart(head(loop), solved(loop, told(loop), FAR)) < CLOSE


# -- lines and bytes ------------------------------------------------------------------------------------------------
def test_the_start_line_has_all_bytes(model):
    loop = begun(flat(model), rounds=1)
    line, clients = start_of(loop), [one for one in loop.lines if one["type"] == "client" and one["round"] == 0]
    sent = line["bytes"]
    assert sent["down"] + sent["up"] == line["bytes-total"] > 0
    for way in ("down", "up"):
        assert sent[way] == sum(size for name, size in sent.items() if name.startswith(way + "."))
    assert sent["up.statistics"] == sum(one["bytes-up"]["statistics"] for one in clients) > 0 == sent["down.statistics"]
    counts = [one.counts for one in told(loop).values()]
    assert sent["up.statistics"] == sum(8 * (len(LABELS) + 2) + 4 * 16 * (c > 0).sum() + 4 * 16 * 17 // 2 for c in counts)
    assert [one["client"] for one in clients] == [str(i) for i in range(CLIENTS)] and line["sampled"] != []
    assert [one["type"] for one in loop.lines[: CLIENTS + 2]] == ["start", *["client"] * CLIENTS, "round"]
    after = loop.lines[CLIENTS + 1]
    assert after["bytes-total"] - line["bytes-total"] == after["bytes"]["down"] + after["bytes"]["up"]
    assert after["bytes"]["up.statistics"] == 0
    assert loop.state.bytes_total["up.statistics"] == sent["up.statistics"]
    json.dumps(loop.lines, allow_nan=False)


def test_the_pass_costs_modelled_time(model):
    loop = begun(flat(model))
    clients = [one for one in loop.lines if one["type"] == "client"]
    assert all(one["flops-forward"] > 0 == one["flops-backward"] and one["tokens"] > 0 for one in clients)
    assert start_of(loop)["modelled-seconds"] == pytest.approx(max(one["modelled-seconds"] for one in clients))


# -- a fixed head ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["fedara", "fedlora", "flora", "full"])
def test_a_fixed_head_never_changes_and_never_comes_back(model, method):
    changes = {"method": method, "train__head_learning_rate": 0.0}
    before = head(begun(flat(model, **changes))).copy()
    loop = begun(flat(model, **changes), rounds=2)
    assert np.array_equal(head(loop), before)
    rounds = [line for line in loop.lines if line["type"] == "round"]
    assert [line["good"] for line in rounds] == [3, 3]
    assert all(line["bytes"]["up.head"] == 0 < line["bytes"]["up"] for line in rounds)
    assert rounds[-1]["loss"] != start_of(loop)["loss"]
    assert begun(flat(model, method=method), rounds=1).lines[-4]["bytes"]["up.head"] > 0


def test_a_fixed_head_may_be_drawn_too(model):
    loop = begun(flat(model, head__start="random", train__head_learning_rate=0.0), rounds=1)
    assert np.array_equal(head(loop), drawn(loop)) and loop.lines[1]["bytes"]["up.head"] == 0


def test_a_method_that_would_train_nothing_is_refused(model):
    with pytest.raises(ConfigError, match="trains nothing else"):
        prepare(flat(model, method="head", train__head_learning_rate=0.0))


# -- runs and their folders -----------------------------------------------------------------------------------------
def saved(model, folder, name="run", **more):
    return flat(model, run__dir=str(folder), run__name=name, **{"num_server_rounds": 3, **more})


def same_end(one, other):
    ours, theirs = exported(one), exported(other)
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert written(one)[0] == written(other)[0]
    facts = [read_facts(path) for path in (one, other)]
    assert facts[0]["test"] == facts[1]["test"] and facts[0]["head"] == facts[1]["head"] != {}
    assert facts[0]["outcome"] == facts[1]["outcome"] == "completed"


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return engine.run(saved(model, tmp_path_factory.mktemp("runs"), "whole"), CLIENTS).path


@pytest.mark.parametrize("known", [0, 1])
def test_a_run_that_goes_on_after_its_head_was_solved(model, tmp_path, monkeypatch, whole, known):
    with stopped_in_round(monkeypatch, known + 1):
        engine.run(saved(model, tmp_path), CLIENTS)
    newest = sorted((tmp_path / "run" / "checkpoint").iterdir())[-1]
    assert newest.name == f"round-{known:06d}.safetensors"
    before = open_run(tmp_path / "run").state
    engine.run(saved(model, tmp_path, "", run__resume="run"), CLIENTS)
    assert read_facts(tmp_path / "run")["resumed"] == [known] and before.solved == read_facts(whole)["head"]
    same_end(tmp_path / "run", whole)


def test_no_round_at_all_leaves_a_model_and_a_checkpoint(model, tmp_path, said):
    changes = {"method": "head", "num_server_rounds": 0, "train__head_learning_rate": 0.0}
    path = engine.run(saved(model, tmp_path, **changes), CLIENTS).path
    facts, found = read_facts(path), [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert facts["outcome"] == "completed" and facts["rounds"] == 0 and facts["exported"] == "model"
    assert [line["type"] for line in found] == ["start", *["client"] * CLIENTS, "end"]
    assert [file.name for file in (path / "checkpoint").iterdir()] == ["round-000000.safetensors"]
    assert (path / "report.html").exists() and facts["modelled"]["seconds"] > 0
    run = open_run(path)
    assert run.state.solved == facts["head"] and run.state.server_round == 0
    stock = AutoModelForSequenceClassification.from_pretrained(path / "model")
    packed = torch.cat([stock.classifier.weight.flatten(), stock.classifier.bias]).detach().numpy()
    assert np.array_equal(packed, run.state.arrays["head"])
    assert facts["test"] == run.model.evaluate(run.method.weights(run.state), "test")


def test_no_round_at_all_and_nobody_who_tells_is_a_failure(model, monkeypatch, tmp_path):
    init = InProcessGrid.__init__

    def silent(self, *args, **options):
        init(self, *args, **options)
        silenced(*range(CLIENTS))(self)

    monkeypatch.setattr(InProcessGrid, "__init__", silent)
    with pytest.raises(RunFailed, match="^num-server-rounds = 0, and the head could not be solved: nothing was learnt$"):
        engine.run(saved(model, tmp_path, num_server_rounds=0), CLIENTS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["fedara", "full", "federa"])
def test_no_round_at_all_with_any_method(model, tmp_path, method):
    path = engine.run(saved(model, tmp_path, method=method, num_server_rounds=0), CLIENTS).path
    facts = read_facts(path)
    assert facts["outcome"] == "completed" and facts["rounds"] == 0 and facts["test"]["accuracy"] > 0


@pytest.mark.parametrize("method", ["head", "fedara"])
def test_no_round_at_all_and_clients_that_evaluate(model, tmp_path, said, method):
    changes = {"method": method, "num_server_rounds": 0, "data__client_validation": 0.2}
    path = engine.run(saved(model, tmp_path, **changes), CLIENTS).path
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in said if "left out" in line]
    (line,) = [line for line in found if line["type"] == "client-evaluation"]
    assert line["round"] == 0 and line["clients"] == CLIENTS and 0 <= line["client-eval-accuracy"] <= 1


def test_rounds_may_follow_a_run_without_any(model, tmp_path, whole):
    engine.run(saved(model, tmp_path, method="head", num_server_rounds=0), CLIENTS)
    engine.run(saved(model, tmp_path, "", method="head", num_server_rounds=2, run__resume="run"), CLIENTS)
    engine.run(saved(model, tmp_path, "at-once", method="head", num_server_rounds=2), CLIENTS)
    assert read_facts(tmp_path / "run")["rounds"] == 2
    one, other = ([line for line in written(tmp_path / name)[0] if line["type"] != "end"] for name in ("run", "at-once"))
    assert [line for line in one if line] == other


def test_a_run_that_cannot_go_on_keeps_what_it_had(model, tmp_path):
    """A mistake in going on, such as another number of clients, costs neither checkpoint nor model of what is there."""
    path = engine.run(saved(model, tmp_path, method="head", num_server_rounds=0), CLIENTS).path
    with pytest.raises(ConfigError, match="examples, it had"):
        engine.run(saved(model, tmp_path, "", method="head", num_server_rounds=2, run__resume="run"), CLIENTS - 1)
    assert path.exists() and (path / "model").exists() and any((path / "checkpoint").iterdir())


def test_a_run_whose_head_all_refuse_goes_on_too(model, tmp_path, monkeypatch):
    """Nothing was solved, so there is no checkpoint before round 1, and the start is as it was."""
    for name in ("whole", "run"):
        grid_init = InProcessGrid.__init__

        def silent(self, *args, _init=grid_init, **options):
            _init(self, *args, **options)
            silenced(*range(CLIENTS))(self)

        with monkeypatch.context() as patch:
            patch.setattr(InProcessGrid, "__init__", silent)
            if name == "whole":
                engine.run(saved(model, tmp_path, "whole"), CLIENTS)
                continue
            with stopped_in_round(monkeypatch, 2):
                engine.run(saved(model, tmp_path), CLIENTS)
            engine.run(saved(model, tmp_path, "", run__resume="run"), CLIENTS)
    assert written(tmp_path / "run")[0] == written(tmp_path / "whole")[0] and read_facts(tmp_path / "run")["head"] == {}


def test_what_statistics_change_is_no_secret_of_the_seed(model):
    """Two runs of one seed are equal, of two seeds not."""
    one, other = (start(flat(model, num_server_rounds=1)) for _ in range(2))
    assert [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in one.lines] == [
        {k: v for k, v in line.items() if k not in WALL_CLOCK} for line in other.lines
    ]

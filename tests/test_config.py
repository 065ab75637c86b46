"""The run configuration: defaults, and one readable line for everything that is wrong."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from flwr.common.config import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from runs_helper import options as toml

from fedara_flwr.config import OTHER_WORDS, Settings, describe
from fedara_flwr.keys import ConfigError, Group, check_options, nearest
from fedara_flwr.strategies import find
from fedara_flwr.tasks import built_in, read_settings
from fedara_flwr.tasks.base import USUAL

laws = settings(deadline=None, max_examples=150)
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def shipped():
    """The run configuration of pyproject.toml, flattened as Flower does it."""
    return flatten_dict(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"])


def problem(flat):
    """The message for a configuration that must be refused."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_flat(flat)
    return one_line(caught.value)


def fedara(rounds=20, rank=12, **own):
    """fedara's options as the method takes them."""
    flat = {"num-server-rounds": rounds, "adapter.rank": rank, "strategy.options": toml(**own)}
    return find("fedara").check(Settings.from_flat(flat))


def fedaras_problem(**own):
    """The message for options that fedara must refuse."""
    with pytest.raises(ConfigError) as caught:
        fedara(**own)
    return one_line(caught.value)


def problem_of(key, value):
    """Of a key of the configuration, or of fedara's options."""
    option = key.removeprefix("strategy.options.")
    return problem({key: value}) if option == key else fedaras_problem(**{option: value})


def one_line(error):
    message = str(error)
    assert len(message.splitlines()) == 1
    return message


# -- defaults ------------------------------------------------------------
def test_defaults_are_those_of_pyproject():
    """Key by key, value and type: Flower takes the type of a `--run-config` override from pyproject.toml's value."""
    flat = shipped()
    assert Settings().to_flat() == flat
    assert {key: type(value) for key, value in Settings().to_flat().items()} == {k: type(v) for k, v in flat.items()}


def test_shipped_configuration_is_the_default():
    assert Settings.from_flat(shipped()) == Settings.from_flat({}) == Settings()


def test_every_key_is_described():
    fields = describe()
    assert set(fields) == set(shipped())
    assert [key for key, field in fields.items() if not (field.description or "").strip()] == []


# -- what the task fills in ------------------------------------------------------------
def test_what_is_left_open_is_the_tasks_own():
    """The usual values where the task has no others; what is given holds, and nothing changes when it is read again."""
    usual = read_settings({}).to_flat()
    assert usual == shipped() | USUAL
    found = read_settings({"data.task": "causal-lm", "train.batch-size": 2}).to_flat()
    assert (found["model.dtype"], found["data.name"], found["data.max-length"]) == ("auto", "functions", 256)
    assert found["train.batch-size"] == 2 and found["data.partition"] == "dirichlet"
    assert read_settings(found).to_flat() == found


@pytest.mark.parametrize("name", built_in())
def test_nothing_stays_open_once_the_task_is_known(name):
    found, left_open = read_settings({"data.task": name}).to_flat(), shipped()
    assert [key for key in USUAL if found[key] == left_open[key]] == ["model.dtype"]  # that is each machine's


@pytest.mark.parametrize(
    "own, expected",
    [
        ({"data.task": "regression"}, "iid"),
        ({"data.task": "question-answering"}, "iid"),
        ({"data.task": "causal-lm", "data.path": "/d.csv"}, "iid"),
        ({"data.task": "causal-lm", "data.path": "/d.csv", "data.options": "category-column = 'kind'"}, "dirichlet"),
        ({"data.task": "regression", "data.partition": "dirichlet"}, "dirichlet"),
    ],
)
def test_the_partition_is_one_that_the_rows_allow(own, expected):
    """Unless another is asked for: then it is refused later, by name."""
    assert read_settings(own).data.partition == expected


# -- types and values ------------------------------------------------------------
def test_int_is_accepted_for_float():
    settings_ = Settings.from_flat({"train.learning-rate": 1, "adapter.alpha": 16})
    assert (settings_.train.learning_rate, settings_.adapter.alpha) == (1.0, 16.0)
    assert isinstance(settings_.to_flat()["adapter.alpha"], float)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("train.dropout", "true", "boolean"),
        ("train.dropout", 1, "boolean"),
        ("train.steps", True, "integer"),
        ("train.steps", "8", "integer"),
        ("train.steps", 8.5, "integer"),
        ("train.steps", 8.0, "integer"),
        ("num-server-rounds", False, "integer"),
        ("train.learning-rate", True, "number"),
        ("train.learning-rate", "1e-3", "number"),
        ("train.learning-rate", float("nan"), "finite"),
        ("adapter.alpha", float("inf"), "finite"),
        ("method", 3, "string"),
        ("run.dir", False, "string"),
        ("strategy.weighting", 1, "'examples', 'tokens' or 'uniform'"),
        ("strategy.options.arbitration", 1, "'budget' or 'threshold'"),
    ],
)
def test_wrong_types(key, value, allowed):
    message = problem_of(key, value)
    assert message.startswith(f"{key} = {value!r}: ")
    assert allowed in message


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("num-server-rounds", -1, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**62, f"less than {2**62}"),
        ("method", "", "at least 1 character"),
        ("adapter.rank", 0, "greater than or equal to 1"),
        ("adapter.rank", 1025, "less than or equal to 1024"),
        ("strategy.options.final-rank", 0.0, "greater than 0"),
        ("strategy.fraction-train", 0.0, "greater than 0"),
        ("strategy.fraction-train", 1.5, "less than or equal to 1"),
        ("strategy.options.threshold", 0.0, "greater than 0"),
        ("strategy.options.warmup-rounds", -2, "greater than or equal to -1"),
        ("train.head-learning-rate", -2.0, "greater than or equal to -1"),
        ("train.head-learning-rate", -0.5, "allowed are -1.0, 0.0 and more"),
        ("train.final-rate", 0.0, "greater than 0"),
        ("train.final-rate", 1.5, "less than or equal to 1"),
        ("head.clients", -1, "greater than or equal to 0"),
        ("train.clip-norm", -1.0, "greater than or equal to 0"),
        ("data.validation", 1.0, "less than 1"),
        ("data.test", 0.0, "greater than 0"),
        ("data.test-rows", -2, "greater than or equal to -1"),
        ("train.batch-size", -1, "greater than or equal to 0"),
        ("train.batch-tokens", -2, "greater than or equal to -1"),
        ("data.max-length", -1, "greater than or equal to 0"),
        ("data.max-length", 7, "allowed are 0 and 8 or more"),
        ("run.name", "a/b", "pattern"),
        ("run.name", "a\nb", "pattern"),
    ],
)
def test_values_out_of_range(key, value, allowed):
    message = problem_of(key, value)
    assert message.startswith(f"{key} = {value!r}: ")
    assert allowed in message


@pytest.mark.parametrize(
    "key, value, near",
    [
        ("strategy.options.arbitration", "bugdet", "budget"),
        ("strategy.options.arbitration", "treshold", "threshold"),
        ("strategy.options.importance", "gradient_product", "gradient-product"),
        ("strategy.options.upload-mask", "locale", "local"),
        ("data.partition", "dirichelet", "dirichlet"),
        ("data.partition", "lenght", "length"),
        ("train.schedule", "cosin", "cosine"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.pooling", "pretraned", "pretrained"),
        ("head.start", "statistic", "statistics"),
        ("train.loss", "logit-adjust", "logit-adjusted"),
    ],
)
def test_bad_choice_names_the_nearest(key, value, near):
    message = problem_of(key, value).removesuffix(" (method 'fedara')")
    assert message.startswith(f"{key} = {value!r}: ")
    assert message.endswith(f"did you mean {near!r}?")


@pytest.mark.parametrize("name", [".", "..", ".hidden", "-x", "a/b", "a" * 201])
def test_names_that_are_no_folder_of_their_own(name):
    assert problem({"run.name": name}).startswith("run.name = ")


def test_bad_choice_far_from_all_lists_all():
    message = problem({"strategy.weighting": "zzz"})
    assert "'examples', 'tokens' or 'uniform'" in message and "did you mean" not in message


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.stpes", "train.steps"),
        ("train.learning_rate", "train.learning-rate"),
        ("num_server_rounds", "num-server-rounds"),
        ("num-rounds", "num-server-rounds"),
        ("weighting", "strategy.weighting"),
        ("alpha", "adapter.alpha"),
        ("model", "model.name"),
        ("adapter.rank.x", "adapter.rank"),
        ("train.lr", "train.learning-rate"),
        ("strategy.fraction-fit", "strategy.fraction-train"),
        ("lora_r", "adapter.rank"),
    ],
)
def test_unknown_key_names_the_nearest(key, near):
    assert problem({key: 3}) == f"{key} = 3: there is no such key; did you mean {near!r}?"


def test_what_others_call_a_key_is_a_key():
    """And no key of our own, which would be refused as one."""
    known = describe()
    assert set(OTHER_WORDS.values()) <= set(known)
    assert not set(OTHER_WORDS) & ({key.rpartition(".")[2] for key in known} - {"model"})


def test_unknown_key_far_from_all():
    assert problem({"zzzzzz": "x"}) == "zzzzzz = 'x': there is no such key"


def test_several_problems_are_counted():
    message = problem({"train.steps": "8", "train.epochs": "1", "seed": -1})
    assert message.endswith("(and 2 more)")


def test_nearest_prefers_the_closest_name():
    assert nearest("bugdet", ["threshold", "budget", "gadget"]) == "; did you mean 'budget'?"
    assert nearest("qqq", ["threshold"]) == ""


@laws
@given(
    st.sampled_from(sorted(describe()))
    | st.text(st.characters(codec="ascii", categories=("L", "N", "Pd", "Po")), min_size=1, max_size=20),
    st.text(max_size=12) | st.integers(-(10**6), 10**6) | st.floats() | st.booleans(),
)
def test_any_single_setting_is_taken_or_named_in_one_line(key, value):
    try:
        taken = Settings.from_flat({key: value})
    except ConfigError as error:
        message = one_line(error)
        assert key in message and repr(value) in message
    else:
        assert taken.to_flat() == shipped() | {key: value}


# -- relations ------------------------------------------------------------
def test_without_rounds_there_must_be_a_head_to_solve():
    assert Settings.from_flat({"num-server-rounds": 0, "head.start": "means"}).num_server_rounds == 0
    message = problem({"num-server-rounds": 0, "head.start": "random"})
    assert message.startswith("num-server-rounds = 0: with head.start = 'random' ") and "allowed is 1 or more" in message


@pytest.mark.parametrize("diversity, usual", [(0.6, 1e-3), (0.0, 1e-3), (None, 1e-2)])
def test_the_heads_rate(diversity, usual):
    """Left open it follows from how the head started; a rate that is set holds, 0 too."""
    for said, expected in ((-1.0, usual), (0.0, 0.0), (0.5, 0.5)):
        train = Settings.from_flat({"train.head-learning-rate": said}).train
        assert train.local(2e-3, diversity).head_learning_rate == expected


@pytest.mark.parametrize("diversity, share", [(None, 1.0), (1.0, 1.0), (0.6, 0.6), (0.1, 0.1), (0.01, 0.1)])
def test_a_methods_own_rate_follows_the_diversity_of_labels(diversity, share):
    """After a solved head, down to a tenth; a rate that is set holds."""
    assert Settings().train.local(2e-3, diversity).learning_rate == pytest.approx(2e-3 * share)
    set_one = Settings.from_flat({"train.learning-rate": 0.5}).train
    assert set_one.local(2e-3, diversity).learning_rate == 0.5


def test_rates_fall_in_a_line_to_the_share_of_the_last_round():
    train = Settings.from_flat({"train.final-rate": 0.2, "train.head-learning-rate": 1.0}).train
    rates = [train.local(0.5, done=done) for done in (0.0, 0.5, 1.0)]
    assert [rate.learning_rate for rate in rates] == pytest.approx([0.5, 0.3, 0.1])
    assert [rate.head_learning_rate for rate in rates] == pytest.approx([1.0, 0.6, 0.2])


def test_rates_fall_along_half_a_cosine():
    """(1 + cos(pi·done)) / 2 between 1 and 0.2 at the ends: at a third 0.75 of the way is left."""
    train = Settings.from_flat({"train.final-rate": 0.2, "train.schedule": "cosine"}).train
    rates = [train.local(0.5, done=done).learning_rate for done in (0.0, 1 / 3, 0.5, 1.0)]
    assert rates == pytest.approx([0.5, 0.5 * (0.2 + 0.8 * 0.75), 0.3, 0.1])


def test_final_rank_above_the_initial():
    message = fedaras_problem(rank=4, final_rank=4.5)
    assert message == "strategy.options.final-rank = 4.5: allowed is at most adapter.rank = 4"
    assert fedara(rank=4, final_rank=4.0).final_rank == 4.0


@pytest.mark.parametrize("warmup, final", [(10, 10), (19, 1), (0, 20), (25, 0), (18, -1), (-1, 18)])
def test_warm_up_and_final_rounds_leave_no_round_between(warmup, final):
    """20 rounds; -1 is a tenth, 2."""
    message = fedaras_problem(rounds=20, warmup_rounds=warmup, final_rounds=final)
    shown = [2 if value < 0 else value for value in (warmup, final)]
    start = "strategy.options.warmup-rounds = {}: with strategy.options.final-rounds = {} "
    assert message.startswith(start.format(*shown))
    assert "num-server-rounds = 20" in message


def test_warm_up_and_final_rounds_with_one_round_between():
    taken = fedara(rounds=20, warmup_rounds=12, final_rounds=7)
    assert (taken.warmup_rounds, taken.final_rounds) == (12, 7)


@pytest.mark.parametrize("rounds, tenth", [(1, 0), (4, 0), (6, 1), (10, 1), (20, 2), (50, 5), (100, 10)])
def test_a_tenth_by_default(rounds, tenth):
    """The budget begins to fall after the first tenth, and has fallen where the last tenth begins."""
    flat = {"num-server-rounds": rounds, "adapter.rank": 12, "strategy.options": toml(final_rank=1.0)}
    modules = 10**5  # so many that no two rounds between have one budget
    spec = SimpleNamespace(modules=range(modules), head=(), size=lambda part: 0)
    method = find("fedara")(Settings.from_flat(flat), SimpleNamespace(spec=spec))
    state = SimpleNamespace(mask=SimpleNamespace(ranks=[12] * modules))
    budgets = [method.budget(state, server_round) for server_round in range(1, rounds + 1)]
    assert budgets.count(12 * modules) == tenth and budgets.count(modules) == tenth + 1


@pytest.mark.parametrize("folder", ["runs", "./runs", "../runs", "a/b", " /runs"])
def test_relative_run_dir(folder):
    assert problem({"run.dir": folder}).startswith(f"run.dir = {folder!r}: allowed is an absolute path")


@pytest.mark.parametrize("folder", ["", "/runs", "~/runs"])
def test_absolute_run_dir(folder):
    assert Settings.from_flat({"run.dir": folder}).run.dir == folder


def test_natural_partition_needs_an_id_column():
    message = problem({"data.partition": "natural"})
    assert message.startswith("data.id-column = '': ") and "data.partition = 'natural'" in message
    assert Settings.from_flat({"data.partition": "natural", "data.id-column": "user"}).data.id_column == "user"


# -- round trip ------------------------------------------------------------
overrides = st.fixed_dictionaries(
    {},
    optional={
        "num-server-rounds": st.integers(0, 500),
        "seed": st.integers(0, 2**62 - 1),
        "method": st.text(min_size=1, max_size=10),
        "adapter.rank": st.integers(3, 1024),
        "adapter.alpha": st.floats(1e-6, 1e6),
        "strategy.fraction-train": st.floats(0.001, 1.0),
        "strategy.weighting": st.sampled_from(["examples", "uniform"]),
        "strategy.options": st.text(max_size=10),
        "train.dropout": st.booleans(),
        "train.steps": st.integers(0, 1000),
        "data.labels": st.text(max_size=20),
        "run.name": st.from_regex(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,8})?", fullmatch=True),
    },
)


@laws
@given(overrides)
def test_round_trip(flat):
    taken = Settings.from_flat(flat)
    assert taken.to_flat() == shipped() | flat
    assert Settings.from_flat(taken.to_flat()) == taken


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Settings().train.steps = 3


# -- strategy.options ------------------------------------------------------------
def options(text):
    return Settings.from_flat({"strategy.options": text}).options


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("", {}),
        ("   ", {}),
        ("mu = 0.5", {"mu": 0.5}),
        ("a = 1\nb = 'x'", {"a": 1, "b": "x"}),
        ("{a = 1, b = 2}", {"a": 1, "b": 2}),
        ("  {a = [1, 2], on = true}  ", {"a": [1, 2], "on": True}),
        ("{}", {}),
        ("options = 3", {"options": 3}),
        ("[inner]\na = 1", {"inner": {"a": 1}}),
    ],
)
def test_options_are_toml_in_both_forms(text, parsed):
    assert options(text) == parsed


@pytest.mark.parametrize("text", ["a", "a =", "{a = 1", "{a: 1}", "a = 1, b = 2", "a = 1\na = 2", "mu=0.5;", "{a = 1} b"])
def test_options_that_are_no_toml(text):
    with pytest.raises(ConfigError) as caught:
        options(text)
    assert one_line(caught.value).startswith(f"strategy.options = {text!r}: not TOML")


def test_nothing_after_an_inline_table_is_lost():
    """Either all keys count or the text is refused: a key that is silently dropped is a wrong run."""
    try:
        parsed = options("{a = 1}\nb = 2")
    except ConfigError as error:
        assert "strategy.options" in one_line(error)
    else:
        assert parsed == {"a": 1, "b": 2}


@laws
@given(st.text(alphabet="ab=1.'\"{}[], \n#", max_size=15))
def test_options_are_a_dictionary_or_one_line(text):
    try:
        assert isinstance(options(text), dict)
    except ConfigError as error:
        assert "strategy.options = " in one_line(error)


class ProxOptions(Group):
    mu: float = Field(0.1, ge=0, description="weight of the penalty")
    tail_length: int = Field(description="slots in the tail")
    norm: Literal["l1", "l2"] = Field("l2", description="of the penalty")


def test_options_of_a_method():
    checked = check_options(ProxOptions, {"tail-length": 3, "norm": "l1"}, "prox")
    assert (checked.mu, checked.tail_length, checked.norm) == (0.1, 3, "l1")


@pytest.mark.parametrize(
    "given_options, start, part",
    [
        ({"tail-length": 1, "mu": "much"}, "strategy.options.mu = 'much': ", "number"),
        ({"tail-length": 1, "mu": -0.5}, "strategy.options.mu = -0.5: ", "greater than or equal to 0"),
        ({"tail-length": True}, "strategy.options.tail-length = True: ", "integer"),
        ({"tail-lenght": 3, "tail-length": 1}, "strategy.options.tail-lenght = 3: ", "'strategy.options.tail-length'?"),
        ({"tail-length": 1, "norm": "l3"}, "strategy.options.norm = 'l3': ", "'l1' or 'l2'"),
        ({}, "strategy.options.tail-length = ", "required"),
    ],
)
def test_wrong_options_of_a_method(given_options, start, part):
    with pytest.raises(ConfigError) as caught:
        check_options(ProxOptions, given_options, "prox")
    message = one_line(caught.value)
    assert message.startswith(start)
    assert part in message
    assert message.endswith("(method 'prox')")


def test_the_reference_is_current():
    """docs/config.md is what `fedara config` prints."""
    from pathlib import Path

    from fedara_flwr.cli.reference import reference

    assert (Path(__file__).parent.parent / "docs" / "config.md").read_text() == reference()


def test_make_hands_on_quotes(tmp_path):
    """`make run CONFIG=…` gives the settings as the shell had them, both kinds of quotes among them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ready").touch()
    tell = tmp_path / "bin" / "fedara"
    tell.write_text('#!/bin/sh\nfor last in "$@"; do :; done; printf %s "$last"\n')
    tell.chmod(0o755)
    asked = """data.text-column='a b' data.options='{answer-column = "reply"}'"""
    command = ["make", "-s", "run", f"VENV={tmp_path}", f"CONFIG={asked}"]
    assert subprocess.run(command, cwd=PYPROJECT.parent, capture_output=True, text=True, check=True).stdout == asked

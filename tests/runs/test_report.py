"""Reports and comparisons: read back, derived by hand, drawn, escaped."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedara_flwr.cli import app
from fedara_flwr.keys import ConfigError
from fedara_flwr.report import plots, read_run, write_comparison, write_report
from fedara_flwr.report.compare import differences, group, tables
from fedara_flwr.report.read import clean, natural
from fedara_flwr.report.series import (
    alive_per_module,
    bytes_by_part,
    cumulative_megabytes,
    cumulative_modelled,
    cumulative_seconds,
    curve,
    drops_by_reason,
    final,
    per_client,
    short_names,
    spread,
    step_seconds,
    to_target,
    total_megabytes,
    total_seconds,
)

KINDS = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense")
MODULES = [f"bert.encoder.layer.{block}.{kind}" for block in range(2) for kind in KINDS]
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    '" onload="alert(1)',
    "$\\frac{1}{$",
    "\x1b[31m\u202e\ud800\x00",
    "[red]]]> &amp; <!--",
)


def facts(**changes: object) -> dict:
    return {
        "name": "tiny",
        "outcome": "completed",
        "reason": "",
        "rounds": 4,
        "seconds": 50.0,
        "test": {"accuracy": 0.625, "macro-f1": 0.5},
        "method": "fedara",
        "title": "a method",
        "paper": "arXiv 1",
        "seed": 1,
        "model": "some/model",
        "fingerprint": "abc",
        "task": "classification",
        "labels": ["red", "green", "blue"],
        "groups": ["red", "green", "blue"],
        "metric": {"name": "accuracy", "higher": True, "low": 0.0, "high": 1.0},
        "metrics": ["accuracy", "macro-f1", "loss"],
        "config": {
            "num-server-rounds": 4,
            "seed": 1,
            "method": "fedara",
            "adapter.rank": 4,
            "data.path": "",
            "run.name": "tiny",
        },
        "modules": MODULES,
        "blocks": [0] * 5 + [1] * 5,
        "ranks": [4] * 10,
        "bytes": {"down.B": 5_000_000, "up.B": 3_000_000},
        "modelled": {"seconds": 30.0, "waiting": 3.0, "joules": 2000.0},
        "left-out": {"c10": "labels differ"},
        "partition": {"c10": [1, 2, 3], "c2": [4, 0, 0], "c1": [0, 5, 5]},
        "exported": "adapter",
        "versions": {"flwr": "1.41.0"},
        "machine": {"cores": 2},
        "resumed": [],
        **changes,
    }


def round_line(number: int, **changes: object) -> dict:
    """Round `number` of four: 1 MB down and 0.5 MB up of B, alive slots 40, 30, 20, 10."""
    alive = 5 - number
    sent = {"down.B": 900_000, "down.head": 100_000, "up.B": 500_000, "up.delta": 0, "down": 1_000_000, "up": 500_000}
    return {
        "type": "round",
        "round": number,
        "accuracy": 0.1 + 0.1 * number,
        "macro-f1": 0.1 * number,
        "slots": 40,
        "alive": alive * 10,
        "alive-per-module": [alive] * 10,
        "dead-modules": 0,
        "bytes": sent,
        "bytes-total": 1_500_000 * number,
        "sampled": ["c1", "c2"],
        "good": 1,
        "dropped": [{"client": "c2", "reason": "timeout", "detail": "no reply"}],
        "seconds": 10.0,
        "seconds-evaluate": 2.0,
        "modelled-seconds": 7.0,
        **changes,
    }


def client_line(number: int, client: str = "c1", **changes: object) -> dict:
    line = {
        "type": "client",
        "round": number,
        "client": client,
        "num-examples": 10,
        "steps": 4.0,
        "seconds-train": 2.0 * number,
    }
    return {**line, "peak-memory-mb": 100.0 + number, "bytes-down": {"B": 1_000_000}, "bytes-up": {"B": 500_000}, **changes}


def lines(rounds: int = 4) -> list[dict]:
    made = [{"type": "start", "accuracy": 0.05}]
    for number in range(1, rounds + 1):
        made += [round_line(number), client_line(number, **{"modelled-device": "phone", "modelled-seconds": 3.0})]
    return [*made, {"type": "end", "outcome": "completed", "rounds": rounds, "seconds": 50.0, "test-accuracy": 0.625}]


def make(folder: Path, written: dict | None = None, log: list[dict] | None = None, tail: str = "") -> Path:
    """A run's folder; without arguments the one that all figures here are derived from."""
    folder.mkdir(parents=True)
    (folder / "federated.json").write_text(json.dumps(facts() if written is None else written))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (lines() if log is None else log)) + tail)
    return folder


def make_large(folder: Path, clients: int = 100, labels: int = 77, rounds: int = 30) -> Path:
    """Many clients, labels, modules and rounds; of a failed run, evaluated every third round."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, (clients, labels)) * (rng.random((clients, labels)) < 0.2)
    modules = [
        f"model.layers.{block}.{kind}"
        for block in range(24)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    log: list[dict] = []
    for number in range(1, rounds + 1):
        line = round_line(number, **{"alive-per-module": rng.integers(0, 13, len(modules)).tolist()})
        if number % 3:
            del line["accuracy"], line["macro-f1"]
        line["sampled"] = [f"hospital-{k}" for k in range(10)]
        line["dropped"] = [{"client": f"hospital-{k}", "reason": "timeout", "detail": "none " * 40} for k in range(8)]
        log += [line, *(client_line(number, f"hospital-{k}") for k in range(8, 10))]
    partition = {f"hospital-{k}": row.tolist() for k, row in enumerate(counts)}
    names = [f"a rather long label number {i}" for i in range(labels)]
    changes = {
        "partition": partition,
        "labels": names,
        "groups": names,
        "modules": modules,
        "blocks": [b for b in range(24) for _ in range(4)],
    }
    return make(folder, facts(name="large", outcome="failed", reason="too few replies", exported=None, **changes), log)


def make_hostile(folder: Path) -> Path:
    """Every text that may come from a client, or from somebody's configuration, tries to leave its place."""
    log = lines()
    for number, text in enumerate(HOSTILE):
        log.append(round_line(5 + number, sampled=[text], dropped=[{"client": text, "reason": text, "detail": text}]))
        log.append(
            client_line(
                5 + number, text, **{"modelled-device": text, "peak-memory-mb": 1e308, "steps": 0, "seconds-train": "x"}
            )
        )
    changes = {
        "labels": list(HOSTILE[:3]),
        "groups": list(HOSTILE[:3]),
        "partition": {text: [1, 2, 3] for text in HOSTILE},
        "config": dict.fromkeys(HOSTILE, HOSTILE[0]) | {"key": HOSTILE[1], "other": HOSTILE[2]},
        "left-out": {text: text for text in HOSTILE},
        "modules": [f"{text}.{i}" for i, text in enumerate((HOSTILE * 2)[:10])],
        "versions": {HOSTILE[0]: HOSTILE[1]},
    }
    strings = ("name", "reason", "method", "title", "paper", "model", "fingerprint", "task")
    return make(folder, facts(**changes, **dict(zip(strings, HOSTILE * 2, strict=False))), log)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make(tmp_path / "tiny")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such a run."""
    return write_report(make(tmp_path_factory.mktemp("shared") / "tiny"))


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.pictures: list[dict] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}={value!r}>"
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.references.append(value)
            if name in ("clip-path", "style"):
                self.references += re.findall(r"url\(([^)]+)\)", value)
        if tag == "svg":
            self.pictures.append(dict(attrs))


# -- reading ------------------------------------------------------------------------------------------------------------
def test_reads_a_run(tiny):
    run = read_run(tiny)
    assert (run.name, run.method, run.outcome, run.metric) == ("tiny", "fedara", "completed", "accuracy")
    assert run.numbers == [1, 2, 3, 4] and len(run.clients) == 4 and run.test["accuracy"] == 0.625


def test_a_last_line_cut_off_is_left_out(tmp_path):
    run = read_run(make(tmp_path / "run", tail='{"type": "round", "rou'))
    assert run.numbers == [1, 2, 3, 4] and run.unreadable == 1


def test_of_a_resumed_run_the_last_pass_counts(tmp_path):
    again = [{"type": "resume", "round": 2, "bytes": {}}, round_line(3, accuracy=0.9), client_line(3, "c9")]
    run = read_run(make(tmp_path / "run", log=[*lines(4), *again]))
    assert run.numbers == [1, 2, 3] and final(run) == 0.9
    assert [line["client"] for line in run.clients] == ["c1", "c1", "c9"]
    unsaid = read_run(make(tmp_path / "unsaid", log=[*lines(4), *again[1:]]))  # the line of the resumption was cut off
    assert unsaid.numbers == [1, 2, 3] and len(unsaid.clients) == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "federated.json and metrics.jsonl are missing"),
        ({"federated.json": "{"}, "cannot be read"),
        ({"federated.json": "[]"}, "list"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "none")


def test_one_of_the_two_files_is_enough(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (one / "federated.json").unlink()
    (other / "metrics.jsonl").unlink()
    assert read_run(one).name == "one" and read_run(one).outcome == "completed"
    assert read_run(other).rounds == [] and math.isnan(final(read_run(other)))
    for path in (one, other):
        write_report(path)


def test_the_end_line_counts_where_federated_json_still_says_running(tmp_path):
    assert read_run(make(tmp_path / "run", facts(outcome="running"))).outcome == "completed"
    assert read_run(make(tmp_path / "cut", facts(outcome="running"), lines()[:-1])).outcome == "running"


def test_characters_that_do_not_print_are_replaced():
    assert clean("a\x1b[31m\u202eb\ud800\ncé字") == "a\ufffd[31m\ufffdb\ufffd cé字"


# -- series, by hand ----------------------------------------------------------------------------------------------------
def test_series_over_rounds(tiny):
    run = read_run(tiny)
    assert cumulative_megabytes(run).tolist() == [1.5, 3.0, 4.5, 6.0]
    assert cumulative_seconds(run).tolist() == [12, 24, 36, 48]
    assert cumulative_modelled(run).tolist() == [7, 14, 21, 28]
    assert {part: values.tolist() for part, values in bytes_by_part(run, "down").items()} == {"B": [0.9] * 4, "head": [0.1] * 4}
    assert list(bytes_by_part(run, "up")) == ["B"]  # of the delta nothing travelled
    rounds, alive = alive_per_module(run)
    assert rounds == [1, 2, 3, 4] and alive.shape == (10, 4) and alive[0].tolist() == [4, 3, 2, 1]
    assert total_megabytes(run) == 8.0  # with what was sent after the last round
    assert total_seconds(run) == 50.0
    found = curve(run, "accuracy")
    assert found.rounds.tolist() == [0, 1, 2, 3, 4] and found.values[0] == 0.05 and found.megabytes[0] == 0


def test_bytes_are_added_up_where_the_total_is_missing(tmp_path):
    log = lines()
    for line in log:
        line.pop("bytes-total", None)
    assert cumulative_megabytes(read_run(make(tmp_path / "run", log=log))).tolist() == [1.5, 3.0, 4.5, 6.0]


def test_client_figures_per_round(tmp_path):
    log = [*lines(1), client_line(1, "c3", **{"seconds-train": 6.0}), client_line(1, "c4", steps=0.0)]
    found = spread(read_run(make(tmp_path / "run", log=log)), step_seconds)
    assert (found.rounds, found.low.tolist(), found.median.tolist(), found.high.tolist()) == ([1], [0.5], [1.0], [1.5])


def test_reaching_a_target_takes_the_mean_of_three_evaluations(tiny):
    run = read_run(tiny)  # 0.2, 0.3, 0.4, 0.5: means 0.3 and 0.4
    reached = to_target(run, 0.299)
    assert (reached.rounds, reached.megabytes, reached.seconds, reached.modelled) == (3, 4.5, 36, 21)
    assert to_target(run, 0.39).rounds == 4
    assert to_target(run, 0.41) is None


def test_a_run_that_began_at_the_target_took_no_round(tmp_path):
    """But what solving the head took: 0.3 MB, 4 s and its evaluation's 1.5, which the rounds' seconds begin with, too."""
    start = {"type": "start", "accuracy": 0.6, "head": {}, "bytes-total": 300_000, "seconds": 4.0, "modelled-seconds": 2.0}
    start["seconds-evaluate"] = 1.5
    for head, taken in (({"head": {"rows": 9}}, (0, 0.3, 5.5, 2)), ({}, (0, 0, 0, 0))):
        run = read_run(make(tmp_path / str(len(head)), log=[{**start, **head}, round_line(1)]))
        reached = to_target(run, 0.6)
        assert (reached.rounds, reached.megabytes, reached.seconds, reached.modelled) == taken
        assert curve(run, "accuracy").seconds.tolist() == [taken[2], taken[2] + 12]
    assert to_target(run, 0.61) is None


def test_rounds_without_evaluation_do_not_count_among_the_three(tmp_path):
    """Nor does the start: with its 0.49 three would be there in round 3."""
    log = [{"type": "start", "accuracy": 0.49}]
    for number in range(1, 8):
        line = round_line(number, accuracy=0.6)
        if number % 2 == 0:
            del line["accuracy"]
        log.append(line)
    assert to_target(read_run(make(tmp_path / "run", log=log)), 0.5).rounds == 5


def test_clients_totals(tiny):
    clients = per_client(read_run(tiny))
    assert [client.key for client in clients] == ["c1", "c2", "c10"]
    one, two, ten = clients
    assert (one.examples, one.asked, one.good, one.step, one.memory, one.down, one.up) == (10, 4, 4, 1.25, 104, 4.0, 2.0)
    assert (one.device, one.modelled) == ("phone", 12)
    assert (two.examples, two.asked, two.good, dict(two.dropped)) == (4, 4, 0, {"timeout": 4})
    assert (ten.examples, ten.asked, ten.left_out) == (6, 0, "labels differ")
    assert drops_by_reason(read_run(tiny)) == {"timeout": 4}


def test_keys_sort_as_people_count():
    assert sorted(["c10", "c9", "b", "10", "9"], key=natural) == ["9", "10", "b", "c9", "c10"]


def test_short_names_of_modules():
    assert short_names(MODULES, [0] * 5 + [1] * 5)[:5] == [
        "0 query",
        "0 key",
        "0 attention.output",
        "0 intermediate",
        "0 output",
    ]
    llama = ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"]
    assert short_names(llama, [3, 3]) == ["3 q_proj", "3 down_proj"]
    assert short_names(["a", "b"], [0, 0]) == ["0 a", "0 b"]


def test_entities_have_their_own_metric(tmp_path):
    log = [round_line(1, **{"entity-f1": 0.7})]
    run = read_run(
        make(tmp_path / "run", facts(task="token-classification", metric={"name": "entity-f1"}, test={"entity-f1": 0.6}), log)
    )
    assert run.metric == "entity-f1" and final(run) == 0.7
    page = write_report(run.path).read_text()
    assert "entity-f1, test" in page and "AutoModelForTokenClassification" in page


# -- the page -----------------------------------------------------------------------------------------------------------
def check_page(path: Path, pictures: int) -> Page:
    """Whole, on its own, and safe to put on a server."""
    page = Page(path)
    assert len(page.pictures) == pictures
    assert all(picture["role"] == "img" and picture["aria-labelledby"] in page.ids for picture in page.pictures)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert not {"script", "iframe", "object", "embed", "img", "form"} & set(page.tags)
    for reference in page.references:
        assert reference.startswith("data:") or (reference[0] == "#" and reference[1:] in page.ids), reference
    assert "Content-Security-Policy" in page.html and "default-src 'none'" in page.html
    assert plots.INK not in page.html and "\x00" not in page.html
    return page


def test_report_holds_what_was_measured(report):
    page = check_page(report, 6)
    for text in ("0.500", "0.625", "10 / 40", "8.0", "0.50 → 0.50", "4 / 8", "50.0 s", "28.0 s", "modelled time", "PeftModel"):
        assert text in page.html, text
    assert "timeout × 4" in " ".join(page.html.split()) and "left out: labels differ" in page.html
    assert ">0 attention.output</text>" in page.html  # text is text


def test_same_run_same_bytes(report, tiny, tmp_path):
    assert write_report(tiny, tmp_path / "again.html").read_bytes() == report.read_bytes()
    one, other = (write_comparison([tiny, tiny], tmp_path / name, 0.3).read_bytes() for name in ("a.html", "b.html"))
    assert one == other


def test_hostile_texts_stay_text(tmp_path):
    path = make_hostile(tmp_path / "run")
    report = check_page(write_report(path), 6)
    comparison = check_page(write_comparison([path, path], tmp_path / "comparison.html", 0.3), 3)
    for page in (report, comparison):
        assert page.html.count("</style>") == 1 and "49{%" not in page.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report.html and "{{ 7 * 7 }}{% raw %}" in report.html
    assert "\x1b" not in report.html and "\u202e" not in report.html


@pytest.mark.parametrize(
    ("budget", "words"), [(200_000.0, ", 0.00% of 200,000 MB allowed"), (5.0, ", 160.00% of 5 MB allowed"), (0.0, "</")]
)
def test_the_share_of_what_may_be_sent(tmp_path, budget, words):
    """8 MB of so many; without a budget no share is told."""
    config = {**facts()["config"], "wire.budget-mb": budget}
    page = write_report(make(tmp_path / "run", facts(config=config))).read_text()
    assert f"both directions, all clients{words}" in page


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_that_has_just_begun_has_a_page(tmp_path, rounds):
    changes = {
        "outcome": "running",
        "test": {},
        "bytes": {},
        "modelled": {},
        "partition": {},
        "exported": None,
        "seconds": None,
    }
    page = check_page(write_report(make(tmp_path / "run", facts(**changes), lines(1)[1 : 1 + 2 * rounds])), 5 * rounds)
    assert "still running, or cut off" in page.html and "fedara export tiny" in page.html


def test_whose_figures_stand_at_the_top(tmp_path):
    """The last round's and the exported model's, which may be an earlier round's."""
    page = write_report(make(tmp_path / "run")).read_text()
    assert "after the last round, 0.050 before round 1" in page and "of the model that is left" in page


def test_a_run_without_evaluation_has_a_page(tmp_path):
    log = [{key: value for key, value in line.items() if key not in ("accuracy", "macro-f1")} for line in lines()]
    page = check_page(write_report(make(tmp_path / "run", facts(test={}), [{"type": "start"}, *log[1:-1]])), 4)
    assert page.html.count("No evaluation was written.") == 2 and "not tested" in page.html
    assert "not reached" in write_comparison([tmp_path / "run"], tmp_path / "c.html", 0.5).read_text()


def test_a_model_that_only_a_package_has_is_no_hub_id(tmp_path):
    """Its name opens nothing: the page says where the adapter has the folder."""
    model = "SmolLM2-135M-Instruct-Q4_1"
    page = write_report(make(tmp_path / "run", facts(exported="adapter", task="causal-lm", model=model))).read_text()
    assert "  # not on the Hub: adapter_config.json has its folder\n" in page


def test_a_large_failed_run(tmp_path):
    path = write_report(make_large(tmp_path / "run"))
    page = check_page(path, 6)
    assert "failed: too few replies" in page.html and "and 40 more in metrics.jsonl" in page.html
    assert "block 23" in page.html and path.stat().st_size < 1_000_000


def test_a_merged_model_is_loaded_without_peft(tmp_path):
    page = write_report(make(tmp_path / "run", facts(exported="model"))).read_text()
    assert "PeftModel" not in page and "folder = run / &#34;model&#34;" in page and "from_pretrained(folder)" in page


def test_how_to_load_is_python(report):
    code = re.search(r"<pre[^>]*><code>(.*?)</code>", report.read_text(), re.S)[1].replace("&#34;", '"')
    compile(code, "page", "exec")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tiny, monkeypatch):
    page = tiny / "report.html"
    page.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_report(tiny)
    assert page.read_text() == "before"


# -- pictures -----------------------------------------------------------------------------------------------------------
def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", plots.COLOURS)
def test_colours_drop_busy_on_both_grounds(colour):
    assert contrast(colour, "#ffffff") >= 3 and contrast(colour, "#14171c") >= 3


def test_pictures_are_elements_without_a_style_sheet_or_size_of_their_own(tiny):
    picture = plots.alive_ranks(read_run(tiny))
    root = ET.fromstring(picture)
    assert root.tag == "svg" and set(root.attrib) == {"viewBox", "role", "aria-labelledby"} and root[0].tag == "title"
    assert not list(root.iter("style")) and not list(root.iter("metadata"))
    assert "currentColor" in picture and 'href="data:image/png;base64,' in picture


# -- comparisons --------------------------------------------------------------------------------------------------------
@pytest.fixture
def several(tmp_path: Path) -> list[Path]:
    """Two seeds of fedara, one of it with another rank, one of head whose accuracy is lower."""
    config = facts()["config"]
    low = [round_line(number, accuracy=0.1) for number in range(1, 5)]
    return [
        make(tmp_path / "runs" / "one", facts(name="one")),
        make(tmp_path / "runs" / "low", facts(name="low", method="head", config={**config, "method": "head"}), low),
        make(tmp_path / "runs" / "two", facts(name="two", seed=2, config={**config, "seed": 2, "run.name": "two"})),
        make(tmp_path / "runs" / "wide", facts(name="wide", config={**config, "adapter.rank": 8})),
    ]


def test_seeds_of_one_setting_belong_together(several):
    runs = [read_run(path) for path in several]
    found = group(runs)
    assert [(g.label, [run.name for run in g.runs]) for g in found] == [
        ("fedara, adapter.rank=4", ["one", "two"]),
        ("head", ["low"]),
        ("fedara, adapter.rank=8", ["wide"]),
    ]
    assert differences(runs) == {"adapter.rank": ["4", "4", "4", "8"]}
    picture = plots.compared(found, "megabytes", 0.3)
    assert [picture.count(f"stroke: {colour}; stroke-width: 1.8") for colour in plots.COLOURS[:3]] == [
        3,
        2,
        2,
    ]  # and the legend


def test_tables(several):
    runs, reached = tables(group([read_run(path) for path in several[:2]]), 0.3)
    assert runs.rows[0] == ["one", "fedara", "1", "4", "0.500", "0.625", "8.0", "50.0 s", "28.0 s"]
    assert reached.rows == [
        ["one", "fedara", "1", "3", "4.5", "36.0 s", "21.0 s"],
        ["low", "head", "1", "not reached", "–", "–", "–"],
    ]


def test_comparison_page(several, tmp_path):
    page = check_page(write_comparison(several, tmp_path / "comparison.html", 0.3), 3)
    assert page.html.index("compared-megabytes") < page.html.index("compared-rounds") < page.html.index("compared-hours")
    assert "not reached" in page.html and "target 0.3" in page.html


def test_without_a_modelled_clock_there_is_no_picture_of_it(tmp_path):
    log = [{key: value for key, value in line.items() if not key.startswith("modelled")} for line in lines()]
    check_page(write_comparison([make(tmp_path / "run", log=log)], tmp_path / "comparison.html"), 2)


# -- commands -----------------------------------------------------------------------------------------------------------
def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report_command(tiny, tmp_path, monkeypatch):
    assert call("report", tiny).output.strip().endswith("tiny/report.html")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    tiny.rename(tmp_path / "runs" / "tiny")
    done = call("report", "tiny", "--out", "page.html")
    assert done.exit_code == 0 and (tmp_path / "page.html").is_file()
    done = call("report", "tinny")
    assert done.exit_code == 1 and "tinny" in done.output and "Traceback" not in done.output


def test_compare_command(several, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("compare", "one", several[1], "--target", 0.3)
    assert done.exit_code == 0, done.output
    assert "not reached" in done.output and "36.0 s" in done.output and (tmp_path / "comparison.html").is_file()
    for arguments in (
        ("compare", "one", "--target", 30),
        ("compare", "one", "--out", "/proc/no/page.html"),
        ("compare", "none"),
    ):
        done = call(*arguments)
        assert done.exit_code == 1 and "error: " in done.output and "Traceback" not in done.output


def test_terminal_takes_no_markup_or_escapes_from_a_run(tmp_path):
    done = call("compare", make_hostile(tmp_path / "run"), "--out", tmp_path / "page.html")
    assert done.exit_code == 0 and "\x1b" not in done.output and "<script>alert(1)</script>" in done.output

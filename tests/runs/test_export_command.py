"""`fedara export`: whole runs in every format, loaded by stock libraries; cards; folders; the Hub. And the README's lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DECODER, MINILM
from export_helper import stock_logits, stock_run
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from markdown_it import MarkdownIt
from runs_helper import CLIENTS, config
from transformers import AutoModel, LlamaConfig
from typer.testing import CliRunner

from fedara_flwr import engine
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.cli import app
from fedara_flwr.cli.exporting import EXPORT_FORMATS
from fedara_flwr.model.deltas import Weights
from fedara_flwr.runs.card import has_card, write_card
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.strategies.fedara import FedARA
from fedara_flwr.tasks import read_settings

README = Path(__file__).parents[2] / "README.md"
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A tiny Llama with MiniLM's tokenizer, whose configuration names another padding token."""
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = load_tokenizer(MINILM)
    torch.manual_seed(0)
    config = LlamaConfig(**DECODER | {"vocab_size": len(tokenizer)}, pad_token_id=7)
    AutoModel.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tiny_bert, tiny_llama):
    """Folders of base models; `half` is a decoder in bfloat16."""
    half = tiny_llama.parent / "half"
    AutoModel.from_pretrained(tiny_llama).bfloat16().save_pretrained(half)
    load_tokenizer(MINILM).save_pretrained(half)
    return {"bert": tiny_bert, "llama": tiny_llama, "half": half}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Folder of a finished run of (architecture, method), made when first asked for."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    data = root / "tickets.csv"
    rows = [f"{COLOURS[i % 3]} {'thing ' * (i % 7)}number {i},{COLOURS[i % 3]}" for i in range(240)]
    data.write_text("\n".join(["text,label", *rows]) + "\n")

    def make(name: str, method: str) -> Path:
        if (name, method) not in found:
            settings = config(base[name], method=method, num_server_rounds=2, fedara__warmup_rounds=0, data__path=str(data))
            settings |= {"data.test": 0.2, "run.dir": str(root), "run.name": f"{name}-{method}", "run.export": "last"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html"
                )  # pictures take seconds
                found[name, method] = engine.run(settings, CLIENTS).path
        return found[name, method]

    return make


def export(*arguments: object):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (4, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def opened(path: Path) -> tuple[ServerModel, Weights]:
    """The server's model, and what the run's newest checkpoint holds."""
    run = open_run(path)
    return run.model, run.method.weights(run.state)


def logits(path: Path) -> np.ndarray:
    """Of the trained model that the run's newest checkpoint holds."""
    model, weights = opened(path)
    model.adapted.set_delta(weights.delta)
    model.adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        return model.adapted.outputs(batch()).logits.numpy()


@pytest.mark.parametrize("method", ["fedara", "fedlora", "federa"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_format_has_the_runs_logits_in_stock_libraries(run, base, name, method):
    path = run(name, method)
    expected = logits(path)
    for kind in EXPORT_FORMATS:
        done = export(path, "--format", kind)
        assert done.exit_code == 0, done.output
        found = stock_logits(kind, base[name], path / "exports" / kind, batch())
        np.testing.assert_allclose(found, expected, atol=5e-6)
        card = ModelCard.load(path / "exports" / kind / "README.md")
        assert card.data.library_name == ("transformers" if kind == "merged" else "peft")
    facts = read_facts(path)
    if method == "fedara":  # what the formats have to get right was there
        assert 0 in facts["alive-per-module"] and 0 < max(facts["alive-per-module"])
        assert sum(facts["alive-per-module"]) < sum(facts["ranks"])
    adapter = path / "exports" / "lora" / "adapter_config.json"
    lora = json.loads(adapter.read_text())
    assert lora["r"] == lora["lora_alpha"] and not lora["rank_pattern"] and not lora["alpha_pattern"]


def test_training_shows_in_the_exports(run, base):
    """Else the formats would agree by having left it out: the head alone gives other logits."""
    path = run("bert", "fedara")
    model, weights = opened(path)
    model.adapted.load(weights.arrays | {"E": np.zeros_like(weights.arrays["E"])}, weights.mask, weights.scales)
    with torch.no_grad():
        assert np.abs(model.adapted.outputs(batch()).logits.numpy() - logits(path)).max() > 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_goes_on_from_a_merged_export(run, name, tmp_path):
    """Its head begins with the export's values and logits, and a line says so; solved anew it is if that is asked for."""
    path, merged = run(name, "fedara"), tmp_path / "merged"
    assert export(path, "--format", "merged", "--out", merged).exit_code == 0
    flat = {**read_facts(path)["config"], "model.name": str(merged), "run.name": ""}
    settings = read_settings(flat)
    model = ServerModel(settings)
    method = FedARA(settings, model)
    start = method.start()
    np.testing.assert_array_equal(start.arrays["head"], opened(path)[1].arrays["head"])
    model.load(method.weights(start))
    with torch.no_grad():
        np.testing.assert_allclose(model.adapted.outputs(batch()).logits.numpy(), logits(path), atol=5e-6)
    kept = "head: the checkpoint's, its labels are the run's"
    assert kept in model.overview().lines
    model.settings = read_settings(flat | {"head.start": "statistics"})
    assert f"{kept}; head.start = 'statistics' solves its last layer anew, 'random' keeps it" in model.overview().lines
    model = ServerModel(settings, ("red", "green", "grey"))
    assert model.backbone.head_refused == "the checkpoint's is for other labels ('blue', 'green', 'red')"


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
@pytest.mark.parametrize("name", ["bert", "half"])
def test_the_cards_own_lines_load_it(run, base, name, kind):
    """As they stand, but for the two folders: the export's, and the base model's, of which a card tells the name alone."""
    path, folder = run(name, "fedara"), run(name, "fedara") / "exports" / kind
    if not has_card(folder):
        assert export(path, "--format", kind).exit_code == 0
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code.count("\n") <= 11
    texts = ["some text", "a longer text than that"]
    more = f'logits = model(**tokenizer({texts}, padding=True, return_tensors="pt")).logits'
    code = code.replace("path/to/this/folder", str(folder)).replace(f"'{name}'", f"'{base[name]}'")
    printed, found = stock_run(code + more)
    model, weights = opened(path)
    model.adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        expected = model.adapted.outputs(dict(model.learner.tokenizer(texts, padding=True, return_tensors="pt"))).logits.numpy()
    rounded = name == "half" and kind == "merged"  # as the checkpoint is
    np.testing.assert_allclose(found, expected, atol=5e-3 if rounded else 5e-6)
    assert printed.strip() == model.labels[expected[0].argmax()]


@pytest.mark.parametrize("name", ["bert", "half"])
def test_the_readmes_lines_load_a_runs_adapter(run, base, name):
    """As they stand, but for the run's folder and, for the Hub's id, the base model's; then with texts of two lengths."""
    block = re.search(r"The adapter loads in stock PEFT.*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = block[1]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 12
    path = run(name, "fedara")
    assert code.count("runs/<name>") == 1 and code.count(MINILM) == 1
    texts = [re.search(r'tokenizer\("(.*?)"', code)[1], "short"]
    more = f'logits = model(**tokenizer({texts}, padding=True, return_tensors="pt")).logits'
    printed, found = stock_run(code.replace("runs/<name>", str(path)).replace(MINILM, str(base[name])) + more)
    model, weights = opened(path)
    model.adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():  # one by one: padding changes nothing
        each = [model.adapted.outputs(dict(model.learner.tokenizer(text, return_tensors="pt"))) for text in texts]
    expected = torch.cat([outputs.logits for outputs in each]).numpy()
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert printed.strip() == model.labels[expected[0].argmax()]


@pytest.mark.parametrize("method, why", [("full", "changes the backbone"), ("head", "has no adapter")])
def test_what_a_method_does_not_have_is_refused(run, base, method, why):
    path = run("bert", method)
    done = export(path, "--format", "lora")
    assert done.exit_code == 1 and f"--format lora: method '{method}' {why}, allowed is merged" in done.output
    assert not (path / "exports" / "lora").exists()
    if method == "head":
        assert export(path, "--format", "merged").exit_code == 0
        np.testing.assert_allclose(stock_logits("merged", "", path / "exports" / "merged", batch()), logits(path), atol=5e-6)


# -- folders ------------------------------------------------------------------------------------------------------------
def test_an_export_replaces_an_export_and_nothing_else(run, tmp_path):
    path, out = run("bert", "fedara"), tmp_path / "out"
    assert export(path, "--format", "merged", "--out", out).exit_code == 0
    assert (out / "config.json").exists()
    (out / "notes.txt").write_text("mine")
    assert export(path, "--out", out).exit_code == 0
    assert (out / "adapter_config.json").exists() and (out / "notes.txt").read_text() == "mine"
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("# Mine\n")
    done = export(path, "--out", other)
    assert done.exit_code == 1 and "something else than an export, allowed with --force" in done.output
    assert [file.name for file in other.iterdir()] == ["README.md"]
    assert export(path, "--out", other, "--force").exit_code == 0 and has_card(other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--format", "pfet"], "--format = 'pfet': allowed are peft, lora, merged; did you mean 'peft'?"),
        (["--push", "not a name"], "--push = 'not a name'"),
        (["--out", "{file}"], "this is a file, allowed is a folder"),
        (["--out", "{file}/in"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, arguments, line):
    file = tmp_path / "file"
    file.write_text("")
    done = export(run("bert", "fedara"), *(argument.format(file=file) for argument in arguments))
    assert done.exit_code == 1 and line in done.output
    assert done.output.startswith("error: ") and done.output.count("\n") == 1


def test_no_run_is_one_line(tmp_path):
    done = export(tmp_path / "nothing")
    assert done.exit_code == 1 and done.output.startswith("error: ") and done.output.count("\n") == 1


# -- the Hub ------------------------------------------------------------------------------------------------------------
class Hub:
    """In place of HfApi: records what it is asked."""

    private, error = True, None

    def __init__(self):
        self.calls = []

    def create_repo(self, repository, **options):
        self.calls.append(("create_repo", repository, options))
        if self.error:
            raise self.error
        return f"https://hub/{repository}"

    def repo_info(self, repository):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options):
        folder = Path(options["folder_path"])
        self.calls.append(("upload_folder", options["repo_id"], {**options, "there": {f.name for f in folder.iterdir()}}))


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr("fedara_flwr.cli.exporting.HfApi", lambda: made)
    return made


def test_nothing_is_pushed_unless_asked(run, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("the network was used"))
    assert export(run("bert", "fedara"), "--out", tmp_path / "out").exit_code == 0
    assert hub.calls == []


@pytest.mark.parametrize("option, private", [([], True), (["--public"], False)])
def test_push_makes_a_repository_and_uploads_the_export_alone(run, base, tmp_path, hub, option, private):
    out = tmp_path / "out"
    out.mkdir()
    (out / "secret.txt").write_text("mine")
    done = export(run("bert", "fedara"), "--out", out, "--force", "--push", "me/model", *option)
    assert done.exit_code == 0 and "pushed: https://hub/me/model" in done.output
    (made, name, options), (uploaded, to, what) = hub.calls
    assert (made, name, options) == ("create_repo", "me/model", {"private": private, "exist_ok": True})
    assert (uploaded, to) == ("upload_folder", "me/model")
    assert set(what["allow_patterns"]) == what["there"] - {"secret.txt"} > {"README.md", "adapter_model.safetensors"}
    for file in what["allow_patterns"]:  # nobody learns where the base model lay
        if file != "adapter_model.safetensors":
            assert str(base["bert"].parent) not in (out / file).read_text(), file
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "bert"


def test_a_public_repository_is_not_pushed_to_by_default(run, tmp_path, hub):
    hub.private = False
    done = export(run("bert", "fedara"), "--out", tmp_path / "out", "--push", "me/model")
    assert done.exit_code == 1 and "the repository exists and is public, allowed with --public" in done.output
    assert [name for name, *_ in hub.calls] == ["create_repo"]


class Refused(Exception):
    response = SimpleNamespace(status_code=401)


@pytest.mark.parametrize(
    "error, line",
    [
        (LocalTokenNotFoundError("long\ntext"), "wants a token that may write there"),
        (Refused("long\ntext"), "wants a token that may write there"),
        (ConnectionError("no route\nmore"), "no route; the export is kept in"),
    ],
)
def test_a_failed_push_is_one_line_and_keeps_the_export(run, tmp_path, hub, error, line):
    hub.error = error
    done = export(run("bert", "fedara"), "--out", tmp_path / "out", "--push", "me/model")
    assert done.exit_code == 1 and line in done.output.splitlines()[-1]
    assert done.output.splitlines()[-1].startswith("error: --push = 'me/model': ")
    assert has_card(tmp_path / "out")


# -- cards --------------------------------------------------------------------------------------------------------------
FACTS = {
    "name": "fedara",
    "outcome": "completed",
    "reason": "",
    "rounds": 6,
    "test": {"accuracy": 0.575, "macro-f1": 0.49, "loss": 1.25},
    "method": "fedara",
    "title": "adapters",
    "paper": "arXiv 2501.14406",
    "model": MINILM,
    "task": "classification",
    "labels": list(COLOURS),
    "config": {
        "num-server-rounds": 6,
        "data.path": "",
        "data.name": "fancyzhx/ag_news",
        "data.partition": "dirichlet",
        "data.dirichlet-alpha": 0.5,
        "data.max-length": 64,
        "strategy.fraction-train": 0.25,
    },
    "bytes": {"down.B": 1_500_000, "down.other": 500_000, "up.B": 3_000_000},
    "partition": {str(i): [1, 2, 3] for i in range(20)},
    "versions": {"flwr": "1.41.0"},
}


def card(folder: Path, kind: str = "merged", config: dict | None = None, **changes: object) -> ModelCard:
    write_card(folder, {**FACTS, **changes, "config": FACTS["config"] | (config or {})}, kind)
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_the_run_was(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    found = card(tmp_path, "peft", revision="0123abcd")
    data = found.data
    assert (data.base_model, data.datasets, data.pipeline_tag) == (MINILM, ["fancyzhx/ag_news"], "text-classification")
    assert {"federated-learning", "flower", "fedara", "lora"} <= set(data.tags)
    metrics = {result.metric_name: (result.metric_type, result.metric_value) for result in data.eval_results}
    assert metrics == {"accuracy": ("accuracy", 0.575), "macro-f1": ("f1", 0.49), "loss": ("loss", 1.25)}
    for line in (
        "[arXiv 2501.14406](https://arxiv.org/abs/2501.14406)",
        "- Clients: 20, 25% of them in each round",
        "- Rounds: 6\n",
        "2.00 MB to the clients, 3.00 MB from them",
        f"from_pretrained('{MINILM}', revision='0123abcd', id2label=dict(enumerate(labels)), ",
        "- `accuracy`: 0.5750 (main metric)\n",
        "- 0: `red`\n- 1: `green`\n- 2: `blue`",
        "PEFT warns that keys of `rank_pattern` match no module and are ignored. It is a false alarm",
    ):
        assert line in found.text, line
    assert "rank_pattern` match" not in card(tmp_path, "merged").text


def test_a_card_of_a_stopped_run_on_devices(tmp_path):
    facts = {name: value for name, value in FACTS.items() if name != "partition"}
    write_card(tmp_path, {**facts, "outcome": "failed", "reason": "no node", "rounds": 2, "test": {}, "clients": 3}, "lora")
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.eval_results is None and "model_name" not in found.data.to_dict()
    for line in ("- Rounds: 2 of 6 (`failed`, `no node`)", "- Clients: 3, 25%", "the clients' own", "was not tested"):
        assert line in found.text


def test_a_card_of_tags_names_the_class(tmp_path):
    found = card(tmp_path, task="token-classification", test={"entity-f1": 0.5, "loss": float("nan")})
    assert "AutoModelForTokenClassification.from_pretrained" in found.text
    assert [(r.metric_type, r.metric_name) for r in found.data.eval_results] == [("f1", "entity-f1")]


EVIL = [
    "x\n---\nlicense: mit\n---\n# Evil",
    "<script>alert(1)</script>",
    "`<b>`",
    "`<b>",
    "```\n# Evil\n```",
    "[a](http://evil)",
    "'; import os; '",
    "| http://evil www.evil.org @you",
    "\u202egpj.exe \ud800 \x1b[31m",
    "",
]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_hostile_texts_stay_texts(tmp_path, evil, kind):
    names = {"name": evil, "title": evil, "paper": evil, "outcome": evil, "reason": evil, "model": f"/home/me/{evil}"}
    path = {"data.path": f"/home/me/{evil}", "data.partition": evil}
    found = card(tmp_path, kind, path, labels=[evil, "b"], versions={evil: evil}, **names)
    plain = card(tmp_path, kind, {"data.path": "/d"}, labels=["a", "b"], model="/m", reason="r", outcome="o", paper="p")
    assert set(found.data.to_dict()) == set(plain.data.to_dict())
    shapes = [[token.type for token in MarkdownIt().parse(text.text)] for text in (found, plain)]
    assert shapes[0] == shapes[1]
    inline = [child for token in MarkdownIt().parse(found.text) for child in token.children or ()]
    assert {token.type for token in inline} <= {"text", "code_inline", "softbreak", "link_open", "link_close"}
    assert [token.attrs["href"] for token in inline if token.type == "link_open"] == ["https://flower.ai"]
    if evil.isprintable():
        assert (evil or " ") in {token.content for token in inline if token.type == "code_inline"}
    assert "/home/me" not in found.content and "\u202e" not in found.content
    (code,) = [token.content for token in MarkdownIt().parse(found.text) if token.type == "fence"]
    names = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith("labels = [") and "model" not in line), names)
    assert names.get("labels", [evil, "b"]) == [evil, "b"]


def test_a_file_that_is_no_card_is_not_ours(tmp_path):
    assert not has_card(tmp_path)
    for text in ("", "---\ntags: [other]\n---\n", "---\n[\n---\n", "\xff"):
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
        assert not has_card(tmp_path)

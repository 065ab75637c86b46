"""The model card beside every export, and how to find one again. No torch, no network.

What a card says comes from the run's federated.json, where labels and names may be anybody's: in the text they stand in code
spans, on one line, so that no Markdown, HTML or YAML of theirs has a meaning.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fedara_flwr.adapters.packaged import NOTES
from fedara_flwr.config import BUILT_IN_DATA, DataSettings
from fedara_flwr.report.loading import base_arguments, loading_code
from fedara_flwr.tasks import Task, open_task

OURS = "fedara-flwr"
FORMAT_TEXTS = {
    "ADALORA": "PEFT adapters in AdaLoRA's format, `rank_pattern` says which rank slots live",
    "LORA": "PEFT adapters, LoRA with a rank for each layer",
    "lora": "PEFT adapters, plain LoRA of one rank (`lora_alpha` = rank), for tools that know nothing else",
    "merged": "the whole model, all that was trained merged into its weights",
}

RANK_PATTERN = (
    "PEFT warns that keys of `rank_pattern` match no module and are ignored. It is a false alarm: PEFT looks for layers of "
    "that name, AdaLoRA's own keys end in `.lora_E`, and they are applied."
)


def write_card(folder: Path, facts: dict[str, Any], kind: str) -> None:
    """Make `folder/README.md`, a model card as the Hugging Face Hub reads it.

    Args:
        facts: what federated.json says; `revision` (of the base model) and `clients` (how many there were) may be added.
        kind: format of the weights in `folder`: "peft", "lora" or "merged".
    """
    content = f"---\n{_metadata(facts, kind).to_yaml()}\n---\n\n{_body(folder, facts, kind)}"
    ModelCard(content).save(folder / "README.md")


def has_card(folder: Path) -> bool:
    """Whether `folder` holds a card that `write_card` made."""
    try:
        return OURS in (ModelCard.load(folder / "README.md").data.tags or [])
    except Exception:  # no file, no YAML, other types: whatever it is, it is not ours
        return False


def base_name(facts: dict[str, Any]) -> str:
    """The base model as others may know it: its Hub id, or the name of its folder without the way there."""
    return _public(facts["model"])


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository of the Hub, and is no folder here or model that a package carries alone."""
    if name in NOTES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _public(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name


def _data_name(facts: dict[str, Any]) -> str:
    config = facts["config"]
    return Path(config["data.path"]).name if config["data.path"] else _public(config["data.name"])


def _metadata(facts: dict[str, Any], kind: str) -> ModelCardData:
    config, task = facts["config"], _task(facts).pipeline or None
    data = _line(_data_name(facts))
    on_hub = not config["data.path"] and config["data.name"] not in BUILT_IN_DATA and is_hub_id(config["data.name"])
    results = [
        EvalResult(
            task_type=task or facts["task"],
            dataset_type=data,
            dataset_name=data,
            dataset_split="test",
            metric_type="f1" if name.endswith("f1") else name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in _metrics(facts).items()
    ]
    adapters = kind != "merged"
    return ModelCardData(
        base_model=facts["model"] if is_hub_id(facts["model"]) else None,
        datasets=[config["data.name"]] if on_hub else None,
        eval_results=results or None,
        library_name="peft" if adapters else "transformers",
        model_name=_line(facts["name"]) if results else None,
        pipeline_tag=task,
        tags=["federated-learning", "flower", OURS, _line(facts["method"]), *(["lora"] if adapters else [])],
    )


def _metrics(facts: dict[str, Any]) -> dict[str, float]:
    """The test metrics that are finite, by name, rounded to four digits."""
    return {_line(name): round(value, 4) for name, value in facts.get("test", {}).items() if math.isfinite(value)}


def _body(folder: Path, facts: dict[str, Any], kind: str) -> str:
    revision = f" at revision {_code(facts['revision'])}" if facts.get("revision") else ""
    versions = ", ".join(f"{_code(name)} {_code(version)}" for name, version in facts["versions"].items())
    metrics = _metrics(facts)
    lines = [
        f"# {_code(facts['name'])}",
        "",
        f"{_code(base_name(facts))}, fine-tuned by federated learning with [Flower](https://flower.ai).",
        "",
        f"- Base model: {_code(base_name(facts))}{revision}",
        *(f"- {line}" for line in _note(facts)),
        f"- Method: {_code(facts['method'])}, {_code(facts['title'])}{_paper(facts['paper'])}",
        f"- Format: {FORMAT_TEXTS[_format(folder, kind)]}",
        f"- Data: {_data(facts)}",
        f"- Rounds: {facts['rounds']}{_outcome(facts)}",
        *([f"- Weights: of {_line(facts['export']['said'])}"] if facts.get("export") else []),
        f"- Clients: {_clients(facts)}",
        *_privacy(facts),
        f"- Traffic of all rounds and clients: {_megabytes(facts, 'down')} to the clients, {_megabytes(facts, 'up')} from them",
        f"- Made with: {versions}",
        "",
        "## Metrics",
        "",
        "On the test data, once, after the last round:" if metrics else "The model was not tested.",
        "",
        *(f"- {_code(name)}: {value:.4f}{_direction(facts, name)}{_before(facts, name)}" for name, value in metrics.items()),
        "",
        "## How to load it",
        "",
        "```python",
        *_loading(facts, kind),
        "```",
        *(["", RANK_PATTERN] if _format(folder, kind) == "ADALORA" else []),
        *(["", "## Labels", ""] if facts["labels"] else []),
        *(f"- {i}: {_code(label)}" for i, label in enumerate(facts["labels"])),
    ]
    return "\n".join(lines) + "\n"


def _note(facts: dict[str, Any]) -> list[str]:
    """What must be known of a base that no hub has."""
    if not (note := NOTES.get(facts["model"])):
        return []
    find = f"from fedara_flwr.adapters.packaged import find; print(find({facts['model']!r}))"
    return [note, f'On a machine that has this project and that package, its folder is what `python -c "{find}"` prints.']


def _direction(facts: dict[str, Any], name: str) -> str:
    """Says which metric is the main one, and that lower is better where it is."""
    main = _task(facts).metric
    if name != main.name:
        return ""
    return " (main metric)" if main.higher else " (main metric, lower is better)"


def _before(facts: dict[str, Any], name: str) -> str:
    """The metric of the model that nothing was laid on, where it was tested, too."""
    value = facts.get("unadapted", {}).get(name, math.nan)
    return f"; {value:.4f} before" if math.isfinite(value) else ""


def _format(folder: Path, kind: str) -> str:
    """Key of FORMAT_TEXTS; "peft" is what the adapters' own configuration says."""
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"] if kind == "peft" else kind


def _paper(paper: str) -> str:
    arxiv = re.fullmatch(r"arXiv (\d{4}\.\d{4,5})", paper)
    if arxiv:
        return f" ([{paper}](https://arxiv.org/abs/{arxiv[1]}))"
    return f" ({_code(paper)})" if paper else ""


def _data(facts: dict[str, Any]) -> str:
    config, name = facts["config"], _code(_data_name(facts))
    cut = f"; texts cut at {config['data.max-length']} tokens"
    if not facts.get("simulated", "partition" in facts):  # every device has its own
        return f"the clients' own; tested on {name}{cut}"
    how = _code(config["data.partition"])
    alpha = f" (α = {config['data.dirichlet-alpha']})" if config["data.partition"] == "dirichlet" else ""
    return f"{name}, dealt out to simulated clients by {how}{alpha}{cut}"


def _clients(facts: dict[str, Any]) -> str:
    count = facts.get("clients") or len(facts.get("partition", {}))
    share = f"{facts['config']['strategy.fraction-train']:.0%} of them in each round"
    return f"{count}, {share}" if count else share


def _privacy(facts: dict[str, Any]) -> list[str]:
    if not (privacy := facts.get("privacy")):
        return []
    budget = f"ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:g}, noise multiplier {privacy['noise-multiplier']:g}"
    return [f"- Differential privacy of each client: {budget}; {_code(privacy['mechanism'])}; {_code(privacy['adjacency'])}"]


def _outcome(facts: dict[str, Any]) -> str:
    words = [facts["outcome"]] if facts["outcome"] != "completed" else []
    words += [facts["reason"]] if facts.get("reason") else []
    return f" of {facts['config']['num-server-rounds']} ({', '.join(map(_code, words))})" if words else ""


def _megabytes(facts: dict[str, Any], way: str) -> str:
    return f"{sum(size for part, size in facts['bytes'].items() if part.startswith(way + '.')) / 1e6:.2f} MB"


def _loading(facts: dict[str, Any], kind: str) -> list[str]:
    """Python lines that load the folder and use it with stock libraries."""
    place = ['folder = "path/to/this/folder"  # or its id on the Hub']
    if kind == "merged":
        return loading_code(_task(facts), base=None, place=place)
    note = "" if is_hub_id(facts["model"]) else "  # a local folder"
    base = base_arguments(repr(base_name(facts)), facts)
    return loading_code(_task(facts), base=base, place=place, labels=repr(facts["labels"]), note=note)


def _task(facts: dict[str, Any]) -> Task:
    return open_task(DataSettings(task=facts["task"], options=facts["config"].get("data.options", "")))


def _line(text: object) -> str:
    """A text on one line: what cannot be printed, line ends and marks of direction among it, becomes a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    """A text as a Markdown code span, whatever is in it."""
    line = _line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"

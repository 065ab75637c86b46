"""The server's model: evaluation on its validation and test data, and export. The only torch on the server."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.export import base_of, revision, save_adapters, save_model
from fedara_flwr.adapters.features import features
from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.config import Settings
from fedara_flwr.data.federation import Federation, federation, shares
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Weights
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.model.parts import of_backbone
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server.roster import Expected
from fedara_flwr.strategies.base import Places
from fedara_flwr.tasks import Encoded, Sample, open_task, read_settings
from fedara_flwr.tasks.overview import Overview, overview

MOST_ROWS = 2000  # validation rows by which one temperature is fitted
Kind = Literal["peft", "lora", "merged"]


logger = logging.getLogger(__name__)


class ServerModel:
    """What methods see of the model: `spec`, `weight` and `evaluate`; and the run's task and data."""

    def __init__(self, settings: Settings, labels: tuple[str, ...] | None = None) -> None:
        """`labels` stand for the data's own, which is then loaded only when it is needed."""
        self.settings, self.task = settings, open_task(settings.data)
        self._with_data = labels is None
        if labels is None:
            labels = self.federation.labels
        self.labels = labels
        self.learner = open_learner(settings, self.labels)
        self.adapted = self.learner.adapted
        self.backbone = self.adapted.backbone
        self.spec = self.backbone.spec
        self._encoded: dict[str, Encoded] = {}

    @property
    def federation(self) -> Federation:
        """The run's data, as server and simulated clients share it."""
        return federation(self.settings.data, self.settings.seed, self.task)

    def overview(self) -> Overview:
        """What data the run has."""
        data = self.federation
        parts = {"train": data.pool, "validation": data.validation, "test": data.test}
        most = self.settings.data.max_length
        found = overview(self.task, self.learner.tokenizer, parts, self.labels, most, data.skipped)
        return found._replace(lines=(*found.lines, *self.checkpoints_head()))

    def checkpoints_head(self) -> list[str]:
        """What becomes of the head that the checkpoint has; [] where it has none."""
        start = self.settings.head.start
        if self.backbone.head_refused:
            return [f"head: {self.backbone.head_refused}; it begins anew"]
        if self.spec.kept is None:
            return []
        solved = f"; head.start = {start!r} solves its last layer anew, 'random' keeps it" if start != "random" else ""
        return [f"head: the checkpoint's, its labels are the run's{solved if self.task.classes else ''}"]

    def partition(self, clients: int) -> dict[str, Any]:
        """What each of so many simulated clients has, for federated.json.

        `partition` has the examples of each by group or category, or their number alone where the rows have neither, and
        `groups` has the names of these.
        """
        kinds = self.federation.pool.kinds(self.task.group_names(self.labels))
        dealt = shares(self.settings.data, self.settings.seed, self.task, clients)
        if kinds is None:
            return {"partition": {str(i): [len(rows)] for i, rows in enumerate(dealt)}, "groups": []}
        numbers, names = kinds
        counts = {str(i): np.bincount(numbers[rows], minlength=len(names)).tolist() for i, rows in enumerate(dealt)}
        return {"partition": counts, "groups": list(names)}

    def weight(self, name: str) -> NDArray[np.float32]:
        """The frozen weight of a module, float32, shape (d_out, d_in)."""
        return self.adapted.resident_weight(name)

    def evaluate(self, weights: Weights, split: Literal["validation", "test"] = "validation") -> dict[str, float]:
        """The task's metrics of a global model on one of the server's splits."""
        data = self._split(split)
        self.load(weights)
        return self.learner.evaluate(data, self.settings.train.batch_tokens)

    def unadapted(self) -> Weights:
        """The backbone as it was published, of a task without a head."""
        modules = len(self.spec.modules)
        return Weights({}, RankMask.full([0] * modules), (1.0,) * modules, None)

    def samples(self, weights: Weights) -> list[Sample]:
        """What a global model says by itself to some validation rows; [] where its task has nothing to say."""
        data = self._split("validation")
        self.load(weights)
        return self.task.samples(self.learner, data)

    def _split(self, split: str) -> Encoded:
        """One of the server's splits, tokenised, and torch set to the server's threads."""
        if split not in self._encoded:
            encoded = self.learner.encode(getattr(self.federation, split), self.settings.data.max_length)
            if encoded.notes:
                logger.info("%s rows: %s", split, encoded.notes)
            self._encoded[split] = encoded
        torch.set_num_threads(self.settings.run.threads or os.cpu_count() or 1)
        return self._encoded[split]

    def places(self) -> Places:
        """The head's last layer, and what enters it of the validation rows, of up to MOST_ROWS of them.

        Raises:
            ConfigError: the model's outputs are not those of a linear layer that can be found.
        """
        data = self._split("validation")
        chosen = np.linspace(0, len(data) - 1, min(len(data), MOST_ROWS)).astype(int).tolist()
        data = Encoded([data.ids[i] for i in chosen], [data.labels[i] for i in chosen])
        rows = list(features(self.learner, data, drawn_head(self.spec, self.settings.seed), self.settings.train.batch_tokens))
        found, classes = (np.concatenate([getattr(one, name) for one in rows]) for name in ("features", "classes"))
        name, places, start = self.backbone.last_linear, {}, 0
        for parameter in self.spec.head:
            places[parameter.name] = slice(start, start + parameter.size)
            start += parameter.size
        per_row = self.settings.data.max_length if any(one.many for one in rows) else 1
        return Places(self.labels, places[f"{name}.weight"], places.get(f"{name}.bias"), found, classes, per_row)

    def expected(self, terms: frozenset[str], parts: frozenset[str]) -> Expected:
        """What every node must agree on with this server."""
        return Expected(
            self.spec.fingerprint,
            self.learner.tokenizer_digest,
            self.federation.digest if self._with_data else "",
            self.labels,
            terms,
            parts,
        )

    def load(self, weights: Weights) -> None:
        """Put a global model into the resident one."""
        self.adapted.set_delta(weights.delta)
        self.adapted.load(weights.arrays, weights.mask, weights.scales, positions=weights.positions)

    def export(self, folder: Path, weights: Weights) -> Path:
        """Write `adapter/` for stock PEFT into `folder`, or a merged `model/` where the backbone changed or no slot lives."""
        kind: Kind = "merged" if _unfit(weights) else "peft"
        target = folder / ("adapter" if kind == "peft" else "model")
        self.save(target, weights, kind)
        return target

    def save(self, folder: Path, weights: Weights, kind: Kind) -> None:
        """Write weights and tokenizer in one of the formats that stock libraries load.

        Args:
            kind: "peft", with a rank per module; "lora", one rank for all; "merged", the whole model.

        Raises:
            ConfigError: the weights are not those of adapters on the unchanged backbone, as `kind` needs.
        """
        if kind == "merged":
            if self.backbone.quantised:  # nothing can be merged into it: into the model as it was published, then
                flat = self.settings.to_flat() | {"model.dtype": "float32", "train.cache": "off"}
                return ServerModel(read_settings(flat), self.labels).save(folder, weights, kind)
            self.load(weights)
            save_model(folder, self.adapted)
        elif why := _unfit(weights):
            raise ConfigError(f"--format {kind}: method {self.settings.method!r} {why}, allowed is merged")
        else:
            peft_type = self.task.peft_type(self.learner.tokenizer)
            save_adapters(folder, self.backbone, weights, peft_type, plain=kind == "lora")
        self.learner.tokenizer.save_pretrained(str(folder))
        for name, content in self.task.files(self.learner, kind, base_of(self.backbone)).items():
            (folder / name).write_text(content)

    @property
    def revision(self) -> str | None:
        """The Hub's commit that the backbone was loaded from; None for a local folder."""
        return revision(self.backbone)


def compared(model: ServerModel, weights: Weights) -> dict[str, Any]:
    """The unadapted model's test beside the result's, and what both say by themselves; {} where the task has a head.

    Returns:
        `unadapted`: its metrics; where the task has something to say, `samples`, each with its `prompt`, the `expected` answer,
        what was `said` and what was said `before`, and `samples-scores`: means by name, of the result and before.
    """
    if model.spec.head:
        return {}
    bare = model.unadapted()
    found: dict[str, Any] = {"unadapted": model.evaluate(bare, "test")}
    pairs = list(zip(model.samples(weights), model.samples(bare), strict=True))
    if not pairs:
        return found
    scores = {
        name: [mean(one.scores[name] for one in side) for side in zip(*pairs, strict=True)] for name in pairs[0][0].scores
    }
    scores["stopped"] = [mean(float(one.stopped) for one in side) for side in zip(*pairs, strict=True)]
    shown = [{"prompt": now.prompt, "expected": now.expected, "said": now.said, "before": before.said} for now, before in pairs]
    return {**found, "samples": shown, "samples-scores": scores}


def _unfit(weights: Weights) -> str:
    """Why a model is not its backbone and adapters; '' where it is."""
    if weights.delta is not None or of_backbone(weights.arrays):
        return "changes the backbone"
    return "" if weights.mask.count else "has no adapter"

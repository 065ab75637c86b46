"""One process of stock libraries, without this package, that loads what was exported; started once, importing takes seconds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

STOCK = """
import contextlib, io, json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
logging.disable_progress_bar()

def load(kind, base, folder, labels):
    if kind == "merged":
        return AutoModelForSequenceClassification.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, pad_token_id=0, dtype="float32")
    return PeftModel.from_pretrained(base, folder)

def run(code):
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return {"printed": printed.getvalue(), "logits": names["logits"].tolist()}

def logits(ids, *what):
    ids = torch.tensor(ids)
    return load(*what)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()

for line in sys.stdin:
    try:
        name, arguments = json.loads(line)
        with torch.no_grad():
            answer = [{"run": run, "logits": logits}[name](*arguments), ""]
    except Exception as error:
        answer = [None, repr(error)]
    assert not any(name.startswith("fedara") for name in sys.modules)
    print(json.dumps(answer), flush=True)
"""


@functools.cache
def _process() -> subprocess.Popen:
    """Ends with this one, when its input does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment
    )


def _ask(name: str, *arguments):
    process = _process()
    process.stdin.write(json.dumps([name, arguments]) + "\n")
    process.stdin.flush()
    answer, error = json.loads(process.stdout.readline())
    assert not error, error
    return answer


def stock_logits(kind: str, base: Path | str, folder: Path, batch: dict[str, torch.Tensor], labels: int = 3) -> np.ndarray:
    """Logits in stock PEFT ("peft", "lora": adapters on `base`) or transformers ("merged")."""
    return np.array(_ask("logits", batch["input_ids"].tolist(), kind, str(base), str(folder), labels))


def stock_run(code: str) -> tuple[str, np.ndarray]:
    """What a piece of code printed, and its `logits`."""
    answer = _ask("run", code)
    return answer["printed"], np.array(answer["logits"])

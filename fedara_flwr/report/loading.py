"""Python code that loads what a run exported with stock libraries and uses it; for the model card and the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedara_flwr.tasks import Task

OF_MODEL = "[model.config.id2label[i] for i in range(model.config.num_labels)]"


def base_arguments(name: str, facts: Mapping[str, Any]) -> str:
    """Python source of what `from_pretrained` needs to find the base of a run's adapters.

    Args:
        name: Python source of its name.
        facts: the run's federated.json.
    """
    dtype = (facts.get("dtypes") or {}).get("server")  # else a checkpoint's own: in bfloat16 other logits
    more = {
        "revision": facts.get("revision"),
        "key_mapping": facts.get("key-mapping"),
        "dtype": dtype and ("float32" if dtype == "float32" else "bfloat16"),
        "ignore_mismatched_sizes": bool(facts.get("other-head")),  # its head is the adapter's
    }
    return ", ".join([name, *(f"{key}={value!r}" for key, value in more.items() if value)])


def loading_code(
    task: Task, *, base: str | None, place: Sequence[str], imports: Sequence[str] = (), labels: str = OF_MODEL, note: str = ""
) -> list[str]:
    """Python lines that load an export with stock libraries and use it.

    Args:
        task: the run's.
        base: Python source of the arguments that name the base model of adapters; None = the whole model was exported.
        place: lines that set `folder`, where the export is.
        imports: what they need.
        labels: Python source of the list of label names; it may use `model` where `base` is None.
        note: comment behind the line that loads the base.
    """
    auto = task.auto_class
    peft = [] if base is None else ["from peft import PeftModel"]
    lines = [*imports, *peft, f"from transformers import {auto}, AutoTokenizer", "", *place]
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    names = [f"labels = {labels}"] if task.labelled else []
    if base is None:
        lines += [f"model = {auto}.from_pretrained(folder).eval()", *names]
    else:
        options = ", ".join(filter(None, (base, task.load_options, "pad_token_id=tokenizer.pad_token_id")))
        lines += [*names, f"base = {auto}.from_pretrained({options}){note}"]
        lines.append("model = PeftModel.from_pretrained(base, folder).eval()")
    return [*lines, *task.snippet()]

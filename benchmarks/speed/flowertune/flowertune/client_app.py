"""FlowerTune's way of a client: every call loads the model and the tokenizer, wraps the model by PEFT, tokenises and trains.

Data, split, batch size and steps are fedara_flwr's own; the loop is a plain one, which is no slower than a Trainer.
"""

from __future__ import annotations

import time
from itertools import chain, repeat
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fedara_flwr.adapters.backbone import locate
from fedara_flwr.config import DataSettings
from fedara_flwr.data.federation import Federation, federation, shares
from fedara_flwr.tasks import open_task, read_settings

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TARGETS += [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]  # of decoders
app = ClientApp()


def load_federation(config: Any) -> tuple[DataSettings, Federation]:
    """The run's data."""
    data = read_settings({"data.path": config["data-path"]}).data
    return data, federation(data, config["seed"], open_task(data))


def load_model(config: Any, labels: int) -> Any:
    """Backbone from disk and LoRA on every linear layer of its blocks, as fedara_flwr has them."""
    backbone = AutoModelForSequenceClassification.from_pretrained(
        locate(config["model-name"]), num_labels=labels, dtype=torch.float32
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=config["rank"], lora_alpha=config["alpha"], target_modules=TARGETS)
    return get_peft_model(backbone, lora)


@app.train()
def train(message: Message, context: Context) -> Message:
    """LoRA's state comes and goes whole."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    config: Any = context.run_config
    data, split = load_federation(config)
    node: Any = context.node_config
    rows = split.pool.take(shares(data, config["seed"], open_task(data), node["num-partitions"])[node["partition-id"]])
    tokenizer = AutoTokenizer.from_pretrained(locate(config["model-name"]))
    model = load_model(config, len(split.labels))
    model.config.pad_token_id = tokenizer.pad_token_id
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    encoded = tokenizer(list(rows.texts), truncation=True, max_length=data.max_length)["input_ids"]
    examples = [{"input_ids": ids, "labels": int(label)} for ids, label in zip(encoded, rows.groups, strict=True)]
    loader = DataLoader(examples, config["batch-size"], shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    device = config["device"]
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config["learning-rate"])
    losses = []
    batches = chain.from_iterable(repeat(loader))
    for _ in range(config["steps"]):
        batch = {name: values.to(device) for name, values in next(batches).items()}
        with torch.autocast(device, torch.bfloat16, enabled=config["dtype"] == "bfloat16"):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    metrics = MetricRecord(
        {"num-examples": len(rows), "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - began}
    )
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

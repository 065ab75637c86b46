"""Logits of the wanted positions alone: transformers' own loss, no tensor of all tokens times the vocabulary, checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TASKS, enlarge, mean_loss, random_arrays
from test_templates import tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone, silence_libraries
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client.capacity import saved_bytes
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.legend import last_blocks
from fedara_flwr.tasks import Encoded, causal_lm
from fedara_flwr.tasks.base import UNLABELLED

TASK = TASKS["causal-lm"]
LAYERS, RANK = 3, 2
PARTS = frozenset({"B", "E", "A"})
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
CAP = 0.05  # Gemma 2's bound of logits, low enough to bite at random weights
ADAPTED = ("llama", "qwen2", "qwen3", "gemma2", "cohere", "gpt2")


def configuration(name: str, vocabulary: int) -> PreTrainedConfig:
    """Of a tiny model."""
    shape = SHAPE | {"vocab_size": vocabulary}
    if name == "gemma2":
        more = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": CAP, "sliding_window": 8}
        return Gemma2Config(**shape, **more)
    if name == "gpt2":
        return GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=3)
    if name == "qwen3":
        return Qwen3Config(**shape, head_dim=8)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "cohere": CohereConfig}
    return kinds[name](**shape, **({"logit_scale": 3.0} if name == "cohere" else {}))


def save_model(folder: Path, name: str, words=None, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A folder with a tiny random model and a tokenizer; models with larger numbers than a fresh one has."""
    silence_libraries()
    words = words or tokenizer()
    config = configuration(name, int(changes.pop("vocabulary", len(words))))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    enlarge(model, 8)
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language")
    return {name: save_model(root / name, name) for name in ADAPTED}


def open_adapted(folder: Path, *, dtype: str = "float32", cache: str = "off", checkpointing: bool = False) -> AdaptedModel:
    backbone = Backbone(str(folder), TASK, (), dtype=dtype, pad_token_id=3)
    return AdaptedModel(backbone, cache, 64, 0, checkpointing)


def fill(adapted: AdaptedModel, lowest: int = 0) -> None:
    """Random adapters in block `lowest` and above."""
    mask = last_blocks(adapted.spec, RankMask.full([RANK] * len(adapted.spec.modules)), LAYERS - lowest)
    arrays = {part: values for part, values in random_arrays(adapted.spec, mask).items() if part in PARTS}
    adapted.load(arrays, mask, (1.0,) * len(mask.ranks), PARTS)


def rows(vocabulary: int, lengths=(9, 5, 12, 2), seed: int = 0) -> Encoded:
    """Rows with answers in several stretches, one at its very beginning, and a last one without anything to learn."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    labels = [[token if place % 4 else UNLABELLED for place, token in enumerate(row)] for row in ids]
    labels[0][0] = ids[0][0]  # nothing comes before a first token: it is not predicted
    return Encoded([*ids, [1, 2, 3]], [*labels, [UNLABELLED] * 3])


def batch_of(data: Encoded):
    return TASK.collate(tokenizer(), data.ids, data.labels)


def step(learner: Learner, batch, below=None):
    """(loss, gradients) as a client's step has them."""
    adapted = learner.adapted
    loss = mean_loss(TASK, TASK.outputs(learner, batch, below), batch)
    loss.backward()
    gradients = [parameter.grad.clone() for part in sorted(PARTS) for parameter in adapted.parameters(part)]
    for part in PARTS:
        for parameter in adapted.parameters(part):
            parameter.grad = None
    return loss.detach(), gradients


# -- transformers' own loss ------------------------------------------------------------
@pytest.mark.parametrize("piece", [256, 5, 1])
@pytest.mark.parametrize("name", ADAPTED)
def test_loss_and_gradients_are_those_of_transformers(folders, monkeypatch, name, piece):
    """Rows of several lengths with padding; the logits in one piece, and in several."""
    monkeypatch.setattr(causal_lm, "PIECE", piece)
    adapted = open_adapted(folders[name])
    fill(adapted)
    batch = batch_of(rows(adapted.model.config.vocab_size))
    loss, found = step(Learner(adapted, TASK, tokenizer()), batch)
    expected = adapted.model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    expected.backward()
    assert abs(float(loss - expected.detach())) < 1e-5
    wanted = [parameter.grad for part in sorted(PARTS) for parameter in adapted.parameters(part)]
    assert max(float(gradient.abs().max()) for gradient in wanted) > 1e-3  # there is something to compare
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTED)
def test_losses_are_of_each_row(folders, name):
    """A row alone has the loss that it has among others, and one without an answer has none."""
    adapted = open_adapted(folders[name])
    fill(adapted)
    learner, data = Learner(adapted, TASK, tokenizer()), rows(adapted.model.config.vocab_size)
    batch = batch_of(data)
    with torch.no_grad():
        losses = TASK.losses(TASK.outputs(learner, batch), batch)
        assert losses.dtype == torch.float32 and losses.shape == (5,) and losses[-1] == 0
        assert TASK.counts(batch).tolist() == [6, 3, 9, 1, 0]
        for row in range(5):
            own = batch_of(Encoded([data.ids[row]], [data.labels[row]]))
            alone = TASK.losses(TASK.outputs(learner, own), own)
            torch.testing.assert_close(alone[0], losses[row], rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_answer_has_no_loss_and_no_gradient(folders):
    adapted = open_adapted(folders["llama"])
    fill(adapted)
    batch = batch_of(Encoded([[1, 2, 3]], [[UNLABELLED] * 3]))
    losses = TASK.losses(TASK.outputs(Learner(adapted, TASK, tokenizer()), batch), batch)
    losses.sum().backward()
    assert losses.tolist() == [0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTED)
def test_the_output_layer_gives_the_models_logits(folders, name, dtype):
    """Caps and scales among them: Gemma 2's bound bites, Cohere's logits come three times as large as the product."""
    adapted = open_adapted(folders[name], dtype=dtype)
    fill(adapted)
    batch = batch_of(rows(adapted.model.config.vocab_size))
    with torch.no_grad():
        logits = adapted.outputs(batch).logits
        states = adapted.hidden(batch)
        found = adapted.output_layer(states.flatten(0, 1)).view_as(logits)
        # one row alone: nothing depends on how many positions are asked
        torch.testing.assert_close(adapted.output_layer(states[0, 3:4])[0], logits[0, 3], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found, logits, **({"rtol": 1e-2, "atol": 1e-2} if dtype == "bfloat16" else {}))
    if name == "gemma2":
        assert 0.9 * CAP < float(logits.abs().max()) <= CAP * 1.01
    if name == "cohere":
        product = states.float() @ adapted.model.get_output_embeddings().weight.float().T
        torch.testing.assert_close(logits.float(), 3 * product, rtol=2e-2, atol=1e-1)


def test_logits_from_more_than_the_last_block_are_refused(folders):
    """A model whose head looks at the tokens, too."""
    adapted = open_adapted(folders["llama"])
    forward = adapted.model.forward

    def peeking(input_ids, **more):
        out = forward(input_ids=input_ids, **more)
        out.logits = out.logits + input_ids[..., None]
        return out

    adapted.model.forward = peeking
    with pytest.raises(ConfigError) as caught:
        assert adapted.output_layer
    assert str(caught.value) == (
        f"model.name = {str(folders['llama'])!r}: LlamaForCausalLM makes its logits from more than its last block"
    )


def test_nothing_of_the_detour_stays(folders):
    """Neither on the model's base nor on its blocks."""
    adapted = open_adapted(folders["llama"], checkpointing=True)
    fill(adapted)
    batch = batch_of(rows(adapted.model.config.vocab_size))
    before = adapted.model(batch["input_ids"]).logits.detach()
    step(Learner(adapted, TASK, tokenizer()), batch)
    assert all("forward" not in vars(module) for module in adapted.model.modules())
    assert torch.equal(adapted.model(batch["input_ids"]).logits, before)


# -- memory ------------------------------------------------------------
MANY = 152_000


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has whose last dimension is the vocabulary, the embeddings' own weights aside."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.most, self.seen = own, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and MANY in value.shape:
                self.seen += 1
                if value.untyped_storage().data_ptr() not in self.own:
                    self.most = max(self.most, value.numel())
        return out


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> AdaptedModel:
    small = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": LAYERS, "vocabulary": MANY}
    small |= {"tie_word_embeddings": True, "head_dim": 2}
    return open_adapted(save_model(tmp_path_factory.mktemp("large") / "llama", "llama", **small))


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made(large, monkeypatch):
    """60 tokens, of which 4 at a time have logits: in training with its backward pass, and in evaluation."""
    monkeypatch.setattr(causal_lm, "PIECE", 4)
    fill(large)
    learner, data = Learner(large, TASK, tokenizer()), rows(MANY, (20, 30, 10))
    assert large.output_layer  # its trial sees twelve positions whatever a piece is
    own = {parameter.untyped_storage().data_ptr() for parameter in large.model.parameters()}
    with Largest(own) as training:
        step(learner, batch_of(data))
    with Largest(own) as evaluating:
        found = learner.evaluate(data)
    assert training.seen and evaluating.seen and found["perplexity"] > 1
    assert 0 < training.most <= 4 * MANY and 0 < evaluating.most <= 4 * MANY


def test_the_trial_is_of_twelve_positions(large):
    """It is done once, whatever the batch."""
    fill(large)
    large.__dict__.pop("output_layer", None)
    with Largest({p.untyped_storage().data_ptr() for p in large.model.parameters()}) as largest:
        assert large.output_layer
    assert largest.most <= 12 * MANY


PEAK = """
import resource, sys, torch
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_output import LAYERS, MANY, TASK, fill, open_adapted, save_model
from test_templates import tokenizer
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.tasks import Encoded
torch.set_num_threads(1)
folder = Path(sys.argv[1])
adapted = open_adapted(folder)
fill(adapted)
ids = torch.randint(0, MANY, (8, 256), generator=torch.Generator().manual_seed(0)).tolist()
batch = TASK.collate(tokenizer(), ids, ids)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
TASK.losses(TASK.outputs(Learner(adapted, TASK, tokenizer()), batch), batch).sum().backward()
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_a_step(tmp_path):
    """2,048 tokens of 152,000 words: three whole logits alone would take 3 · 2048 · 152000 · 4 B = 3.7 GB."""
    folder = save_model(tmp_path / "m", "llama", hidden_size=4, intermediate_size=4, vocabulary=MANY, head_dim=2)
    paths = [str(Path(__file__).parents[1] / name) for name in (".", "adapters", "tasks")]
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), *paths], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1200


# -- blocks that are computed twice ------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lowest", [0, 1, 2])
@pytest.mark.parametrize("cache", ["off", "exact"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_checkpoints_give_the_same_gradients_and_keep_less(folders, name, cache, lowest, dtype):
    """Above the lowest living block, with the outputs below it kept or not."""
    found = {}
    for checkpointing in (False, True):
        adapted = open_adapted(folders[name], dtype=dtype, cache=cache, checkpointing=checkpointing)
        fill(adapted, lowest)
        learner, data = Learner(adapted, TASK, tokenizer()), rows(adapted.model.config.vocab_size, (40, 30, 50))
        batch = batch_of(data)
        below = adapted.below(batch)
        assert (below is None) == (cache == "off" or lowest == 0)
        with saved_bytes(adapted.model) as kept:
            outputs = TASK.outputs(learner, batch, below)
        found[checkpointing] = (*step(learner, batch, below), sum(kept.values()))
        del outputs
    (loss, gradients, many), (again, same, few) = found[False], found[True]
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    # what enters each block stays, and of its insides nothing
    assert few < many * (0.35 if lowest < 2 else 0.6), (few, many)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_keeps_nothing(folders, checkpointing):
    adapted = open_adapted(folders["llama"], checkpointing=checkpointing)
    fill(adapted)
    with saved_bytes(adapted.model) as kept:
        found = Learner(adapted, TASK, tokenizer()).evaluate(rows(adapted.model.config.vocab_size))
    assert not kept and found["loss"] > 0


def test_a_forward_pass_that_fails_leaves_the_blocks_as_they_were(folders):
    adapted = open_adapted(folders["llama"], checkpointing=True)
    fill(adapted)
    with pytest.raises(IndexError):
        adapted.hidden({"input_ids": torch.tensor([[10**6]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)})
    assert all("forward" not in vars(block) for block in adapted.backbone.blocks)

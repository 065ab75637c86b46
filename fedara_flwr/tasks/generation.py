"""Answers that a language model makes by itself, each time the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedara_flwr.tasks.base import LearnerPort
from fedara_flwr.tasks.templates import ASSISTANT, USER, Template

PADDED = 0.05  # of the largest logit: more than roundings in bfloat16


class Said(NamedTuple):
    """What a model said, and whether it stopped by itself."""

    text: str
    stopped: bool


def ends(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of text, and what its chat template puts behind an answer."""
    ids, _ = Template(tokenizer).answers([{"role": USER, "content": "a"}, {"role": ASSISTANT, "content": "b"}])
    return sorted({int(tokenizer.eos_token_id), ids[-1]})


def all_ends(learner: LearnerPort) -> list[int]:
    """Tokens that end an answer, also by what the published model says of itself."""
    own = learner.adapted.model.generation_config.eos_token_id
    return sorted({*ends(learner.tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])})


def opening(tokenizer: Any) -> str:
    """What is read of that which the chat template itself writes before an answer, such as an empty thought; '' in most."""
    return _words(tokenizer, tokenizer(Template(tokenizer).opening(), add_special_tokens=False)["input_ids"])


def say(learner: LearnerPort, prompts: Sequence[list[int]], most: int, streamer: Any = None) -> list[Said]:
    """The answers of the loaded model to prompts, all at once; greedy.

    Args:
        prompts: token ids of each, up to where the answer begins.
        most: tokens of an answer.
        streamer: of transformers; gets the tokens of a single prompt as they come.
    """
    tokenizer = learner.tokenizer
    stops, longest = all_ends(learner), max(len(prompt) for prompt in prompts)
    places = learner.adapted.positions  # of a model with learned ones
    most = most if places is None else min(most, places - longest)
    if most < 1:
        return [Said("", False) for _ in prompts]
    learner.adapted.model.eval()
    parts = [[prompt] for prompt in prompts] if _reads_padding(learner, prompts, stops) else [prompts]
    said, opens = [], opening(tokenizer)
    for row in [row for part in parts for row in _generated(learner, part, most, stops, streamer=streamer).sequences]:
        end = next((place for place, token in enumerate(row) if token in stops), len(row))
        said.append(Said(_words(tokenizer, row[:end]).removeprefix(opens).strip(), end < len(row)))
    return said


def _generated(learner: LearnerPort, prompts: Sequence[list[int]], most: int, stops: list[int], **options: Any) -> Any:
    """What transformers generates: `sequences` are lists of each prompt's new tokens; `options` are those of its `generate`."""
    import torch
    from transformers import GenerationConfig

    adapted, pad, longest = learner.adapted, learner.tokenizer.pad_token_id, max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts], device=adapted.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=adapted.device)
    config = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=stops, pad_token_id=pad, use_cache=True)
    own, adapted.model.generation_config = adapted.model.generation_config, GenerationConfig()  # penalties, fewest tokens, …
    options = {"attention_mask": mask, "generation_config": config, "return_dict_in_generate": True, **options}
    try:
        with torch.no_grad(), adapted.autocast():
            out = adapted.model.generate(tokens, **options)
    finally:
        adapted.model.generation_config = own
    out.sequences = out.sequences[:, longest:].tolist()
    return out


def _reads_padding(learner: LearnerPort, prompts: Sequence[list[int]], stops: list[int]) -> bool:
    """Whether a prompt's next token depends on the padding before it, as RWKV's does, and that of BlenderBot's decoder."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    if len(short) == len(long):
        return False
    alone, beside = (_generated(learner, part, 1, stops, output_logits=True).logits[0][0] for part in ([short], [short, long]))
    return bool((alone - beside).abs().max() > PADDED * alone.abs().max())


def _words(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()

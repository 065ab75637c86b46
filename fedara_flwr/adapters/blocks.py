"""Where a model takes adapters: its repeated blocks and the linear layers in them, found by running it on a few tokens.

No list of architectures: a layer counts if a text goes through it. So the vision tower of a model that also reads pictures
gets nothing, and of an encoder-decoder both halves are blocks, the encoder's first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import error_line
from fedara_flwr.model.spec import ModuleSpec

logger = logging.getLogger(__name__)

LONG, SHORT = 6, 3  # tokens of the two rows that are tried
ROUNDED, LEAK = 1e-3, 0.05  # of the largest output: more than roundings; more than a model can be used with
LEFT_ALONE = 0.05  # share of the blocks' numbers that is worth a line


def try_out(name: str, model: Any, pad_token_id: int | None) -> set[str]:
    """Run a model on two short rows, one of them padded.

    Args:
        name: as `model.name`, for messages.
        pad_token_id: the tokenizer's.

    Returns:
        Names of the modules that were run.

    Raises:
        ConfigError: it does not run, or what stands at the padding changes what it makes of the text before.
    """
    if not hasattr(model.config.get_text_config(), "vocab_size"):  # CANINE, and whatever reads no text
        raise ConfigError(f"model.name = {name!r}: {type(model).__name__} has no vocabulary, allowed are models of tokens")
    ran: set[str] = set()

    def note(called: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) or not isinstance(module, nn.Linear):  # routers give several things
                ran.add(called)

        return hook

    hooks = [module.register_forward_hook(note(called)) for called, module in model.named_modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            first = _outputs(model, pad_token_id)
    except Exception as error:  # whatever a model raises that was made for other inputs than these
        line = f"{type(model).__name__} does not run on token ids ({error_line(error)})"
        raise ConfigError(f"model.name = {name!r}: {line}") from error
    finally:
        for hook in hooks:
            hook.remove()
    largest = max(float(first.abs().max()), torch.finfo(torch.float32).tiny)
    # with other numbers at the padding, and, which alone would mistake roundings that choose other experts, without any
    others = (lambda: _outputs(model, pad_token_id, 3.0), lambda: _outputs(model, pad_token_id, rows=slice(1, 2), length=SHORT))
    leak = 1.0
    for other in others:
        again = other()
        leak = min(leak, float((first[-len(again) :] - again).abs().max()) / largest)
        if leak <= ROUNDED:
            return ran
    what = f"what {type(model).__name__} makes of a text depends on the padding behind it, in a trial by {leak:.1%}"
    if leak > LEAK:
        raise ConfigError(f"model.name = {name!r}: {what}; allowed are models that leave padding out")
    logger.warning("model.name = %r: %s; results depend on which texts share a batch", name, what)
    return ran


@torch.no_grad()
def _outputs(
    model: Any, pad_token_id: int | None, noise: float = 0.0, rows: slice = slice(None), length: int = LONG
) -> torch.Tensor:
    """All that the model gives for the real tokens of two rows, the second half as long as the first.

    Args:
        model: in eval mode.
        pad_token_id: of the padding.
        noise: is added to the embeddings of the padding, or taken off, by turns.
        rows: which of the two are run.
        length: at how many tokens both are cut.
    """
    config = model.config.get_text_config()
    special = {value for key, value in config.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)}
    words = [token for token in range(min(config.vocab_size, 100)) if token not in special | {pad_token_id}]
    tokens = torch.tensor([words[i % len(words)] for i in range(2 * LONG)], device=model.device).view(2, LONG)
    ids = (config.eos_token_id, pad_token_id)  # those that the model does not know are not tried here
    end, padding_id = (token if isinstance(token, int) and 0 <= token < config.vocab_size else 0 for token in ids)
    if end != padding_id:  # BART's kind classifies there
        tokens[0, -1] = tokens[1, SHORT - 1] = end
    real = torch.ones_like(tokens)
    real[1, SHORT:] = 0
    tokens, real = tokens.where(real > 0, padding_id)[rows, :length], real[rows, :length]

    def add(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        padding = real == 0 if embedded.shape[:2] == real.shape else (real == 0).T  # XLNet has the tokens first
        if embedded.shape[:2] != padding.shape:
            return embedded
        signs = 1 - 2 * (torch.arange(embedded.shape[-1], device=embedded.device) % 2)
        return embedded + (noise * padding[..., None] * signs).to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        outputs = model(input_ids=tokens, attention_mask=real)
    finally:
        hook.remove()
    found = [value for key, value in outputs.items() if isinstance(value, torch.Tensor) and not key.startswith("encoder_")]
    parts = [value[0].flatten() for value in found] if len(tokens) > 1 else []
    parts += [(value[-1, :SHORT] if value.shape[1:2] == (length,) else value[-1]).flatten() for value in found]
    return torch.cat(parts).float()


def block_lists(name: str, model: Any, ran: set[str]) -> tuple[str, ...]:
    """Names of the lists of repeated blocks, from the input on: the ModuleList with the most parameters that is run.

    Of an encoder-decoder two, one in each half.

    Raises:
        ConfigError: there is none.
    """
    sizes = {
        place: sum(p.numel() for p in module.parameters())
        for place, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(called.startswith(place + ".") for called in ran)
    }
    if not sizes:
        raise ConfigError(f"model.name = {name!r}: {type(model).__name__} has no list of repeated blocks")

    def largest(places: Sequence[str]) -> str:
        return max(places, key=lambda place: (sizes[place], -len(place)))

    halves = [[place for place in sizes if half in place.split(".")] for half in ("encoder", "decoder")]
    if model.config.is_encoder_decoder and all(halves):
        return tuple(largest(places) for places in halves)
    return (largest(list(sizes)),)


def linear_modules(
    name: str, model: nn.Module, blocks: Sequence[str], ran: set[str], head: Sequence[str], endings: str
) -> tuple[ModuleSpec, ...]:
    """The linear layers inside the blocks that are run, or those whose names end in one of `endings`, in model order.

    Args:
        name: as `model.name`.
        blocks: as `block_lists`.
        ran: as `try_out`.
        head: modules that hold the head.
        endings: as `adapter.target-modules`.

    Raises:
        ConfigError: there is none; one of the endings is nobody's; most linear layers lie outside the blocks.
    """
    wanted = tuple(e.strip() for e in endings.split(",") if e.strip())
    first, starts = {}, 0
    for place in blocks:
        first[place] = starts
        starts += len(list(model.get_submodule(place).children()))
    linears = {called: module for called, module in model.named_modules() if called in ran and isinstance(module, nn.Linear)}
    places = {called: place for called in linears for place in blocks if called.startswith(place + ".")}
    if not places:
        raise ConfigError(f"model.name = {name!r}: the blocks of {type(model).__name__} hold no nn.Linear to adapt")
    outside = [called for called in linears if called not in places and called.split(".")[0] not in head]
    if len(outside) > len(places):
        line = f"{len(outside)} of the {len(linears)} linear layers of {type(model).__name__} lie outside its repeated blocks"
        raise ConfigError(f"model.name = {name!r}: {line} (such as {outside[0]}), allowed are models made of blocks")
    for ending in wanted:
        if not any(called == ending or called.endswith("." + ending) for called in places):
            allowed = sorted({called.rpartition(".")[2] for called in places})
            raise ConfigError(
                f"adapter.target-modules = {ending!r}: no linear layer in the blocks ends so; last names are {allowed}"
            )
    return tuple(
        ModuleSpec(
            called,
            linears[called].out_features,
            linears[called].in_features,
            first[place] + int(called[len(place) + 1 :].split(".")[0]),
        )
        for called, place in places.items()
        if not wanted or any(called == e or called.endswith("." + e) for e in wanted)
    )


def tell_what_is_left_out(name: str, model: nn.Module, lists: Sequence[str], unexpected: Iterable[str]) -> None:
    """Say it where the checkpoint has more blocks than its config.json: transformers takes the first of them.

    Args:
        unexpected: names in the checkpoint of what the model has no place for.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for place in lists:
        there, more = len(list(model.get_submodule(place).children())), set()
        for key in unexpected:
            key = key if key.startswith(prefix) else prefix + key
            number = key.removeprefix(place + ".").split(".")[0]
            if key.startswith(place + ".") and number.isdecimal() and int(number) >= there:
                more.add(int(number))
        if more:
            line = "the checkpoint has %d more blocks in %s than the %d that its config.json names: they are left out"
            logger.warning(f"model.name = %r: {line}", name, len(more), place, there)


def tell_what_is_left_alone(name: str, model: nn.Module, blocks: Sequence[str], modules: Sequence[ModuleSpec]) -> None:
    """Log which numbers of the blocks get no adapter whatever is chosen, such as experts, where they are many."""
    adapted = {module.name for module in modules}
    inside = {
        parameter: values
        for parameter, values in model.named_parameters()
        if any(parameter.startswith(place + ".") for place in blocks) and values.dim() > 1
    }
    left = {p: values for p, values in inside.items() if p.rpartition(".")[0] not in adapted}
    share = sum(values.numel() for values in left.values()) / max(1, sum(values.numel() for values in inside.values()))
    if share >= LEFT_ALONE:
        largest = max(left, key=lambda parameter: left[parameter].numel())
        kinds = "experts" if "expert" in largest else "no linear layers"
        line = "model.name = %r: %.0f %% of the numbers in its blocks get no adapter, being %s (such as %s)"
        logger.info(line, name, 100 * share, kinds, largest)


def to_linear(model: nn.Module) -> tuple[str, ...]:
    """Put a nn.Linear in the place of each Conv1D, GPT-2's linear layer whose weight is (d_in, d_out); returns their names."""
    names = tuple(called for called, module in model.named_modules() if isinstance(module, Conv1D))
    for called in names:
        layer: Any = model.get_submodule(called)
        d_in, d_out = layer.weight.shape
        linear = nn.Linear(d_in, d_out, device="meta")
        _replace(model, called, linear, layer)
    return names


@contextmanager
def as_published(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the layers that `to_linear` replaced are Conv1D again, as stock transformers saves them."""
    linears: dict[str, Any] = {called: model.get_submodule(called) for called in names}
    for called, linear in linears.items():
        with torch.device("meta"):
            conv = Conv1D(linear.out_features, linear.in_features)
        _replace(model, called, conv, linear)
    try:
        yield
    finally:
        for called, linear in linears.items():
            parent, _, child = called.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)


def _replace(model: nn.Module, called: str, new: Any, old: Any) -> None:
    """Put `new` in the place of `old`, with its weight transposed and its bias."""
    new.weight = nn.Parameter(old.weight.data.T.contiguous(), requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    new.train(old.training)
    parent, _, child = called.rpartition(".")
    setattr(model.get_submodule(parent), child, new)

"""The frozen prefix: what lies below the lowest living module is run once for each example, and its output kept.

No architecture's forward pass is written again. The model's own runs, with the `forward` of the lower blocks replaced by one
that returns the kept output; masks, relative and rotary positions are made by the model's code as ever. Whether that is
right for a model is tried once, at every block; one that cannot be cut so has no prefix.

Each row is run alone and without padding, so its output depends on the row, the backbone and nothing else: not on what is
kept, on the batch it comes in, or on who was served before. A hit, a miss and a row that was thrown out give the same bits.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedara_flwr.adapters.scratch import Scratch
from fedara_flwr.log import error_line
from fedara_flwr.tasks.base import Batch

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # of the largest number, for one row alone against a padded batch


class _Reached(Exception):
    """Ends a forward pass whose rest is not needed."""


class Prefix:
    """Outputs of the blocks below a boundary, by boundary and example.

    The least recently used go first: from memory to a scratch file, from there for good.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        head: Sequence[nn.Parameter],
        megabytes: int,
        half: bool,
        disk_megabytes: int = 0,
    ) -> None:
        """Try whether the model can be cut between its blocks, which `fits` then says; nothing is kept yet.

        Args:
            model: in eval mode, as the pre-trained weights make it, every parameter frozen.
            blocks: the repeated blocks, from the lowest.
            head: parameters that are trained besides adapters.
            megabytes: bound of what is kept in memory, in 2^20 bytes.
            half: keep float32 outputs as float16, where that is finite.
            disk_megabytes: bound of the scratch file; 0 = none.
        """
        self.model, self.blocks, self.half = model, list(blocks), False  # nothing is rounded while the cut is tried
        self._limit, self._size = megabytes << 20, 0
        self._kept: OrderedDict[tuple[int, bytes], torch.Tensor] = OrderedDict()
        self._disk = Scratch(0)  # nor does anything go to disk
        self._wrap: Callable[[torch.Tensor], Any] = lambda states: states
        try:
            problem = self._try(head)
        except Exception as error:  # whatever a model that is not built like that may raise
            problem = error_line(error)
        self.fits, self.half, self._disk = not problem, half, Scratch(disk_megabytes)
        if problem:
            logger.info("%s runs without train.cache: %s", type(model).__name__, problem)

    def clear(self) -> None:
        """Forget all outputs, since the backbone is another one now."""
        self._kept.clear()
        self._disk.clear()
        self._size = 0

    @property
    def nbytes(self) -> int:
        """Bytes of block outputs that are kept in memory now."""
        return self._size

    def states(self, inputs: Batch, boundary: int) -> torch.Tensor:
        """The output of block `boundary` - 1 for a batch that is padded on the right, shape (batch, longest, hidden).

        0 at the padding, which nothing that counts depends on.
        """
        lengths = inputs["attention_mask"].sum(1).clamp(min=1).tolist()
        rows = [
            self._row({name: value[i : i + 1, :length] for name, value in inputs.items()}, boundary)
            for i, length in enumerate(lengths)
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _row(self, inputs: Batch, boundary: int) -> torch.Tensor:
        """The output of block `boundary` - 1 for one row without padding, kept or run now; shape (length, hidden)."""
        digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in inputs.values())).digest()
        states = self._find((boundary, digest))
        if states is None:
            # the output of a lower block serves as a start, unless it was rounded
            lower = () if self.half else ((i, self._find((i, digest))) for i in range(boundary - 1, 0, -1))
            start, below = next((kept for kept in lower if kept[1] is not None), (0, None))
            states = self._rounded(self._run(inputs, start, below, boundary)[0])
        self._keep((boundary, digest), states)
        return states.float() if states.dtype == torch.float16 else states

    def _find(self, key: tuple[int, bytes]) -> torch.Tensor | None:
        """The output that is kept under `key`, in memory or on disk; None where there is none."""
        return self._kept[key] if key in self._kept else self._disk.get(key)

    def _rounded(self, states: torch.Tensor) -> torch.Tensor:
        """A block's output as it is kept: as float16 where that was chosen and loses no number to infinity."""
        if self.half and states.dtype == torch.float32:
            rounded = states.half()
            return rounded if bool(rounded.isfinite().all()) else states
        return states

    def _keep(self, key: tuple[int, bytes], states: torch.Tensor) -> None:
        """Keep an output in memory as the one used last; those used longest ago make room and go to disk."""
        if key not in self._kept:
            self._size += states.nbytes
        self._kept[key] = states
        self._kept.move_to_end(key)
        while self._size > self._limit:
            oldest, gone = self._kept.popitem(last=False)
            self._size -= gone.nbytes
            self._disk.put(oldest, gone)

    @torch.no_grad()
    def _run(self, inputs: Batch, start: int, states: torch.Tensor | None, boundary: int) -> torch.Tensor:
        """The output of block `boundary` - 1, without dropout; from that of block `start` - 1 where start > 0."""
        reached: list[torch.Tensor] = []

        def reach(block: nn.Module, args: Any, output: Any) -> None:
            reached.append(_hidden(output))
            raise _Reached

        training = self.model.training
        self.model.eval()
        hook = self.blocks[boundary - 1].register_forward_hook(reach)
        try:
            with self.above(None if states is None else states[None], start):
                self.model(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
            self.model.train(training)
        return reached[0]

    @contextmanager
    def above(self, states: torch.Tensor | None, boundary: int) -> Iterator[None]:
        """Forward passes inside begin at block `boundary`, whose input is `states`; where that is None, at the lowest."""
        lower = self.blocks[:boundary] if states is not None else []
        for block in lower:
            block.forward = lambda *args, **kwargs: self._wrap(states)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for block in lower:
                del block.forward

    @torch.no_grad()
    def _try(self, head: Sequence[nn.Parameter]) -> str:
        """Why the model cannot be cut between its blocks; '' where it can. Learns what a block returns."""
        config: Any = self.model.config
        tokens = torch.arange(12, device=next(self.model.parameters()).device).view(2, 6) % config.get_text_config().vocab_size
        mask = torch.ones_like(tokens)
        mask[1, 4:] = 0
        tokens[1, 4:] = config.pad_token_id or 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
        base: Any = self.model.base_model  # type: ignore[union-attr]
        calls: list[tuple[int, Any]] = []
        hooks = [
            block.register_forward_hook(lambda _, args, output, i=i: calls.append((i, output)))  # type: ignore[misc]
            for i, block in enumerate(self.blocks)
        ]
        try:
            with torch.enable_grad():
                for parameter in head:
                    parameter.requires_grad_(True)
                whole = base(**inputs)[0].detach()
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in head:
                parameter.requires_grad_(False)
        if [i for i, _ in calls] != list(range(len(self.blocks))):
            return "its blocks do not run once each, one after the other"
        if _hidden(calls[-1][1]).requires_grad:  # a parameter that the checkpoint lacks is of the head, wherever it is
            return "what is trained as head reaches below the blocks"
        output = calls[0][1]
        if isinstance(output, tuple):
            if any(item is not None for item in output[1:]):
                return "a block returns more than hidden states"
            self._wrap = lambda states: (states, *output[1:])
        kind = whole.device.type  # under autocast the products are rounded even where the norms give float32, as on GPUs
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else whole.dtype
        bound = TOLERANCE[dtype] * float(whole.abs().max())
        for boundary in range(1, len(self.blocks) + 1):
            states = self.states(inputs, boundary)
            with self.above(states, boundary):
                resumed = base(**inputs)[0]
            self.clear()
            if not float(((resumed - whole) * mask[..., None]).abs().max()) <= bound:
                return f"block {boundary} does not depend on the output of the one below alone"
        return ""


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns."""
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states

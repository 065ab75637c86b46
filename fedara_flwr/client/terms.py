"""Terms: what a method adds to local training, its half on the client. Training knows terms, never methods.

Another package adds one with the entry-point group `fedara_flwr.client_terms`. torch is imported where it is used: a node
tells its terms' names without loading it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from fedara_flwr.plugins import offered

if TYPE_CHECKING:
    import torch

    from fedara_flwr.adapters.attach import AdaptedModel
    from fedara_flwr.model.ranks import Bools
    from fedara_flwr.model.spec import Arrays

GROUP = "fedara_flwr.client_terms"

TERMS: dict[str, type[Term]] = {}


class Term:
    """Base of every term, which does nothing itself: a subclass overrides what it needs.

    Parameters come as keyword arguments: numbers as floats, texts as they are.
    """

    def __init__(self, adapted: AdaptedModel, **parameters: Any) -> None:
        """Called after the received values are loaded and before the first step."""
        if parameters:
            raise ValueError(f"{type(self).__name__} takes no parameters, got {sorted(parameters)}")
        self.adapted = adapted

    def penalty(self) -> torch.Tensor | None:
        """A scalar added to the loss of every step."""
        return None

    def after_backward(self) -> None:
        """Called before the optimiser's step, for example to change gradients in place; terms that report come first."""

    def after_step(self) -> None:
        """Called after the optimiser's step, for example to project values."""

    def finish(self) -> None:
        """Called after the last step, before values are collected."""

    def kept(self) -> Bools | None:
        """Slots worth sending back, shape (alive slots,); None = all. Asked after `finish` where the plan wants to know."""
        return None

    def report(self) -> bytes:
        """What the server is to know besides the arrays; asked after `finish` where the plan's `report` names this term.

        The method reads it in `Method.read_report`. Never empty.
        """
        raise ValueError(f"{type(self).__name__} has nothing to report")

    def private_report(self, released: Arrays) -> bytes:
        """`report` of a client that adds noise to its updates: it may depend on `released`, the noised arrays, alone."""
        raise ValueError(f"{type(self).__name__} cannot report with update-noise: its report would tell more than the update")


def register(name: str) -> Callable[[type[Term]], type[Term]]:
    """Decorator: make a term known by `name`."""

    def add(cls: type[Term]) -> type[Term]:
        TERMS[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names of all terms of this node, built in and from installed packages."""
    return sorted(set(TERMS) | set(_installed()))


@lru_cache
def _installed() -> dict[str, EntryPoint]:
    """Terms of other packages; finding them reads a file of every package there is."""
    return {point.name: point for point in entry_points(group=GROUP)}


def find(name: str) -> type[Term]:
    """The term `name`; ValueError where this node has none, or a broken one."""
    for plugin in offered(GROUP, "term", (), _unfit, name) if name not in TERMS else ():
        if plugin.offer is None:
            raise ValueError(f"term {name!r}: the plug-in of {plugin.package} is broken: {plugin.reason}")
        TERMS.setdefault(name, plugin.offer)
    if name not in TERMS:
        raise ValueError(f"unknown term {name!r}, this node has {names()}")
    return TERMS[name]


def _unfit(cls: object, point: EntryPoint) -> str:
    """Why what an entry point names is no term; '' where it is one."""
    return "" if isinstance(cls, type) and issubclass(cls, Term) else f"{point.value} is no subclass of Term"


@register("prox")
class Prox(Term):
    """mu/2·‖w - w_received‖² over all trainable values (FedProx, arXiv 1812.06127, eq. 2)."""

    def __init__(self, adapted: AdaptedModel, *, mu: float) -> None:
        super().__init__(adapted)
        self.mu = mu
        trainable = [p for p in adapted.model.parameters() if p.requires_grad]
        self._pairs = [(p, p.detach().clone()) for p in trainable]

    def penalty(self) -> torch.Tensor | None:
        import torch

        if not self._pairs:
            return None
        return self.mu / 2 * torch.stack([(p - start).square().sum() for p, start in self._pairs]).sum()


@register("orthogonality")
class Orthogonality(Term):
    """weight · mean of ‖A·Aᵀ - I‖_F and ‖Bᵀ·B - I‖_F over living modules (AdaLoRA, arXiv 2303.10512, eq. 4, as PEFT has it)."""

    def __init__(self, adapted: AdaptedModel, *, weight: float) -> None:
        super().__init__(adapted)
        self.weight = weight

    def penalty(self) -> torch.Tensor | None:
        import torch

        norms = []
        for _, values in self.adapted.alive():
            for gram in (values["A"] @ values["A"].T, values["B"].T @ values["B"]):
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.weight * torch.stack(norms).mean() if norms else None


@register("tail-penalty")
class TailPenalty(Term):
    """HetLoRA's self-pruning (arXiv 2401.06432, section 3.2): weight · Σ_m ‖B_m[:, c:]‖·‖A_m[c:, :]‖ over modules' tails.

    The tail are the slots from c = floor(gamma · k) on, at least 1, of the k that the client holds. Where their penalty ends
    below its start, the client keeps the first c of every module alone. Product of norms and not the norm of the product: as
    stated there.
    """

    def __init__(self, adapted: AdaptedModel, *, weight: float, gamma: float) -> None:
        super().__init__(adapted)
        self.weight, self.gamma = weight, gamma
        self._start = self._value()
        self._end = self._start

    def penalty(self) -> torch.Tensor | None:
        return self.weight * self._tail()

    def finish(self) -> None:
        self._end = self._value()

    def kept(self) -> Bools | None:
        if not self._end < self._start:
            return None
        counts = [values["E"].shape[0] for _, values in self.adapted.alive()]
        return np.concatenate([np.arange(count) < self._cut(count) for count in counts])

    def _cut(self, count: int) -> int:
        return max(1, int(self.gamma * count))

    def _tail(self) -> torch.Tensor:
        import torch

        total = torch.zeros(())
        for _, values in self.adapted.alive():
            cut = self._cut(values["E"].shape[0])
            total = total + _norm(values["B"][:, cut:]) * _norm(values["A"][cut:])
        return total

    def _value(self) -> float:
        return float(self._tail().detach())


def _norm(values: torch.Tensor) -> torch.Tensor:
    """Frobenius norm; its gradient at 0, where B starts, is 0 and not NaN."""
    squares = values.square().sum()
    return squares.clamp_min(1e-24).sqrt() if squares > 0 else squares


from fedara_flwr.client import vote  # noqa: E402, F401 (a term in a file of its own, which needs what stands above)

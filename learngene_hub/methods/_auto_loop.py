"""Auto-Learngene's bilevel loop: a meta-network that learns which matches make the pseudo descendant learn faster.

P is the pseudo descendant with its matchers, phi the meta-network, CE the cross-entropy of the running batch, M the
match term on one batch that never changes. An update is

    (i)    a step of P on CE + c M: the only one that moves it
    (ii)   T steps on M alone, from there
    (iii)  a step on CE
    (iv)   the gradient of CE where that ends, taken back through (iii) and (ii) to phi, momentum and decay included
    (v)    a step of phi (Adam, by ``fit``)
    (vi)   P is where (i) left it: the steps of (ii) and (iii) are made on tensors beside it

with SGD of v' = mu v + g + wd w, w' = w - lr v'. The gradient of a step, g(w, phi), depends on phi both directly and
through the w that earlier steps made. ``order`` 2 has both, with second derivatives by w, as published. ``order`` 1
takes g as if it did not depend on w: a first-order approximation, not the paper's method, for a trial or little memory.

Source: arXiv:2305.02279, as its authors' code has it (see ``_auto_matching.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learngene_hub.errors import TrainingError
from learngene_hub.methods._auto_matching import Features, MetaNetwork, Pseudo, match_term, pool
from learngene_hub.training import Step

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Inner:
    """How P is trained."""

    lr: float
    momentum: float
    weight_decay: float
    steps: int  # T
    match: float  # c
    order: int  # of the derivatives in (iv): 2 as published, or 1


class Searched(nn.Module):
    """What a search trains: P by its own steps, phi by those of ``fit``."""

    def __init__(self, pseudo: Pseudo, phi: MetaNetwork) -> None:
        super().__init__()
        self.pseudo, self.phi = pseudo, phi


def sgd(weights: Weights, velocity: Weights, gradients: Weights, rate: float, inner: Inner) -> tuple[Weights, Weights]:
    """(w', v') of one step at learning rate ``rate``, differentiable in everything."""
    moved = {
        name: inner.momentum * velocity[name] + gradients[name] + inner.weight_decay * weight
        for name, weight in weights.items()
    }
    return {name: weight - rate * moved[name] for name, weight in weights.items()}, moved


def gradients(loss: Tensor, weights: Weights, *, graph: bool) -> Weights:
    """The gradient by each weight, 0 where the loss does not depend on it; differentiable with ``graph``."""
    found = torch.autograd.grad(
        loss, list(weights.values()), create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, found, strict=True))


def hypergradient(
    pseudo: Pseudo, phi: MetaNetwork, ancestor: Features, meta: Tensor, batch: tuple[Tensor, Tensor],
    velocity: Weights, rate: float, inner: Inner,
) -> tuple[float, list[Tensor]]:  # fmt: skip
    """Steps (ii) to (iv): CE at their end, and its gradient by each parameter of ``phi``. ``pseudo`` stays as it is.

    Args:
        ancestor: its M features of the images ``meta``.
        velocity: of P, by the names of its parameters.
    """
    x, y = batch
    lambdas = phi([pool(feature) for feature in ancestor])
    weights = {name: p.detach().requires_grad_() for name, p in pseudo.named_parameters()}

    def match(at: Weights) -> Tensor:
        return match_term(lambdas, ancestor, _call(pseudo, at, meta)[1])

    def labels(at: Weights) -> Tensor:
        return nn.functional.cross_entropy(_call(pseudo, at, x)[0], y)

    for objective in [match] * inner.steps + [labels]:
        at = weights if inner.order == 2 else {name: w.detach().requires_grad_() for name, w in weights.items()}
        found = gradients(objective(at), at, graph=inner.order == 2 or objective is match)
        weights, velocity = sgd(weights, velocity, found, rate, inner)
    loss = labels(weights)
    return float(loss.detach()), list(
        torch.autograd.grad(loss, list(phi.parameters()), allow_unused=True, materialize_grads=True)
    )


def _call(pseudo: Pseudo, weights: Weights, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """``pseudo`` with other weights; running statistics move on copies."""
    buffers = {name: buffer.clone() for name, buffer in pseudo.named_buffers()}
    return functional_call(pseudo, weights | buffers, (x,))


class Bilevel:
    """The loop: ``loss`` makes steps (i) to (iv) of an update and hands the gradient of phi to ``fit``.

    Args:
        ancestor: its M features of the images ``meta``, which are the same in all updates.
        rate: the learning rate of P at update number k (from 1).
        phi_decay: wd of phi, added to its gradient as in Adam (not as in AdamW).
        last: the number of the first update of the last epoch.
    """

    def __init__(
        self, ancestor: Features, meta: Tensor, inner: Inner, rate: Callable[[int], float], *,
        phi_decay: float, last: int,
    ) -> None:  # fmt: skip
        self.ancestor, self.meta, self.inner, self.rate = list(ancestor), meta, inner, rate
        self.phi_decay, self.last = phi_decay, last
        self.step = 0  # updates done
        self.images = 0
        self.seconds = 0.0
        self.velocity: Weights = {}
        self.summed = torch.zeros(0)  # (M, N): lambda of the updates of the last epoch, mean over the images
        self.silent = torch.zeros(0)  # (M, N): the share of images where it was 0
        self.totals: dict[str, float] = {}  # of this epoch so far
        self.log: list[dict[str, Any]] = []

    def loss(self, model: Searched, batch: tuple[Tensor, Tensor]) -> Tensor:
        """CE where (iv) takes it, with the gradient by phi that it has there.

        Raises:
            TrainingError: it is not finite.
        """
        self._move(batch[0].device)
        pseudo, phi, rate = model.pseudo, model.phi, self.rate(self.step + 1)
        lambdas = self._lambdas(phi)
        first, matched = self._lasting_step(pseudo, lambdas, batch, rate)
        loss, found = hypergradient(
            pseudo, phi, self.ancestor, self.meta, batch, self.velocity, rate, self.inner
        )  # fmt: skip
        if not math.isfinite(loss):
            raise TrainingError(
                f"the pseudo descendant's loss is {loss} at step {self.step + 1}; an lr below {self.inner.lr:g} would "
                "work, or a smaller match"
            )
        self.totals = {
            "loss": self.totals.get("loss", 0.0) + loss,
            "first": self.totals.get("first", 0.0) + first,
            "match": self.totals.get("match", 0.0) + matched,
            "count": self.totals.get("count", 0.0) + 1,
        }
        value = torch.full((), loss, device=batch[0].device)
        for parameter, gradient in zip(phi.parameters(), found, strict=True):
            wanted = gradient + self.phi_decay * parameter.detach()
            value = value + ((parameter - parameter.detach()) * wanted).sum()  # 0, whose gradient is ``wanted``
        return value

    @torch.no_grad()
    def _lambdas(self, phi: MetaNetwork) -> Tensor:
        """(B, M, N) of the fixed batch, counted in the last epoch."""
        lambdas = phi([pool(feature) for feature in self.ancestor])
        if self.step + 1 >= self.last:
            said, silent = lambdas.mean(0).cpu(), (lambdas == 0).float().mean(0).cpu()
            self.summed = self.summed + said if self.summed.numel() else said
            self.silent = self.silent + silent if self.silent.numel() else silent
        return lambdas

    def _lasting_step(
        self, pseudo: Pseudo, lambdas: Tensor, batch: tuple[Tensor, Tensor], rate: float
    ) -> tuple[float, float]:
        """Step (i); returns CE and M before it."""
        weights: Weights = dict(pseudo.named_parameters())
        if not self.velocity:
            self.velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        label = nn.functional.cross_entropy(pseudo(batch[0])[0], batch[1])
        match = match_term(lambdas, self.ancestor, pseudo(self.meta)[1])
        found = gradients(label + self.inner.match * match, weights, graph=False)
        with torch.no_grad():
            moved, self.velocity = sgd(weights, self.velocity, found, rate, self.inner)
            for name, weight in weights.items():
                weight.copy_(moved[name])
        return float(label.detach()), float(match.detach())

    def _move(self, device: torch.device) -> None:
        self.meta = self.meta.to(device)
        self.ancestor = [feature.to(device) for feature in self.ancestor]
        self.velocity = {name: tensor.to(device) for name, tensor in self.velocity.items()}

    def after(self, step: Step) -> None:
        """Counts an update that was made."""
        self.step, self.images, self.seconds = step.step, step.images, step.seconds
        if step.epoch_done:
            count = self.totals.pop("count")
            self.log.append(
                {"epoch": step.epoch + 1, **{name: round(total / count, 5) for name, total in self.totals.items()}}
            )
            self.totals = {}

    def similarity(self) -> Tensor:
        """S (M, N): the mean of lambda over the images and the updates of the last epoch."""
        return self.summed / (self.step - self.last + 1)

    def silence(self) -> Tensor:
        """(M, N): the share of those in which lambda was 0, and phi learned nothing from the pair."""
        return self.silent / (self.step - self.last + 1)

    def state_dict(self) -> dict[str, Any]:
        """What the loop holds beside P, phi and phi's optimiser."""
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""
        for name in _KEPT:
            setattr(self, name, state[name])


_KEPT = ("step", "images", "seconds", "velocity", "summed", "silent", "totals", "log")

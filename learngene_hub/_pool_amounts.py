"""How much of each entry a task needs: a short training of a few weights and a head. Private to ``pool.py``.

    CE(head(f_W(x)), y) + 0.01 |w|_1,   W = anchor + sum_t w_t increment_t,   0 <= w_t <= 1.5

over w and the head alone, 60 steps of Adam at 1e-2 from w = s times the shares, where s is the one of 0.3, 0.5, 0.7
and 1 whose features a head reads best on held-out images (5 folds). The head starts as the one that was fitted to all
of the task's images, so that w is moved by what the images need and not by a head that knows nothing (our addition; and
the steps take at most BATCH images each, where the specification leaves it open).

Everything is done after expansion: ``expand`` is affine, so the weights of W are those of the anchor and differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub import _pool_features
from learngene_hub.data import Images, normalise, seed_of
from learngene_hub.methods import get_method

if TYPE_CHECKING:
    from learngene_hub.pool import Pool

SCALES = (0.3, 0.5, 0.7, 1.0)
FOLDS = 5
STEPS, LR, BATCH = 60, 1e-2, 16
LASSO, CEILING, FLOOR = 0.01, 1.5, 0.05
RIDGE = 0.3  # of a head's weights: of 0.01 to 3 what held-out images of 100-image tasks are read best with


class Head(NamedTuple):
    """A linear classifier of features that are first brought to mean 0 and deviation 1."""

    mean_D: Tensor
    scale_D: Tensor
    weight_DC: Tensor
    bias_C: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        return (features_ND - self.mean_D) * self.scale_D @ self.weight_DC + self.bias_C


def amounts(
    pool: Pool, model: nn.Module, task: Images, shares: Mapping[str, float], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(sha256 -> weight, of those that are left; s -> cross-entropy of held-out images, "0" of the anchor alone)."""
    mixture = Mixture.of(pool, list(shares), tuple(model.state_dict()))
    start = torch.tensor([shares[sha256] for sha256 in shares])
    seen, scores = {}, {}
    for s in (0.0, *SCALES):
        seen[s] = _pool_features.features(model, task, pool.anchor, mixture.state(s * start))
        scores[s] = held_out(seen[s], task.labels, len(task.classes), seed)
    best = min(SCALES, key=lambda s: (scores[s], s))
    (head,) = fitted_heads(seen[best], task.labels, len(task.classes), torch.ones(1, len(task)))
    w = trained(mixture, model, task, pool, best * start, head, seed)
    kept = {sha256: float(weight) for sha256, weight in zip(shares, w, strict=True) if weight >= FLOOR}
    return kept, {f"{s:g}": round(score, 6) for s, score in scores.items()}


class Mixture(NamedTuple):
    """The state dict of a model as a function of the weights of some increments."""

    base: Mapping[str, Tensor]
    differences: Sequence[Mapping[str, Tensor]]  # of each increment, at weight 1

    @classmethod
    def of(cls, pool: Pool, chosen: Sequence[str], names: Sequence[str]) -> Mixture:
        """That of these entries at the anchor's native shape and the pool's image size."""

        def expanded(weights: Mapping[str, float]) -> dict[str, Tensor]:
            anchor = replace(pool.anchor, tensors=pool.merged(weights))
            shape = replace(anchor.shape, classes=0, image_size=pool.manifest.key.image_size)
            state = get_method(anchor.method, anchor.settings).expand(anchor, shape)
            return {name: tensor.float() for name in names if (tensor := state[name]) is not None}

        with torch.no_grad():
            base, differences = expanded({}), []
            for sha256 in chosen:
                there = expanded({sha256: 1.0})
                apart = {name: tensor - base[name] for name, tensor in there.items()}
                differences.append({name: tensor for name, tensor in apart.items() if bool(tensor.any())})
        return cls(base, differences)

    def state(self, w_S: Tensor) -> dict[str, Tensor]:
        """The state dict at these weights, connected to them."""
        state = dict(self.base)
        for w, difference in zip(w_S, self.differences, strict=True):
            for name, tensor in difference.items():
                state[name] = state[name] + w * tensor
        return state


def held_out(features_ND: Tensor, labels_N: Tensor, classes: int, seed: int) -> float:
    """The mean cross-entropy of each image by a head fitted to the other folds; of one image that of chance."""
    count = len(labels_N)
    if count < 2:
        return math.log(classes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of("folds", seed)))
    folds = order.tensor_split(min(FOLDS, count))
    used_FN = torch.stack([torch.ones(count).index_fill(0, fold, 0.0) for fold in folds])
    heads, total = fitted_heads(features_ND, labels_N, classes, used_FN), 0.0
    for head, fold in zip(heads, folds, strict=True):
        total += float(F.cross_entropy(head(features_ND[fold]), labels_N[fold], reduction="sum"))
    return total / count


def fitted_heads(features_ND: Tensor, labels_N: Tensor, classes: int, used_FN: Tensor) -> list[Head]:
    """For each row of ``used_FN`` (1: used, 0: not) the head of the least mean cross-entropy over the images that are
    used + RIDGE / 2 |weights|^2. All are searched for at once, in float64: they have nothing in common but the time.
    """
    share_FN = used_FN.double() / used_FN.double().sum(1, keepdim=True)
    x_ND = features_ND.double()
    mean_FD = share_FN @ x_ND
    apart_FND = x_ND - mean_FD[:, None]
    scale_FD = 1 / torch.einsum("fn,fnd->fd", share_FN, apart_FND.square()).sqrt().clamp(min=1e-6)
    z_FND = apart_FND * scale_FD[:, None]
    rows, width = len(used_FN), x_ND.shape[1]
    weight = torch.zeros(rows, width, classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(rows, 1, classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    labels = labels_N.expand(rows, -1).reshape(-1)

    def closure() -> Tensor:
        search.zero_grad()
        each = F.cross_entropy((z_FND @ weight + bias).flatten(0, 1), labels, reduction="none")
        loss = (each.view(rows, -1) * share_FN).sum() + RIDGE / 2 * weight.square().sum()
        loss.backward()
        return loss

    search.step(closure)  # type: ignore[arg-type]
    parts = (mean_FD, scale_FD, weight, bias[:, 0])
    return [Head(*(part[row].detach().float() for part in parts)) for row in range(rows)]


def trained(
    mixture: Mixture, model: nn.Module, task: Images, pool: Pool, start: Tensor, head: Head, seed: int
) -> Tensor:
    """The weights after STEPS steps of Adam on them and the head."""
    w = start.clone().requires_grad_()
    weight, bias = head.weight_DC.clone().requires_grad_(), head.bias_C.clone().requires_grad_()
    moving = head._replace(weight_DC=weight, bias_C=bias)
    search = torch.optim.Adam([w, weight, bias], lr=LR)
    for chosen in _batches(len(task), seed):
        x = normalise(task.pixels[chosen], pool.anchor.preprocessing)
        seen = torch.func.functional_call(model, mixture.state(w), (x,))
        loss = F.cross_entropy(moving(seen.float()), task.labels[chosen]) + LASSO * w.abs().sum()
        search.zero_grad()
        loss.backward()
        search.step()
        with torch.no_grad():
            w.clamp_(0, CEILING)
    return w.detach()


def _batches(count: int, seed: int) -> Iterator[Tensor]:
    """STEPS draws of at most BATCH images, each image as often as any other."""
    generator = torch.Generator().manual_seed(seed_of("amounts", seed))
    size, waiting = min(BATCH, count), torch.zeros(0, dtype=torch.int64)
    for _ in range(STEPS):
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]

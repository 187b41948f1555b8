"""How much of each entry a task needs: a short training of a few weights and a head. Private to ``pool.py``.

    CE(head(f_W(x)), y) + 0.01 |w|_1,   W = anchor + sum_t w_t increment_t,   0 <= w_t <= 1.5

over w and the head alone, 60 steps of Adam at 1e-2 from w = s times the shares, where s is the one of 0.3, 0.5, 0.7
and 1 whose features a head reads best on held-out images (5 folds). The head starts as the one that was fitted to all
of the task's images, so that w is moved by what the images need and not by a head that knows nothing (our addition; and
the steps take at most BATCH images each, where the specification leaves it open). Where s = 0, the anchor alone, is
read as well as the best of them, or better, nothing is added and nothing trained: the specification does not say what
then, and what does not help on images that were held out only moves the descendant away from what it would inherit.

Everything is done after expansion: ``expand`` is affine, so the weights of W are those of the anchor and differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub import _pool_features
from learngene_hub.data import Images, normalise, seed_of
from learngene_hub.methods import get_method
from learngene_hub.training import plain_attention

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
    pool: Pool, model: nn.Module, task: Images, plain_ND: Tensor, shares: Mapping[str, float], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(sha256 -> weight, of those that are left; s -> cross-entropy of held-out images, "0" of the anchor alone).

    ``plain_ND`` are the features that the anchor alone, ``model``, has of the task's images.
    """
    mixture = Mixture.of(pool, list(shares), model)
    start = torch.tensor([shares[sha256] for sha256 in shares])
    seen = {s: _pool_features.features(model, task, pool.anchor, mixture.state(s * start)) for s in SCALES}
    scores = {
        s: held_out(seen_ND, task.labels, len(task.classes), seed) for s, seen_ND in [(0.0, plain_ND), *seen.items()]
    }
    told = {f"{s:g}": round(score, 6) for s, score in scores.items()}
    if is_anchor_best(told):
        return {}, told
    best = min(SCALES, key=lambda s: (scores[s], s))
    (head,) = fitted_heads(seen[best], task.labels, len(task.classes), torch.ones(1, len(task)))
    w = trained(mixture, model, task, pool, best * start, head, seed)
    return {sha256: float(weight) for sha256, weight in zip(shares, w, strict=True) if weight >= FLOOR}, told


def is_anchor_best(scores: Mapping[str, float]) -> bool:
    """Whether held-out images are read from the anchor alone, "0", as well as from any mixture, or better; not known
    without labels, which leave no scores."""
    return bool(scores) and scores["0"] <= min(score for s, score in scores.items() if s != "0")


class Mixture(NamedTuple):
    """The state dict of a model as a function of the weights of some increments.

    What the increments change lies in one vector, so that a state is one product with the weights and their gradient
    another, however many tensors there are.
    """

    still: Mapping[str, Tensor]  # tensors that no increment changes
    moving: Mapping[str, torch.Size]  # names and shapes of those that one does, P numbers together
    base_P: Tensor
    differences_SP: Tensor  # of each increment, at weight 1

    @classmethod
    def of(cls, pool: Pool, chosen: Sequence[str], model: nn.Module) -> Mixture:
        """That of these entries in ``model``, which has the anchor's native shape and the pool's image size."""
        names = tuple(model.state_dict())

        def expanded(weights: Mapping[str, float]) -> dict[str, Tensor]:
            anchor = replace(pool.anchor, tensors=pool.merged(weights))
            shape = replace(anchor.shape, classes=0, image_size=pool.manifest.key.image_size)
            state = get_method(anchor.method, anchor.settings).expand(anchor, shape)
            return {name: tensor.float() for name in names if (tensor := state[name]) is not None}

        with torch.no_grad():
            base = expanded({})
            moving = {name: t.shape for name, t in base.items() if name.startswith("blocks.")}
            base_P = _joined(base, moving)
            differences_SP = base_P.new_empty(len(chosen), len(base_P))
            for sha256, row in zip(chosen, differences_SP, strict=True):
                torch.sub(_joined(expanded({sha256: 1.0}), moving), base_P, out=row)
        return cls({name: t for name, t in base.items() if name not in moving}, moving, base_P, differences_SP)

    def state(self, w_S: Tensor) -> dict[str, Tensor]:
        """The state dict at these weights, connected to them."""
        flat = torch.addmv(self.base_P, self.differences_SP.T, w_S)
        parts = flat.split([shape.numel() for shape in self.moving.values()])
        return dict(self.still) | {
            name: part.view(shape) for (name, shape), part in zip(self.moving.items(), parts, strict=True)
        }


def _joined(state: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The numbers of these tensors in one vector."""
    return torch.cat([state[name].flatten() for name in names])


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

    The least lies in the span of the images, so the search is over r <= min(N, D) coordinates t of them. In these the
    penalty and a bound of the cross-entropy's second derivatives (Boehning, Ann. Inst. Stat. Math. 1992: half of the
    second moments) are brought to 1 together, so that few rounds are enough however unlike the features are.
    """
    share_FN = used_FN.double() / used_FN.double().sum(1, keepdim=True)
    x_ND = features_ND.double()
    mean_FD = share_FN @ x_ND
    apart_FND = x_ND - mean_FD[:, None]
    scale_FD = 1 / torch.einsum("fn,fnd->fd", share_FN, apart_FND.square()).sqrt().clamp(min=1e-6)
    z_FND = apart_FND * scale_FD[:, None]
    basis_FDr = _basis(z_FND * share_FN.sqrt()[..., None])
    t_FNr = z_FND @ basis_FDr
    penalty_Fr1 = basis_FDr.square().sum(1)[..., None]
    rows, width = len(used_FN), t_FNr.shape[2]
    free = torch.zeros(rows, width, classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(rows, 1, classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [free, bias], max_iter=200, history_size=10, tolerance_grad=1e-6, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    labels = labels_N.expand(rows, -1).reshape(-1)

    def closure() -> Tensor:
        search.zero_grad()
        each = F.cross_entropy((t_FNr @ free + bias).flatten(0, 1), labels, reduction="none")
        loss = (each.view(rows, -1) * share_FN).sum() + RIDGE / 2 * (penalty_Fr1 * free.square()).sum()
        loss.backward()
        return loss

    search.step(closure)  # type: ignore[arg-type]
    parts = (mean_FD, scale_FD, basis_FDr @ free, bias[:, 0])
    return [Head(*(part[row].detach().float() for part in parts)) for row in range(rows)]


def _basis(y_FND: Tensor) -> Tensor:
    """(F, D, r): the main axes v of the rows y, each over the root of (|y v|^2 / 2 + RIDGE); 0 beyond their span."""
    wide = y_FND.shape[1] < y_FND.shape[2]  # fewer images than features: their products with each other are fewer
    moments, axes = torch.linalg.eigh(y_FND @ y_FND.mT if wide else y_FND.mT @ y_FND)
    there = moments > 1e-12 * moments.amax(-1, keepdim=True)
    if wide:
        axes = y_FND.mT @ (axes / moments.where(there, torch.ones_like(moments)).sqrt()[:, None])
    return axes * (there / (moments.clamp(min=0) / 2 + RIDGE).sqrt())[:, None]


def trained(
    mixture: Mixture, model: nn.Module, task: Images, pool: Pool, start: Tensor, head: Head, seed: int
) -> Tensor:
    """The weights after STEPS steps of Adam on them and the head."""
    w = start.clone().requires_grad_()
    weight, bias = head.weight_DC.clone().requires_grad_(), head.bias_C.clone().requires_grad_()
    moving = head._replace(weight_DC=weight, bias_C=bias)
    search = torch.optim.Adam([w, weight, bias], lr=LR)
    with plain_attention(model, w.device):
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

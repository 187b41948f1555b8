"""Parameter sensitivity: how much the loss hangs on each layer, and the layers that it condenses to a learngene.

    s_l = mean over j in l of |g_j theta_j|,   xi_l = s_l / sum_m s_m

g is the gradient of the mean cross-entropy over the images, in eval mode. |g theta| is the first-order change of the
loss when a parameter is set to zero; the paper names a sensitivity analysis and coefficients xi that sum to 1, and
gives no formula, so this one is our reading, and so is that the most sensitive layers are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub.errors import DataError, TrainingError
from learngene_hub.training import learning, logits_of

CRITERIA = ("sensitive", "stable")


def sensitivities(
    model: nn.Module, layers: Sequence[Mapping[str, str]], pixels_BCSS: Tensor, labels_B: Tensor
) -> Tensor:
    """xi (L,), float64, summing to 1: one number per layer, of normalised pixels and their labels.

    ``layers`` are those of ``layer_entries``; what is no parameter in them (running statistics) does not count. The
    model's mode and gradients stay as they were. Where no gradient reaches any layer, all are equal.

    Raises:
        DataError: no images, or a label that the model has no output for.
        TrainingError: a gradient is not finite.
    """
    if not len(labels_B):
        raise DataError("no images given; a sensitivity analysis needs at least one")
    training = model.training
    model.eval()
    try:
        with learning():  # of copies: a model that was made in inference mode has no gradients
            named = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            rest = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
            own = [[named[name] for name in layer.values() if name in named] for layer in layers]
            flat, labels = [parameter for layer in own for parameter in layer], labels_B.clone()
            logits = logits_of(torch.func.functional_call(model, {**named, **rest}, (pixels_BCSS.clone(),)))
            if int(labels.max()) >= logits.shape[-1]:
                raise DataError(f"label {int(labels.max())} given; the model has {logits.shape[-1]} outputs")
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels), flat)
    finally:
        model.train(training)
    products = iter([(g.detach() * p.detach()).double().abs() for g, p in zip(gradients, flat, strict=True)])
    scores = []
    for layer in own:
        each = [next(products) for _ in layer]
        scores.append(torch.stack([p.sum() for p in each]).sum() / sum(p.numel() for p in each))
    s_L = torch.stack(scores).cpu()
    if not bool(s_L.isfinite().all()):
        raise TrainingError(
            "the gradients of the sensitivity analysis are not finite; a lower learning rate would help"
        )
    total = s_L.sum()
    return s_L / total if total > 0 else torch.full_like(s_L, 1 / len(s_L))


def ranked(xi: Sequence[float], criterion: str) -> list[int]:
    """The layers, best first: the most sensitive, or the most stable; ties keep the lower one first."""
    sign = -1 if criterion == "sensitive" else 1
    return sorted(range(len(xi)), key=lambda i: (sign * xi[i], i))


def condensed(xi: Sequence[float], count: int, criterion: str) -> tuple[int, ...]:
    """The ``count`` layers of a learngene, in depth order."""
    return tuple(sorted(ranked(xi, criterion)[:count]))

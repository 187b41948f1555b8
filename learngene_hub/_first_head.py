"""A first classifier from the class means of a model's own features: ``fit_head``. Private to ``factory.py``.

With features f (N, D) of labelled images, class means m_c and the covariance S within classes, averaged over them, the
head is Fisher's linear discriminant: logits_c = s ((f - m)' A (m_c - m) - (m_c - m)' A (m_c - m) / 2), m the mean of
the m_c, and

    "means"     A = I: the nearest class mean
    "whitened"  A = ((1 - g) S + g tr(S) / D I)^-1: the nearest class mean where all directions vary alike

The scale s, and g, are those of SCALES and SHRINKAGES whose cross-entropy is least on a fifth of the images that the
means were not taken from; then the means are taken from all. Where ENOUGH is reached, s is the smallest to reach it:
classes that lie far apart would have the largest, and one update turns logits of hundreds into a loss of hundreds.
Nothing is trained: it costs one forward of at most PER_CLASS images of a class. Before any training "whitened" is the
more accurate; after it "means" is (``benchmarks/speedups.yaml``): a head that fits its images too well leaves the
features little to learn.

Source: Fisher 1936 (the discriminant); Ledoit and Wolf 2004 for shrinking S towards a multiple of I. That it starts a
finetuning is common practice after Kumar et al., ICLR 2022, arXiv:2202.10054 (a head that is fitted first distorts
the features less); the closed form and the choice of s and g are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.data import Images, ordered_batches
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.shape import IMAGENET, Preprocessing

HEADS = ("fresh", "means", "whitened")
PER_CLASS = 100
HELD = 5  # every fifth image of a class is held out
SCALES = tuple(2.0**power for power in range(-24, 4))
SHRINKAGES = (0.02, 0.1, 0.5)
ENOUGH = 0.05  # nats: nothing is gained by a head that is surer


@torch.no_grad()
def fit_head(
    model: nn.Module,
    images: Images,
    *,
    how: str = "means",
    preprocessing: Preprocessing = IMAGENET,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> int:
    """Write the head of a timm ``model`` from the class means of its features of ``images``; how many were looked at.

    The model is in eval mode for this, and in its mode and place afterwards. Classes without images get the mean of the
    others, so that nothing speaks for them.

    Args:
        how: "means" or "whitened", as above; "fresh" leaves the head as it is.
        device: where to look; None: where the model is.
        seed: draws which images are looked at, where a class has more than PER_CLASS.

    Raises:
        SettingsError: no such ``how``, or the model's head is no linear layer.
        DataError: no images, or a label that the head has no output for.
    """
    if how not in HEADS:
        raise SettingsError(f"head {how!r} asked; there are {', '.join(HEADS)}")
    if how == "fresh":
        return 0
    head = linear_head(model)
    if not len(images):
        raise DataError(f"{images.name} holds no images to take class means of")
    if int(images.labels.max()) >= head.out_features:
        raise DataError(
            f"{images.name} has label {int(images.labels.max())}, the head has {head.out_features} outputs; as many "
            f"outputs as classes would work"
        )
    chosen = images.subset(_drawn(images.labels.cpu(), seed))
    features_ND = _features(model, chosen, preprocessing, batch_size, device)
    weight_CD, bias_C = solved(features_ND, chosen.labels.cpu(), head.out_features, how)
    head.weight.copy_(weight_CD)
    head.bias.copy_(bias_C)
    return len(chosen)


def linear_head(model: nn.Module) -> nn.Linear:
    """The classifier of a timm model.

    Raises:
        SettingsError: it has none that is a linear layer with a bias.
    """
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(found, nn.Linear) or found.bias is None or not hasattr(model, "forward_head"):
        raise SettingsError(
            f"the head of a {type(model).__name__} cannot be taken from class means: it is no linear layer of a timm "
            f"model; head='fresh' would work"
        )
    return found


def is_untouched(model: nn.Module) -> bool:
    """Whether the model's head is a linear layer that was never trained: a drawn one has biases of exactly 0."""
    try:
        return not bool(linear_head(model).bias.any())
    except SettingsError:
        return False


def _drawn(labels_N: Tensor, seed: int) -> Tensor:
    """The numbers of at most PER_CLASS images of each class, in order."""
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    kept = [order[labels_N[order] == c][:PER_CLASS] for c in labels_N.unique()]
    return torch.cat(kept).sort().values


def _features(
    model: Any, images: Images, preprocessing: Preprocessing, batch_size: int, device: torch.device | str | None
) -> Tensor:
    """What the head reads of each image, (N, D) in float64 on the CPU."""
    here = next(model.parameters()).device
    place, training = torch.device(device) if device is not None else here, model.training
    model.eval().to(place)
    try:
        batches = ordered_batches(images, batch_size, preprocessing, place)
        found = [model.forward_head(model.forward_features(x), pre_logits=True).double().cpu() for x, _ in batches]
    finally:
        model.train(training).to(here)
    return torch.cat(found)


def solved(features_ND: Tensor, labels_N: Tensor, classes: int, how: str) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) of the discriminant; its scale and shrinkage by held-out images, where there are any.

    Without any (no class has HELD images) the scale is that of unit variance within classes, or the smaller one that is
    enough for the images themselves.
    """
    held = _held_out(labels_N)
    shrinkages: Sequence[float] = SHRINKAGES if how == "whitened" else (1.0,)
    if not held.any() or held.all():
        weight, bias = _discriminant(features_ND, labels_N, classes, shrinkages[-1])
        _, scale = _scaled(features_ND @ weight.T + bias, labels_N)
        return (min(scale, 1.0) * weight).float(), (min(scale, 1.0) * bias).float()
    tried = []
    for shrinkage in shrinkages:
        weight, bias = _discriminant(features_ND[~held], labels_N[~held], classes, shrinkage)
        loss, scale = _scaled(features_ND[held] @ weight.T + bias, labels_N[held])
        tried.append((loss, shrinkage, scale))
    _, shrinkage, scale = min(tried)
    weight, bias = _discriminant(features_ND, labels_N, classes, shrinkage)
    return (scale * weight).float(), (scale * bias).float()


def _scaled(logits_NC: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """(cross-entropy, scale) of the best scale of logits, or of the smallest that is good enough."""
    losses = [(float(nn.functional.cross_entropy(scale * logits_NC, labels_N)), scale) for scale in SCALES]
    return next((found for found in losses if found[0] <= ENOUGH), min(losses))


def _held_out(labels_N: Tensor) -> Tensor:
    """(N,) whether an image is every HELD-th one of its class."""
    held = torch.zeros(len(labels_N), dtype=torch.bool)
    for c in labels_N.unique():
        held[(labels_N == c).nonzero().flatten()[HELD - 1 :: HELD]] = True
    return held


def _discriminant(features_ND: Tensor, labels_N: Tensor, classes: int, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of unit scale; ``shrinkage`` 1 leaves the variances' mean alone of the covariance."""
    there = labels_N.unique()
    means_CD = torch.stack([features_ND[labels_N == c].mean(0) for c in there])
    centre_D = means_CD.mean(0)
    within_ND = features_ND - means_CD[torch.searchsorted(there, labels_N)]
    width = features_ND.shape[1]
    spread = within_ND.square().sum() / max(len(within_ND) - len(there), 1) / width
    spread = spread if spread > 0 else torch.ones((), dtype=features_ND.dtype)  # one image of each class
    if shrinkage < 1:
        covariance_DD = within_ND.T @ within_ND / max(len(within_ND) - len(there), 1)
        covariance_DD = (1 - shrinkage) * covariance_DD + shrinkage * spread * torch.eye(width, dtype=spread.dtype)
        apart_CD = torch.linalg.solve(covariance_DD, (means_CD - centre_D).T).T
    else:
        apart_CD = (means_CD - centre_D) / spread
    weight_CD = torch.zeros(classes, width, dtype=features_ND.dtype)
    bias_C = torch.zeros(classes, dtype=features_ND.dtype)
    weight_CD[there] = apart_CD
    bias_C[there] = -(apart_CD * (means_CD + centre_D) / 2).sum(1)
    return weight_CD, bias_C

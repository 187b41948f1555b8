"""The quadratic anchor: inherited tensors are held near what was inherited, each number as much as it matters.

    loss + lambda / 2 * sum_i F_i (p_i - p*_i)^2

p* is the value at inheritance and F the diagonal of the Fisher information there,

    F_i = mean over images of (d log p(y | x) / d p_i)^2,   y drawn from the model's own prediction,

which is what the name promises; with the data's labels in place of y it is the "empirical" one.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796 (elastic weight consolidation), as meant in Wang et al., AAAI 2022,
whose released code reads F and p* from an object that does not have them and adds 0; published weight: 1000 * 40 / 2,
of the F of one batch, squared after averaging ("batch" here).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub._check import is_number
from learngene_hub.errors import SettingsError
from learngene_hub.methods._whole import require_choice
from learngene_hub.training import Loss, Recipe, classification_loss, logits_of


def diagonal_fisher(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    labels: str = "model",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """F of the parameters ``names``, each of its parameter's size, float32 on the CPU.

    ``batches`` are normalised pixels (B, C, S, S) and labels (B,), on the model's device. The model is in eval mode
    meanwhile, and its gradients stay as they were.

    Args:
        labels: "model": y drawn from the model's prediction with ``generator`` (one seeded with 0); "data": the given
            labels; "batch": the given labels, one squared gradient of the mean loss per batch, as in the released code.

    Raises:
        SettingsError: no batches, an unknown choice, or a name that is no parameter of the model.
    """
    require_choice("labels", labels, ("model", "data", "batch"))
    parameters = _named(model, names)
    generator = generator or torch.Generator().manual_seed(0)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count, training = 0, model.training
    model.eval()
    try:
        for pixels, given in batches:
            step = len(pixels) if labels == "batch" else 1
            for start in range(0, len(pixels), step):
                logits = logits_of(model(pixels[start : start + step]))
                y = given[start : start + step]
                if labels == "model":
                    y = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                gradients = torch.autograd.grad(F.cross_entropy(logits, y.to(logits.device)), [*parameters.values()])
                for name, gradient in zip(totals, gradients, strict=True):
                    totals[name] += gradient.float() ** 2
                count += 1
    finally:
        model.train(training)
    if not count:
        raise SettingsError("no images given; a Fisher information needs at least one")
    return {name: (total / count).cpu() for name, total in totals.items()}


def anchored_loss(
    model: nn.Module, names: Sequence[str], fisher: Mapping[str, Tensor], lam: float, loss: Loss | None = None
) -> Loss:
    """``loss`` (cross-entropy, where left out) plus lam / 2 sum F (p - p*)^2 over ``names``, for ``training.fit``.

    p* are the values that the parameters of ``model`` have now. The model that is trained may be another one with
    parameters of these names.

    Raises:
        SettingsError: ``lam`` is below 0, or a name is no parameter of the model or has no Fisher of its size.
    """
    if not (is_number(lam) and lam >= 0):
        raise SettingsError(f"lam {lam!r} asked; it is a weight of at least 0")
    parameters = _named(model, names)
    for name, parameter in parameters.items():
        if name not in fisher or fisher[name].shape != parameter.shape:
            have = list(fisher[name].shape) if name in fisher else "none"
            raise SettingsError(f"fisher of {name} is {have}; the parameter is {list(parameter.shape)}")
    first = loss or classification_loss(Recipe())
    anchors = {name: p.detach().clone() for name, p in parameters.items()}
    weights = {name: fisher[name].to(p.device, torch.float32) for name, p in parameters.items()}

    def anchored(trained: Any, batch: Any) -> Tensor:
        current = dict(trained.named_parameters())
        value = first(trained, batch)
        return value + penalty(current, anchors, weights, lam).to(value.device)

    return anchored


def penalty(
    current: Mapping[str, Tensor], anchors: Mapping[str, Tensor], fisher: Mapping[str, Tensor], lam: float
) -> Tensor:
    """lam / 2 * sum F (p - p*)^2 over the names of ``anchors``, a scalar; a name that is missing is an error."""
    terms = []
    for name, anchor in anchors.items():
        p = current[name].float()
        terms.append((fisher[name].to(p.device) * (p - anchor.to(p.device)) ** 2).sum())
    return lam / 2 * (torch.stack(terms).sum() if terms else torch.zeros(()))


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The parameters of these names.

    Raises:
        SettingsError: the model has none of one of these names.
    """
    known = dict(model.named_parameters())
    if missing := [name for name in names if name not in known]:
        raise SettingsError(
            f"{missing[0]} is no parameter of {type(model).__name__}; it has {next(iter(known), 'none')}"
        )
    return {name: known[name] for name in names}

"""Training at a client: cross-entropy, and the quadratic constraint on what was received.

    L = CE + mu/2 sum_{l in S} zeta_l |theta^l - Theta^l|^2 + nu/2 sum_j M_j Fbar_j (theta_j - Theta_j)^2

F is the diagonal Fisher information at what was received, from the true squares of per-sample gradients; M marks the
numbers above its quantile (0.8) over all that was received, Fbar = F / mean(F where M) cut at 10, zeta_l = |S| xi_l,
the per-layer smoothing, with the client's own sensitivities xi. In ``paper_mode`` zeta and Fbar are 1 and mu = nu =
lam^2, one lambda for both terms, as reviewers quote it. Only what was received is held: the client knows no fresh
Theta elsewhere.

Source: GENE-FL (arXiv:2504.14628): quadratic constraints on parameters of high Fisher information in the global model,
per-layer smooth updates. The exact form, the threshold and the separate mu and nu are our reading. With S = all, zeta 1
and nu 0 it is FedProx (arXiv:1812.06127). AdamW trains all clients, the CNNs too, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learngene_hub.data import Images, normalise, seed_of
from learngene_hub.errors import TrainingError
from learngene_hub.federated.settings import Federation
from learngene_hub.methods._heuristic_anchor import diagonal_fisher, penalty
from learngene_hub.shape import Preprocessing
from learngene_hub.training import Loss, Recipe, classification_loss, fit, image_batches

CUT = 10.0  # the largest weight of one number


def recipe_of(
    settings: Federation, *, client: int, round: int, epochs: int | None = None, lr: float | None = None
) -> Recipe:
    """How one client trains in one round; its order of images depends on (seed, client, round)."""
    return Recipe(
        epochs=epochs or settings.epochs, lr=lr or settings.lr, batch_size=settings.batch_size,
        weight_decay=settings.weight_decay, schedule="constant",
        seed=seed_of("client", settings.seed, client, round) % 2**31,
    )  # fmt: skip


def sample(images: Images, count: int, preprocessing: Preprocessing, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised pixels and labels of at most ``count`` images, drawn with ``seed``."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    some = images.subset(chosen)
    return normalise(some.pixels, preprocessing), some.labels


def fisher_weights(fisher: Mapping[str, Tensor], quantile: float, *, plain: bool = False) -> dict[str, Tensor]:
    """M Fbar of each number: 0 below the quantile over all tensors, else F over the mean of those above, at most CUT;
    ``plain``: 1 in place of that."""
    every = torch.cat([value.flatten() for value in fisher.values()])
    rank = min(max(1, round(quantile * every.numel())), every.numel())
    least = torch.kthvalue(every, rank).values
    mask = {name: (value >= least) & (value > 0) for name, value in fisher.items()}
    count = sum(int(m.sum()) for m in mask.values())
    if not count:
        return {name: torch.zeros_like(value) for name, value in fisher.items()}
    mean = torch.stack([(fisher[name] * m).sum() for name, m in mask.items()]).sum() / count
    return {
        name: mask[name].float() if plain else (value / mean).clamp(max=CUT) * mask[name]
        for name, value in fisher.items()
    }


def constraint(
    model: nn.Module,
    received: Mapping[str, Tensor],
    zeta: Mapping[str, float],
    batch: tuple[Tensor, Tensor],
    settings: Federation,
) -> dict[str, Tensor]:
    """The weight w of w/2 (theta - Theta)^2 for each number of ``received`` that is a parameter; none where all are 0.

    Args:
        model: with what was received in its place.
        zeta: factor of mu by the tensor's name; 1 where it is left out.
        batch: normalised pixels and labels that the Fisher information is measured on.
    """
    named = dict(model.named_parameters())
    names = [name for name in received if name in named]
    mu, nu = settings.constraint
    if not names or not (mu or nu):
        return {}
    weights = {
        name: torch.full_like(received[name], mu * (1.0 if settings.paper_mode else zeta.get(name, 1.0)))
        for name in names
    }
    if nu:
        fisher = diagonal_fisher(model, names, [batch], labels="data")
        held = fisher_weights(fisher, settings.quantile, plain=settings.paper_mode)
        weights = {name: weight + nu * held[name] for name, weight in weights.items()}
    return weights


def constrained_loss(recipe: Recipe, received: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Loss:
    """Cross-entropy plus sum w/2 (theta - Theta)^2 over the names of ``weights``."""
    first = classification_loss(recipe)
    if not weights:
        return first
    anchors = {name: received[name] for name in weights}

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        current = dict(model.named_parameters())
        return first(model, batch) + penalty(current, anchors, weights, 1.0)

    return loss


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    preprocessing: Preprocessing,
    received: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> float:
    """Trains ``model`` in place; the last update's loss, constraint included.

    Raises:
        TrainingError: a loss is not finite.
        DataError: no images.
    """
    batches, steps = image_batches(images, recipe, preprocessing)
    loss = float("nan")
    for step in fit(
        model, batches, constrained_loss(recipe, received, weights), recipe=recipe, steps_per_epoch=steps, device="cpu"
    ):
        loss = step.loss
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise TrainingError("a parameter is not finite after training; a lower lr would work")
    return loss

"""The learned maps of Cluster-Learngene that regenerate the FFNs of a group from the one that is kept.

psi of a group of n layers takes one number w of the kept FFN to n numbers, of which the m-th stands at the same place
of the FFN of the group's m-th layer: Linear(1, n), ReLU, Linear(n, n), the same psi at every place of every tensor of
the FFN, biases too. It starts as the identity, for which two hidden units are enough, w and -w: every FFN is a copy of
the kept one. The paper's maps are learnable; in its released code none is ever trained. Here they are trained during
extraction (our reading), in the descendant of the ancestor's own depth and heads, which learns the ancestor's
predictions on the images at hand while everything but the maps stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.methods._auxiliary import Auxiliary
from learngene_hub.methods._cluster_attention import resized
from learngene_hub.methods._cluster_groups import FfnGroup
from learngene_hub.methods._lesson import Log
from learngene_hub.shape import ViTShape
from learngene_hub.training import Recipe, StateDir, Step, distillation_loss, fit, image_batches, logits_of

FFN_KEYS = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def map_shapes(group: FfnGroup) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the four tensors of a group's map."""
    n, name = len(group), f"psi.{group.name}"
    return {
        f"{name}.in.weight": (n, 1),
        f"{name}.in.bias": (n,),
        f"{name}.out.weight": (n, n),
        f"{name}.out.bias": (n,),
    }


def identity_maps(groups: Sequence[FfnGroup]) -> dict[str, Tensor]:
    """The maps of all groups of several layers, each of which copies: relu(w) - relu(-w) = w, exactly.

    Hidden units beyond the two take w and -w in turn and are not read yet.
    """
    maps: dict[str, Tensor] = {}
    for group in groups:
        if len(group) == 1:
            continue
        maps |= {name: torch.zeros(shape) for name, shape in map_shapes(group).items()}
        turn = torch.arange(len(group))[:, None] % 2
        maps[f"psi.{group.name}.in.weight"] = 1.0 - 2.0 * turn
        maps[f"psi.{group.name}.out.weight"][:, :2] = torch.tensor([1.0, -1.0])
    return maps


def regenerate(kept: Mapping[str, Tensor], psi: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """The FFN at ``place`` of a group, from the kept one and the tensors of the group's map; without any, a copy."""
    if not psi:
        return dict(kept)
    into, out = ({kind: full(psi[f"{side}.{kind}"]) for kind in ("weight", "bias")} for side in ("in", "out"))
    made = {}
    for key, tensor in kept.items():
        hidden = torch.relu(full(tensor)[..., None] * into["weight"][:, 0] + into["bias"])  # (..., n)
        made[key] = hidden @ out["weight"][place] + out["bias"][place]
    return made


def full(tensor: Tensor) -> Tensor:
    """At least float32: what is made of stored float16 numbers is not rounded to float16 on the way."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def train_maps(
    learngene: Learngene,
    expand: Callable[[Learngene, ViTShape], Mapping[str, Tensor | None]],
    ancestor: nn.Module,
    images: Images,
    *,
    recipe: Recipe,
    watch: Callable[[Iterator[Step]], Iterator[Step]],
    state: StateDir | None,
) -> tuple[dict[str, Tensor], Log]:
    """The trained tensors of the group ``psi`` of ``learngene``, and what training them took.

    ``ancestor`` is a plain ViT with a classifier, frozen, for images of the size at which both see them; the
    auxiliary's classifier is its own.
    """
    shape = replace(learngene.shape, image_size=ViTShape.of(ancestor).image_size)
    head = {kind: getattr(ancestor.head, kind).detach().cpu() for kind in ("weight", "bias")}  # type: ignore[union-attr]
    auxiliary = Auxiliary(learngene, expand, shape, head)
    for name, parameter in auxiliary.named_parameters():
        parameter.requires_grad_(name.startswith("psi."))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = resized(batch[0], shape.image_size)
        with torch.no_grad():
            said = logits_of(ancestor.to(x.device)(x))
        return distillation_loss(logits_of(model(x)), said)

    batches, per_epoch = image_batches(images, recipe, learngene.preprocessing)
    log = Log()
    steps = fit(auxiliary, batches, loss, recipe=recipe, steps_per_epoch=per_epoch, state_dir=state, extra=log)
    for step in watch(steps):
        log.add(step)
    return {name: tensor for name, tensor in auxiliary.found().items() if name.startswith("psi.")}, log

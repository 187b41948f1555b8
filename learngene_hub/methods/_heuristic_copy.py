"""A copy of the ancestor that may be trained or asked without the ancestor noticing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from learngene_hub import transforms
from learngene_hub.data import seed_of
from learngene_hub.methods import _heuristic_cut as cut
from learngene_hub.shape import ViTShape

CLASSIFIERS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias")


def copy_at(ancestor: nn.Module, native: Any, shape: Any, *, seed: int, head: bool = False) -> nn.Module:
    """The ancestor, of shape ``native``, on the CPU in float32 at the image size and classes of ``shape``.

    Its classifier is random, drawn with ``seed``, or the ancestor's where ``head``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("copy", seed))
        model = shape.build()
    state = model.state_dict()
    for name, tensor in ancestor.state_dict().items():
        if name not in CLASSIFIERS or head:
            state[name] = tensor.detach().cpu().to(state[name].dtype)
    if isinstance(native, ViTShape):
        side = shape.image_size // shape.patch
        state["pos_embed"] = transforms.resample_positions(state["pos_embed"], side, int(shape.class_token))
    model.load_state_dict(state)
    return model


def unit_weights(model: nn.Module, native: Any) -> list[list[nn.Parameter]]:
    """The weights of each layer whose gradients are measured: a block's matrices, a convolution's kernel."""
    if isinstance(native, ViTShape):
        return [[p for p in block.parameters() if p.ndim > 1] for block in model.blocks]  # type: ignore[union-attr]
    return [[model.get_parameter(f"{unit.conv.name}.weight")] for unit in cut.units(native)]

"""Widening one convolution of a VGG without changing its function: the collective model of ``heuristic`` grows so.

Each new output channel copies an old one drawn at random: kernel, bias, and everything of its BatchNorm, running
statistics too. What reads the channels (the next convolution, the head's first layer, a classifier after pooling or
flattening) gets the copied input columns, divided so that the shares of a channel's replicas, the first of them
included, sum to 1.

``split`` "even" divides by the number of replicas, as published. Replicas that start equal and are read with equal
weights then get equal gradients, and stay equal for ever, unless something like dropout tells them apart. "uneven"
(our addition, the collective's default) draws the shares, so that the function is kept and the replicas part.

Source: Chen, Goodfellow, Shlens, "Net2Net", ICLR 2016, arXiv:1511.05641, as used in Wang et al., AAAI 2022,
arXiv:2106.06788, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from learngene_hub._check import require_int
from learngene_hub._conv import Conv, ConvShape
from learngene_hub.errors import ShapeError
from learngene_hub.methods._whole import require_choice

SPLITS = ("even", "uneven")
_NORM = ("weight", "bias", "running_mean", "running_var")


def widen(model: nn.Module, layer: int, channels: int, generator: torch.Generator, *, split: str = "even") -> nn.Module:
    """A VGG whose convolution ``layer`` (from 0) has ``channels`` output channels; the model itself is left alone.

    In eval mode the logits are the old ones. The new model is on the CPU and in the mode of the old one.

    Raises:
        ShapeError: the model is no VGG with batch norm, has no such layer, or the layer is as wide already.
        SettingsError: an unknown ``split``.
    """
    require_choice("split", split, SPLITS)
    native = ConvShape.of(model)
    if native.family != "vgg":
        raise ShapeError(f"a {native.family} given; widening is for VGGs: a residual stream is as wide everywhere")
    convs = native.convs()
    require_int("layer", layer, at_least=0)
    if layer >= len(convs):
        raise ShapeError(f"layer {layer} asked; the model has {len(convs)} convolutions: {len(convs) - 1} would work")
    require_int("channels", channels, at_least=1)
    if channels <= convs[layer].outputs:
        raise ShapeError(f"channels {channels} asked; layer {layer} has {convs[layer].outputs}, and only grows")
    flat = [width for stage in native.stages for width in stage]
    flat[layer] = channels
    widths = iter(flat)
    shape = replace(native, stages=tuple(tuple(next(widths) for _ in stage) for stage in native.stages))
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    index = replicas(convs[layer].outputs, channels, generator)
    shares = _shares(index, split, generator)
    wide = shape.build()
    wide.load_state_dict(widened(state, convs[layer], reader(native, layer), index, shares))
    wide.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or wide.pretrained_cfg)  # type: ignore[assignment]
    return wide.train(model.training)


def reader(shape: ConvShape, layer: int) -> str:
    """The name of the weight that reads the output channels of a VGG's convolution ``layer``."""
    convs = shape.convs()
    if layer + 1 < len(convs):
        return f"{convs[layer + 1].name}.weight"
    return "pre_logits.fc1.weight" if shape.head_hidden else "head.fc.weight"


def replicas(native: int, channels: int, generator: torch.Generator) -> Tensor:
    """The old channel of each new one, (channels,): first the old ones in order, then random ones."""
    drawn = torch.randint(native, (channels - native,), generator=generator)
    return torch.cat([torch.arange(native), drawn])


def _shares(index: Tensor, split: str, generator: torch.Generator) -> Tensor:
    """What part of its old channel each new one is read with, (channels,); they sum to 1 over the replicas."""
    raw = torch.ones(len(index))
    if split == "uneven":
        raw += torch.rand(len(index), generator=generator)  # from 1 to 2, so that none is read with almost nothing
    return raw / torch.zeros(int(index.max()) + 1).index_add_(0, index, raw)[index]


def widened(state: Mapping[str, Tensor], conv: Conv, reads: str, index: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """The state dict with the output channels ``index`` of ``conv``, whose readers' columns are scaled by ``shares``.

    ``reads`` names a weight of size (O, n, ...), or (O, n * s * s) of a layer behind features flattened channel by
    channel.
    """
    new = dict(state)
    for name in [f"{conv.name}.weight", f"{conv.name}.bias", *(f"{conv.norm}.{kind}" for kind in _NORM)]:
        if name in state:
            new[name] = state[name].index_select(0, index)
    weight = state[reads]
    columns = weight.reshape(len(weight), conv.outputs, -1).index_select(1, index)  # (O, n', pixels)
    columns = columns * shares.to(weight)[:, None]
    new[reads] = columns.reshape(len(weight), -1, *weight.shape[2:])
    return new

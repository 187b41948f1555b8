"""Widening a VGG's convolution: the same function, the released code's NaN, and replicas that part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learngene_hub._conv import ConvShape
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.methods._heuristic_widen import reader, replicas, widen, widened

SMALL = ConvShape(family="vgg", stages=((4,), (6, 5), (8,)), image_size=32, classes=5)
HEADS = {"pooled": {}, "1x1": {"head_hidden": 7, "head_kernel": 1}, "4x4": {"head_hidden": 7, "head_kernel": 4}}


def trained(shape: ConvShape) -> nn.Module:
    """A model whose every parameter and running statistic is a number of its own."""
    model, generator = shape.build(), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_(generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
            module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return model.eval()


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layer", range(4))
@torch.no_grad()
def test_the_function_is_kept(layer: int, head: str, split: str) -> None:
    """Convolution to convolution, over a max-pool, to a linear layer behind pooling, to the head's first layer."""
    model = trained(replace(SMALL, **HEADS[head]))
    wide = widen(model, layer, 19, torch.Generator().manual_seed(2), split=split)
    old, new = model(pictures()), wide(pictures())
    assert ConvShape.of(wide).convs()[layer].outputs == 19 and old.std() > 1e-3
    assert (old - new).abs().max() < 1e-5
    assert not wide.training and wide.pretrained_cfg["input_size"] == model.pretrained_cfg["input_size"]  # type: ignore[index]


@torch.no_grad()
def test_the_function_is_kept_over_a_flattened_map() -> None:
    """The published classifier: a linear layer behind 8 channels of 3 x 3 pixels, flattened channel by channel."""
    generator = torch.Generator().manual_seed(3)
    conv = replace(SMALL.convs()[3], name="0", norm="1")
    net = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6))
    norm: Any = net[1]
    norm.running_mean.normal_(generator=generator)
    index = replicas(8, 13, generator)
    shares = 1.0 / torch.bincount(index)[index]
    state = widened(net.state_dict(), conv, "4.weight", index, shares)
    wide = nn.Sequential(nn.Conv2d(5, 13, 3, padding=1), nn.BatchNorm2d(13), nn.ReLU(), nn.Flatten(), nn.Linear(117, 6))
    wide.load_state_dict(state)
    x = torch.randn(2, 5, 3, 3, generator=generator)
    assert torch.allclose(net.eval()(x), wide.eval()(x), atol=1e-6)


@torch.no_grad()
def test_pitfall_3_the_statistics_of_new_channels_are_not_copied() -> None:
    """Pitfall 3: all new channels but the last had running statistics of uninitialised memory; their features were
    NaN."""
    model = trained(SMALL)
    wide = widen(model, 1, 40, torch.Generator().manual_seed(2))
    old, new = model.state_dict(), wide.state_dict()
    index = replicas(6, 40, torch.Generator().manual_seed(2)).tolist()
    assert index[:6] == list(range(6)) and set(index[6:]) <= set(range(6))
    conv = SMALL.convs()[1]
    names = [f"{conv.name}.weight", f"{conv.name}.bias"]
    names += [f"{conv.norm}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
    for name in names:
        for place, source in enumerate(index):
            assert torch.equal(new[name][place], old[name][source]), (name, place)
    assert new[f"{conv.norm}.num_batches_tracked"] == 7
    features: Any = wide.forward_features(pictures())  # type: ignore[operator]
    assert bool(features.isfinite().all())


@torch.no_grad()
def test_replicas_are_divided_the_source_included() -> None:
    """A naive loop: each column of a channel with r replicas is the old one over r."""
    model = trained(SMALL)
    wide = widen(model, 0, 9, torch.Generator().manual_seed(4))
    index = replicas(4, 9, torch.Generator().manual_seed(4)).tolist()
    name = reader(SMALL, 0)
    assert name == "features.4.weight"
    old, new = model.state_dict()[name], wide.state_dict()[name]
    for place, source in enumerate(index):
        assert torch.allclose(new[:, place], old[:, source] / index.count(source))
    assert max(index.count(source) for source in range(4)) > 1


def gradients(split: str) -> tuple[Tensor, Tensor]:
    """Gradients of the kernels of channel 0 and of a replica of it, in training mode."""
    model = trained(SMALL)
    seed = next(s for s in range(50) if replicas(4, 5, torch.Generator().manual_seed(s))[4] == 0)
    wide = widen(model, 0, 5, torch.Generator().manual_seed(seed), split=split).train()
    loss = nn.functional.cross_entropy(wide(pictures()), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    gradient: Any = wide.get_parameter("features.0.weight").grad
    return gradient[0], gradient[4]


def test_equal_replicas_would_stay_equal_and_uneven_ones_part() -> None:
    """Why the collective splits unevenly: with equal shares the gradients are equal, so the copy never learns more."""
    first, second = gradients("even")
    assert torch.allclose(first, second, rtol=1e-4) and first.norm() > 0
    first, second = gradients("uneven")
    assert (first - second).norm() > 0.01 * first.norm()


def test_the_model_itself_is_left_alone() -> None:
    model = trained(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    wide = widen(model, 3, 12, torch.Generator().manual_seed(5))
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not ours & {tensor.untyped_storage().data_ptr() for tensor in wide.state_dict().values()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_generator_alone_decides() -> None:
    first, again, other = (widen(trained(SMALL), 1, 12, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same)
    assert not torch.equal(first.state_dict()["features.4.weight"], other.state_dict()["features.4.weight"])


def test_what_cannot_be_widened_is_refused() -> None:
    generator, model = torch.Generator(), trained(SMALL)
    resnet = ConvShape(family="resnet", stages=((4,), (4,), (4,), (4,)), image_size=32).build()
    with pytest.raises(ShapeError, match="a resnet given; widening is for VGGs"):
        widen(resnet, 0, 9, generator)
    with pytest.raises(ShapeError, match="layer 4 asked; the model has 4 convolutions: 3 would work"):
        widen(model, 4, 9, generator)
    with pytest.raises(ShapeError, match="channels 6 asked; layer 1 has 6, and only grows"):
        widen(model, 1, 6, generator)
    with pytest.raises(SettingsError, match="split 'odd' asked; there are even, uneven"):
        widen(model, 1, 9, generator, split="odd")

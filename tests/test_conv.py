"""ConvShape against timm's own models: counts, names, sizes, initial values, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from learngene_hub import architectures as architectures  # registers learngene_vgg
from learngene_hub._conv import Conv, ConvShape
from learngene_hub._conv_models import vgg
from learngene_hub.errors import BudgetError, ShapeError
from learngene_hub.shape import IMAGENET, ViTShape, shape_from_dict, shape_of

INDIVIDUAL = ConvShape(
    family="vgg",
    stages=((64,), (128,), (256,), (512, 512, 512, 512)),
    head_hidden=1024,
    head_kernel=2,
    image_size=32,
    classes=5,
)
VGG = ConvShape(
    family="vgg", stages=((6,), (5, 7), (4,)), head_hidden=9, head_kernel=2, image_size=32, in_chans=1, classes=3
)
RESNET = ConvShape(family="resnet", stages=((6,), (5, 5), (4,), (12, 12)), image_size=32, classes=7)
TIMM = ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "resnet18", "resnet34")
ODD = [
    *(replace(VGG, image_size=size) for size in (8, 33, 64, 100)),
    replace(VGG, head_hidden=0, head_kernel=0),
    replace(VGG, classes=0),
    replace(VGG, head_kernel=3),
    *(replace(RESNET, image_size=size) for size in (1, 33, 64, 100)),
    replace(RESNET, stages=((64, 64), (5,), (5,), (5,)), in_chans=4),
    replace(RESNET, classes=0),
    INDIVIDUAL,
]


def counted(shape: ConvShape) -> int:
    model = shape.build(device="meta").eval()
    x = torch.empty(1, shape.in_chans, shape.image_size, shape.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_models_are_read_counted_and_rebuilt(name: str) -> None:
    model = timm.create_model(name, device="meta", num_classes=11, in_chans=1)
    shape = ConvShape.of(model)
    assert shape.image_size == 224 and shape.classes == 11 and shape.in_chans == 1
    assert shape.params() == sum(p.numel() for p in model.parameters())
    assert shape.flops() == counted(shape)
    again = timm.create_model(shape.architecture, device="meta", num_classes=11, **shape.model_args())
    sizes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == sizes and shape.keys() == sizes.keys()
    assert shape.architecture == ("resnet18" if name.startswith("resnet") else name)
    assert shape_of(model) == shape


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_parameters_and_flops_are_those_of_the_built_model(shape: ConvShape) -> None:
    model = shape.build(device="meta")
    assert shape.params() == sum(p.numel() for p in model.parameters())
    assert shape.flops() == counted(shape)
    assert ConvShape.of(model) == shape
    assert shape.bytes() == 4 * shape.params() and shape.bytes(torch.float16) == 2 * shape.params()


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_the_convolutions_listed_are_those_of_the_model_in_its_order(shape: ConvShape) -> None:
    model = shape.build(device="meta")
    listed: dict[str, tuple[int, ...]] = {}
    for conv in shape.convs():
        listed |= conv.sizes()
    there = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    head = ("head", "pre_logits", "fc")
    features = {k: v for k, v in there.items() if not k.startswith(head) and not k.endswith("num_batches_tracked")}
    assert listed == features
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [conv.name for conv in shape.convs()] == [name for name in order if not name.startswith("pre_logits")]
    sides: dict[str, int] = {}
    for conv in shape.convs():
        module = model.get_submodule(conv.name)
        module.register_forward_hook(lambda m, i, out, name=conv.name: sides.update({name: out.shape[-1]}))  # type: ignore[attr-defined]
    model.eval()(torch.empty(1, shape.in_chans, shape.image_size, shape.image_size, device="meta"))
    assert sides == {conv.name: conv.side for conv in shape.convs()}


def test_the_published_numbers() -> None:
    """3 x (512 -> 512 convolution + BatchNorm) = 7,082,496; the individual for 5 classes has 11.79 million."""
    gene = INDIVIDUAL.convs()[-3:]
    assert [conv.params() for conv in gene] == [2_359_808 + 1_024] * 3
    assert sum(conv.params() for conv in gene) == 7_082_496
    features, units = 512 * 2 * 2, 1024
    assert features == 2048
    head = (features * units + units) + (units * units + units) + (units * 5 + 5)
    front = sum(o * i * 9 + o + 2 * o for i, o in ((3, 64), (64, 128), (128, 256), (256, 512)))
    assert INDIVIDUAL.params() == 7_082_496 + head + front == 11_788_293
    assert INDIVIDUAL.depth == 7 and INDIVIDUAL.width == 512 and INDIVIDUAL.side == 2
    assert ConvShape.of(timm.create_model("vgg16_bn", device="meta")).params() == 138_365_992  # torchvision's number
    assert ConvShape.of(timm.create_model("resnet18", device="meta")).params() == 11_689_512


def test_the_head_is_the_published_fully_connected_one() -> None:
    """At features of head_kernel pixels a side, timm's convolutional head is flatten, linear, ReLU, linear, ReLU."""
    model = VGG.build().eval()
    x = torch.randn(3, 4, VGG.side // 2, VGG.side // 2, generator=torch.Generator().manual_seed(0))
    head: Any = model.pre_logits
    assert x.shape[-1] == VGG.head_kernel
    wide = head.fc1.weight.flatten(1), head.fc2.weight.flatten(1)
    hidden = torch.relu(x.flatten(1) @ wide[0].T + head.fc1.bias)
    hidden = torch.relu(hidden @ wide[1].T + head.fc2.bias)
    fc: Any = model.get_submodule("head.fc")
    with torch.no_grad():
        assert torch.allclose(model.forward_head(x), hidden @ fc.weight.T + fc.bias, atol=1e-6)  # type: ignore[operator]


def test_small_images_train() -> None:
    for shape in (replace(INDIVIDUAL, stages=((4,), (8,), (8,), (8, 8))), RESNET):
        for side in (32, 64):
            model = replace(shape, image_size=side).build()
            logits = model(torch.randn(2, 3, side, side))
            logits.sum().backward()
            assert logits.shape == (2, shape.classes)
            assert all(p.grad is not None for p in model.parameters())


# What stays fresh ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vgg", "resnet"])
def test_fresh_values_are_distributed_as_timm_initialises(family: str) -> None:
    """``build`` runs timm's own initialisation."""
    stages = ((16,), (32,), (64,), (128, 128))
    head = {"head_hidden": 60, "head_kernel": 2} if family == "vgg" else {}
    shape = ConvShape(family=family, stages=stages, image_size=32, classes=50, **head)
    model, generator = shape.build(), torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        fresh = shape.fresh(key, tensor.shape, generator)
        assert fresh.dtype == tensor.dtype and fresh.shape == tensor.shape, key
        if tensor.dim() > 1 or key.startswith("fc."):  # random; so many numbers say their deviation so well
            off = 5 / math.sqrt(tensor.numel())
            assert fresh.std().item() == pytest.approx(tensor.std().item(), rel=off), key
            assert abs(fresh.mean().item()) < off * fresh.std().item(), key
        else:
            assert torch.equal(fresh, tensor), key  # 1, 0, 0, 1, and 0 at the end of a residual branch
        if key.startswith("fc."):
            assert fresh.abs().max() <= 1 / math.sqrt(128) and fresh.unique().numel() > 40, key
    assert shape.fresh("bn1.num_batches_tracked", torch.Size([]), generator).dtype == torch.int64


def test_fresh_values_depend_on_the_generator_alone() -> None:
    size = torch.Size([4, 3, 3, 3])
    first, again, other = (
        VGG.fresh("features.0.weight", size, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for shape in (VGG, RESNET):
        shape.build()
        shape.build(device="meta")
    assert torch.equal(torch.get_rng_state(), before)


# Files and other libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [VGG, RESNET, INDIVIDUAL], ids=str)
def test_json_gives_the_same_shape(shape: ConvShape) -> None:
    values = json.loads(json.dumps(shape.to_dict()))
    assert values["kind"] == "conv" and shape_from_dict(values) == shape == ConvShape.from_dict(values)
    json.dumps([shape.model_args(), shape.pretrained_cfg(IMAGENET)])


@pytest.mark.parametrize("shape", [VGG, RESNET, replace(RESNET, classes=4)], ids=str)
def test_timm_rebuilds_it_from_a_folder_with_the_same_logits(shape: ConvShape, tmp_path: Path) -> None:
    """config.json with architecture, model_args and pretrained_cfg, as ``save_pretrained`` writes it."""
    model = shape.build().eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = shape.pretrained_cfg(IMAGENET)
    config = {
        "architecture": shape.architecture, "num_classes": shape.classes, "model_args": shape.model_args(),
        "pretrained_cfg": cfg,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, shape.in_chans, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert ConvShape.of(loaded) == shape


def test_the_individual_is_the_default_of_our_architecture() -> None:
    model = timm.create_model("learngene_vgg", device="meta", num_classes=5)
    assert replace(ConvShape.of(model), image_size=32) == INDIVIDUAL
    assert ConvShape.of(vgg(device="meta")).classes == 1000


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: replace(VGG, family="alexnet"), "alexnet"),
        (lambda: replace(VGG, stages=()), "lists of channels"),
        (lambda: replace(VGG, stages=((6,), ())), "list of channels"),
        (lambda: replace(VGG, stages=((6,), (0,))), "channels 0 asked; 1 is the least"),
        (lambda: replace(VGG, stages=((6,) * 1001,)), "1001 layers asked"),
        (lambda: replace(VGG, image_size=7), "3 stages halve it as often: 8 would work"),
        (lambda: replace(VGG, head_kernel=0), "both are above 0, or both 0"),
        (lambda: replace(RESNET, stages=((6,), (6,), (6,))), "3 stages asked; timm's have 4"),
        (lambda: replace(RESNET, stages=((6,), (6,), (6,), (6, 7))), "blocks of a stage agree"),
        (lambda: replace(RESNET, head_hidden=4, head_kernel=1), "head_hidden 4 asked of a ResNet"),
        (lambda: VGG.build(drop_path_rate=0.1), "no residual paths"),
        (lambda: RESNET.build(drop_path_rate=1.0), "below 1"),
        (lambda: ConvShape.from_dict(VGG.to_dict() | {"odd": 1}), "unknown keys odd"),
        (lambda: ConvShape.from_dict(VGG.to_dict() | {"kind": "vit"}), "kind 'vit'"),
    ],
)
def test_networks_that_do_not_exist_are_refused(change: Callable[[], object], match: str) -> None:
    with pytest.raises(ShapeError, match=match) as caught:
        change()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("vgg11", {}, "without batch norm"),
        ("vgg11_bn", {"global_pool": "max"}, "pool 'max'"),
        ("resnet50", {}, "blocks of type Bottleneck"),
        ("resnet18", {"global_pool": "max"}, "pool 'max'"),
        ("resnet18d", {}, "deep stem"),
        ("resnet18", {"output_stride": 8}, "stride"),
        ("seresnet18", {}, "SEModule|se"),
        ("mobilenetv3_small_050", {}, "MobileNetV3 given"),
    ],
)
def test_other_models_are_refused_by_name(name: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        ConvShape.of(timm.create_model(name, device="meta", **arguments))


@pytest.mark.parametrize(
    "size",
    ["64", [3, "64", "64"], [3, 64, -1], [3, 64, 64.5], [64], [], 64, {"height": 64}, [3, True, True], [[3]] * 3],
)
def test_an_input_size_that_is_none_is_an_error_of_ours(size: Any) -> None:
    """A stranger's config may say anything; a model without one is of timm's 224 px."""
    model: Any = RESNET.build()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": size}
    with pytest.raises(ShapeError, match=r"^input_size .* given; \[3, 224, 224\] would work$"):
        ConvShape.of(model)
    for cfg in ({}, None, {"input_size": None}):
        model.pretrained_cfg = cfg
        assert ConvShape.of(model).image_size == 224


def test_a_vit_is_no_cnn_and_a_cnn_no_vit() -> None:
    vit = ViTShape(depth=1, width=8, heads=1, patch=8, image_size=16)
    with pytest.raises(ShapeError, match="VisionTransformer given"):
        ConvShape.of(vit.build(device="meta"))
    assert shape_of(vit.build(device="meta")) == vit and shape_of(VGG.build(device="meta")) == VGG


def test_the_budget_is_kept() -> None:
    VGG.require_budget(VGG.params())
    with pytest.raises(BudgetError, match=f"{VGG.params():,} parameters"):
        VGG.require_budget(VGG.params() - 1)


def test_drop_path_reaches_a_resnet() -> None:
    model = RESNET.build(drop_path_rate=0.5)
    assert any(type(module).__name__ == "DropPath" for module in model.modules())
    assert ConvShape.of(model) == RESNET


def test_a_convolution_counts_itself() -> None:
    conv = Conv(
        name="c", norm="n", inputs=3, outputs=5, kernel=3, stride=1, bias=True, side=4, stage=0, block=0
    )  # fmt: skip
    assert conv.params() == 5 * 27 + 5 + 10 and conv.flops() == 2 * 16 * 5 * 27

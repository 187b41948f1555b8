"""ViTShape: counts against timm's and torch's numbers, building and reading back, refusals that say what would work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learngene_hub.errors import BudgetError, SettingsError, ShapeError
from learngene_hub.shape import IMAGENET, Preprocessing, Reach, ViTShape

TINY = ViTShape(depth=2, width=64, heads=2, image_size=32, classes=10)
AVERAGED = replace(TINY, class_token=False, pool="avg")
DEIT = {
    "tiny": (192, 3, 1.26),
    "small": (384, 6, 4.61),
    "base": (768, 12, 17.58),
}  # width, heads, timm's published GMACs


def deit(size: str) -> ViTShape:
    width, heads, _ = DEIT[size]
    return ViTShape(depth=12, width=width, heads=heads)


@st.composite
def shapes(draw: st.DrawFn) -> ViTShape:
    heads, patch = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 14, 16]))
    class_token = draw(st.booleans())
    return ViTShape(
        depth=draw(st.integers(1, 5)),
        width=heads * draw(st.integers(1, 40)),
        heads=heads,
        mlp_ratio=draw(st.floats(1, 6, allow_nan=False)),
        patch=patch,
        image_size=patch * draw(st.integers(1, 6)),
        in_chans=draw(st.sampled_from([1, 2, 3, 4, 5])),
        classes=draw(st.integers(0, 20)),
        class_token=class_token,
        pool=draw(st.sampled_from(["token", "avg"])) if class_token else "avg",
    )


def counted_flops(shape: ViTShape, device: str) -> int:
    model = shape.build(device=device)
    image = torch.zeros(1, shape.in_chans, shape.image_size, shape.image_size, device=device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # older torch counts no fused CPU kernel
        model(image)
    return counter.get_total_flops()


def test_deit_tiny_has_the_published_number_of_parameters() -> None:
    assert deit("tiny").params() == 5_717_416


@pytest.mark.parametrize("size", DEIT)
def test_parameters_are_those_of_timm(size: str) -> None:
    model = timm.create_model(f"deit_{size}_patch16_224", device="meta", weight_init="skip")
    assert deit(size).params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", DEIT)
def test_macs_are_those_timm_publishes(size: str) -> None:
    assert round(deit(size).macs() / 1e9, 2) == DEIT[size][2]


@pytest.mark.parametrize("size", DEIT)
def test_flops_of_deit_are_those_torch_counts(size: str) -> None:
    assert deit(size).flops() == counted_flops(deit(size), "meta")


@pytest.mark.parametrize(
    "shape", [TINY, AVERAGED, replace(TINY, pool="avg"), replace(TINY, classes=0), replace(TINY, in_chans=4, patch=8)]
)
def test_flops_are_those_of_a_real_forward(shape: ViTShape) -> None:
    assert shape.flops() == counted_flops(shape, "cpu")


def test_macs_add_five_per_number_normed() -> None:
    # 2 blocks x 2 norms x 5 tokens and the last norm on 5 tokens, 64 wide; pooled first, the last norm sees one token
    assert TINY.macs() - TINY.flops() // 2 == 5 * 64 * (2 * 2 * 5 + 5)
    assert AVERAGED.macs() - AVERAGED.flops() // 2 == 5 * 64 * (2 * 2 * 4 + 1)


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_a_built_model_reads_back_as_its_shape(shape: ViTShape) -> None:
    model = shape.build(device="meta")
    assert ViTShape.of(model) == shape
    assert sum(p.numel() for p in model.parameters()) == shape.params()
    assert shape.keys() == frozenset(model.state_dict())
    assert ViTShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 8000))
def test_any_number_of_hidden_units_has_a_ratio(width: int, hidden: int) -> None:
    shape = ViTShape(depth=1, width=width, heads=1, mlp_ratio=(hidden + 0.5) / width)
    assert shape.hidden == hidden
    assert replace(shape) == shape


def test_equal_networks_are_equal_shapes() -> None:
    assert replace(TINY, mlp_ratio=4) == TINY == replace(TINY, mlp_ratio=4.0001)
    assert replace(TINY, head_dim=32) == TINY
    assert TINY.head_dim == 32 and TINY.hidden == 256 and TINY.tokens == 5


def test_a_build_is_what_timm_itself_would_make() -> None:
    torch.manual_seed(0)
    ours = deit("tiny").build()
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_patch16_224")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ViTShape.of(theirs) == deit("tiny")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_build_leaves_the_global_random_state_alone(device: str) -> None:
    before = torch.get_rng_state()
    TINY.build(device=device)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_build_on_meta_allocates_nothing() -> None:
    model = ViTShape(depth=3, width=16384, heads=256).build(device="meta")
    assert all(p.device.type == "meta" for p in model.parameters())


def test_drop_path_rises_over_the_blocks_and_is_no_part_of_the_shape() -> None:
    model = TINY.build(drop_path_rate=0.2)
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0.0, 0.2])
    assert ViTShape.of(model) == TINY


@pytest.mark.parametrize("rate", [-0.1, 1.0, "0.1", float("nan"), True])
def test_drop_path_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(ShapeError, match="drop_path_rate .* at least 0 and below 1"):
        TINY.build(drop_path_rate=rate)


def test_pretrained_cfg_is_complete() -> None:
    facts = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop_pct=0.8)
    cfg = TINY.build(device="meta", preprocessing=facts).pretrained_cfg
    assert tuple(cfg["mean"]) == facts.mean and tuple(cfg["std"]) == facts.std
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 0.8)
    assert tuple(cfg["input_size"]) == (3, 32, 32) and cfg["num_classes"] == 10
    assert (cfg["first_conv"], cfg["classifier"]) == ("patch_embed.proj", "head")
    assert timm.data.resolve_data_config(cfg)["input_size"] == (3, 32, 32)


def test_timm_never_converts_a_first_layer_of_other_channels() -> None:
    cfg = replace(TINY, in_chans=4).build(device="meta").pretrained_cfg
    assert cfg.get("first_conv") is None and len(cfg["mean"]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth 0 asked; 1 is the least that works"),
        ({"depth": -3}, "depth -3 asked; 1 is the least that works"),
        ({"depth": 2.0}, "depth 2.0 asked; it is a whole number, at least 1"),
        ({"depth": True}, "depth True asked; it is a whole number"),
        ({"classes": -1}, "classes -1 asked; 0 is the least that works"),
        ({"width": 200, "heads": 3}, "3 heads asked; they do not divide width 200: 2 or 4 heads, or width 198 or 201"),
        ({"width": 200, "heads": 3, "head_dim": 64}, "width 200 asked; 3 heads of 64 give 192: width 192 or 256"),
        ({"width": 30, "heads": 1, "head_dim": 64}, "width 64 with"),
        ({"image_size": 100}, "image size 100 asked; it must be a multiple of patch 16: 96 or 112"),
        ({"image_size": 7}, "multiple of patch 16: 16 would work"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0 asked; it must be at least"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan asked"),
        ({"mlp_ratio": "4"}, "mlp_ratio '4' asked"),
        ({"pool": "map"}, "pool 'map' asked; there are token, avg"),
        ({"class_token": False}, "class_token=True or pool='avg' would work"),
        ({"class_token": 1}, "class_token 1 asked; it is True or False"),
    ],
)
def test_nonsense_is_refused_with_what_would_work(change: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        replace(TINY, **{"head_dim": 0} | change)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_from_dict_refuses_unknown_and_missing_keys() -> None:
    with pytest.raises(ShapeError, match="unknown keys registers given"):
        ViTShape.from_dict({**TINY.to_dict(), "registers": 4})
    with pytest.raises(ShapeError, match="keys heads are missing; there are depth, width"):
        ViTShape.from_dict({"depth": 2, "width": 64})
    with pytest.raises(ShapeError, match="list given"):
        ViTShape.from_dict([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arguments", "feature"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, "registers"),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "layer scale"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "qk_norm"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "no qkv bias"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "no projection bias"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "pre-norm"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "position embeddings"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "without position embedding"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "pool 'map'"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "no final norm"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, "wrong side of the pool"),
        ("vit_tiny_patch16_224", {"fc_norm": True}, "a norm after the pool"),
        ("vit_tiny_patch16_224", {"img_size": (32, 64)}, "not square"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "RmsNorm"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "ReLU"),
        ("deit_tiny_distilled_patch16_224", {}, "with a distillation token"),
        ("vit_giant_patch14_dinov2", {}, "SwiGLU"),
        ("vit_small_patch16_18x2_224", {}, "ParallelThingsBlock"),
        ("eva02_tiny_patch14_224", {}, "Eva given"),
    ],
)
def test_other_vits_are_refused_by_what_they_have(name: str, arguments: dict[str, object], feature: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **{"depth": 2} | arguments)
    with pytest.raises(ShapeError, match=feature):
        ViTShape.of(model)


def test_models_changed_after_building_are_refused() -> None:
    stitched = TINY.build(device="meta")
    stitched.blocks[1] = replace(TINY, width=32, heads=1).build(device="meta").blocks[0]
    with pytest.raises(ShapeError, match=r"blocks\.1\..* in a plain ViT of its shape, 2x64"):
        ViTShape.of(stitched)
    loose = TINY.build(device="meta")
    loose.norm.eps = 1e-5
    with pytest.raises(ShapeError, match="eps is not 1e-6"):
        ViTShape.of(loose)
    with pytest.raises(ShapeError, match="Linear given; only timm's plain VisionTransformer"):
        ViTShape.of(torch.nn.Linear(2, 2))


def test_bytes_and_budget() -> None:
    shape = deit("tiny")
    assert shape.bytes() == shape.bytes(torch.float32) == 2 * shape.bytes(torch.bfloat16) == 4 * shape.params()
    assert shape.bytes(1) == shape.params()
    shape.require_budget(5_717_416)
    with pytest.raises(
        BudgetError, match="12x192 asked: 5,717,416 parameters; at most 5,000,000 are allowed: depth 10"
    ):
        shape.require_budget(5_000_000)
    with pytest.raises(BudgetError, match="at width 192 even depth 1 has 823,912"):
        shape.require_budget(1000)
    assert replace(shape, depth=10).params() <= 5_000_000 < replace(shape, depth=11).params()


def test_reach_names_the_nearest() -> None:
    reach = Reach(depths=(2, 24), widths=(64, 768, 64))
    assert str(reach) == "depth 2-24, width 64-768 step 64"
    assert str(Reach(depths=(3, 3), widths=(192, 192, 64))) == "depth 3, width 192"
    assert Reach.from_dict(json.loads(json.dumps(reach.to_dict()))) == reach
    for depth, width in ((2, 64), (24, 768), (7, 320)):
        reach.check(ViTShape(depth=depth, width=width, heads=width // 64))
    for depth, width, near in (
        (1, 64, "depth 2"),
        (30, 64, "depth 24"),
        (12, 100, "width 64 or 128"),
        (12, 32, "width 64"),
        (12, 900, "width 768"),
    ):
        with pytest.raises(ShapeError) as caught:
            reach.check(ViTShape(depth=depth, width=width, heads=1))
        assert f"this learngene reaches depth 2-24, width 64-768 step 64: {near} would work" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"depths": [5, 2], "widths": [64, 128, 64]},
        {"depths": [2, 5], "widths": [64, 100, 64]},
        {"depths": [2, 5], "widths": [64, 128]},
        {"depths": [0, 5], "widths": [64, 128, 64]},
        {"depths": [2.0, 5], "widths": [64, 128, 64]},
        {"depths": 5, "widths": [64, 128, 64]},
        {"depths": [2, 5]},
        {"depths": [2, 5], "widths": [64, 128, 64], "heads": 3},
    ],
)
def test_a_reach_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Reach.from_dict(values)


def test_preprocessing_survives_json_and_fits_any_channels() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(IMAGENET.to_dict()))) == IMAGENET
    assert IMAGENET.for_channels(3) is IMAGENET
    assert IMAGENET.for_channels(1).mean == pytest.approx((0.449,), abs=1e-3)
    assert IMAGENET.for_channels(4).std == (0.229, 0.224, 0.225, 0.229)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5]},
        {"mean": [], "std": []},
        {"mean": "0.5"},
        {"mean": [float("nan")] * 3},
        {"std": [0.1, 0.0, 0.1]},
        {"interpolation": "cubic"},
        {"crop_pct": 0},
        {"crop_pct": 1.5},
        {"size": 3},
    ],
)
def test_preprocessing_refuses_nonsense(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Preprocessing.from_dict({**IMAGENET.to_dict(), **change})


def test_the_model_is_timms_own() -> None:
    assert type(TINY.build()) is VisionTransformer


def test_importing_shape_imports_no_torch() -> None:
    code = "import sys, learngene_hub.shape; sys.exit(any(name in sys.modules for name in ('torch', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The verbs: what is grown, what is refused before anything is allocated, and accuracy against a loop."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from planted import FACTS, VARIANTS, features, planted, variant
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.errors import BudgetError, DataError, LearngeneError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import lsamd
from learngene_hub.methods.lsamd import Lsamd
from learngene_hub.shape import IMAGENET, Preprocessing, Reach, ViTShape
from learngene_hub.training import Recipe


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def ancestor() -> nn.Module:
    return build_pico(variant("token"))


@pytest.fixture(scope="module")
def gene(ancestor: nn.Module) -> Learngene:
    return planted(ancestor)


def some_images(count: int = 11, *, classes: int = 10, size: int = 32, channels: int = 3) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    return Images(pixels, labels, tuple(str(i) for i in range(classes)), "some")


# Growing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"depth": 1}, {"depth": 6, "width": 160}, {"width": 32, "num_labels": 3, "in_chans": 1, "image_size": 48}],
)
def test_what_is_grown_has_the_shape_that_plan_says(name: str, sizes: dict[str, Any]) -> None:
    gene = planted(build_pico(variant(name)))
    shape, model = factory.plan(gene, **sizes), factory.expand(gene, **sizes)
    assert ViTShape.of(model) == shape
    native = gene.shape
    assert (shape.depth, shape.width) == (sizes.get("depth", native.depth), sizes.get("width", native.width))
    assert (shape.classes, shape.image_size) == (sizes.get("num_labels", 10), sizes.get("image_size", 32))
    assert sum(p.numel() for p in model.parameters()) == shape.params()
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        said = model(noise(2, shape.in_chans, shape.image_size, shape.image_size))
    assert said.shape == (2, shape.classes) and bool(said.isfinite().all())


def test_without_a_head_the_native_model_gives_features(ancestor: nn.Module) -> None:
    headless = variant("token", classes=0)
    model = build_pico(headless)
    grown = factory.expand(planted(model))
    x = noise(2, 3, 32, 32)
    assert grown.num_classes == 0
    with torch.no_grad():
        assert torch.equal(grown(x), model(x))
    assert factory.expand(planted(model), num_labels=4).head.weight.shape == (4, 64)


def test_the_head_is_fresh_and_depends_on_the_seed_alone(gene: Learngene) -> None:
    """Normal of 0.02, as timm's trunc_normal_ (which cuts at 2, that is at 100 deviations: never)."""
    first, again, other = (factory.expand(gene, num_labels=400, seed=seed).head for seed in (7, 7, 8))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    count = first.weight.numel()
    assert float(first.weight.detach().mean()) == pytest.approx(0, abs=5 * 0.02 / math.sqrt(count))
    assert float(first.weight.detach().std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * count))
    assert not first.bias.any()


def test_the_callers_random_numbers_are_left_alone(gene: Learngene) -> None:
    state = torch.get_rng_state()
    factory.expand(gene, depth=6, width=96, num_labels=4, seed=3, drop_path_rate=0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_other_input_channels_are_those_of_timm(gene: Learngene, ancestor: nn.Module, in_chans: int) -> None:
    model = factory.expand(gene, in_chans=in_chans)
    want = adapt_input_conv(in_chans, ancestor.patch_embed.proj.weight.detach())
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), want)
    grey = noise(2, 1, 32, 32)
    if in_chans == 1:  # one grey channel is the same grey three times
        got, want = features(model, grey), features(ancestor, grey.expand(-1, 3, -1, -1).contiguous())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(model.pretrained_cfg["mean"]) == in_chans


@pytest.mark.parametrize("image_size", [16, 48])
@pytest.mark.parametrize("name", ["token", "avg"])
def test_other_image_sizes_resample_the_positions_as_timm(name: str, image_size: int) -> None:
    ancestor = build_pico(variant(name))
    model = factory.expand(planted(ancestor), image_size=image_size)
    side, prefix = image_size // 8, 1 if name == "token" else 0
    want = resample_abs_pos_embed(ancestor.pos_embed.detach(), [side, side], num_prefix_tokens=prefix)
    torch.testing.assert_close(model.pos_embed.detach(), want)
    timms = build_pico(variant(name))
    timms.set_input_size(img_size=(image_size, image_size))
    x = noise(2, 3, image_size, image_size)
    torch.testing.assert_close(features(model, x), features(timms, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, None])
def test_the_dtype_is_the_asked_one(gene: Learngene, dtype: torch.dtype | None) -> None:
    model = factory.expand(gene, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    wanted = gene.tensors["block.1.mlp.fc1.weight"].to(dtype or torch.float32)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, wanted)


def test_a_dtype_without_fractions_is_refused(gene: Learngene) -> None:
    with pytest.raises(LearngeneError, match="int8"):
        factory.expand(gene, dtype=torch.int8)


def test_drop_path_is_set_on_the_blocks(gene: Learngene) -> None:
    model = factory.expand(gene, drop_path_rate=0.2)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    with pytest.raises(ShapeError, match="drop_path_rate 1.5"):
        factory.expand(gene, drop_path_rate=1.5)


def test_the_preprocessing_travels_into_the_model(gene: Learngene) -> None:
    other = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=1.0)
    cfg = factory.expand(replace(gene, preprocessing=other)).pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (other.mean, other.std)
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 1.0)


def test_a_grown_model_equals_the_same_state_in_a_model_that_timm_makes(gene: Learngene) -> None:
    """Buffers, hooks, non-persistent state: everything beside the parameters is timm's own."""
    grown = factory.expand(gene, depth=5, width=96)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=5, num_heads=3, num_classes=10
    ).eval()
    plain.load_state_dict(grown.state_dict(), strict=True)
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), grown(x))


# The learngene stays what it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"depth": 6}, {"width": 96}, {"width": 32, "depth": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_a_descendant_changes_neither_the_learngene_nor_itself_twice(
    ancestor: nn.Module, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """No tensor of the model shares memory with the learngene or with another of the model: not those of repeated
    blocks, nor the norms learned for a width, which are rows of one stored tensor."""
    learned = {f"{kind}.{w}": noise(7, w, seed=w) for kind in ("gain", "bias") for w in (32, 96)}
    gene = planted(ancestor, width=learned)
    tensors = {name: tensor.to(dtype) for name, tensor in gene.tensors.items()}
    gene = replace(gene, tensors=tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    model = factory.expand(gene, **sizes, dtype=dtype)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


def _grow_with(monkeypatch: pytest.MonkeyPatch, gene: Learngene, change: Any) -> nn.Module:
    right = Lsamd.expand
    monkeypatch.setattr(Lsamd, "expand", lambda self, learngene, shape: change(right(self, learngene, shape)))
    return factory.expand(gene)


def test_a_method_that_forgets_the_head_is_refused(monkeypatch: pytest.MonkeyPatch, gene: Learngene) -> None:
    with pytest.raises(LearngeneError, match=r"lsamd does not account for \['head.bias', 'head.weight'\]"):
        _grow_with(monkeypatch, gene, lambda s: {k: t for k, t in s.items() if not k.startswith("head")})


def test_a_method_that_invents_a_tensor_is_refused(monkeypatch: pytest.MonkeyPatch, gene: Learngene) -> None:
    with pytest.raises(LearngeneError, match=r"invents \['blocks.9.norm1.weight'\]"):
        _grow_with(monkeypatch, gene, lambda s: s | {"blocks.9.norm1.weight": torch.ones(64)})


def test_a_method_that_makes_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, gene: Learngene) -> None:
    with pytest.raises(LearngeneError, match=r"norm.weight \[65\].*\[64\]"):
        _grow_with(monkeypatch, gene, lambda s: s | {"norm.weight": torch.ones(65)})


def test_a_method_that_leaves_everything_fresh_gets_what_timm_would_draw(
    monkeypatch: pytest.MonkeyPatch, gene: Learngene
) -> None:
    """Norms 1 and 0, biases 0, weights of 0.02: the same spread, tensor by tensor, as timm's own initialisation."""
    model = _grow_with(monkeypatch, gene, dict.fromkeys)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert bool((tensor == 1).all()), name
        elif tensor.numel() > 1000:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.1), name


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"depth": 0}, "depth 0 asked; .*depth 1 would work"),
        ({"depth": -2}, "depth -2 asked"),
        ({"depth": 7}, "depth 7 asked; this learngene reaches depth 1-6.*depth 6 would work"),
        ({"depth": 2.5}, "depth 2.5 asked; it is a whole number"),
        ({"depth": True}, "depth True asked"),
        ({"width": 0}, "width 0 asked"),
        ({"width": -64}, "width -64 asked"),
        ({"width": 100}, "width 100 asked.*width 96 or 128 would work"),
        ({"width": 288}, "width 288 asked.*width 256 would work"),
        ({"width": 16}, "width 16 asked.*width 32 would work"),
        ({"width": "64"}, "width '64' asked"),
        ({"heads": 4}, "4 heads asked at width 64.*2 heads would work"),
        ({"width": 96, "heads": 2}, "2 heads asked at width 96.*3 heads would work"),
        ({"heads": 0}, "0 heads asked"),
        ({"num_labels": 0}, "num_labels 0 asked"),
        ({"num_labels": -1}, "num_labels -1 asked"),
        ({"num_labels": True}, "num_labels True asked"),
        ({"num_labels": 2.0}, "num_labels 2.0 asked"),
        ({"image_size": 30}, "image size 30 asked.*24 or 32 would work"),
        ({"image_size": 0}, "image_size 0 asked"),
        ({"in_chans": 0}, "in_chans 0 asked"),
    ],
)
def test_sizes_that_cannot_be_grown_are_refused_on_one_line(gene: Learngene, sizes: dict[str, Any], told: str) -> None:
    for verb in (factory.plan, factory.expand):
        with pytest.raises(ShapeError, match=told) as caught:
            verb(gene, **sizes)
        assert "\n" not in str(caught.value)


def test_a_descendant_over_the_budget_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, ancestor: nn.Module
) -> None:
    """24 x 100000: 2.9e12 parameters, 12 TB. Whatever would build or expand it fails the test."""
    gene = planted(ancestor, reach=Reach(depths=(1, 24), widths=(32, 100_000, 32)))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(ViTShape, "build", never)
    monkeypatch.setattr(Lsamd, "expand", never)
    with pytest.raises(BudgetError, match="24x100000 asked: 2,880,[0-9,]+ parameters; at most 2,000,000,000"):
        factory.expand(gene, depth=24, width=100_000)
    shape = factory.plan(gene, depth=2)
    with pytest.raises(BudgetError, match="would fit"):
        factory.expand(gene, depth=2, width=shape.width, max_params=shape.params() - 1)
    assert factory.plan(gene, depth=2, width=shape.width, max_params=shape.params()) == shape


def test_out_of_reach_is_told_before_the_budget(gene: Learngene) -> None:
    with pytest.raises(ShapeError, match="width 100000 asked.*256 would work"):
        factory.expand(gene, depth=4, width=100_000)


# Extract -------------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_model_is_that_of_its_parameters(ancestor: nn.Module) -> None:
    digest = hashlib.sha256()
    for name in sorted(ancestor.state_dict()):
        tensor = ancestor.state_dict()[name]
        digest.update(f"{name}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert factory.state_digest(ancestor) == digest.hexdigest()
    other = build_pico(variant("token"))
    with torch.no_grad():
        other.blocks[0].norm1.bias[0] += 1e-3
    assert factory.state_digest(other) != digest.hexdigest()


def test_extract_hands_the_facts_to_the_method(monkeypatch: pytest.MonkeyPatch, ancestor: nn.Module) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(lsamd.Lsamd, "extract", lambda self, *a, **k: heard.append((self, a, k)))
    factory.extract("lsamd", ancestor, {}, settings={"keep": 2}, facts={"name": "pico"}, preprocessing=IMAGENET)
    factory.extract(Lsamd(keep=4), ancestor, {}, facts=FACTS | {"sha256": "ab" * 32})
    assert heard[0][0] == Lsamd(keep=2) and heard[1][0] == Lsamd(keep=4)
    assert heard[0][2]["facts"] == {
        "name": "pico",
        "sha256": factory.state_digest(ancestor),
        "license": "",
        "source": "",
    }
    assert heard[1][2]["facts"]["sha256"] == "ab" * 32
    with pytest.raises(SettingsError, match="beside a method object"):
        factory.extract(Lsamd(), ancestor, {}, settings={"keep": 2})
    with pytest.raises(SettingsError, match="'lsmd'.*'lsamd'"):
        factory.extract("lsmd", ancestor, {})


# Evaluate and finetune -----------------------------------------------------------------------------------------------


class _Wrapped(nn.Module):
    """As transformers' models: an object with ``logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"logits": self.model(x)})()


@pytest.mark.parametrize("batch_size", [4, 256])
@pytest.mark.parametrize("wrap", [nn.Sequential, _Wrapped])
def test_evaluate_is_the_naive_loop(ancestor: nn.Module, batch_size: int, wrap: Any) -> None:
    images, model = some_images(), wrap(ancestor)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
    right, loss = 0, 0.0
    with torch.no_grad():
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
            logits = ancestor(((pixels / 255 - mean) / std)[None])[0]
            right += int(logits.argmax()) == label
            loss += float(logits.exp().sum().log() - logits[label])
    model.train()
    said = factory.evaluate(model, images, batch_size=batch_size)
    assert model.training
    assert said.accuracy == pytest.approx(100 * right / 11) and said.count == 11
    assert said.loss == pytest.approx(loss / 11, rel=1e-4) and said.seconds > 0
    ancestor.eval()


def test_evaluate_refuses_what_it_cannot_count_and_leaves_the_model_as_it_was() -> None:
    model = build_pico(variant("token", classes=3)).train()
    with pytest.raises(DataError, match="some has label 9 of 10 classes; the model has 3 outputs: num_labels=10 would"):
        factory.evaluate(model, some_images())
    assert model.training
    with pytest.raises(DataError, match="empty is empty"):
        factory.evaluate(model, replace(some_images().subset([]), name="empty"))
    with pytest.raises(SettingsError, match="precision 'fp8' asked"):
        factory.evaluate(model, some_images(), precision="fp8")
    with pytest.raises(SettingsError, match="batch_size 0"):
        factory.evaluate(model, some_images(), batch_size=0)


def test_evaluate_in_bf16_is_near(ancestor: nn.Module) -> None:
    full, half = (factory.evaluate(ancestor, some_images(), precision=p) for p in ("fp32", "bf16"))
    assert half.loss == pytest.approx(full.loss, rel=0.05)


def test_finetune_lowers_the_loss_on_eight_images(gene: Learngene) -> None:
    model, images = factory.expand(gene, num_labels=10), some_images(8)
    recipe = Recipe(epochs=24, batch_size=8, lr=1e-3)
    state = torch.get_rng_state()
    before = factory.evaluate(model, images).loss
    steps = list(factory.finetune(model, images, recipe=recipe))
    assert [step.step for step in steps] == list(range(1, 25)) and all(step.epoch_done for step in steps)
    assert factory.evaluate(model, images).loss < 0.5 * before
    assert torch.equal(torch.get_rng_state(), state)


def test_finetune_refuses_at_once_labels_without_an_output(gene: Learngene) -> None:
    with pytest.raises(DataError, match="label 9.*num_labels=10 would work"):
        factory.finetune(factory.expand(gene, num_labels=4), some_images(), recipe=Recipe(epochs=1))


def test_finetune_and_evaluate_refuse_images_of_another_size(gene: Learngene) -> None:
    """timm would stop with an AssertionError from inside the first step."""
    model, images = factory.expand(gene), some_images(size=48)
    with pytest.raises(DataError, match="48.*32"):
        factory.evaluate(model, images)
    with pytest.raises(DataError, match="48.*32"):
        list(factory.finetune(model, images, recipe=Recipe(epochs=1, batch_size=4)))

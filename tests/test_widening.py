"""The width stage: scores against naive loops, what it starts from, what it may not change, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_pico
from planted import features, planted, variant
from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.errors import DataError, LearngeneError, SettingsError
from learngene_hub.factory import expand
from learngene_hub.learngene import Learngene
from learngene_hub.shape import IMAGENET
from learngene_hub.widening import Widening, measure_scores, widen

STILL = 1e-12  # a learning rate at which nothing moves
QUICK: dict[str, Any] = {"score_images": 16, "steps_per_epoch": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def images(sign_images: tuple[Images, Images]) -> Images:
    return sign_images[0].subset(range(24))


def gene(name: str = "token", **more: Any) -> Learngene:
    """A planted learngene of one of VARIANTS whose norms are far from each other: gains of 0.3 to 1.7."""
    ancestor, generator = build_pico(variant(name)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in ancestor.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(0.3 + 1.4 * torch.rand(len(module.weight), generator=generator))
                module.bias.copy_(0.2 * torch.randn(len(module.bias), generator=generator))
    return planted(ancestor, **more)


def widened(learngene: Learngene, images: Images, **settings: Any) -> Learngene:
    return widen(learngene, {"signs": images}, Widening(**(QUICK | settings)))


def pixels(images: Images) -> Tensor:
    """Normalised by hand."""
    x = images.pixels.float() / 255
    return torch.stack([(x[:, c] - IMAGENET.mean[c]) / IMAGENET.std[c] for c in range(3)], dim=1)


def tokens(model: Any, x: Tensor) -> Tensor:
    """Every token after the last norm."""
    with torch.no_grad():
        return model.forward_features(x)


# Scores --------------------------------------------------------------------------------------------------------------


def naive_scores(learngene: Learngene, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of the stored blocks written out, looping over heads, hidden units and channels."""
    native, t = learngene.shape, learngene.tensors
    width, dim = native.width, native.head_dim
    heads, hidden = torch.zeros(native.depth, native.heads), torch.zeros(native.depth, native.hidden)
    stream = torch.zeros(width)
    patches = nn.functional.conv2d(x, t["stem.patch_embed.proj.weight"], t["stem.patch_embed.proj.bias"], stride=8)
    z = torch.cat([t["stem.cls_token"].expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    z = z + t["stem.pos_embed"]
    for i in sorted({int(name.split(".")[1]) for name in t if name.startswith("block.")}):
        b = learngene.group(f"block.{i}")
        a = nn.functional.layer_norm(z, (width,), b["norm1.weight"], b["norm1.bias"], eps=1e-6)
        stream += reads(a, b["attn.qkv.weight"])
        q, k, v = (a @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).split(width, dim=-1)
        out = b["attn.proj.bias"].expand_as(z)
        for h in range(native.heads):
            of = slice(h * dim, (h + 1) * dim)
            attention = (q[..., of] @ k[..., of].transpose(1, 2) / math.sqrt(dim)).softmax(-1)
            written = attention @ v[..., of] @ b["attn.proj.weight"][:, of].T
            heads[i, h] = (written**2).mean()
            out = out + written
        z = z + out
        a = nn.functional.layer_norm(z, (width,), b["norm2.weight"], b["norm2.bias"], eps=1e-6)
        stream += reads(a, b["mlp.fc1.weight"])
        active = nn.functional.gelu(a @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        for m in range(native.hidden):
            hidden[i, m] = (active[..., m, None] * b["mlp.fc2.weight"][:, m]).pow(2).sum(-1).mean()
        z = z + active @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    last = nn.functional.layer_norm(z, (width,), t["tail.norm.weight"], t["tail.norm.bias"], eps=1e-6)
    squares = torch.stack([(last[..., c] ** 2).mean() for c in range(width)])
    return stream + squares / squares.sum(), heads, hidden


def reads(a: Tensor, reader: Tensor) -> Tensor:
    """Each channel's share of what a matrix reads."""
    amounts = [(a[..., c] ** 2).mean() * (reader[:, c] ** 2).sum() for c in range(a.shape[-1])]
    return torch.stack(amounts) / sum(float(amount) for amount in amounts)


def test_scores_are_those_of_naive_loops(images: Images) -> None:
    learngene, few = gene("odd", kept=[0, 2]), images.subset(range(4))
    found = measure_scores(learngene, few, Widening(score_images=1000))
    stream, heads, hidden = naive_scores(learngene, pixels(few))
    torch.testing.assert_close(found["stream"], stream, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["heads"], heads, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["hidden"], hidden, rtol=1e-4, atol=1e-8)
    assert not found["heads"][1].any() and not found["hidden"][1].any() and bool(found["heads"][[0, 2]].all())


def test_scores_are_measured_on_as_many_images_as_asked(images: Images) -> None:
    learngene = gene()
    few = [measure_scores(learngene, images, Widening(score_images=1, seed=seed))["stream"] for seed in range(3)]
    each = [measure_scores(learngene, images.subset([i]), Widening())["stream"] for i in range(len(images))]
    assert all(any(torch.allclose(one, other) for other in each) for one in few)
    assert not torch.allclose(few[0], few[1]) or not torch.allclose(few[0], few[2])


# What the stage leaves alone -----------------------------------------------------------------------------------------


def test_the_native_width_and_multiples_are_not_changed(images: Images) -> None:
    learngene = gene()
    grown = widened(learngene, images, widths=(32, 96), rows=32, lr=0.1, rows_lr=0.1)
    assert all(torch.equal(grown.tensors[name], tensor) for name, tensor in learngene.tensors.items())
    native, before = expand(grown).state_dict(), expand(learngene).state_dict()
    assert all(torch.equal(native[name], tensor) for name, tensor in before.items())
    want = features(expand(learngene), pixels(images))
    for times in (2, 3):
        got = features(expand(grown, width=64 * times), pixels(images))
        torch.testing.assert_close(got, want.repeat(1, times), rtol=1e-4, atol=1e-4)


def test_without_widths_only_scores_are_added(images: Images) -> None:
    grown = widened(gene(), images)
    added = set(grown.tensors) - set(gene().tensors)
    assert added == {"width.stream", "width.heads", "width.hidden"}


def test_what_was_learned_is_saved_and_loaded(images: Images, tmp_path: Any) -> None:
    grown = widened(gene("odd"), images, widths=(32, 128), rows=64)
    assert grown.group("width")["rows"].shape == (64, 96) and grown.group("width")["gain.128"].shape == (7, 128)
    again = Learngene.load(grown.save_pretrained(tmp_path))
    assert again.digest == grown.digest
    record = again.provenance["width"]
    assert record["settings"]["widths"] == [32, 128] and record["images"] == 24 and set(record["loss"]) == {"32", "128"}


def test_a_seed_decides_every_byte(images: Images) -> None:
    before = torch.get_rng_state()
    one, same, other = (widened(gene("odd"), images, widths=(64, 128), rows=64, seed=s) for s in (3, 3, 4))
    assert one.digest == same.digest != other.digest
    assert torch.equal(torch.get_rng_state(), before)


# What it starts from -------------------------------------------------------------------------------------------------


def best(score: Tensor, count: int) -> list[int]:
    """The ``count`` highest scores, the highest first."""
    return sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:count]


def test_norms_start_from_what_the_resize_gives(images: Images) -> None:
    learngene = gene(kept=[0, 2])
    learned = widened(learngene, images, widths=(32, 96), lr=STILL).group("width")
    channels = {96: [*range(64), *range(32)], 32: sorted(best(learned["stream"], 32))}
    for width, chosen in channels.items():
        for kind, key in (("gain", "weight"), ("bias", "bias")):
            rows = [torch.zeros(width)] * 7  # block 1 is not stored
            for i in (0, 2):
                rows[2 * i] = learngene.tensors[f"block.{i}.norm1.{key}"][chosen]
                rows[2 * i + 1] = learngene.tensors[f"block.{i}.norm2.{key}"][chosen]
            rows[6] = learngene.tensors[f"tail.norm.{key}"][chosen]
            torch.testing.assert_close(learned[f"{kind}.{width}"], torch.stack(rows), rtol=0, atol=1e-8)


def test_rows_start_as_the_best_channels(images: Images) -> None:
    learned = widened(gene("odd"), images, widths=(32,), rows=64, lr=STILL, rows_lr=STILL).group("width")
    want = torch.zeros(64, 96)
    for row, channel in enumerate(best(learned["stream"], 64)):
        want[row, channel] = 1
    torch.testing.assert_close(learned["rows"], want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("width", [32, 64])
def test_rows_that_choose_channels_compute_what_chosen_channels_do(images: Images, width: int) -> None:
    plain = widened(gene("odd"), images)
    order = best(plain.group("width")["stream"], 64)
    rows = planted_width(plain, {"rows": torch.eye(96)[order]})
    want, got = (features(expand(one, width=width), pixels(images)) for one in (plain, rows))
    places = [sorted(order[:width]).index(channel) for channel in order[:width]]
    torch.testing.assert_close(got, want[:, places], rtol=1e-4, atol=1e-4)


def planted_width(learngene: Learngene, tensors: dict[str, Tensor]) -> Learngene:
    """With more tensors of the group ``width``."""
    more = {f"width.{name}": tensor for name, tensor in tensors.items()}
    return replace(learngene, tensors={**learngene.tensors, **more})


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 64])
def test_a_width_uses_the_leading_rows(width: int) -> None:
    """Every tensor of the descendant by numpy: written through A[:w], read through its pseudo-inverse."""
    rows = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    learngene = gene("odd", width={"rows": torch.from_numpy(rows)})
    grown = {name: tensor.numpy() for name, tensor in expand(learngene, width=width).state_dict().items()}
    a = rows[:width].astype(np.float64)
    inverse = a.T @ np.linalg.inv(a @ a.T)
    stem = {name: tensor.numpy().astype(np.float64) for name, tensor in learngene.group("stem").items()}
    want = {name: stem[name] @ a.T for name in ("cls_token", "pos_embed")}
    want["patch_embed.proj.weight"] = np.einsum("wd,dchk->wchk", a, stem["patch_embed.proj.weight"])
    want["patch_embed.proj.bias"] = a @ stem["patch_embed.proj.bias"]
    kept = np.concatenate([np.arange(part * 96, part * 96 + width) for part in range(3)])  # leading heads of q, k, v
    for i in range(3):
        block = {name: tensor.numpy().astype(np.float64) for name, tensor in learngene.group(f"block.{i}").items()}
        want[f"blocks.{i}.attn.qkv.weight"] = block["attn.qkv.weight"][kept] @ inverse
        want[f"blocks.{i}.attn.qkv.bias"] = block["attn.qkv.bias"][kept]
        want[f"blocks.{i}.attn.proj.weight"] = a @ block["attn.proj.weight"][:, :width]
        want[f"blocks.{i}.attn.proj.bias"] = a @ block["attn.proj.bias"]
        want[f"blocks.{i}.mlp.fc1.weight"] = block["mlp.fc1.weight"][: 4 * width] @ inverse
        want[f"blocks.{i}.mlp.fc1.bias"] = block["mlp.fc1.bias"][: 4 * width]
        want[f"blocks.{i}.mlp.fc2.weight"] = a @ block["mlp.fc2.weight"][:, : 4 * width]
        want[f"blocks.{i}.mlp.fc2.bias"] = a @ block["mlp.fc2.bias"]
    assert {name for name in grown if "norm" not in name and "head" not in name} == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(grown[name], value, rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_narrower_stream_is_a_part_of_a_wider_one(images: Images) -> None:
    grown = widened(gene("odd"), images, widths=(32, 64), rows=64, rows_lr=0.1)
    narrow, wide = (expand(grown, width=width).state_dict() for width in (32, 64))
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        torch.testing.assert_close(narrow[name], wide[name][:32])
    for name in ("cls_token", "pos_embed"):
        torch.testing.assert_close(narrow[name], wide[name][..., :32])


# Learning ------------------------------------------------------------------------------------------------------------


def test_updates_reach_every_row_gain_and_bias(images: Images) -> None:
    """AdamW without decay moves nothing that has no gradient: the norms of block 1, which is not stored."""
    learngene = gene("odd", kept=[0, 2])
    settings: dict[str, Any] = {"widths": (32, 64, 128), "rows": 64, "steps_per_epoch": 3, "shallow": 0.0}
    start = widened(learngene, images, **settings, lr=STILL, rows_lr=STILL).group("width")
    end = widened(learngene, images, **settings, lr=0.01, rows_lr=0.01).group("width")
    norms = {f"{kind}.{width}" for kind in ("gain", "bias") for width in (32, 64, 128)}
    assert set(end) == {"stream", "heads", "hidden", "rows"} | norms
    assert bool((start["rows"] != end["rows"]).all())
    for name in norms:
        moved = start[name] != end[name]
        assert bool(moved[[0, 1, 4, 5, 6]].all()) and not moved[[2, 3]].any(), name
    for name in ("stream", "heads", "hidden"):
        assert torch.equal(start[name], end[name])


def distance(learngene: Learngene, grown: Learngene, width: int, images: Images) -> float:
    """Mean squared error of all tokens, of the channels that the width has, or through the rows of all; relative to the
    mean square of the native model's."""
    x, native = pixels(images), learngene.shape.width
    want, got = tokens(expand(learngene), x), tokens(expand(grown, width=width), x)
    whole, learned = float(want.square().mean()), grown.group("width")
    if width > native:
        want = torch.cat([want] * -(-width // native), dim=-1)[..., :width]
    elif "rows" in learned:
        got = got @ torch.from_numpy(np.linalg.pinv(learned["rows"][:width].numpy())).T
    else:
        want = want[..., sorted(best(learned["stream"], width))]
    return float((got - want).square().mean()) / whole


KINDS = [("token", (32, 96), 0), ("odd", (32, 64), 64)]  # variant, widths, rows


@pytest.mark.parametrize(("name", "widths", "rows"), KINDS)
def test_learning_lowers_the_distance_on_fixed_images(
    images: Images, name: str, widths: tuple[int, ...], rows: int
) -> None:
    learngene = gene(name)
    settings: dict[str, Any] = {"widths": widths, "rows": rows, "shallow": 0.25}
    start = widened(learngene, images, **settings, lr=STILL, rows_lr=STILL)
    end = widened(learngene, images, **settings, steps_per_epoch=44, lr=0.02, rows_lr=0.02)
    for width in widths:
        before, after = (distance(learngene, grown, width, images) for grown in (start, end))
        assert after < 0.7 * before, (width, before, after)
        told = end.provenance["width"]["loss"][str(width)]
        assert told[1] < told[0]


@pytest.mark.parametrize(("name", "widths", "rows"), KINDS)
def test_the_loss_told_at_the_start_is_the_distance(
    images: Images, name: str, widths: tuple[int, ...], rows: int
) -> None:
    """But for the images that an update happens to draw: 6 times 64 out of 24, as they are."""
    settings: dict[str, Any] = {"shallow": 0.0, "flip": False, "crop_padding": 0, "lr": STILL, "rows_lr": STILL}
    learngene = gene(name)
    grown = widened(learngene, images, widths=widths, rows=rows, steps_per_epoch=6, batch_size=64, **settings)
    for width, (told, _) in grown.provenance["width"]["loss"].items():
        assert told == pytest.approx(distance(learngene, grown, int(width), images), rel=0.05)


def test_a_form_that_is_exact_has_nothing_to_learn(images: Images) -> None:
    grown = widened(gene(settings={"form": "exact"}), images, widths=(96,), lr=STILL)
    assert grown.provenance["width"]["loss"]["96"][0] < 1e-4


def test_a_half_precision_learngene_is_widened(images: Images) -> None:
    grown = widened(gene().to(torch.float16), images, widths=(32, 96), rows=32)
    assert all(tensor.isfinite().all() for tensor in grown.tensors.values())
    assert grown.tensors["width.gain.96"].dtype == torch.float32


def test_a_pooled_ancestor_is_widened(images: Images) -> None:
    grown = widened(gene("avg"), images, widths=(96,), lr=STILL)
    last = grown.tensors["tail.norm.weight"]
    torch.testing.assert_close(grown.tensors["width.gain.96"][6], torch.cat([last, last[:32]]), rtol=0, atol=1e-8)


def test_a_width_above_the_rows_keeps_whole_channels(images: Images) -> None:
    plain, rows = (widened(gene("odd"), images, widths=(64,), rows=r, lr=STILL, rows_lr=STILL) for r in (0, 32))
    assert plain.provenance["width"]["loss"] == rows.provenance["width"]["loss"]


def test_widening_again_starts_afresh(images: Images) -> None:
    first = widened(gene("odd"), images, widths=(64,), rows=64, rows_lr=0.1)
    once, again = (widened(one, images, widths=(64,)).group("width") for one in (gene("odd"), first))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


# Refusals ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"width": 64}, "unknown keys width given; the known ones are widths, rows"),
    "no list": ({"widths": 64}, r"a list, such as \[64, 128\]"),
    "text": ({"widths": "64"}, r"a list, such as \[64, 128\]"),
    "bool": ({"widths": [True]}, "whole number"),
    "zero": ({"widths": [0]}, "width 0 asked"),
    "share": ({"shallow": 1.5}, "from 0 to 1"),
    "nan": ({"shallow": float("nan")}, "from 0 to 1"),
    "images": ({"score_images": 0}, "score_images 0 asked"),
    "batch": ({"batch_size": 8.0}, "whole number"),
    "steps": ({"steps_per_epoch": -1}, "steps_per_epoch -1 asked"),
    "rows": ({"rows": -1}, "rows -1 asked"),
}
REFUSED_LATE: dict[str, tuple[dict[str, Any], str]] = {  # once the learngene is known, or the training starts
    "native": ({"widths": [64]}, "width 64 asked; a learned width is a multiple of 32 .* not of 64, where copies are"),
    "multiple": ({"widths": [96, 128]}, "width 128 asked; .* not of 64, where copies are exact"),
    "head": ({"widths": [96, 65]}, "width 65 asked; a learned width is a multiple of 32"),
    "lr": ({"widths": [32], "lr": -1.0}, "lr"),
    "lr text": ({"widths": [32], "lr": "fast"}, "lr"),
    "precision": ({"widths": [32], "precision": "fp8"}, "fp32, bf16"),
    "crop": ({"widths": [32], "crop_padding": 32}, "crop_padding 32"),
}
ACCEPTED: dict[str, dict[str, Any]] = {  # nonsense that passes today, or fails without one line
    "rows of all channels": {"widths": [32], "rows": 64},
    "more rows than channels": {"widths": [32], "rows": 128},
    "rows without widths": {"rows": 32},
    "rows_lr": {"widths": [32], "rows": 32, "rows_lr": -1.0},
    "rows_lr text": {"widths": [32], "rows": 32, "rows_lr": "fast"},
    "shallow text": {"widths": [32], "shallow": "half"},
    "beyond reach": {"widths": [512]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_in_one_line(case: str) -> None:
    values, told = REFUSED[case]
    with pytest.raises(SettingsError, match=told) as refused:
        Widening.from_dict(values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", REFUSED_LATE)
def test_settings_that_do_not_fit_are_refused_in_one_line(images: Images, case: str) -> None:
    values, told = REFUSED_LATE[case]
    with pytest.raises(SettingsError, match=told) as refused:
        widen(gene(), {"signs": images}, Widening.from_dict(QUICK | values))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_nonsense_is_refused(images: Images, case: str) -> None:
    with pytest.raises(SettingsError):
        widen(gene(), {"signs": images}, Widening.from_dict(QUICK | ACCEPTED[case]))


def test_images_that_do_not_fit_the_patches_are_refused(images: Images) -> None:
    odd = Images(images.pixels[..., :30, :30].contiguous(), images.labels, images.classes, "odd")
    with pytest.raises(LearngeneError, match="patch 8"):
        widened(gene(), odd)


@pytest.mark.parametrize("case", ["none", "empty", "two sizes", "grey"])
def test_images_that_cannot_be_used_are_refused(images: Images, case: str) -> None:
    smaller = Images(images.pixels[..., :24, :24].contiguous(), images.labels, images.classes, "small")
    grey = Images(images.pixels[:, :1].contiguous(), images.labels, images.classes, "grey")
    data = {
        "none": {},
        "empty": {"a": images.subset([])},
        "two sizes": {"a": images, "b": smaller},
        "grey": {"a": grey},
    }[case]
    with pytest.raises((SettingsError, DataError)):
        widen(gene(), data, Widening(**QUICK))

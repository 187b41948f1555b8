"""Depth rules and width maps against tables by hand, naive loops, timm's own functions, and identities."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from conftest import build_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import VARIANTS, features, planted, variant
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from learngene_hub import factory, transforms
from learngene_hub.errors import ArtefactError, SettingsError
from learngene_hub.shape import ViTShape


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# Depth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "count", "positions"),
    [
        (12, 1, (0,)),
        (12, 2, (0, 11)),
        (12, 3, (0, 6, 11)),  # 5.5 rounds up
        (6, 3, (0, 3, 5)),  # 2.5 rounds up, where Python's round would give 2
        (12, 6, (0, 2, 4, 7, 9, 11)),  # 2.2 4.4 6.6 8.8
        (4, 4, (0, 1, 2, 3)),
        (3, 5, (0, 1, 1, 2, 2)),  # 0.5 and 1.5 round up
        (1, 3, (0, 0, 0)),
    ],
)
def test_even_positions(depth: int, count: int, positions: tuple[int, ...]) -> None:
    assert transforms.even_positions(depth, count) == positions


@pytest.mark.parametrize(
    ("kept", "depth", "count", "positions"),
    [
        ((0, 5, 11), 12, 4, (0, 5, 5, 11)),  # places 0, 3.67, 7.33, 11
        ((0, 2), 3, 3, (0, 0, 2)),  # place 1 is a tie: the smaller index
        ((0, 1), 4, 7, (0, 0, 1, 1, 1, 1, 1)),  # place 0.5 is a tie
        ((3, 5), 6, 1, (3,)),
        ((1, 4, 7), 12, 3, (1, 4, 7)),  # place 5.5 is a tie between 4 and 7
        ((0, 1, 2), 3, 6, (0, 0, 1, 1, 2, 2)),  # places 0 .4 .8 1.2 1.6 2
    ],
)
def test_nearest_positions(kept: tuple[int, ...], depth: int, count: int, positions: tuple[int, ...]) -> None:
    assert transforms.nearest_positions(kept, depth, count) == positions


@given(st.integers(1, 16), st.integers(1, 32), st.data())
@settings(max_examples=60, deadline=None)
def test_nearest_positions_is_a_naive_search_in_fractions(depth: int, count: int, data: st.DataObject) -> None:
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1))))
    found = transforms.nearest_positions(kept, depth, count)
    for j, position in enumerate(found):
        place = Fraction(j * (depth - 1), max(count - 1, 1))
        best = min(abs(place - k) for k in kept)
        assert position == min(k for k in kept if abs(place - k) == best)
    assert list(found) == sorted(found)


# Axes ----------------------------------------------------------------------------------------------------------------


def test_units_are_copied_in_turn_and_read_divided_by_their_copies() -> None:
    units = transforms.map_units(3, 7)
    assert units.index.tolist() == [0, 1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(units.read, torch.tensor([1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 2, 1 / 2, 1 / 3]))
    assert not units.unchanged


def test_fewer_units_are_those_with_the_best_scores_in_native_order() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.2])
    assert transforms.map_units(5, 3, score).index.tolist() == [1, 2, 3]
    assert transforms.map_units(5, 1, score).index.tolist() == [1]  # of equals the lower index
    assert transforms.map_units(4, 2, torch.ones(4)).index.tolist() == [0, 1]
    assert transforms.map_units(5, 2).index.tolist() == [0, 1]
    assert transforms.map_units(5, 3, score).read is None  # every unit is read once
    assert transforms.map_units(5, 7, score).index.tolist() == [0, 1, 2, 3, 4, 0, 1]  # scores say nothing above


def test_the_native_count_is_unchanged_whatever_the_scores() -> None:
    units = transforms.map_units(4, 4, torch.tensor([0.0, 3.0, 1.0, 2.0]))
    assert units.unchanged and units.index.tolist() == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_narrower_choice_is_a_subset_of_a_wider_one(scores: list[int], data: st.DataObject) -> None:
    wide = data.draw(st.integers(1, len(scores)))
    narrow = data.draw(st.integers(1, wide))
    score = torch.tensor(scores, dtype=torch.float32)
    chosen = [set(transforms.map_units(len(scores), n, score).index.tolist()) for n in (narrow, wide)]
    assert chosen[0] <= chosen[1]
    kept = [s for i, s in enumerate(scores) if i in chosen[0]]
    dropped = [s for i, s in enumerate(scores) if i not in chosen[0]]
    assert not dropped or min(kept) >= max(dropped)


def test_head_units_keep_heads_whole() -> None:
    units = transforms.head_units(transforms.map_units(2, 3), head_dim=2)
    assert units.index.tolist() == [0, 1, 2, 3, 0, 1]
    assert units.read.tolist() == [0.5, 0.5, 1.0, 1.0, 0.5, 0.5]


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'lemon'.*copy, balanced, exact"):
        transforms.map_stream(4, 8, "lemon")


@pytest.mark.parametrize("width", [5, 6, 7, 9])
def test_the_balanced_stream_keeps_the_mean_square_at_every_width(width: int) -> None:
    """mean over D' of (s x)^2 = mean over D of x^2 for every x, and LayerNorm's gain undoes s."""
    stream = transforms.map_stream(4, width, "balanced")
    for seed in range(3):
        x = noise(4, seed=seed)
        written = torch.tensor([float(x[i % 4]) * float(stream.write[i]) for i in range(width)])
        torch.testing.assert_close(written.square().mean(), x.square().mean())
    torch.testing.assert_close(stream.write * stream.gain, torch.ones(width))


@pytest.mark.parametrize("times", [2, 3])
def test_balanced_is_copy_at_integer_multiples(times: int) -> None:
    copied, balanced = (transforms.map_stream(4, 4 * times, form) for form in ("copy", "balanced"))
    for name in ("index", "write", "gain", "bias", "read"):
        one = torch.ones(4 * times)
        mine, theirs = (one if f is None else f for f in (getattr(balanced, name), getattr(copied, name)))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


# One block against loops over single units ---------------------------------------------------------------------------


def some_block(width: int, hidden: int) -> dict[str, Tensor]:
    outputs = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width)}
    outputs |= {"mlp.fc2": (width, hidden), "norm1": (width,), "norm2": (width,)}
    block = {f"{name}.weight": noise(*size, seed=i) for i, (name, size) in enumerate(outputs.items())}
    return block | {f"{name}.bias": noise(size[0], seed=20 + i) for i, (name, size) in enumerate(outputs.items())}


def copies(i: int, native: int, count: int) -> int:
    """How many of ``count`` cyclic copies are of the native unit that unit ``i`` copies."""
    return sum(k % native == i % native for k in range(count))


def naive_block(block: dict[str, Tensor], old: tuple[int, int, int], new: tuple[int, int, int], head_dim: int) -> Any:
    """Copy-and-divide, unit by unit; ``old`` and ``new`` are (channels, heads, hidden)."""
    (d, h, m), (dd, hh, mm) = old, new
    grown = {f"{n}.weight": torch.empty(s) for n, s in {"attn.qkv": (3 * dd, dd), "attn.proj": (dd, dd)}.items()}
    grown |= {"mlp.fc1.weight": torch.empty(mm, dd), "mlp.fc2.weight": torch.empty(dd, mm)}
    grown |= {"attn.qkv.bias": torch.empty(3 * dd), "mlp.fc1.bias": torch.empty(mm)}
    for part in range(3):
        for head in range(hh):
            for unit in range(head_dim):
                row = part * hh * head_dim + head * head_dim + unit
                source = part * h * head_dim + (head % h) * head_dim + unit
                grown["attn.qkv.bias"][row] = block["attn.qkv.bias"][source]
                for c in range(dd):
                    grown["attn.qkv.weight"][row, c] = block["attn.qkv.weight"][source, c % d] / copies(c, d, dd)
    for c in range(dd):
        for head in range(hh):
            for unit in range(head_dim):
                told = block["attn.proj.weight"][c % d, (head % h) * head_dim + unit]
                grown["attn.proj.weight"][c, head * head_dim + unit] = told / copies(head, h, hh)
        for unit in range(mm):
            grown["mlp.fc1.weight"][unit, c] = block["mlp.fc1.weight"][unit % m, c % d] / copies(c, d, dd)
            grown["mlp.fc2.weight"][c, unit] = block["mlp.fc2.weight"][c % d, unit % m] / copies(unit, m, mm)
    for unit in range(mm):
        grown["mlp.fc1.bias"][unit] = block["mlp.fc1.bias"][unit % m]
    for name in ("attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        grown[name] = torch.stack([block[name][c % d] for c in range(dd)])
    return grown


@pytest.mark.parametrize("heads", [3, 4, 5])
def test_a_copied_block_is_the_naive_copy_and_divide(heads: int) -> None:
    head_dim, old = 3, (6, 2, 12)
    new = (heads * head_dim, heads, heads * head_dim * 2)
    block = some_block(6, 12)
    grown = transforms.resize_block(
        block,
        transforms.map_stream(6, new[0]),
        transforms.map_units(2, heads),
        transforms.map_units(12, new[2]),
        head_dim,
    )
    wanted = naive_block(block, old, new, head_dim)
    assert grown.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(grown[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_a_narrower_block_holds_the_chosen_entries_undivided() -> None:
    block = some_block(6, 8)
    channels, heads, hidden = [1, 3, 4], [1], [0, 2, 5, 7]
    grown = transforms.resize_block(
        block,
        transforms.map_stream(6, 3, "copy", torch.tensor([0.0, 5, 1, 6, 7, 2])),
        transforms.map_units(2, 1, torch.tensor([0.0, 1.0])),
        transforms.map_units(8, 4, torch.tensor([9.0, 0, 8, 1, 2, 7, 3, 6])),
        head_dim=3,
    )
    inner = [3 * h + u for h in heads for u in range(3)]
    rows = [6 * part + i for part in range(3) for i in inner]
    assert torch.equal(grown["attn.qkv.weight"], block["attn.qkv.weight"][rows][:, channels])
    assert torch.equal(grown["attn.qkv.bias"], block["attn.qkv.bias"][rows])
    assert torch.equal(grown["attn.proj.weight"], block["attn.proj.weight"][channels][:, inner])
    assert torch.equal(grown["mlp.fc1.weight"], block["mlp.fc1.weight"][hidden][:, channels])
    assert torch.equal(grown["mlp.fc2.weight"], block["mlp.fc2.weight"][channels][:, hidden])
    assert torch.equal(grown["mlp.fc1.bias"], block["mlp.fc1.bias"][hidden])
    for name in ("attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm2.bias"):
        assert torch.equal(grown[name], block[name][channels])


def test_the_exact_stem_is_centred_padded_with_zeros() -> None:
    stem = {"patch_embed.proj.weight": noise(4, 3, 2, 2), "patch_embed.proj.bias": noise(4, seed=1)}
    stem |= {"cls_token": noise(1, 1, 4, seed=2), "pos_embed": noise(1, 5, 4, seed=3)}
    grown = transforms.resize_stem(stem, transforms.map_stream(4, 6, "exact"))
    kernel = grown["patch_embed.proj.weight"]
    torch.testing.assert_close(kernel[:4], stem["patch_embed.proj.weight"] - stem["patch_embed.proj.weight"].mean(0))
    torch.testing.assert_close(
        grown["pos_embed"][..., :4], stem["pos_embed"] - stem["pos_embed"].mean(-1, keepdim=True)
    )
    assert not kernel[4:].any() and not grown["pos_embed"][..., 4:].any() and not grown["cls_token"][..., 4:].any()


def test_learned_rows_are_written_and_read_with_their_pseudo_inverse() -> None:
    rows, w_OI, w_IO = noise(3, 5), noise(5, 7, seed=1), noise(7, 5, seed=2)
    stream = transforms.Resize.of({"rows": noise(4, 5)}, _wide(5), _wide(3), "copy").stream
    assert stream.rows is not None and torch.equal(stream.rows, noise(4, 5)[:3])  # nested: the leading rows
    stream = transforms.Resize.of({"rows": rows}, _wide(5), _wide(3), "copy").stream
    left = rows.T @ torch.linalg.inv(rows @ rows.T)  # the pseudo-inverse of a matrix of full row rank
    torch.testing.assert_close(transforms.write_rows(w_OI, stream), rows @ w_OI, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transforms.read_columns(w_IO, stream), w_IO @ left, rtol=1e-4, atol=1e-4)


def _wide(width: int) -> ViTShape:
    return ViTShape(depth=1, width=width, heads=width, head_dim=1, patch=8, image_size=32)


def test_norms_learned_for_one_width_stand_at_that_width_alone() -> None:
    native = variant("token")
    learned = {"gain.96": noise(7, 96), "bias.96": noise(7, 96, seed=1)}
    block, norm = some_block(64, 256), {"weight": noise(64), "bias": noise(64, seed=1)}
    wider, widest = (
        transforms.Resize.of(learned, native, variant("token", width=w, heads=w // 32), "copy") for w in (96, 128)
    )
    assert torch.equal(wider.block(block, 1)["norm2.weight"], learned["gain.96"][3])
    assert torch.equal(wider.block(block, 2)["norm1.bias"], learned["bias.96"][4])
    assert torch.equal(wider.norm(norm)["weight"], learned["gain.96"][6])
    assert torch.equal(widest.block(block, 1)["norm2.weight"], torch.cat([block["norm2.weight"]] * 2))


# Identities of whole models ------------------------------------------------------------------------------------------


def images(shape: ViTShape) -> Tensor:
    return noise(2, shape.in_chans, shape.image_size, shape.image_size, seed=5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", transforms.FORMS)
@pytest.mark.parametrize("times", [2, 3])
def test_integer_multiples_compute_the_ancestor(name: str, form: str, times: int) -> None:
    """Copies keep mean and variance, so LayerNorm is the same; ``exact`` differs by eps (see the next test)."""
    ancestor = build_pico(variant(name))
    native = ViTShape.of(ancestor)
    grown = factory.expand(planted(ancestor, settings={"form": form}), width=times * native.width)
    _same_eps(grown, native.width if form == "exact" else times * native.width, times * native.width)
    want, got = features(ancestor, images(native)), features(grown, images(native))
    silent = torch.zeros_like(want)
    again = [silent if form == "exact" else want] * (times - 1)
    torch.testing.assert_close(got, torch.cat([want, *again], dim=-1), rtol=1e-4, atol=1e-4)


def _same_eps(model: nn.Module, native: int, width: int) -> None:
    """Zero channels make the variance native / width of what it was, so eps has to shrink with it."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps *= native / width


@pytest.mark.parametrize("name", VARIANTS)
def test_the_exact_form_is_exact_at_every_width(name: str) -> None:
    """To rounding with eps scaled by native / width; with timm's own eps of 1e-6 to 3e-3.

    Zeros beside the native channels divide the variance v of every token by r = width / native, so LayerNorm adds eps
    to v / r instead of v: its output shrinks by eps (r - 1) / 2v. The class token of these random ancestors starts at
    v = 1e-3, so that is 1e-3 at r = 3 in the first block; at v = 1, as in trained ancestors, 1e-6.
    """
    ancestor = build_pico(variant(name))
    native = ViTShape.of(ancestor)
    x = images(native)
    want = features(ancestor, x)
    learngene = planted(ancestor, settings={"form": "exact"})
    for heads in range(native.heads, 3 * native.heads + 1):
        grown = factory.expand(learngene, width=heads * native.head_dim)
        got = features(grown, x)[:, : native.width]
        torch.testing.assert_close(got, want, rtol=0, atol=3e-3, msg=f"{heads} heads, timm's eps")
        _same_eps(grown, native.width, heads * native.head_dim)
        got = features(grown, x)
        torch.testing.assert_close(got[:, : native.width], want, rtol=1e-4, atol=1e-4, msg=f"{heads} heads")
        assert bool((got[:, native.width :].abs() < 1e-6).all())  # the mean over channels is 0 but for rounding


def test_between_multiples_copies_are_not_exact() -> None:
    """So that the identities above are known to tell forms apart."""
    ancestor = build_pico(variant("token"))
    want = features(ancestor, images(variant("token")))
    for form in ("copy", "balanced"):
        got = features(factory.expand(planted(ancestor, settings={"form": form}), width=96), images(variant("token")))
        assert float((got[:, :64] - want).abs().max()) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", transforms.FORMS)
def test_nothing_is_changed_at_the_native_width_to_the_last_bit(name: str, form: str) -> None:
    ancestor = build_pico(variant(name))
    scores = {"stream": noise(ancestor.embed_dim)}
    grown = factory.expand(planted(ancestor, settings={"form": form}, width=scores)).state_dict()
    for key, tensor in ancestor.state_dict().items():
        assert key.startswith("head.") or torch.equal(grown[key], tensor), key


def test_a_learngene_in_float16_is_widened_in_float32() -> None:
    """1/3 of a float16 rounded to float16 would cost 5e-4 of every weight; the function at 3x is that of the rounded
    weights at 1x to float32's own precision."""
    ancestor = build_pico(variant("token")).half().float()
    learngene = planted(ancestor)
    for name in list(learngene.tensors):
        learngene.tensors[name] = learngene.tensors[name].half()  # type: ignore[index]
    want = features(ancestor, images(variant("token")))
    got = features(factory.expand(learngene, width=192), images(variant("token")))
    torch.testing.assert_close(got, torch.cat([want] * 3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [32, 96, 128])
@pytest.mark.parametrize("form", transforms.FORMS)
def test_the_gradient_through_a_resized_block_is_that_of_finite_differences(width: int, form: str) -> None:
    native, shape = variant("token"), variant("token", width=width, heads=width // 32)
    block = {name: tensor.double() for name, tensor in some_block(64, 256).items()}
    weights: dict[str, Tensor] = {}

    def value(name: str, tensor: Tensor) -> Tensor:
        grown = transforms.Resize.of({}, native, shape, form).block(block | {name: tensor}, 0)
        for i, (key, part) in enumerate(grown.items()):
            weights.setdefault(key, noise(*part.shape, seed=100 + i).double())
        return sum((weights[key] * part.square()).sum() for key, part in grown.items())  # type: ignore[return-value]

    for name, entry in (("attn.qkv.weight", (70, 3)), ("attn.proj.weight", (5, 2)), ("mlp.fc2.weight", (1, 9))):
        asked = block[name].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(name, asked), [asked])
        slope = _slope(lambda tensor, name=name: value(name, tensor), block[name], entry)
        assert float(gradient[entry]) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def _slope(function: Callable[[Tensor], Tensor], at: Tensor, entry: tuple[int, ...], step: float = 1e-4) -> float:
    values = []
    for sign in (1, -1):
        moved = at.clone()
        moved[entry] += sign * step
        values.append(float(function(moved)))
    return (values[0] - values[1]) / (2 * step)


# Image size and channels, against timm -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("side", [2, 4, 5, 7])
def test_positions_are_resampled_as_timm_does(prefix: int, side: int) -> None:
    positions = noise(1, prefix + 16, 6)
    want = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=prefix)
    assert torch.equal(transforms.resample_positions(positions, side, prefix), want)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_channels_are_adapted_as_timm_does(in_chans: int) -> None:
    kernel = noise(5, 3, 2, 2)
    torch.testing.assert_close(transforms.adapt_channels(kernel, in_chans), adapt_input_conv(in_chans, kernel))


# What a learngene may hold -------------------------------------------------------------------------------------------


def parts() -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in planted(build_pico(variant("token"))).tensors.items()}


def test_the_parts_of_a_learngene_pass() -> None:
    transforms.check_parts(parts(), variant("token"), searched=True)
    ancestor = build_pico(variant("token"))
    learned = {"stream": noise(64), "heads": noise(3, 2), "hidden": noise(3, 256), "rows": noise(40, 64)}
    whole = planted(ancestor, kept=[0, 2], width=learned | {"gain.96": noise(7, 96), "bias.96": noise(7, 96)})
    transforms.check_parts({n: tuple(t.shape) for n, t in whole.tensors.items()}, variant("token"), searched=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block.1.mlp.fc1.bias": None}, "missing.*block.1.mlp.fc1.bias"),
        ({"stem.pos_embed": None}, "missing.*stem.pos_embed"),
        ({"tail.norm.bias": None}, "missing.*tail.norm.bias"),
        ({"search.alpha": None}, "missing.*search.alpha"),
        ({"search.frequency": None}, "missing.*search.frequency"),
        ({"block.1.mlp.fc3.bias": (64,)}, "unknown.*block.1.mlp.fc3.bias"),
        ({"block.3.norm1.weight": (64,)}, "0 to 2"),
        ({"block.x.norm1.weight": (64,)}, "0 to 2"),
        ({"head.weight": (10, 64)}, "unknown.*head.weight"),
        ({"width.other": (64,)}, "unknown.*width.other"),
        ({"width.gain.x": (7, 96)}, "unknown.*width.gain.x"),
        ({"width.gain.96": (6, 96)}, r"width.gain.96 is \[6, 96\].*\[7, 96\]"),
        ({"width.stream": (63,)}, r"width.stream is \[63\]"),
        ({"width.rows": (64, 64)}, "width.rows"),
        ({"block.0.attn.qkv.weight": (64, 192)}, r"\[64, 192\].*\[192, 64\]"),
        ({"search.alpha": (2, 4, 2)}, "search.alpha"),
        ({"search.paths": (2,)}, "search.paths"),
        ({"search.paths": ()}, "search.paths"),
        ({"search.alpha": ()}, "search.alpha"),
        ({"width.rows": ()}, "width.rows"),
    ],
)
def test_other_parts_are_refused(change: dict[str, tuple[int, ...] | None], told: str) -> None:
    shapes = {name: shape for name, shape in (parts() | change).items() if shape is not None}
    with pytest.raises(ArtefactError, match=told):
        transforms.check_parts(shapes, variant("token"), searched=True)


def test_a_learngene_without_blocks_is_refused() -> None:
    shapes = {name: shape for name, shape in parts().items() if not name.startswith("block.")}
    with pytest.raises(ArtefactError, match="0 to 2"):
        transforms.check_parts(shapes, variant("token"), searched=True)


def test_a_shared_update_is_the_blocks_own_divided_by_its_copies() -> None:
    """What a block adds to the stream is linear in proj and fc2, so two copies of the half add the whole of one "
    "input."""
    block = some_block(8, 32)
    half = transforms.share_update(block, 2)
    for name, tensor in block.items():
        wrote = name.startswith(("attn.proj", "mlp.fc2"))
        assert torch.equal(half[name] * 2 if wrote else half[name], tensor)
    assert all(torch.equal(transforms.share_update(block, 1)[name], tensor) for name, tensor in block.items())

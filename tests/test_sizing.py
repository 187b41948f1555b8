"""Size by budget, against a brute-force search that builds and counts every network within reach."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import grown_from
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from learngene_hub import Descendant, _latency, factory
from learngene_hub._heads import HeadsShape
from learngene_hub._latency import Measured, measured
from learngene_hub._planning import Sizes
from learngene_hub._sizing import Budget, fitting, frontier
from learngene_hub.errors import BudgetError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Shape, ViTShape, shape_of

DEPTHS, WIDTHS = range(2, 7), range(32, 129, 32)  # the reach of pico
# 2x32 has 32,554 parameters, 6x128 some 1.2 million.
PARAMS = (33_000, 60_000, 110_000, 200_000, 420_000, 900_000, 2_000_000)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test."""
    monkeypatch.setenv("LEARNGENE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@cache
def pico(depth: int, width: int) -> nn.Module:
    """The network of this size that a pico learngene grows, with timm's own weights. Read only."""
    heads = width // 32
    return ViTShape(depth=depth, width=width, heads=heads, patch=8, image_size=32, classes=10).build().eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def log_odds(size: tuple[int, int]) -> float:
    """The measured rule, written out for an ancestor of 3 x 64."""
    depth, width = size
    down = 0.43 * math.log2(depth / 3) if depth < 3 else -0.70 * math.log2(depth / 3)
    return down + (1.33 * math.log2(width / 64) if width < 64 else 0.19 * math.log2(width / 64))


PREFERRED: dict[str, Callable[[tuple[int, int]], Any]] = {
    "balanced": log_odds,
    "depth": lambda size: size,
    "width": lambda size: (size[1], size[0]),
}


def naive(
    cost: Callable[[nn.Module], float], limit: float, prefer: str, depths: Any = DEPTHS, widths: Any = WIDTHS
) -> tuple[int, int]:
    """The same choice by looking at every network."""
    fit = [(d, w) for d in depths for w in widths if cost(pico(d, w)) <= limit]
    return max(fit, key=PREFERRED[prefer])


def size(shape: Shape) -> tuple[int, int]:
    return shape.depth, shape.width


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", PREFERRED)
def test_the_choice_is_that_of_a_search_over_every_network(pico_learngene: Learngene, prefer: Any) -> None:
    for limit in PARAMS:
        assert size(factory.plan(pico_learngene, max_params=limit, prefer=prefer)) == naive(count, limit, prefer)
    for limit in (2e6, 1e7, 3e7):
        assert size(factory.plan(pico_learngene, max_flops=limit, prefer=prefer)) == naive(flops, limit, prefer)


@pytest.mark.parametrize("prefer", PREFERRED)
def test_what_is_given_beside_a_budget_stays(pico_learngene: Learngene, prefer: Any) -> None:
    deep = factory.plan(pico_learngene, depth=5, max_params=420_000, prefer=prefer)
    assert size(deep) == naive(count, 420_000, prefer, depths=[5])
    wide = factory.plan(pico_learngene, width=96, max_params=420_000, prefer=prefer)
    assert size(wide) == naive(count, 420_000, prefer, widths=[96])


def test_limits_together_are_all_kept(pico_learngene: Learngene) -> None:
    both = factory.plan(pico_learngene, max_params=420_000, max_flops=4e6)
    fit = [(d, w) for d in DEPTHS for w in WIDTHS if count(pico(d, w)) <= 420_000 and flops(pico(d, w)) <= 4e6]
    assert size(both) == max(fit, key=log_odds)
    assert size(factory.plan(pico_learngene, max_params=420_000)) != size(both)


def test_a_function_may_prefer(pico_learngene: Learngene) -> None:
    found = factory.plan(pico_learngene, max_params=420_000, prefer=lambda shape: -abs(shape.width / shape.depth - 16))
    fit = [(d, w) for d in DEPTHS for w in WIDTHS if count(pico(d, w)) <= 420_000]
    assert size(found) == max(fit, key=lambda s: (-abs(s[1] / s[0] - 16), -count(pico(*s))))


def test_the_frontier_is_what_can_grow_neither_deeper_nor_wider(pico_learngene: Learngene) -> None:
    found = frontier(fitting(pico_learngene, Sizes(), Budget(max_params=420_000)))
    fit = {(d, w) for d in DEPTHS for w in WIDTHS if count(pico(d, w)) <= 420_000}
    edge = {(d, w) for d, w in fit if not any((e, v) != (d, w) and e >= d and v >= w for e, v in fit)}
    assert {size(each.shape) for each in found} == edge and len(edge) > 1
    assert all(each.asked == {"depth": each.shape.depth, "width": each.shape.width} for each in found)


def test_without_a_budget_nothing_is_chosen(pico_learngene: Learngene) -> None:
    assert factory.plan(pico_learngene) == pico_learngene.shape
    assert size(factory.plan(pico_learngene, depth=6, prefer="width")) == (6, 64)


# The grown model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_from_learngene_keeps_the_budget_of_the_saved_file(
    pico_learngene: Learngene, tmp_path: Path, dtype: str
) -> None:
    """The largest that fits into the file of another size is that size; into one byte less, not."""
    gene = pico_learngene.save_pretrained(tmp_path / "gene")
    asked: dict[str, Any] = {"width": 64, "dtype": dtype, "prefer": "depth"}
    Descendant.from_learngene(gene, depth=4, width=64, dtype=dtype).save_pretrained(tmp_path / "four")
    limit = (tmp_path / "four/model.safetensors").stat().st_size
    for most, depth in ((limit, 4), (limit - 1, 3)):
        model = Descendant.from_learngene(gene, max_bytes=most, **asked)
        assert shape_of(model.timm_model).depth == depth
        model.save_pretrained(tmp_path / f"grown{depth}")
        assert (tmp_path / f"grown{depth}/model.safetensors").stat().st_size <= most


def test_from_learngene_takes_a_float_and_counts_the_real_model(pico_learngene: Learngene, tmp_path: Path) -> None:
    gene = pico_learngene.save_pretrained(tmp_path / "gene")
    model = Descendant.from_learngene(gene, max_params=2e5, num_labels=3)
    within = [(d, w) for d in DEPTHS for w in WIDTHS if count(pico(d, w)) - 7 * (w + 1) <= 2e5]  # 3 classes, not 10
    assert size(shape_of(model.timm_model)) == max(within, key=log_odds)
    assert model.num_parameters() == count(model.timm_model) <= 2e5
    assert (
        pico_learngene.expand(max_params=2e5, num_labels=3).state_dict().keys() == model.timm_model.state_dict().keys()
    )


# Other kinds ----------------------------------------------------------------------------------------------------------


def test_a_cnn_is_chosen_within_reach() -> None:
    gene = grown_from("resnet")
    shapes = []
    for depth in range(gene.reach.depths[0], gene.reach.depths[1] + 1):
        try:
            shapes.append(factory.plan(gene, depth=depth))
        except ShapeError:
            continue
    for limit in {shape.params() for shape in shapes}:
        chosen = factory.plan(gene, max_params=limit, prefer="depth")
        assert chosen.depth == max(shape.depth for shape in shapes if count(shape.build()) <= limit)
    least = min(shape.params() for shape in shapes)
    with pytest.raises(BudgetError, match=f"the smallest in reach, .*, has {least:,} parameters"):
        factory.plan(gene, max_params=least - 1)


def test_blocks_with_their_own_heads_keep_them() -> None:
    gene = grown_from("heads")
    free = factory.plan(gene, max_params=10**9, prefer="depth")
    assert free.depth == gene.reach.depths[1] and free.width == gene.shape.width
    asked = factory.plan(gene, heads=[1, 2], max_params=10**9)
    assert isinstance(asked, HeadsShape) and asked.heads == (1, 2)
    with pytest.raises(BudgetError, match="the smallest in reach, 2x64 of 1,2 heads, has"):
        factory.plan(gene, heads=[1, 2], max_params=10)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_the_smallest(pico_learngene: Learngene) -> None:
    least = count(pico(2, 32))
    with pytest.raises(
        BudgetError,
        match=f"at most 1,000 parameters asked; the smallest in reach, 2x32, has {least:,} parameters: "
        f"max_params={least} would work",
    ):
        factory.plan(pico_learngene, max_params=1000)
    assert size(factory.plan(pico_learngene, max_params=least)) == (2, 32)
    with pytest.raises(BudgetError, match=f"the smallest in reach, 4x32, has {flops(pico(4, 32)):,} FLOPs"):
        factory.plan(pico_learngene, depth=4, max_flops=1000, max_params=10**9)


def test_an_explicit_size_beyond_the_budget_is_refused(pico_learngene: Learngene) -> None:
    asked: dict[str, Any] = {"depth": 4, "width": 64}
    with pytest.raises(BudgetError, match="4x64 asked: .* parameters; at most 1,000 are allowed"):
        factory.plan(pico_learngene, max_params=1000, **asked)
    for beyond in (1, count(pico(2, 64)) - 1):  # depth 1 would fit into the second, and is out of reach
        with pytest.raises(BudgetError, match=f"at width 64 even depth 2 has {count(pico(2, 64)):,}"):
            factory.plan(pico_learngene, max_params=beyond, **asked)
    with pytest.raises(BudgetError, match="depth 2 would fit"):
        factory.plan(pico_learngene, max_params=count(pico(2, 64)), **asked)
    with pytest.raises(BudgetError, match="4x64 asked: .* FLOPs; at most 1,000 FLOPs .*without depth or width"):
        factory.plan(pico_learngene, max_flops=1000, **asked)
    with pytest.raises(BudgetError, match="4x64 asked: .* bytes; at most 1,000 bytes"):
        factory.plan(pico_learngene, max_bytes=1000, **asked)
    assert size(factory.plan(pico_learngene, max_flops=1e9, **asked)) == (4, 64)


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, True, "5M", 0.5])
@pytest.mark.parametrize("name", ["max_params", "max_flops", "max_bytes"])
def test_a_limit_that_is_none_is_refused(pico_learngene: Learngene, name: str, limit: Any) -> None:
    with pytest.raises(ShapeError, match=f"{name} {limit!r} asked; it is a number"):
        factory.plan(pico_learngene, **{name: limit})


def test_out_of_reach_an_unknown_preference_and_a_missing_device(pico_learngene: Learngene) -> None:
    with pytest.raises(ShapeError, match="depth 9 asked; this learngene reaches"):
        factory.plan(pico_learngene, depth=9, max_params=1e6)
    with pytest.raises(SettingsError, match="prefer 'tall' asked; there are balanced, depth, width"):
        factory.plan(pico_learngene, max_params=1e6, prefer="tall")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="device xpu:7 asked; it is not on this machine: cpu"):
        factory.plan(pico_learngene, max_latency_ms=5, device="xpu:7")
    with pytest.raises(SettingsError, match="device 'toaster' asked"):
        factory.plan(pico_learngene, max_latency_ms=5, device="toaster")


def test_a_reach_of_any_numbers_ends(pico_learngene: Learngene) -> None:
    """A stranger's file may claim it."""
    gene = replace(pico_learngene, reach=replace(pico_learngene.reach, depths=(2, 10**12), widths=(32, 32 * 10**9, 32)))
    assert factory.plan(gene, max_params=1e6, prefer="depth").params() <= 1e6


# Latency --------------------------------------------------------------------------------------------------------------


class Clock:
    """Each forward takes ``step`` seconds; ``calls`` counts looks at it."""

    def __init__(self, step: float) -> None:
        self.step, self.calls = step, 0

    def __call__(self) -> float:
        self.calls += 1
        return self.step * self.calls


TINY = ViTShape(depth=2, width=32, heads=1, patch=8, image_size=32, classes=10)


def test_a_latency_is_measured_once(cache_folder: Path) -> None:
    clock = Clock(0.004)
    assert measured(TINY, clock=clock).ms == pytest.approx(4.0) and clock.calls == 2 * _latency.MOST
    slow = Clock(0.5)
    assert measured(TINY, clock=slow).ms == pytest.approx(4.0) and slow.calls == 0
    assert measured(TINY, clock=slow, again=True).ms == pytest.approx(500.0) and slow.calls == 2 * _latency.LEAST
    assert measured(TINY, clock=clock).ms == pytest.approx(500.0)
    kept = [json.loads(path.read_text()) for path in (cache_folder / "latency").iterdir()]
    assert [row["key"]["torch"] for row in kept] == [torch.__version__]
    assert kept[0]["key"]["device"] and kept[0]["key"]["shape"]["depth"] == 2


def test_another_shape_dtype_or_number_of_threads_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(TINY, clock=Clock(0.004))
    for shape, dtype in ((replace(TINY, image_size=64), None), (TINY, torch.bfloat16)):
        other = Clock(0.1)
        assert measured(shape, dtype=dtype, clock=other).ms == pytest.approx(100.0) and other.calls
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    other = Clock(0.1)
    assert measured(TINY, clock=other).ms == pytest.approx(100.0) and other.calls


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": {}, "ms": 1, "peak_bytes": 1}', "[" * 100_000])
def test_a_damaged_file_is_measured_again(cache_folder: Path, content: str) -> None:
    measured(TINY, clock=Clock(0.004))
    (path,) = (cache_folder / "latency").iterdir()
    path.write_text(content)
    assert measured(TINY, clock=Clock(0.1)).ms == pytest.approx(100.0)
    assert measured(TINY, clock=Clock(9.0)).ms == pytest.approx(100.0)


def test_a_cache_that_cannot_be_written_is_no_error(cache_folder: Path) -> None:
    cache_folder.write_text("a file where the folder should be")
    assert measured(TINY, clock=Clock(0.004)).ms == pytest.approx(4.0)


def test_peak_memory_counts_what_lives_at_once() -> None:
    """Two layers of 1 -> 1000 -> 1: the hidden numbers, and then their squares beside them."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.expand(1000).clone()  # 4,000 bytes
            return (hidden * hidden).sum()  # and 4,000 more

    with torch.inference_mode():
        assert 8000 <= _latency._activations_bytes(Two(), torch.ones(1)) < 8100
    shape_bytes = count(TINY.build()) * 4
    tokens = TINY.tokens * TINY.hidden * 4  # the widest activation, twice: before and after GELU
    assert shape_bytes + 2 * tokens <= measured(TINY, clock=Clock(0.001)).peak_bytes <= shape_bytes + 8 * tokens


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shape]]:
    """A device on which a block takes 1 ms for every 32 of width; the list of what was measured on it."""
    seen: list[Shape] = []

    def measure(shape: Shape, *_: Any) -> Measured:
        seen.append(shape)
        return Measured(ms=shape.depth * shape.width / 32, peak_bytes=1)

    monkeypatch.setattr(_latency, "measure", measure)
    yield seen


@pytest.mark.parametrize("prefer", PREFERRED)
def test_a_latency_is_kept(pico_learngene: Learngene, simulated: list[Shape], prefer: Any) -> None:
    for limit in (2, 3, 5.5, 8, 12, 24):
        chosen = factory.plan(pico_learngene, max_latency_ms=limit, prefer=prefer)
        fit = [(d, w) for d in DEPTHS for w in WIDTHS if d * w / 32 <= limit]
        assert size(chosen) == max(fit, key=PREFERRED[prefer])
        assert chosen in simulated  # what is taken was measured itself, and not only something larger
    assert len(simulated) == len(set(simulated)) <= len(DEPTHS) * len(WIDTHS)
    before = len(simulated)
    assert factory.plan(pico_learngene, max_latency_ms=24, prefer=prefer) and len(simulated) == before


def test_few_shapes_are_measured(pico_learngene: Learngene, simulated: list[Shape]) -> None:
    """Those at the edge: at each of 4 widths the depths that halving 5 asks for, and the one that is taken."""
    factory.plan(pico_learngene, max_latency_ms=8)
    assert len(simulated) <= 4 * 3 + 1


def test_nothing_is_fast_enough(pico_learngene: Learngene, simulated: list[Shape]) -> None:
    with pytest.raises(
        BudgetError, match="at most 1 ms asked; the smallest in reach, 2x32, has 2 ms: max_latency_ms=2"
    ):
        factory.plan(pico_learngene, max_latency_ms=1)
    with pytest.raises(BudgetError, match="4x64 asked: 8 ms; at most 3 ms"):
        factory.plan(pico_learngene, depth=4, width=64, max_latency_ms=3)

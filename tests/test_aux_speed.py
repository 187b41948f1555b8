"""The benchmark of auxiliary steps: whose they are, in which order they are measured, what is told of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from learngene_hub.shape import ViTShape

SHAPE = ViTShape(depth=5, width=32, heads=2, patch=8, image_size=16, classes=10)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "aux_speed.py"
    spec = importlib.util.spec_from_file_location("aux_speed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["lets", "ldr", "tleg", "sws"])
def test_each_auxiliary_is_a_vit_of_the_shape_and_owns_what_its_method_trains(script: ModuleType, name: str) -> None:
    """Of whole blocks: two of tleg, five of sws, four new ones of ldr, whose eight earlier ones are no parameters."""
    shape = SHAPE if name != "lets" else replace(SHAPE, depth=4)
    auxiliary: Any = script.auxiliary(name, shape)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = auxiliary.materialise()
    assert ViTShape.of(plain) == shape
    with torch.no_grad():
        torch.testing.assert_close(auxiliary.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
    named = dict(auxiliary.named_parameters())
    kinds = {"tleg": ("base", "slope"), "sws": ("stage",), "ldr": ("component",), "lets": ("block", "map", "depth")}
    counts = {"tleg": 2, "sws": 5, "ldr": 4}
    assert {key.split(".")[0] for key in named} == {"stem", "tail", "head", *kinds[name]}
    if name in counts:
        assert sum(key.endswith("attn.qkv.weight") for key in named) == counts[name]


def test_rounds_run_forwards_and_backwards_in_turn_and_the_first_ones_do_not_count(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that stands still but for one second at each reading: every update takes one."""
    order: list[str] = []
    real = script.updates

    def watched(name: str, *args: Any) -> Any:
        for step in real(name, *args):
            order.append(name)
            yield step

    ticks = iter(range(1000))
    monkeypatch.setattr(script, "updates", watched)
    seconds = script.measure(replace(SHAPE, depth=4), 4, 2, "cpu", lambda _: float(next(ticks)))
    names = ["plain", "lets", "ldr", "tleg", "sws"]
    assert order == [*reversed(names), *names] * 2
    assert seconds == {name: [1.0, 1.0] for name in names}


def test_what_is_told_are_medians_and_the_median_ratios_of_the_rounds(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread by the processor's seconds, with more by the wall's; the slowest of all counts."""
    alone = {"plain": [2.0, 1.0, 10.0], "lets": [2.2, 1.3, 10.5], "ldr": [2.0, 1.0, 9.0], "tleg": [4.0, 1.0, 10.0]}
    alone["sws"] = [1.0, 1.0, 10.0]
    both = {name: [1.0, 1.0, 1.0] for name in alone} | {"sws": [1.0, 1.2, 1.25]}
    asked: list[tuple[int, str]] = []

    def measure(*args: Any) -> dict[str, list[float]]:
        asked.append((torch.get_num_threads(), args[-1].__name__))
        return alone if len(asked) == 1 else both

    threads = torch.get_num_threads()
    monkeypatch.setattr(script, "RESULT", tmp_path / "results" / "aux.json")
    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["aux_speed.py"])
    try:
        torch.set_num_threads(2)
        script.main()
    finally:
        torch.set_num_threads(threads)
    assert asked == [(1, "processor"), (2, "wall")]
    told = json.loads((tmp_path / "results" / "aux.json").read_text())
    first, second = told["runs"]
    assert first["seconds"] == {"plain": 2.0, "lets": 2.2, "ldr": 2.0, "tleg": 4.0, "sws": 1.0}
    assert first["ratios"] == {"lets": 1.1, "ldr": 1.0, "tleg": 1.0, "sws": 1.0} and first["ratio"] == 1.1
    assert (second["threads"], second["clock"], second["ratio"], told["ratio"]) == (2, "wall", 1.2, 1.2)
    assert (told["shape"], told["image_size"], told["batch"], told["goal"]) == ("12x192", 64, 64, 1.1)

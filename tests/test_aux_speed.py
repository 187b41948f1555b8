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
    monkeypatch.setattr(script, "clock", lambda _: float(next(ticks)))
    seconds = script.measure(replace(SHAPE, depth=4), 4, 2, "cpu")
    names = ["plain", "lets", "ldr", "tleg", "sws"]
    assert order == [*reversed(names), *names] * 2
    assert seconds == {name: [1.0, 1.0] for name in names}


def test_what_is_told_are_medians_and_their_ratios_to_the_plain_step(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"plain": [2.0, 1.0, 9.0], "lets": [2.1, 2.2, 2.3], "ldr": [1.0, 1.0, 1.0], "tleg": [2.0], "sws": [2.0]}
    monkeypatch.setattr(script, "RESULT", tmp_path / "results" / "aux.json")
    monkeypatch.setattr(script, "measure", lambda *_: fixed)
    monkeypatch.setattr(sys, "argv", ["aux_speed.py"])
    script.main()
    told = json.loads((tmp_path / "results" / "aux.json").read_text())
    assert told["seconds"] == {"plain": 2.0, "lets": 2.2, "ldr": 1.0, "tleg": 2.0, "sws": 2.0}
    assert told["ratios"] == {"lets": 1.1, "ldr": 0.5, "tleg": 1.0, "sws": 1.0} and told["ratio"] == 1.1
    assert (told["shape"], told["image_size"], told["batch"], told["goal"]) == ("12x192", 64, 64, 1.1)

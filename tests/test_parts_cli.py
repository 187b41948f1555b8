"""The five methods of inherited parts at the command line and by ``Descendant.from_learngene``: extract, show, expand,
load; what each can grow, in words and numbers; and who is named for what it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from kinds import RESNET, noise
from planted import variant
from taught import randomised
from timm.models._hub import save_for_hf
from torch import nn
from typer.testing import CliRunner, Result

from learngene_hub import cli, factory
from learngene_hub._conv import ConvShape
from learngene_hub.descendant import Descendant
from learngene_hub.errors import ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape, shape_of

VGG = ConvShape(family="vgg", stages=((4,), (6, 6), (8, 8)), head_hidden=8, head_kernel=2, image_size=32, classes=10)
QUICK = ["batch_size=8", "crop_padding=2", "epochs=1"]
POOL = [*QUICK, "first_epochs=1", "widths=[32,64]", "init_images=8"]
# Method and ancestor -> settings, what it reaches in words, and a size that it grows.
CASES: dict[tuple[str, str], tuple[list[str], str, list[str]]] = {
    ("heuristic", "vit"): (["last_k=2"], "depth 2-8, width 32-256 step 32", ["--depth", "5"]),
    ("heuristic", "vgg"): (["last_k=2", "front=[3,5]"], "depth 3-10, width 8", ["--depth", "7"]),
    ("heuristic", "resnet"): (["last_k=2", "front=[3,5,7]"], "depth 5-10, width 10", ["--depth", "6"]),
    ("auto", "vit"): ([*QUICK, "lr=0.01", "keep=1"], "depth 2-8, width 32-256 step 32", ["--depth", "5"]),
    ("auto", "vgg"): ([*QUICK, "lr=0.01"], "depth 3-5, width 8", ["--depth", "5"]),
    ("cluster", "vit"): (
        ["psi_epochs=1", "ffn_groups=[[1,2]]", "batch_size=8"],
        "depth 1-4, width 64, heads 1-16",
        ["--heads", "3,1,2", "--depth", "3"],
    ),
    ("learngene-pool", "vit"): (
        [*POOL, "depth=3"],
        "depth 3-5, width 32-64 step 32, 9 fixed sizes among them",
        ["--depth", "4", "--width", "64"],
    ),
    ("sn-net", "vit"): (
        [*POOL, "depths=[2,4]"],
        "depth 2-4, width 32-64 step 32, 3 fixed sizes among them",
        ["--max-params", "120000"],
    ),
}


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def ancestor(kind: str) -> nn.Module:
    if kind == "vit":
        return build_pico(variant("token", depth=4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return {"vgg": VGG, "resnet": RESNET}[kind].build().eval()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEARNGENE_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_extract_show_expand_and_load(method: str, kind: str, here: Path) -> None:
    """The numbers that the commands tell, and the descendant's, are those of the library."""
    settings, words, sizes = CASES[method, kind]
    save_for_hf(ancestor(kind), "ancestor", safe_serialization=True)
    data = ["--data", "signdigits", "--image-size", "32", "--limit", "16"]
    done = run("extract", method, "ancestor", *data, *(f"--set={pair}" for pair in settings), "--out", "gene", "--json")
    assert done.exit_code == 0, done.stderr
    learngene, told = Learngene.from_pretrained("gene"), json.loads(done.stdout)
    assert learngene.method == told["method"] == method and told["params"] == learngene.params
    assert told["reach"] == str(learngene.reach) and told["reach"].startswith(words)
    shown = run("show", "gene", *sizes, "--json")
    assert shown.exit_code == 0, shown.stderr
    asked = {sizes[i].lstrip("-").replace("-", "_"): sizes[i + 1] for i in range(0, len(sizes), 2)}
    wanted: dict[str, Any] = {
        name: int(value) if value.isdecimal() else tuple(map(int, value.split(","))) for name, value in asked.items()
    }
    want = factory.expand(learngene, num_labels=3, seed=4, **wanted)
    grown = run("expand", "gene", "grown", *sizes, "--num-labels", "3", "--seed", "4", "--json")
    assert grown.exit_code == 0, grown.stderr
    assert json.loads(grown.stdout)["params"] == sum(parameter.numel() for parameter in want.parameters())
    side = 32 if kind != "vit" else learngene.shape.image_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    own = Descendant.from_learngene("gene", num_labels=3, seed=4, **wanted)
    with torch.no_grad():
        for model in (
            own.timm_model,
            Descendant.from_pretrained("grown").timm_model,
            timm.create_model("local-dir:grown", pretrained=True).eval(),
        ):
            assert shape_of(model) == shape_of(want) and torch.equal(model(x), want(x))


OTHERS = [
    ("auto", "vit", {"depth": 1}, "net2net"),
    ("heuristic", "vit", {"depth": 1}, "net2net"),
    ("auto", "vit", {"heads": 4}, "cluster"),
    ("heuristic", "vit", {"heads": 4}, "cluster"),
    ("auto", "vgg", {"depth": 9}, "heuristic"),
    ("cluster", "vit", {"depth": 5}, "lsamd or net2net"),
    ("cluster", "vit", {"width": 96}, "lsamd or net2net"),
]


@pytest.mark.parametrize(("method", "kind", "asked", "others"), OTHERS)
def test_what_one_cannot_grow_names_who_could_and_they_can(
    method: str, kind: str, asked: dict[str, Any], others: str
) -> None:
    """Of the same ancestor, and without any training."""
    made = ancestor(kind)
    first = {
        "auto": {"layers": [0, 1]},
        "heuristic": {"last_k": 2},
        "cluster": {"psi_epochs": 0, "ffn_groups": "none"},
        "net2net": {},
    }
    data = {"one": noise()} if "cluster" in (method, others) else {}
    with pytest.raises(ShapeError, match=f"a learngene of {others} can grow") as told:
        factory.plan(factory.extract(method, made, data, settings=first[method]), **asked)
    assert "\n" not in str(told.value)
    other = others if others in first else "net2net"
    shape: Any = factory.plan(factory.extract(other, made, data, settings=first[other]), **asked)
    for size, value in asked.items():
        assert getattr(shape, size) in (value, (value,) * shape.depth)


def test_more_than_twice_the_ancestors_depth_is_for_those_with_a_deeper_auxiliary() -> None:
    learngene = factory.extract("heuristic", made := ancestor("vit"), {}, settings={"last_k": 2})
    with pytest.raises(ShapeError, match="a learngene of tleg or ldr extracted with depth=5 can grow 9x64"):
        factory.plan(learngene, depth=9)
    deeper = replace(ViTShape.of(made), depth=5)
    grown: Any = factory.plan(randomised("tleg", deeper, ["base", "slope"]), depth=9, width=64)
    assert (grown.depth, grown.width) == (9, 64)


def test_cnns_of_other_sizes_name_who_could() -> None:
    auto = factory.extract("auto", ancestor("vgg"), {}, settings={"layers": [0, 1]})
    with pytest.raises(ShapeError, match=r"width 8 would work, and .* heuristic can .* \(--set front=\[32,64,128\]\)"):
        factory.plan(auto, width=64)
    heuristic = factory.extract("heuristic", ancestor("vgg"), {}, settings={"last_k": 2})
    other: Any = factory.plan(heuristic, settings={"front": [32, 64, 128]}, depth=6)
    assert other.stages[:3] == ((32,), (64,), (128,))
    with pytest.raises(
        ShapeError, match="a learngene of heuristic of an ancestor of 25 or more layers can grow depth 50"
    ):
        factory.plan(heuristic, depth=50)


def test_where_none_could_none_is_named() -> None:
    learngene = factory.extract("heuristic", ancestor("vit"), {}, settings={"last_k": 2})
    wrong: list[dict[str, Any]] = [{"width": 288}, {"depth": 9, "width": 288}, {"depth": 0}]
    for asked in wrong:
        with pytest.raises(ShapeError) as told:
            factory.plan(learngene, **asked)
        assert "a learngene of" not in str(told.value)

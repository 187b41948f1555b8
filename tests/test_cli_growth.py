"""The command line: growth settings of one call, heads of each block, and networks that are no plain ViT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kinds import grown_from
from test_cli import Call
from test_cli import run as run  # the fixture

from learngene_hub import factory
from learngene_hub.descendant import Descendant
from learngene_hub.shape import shape_of


@pytest.fixture
def heads(tmp_path: Path) -> str:
    """A file of a cluster learngene: 3 blocks of width 64 in 2 heads."""
    return str(grown_from("heads").save_pretrained(tmp_path / "heads"))


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    """A file of a heuristic learngene of a ResNet."""
    return str(grown_from("resnet").save_pretrained(tmp_path / "resnet"))


def test_expand_with_heads_and_a_setting(run: Call, heads: str, tmp_path: Path) -> None:
    got = run(
        "expand", heads, tmp_path / "out", "--heads", "1,2,4", "--set", "select=even", "--num-labels", "3", "--json"
    )
    told = json.loads(got.out)
    assert (told["kind"], told["heads"], told["depth"], told["width"]) == ("heads", [1, 2, 4], 3, 64)
    model = Descendant.from_pretrained(tmp_path / "out")
    want = factory.expand(grown_from("heads"), heads=(1, 2, 4), num_labels=3, settings={"select": "even"})
    assert told["params"] == sum(parameter.numel() for parameter in want.parameters())
    state = model.timm_model.state_dict()
    assert all(torch.equal(entry, state[name]) for name, entry in want.state_dict().items())
    assert model.config.learngene and model.config.learngene["settings"] == {"select": "even"}


def test_show_tells_a_plain_size_as_ever_and_another_kind_by_its_name(run: Call, heads: str, resnet: str) -> None:
    plain = json.loads(run("show", heads, "--json").out)
    assert plain["reach"] == "depth 1-3, width 64, heads 1-16"
    assert "kind" not in plain["descendant"] and plain["descendant"]["heads"] == 2
    one = json.loads(run("show", heads, "--heads", "4", "--json").out)["descendant"]
    assert one["heads"] == [4, 4, 4] and one["shape"] == "3x64 of 4 heads"
    cnn = json.loads(run("show", resnet, "--set", "front=[2,2,2]", "--json").out)
    shape = factory.plan(grown_from("resnet"), settings={"front": [2, 2, 2]})
    assert cnn["descendant"]["params"] == shape.params() and cnn["descendant"]["kind"] == "conv"
    assert cnn["native"] == str(grown_from("resnet").shape) and "heads" not in cnn["descendant"]


def test_a_resnet_is_finetuned_and_evaluated(run: Call, resnet: str, tmp_path: Path) -> None:
    asked = ["--set", "front=[2,2,2]", "--image-size", "32", "--epochs", "1", "--limit", "20"]
    got = run("finetune", resnet, "--data", "signdigits", "--out", tmp_path / "out", *asked, "--json")
    shape = shape_of(Descendant.from_pretrained(tmp_path / "out").timm_model)
    assert shape == factory.plan(grown_from("resnet"), settings={"front": [2, 2, 2]}, num_labels=10, image_size=32)
    assert json.loads(got.out)["params"] == shape.params()
    found = run("evaluate", tmp_path / "out", "--data", "signdigits", "--limit", "20", "--json")
    assert json.loads(found.out)["images"] == 20
    again = run("finetune", tmp_path / "out", "--data", "signdigits", "--out", tmp_path / "more", "--set", "front=[2]")
    assert "--set front asked" in again.refused() and "grown already" in again.refused()
    assert (
        "--heads 3 asked"
        in run(
            "finetune", tmp_path / "out", "--data", "signdigits", "--out", tmp_path / "more", "--heads", "3"
        ).refused()
    )


@pytest.mark.parametrize("written", ["", "a", "2,", "2,,3", "-1", "1.5", "1" * 12])
def test_heads_that_are_no_numbers_are_wrong_usage(run: Call, heads: str, written: str) -> None:
    got = run("show", heads, f"--heads={written}")
    assert got.code == 2 and "is no number of heads; 6, or 3,3,6 of three blocks, would work" in " ".join(
        got.err.split()
    )


def test_settings_that_do_not_fit_are_one_line(run: Call, heads: str, tmp_path: Path) -> None:
    assert "slect" in run("show", heads, "--set", "slect=even").refused()
    assert "KEY=VALUE" in run("expand", heads, tmp_path / "out", "--set", "even").refused()
    assert "heads" in run("expand", heads, tmp_path / "out", "--heads", "17").refused()
    assert not (tmp_path / "out").exists()


def test_show_takes_a_budget(run: Call) -> None:
    shown = run("show", "lsamd-base", "--depth", "4", "--max-params", "1000")
    assert shown.code == 1 and "at most 1,000 parameters asked; the smallest in reach, 4x64, has" in shown.err
    shown = run("show", "lsamd-base", "--depth", "4", "--width", "192", "--max-params", "1000")
    assert shown.code == 1 and "at most 1,000 are allowed" in shown.err

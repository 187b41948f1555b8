"""The benchmark of the methods that inherit parts: the controls that it makes itself, its jobs, what its rows say."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _parts_arms  # noqa: E402
import _parts_summary  # noqa: E402
import _runs  # noqa: E402
import parts  # noqa: E402
from parts import Job, Row  # noqa: E402

from learngene_hub.data import Images  # noqa: E402
from learngene_hub.errors import SettingsError  # noqa: E402
from learngene_hub.factory import expand, extract, with_settings  # noqa: E402

CONFIG = yaml.safe_load((Path(__file__).parents[1] / "benchmarks" / "parts.yaml").read_text())


def noise(count: int, classes: int = 4) -> Images:
    """``count`` images of 32 px whose first byte tells their number; label: that number modulo the classes."""
    pixels = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count)
    return Images(pixels, torch.arange(count) % classes, tuple("abcdefgh"[:classes]), "noise")


def row(arm: str, seed: int, last: float, **more: Any) -> Row:
    values: dict[str, Any] = {
        "shape": "6x192", "set": "signdigits", "epoch_1": 10.0, "epoch_2": 20.0, "params": 100, "flops": 7,
        "stored_bytes": 2_000_000, "extraction_images": 30, "extraction_flops": 4 * 10**12, "extraction_seconds": 2.5,
        "seconds": 1.0, "kept": "0 1", "start": f"{arm}-{seed}", "digest": f"{arm}-digest-{seed}", "machine": "m",
    }  # fmt: skip
    return Row(arm=arm, seed=seed, epoch_4=last, **values | more)


def test_blocks_by_rule() -> None:
    assert _parts_arms.chosen_blocks("first", 3, 12, 1) == [0, 1, 2]
    assert _parts_arms.chosen_blocks("last", 3, 12, 1) == [9, 10, 11]
    assert _parts_arms.chosen_blocks("even", 3, 12, 1) == [0, 6, 11]  # 5.5 rounds up
    drawn = [_parts_arms.chosen_blocks("random", 6, 12, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 6 and drawn[0] != drawn[2]
    for seed in range(5):
        drawn = _parts_arms.chosen_blocks("random-from-0", 3, 4, seed)
        assert drawn[0] == 0 and drawn == sorted(set(drawn)) and len(drawn) == 3 and drawn[-1] <= 3
    with pytest.raises(SettingsError, match="blocks 'best' asked; there are first, last, even, random"):
        _parts_arms.chosen_blocks("best", 3, 12, 1)


def test_an_ancestor_of_other_blocks_computes_them_in_that_order(pico_ancestor: VisionTransformer) -> None:
    """Against the ancestor's own blocks, called one after the other."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = _parts_arms.with_blocks(pico_ancestor, [2, 0, 2, 1]).forward_features(x)  # type: ignore[operator]
        tokens = pico_ancestor._pos_embed(pico_ancestor.patch_embed(x))
        for block in (2, 0, 2, 1):
            tokens = pico_ancestor.blocks[block](tokens)
        torch.testing.assert_close(told, pico_ancestor.norm(tokens))


@pytest.mark.parametrize(
    ("method", "depth", "places"),
    [("auto", 3, {0: 0, 1: 2}), ("heuristic", 3, {1: 0, 2: 2}), ("net2net", 2, {0: 0, 1: 2})],
)
def test_the_asked_blocks_stand_where_the_method_has_its_own(
    pico_ancestor: VisionTransformer, method: str, depth: int, places: dict[int, int]
) -> None:
    """The blocks 0 and 2 (evenly spaced): at the bottom, at the end, or alone."""
    settings = {"heuristic": {"last_k": 2, "stem": "inherit"}}.get(method, {})
    arm = {"method": method, "blocks": "even", "count": 2, "settings": settings}
    ancestor, settings, blocks = _parts_arms.prepared(arm, pico_ancestor, 1)
    model = expand(extract(method, ancestor, {}, settings=settings), depth=depth, seed=5)
    assert blocks == [0, 2]
    theirs, ours = pico_ancestor.state_dict(), model.state_dict()
    for place in range(depth):
        found = [
            block
            for block in range(3)
            if torch.equal(ours[f"blocks.{place}.attn.qkv.weight"], theirs[f"blocks.{block}.attn.qkv.weight"])
        ]
        assert found == ([places[place]] if place in places else [])
    assert torch.equal(ours["pos_embed"], theirs["pos_embed"])
    assert torch.equal(ours["norm.weight"], theirs["norm.weight"]) == (method != "auto")


def test_random_heads_of_every_head_compute_the_ancestor(pico_ancestor: VisionTransformer) -> None:
    """Where no head is dropped, heads in another order are the same function."""
    whole = extract("cluster", pico_ancestor, {"noise": noise(8)}, settings={"eps": 0.0, "psi_epochs": 0})
    assert [len(heads) for heads in whole.provenance["centroids"]] == [2, 2, 2]
    drawn = [_parts_arms.with_random_heads(whole, pico_ancestor, seed) for seed in range(8)]
    assert len({str(learngene.provenance["centroids"]) for learngene in drawn}) > 1
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = pico_ancestor.forward_features(x)
        for learngene in drawn[:3]:
            torch.testing.assert_close(expand(learngene).forward_features(x), want)  # type: ignore[operator]


def test_random_heads_are_as_many_and_rows_of_the_ancestor(pico_ancestor: VisionTransformer) -> None:
    one = extract("cluster", pico_ancestor, {"noise": noise(8)}, settings={"eps": 10.0, "psi_epochs": 0})
    assert [len(heads) for heads in one.provenance["centroids"]] == [1, 1, 1]
    seen: list[set[int]] = [set(), set(), set()]
    drawn = one
    for seed in range(8):
        drawn = _parts_arms.with_random_heads(one, pico_ancestor, seed)
        assert {name: tensor.shape for name, tensor in drawn.tensors.items()} == {
            name: tensor.shape for name, tensor in one.tensors.items()
        }
        for layer, (head,) in enumerate(drawn.provenance["centroids"]):
            seen[layer].add(head)
            qkv = pico_ancestor.state_dict()[f"blocks.{layer}.attn.qkv.weight"]
            rows = torch.cat([qkv[part + 32 * head : part + 32 * (head + 1)] for part in (0, 64, 128)])
            assert torch.equal(drawn.tensors[f"block.{layer}.attn.qkv.weight"], rows)
            assert parts.kept_of(drawn) == "heads 1 1 1"
    assert seen == [{0, 1}] * 3
    assert all(torch.equal(drawn.tensors[name], one.tensors[name]) for name in one.tensors if "attn" not in name)


def test_what_is_stored_counts_no_stem_that_stays_fresh(pico_ancestor: VisionTransformer) -> None:
    """A pico block has 49,984 parameters; its stem a kernel of 3 x 8 x 8 x 64 with bias, 17 positions and a token."""
    learngene = extract("heuristic", pico_ancestor, {}, settings={"last_k": 1, "stem": "inherit"})
    block = 2 * 128 + (192 * 64 + 192) + (64 * 64 + 64) + (256 * 64 + 256) + (64 * 256 + 64)
    stem = (192 * 64 + 64) + 17 * 64 + 64
    assert parts.stored_bytes(learngene) == 2 * (block + 128 + stem)
    assert parts.stored_bytes(with_settings(learngene, {"stem": "fresh"})) == 2 * (block + 128)
    assert parts.kept_of(learngene) == "2" and parts.kept_of(None) == ""
    assert parts.kept_of(extract("net2net", pico_ancestor, {})) == "all"


def test_a_few_classes_are_balanced_and_relabelled() -> None:
    images = noise(40, classes=8)
    few = _parts_arms.few_classes(images, 3, 2)
    assert len(few) == 6 and few.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(set(few.classes)) == 3
    numbers = [int(number) for number in few.pixels[:, 0, 0, 0]]
    assert [few.classes[label] for label in few.labels.tolist()] == [images.classes[number % 8] for number in numbers]
    assert len(set(numbers)) == 6 and torch.equal(few.pixels, _parts_arms.few_classes(images, 3, 2).pixels)


def test_the_settings_name_arms_that_are_there() -> None:
    for title, table in CONFIG["tables"].items():
        assert set(table["own"]) <= set(table["arms"]) <= set(CONFIG["arms"]), title
        assert {"net2net", parts.SCRATCH} <= set(table["arms"])  # every method meets the whole ancestor, and nothing
        assert set(table["arms"]) <= set(_parts_summary.MEANINGS)
        assert set(table.get("sets", ())) <= set(CONFIG["sets"])
    for name, arm in CONFIG["arms"].items():
        assert name == parts.SCRATCH or ("method" in arm) != (arm.get("of") in CONFIG["arms"])
        assert "data" not in arm or (arm["data"] in CONFIG["terms"] and arm["data"] not in CONFIG["sets"])


def test_an_arm_of_two_tables_runs_once() -> None:
    config = {
        "sets": {"a": {}, "b": {}},
        "tables": {
            "one": {"shape": "6x192", "arms": ["x", "y"]},
            "two": {"shape": "6x192", "arms": ["y", "z"], "sets": ["b"]},
            "three": {"shape": "3x192", "arms": ["z"]},
        },
    }
    found = [(job.arm, job.shape, job.set) for job in parts.jobs(config, ["one", "two"], 1)]
    wanted = [("x", "a"), ("y", "a"), ("x", "b"), ("y", "b"), ("z", "b")]
    assert found == [(arm, "6x192", name) for arm, name in wanted]


def test_a_run_of_the_same_start_is_taken_over_but_never_scratch() -> None:
    job = Job(arm="auto", shape="6x192", set="signdigits", seed=1)
    first, scratch = row("six-first", 1, 50.0, start="same"), row("scratch", 1, 10.0, start="same")
    assert parts.twin_of([scratch, first], job, "same") == first
    assert parts.twin_of([scratch], job, "same") is None and parts.twin_of([first], job, "other") is None
    assert parts.twin_of([first], replace(job, seed=2), "same") is None
    assert parts.twin_of([first], replace(job, arm="scratch"), "same") is None


def test_weights_digest_tells_weights_and_names() -> None:
    one, two, three = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    assert parts.weights_digest(one) == parts.weights_digest(two) != parts.weights_digest(three)
    assert parts.weights_digest(nn.Sequential(one)) != parts.weights_digest(one)


CONFIG_BY_HAND: dict[str, Any] = {
    "sets": {"signdigits": {"train": 1000, "test": 0}, "cifar100": {"train": 2000, "test": 1000}},
    "tuning": {"lr": 3e-4, "scratch_lr": 1e-3, "batch_size": 64},
    "tables": {
        "auto at 6x192": {
            "method": "auto", "shape": "6x192", "own": ["auto"], "arms": ["auto", "six-random", "net2net", "scratch"],
        },
        "auto at 12x192": {
            "method": "auto", "shape": "12x192", "sets": ["signdigits"], "own": ["auto"], "arms": ["auto", "net2net"],
        },
    },
}  # fmt: skip
ROWS = [
    row("auto", 1, 0.0),  # stale: the same cell again below
    row("auto", 1, 50.0),
    row("auto", 2, 60.0),
    row("six-random", 1, 40.0),
    row("six-random", 2, 64.0),
    row("auto", 1, 30.0, set="cifar100"),
    row("six-random", 1, 27.0, set="cifar100"),
    row("auto", 1, 70.0, shape="12x192"),
    row("scratch", 1, 12.0, stored_bytes=0, kept=""),
]


def test_the_summary_by_hand() -> None:
    """auto - six-random: 10, -4 and 3, mean 3, variance 49, so the standard error is 7 / sqrt(3)."""
    found = _parts_summary.summary(ROWS, CONFIG_BY_HAND)
    table = found["tables"]["auto at 6x192"]
    assert list(table["accuracy"]) == ["auto", "six-random", "scratch"]  # net2net has no row
    assert table["accuracy"]["auto"]["signdigits"]["4"] == {"mean": 55.0, "sd": 7.07, "n": 2}
    assert table["accuracy"]["auto"]["cifar100"]["4"] == {"mean": 30.0, "sd": None, "n": 1}
    assert table["accuracy"]["scratch"]["cifar100"]["4"] is None
    gaps = table["differences"]["auto"]["six-random"]
    assert gaps["overall"]["4"] == {"mean": 3.0, "se": 4.04, "n": 3, "won": 2}
    assert gaps["signdigits"]["4"] == {"mean": 3.0, "se": 7.0, "n": 2, "won": 1}
    assert gaps["overall"]["1"] == {"mean": 0.0, "se": 0.0, "n": 3, "won": 0}
    assert table["costs"]["auto"] == {
        "params": 100, "stored_megabytes": 2.0, "extraction_images": 30, "extraction_teraflops": 12.0,
        "extraction_seconds": 2.5,
    }  # fmt: skip
    assert found["digests"] == {"auto": "auto-digest-1", "six-random": "six-random-digest-1"}
    assert found["kept"] == {"auto": {"1": "0 1", "2": "0 1"}, "six-random": {"1": "0 1", "2": "0 1"}}
    assert found["tables"]["auto at 12x192"]["accuracy"] == {
        "auto": {"signdigits": {"1": {"mean": 10.0, "sd": None, "n": 1}, "2": {"mean": 20.0, "sd": None, "n": 1},
                                "4": {"mean": 70.0, "sd": None, "n": 1}}},
    }  # fmt: skip


def test_summarise_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "parts.yaml", tmp_path / "parts.csv"
    config.write_text(yaml.safe_dump(CONFIG_BY_HAND, sort_keys=False))
    for each in ROWS:
        _runs.append_row(out, each)
    assert _runs.read_rows(out, Row) == ROWS
    assert parts.main(["--summarise", "--config", str(config), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert (
        "| **auto** | 10.0 ± 0.0 | 20.0 ± 0.0 | 55.0 ± 7.1 | 10.0 | 20.0 | 30.0 | 2.0 | 100 | 30 | 12.0 | 2.5 |" in text
    )
    assert "auto - six-random: after 1: +0.0 ± 0.0 (0 of 3 won); after 4: +3.0 ± 4.0 (2 of 3 won)" in text
    assert json.loads(out.with_suffix(".json").read_text())["seeds"] == [1, 2]
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_unknown_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no table autos; there are auto at 6x192"):
        parts.main(["--data", str(tmp_path), "--ancestor", "none", "--tables", "autos"])
    with pytest.raises(SystemExit, match="--data and --ancestor are missing"):
        parts.main([])


def test_a_row_without_its_learngene_is_stale(tmp_path: Path) -> None:
    """And one whose arm is gone from the settings is no reason to stop."""
    config = tmp_path / "parts.yaml"
    config.write_text(yaml.safe_dump({"arms": {"auto": {"method": "auto"}}}))
    ancestor = tmp_path / "ancestor"
    ancestor.write_bytes(b"abc")
    sources = parts.Sources(data=tmp_path, ancestor=ancestor, work=tmp_path, config=config, out=tmp_path / "out.csv")
    assert parts.digest_of(row("auto", 1, 1.0).job, sources) == parts.digest_of(row("gone", 1, 1.0).job, sources) == ""
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert parts.digest_of(row("scratch", 1, 1.0).job, sources) == of_abc
    assert asdict(row("auto", 1, 1.0).job) == {"arm": "auto", "shape": "6x192", "set": "signdigits", "seed": 1}

"""Model cards and the README's results: every number against the shapes and results that it comes from."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from huggingface_hub import ModelCard
from planted import planted, variant

from learngene_hub import card
from learngene_hub.learngene import Learngene
from learngene_hub.registry import Entry
from learngene_hub.shape import Reach, ViTShape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import write_numbers  # noqa: E402

FACTS: dict[str, Any] = {
    "image_size": 32,
    "steps": 40,
    "images_seen": 12345,
    "seconds": 6.5,
    "machine": "a laptop",
    "drift": 0.031,
    "command": "learngene extract lsamd pico",
    "base_rate": [1.0, 0.5, 0.25],
    "paths": {"signs": "BBS", "leaves": "BSS"},
    "data": {"signs": {"images": 1651, "batch": 8}, "leaves": {"images": 200, "batch": 4}},
    "terms": {"signs": "Apache-2.0"},
}
RESULTS: dict[str, Any] = {
    "number": "test accuracy after epoch 3, per cent",
    "digests": {"rows": "a" * 64, "lsamd-base": "b" * 64},
    "overall": {arm: {} for arm in ("rows", "random", "lsamd-base")},
    "minus_rows": {
        "random": {"overall": {"mean": -40.0, "se": 1.0, "n": 3}, "per_shape_and_set": {"6x256 dtd": {"mean": -40.0}}},
        "lsamd-base": {
            "overall": {"mean": 1.234, "se": 0.567, "n": 9},
            "per_shape_and_set": {
                "6x256 dtd": {"mean": 3.25},
                "6x256 signs": {"mean": 1.0},
                "12x384 dtd": {"mean": -0.46},
                "12x384 signs": None,
            },
        },
        "base-even": {"overall": None, "per_shape_and_set": {}},
    },
    "cells": [
        {
            "shape": "6x256",
            "set": "dtd",
            "arms": {"rows": {"mean": 50.04, "sd": 1.25}, "lsamd-base": {"mean": 53.29, "sd": 0.04}},
        },
        {
            "shape": "6x256",
            "set": "signs",
            "arms": {"rows": {"mean": 90.0, "sd": None}, "random": {"mean": 21.7, "sd": 2.0}},
        },
        {"shape": "12x384", "set": "dtd", "arms": {"rows": {"mean": 60.0, "sd": 0.0}}},
    ],
}


def gene(**more: Any) -> Learngene:
    wide = Reach(depths=(1, 12), widths=(32, 768, 32))
    return replace(planted(build_pico(variant("token")), kept=[0, 2], reach=wide, **more), provenance=FACTS)


def entry(learngene: Learngene, uri: str = "cards/pico-base") -> Entry:
    return Entry(
        name="pico-base",
        method="lsamd",
        uri=uri,
        sha256=learngene.digest,
        bytes=learngene.nbytes + 1000,
        license="Apache-2.0",
        card="README.md",
        description="A learngene for tests.",
    )


def written(learngene: Learngene | None = None, results: dict[str, Any] | None = None) -> str:
    learngene = learngene or gene()
    return card.card_text(learngene, entry(learngene), results)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table: rows of cells, the ruled line left out; all rows are of one length."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not inside:
                found.append([])
            if set(line) != {"|", "-"}:
                found[-1].append(cells)
        inside = line.startswith("|")
    assert all(len({len(row) for row in rows}) == 1 for rows in found)
    return found


def test_the_head_is_the_hubs() -> None:
    data = ModelCard(written()).data  # parses the YAML, refuses what is malformed
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "learngene-hub",
        "image-classification",
    )
    assert data.tags == ["learngene", "lsamd"]
    assert set(data.to_dict()) == {"license", "library_name", "pipeline_tag", "tags"}


def test_the_text_is_whole() -> None:
    text = written(results=RESULTS)
    assert text.startswith("---\n") and text.endswith(".\n") and "\n\n\n" not in text
    assert text.count("# pico-base\n\nA learngene for tests.") == 1
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("Use", "Reach", "How it was made", "What the search found", "Width", "Measured", "Limits", "Licence"),
    ]
    for odd in ("None", "nan", "{", "?"):
        assert odd not in text, odd


def test_what_it_costs_is_what_the_shapes_cost() -> None:
    learngene = gene()
    part = section(written(learngene), "Reach")
    assert part.startswith("Depth 1-12, width 32-768 step 32, heads of 32, any image size divisible by 8,")
    assert f"One file, {learngene.nbytes / 1e6:.1f} MB of tensors" in part and "At 10 labels and 32 px" in part
    head, *rows = tables(part)[0]
    assert head == ["shape", "parameters", "FLOPs of one image"] and len(rows) == 7
    for name, params, flops in rows:
        depth, width = map(int, name.split("x"))
        stem = 3 * 8 * 8 * width + width + 17 * width + width  # patches, their bias, positions, class token
        by_hand = depth * (12 * width**2 + 13 * width) + stem + 2 * width + 10 * width + 10
        shape = ViTShape(depth=depth, width=width, heads=width // 32, patch=8, image_size=32, classes=10)
        assert shape.params() == by_hand
        assert params == f"{by_hand / 1e6:.2f} M" and flops == f"{shape.flops() / 1e9:.2f} G"


@pytest.mark.parametrize("case", ["reach", "heads"])
def test_only_shapes_within_reach_are_told(case: str) -> None:
    learngene = gene()
    if case == "reach":
        learngene = replace(learngene, reach=Reach(depths=(2, 6), widths=(32, 96, 32)))
    else:
        learngene = planted(build_pico(ViTShape(depth=2, width=96, heads=2, patch=8, image_size=32, classes=10)))
    text = written(learngene)
    for name, *_ in tables(section(text, "Reach"))[0][1:]:
        depth, width = map(int, name.split("x"))
        native = learngene.shape
        learngene.reach.check(replace(native, depth=depth, width=width, heads=width // native.head_dim))
    assert "width=128" not in section(text, "Use") and "--width 128" not in section(text, "Use")


def test_how_it_was_made() -> None:
    part = section(written(), "How it was made")
    for told in (
        "**Method:** lsamd, [paper](https://arxiv.org/abs/2605.08209)",
        "**Ancestor:** pico (apache-2.0), tests",
        "**Size of the images:** 32 px. **Updates:** 40, 12,345 images seen, 6.5 s on a laptop.",
        "**Drift of the base blocks:** 0.031 of their norm.",
        "**Command:** `learngene extract lsamd pico`",
    ):
        assert told in part
    assert tables(part)[0] == [
        ["data set", "images", "terms"],
        ["signs", "1,651", "Apache-2.0"],
        ["leaves", "200", "not recorded"],
    ]


def test_what_the_search_found() -> None:
    part = section(written(), "What the search found")
    assert "Stored blocks: 0, 2." in part
    rate, paths = tables(part)
    assert rate == [["position", "0", "1", "2"], ["base rate", "1.00", "0.50", "0.25"]]
    assert paths == [["data set", "path"], ["signs", "`BBS`"], ["leaves", "`BSS`"]]


def test_width_names_what_was_learned() -> None:
    assert "Below 64 the leading units are kept." in section(written(), "Width")
    learned = {"rows": torch.zeros(32, 64), "gain.96": torch.zeros(7, 96)}
    part = section(written(gene(width=learned)), "Width")
    assert "Form `copy`" in part and "multiples of 64" in part
    assert "`width.gain.96` [7, 96], `width.rows` [32, 64]" in part


def test_a_card_of_few_facts_is_still_a_card() -> None:
    learngene = replace(gene(), provenance={})
    text = written(learngene)
    assert "What the search found" not in text and "Data (none" not in text and ModelCard(text).data.license
    assert f"`{learngene.digest}`, {learngene.nbytes + 1000:,} bytes." in text


def test_without_results_nothing_was_measured() -> None:
    assert section(written(), "Measured") == "Nothing was measured."


def test_results_cell_by_cell() -> None:
    part = section(written(results=RESULTS), "Measured")
    assert part.startswith("The test accuracy after epoch 3, per cent, mean and standard deviation over seeds: 64 px,")
    assert tables(part) == [
        [
            ["shape", "data set", "rows", "random", "lsamd-base"],
            ["6x256", "dtd", "50.0 ± 1.2", "", "53.3 ± 0.0"],
            ["6x256", "signs", "90.0", "21.7 ± 2.0", ""],
            ["12x384", "dtd", "60.0 ± 0.0", "", ""],
        ]
    ]
    assert part.splitlines()[-1] == card.comparison(RESULTS)


def test_the_sentence_says_where_it_wins_and_where_not() -> None:
    assert card.comparison(RESULTS) == (
        "lsamd-base less rows, paired: +1.23 ± 0.57 points over 9 runs; ahead in 2 of 3 pairs of shape and data set, "
        "most at 6x256 dtd (+3.2); behind at 12x384 dtd (-0.5)."
    )
    won = {"overall": {"mean": 1.0, "se": 0.5, "n": 2}, "per_shape_and_set": {"a b": {"mean": 1.0}}}
    assert card.comparison({"minus_rows": {"x": won}}).endswith("behind at none.")


def test_a_single_run_has_no_standard_error() -> None:
    once = {"overall": {"mean": 1.0, "se": None, "n": 1}, "per_shape_and_set": {"a b": {"mean": 1.0}}}
    assert "+1.00 points over 1 run" in card.comparison({"minus_rows": {"x": once}})


def test_a_draw_is_not_ahead() -> None:
    even = {
        "overall": {"mean": 0.5, "se": 0.5, "n": 2},
        "per_shape_and_set": {"a b": {"mean": 0.0}, "a c": {"mean": 1.0}},
    }
    assert "ahead in 1 of 2 pairs" in card.comparison({"minus_rows": {"x": even}})


# What is committed ---------------------------------------------------------------------------------------------------


def test_the_bundled_cards_are_current() -> None:
    for name, text in write_numbers.cards().items():
        assert (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8") == text, f"{name}: make numbers"


def test_the_readmes_results_are_current() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(write_numbers.BEGIN) == readme.count(write_numbers.END) == 1
    between = readme.split(write_numbers.BEGIN)[1].split(write_numbers.END)[0]
    assert between == f"\n{write_numbers.readme_part()}\n", "make numbers"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one learngene and results measured with it."""
    learngene = gene()
    file = learngene.save_pretrained(tmp_path / "model_cards" / "pico-base")
    made = {key: getattr(entry(learngene, "model_cards/pico-base"), key) for key in ("name", "method", "uri", "sha256")}
    made |= {"bytes": file.stat().st_size, "license": "Apache-2.0", "card": "README.md", "description": "For tests."}
    (tmp_path / "registry.yaml").write_text(json.dumps([made]))
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "results").mkdir()
    results = RESULTS | {"digests": {"rows": "a" * 64, "lsamd-base": learngene.digest}}
    (tmp_path / "results" / "transfer.json").write_text(json.dumps(results))
    monkeypatch.setattr(write_numbers, "ROOT", tmp_path)
    monkeypatch.setattr(write_numbers, "RESULTS", tmp_path / "results")
    return tmp_path


def test_numbers_are_written_between_the_marks_and_into_cards(root: Path) -> None:
    write_numbers.main()
    card_file, readme = root / "model_cards" / "pico-base" / "README.md", root / "README.md"
    once = (card_file.read_text(), readme.read_text())
    assert card.comparison(RESULTS) in once[0] and card.comparison(RESULTS) in once[1]
    assert once[1].startswith("before\n<!-- results -->\n## What was measured\n\n")
    assert once[1].endswith("\n<!-- /results -->\nafter\n") and "old" not in once[1]
    assert tables(once[1])[0] == [  # means over the data sets, none where one is missing
        ["shape", "rows", "random", "lsamd-base"],
        ["6x256", "70.0", "", ""],
        ["12x384", "60.0", "", ""],
    ]
    write_numbers.main()
    assert (card_file.read_text(), readme.read_text()) == once


def test_results_of_another_artefact_are_not_this_ones(root: Path) -> None:
    (root / "results" / "transfer.json").write_text(json.dumps(RESULTS))
    assert "Nothing was measured." in write_numbers.cards()["pico-base"]


def test_ratios_of_speed(root: Path) -> None:
    speeds: dict[str, Any] = {
        "grow_speed": {"time": {"ratio": 0.714, "limit": 1.0}, "memory": {"grow": {"ratio": 1.128}, "limit": 1.3}},
        "fit_speed": [{"shape": "12x192", "image_size": 64, "precision": "bf16", "ratio_median": 1.0129}],
        "aux_speed": {"ratio": 1.049},
    }
    for name, value in speeds.items():
        (root / "results" / f"{name}.json").write_text(json.dumps(value))
    (root / "results" / "transfer.json").unlink()
    rows = tables(write_numbers.readme_part())[0]
    assert [row[1:] for row in rows[1:]] == [
        ["0.71", "at most 1.0"],
        ["1.13", "at most 1.3"],
        ["1.01", "at least 0.95"],
        ["1.05", "at most 1.10"],
    ]
    assert "12x192 at 64 px, bf16" in rows[3][0]

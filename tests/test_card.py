"""Model cards and the README's results: every number against the shapes and results that it comes from."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_pico
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from loopback import serve
from planted import planted, variant
from test_comparison import row
from typer.testing import CliRunner

from learngene_hub import card, cli
from learngene_hub.comparison import summarise
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.registry import Entry
from learngene_hub.shape import Reach, ViTShape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import _pages  # noqa: E402
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
            "arms": {"rows": {"mean": 50.04, "sd": 1.25}, "lsamd-base": {"mean": 53.29, "sd": 0.04, "n": 3}},
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


def results_of(learngene: Learngene) -> dict[str, Any]:
    """RESULTS, as if measured with this learngene."""
    return RESULTS | {"digests": {"rows": "a" * 64, "lsamd-base": learngene.digest, "base-even": learngene.digest}}


def written(learngene: Learngene | None = None, *, measured: bool = False, source: str = "pico-base") -> str:
    learngene = learngene or gene()
    return card.card_text(
        learngene,
        name="pico-base",
        source=source,
        description="A learngene for tests.",
        nbytes=learngene.nbytes + 1000,
        results=results_of(learngene) if measured else None,
    )


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
    assert data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "learngene-hub",
        "pipeline_tag": "image-classification",
        "datasets": ["signs", "leaves"],
        "tags": ["learngene", "lsamd", "image-classification"],
    }


def test_a_measured_head_goes_through_the_clients_own_types_and_back() -> None:
    data = ModelCard(written(measured=True)).data.to_dict()
    name, found = model_index_to_eval_results(data["model-index"])
    assert eval_results_to_model_index(name, found) == data["model-index"]
    assert (name, data["metrics"]) == ("pico-base", ["accuracy"])
    told = [(each.task_type, each.dataset_type, each.dataset_split, each.metric_type) for each in found]
    assert told == [("image-classification", "dtd", "test", "accuracy")]  # only the learngene's own arm
    assert (found[0].metric_name, found[0].metric_value) == ("6x256 after finetuning, mean of 3 runs", 0.5329)


@pytest.mark.parametrize("kind", ["plain", "measured", "other licence", "no licence"])
def test_the_hub_accepts_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the client's own ``ModelCard.validate``, over HTTP."""
    license = {"other licence": "LicenseRef-Mine 1", "no licence": ""}.get(kind, "Apache-2.0")
    text = written(replace(gene(), license=license), measured=kind == "measured")
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        ModelCard(text).validate()
        with pytest.raises(ValueError, match="license"):  # it looks
            ModelCard("---\nlicense: mine\n---\n").validate()
        assert hub.requests == ["POST /api/validate-yaml"] * 2


@pytest.mark.parametrize(
    ("license", "head"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("AGPL-3.0-only", {"license": "agpl-3.0"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("openrail++", {"license": "openrail++"}),
        ("unknown", {"license": "unknown"}),
        ("", {}),
        (
            "CC-BY-ND-3.0",
            {
                "license": "other",
                "license_name": "cc-by-nd-3.0",
                "license_link": "https://spdx.org/licenses/CC-BY-ND-3.0.html",
            },
        ),
        ("LicenseRef-Ours", {"license": "other", "license_name": "licenseref-ours"}),
        ("MIT AND Apache-2.0", {"license": "other", "license_name": "mit-and-apache-2.0"}),
        ("all: [mine]\n---", {"license": "other", "license_name": "all-mine"}),
    ],
)
def test_a_licence_as_the_hub_spells_it(license: str, head: dict[str, str]) -> None:
    data = ModelCard(written(replace(gene(), license=license))).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == head


def test_a_licence_of_ones_own_may_have_an_address() -> None:
    learngene = replace(gene(), license="LicenseRef-Ours", provenance={"license_link": "https://example.org/terms"})
    assert ModelCard(written(learngene)).data.to_dict()["license_link"] == "https://example.org/terms"
    learngene = replace(learngene, provenance={"license_link": "javascript:alert(1)"})
    assert "license_link" not in ModelCard(written(learngene)).data.to_dict()


@pytest.mark.parametrize(
    ("source", "repo"),
    [
        ("timm/deit_tiny_patch16_224.fb_in1k", "timm/deit_tiny_patch16_224.fb_in1k"),
        ("hf://timm/vit@" + "a" * 40, "timm/vit"),
        ("hf-hub:timm/vit", "timm/vit"),
        ("https://huggingface.co/timm/vit", "timm/vit"),
        ("timm names, file sha256 7b39", None),
        ("weights/deit.safetensors", None),
        ("./weights/deit", None),
        ("/weights/deit", None),
        ("github.com/author/repo", None),
        ("org/../etc", None),
        ("tests", None),
        ("", None),
    ],
)
def test_the_ancestor_is_a_base_model_where_it_is_a_repository(source: str, repo: str | None) -> None:
    learngene = gene()
    learngene = replace(learngene, ancestor={**learngene.ancestor, "source": source})
    assert ModelCard(written(learngene)).data.base_model == repo


def test_the_text_is_whole() -> None:
    text = written(gene(settings={"form": "copy"}), measured=True)
    body = text.split("\n---\n", 1)[1]
    assert text.startswith("---\n") and text.endswith(".\n") and "\n\n\n" not in text
    assert body.startswith("\n# pico-base\n\nA learngene for tests.\n\nA learngene is")
    titles = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
    assert titles == [
        *("Use", "Reach", "How it was made", "What the search found", "Width", "Measured", "Limits"),
        *("Verify and pin", "Licence"),
    ]
    for odd in ("None", "nan", "{", "?", "not recorded."):
        assert odd not in body, odd
    assert section(text, "Licence") == (
        "apache-2.0. Licence of its ancestor: apache-2.0. The data sets have terms of their own, told above: "
        "check them against your use.\n"
    )


def test_what_it_reaches_and_what_that_costs() -> None:
    learngene = gene()
    part = section(written(learngene), "Reach")
    reach, costs = tables(part)
    assert reach[1:] == [
        ["depth, blocks", "1 - 12", "3"],
        ["width", "32 - 768 in steps of 32", "64, in heads of 32"],
        ["side of the images, px", "multiples of 8", "32"],
        ["channels of the images", "any number", "3"],
        ["labels", "any number", "the head is fresh"],
    ]
    assert f"One file, {learngene.nbytes / 1e6:.1f} MB of tensors, stands for 288 shapes." in part  # 12 x 24
    assert "with 10 labels at 32 px" in part
    head, *rows = costs
    assert head == ["depth x width", "parameters", "FLOPs", "weights"]
    assert {name for name, *_ in rows} == {
        *("1x32", "3x64", "4x128", "6x192", "12x192", "6x256", "7x320", "12x384", "12x768"),  # ends, native, common
    }
    for name, params, flops, weights in rows:
        depth, width = map(int, name.split("x"))
        stem = 3 * 8 * 8 * width + width + 17 * width + width  # patches, their bias, positions, class token
        by_hand = depth * (12 * width**2 + 13 * width) + stem + 2 * width + 10 * width + 10
        shape = ViTShape(depth=depth, width=width, heads=width // 32, patch=8, image_size=32, classes=10)
        assert shape.params() == by_hand
        assert params == f"{by_hand / 1e6:.2f} M" and flops == f"{shape.flops() / 1e9:.2f} G"
        assert weights == f"{by_hand * 4 / 1e6:.1f} MB"
    assert rows == sorted(rows, key=lambda row: float(row[1].split()[0]))


@pytest.mark.parametrize("case", ["reach", "heads"])
def test_only_shapes_within_reach_are_told(case: str) -> None:
    learngene = gene()
    if case == "reach":
        learngene = replace(learngene, reach=Reach(depths=(2, 6), widths=(32, 96, 32)))
    else:
        learngene = planted(build_pico(ViTShape(depth=2, width=96, heads=2, patch=8, image_size=32, classes=10)))
    text = written(learngene)
    for name, *_ in tables(section(text, "Reach"))[1][1:]:
        depth, width = map(int, name.split("x"))
        native = learngene.shape
        learngene.reach.check(replace(native, depth=depth, width=width, heads=width // native.head_dim))
    assert "width=128" not in section(text, "Use") and "--width 128" not in section(text, "Use")


def test_the_example_of_a_federated_run_has_the_classes_of_its_data() -> None:
    assert "num_labels=10)" in written(gene())
    federated = written(
        replace(gene(), provenance={"federation": {"rounds": 2}}, shape=replace(gene().shape, classes=7))
    )
    assert "num_labels=7)" in federated and "logits  # (1, 7)" in federated and "7 labels at" in federated


def test_how_it_was_made() -> None:
    part = section(written(), "How it was made")
    for told in (
        "**Method:** `lsamd`, [paper](https://arxiv.org/abs/2605.08209)",
        "**Ancestor:** pico, licence apache-2.0, source: tests.",
        "**Images:** 32 px.",
        "**Training:** 40 updates, 12,345 images seen, 6.5 s, on a laptop.",
        "**Change of the ancestor's blocks:** 0.031 of their norm.",
        "**Command:** `learngene extract lsamd pico`",
    ):
        assert told in part
    assert tables(part)[0] == [
        ["data set", "images", "terms"],
        ["signs", "1,651", "Apache-2.0"],
        ["leaves", "200", "not recorded"],
    ]


def test_settings_can_be_read_back() -> None:
    settings = {"epochs": 3, "lr": 0.001, "distil_on": ["a", "no"], "on": "yes", "form": "copy\n```\n# out", "n": None}
    block = re.search(r"```yaml\n(.*?)\n```", written(replace(gene(), settings=settings)), re.DOTALL)
    assert block and yaml.safe_load(block[1]) == settings


def test_facts_without_a_place_of_their_own_are_told_too() -> None:
    learngene = replace(gene(), provenance={"lambda_min": 0.25, "teacher": {"name": "LeViT-384"}, "log": [1] * 9})
    part = section(written(learngene), "How it was made")
    assert '- **lambda min:** `0.25`\n- **teacher:** `{"name": "LeViT-384"}`' in part and "log" not in part


def test_a_method_may_have_a_note_or_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted:
        paper, note = "https://example.org/paper", "Only half of *it* could be read."

    monkeypatch.setattr("learngene_hub.methods.METHODS", {"lsamd": Noted})
    assert (
        "- **Method:** `lsamd`, [paper](https://example.org/paper). Only half of &#42;it&#42; could be read.\n"
        in written()
    )
    unknown = written(replace(gene(), method="not-here-yet"))
    assert "- **Method:** `not-here-yet`.\n" in unknown and "not-here-yet" in ModelCard(unknown).data.tags


def test_what_the_search_found() -> None:
    part = section(written(), "What the search found")
    assert "Stored blocks: 0, 2." in part
    rate, paths = tables(part)
    assert rate == [["position", "0", "1", "2"], ["base rate", "1.00", "0.50", "0.25"]]
    assert paths == [["data set", "path"], ["signs", "`BBS`"], ["leaves", "`BSS`"]]


def test_width_names_what_was_learned() -> None:
    assert "## Width" not in written()  # nothing was stored for it, and no form chosen
    assert "Below 64 the units that come first are kept." in section(written(gene(settings={"form": "copy"})), "Width")
    learned = {"rows": torch.zeros(32, 64), "gain.96": torch.zeros(7, 96)}
    part = section(written(gene(width=learned)), "Width")
    assert part.startswith("Form `copy`, exact at multiples of the native width 64: ")
    assert "`width.gain.96 [7, 96]`, `width.rows [32, 64]`" in part


def test_the_form_says_where_the_function_is_kept() -> None:
    assert "exact at every width from the native 64 up" in written(gene(settings={"form": "exact"}))
    narrow = replace(gene(settings={}), reach=Reach(depths=(1, 6), widths=(64, 64, 32)))
    assert "## Width" not in written(narrow)


def test_a_card_of_few_facts_is_still_a_card() -> None:
    learngene = replace(gene(), provenance={})
    text = written(learngene)
    assert "What the search found" not in text and "Data (none" not in text and ModelCard(text).data.license
    assert f"{learngene.nbytes + 1000:,} bytes: `{learngene.digest}`" in section(text, "Verify and pin")


def test_how_to_pin_depends_on_where_it_is() -> None:
    named, pushed = section(written(), "Verify and pin"), section(written(source="author/genes"), "Verify and pin")
    assert "learngene verify pico-base\n" in named and "A registry names" in named and "hf://" not in named
    assert "learngene verify author/genes\n" in pushed and "`hf://author/genes@COMMIT`" in pushed
    assert 'Descendant.from_learngene("author/genes", revision="COMMIT")' in pushed


def test_without_results_nothing_was_measured() -> None:
    assert section(written(), "Measured") == "Nothing was measured."


def test_results_cell_by_cell() -> None:
    part = section(written(measured=True), "Measured")
    assert part.startswith("The test accuracy after epoch 3, per cent, mean and standard deviation over seeds (one run")
    assert "None of these data sets was among" not in part
    assert "Also among the data sets of the extraction: signs." in part
    assert "- `lsamd-base`: this learngene.\n" in part and "- `random`: the same network from timm's" in part
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


def test_results_that_nothing_wrote_are_refused_in_one_line() -> None:
    learngene = gene()
    for spoiled in ({"cells": 3}, {"overall": None}, {"minus_rows": {"x": {}}}, {"cells": [{"arms": {}}]}):
        with pytest.raises(SettingsError, match="--summarise would work") as e:
            card.card_text(
                learngene, name="a", source="a", description="", nbytes=1, results=results_of(learngene) | spoiled
            )
        assert "\n" not in str(e.value)


# What is committed ---------------------------------------------------------------------------------------------------


def test_the_bundled_cards_are_current() -> None:
    for name, text in write_numbers.cards().items():
        assert (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8") == text, f"{name}: make cards"


def python_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_bundled_cards_say_what_runs() -> None:
    for name in write_numbers.cards():
        text = (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")
        made: dict[str, Any] = {}
        exec(python_of(text)[0], made)
        assert made["logits"].shape == (1, 10) and made["model"].num_labels == 10
        shell = re.findall(r"^learngene .*$", text, re.MULTILINE)
        assert [line.split()[1] for line in shell] == ["show", "verify"]
        for line in shell:
            found = CliRunner().invoke(cli.app, shlex.split(line)[1:])
            assert found.exit_code == 0, found.output


def test_the_readmes_results_are_current() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(write_numbers.BEGIN) == readme.count(write_numbers.END) == 1
    between = readme.split(write_numbers.BEGIN)[1].split(write_numbers.END)[0]
    assert between == f"\n{write_numbers.readme_part()}\n", "make numbers"
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert page == write_numbers.results_page(), "make numbers"


def test_the_page_of_results_links_to_what_is_there() -> None:
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all((ROOT / "benchmarks" / link).is_file() for link in links)


def test_a_paired_difference_becomes_a_row() -> None:
    gap = {"mean": -0.911, "se": 1.008, "n": 18}
    line = _pages.Line(what="`sws`", less="`net2net`", where="there", gap=gap)
    assert line.cells() == ["`sws`", "`net2net`", "there", "-0.9 ± 1.0", "18"]
    once = _pages.Line(what="a", less="b", where="c", gap={"mean": 2.0, "se": None, "n": 1})
    assert once.cells()[3:] == ["+2.0", "1"]
    assert _pages.brief(lambda name: None) == ""


def compared(digest: str) -> dict[str, Any]:
    """A comparison of one learngene, of this digest, with net2net: 62 and 58 at 6x64 against 50 and 50."""
    rows = [
        row("pico-base", "6x64", name, 0, {1: value}, digest=digest, stored_bytes=9000)
        for name, value in (("signs", 62.0), ("dtd", 58.0))
    ]
    rows += [row("net2net", "6x64", name, 0, {1: 50.0}, kind="method", stored_bytes=9000) for name in ("signs", "dtd")]
    return summarise(rows)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one learngene and results measured with it."""
    learngene = gene()
    file = learngene.save_pretrained(tmp_path / "model_cards" / "pico-base")
    made = {key: getattr(entry(learngene, "model_cards/pico-base"), key) for key in ("name", "method", "uri", "sha256")}
    made |= {"bytes": file.stat().st_size, "license": "Apache-2.0", "card": "README.md", "description": "For tests."}
    (tmp_path / "registry.yaml").write_text(json.dumps([made]))
    marks = "<!-- results -->\nold\n<!-- /results -->\n<!-- zoo -->\nold\n<!-- /zoo -->"
    (tmp_path / "README.md").write_text(f"before\n{marks}\nafter\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "benchmarks").mkdir()
    results = RESULTS | {"digests": {"rows": "a" * 64, "lsamd-base": learngene.digest}}
    (tmp_path / "results" / "transfer.json").write_text(json.dumps(results))
    (tmp_path / "results" / "compare.json").write_text(json.dumps(compared(learngene.digest)))
    monkeypatch.setattr(write_numbers, "ROOT", tmp_path)
    monkeypatch.setattr(write_numbers, "RESULTS", tmp_path / "results")
    return tmp_path


def test_numbers_are_written_between_the_marks_and_into_cards(root: Path) -> None:
    write_numbers.main([])
    card_file, readme, page = (
        root / name for name in ("model_cards/pico-base/README.md", "README.md", "benchmarks/RESULTS.md")
    )
    once = (card_file.read_text(), readme.read_text(), page.read_text())
    assert "pico-base less net2net, paired: +10.00 ± 2.00 points over 2 runs; ahead in 2 of 2 pairs" in once[0]
    assert once[1].startswith("before\n<!-- results -->\n## What was measured\n\n")
    assert once[1].endswith("\n<!-- /zoo -->\nafter\n") and "old" not in once[1]
    starts, zoo = tables(once[1])
    assert [line[:3] for line in starts[1:]] == [["`pico-base`", "60.0", "+10.0 ± 2.0"], ["`net2net`", "50.0", ""]]
    assert zoo[1][4] == "+10.0 ± 2.0" and zoo[1][6] == "accuracy"
    assert card.comparison(RESULTS) in once[2]
    assert tables(once[2])[0] == [  # means over the data sets, none where one is missing
        ["shape", "rows", "random", "lsamd-base"],
        ["6x256", "70.0", "", ""],
        ["12x384", "60.0", "", ""],
    ]
    write_numbers.main([])
    assert (card_file.read_text(), readme.read_text(), page.read_text()) == once


def test_cards_can_be_written_alone(root: Path) -> None:
    write_numbers.main(["--cards"])
    assert (root / "model_cards" / "pico-base" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert "old" in (root / "README.md").read_text()


def test_results_of_another_artefact_are_not_this_ones(root: Path) -> None:
    (root / "results" / "compare.json").write_text(json.dumps(compared("b" * 64)))
    assert "Nothing was measured." in write_numbers.cards()["pico-base"]


def test_ratios_of_speed(root: Path) -> None:
    speeds: dict[str, Any] = {
        "grow_speed": {"time": {"ratio": 0.714, "limit": 1.0}, "memory": {"grow": {"ratio": 1.128}, "limit": 1.3}},
        "fit_speed": [{"shape": "12x192", "image_size": 64, "precision": "bf16", "ratio_median": 1.0129}],
        "aux_speed": {"ratio": 1.049},
    }
    for name, value in speeds.items():
        (root / "results" / f"{name}.json").write_text(json.dumps(value))
    (root / "results" / "compare.json").unlink()
    rows = tables(write_numbers.readme_part())[0]
    assert [row[1:] for row in rows[1:]] == [
        ["0.71", "at most 1.0"],
        ["1.13", "at most 1.3"],
        ["1.01", "at least 0.95"],
        ["1.05", "at most 1.10"],
    ]
    assert "12x192 at 64 px, bf16" in rows[3][0]

"""The comparisons of record: their files agree with each other, and the zoo's rule by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_comparison import row

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import _compare_plots  # noqa: E402
import _zoo  # noqa: E402
import compare  # noqa: E402
import write_numbers  # noqa: E402

from learngene_hub import Learngene  # noqa: E402
from learngene_hub.comparison import Plan, read_rows, summarise  # noqa: E402
from learngene_hub.registry import Registry  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", compare.PLANS)
def test_what_the_json_says_is_what_the_rows_say(name: str) -> None:
    rows = read_rows(RESULTS / f"{name}.csv")
    assert rows and json.loads((RESULTS / f"{name}.json").read_text()) == json.loads(json.dumps(summarise(rows)))


@pytest.mark.parametrize("name", compare.PLANS)
def test_the_rows_are_those_of_the_plan(name: str) -> None:
    """Of each start one recipe, that of the plan; and no run of anything else."""
    said = yaml.safe_load((ROOT / "benchmarks" / f"{name}.yaml").read_text())
    plan = Plan.of(compare.with_paths(said, Path("data"), Path("ancestor.safetensors"), Path("work")))
    data = {each.name: each for each in plan.data}
    jobs = {(job.start, job.shape, job.data, job.seed) for job in plan.jobs()}
    for each in read_rows(RESULTS / f"{name}.csv"):
        assert (each.start, each.shape, each.data, each.seed) in jobs
        assert each.recipe == plan.identity(plan.start(each.start), data[each.data]), each.job


def test_what_was_compared_is_what_is_bundled() -> None:
    compared = json.loads((RESULTS / "compare.json").read_text())
    for name, entry in Registry.load(ROOT / "registry.yaml").entries.items():
        assert compared["starts"][name]["digest"] == entry.sha256, name
        assert compared["starts"][name]["stored_bytes"] == entry.bytes, name


def test_every_bundled_learngene_is_ahead_somewhere_and_the_order_is_the_most_useful_first() -> None:
    compared, few = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("compare", "few"))
    found = {verdict.name: verdict for verdict in _zoo.verdicts(compared, few)}
    bundled = list(Registry.load(ROOT / "registry.yaml").entries)
    assert [name for name in found if name in bundled] == bundled
    assert all(found[name].axes for name in bundled)
    assert sum(entry.bytes for entry in Registry.load(ROOT / "registry.yaml").entries.values()) <= 36_000_000


def summary(**accuracies: tuple[str, int, float, float]) -> dict[str, Any]:
    """Of starts name = (kind, stored bytes, accuracy in cell x, in cell y)."""
    rows = [
        row(name.replace("_", "-"), "6x64", data, 0, {1: value}, kind=kind, stored_bytes=stored)
        for name, (kind, stored, *values) in accuracies.items()
        for data, value in zip("xy", values, strict=True)
    ]
    return summarise(rows)


def test_the_rule_of_the_zoo_by_hand() -> None:
    compared = summary(
        best=("learngene", 100, 60.0, 62.0),  # +10 and +12 less whole: ahead in accuracy; it is whole's size
        small=("learngene", 40, 45.0, 46.0),  # behind whole, ahead of part, which stores as much
        mixed=("learngene", 40, 45.0, 20.0),  # +15 and -10 less part: 2.5 in the mean, 12.5 the error
        whole=("method", 100, 50.0, 50.0),
        part=("method", 40, 30.0, 30.0),
    )
    found = {verdict.name: verdict for verdict in _zoo.verdicts(compared, None)}
    assert list(found) == ["best", "small", "mixed"]
    assert found["best"].axes == ("accuracy",) and found["best"].gap["mean"] == 11.0
    assert found["small"].axes == ("storage",) and found["small"].rival == "part"
    assert found["small"].rival_gap is not None and found["small"].rival_gap["mean"] == 15.5
    assert found["mixed"].axes == ()
    few = summary(mixed=("learngene", 40, 60.0, 61.0), whole=("method", 100, 50.0, 50.0))
    assert {v.name: v.axes for v in _zoo.verdicts(compared, few)}["mixed"] == ("data",)


def test_twelve_sizes_by_hand() -> None:
    """12x192 at 224 px has 5,526,346 parameters with ten classes (DeiT-Tiny's 5,717,416 less 990 outputs of 193)."""
    found = _compare_plots.storage(summary(lsamd_base=("learngene", 11_000_000, 1.0, 1.0)))
    sizes = dict(zip(found["sizes"], found["checkpoints"], strict=True))
    assert len(sizes) == 12 and sizes["12x192"] == 2 * (5_717_416 - 990 * 193)
    assert found["ratio"] == sum(sizes.values()) / 11_000_000


def test_the_goals_that_readme_tells_are_those_of_the_file() -> None:
    compared = json.loads((RESULTS / "compare.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in _zoo.goals(compared))
    between = readme.split(write_numbers.ZOO_BEGIN)[1].split(write_numbers.ZOO_END)[0]
    assert between == f"\n{write_numbers.zoo_part()}\n", "make numbers"


def test_the_extraction_of_lsamd_base_costs_what_its_file_and_settings_say() -> None:
    """The plan's FLOPs, beside the dearest that the counted images can have cost: every path with all blocks."""
    made = Learngene.from_pretrained("lsamd-base")
    settings = yaml.safe_load((ROOT / "benchmarks" / "lsamd_base.yaml").read_text())
    lsamd, width, said = settings["lsamd"], settings["width"], made.provenance
    at = {size: replace(made.shape, image_size=size, classes=0).flops() for size in (64, lsamd["distil_size"])}
    per_update = said["images_seen"] / said["steps"]
    searched = 0.6 * said["steps"] / lsamd["alpha_every"] * per_update * 2  # phase B; the block, and it with an adapter
    taught = sum(min(facts["images"], lsamd["distil_limit"]) for facts in said["data"].values())
    widened = said["width"]["settings"]["steps_per_epoch"] * width.get("batch_size", 64)
    narrow = sum(replace(made.shape, width=w, heads=w // 64, image_size=64, classes=0).flops() for w in width["widths"])
    dearest = 3 * at[64] * (said["images_seen"] + searched) + at[lsamd["distil_size"]] * taught
    dearest += widened * (at[64] + 3 * narrow / 2)
    plan = yaml.safe_load((ROOT / "benchmarks" / "compare.yaml").read_text())["starts"]
    told = {float(plan[name]["extraction_flops"]) for name in plan if plan[name] and "extraction_flops" in plan[name]}
    assert len(told) == 1 and 0.8 * dearest < told.pop() <= dearest

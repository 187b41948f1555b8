"""The benchmark of pools: its images, its jobs, which rows are stale, and what its summary says, all by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_pico
from planted import FACTS
from pools import TINY, look
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _continual_arms  # noqa: E402
import _continual_cost  # noqa: E402
import _continual_data  # noqa: E402
import _continual_growth  # noqa: E402
import _continual_selection  # noqa: E402
import _continual_summary  # noqa: E402
import _continual_text  # noqa: E402
import _runs  # noqa: E402
import continual  # noqa: E402
from _continual_arms import Ask, Found, Job, Row  # noqa: E402
from _continual_data import Sources  # noqa: E402
from _continual_growth import Grown, Growth  # noqa: E402
from _continual_selection import Trial, Tried  # noqa: E402

from learngene_hub import factory  # noqa: E402
from learngene_hub._pool_amounts import Head  # noqa: E402
from learngene_hub.data import Images  # noqa: E402
from learngene_hub.errors import DataError  # noqa: E402
from learngene_hub.pool import Pool  # noqa: E402

CONFIG = yaml.safe_load((Path(__file__).parents[1] / "benchmarks" / "continual.yaml").read_text())
HAND: dict[str, Any] = {
    "image_size": 16, "precision": "fp32", "ancestor": {}, "corpora": {"a": ["x"], "b": ["y"]},
    "superclasses": {"x": ["x1"], "y": ["y1"]}, "corpus": {}, "pool": {}, "finetuning": {}, "few": 2,
    "tuning": {"lr": 1},
    "sets": {"s": {"train": 0, "test": 0}, "t": {"train": 0, "test": 0}}, "rules": {"pool": [1, 2], "soup": [2]},
    "ways": {"tune": {"sizes": [2, 0, 1], "depths": [4], "single_depths": [4]}}, "seeds": [1, 2],
}  # fmt: skip


def numbered(count: int, classes: int) -> Images:
    """``count`` images of 8 px whose first byte tells their number; label: that number modulo the classes."""
    pixels = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count)
    return Images(pixels, torch.arange(count) % classes, tuple("abcdefgh"[:classes]), "numbered")


def numbers(images: Images) -> list[int]:
    return [int(number) for number in images.pixels[:, 0, 0, 0]]


def row(arm: str, size: int, tuned: float, **more: Any) -> Row:
    values: dict[str, Any] = {
        "way": "tune", "depth": 4, "set": "s", "seed": 1, "probe": 1.0, "seconds": 2.0, "start": arm, "source": "c-d",
        "machine": "m",
    }  # fmt: skip
    return Row(arm=arm, size=size, tuned=tuned, **values | more)


def grown(arm: str, size: int, probes: dict[str, float], **more: Any) -> Grown:
    values: dict[str, Any] = {"images_seen": 100, "flops": 10**12, "seconds": 2.0, "loss": 1.0, "digest": "d"}
    return Grown(arm=arm, size=size, probes=json.dumps(probes), **values | {"source": "s", "machine": "m"} | more)


def tried(what: str, shares: dict[str, float], residual: float, **more: Any) -> Tried:
    values: dict[str, Any] = {"kind": "one", "count": 5, "draw": 0, "top": max(shares, key=lambda name: shares[name])}
    rest = {"threshold": 0.5, "seconds": 1.0, "pool": "p", "machine": "m"}
    return Tried(what=what, shares=json.dumps(shares), residual=residual, **values | rest | more)


def pool_of_two(folder: Path) -> Pool:
    """Of entries that change nothing, without training: what is asked of them is whose they are."""
    ancestor = build_pico(TINY)
    pool = Pool.create(folder / "pool", factory.extract("net2net", ancestor, {}, facts=FACTS), features=64)
    for name in ("a", "b"):
        pool = pool.add(look(1 + len(pool)), name=name, ancestor=ancestor)
    return pool


# Images ---------------------------------------------------------------------------------------------------------------


def test_the_corpora_are_all_classes_each_once() -> None:
    coarse = [name for names in CONFIG["corpora"].values() for name in names]
    fine = [name for corpus in CONFIG["corpora"] for name in _continual_data.classes_of(CONFIG, corpus)]
    assert sorted(coarse) == sorted(CONFIG["superclasses"]) and len(coarse) == 20
    assert len(fine) == len(set(fine)) == 100 and all(len(part) == 5 for part in CONFIG["superclasses"].values())
    assert {"beaver", "shark", "worm"} <= set(_continual_data.classes_of(CONFIG, "water"))


def test_a_few_of_each_class() -> None:
    images = numbered(40, 4)
    few = _continual_data.per_class(images, 3, 1)
    assert few.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and len(set(numbers(few))) == 12
    assert [number % 4 for number in numbers(few)] == few.labels.tolist()
    assert (
        numbers(few)
        == numbers(_continual_data.per_class(images, 3, 1))
        != numbers(_continual_data.per_class(images, 3, 2))
    )
    with pytest.raises(DataError, match="numbered has fewer than 11 images of a, b, c, d"):
        _continual_data.per_class(images, 11, 1)


def test_the_images_of_some_classes() -> None:
    part = _continual_data.of_classes(numbered(12, 4), ["d", "b"], "part")
    assert numbers(part) == [1, 3, 5, 7, 9, 11] and part.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert part.classes == ("d", "b") and part.name == "part"
    with pytest.raises(DataError, match="numbered has no class z"):
        _continual_data.of_classes(numbered(12, 4), ["a", "z"], "part")


def test_several_sets_keep_their_classes_apart() -> None:
    both = _continual_data.joined([numbered(4, 2), numbered(3, 3), numbered(2, 2)], "all")
    assert both.labels.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6] and len(both.classes) == 7
    assert numbers(both) == [0, 1, 2, 3, 0, 1, 2, 0, 1]


# What is made, and what is run ----------------------------------------------------------------------------------------


def test_everything_is_made_after_what_it_needs() -> None:
    found = [(job.arm, job.size) for job in _continual_growth.growths(2)]
    rest = [("retrain", 2), ("sequential", 2), ("last", 2)]
    assert found == [("base", 0), ("pool", 1), ("last", 1), ("pool", 2), *rest]


def test_what_stands_on_something_new_is_made_again(tmp_path: Path) -> None:
    """Where an entry is missing those after it are too; where the base is, all is."""
    config, ancestor = tmp_path / "hand.yaml", tmp_path / "ancestor"
    config.write_text(yaml.safe_dump(HAND))
    ancestor.write_bytes(b"abc")
    sources = Sources(data=tmp_path, ancestor=ancestor, work=tmp_path, config=config, out=tmp_path / "out.csv")
    everything = _continual_growth.growths(2)
    assert _continual_growth.missing(sources, 2) == everything
    pool_of_two(tmp_path)
    for job in everything:
        source = _continual_growth.source_of(sources, job.arm)
        _runs.append_row(sources.beside("growing"), grown(job.arm, job.size, {}, source=source))
        if job.arm != "pool":
            _continual_growth.stored(sources, job.arm, job.size).write_bytes(b"")
    assert _continual_growth.missing(sources, 2) == []
    (tmp_path / "sequential-2.safetensors").unlink()
    assert _continual_growth.missing(sources, 2) == [Growth(arm="sequential", size=2)]
    (tmp_path / "base.safetensors").unlink()
    assert _continual_growth.missing(sources, 2) == everything
    for name in ("base", "sequential-2"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    config.write_text(yaml.safe_dump(HAND | {"finetuning": {"lr": 2}}))
    assert _continual_growth.missing(sources, 2) == [job for job in everything if job.arm not in ("base", "pool")]
    config.write_text(yaml.safe_dump(HAND | {"pool": {"lr": 2}}))
    assert _continual_growth.missing(sources, 2) == [job for job in everything if job.arm == "pool"]
    (tmp_path / "last-1.safetensors").unlink()
    config.write_text(yaml.safe_dump(HAND))
    assert _continual_growth.missing(sources, 2) == [Growth(arm="last", size=1), Growth(arm="sequential", size=2)]


def test_the_jobs_of_a_seed() -> None:
    found = [(job.arm, job.size, job.set) for job in continual.jobs(HAND, "tune", 1, [0, 1, 2], [4])]
    arms = ["pool", "soup", "retrain", "sequential", "last", "single-a", "single-b"]
    assert found[:14] == [(arm, 2, name) for name in ("s", "t") for arm in arms]
    assert found[14:16] == [("anchor", 0, "s"), ("anchor", 0, "t")]
    assert found[16:] == [(arm, 1, name) for name in ("s", "t") for arm in ("pool", "retrain", "sequential", "last")]
    assert continual.jobs(HAND, "tune", 1, [0, 1], [4]) == continual.jobs(HAND, "tune", 1, [0, 1, 2], [4])[14:]
    assert continual.jobs(HAND, "tune", 1, [0, 1, 2], [6]) == []
    asked = [(ask.arm, ask.size) for ask in continual.asks(HAND, 1, [0, 1, 2]) if ask.set == "s"]
    assert asked == [("pool", 1), ("pool", 2), ("soup", 2)]
    own = [job for job in continual.jobs(CONFIG, "tune", 1, range(6), range(13)) if job.arm.startswith("single")]
    depths, sets = CONFIG["ways"]["tune"]["single_depths"], CONFIG["sets"]
    assert len(own) == 5 * len(depths) * len(sets) and len(set(own)) == len(own)


def test_the_settings_are_of_arms_that_are_there() -> None:
    assert set(CONFIG["rules"]) <= set(_continual_arms.RULES)
    arms = set(CONFIG["rules"]) | {"anchor", "retrain", "sequential", "last", "oracle"}
    assert arms <= set(_continual_summary.MEANINGS) and set(_continual_arms.RULES) <= set(_continual_summary.MEANINGS)
    assert not set(CONFIG["sets"]) & {CONFIG["corpus"]["data"], CONFIG["ancestor"]["data"]}
    assert all(0 in way["sizes"] for way in CONFIG["ways"].values())


def test_a_row_is_stale_where_what_it_was_grown_from_changed(tmp_path: Path) -> None:
    config = tmp_path / "hand.yaml"
    config.write_text(yaml.safe_dump(HAND))
    sources = Sources(data=tmp_path, ancestor=tmp_path, work=tmp_path, config=config, out=tmp_path / "out.csv")
    job = row("pool", 2, 0.0).job
    ask = Ask(arm="pool", size=2, set="s", seed=1)
    assert _continual_arms.source_of(job, sources, {}) == ""  # neither a selection nor a base is there
    pool_of_two(tmp_path).anchor.save(tmp_path / "base.safetensors")

    def source(weights: dict[str, float], **more: Any) -> str:
        return _continual_arms.source_of(replace(job, **more), sources, {ask: found(weights)})

    anchor = _continual_arms.source_of(replace(job, arm="anchor", size=0), sources, {})
    assert source({"a": 0.5}) == source({"a": 0.5}) != source({"a": 0.6}) and source({}) == anchor
    assert source({"b": 1.0}) == _continual_arms.source_of(replace(job, arm="single-b"), sources, {})
    assert source({"a": 0.5}, seed=2) == ""  # no selection of that seed
    half = source({"a": 0.5}).partition("-")
    config.write_text(yaml.safe_dump(HAND | {"tuning": {"lr": 2}}))
    other = source({"a": 0.5}).partition("-")
    assert half[0] != other[0] and half[2] == other[2]


def found(weights: dict[str, float], **more: Any) -> Found:
    values: dict[str, Any] = {"arm": "pool", "size": 2, "set": "s", "seed": 1, "abstained": int(not weights)}
    rest = {"residual": 0.3, "threshold": 0.2, "scores": "{}", "images": 4, "seconds": 1.0, "pool": "p", "machine": "m"}
    return Found(weights=json.dumps(weights), shares="{}", **values | rest | more)


def test_a_run_of_the_same_start_and_settings_is_taken_over() -> None:
    job, first = row("soup", 2, 0.0).job, row("pool", 2, 50.0, start="same")
    assert _continual_arms.twin_of([row("last", 2, 1.0), first], job, "same", "c-x") == first
    assert _continual_arms.twin_of([first], job, "same", "e-d") is None  # other settings
    assert _continual_arms.twin_of([first], replace(job, seed=2), "same", "c-x") is None
    assert _continual_arms.twin_of([first], replace(job, way="probe"), "same", "c-x") is None
    assert _continual_arms.twin_of([first], job, "another", "c-x") is None


def test_the_head_of_a_probe_is_that_of_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*sizes, generator=generator) for sizes in ((5,), (5,), (5, 3), (3,))]
    model = nn.Sequential()
    model.add_module("head", nn.Linear(5, 3))
    x = torch.randn(7, 5, generator=generator)
    want = (x - parts[0]) * parts[1] @ parts[2] + parts[3]
    torch.testing.assert_close(_continual_arms.with_head(model, Head(*parts))(x), want)


def test_a_task_of_two_corpora_has_as_many_of_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "hand.yaml"
    config.write_text(yaml.safe_dump(HAND))
    sources = Sources(data=tmp_path, ancestor=tmp_path, work=tmp_path, config=config, out=tmp_path / "out.csv")
    asked = []

    def corpus(sources: Sources, name: str, split: str) -> Images:
        asked.append((name, split))
        return numbered(20, 2)

    monkeypatch.setattr(_continual_selection, "corpus", corpus)
    trial = Trial(kind="two", what="a+b", count=5, draw=3)
    pixels = _continual_selection.pixels_of(trial, sources)
    assert pixels.shape == (5, 3, 8, 8) and asked == [("a", "test"), ("b", "test")]
    assert torch.equal(pixels, _continual_selection.pixels_of(trial, sources))
    noise = _continual_selection.pixels_of(replace(trial, kind="noise", what="uniform"), sources)
    assert noise.shape == (5, 3, 16, 16) and noise.unique().numel() == 256


# The summary ----------------------------------------------------------------------------------------------------------


def test_hits_shares_and_refusals() -> None:
    """Of four tasks of one corpus three are found, one of which would have been refused; a pair is found half."""
    rows = [
        tried("a", {"a": 0.9, "b": 0.1}, 0.4),
        tried("a", {"b": 0.6, "a": 0.4}, 0.4, draw=1),
        tried("b", {"b": 1.0}, 0.51),
        tried("b", {"b": 0.7, "c": 0.3}, 0.5, draw=1),
        tried("a+c", {"a": 0.5, "b": 0.3}, 0.1, kind="two"),
        tried("a+c", {"c": 0.5, "a": 0.5}, 0.1, kind="two", draw=1),
        tried("uniform", {"a": 1.0}, 2.0, kind="noise", count=20),
        tried("mnist", {"a": 1.0}, 0.2, kind="other", count=20),
    ]
    told = _continual_summary.trial_facts(rows)
    assert told["one"]["5"] == {"tasks": 4, "abstained": 25.0, "top_is_true": 75.0, "true_share": 75.0}
    assert told["two"]["5"] == {
        "tasks": 2, "abstained": 0.0, "top_is_true": 100.0, "true_share": 75.0, "both_selected": 50.0,
    }  # fmt: skip
    assert told["noise"]["20"] == {"tasks": 1, "abstained": 100.0}
    assert told["mnist"]["20"] == {"tasks": 1, "abstained": 0.0}


def test_forgetting_by_hand() -> None:
    """sequential: a falls from 60 to 40 while b comes; retrain keeps it; the pool's entries stay as they were."""
    rows = [
        grown("base", 0, {"a": 30.0, "b": 20.0}),
        grown("pool", 1, {"a": 55.0, "b": 25.0}),
        grown("last", 1, {"a": 60.0, "b": 22.0}),
        grown("pool", 2, {"a": 31.0, "b": 50.0}),
        grown("sequential", 2, {"a": 40.0, "b": 70.0}),
        grown("retrain", 2, {"a": 61.0, "b": 65.0}),
        grown("last", 2, {"a": 28.0, "b": 72.0}),
    ]
    told = _continual_summary.forgetting(rows, ["a", "b"])
    assert told["sequential"] | {"probes": 0} == {
        "probes": 0, "forgotten": 20.0, "old": 40.0, "newest": 70.0, "all": 55.0,
    }  # fmt: skip
    assert told["retrain"]["forgotten"] == -1.0 and told["last"]["forgotten"] == 32.0
    assert told["pool"]["old"] == 55.0 and told["pool"]["newest"] == 50.0 and told["pool"]["forgotten"] == 0.0
    assert told["base"]["all"] == 25.0 and "forgotten" not in told["base"]
    assert told["sequential"]["probes"]["1"] == {"a": 60.0, "b": 22.0}
    assert "forgotten" not in _continual_summary.forgetting(rows[:3], ["a", "b"])["sequential"]


ROWS = [
    row("anchor", 0, 40.0),
    row("anchor", 0, 40.0, seed=2),
    row("pool", 1, 41.0),
    row("pool", 2, 45.0),
    row("pool", 2, 50.0, seed=2),
    row("retrain", 1, 44.0),
    row("retrain", 2, 44.0),
    row("retrain", 2, 46.0, seed=2),
    row("single-a", 2, 46.0),
    row("single-b", 2, 43.0),
    row("single-a", 2, 50.0, seed=2),  # single-b of this seed has not run: no oracle
]


def test_paired_differences_are_over_tasks() -> None:
    """pool - anchor: task 1 is ahead by 1 and 5, mean 3; task 2 by 10. Mean 6.5, deviation 7 / sqrt 2, error 3.5."""
    whole = _continual_summary.everywhere(ROWS, [1, 2])
    assert {row.size for row in whole if row.arm == "anchor"} == {1, 2}
    assert [(row.seed, row.tuned) for row in whole if row.arm == "oracle"] == [(1, 46.0)]
    assert not any(row.arm.startswith("single") for row in whole)
    gap = _continual_summary.difference(whole, "pool", "anchor")
    assert gap == {"mean": 6.5, "se": 3.5, "n": 2, "cells": 3, "won": 2}
    # task 1: (41 - 44 + 45 - 44) / 2 = -1; task 2: 4
    gap = _continual_summary.difference(whole, "pool", "retrain")
    assert gap == {"mean": 1.5, "se": 2.5, "n": 2, "cells": 3, "won": 1}
    one = _continual_summary.difference(whole, "pool", "oracle")
    assert one == {"mean": -1.0, "se": None, "n": 1, "cells": 1, "won": 0}
    assert _continual_summary.difference(whole, "pool", "soup") is None
    assert _continual_summary.spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "se": round(math.sqrt(7 / 3), 2), "n": 3}


def test_selection_facts_by_hand() -> None:
    rows = [found({"a": 0.5, "b": 0.2}, residual=0.1), found({}, seed=2)]
    told = _continual_summary.selection_facts(rows)["pool"]["s"]
    assert (told["selections"], told["abstained"], told["distance"], told["entries"]) == (2, 1, 1.0, 1.0)
    assert told["mean_weights"] == {"a": 0.25, "b": 0.1}


def test_what_an_entry_costs_beside_finetuning() -> None:
    rows = [grown("pool", 1, {}), grown("pool", 2, {}, seconds=4.0), grown("last", 1, {}, seconds=2.5)]
    told = _continual_summary.growing_cost(rows)
    assert told["entry"] == {"images_seen": 100, "teraflops": 1.0, "seconds": 3.0, "milliseconds_per_image": 30.0}
    assert told["finetuning"]["milliseconds_per_image"] == 25.0


def test_summarise_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "hand.yaml", tmp_path / "continual.csv"
    config.write_text(yaml.safe_dump(HAND, sort_keys=False))
    for each in [row("pool", 2, 9.0), *ROWS]:  # the first is stale: the same cell again below
        _runs.append_row(out, each)
    _runs.append_row(tmp_path / "continual_trials.csv", tried("a", {"a": 1.0}, 0.1))
    _runs.append_row(tmp_path / "continual_selections.csv", found({"a": 0.5}))
    argv = ["--summarise", "--config", str(config), "--out", str(out), "--work", str(tmp_path / "none")]
    assert continual.main(argv) == 0
    text = capsys.readouterr().out
    assert "| pool | 41.0 | 47.5 ± 2.5 |" in text and "| pool - anchor | +6.5 ± 3.5 (2/2) |" in text
    assert "| one | 5 | 1 | 100 | 100 | - | 0 |" in text and "| pool | s | 0/1 | 1.50 | 1.0 | a 0.50 | 1.0 |" in text
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["seeds"] == [1, 2] and told["ways"]["tune"]["by_size"]["pool"]["2"]["mean"] == 47.5
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    one, two = row("pool", 2, float("nan")), found({"a": 0.5})
    _runs.append_row(tmp_path / "rows.csv", one)
    _runs.append_row(tmp_path / "found.csv", two)
    (back,) = _runs.read_rows(tmp_path / "rows.csv", Row)
    assert math.isnan(back.tuned) and replace(back, tuned=0.0) == replace(one, tuned=0.0)
    assert _runs.read_rows(tmp_path / "found.csv", Found) == [two] and back.job == Job(
        way="tune", arm="pool", size=2, depth=4, set="s", seed=1
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data and --ancestor are missing"):
        continual.main([])
    with pytest.raises(SystemExit, match="no stage grow; there are growing, selections"):
        continual.main(["--data", str(tmp_path), "--ancestor", "none", "--stages", "grow"])


def test_text_of_nothing_is_short() -> None:
    assert _continual_text.score(None) == _continual_text.gap(None) == "-"
    assert _continual_text.cost({}, {}) == ""


def test_the_memory_is_that_of_a_process_itself() -> None:
    """A fresh process without torch has little, however much the one that starts it has: here 200 MB more than that."""
    held = torch.ones(50 * 2**20)  # float32, every page written
    folder = continual.ROOT / "benchmarks"
    script = "import ast, sys, resource; from pathlib import Path; "
    script += f"source = Path({str(folder / '_continual_cost.py')!r}).read_text(); tree = ast.parse(source); "
    script += "own = [node for node in tree.body if getattr(node, 'name', '') == 'peak_megabytes']; "
    script += "exec(compile(ast.Module(own, []), 'own', 'exec')); print(peak_megabytes())"
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert float(held.sum()) > 0 and 1 < float(told) < 100 < _continual_cost.peak_megabytes()


def test_the_cost_in_words() -> None:
    told = {"entries": 5, "threads": 1, "selected": 2, "seconds": 3.5, "cpu_seconds": 2.5, "peak_megabytes": 900.0}
    adding = {"images": 160, "epochs": 3, "batch_size": 16, "ratio": 1.25}
    adding |= {"entry_cpu_seconds": [2.0, 9.0, 1.0], "finetuning_cpu_seconds": [1.5, 1.75, 1.0]}
    text = _continual_text.cost({"selections": [told | {"before_megabytes": 500.0}], "adding": [adding]}, {})
    assert "| 5 | 1 | 2 | 3.5 | 2.5 | 900.0 | 500.0 |" in text
    assert "160 images, 3 epochs, batches of 16: 2.0 CPU seconds for an entry, 1.5 for finetuning, ratio 1.25" in text


def test_the_prose_says_the_numbers_of_the_results() -> None:
    """benchmarks/README.md is written by hand; what it says of differences and costs stands in the results."""
    folder = Path(__file__).parents[1] / "benchmarks"
    whole = (folder / "README.md").read_text(encoding="utf-8")
    prose = " ".join(whole[whole.index("## continual.py") : whole.index("## federated.py")].split())
    found = json.loads((folder / "results" / "continual.json").read_text(encoding="utf-8"))
    probe, tuned = (found["ways"][way]["differences"]["pool"] for way in ("probe", "tune"))

    def told(part: dict[str, Any]) -> str:
        return f"{part['mean']:+.1f} ± {part['se']:.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")

    assert f"(probe {told(probe['sequential']['5'])}, finetuned {told(tuned['sequential']['5'])})" in prose
    for base in ("anchor", "retrain", "last", "soup"):
        assert f"({told(probe[base]['5'])}, {told(tuned[base]['5'])})" in prose, base
    assert f"(`oracle`, known afterwards) is {told(probe['oracle']['5'])[1:]} ahead" in prose
    small, default = found["cost"]["adding"]
    assert f"takes {default['ratio']:.2f} times" in prose and f"and {small['ratio']:.2f} times with 3 epochs" in prose
    for arm in ("base", "last", "sequential", "retrain", "pool"):
        assert f"{found['forgetting'][arm]['all']:.1f}" in prose, arm

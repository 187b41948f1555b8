"""``comparison``: what the rows say by hand, that a run is the plain sequence of calls, and that nothing runs twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from PIL import Image
from test_cli import Result
from typer.testing import CliRunner

from learngene_hub import Recipe, _jobs, cli, evaluate, expand, finetune, fit_head, load_images
from learngene_hub._compare_summary import difference, paired, sign_flip, summarise
from learngene_hub._mimetic import sinusoids, write_mimetic
from learngene_hub.comparison import Job, Plan, Row, Start, as_text, compare, read_rows
from learngene_hub.errors import LearngeneError, SettingsError, StoreError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape
from learngene_hub.training import state_digest


def run(*args: str | Path) -> Result:
    found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    return Result(found.exit_code, found.stdout, found.stderr)


def row(start: str, shape: str, data: str, seed: int, course: dict[int, float], **facts: Any) -> Row:
    """A row; only what a test is about is said."""
    given: dict[str, Any] = {
        field.name: {"int": 1, "float": 0.0, "str": ""}[field.type] for field in dataclasses.fields(Row)
    }  # type: ignore[index]
    given |= {"start": start, "shape": shape, "data": data, "seed": seed, "kind": "learngene"}
    given |= {"epochs": " ".join(map(str, course)), "accuracies": " ".join(map(str, course.values()))}
    return Row(**(given | {"accuracy": course[max(course)]} | facts))


# What the rows say ----------------------------------------------------------------------------------------------------


def test_sign_flips_by_hand() -> None:
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8  # +++ and --- alone are as far from zero as 6
    assert sign_flip([1.0, 2.0, -3.0]) == 1.0  # the sum is 0
    assert sign_flip([3.0, 2.0, -1.0]) == 4 / 8  # 4: +++ is 6, ++- is 4, and their mirror images
    assert sign_flip([1.0]) is None
    many = sign_flip([1.0] * 20)
    assert many is not None and many == pytest.approx(1 / 100_001, abs=1e-9)  # drawn; the observed signs count once


def test_a_paired_difference_by_hand() -> None:
    def cells(*rows: Row) -> dict[tuple[str, str], dict[int, Row]]:
        found: dict[tuple[str, str], dict[int, Row]] = {}
        for each in rows:
            found.setdefault((each.shape, each.data), {})[each.seed] = each
        return found

    one = cells(
        row("a", "6x64", "x", 0, {1: 50.0}), row("a", "6x64", "x", 1, {1: 54.0}), row("a", "6x64", "y", 0, {1: 30.0})
    )
    two = cells(
        row("b", "6x64", "x", 0, {1: 40.0}), row("b", "6x64", "x", 1, {1: 48.0}), row("b", "6x64", "y", 0, {1: 33.0})
    )
    gap = paired(one, two)
    assert gap is not None
    assert gap["per_cell"]["6x64 x"] == {"mean": 8.0, "se": 2.0, "n": 2}  # 10 and 6: deviation 2.828, over sqrt(2)
    assert gap["per_cell"]["6x64 y"] == {"mean": -3.0, "se": None, "n": 1}
    assert (gap["mean"], gap["cells"], gap["runs"], gap["wins"], gap["losses"]) == (2.5, 2, 3, 1, 1)
    assert gap["se"] == pytest.approx(5.5)  # of 8 and -3: deviation 7.778, over sqrt(2)
    assert gap["clear_losses"] == []  # of one seed no error is known
    assert difference(gap) == "+2.50 ± 5.50, p 1; 2 cells: 1 won, 1 lost, 0 by more than their standard error"
    alone = paired(cells(row("a", "6x64", "x", 0, {1: 30.0})), two)
    assert alone is not None and difference(alone) == "-10.00; 1 cell: 0 won, 1 lost (one seed)"
    worse = paired(two, one)
    assert worse is not None and worse["clear_losses"] == ["6x64 x"]  # -8 with an error of 2
    assert paired(one, cells(row("b", "9x64", "x", 0, {1: 1.0}))) is None


def test_the_whole_ancestor_is_paired_with_every_shape() -> None:
    full = [row("full", "native", "x", 0, {1: 70.0}, kind="full", params=9)]
    grown = [row("a", shape, "x", 0, {1: value}) for shape, value in (("6x64", 60.0), ("9x64", 75.0))]
    gap = summarise(full + grown)["differences"]["a"]["full"]
    assert gap["per_cell"]["6x64 x"]["mean"] == -10.0 and gap["per_cell"]["9x64 x"]["mean"] == 5.0


def test_one_epoch_against_all_of_the_random_twin() -> None:
    rows = [row("a", "6x64", "x", 0, {0: 5.0, 1: 40.0, 2: 50.0}), row("a", "6x64", "y", 0, {0: 5.0, 1: 20.0})]
    rows += [row("random", "6x64", data, 0, {1: 9.0, 20: 30.0}, kind="random") for data in ("x", "y")]
    found = summarise(rows)["against_random"]
    assert found == {"a": {"cells": 2, "ahead": 1, "epochs": 20, "behind": {"6x64 y": -10.0}}}


def test_what_an_extraction_saves_by_hand() -> None:
    """The twin reaches the start's first epoch at its tenth: 10 x 4 - 3 FLOPs saved; elsewhere never: 20 x 4 - 3."""
    rows = [
        row("a", "6x64", data, 0, {1: 40.0, 2: 50.0}, train_flops=6.0, extraction_flops=1000.0) for data in ("x", "y")
    ]
    twin = {"kind": "random", "train_flops": 80.0}
    rows += [row("random", "6x64", "x", 0, {1: 9.0, 10: 41.0, 20: 60.0}, **twin)]
    rows += [row("random", "6x64", "y", 0, {1: 9.0, 10: 12.0, 20: 30.0}, **twin)]
    found = summarise(rows)["break_even"]["a"]
    assert found == {"cells": 2, "never_reached": 1, "saved_flops": (37 + 77) / 2, "trainings": 18}  # 1000 / 57 = 17.5


def test_of_runs_that_were_made_again_the_last_counts_and_the_rivals_are_those_without_training() -> None:
    rows = [row("a", "6x64", "x", 0, {1: 40.0}), row("a", "6x64", "x", 0, {1: 60.0}, recipe="other")]
    rows += [
        row("net2net", "6x64", "x", 0, {1: 30.0}, kind="method"),
        row("sws", "6x64", "x", 0, {1: 50.0}, kind="method", extraction_flops=9.0),
    ]
    found = summarise(rows)
    assert found["starts"]["a"]["accuracy"] == 60.0 and found["training_free"] == ["net2net"]
    told = as_text(found)
    assert "less net2net, paired:" in told and "+30.00; 1 cell: 1 won, 0 lost (one seed)" in told
    json.dumps(found, allow_nan=False)


# Plans ----------------------------------------------------------------------------------------------------------------


def test_a_plan_of_names_and_one_of_facts() -> None:
    plan = Plan.of(
        {
            "starts": {
                "lsamd-base": None,
                "cut": {"method": "net2net", "blocks": 4},
                "first": {},
                "random": {"recipe": {"lr": "1e-2"}},
            },
            "shapes": ["6x192"],
            "data": {"few": {"source": "signdigits", "per_class": 5}, "all": "signdigits"},
            "seeds": [0, 1],
            "ancestor": "somewhere",
            "recipe": {"lr": "1e-4"},
        }
    )
    kinds = {start.name: (start.kind, start.source) for start in plan.starts}
    assert kinds["lsamd-base"] == ("learngene", "lsamd-base") and kinds["cut"] == ("method", "net2net")
    assert kinds["first"] == ("method", "net2net") and plan.start("first").settings == {"select": "first"}
    assert plan.recipe_of(plan.start("cut"), 3) == Recipe(epochs=10, lr=1e-4, seed=3)
    assert plan.recipe_of(plan.start("cut"), 3, images=1000) == Recipe(epochs=3, lr=1e-4, seed=3)  # as finetune does it
    assert plan.recipe_of(plan.start("random"), 0).lr == 1e-2 and plan.recipe_of(plan.start("random"), 0).epochs == 20
    assert plan.epochs_tested(plan.start("cut"), 3) == (1, 2, 3)
    jobs = list(plan.jobs())
    assert len(jobs) == 2 * 2 * 4 and [job.seed for job in jobs] == [0] * 8 + [1] * 8  # seed by seed
    few, every = plan.data
    assert plan.identity(plan.start("cut"), few) != plan.identity(plan.start("cut"), every)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"starts": ["random"], "shapes": ["6x192"]}, "a plan without data"),
        ({"starts": ["random"], "shapes": ["6"], "data": ["signdigits"]}, "DEPTHxWIDTH"),
        ({"starts": ["random"], "shape": ["6x192"], "data": ["signdigits"]}, "did you mean shapes"),
        ({"starts": ["net2net"], "shapes": ["6x192"], "data": ["signdigits"]}, "--ancestor"),
        ({"starts": {"a": {"baseline": "best"}}, "shapes": ["6x192"], "data": ["signdigits"]}, "no baseline 'best'"),
        ({"starts": {"a": {"mehtod": "lets"}}, "shapes": ["6x192"], "data": ["signdigits"]}, "'mehtod' is none of"),
        ({"starts": {"a": {"method": "best"}}, "shapes": ["6x192"], "data": ["signdigits"]}, "no method 'best'"),
        ({"starts": ["random"], "shapes": ["6x192"], "data": ["signdigits"], "recipe": {"rate": 1}}, "'rate' in"),
        ({"starts": ["random"], "shapes": ["6x192"], "data": ["signdigits"], "head": "ridge"}, "whitened"),
        ({"starts": {"distilled": {"flops": 1e12}}, "shapes": ["6x192"], "data": ["signdigits"]}, "needs data"),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(said: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Plan.of(said)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(pico_learngene: Learngene, tmp_path: Path) -> Plan:
    """A learngene of reach 2-6 x 32-128, and random; 40 images, one epoch."""
    pico_learngene.save_pretrained(tmp_path / "pico")
    return Plan.of(
        {
            "starts": [str(tmp_path / "pico"), "random"],
            "shapes": ["2x64", "9x64"],
            "data": ["signdigits"],
            "images": 40,
            "tested": 30,
            "image_size": 32,
            "head": "means",
            "head_dim": 32,
            "recipe": {"epochs": 1, "batch_size": 20},
            "fresh": {"epochs": 2},
            "work": str(tmp_path / "made"),
        }
    )


def test_a_run_is_the_plain_sequence_of_calls_and_is_not_made_twice(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = list(compare(plan, out, workers=1))
    assert [each.out_of_reach for each in done if each.job.shape == "9x64"] == [
        True,
        False,
    ]  # the learngene's, random's
    rows = {(each.kind, each.shape): each for each in read_rows(out)}
    assert set(rows) == {("learngene", "2x64"), ("random", "2x64"), ("random", "9x64")}
    train = load_images("signdigits", split="train", size=32, limit=40)
    test = load_images("signdigits", split="test", size=32, limit=30)
    model = expand(
        Learngene.load(tmp_path / "pico/learngene.safetensors"), depth=2, width=64, num_labels=10, image_size=32, seed=0
    )
    fit_head(model, train, how="means")
    accuracies = [evaluate(model, test).accuracy]
    for _ in finetune(model, train, recipe=Recipe(epochs=1, lr=3e-4, batch_size=20)):
        pass
    accuracies.append(evaluate(model, test).accuracy)
    found = rows["learngene", "2x64"]
    assert [found.reached()[epoch] for epoch in (0, 1)] == pytest.approx(accuracies, abs=1e-4)
    shape = ViTShape.of(model)
    assert (found.params, found.flops, found.images_seen) == (shape.params(), shape.flops(), 40)
    assert found.train_flops == shape.flops() * (3 * 40 + 40)  # the head looked at all 40 once
    assert list(rows["random", "2x64"].reached()) == [0, 1, 2] and rows["random", "2x64"].images_seen == 80
    again = list(compare(plan, out, workers=2))
    assert [each.row for each in again] == [None]  # what has no such shape is asked again, and nothing is written
    assert len(read_rows(out)) == 3


def test_what_began_with_the_same_weights_is_not_trained_twice(plan: Plan, tmp_path: Path) -> None:
    """A copy of the learngene under another name, with other facts in its file, is another start of the same runs."""
    out, pico = tmp_path / "rows.csv", Learngene.load(tmp_path / "pico/learngene.safetensors")
    dataclasses.replace(pico, provenance={"images_seen": 7}).save_pretrained(tmp_path / "copy")
    both = dataclasses.replace(plan, starts=(plan.starts[0], Start.of(str(tmp_path / "copy"))), shapes=("2x64",))
    first, second = (done.row for done in compare(both, out, workers=1))
    assert first is not None and second is not None
    assert (first.same_as, second.same_as) == ("", first.start) and second.accuracies == first.accuracies
    assert second.extraction_images == 7 and second.digest != first.digest and second.wall_seconds == first.wall_seconds


def test_growth_settings_of_a_learngene_are_a_start_of_their_own(plan: Plan, tmp_path: Path) -> None:
    """Five blocks of three: by default copies share an update, and with "repeat" copy each writes all of it."""
    out, name = tmp_path / "rows.csv", plan.starts[0].name
    copied = Start.of("copied", {"learngene": name, "settings": {"repeat": "copy"}})
    both = dataclasses.replace(plan, starts=(plan.starts[0], copied), shapes=("5x64",))
    rows = {done.row.start: done.row for done in compare(both, out) if done.row}
    pico = Learngene.load(tmp_path / "pico/learngene.safetensors")
    for start, repeat in ((name, "share"), ("copied", "copy")):
        changed = dataclasses.replace(pico, settings={**pico.settings, "repeat": repeat})
        grown = expand(changed, depth=5, width=64, num_labels=10, image_size=32, seed=0)
        assert rows[start].begun == state_digest(grown)[:16], start
    assert rows[name].recipe != rows["copied"].recipe and len({row.begun for row in rows.values()}) == 2
    wrong = dataclasses.replace(both, starts=(Start.of("odd", {"learngene": name, "settings": {"repeated": "copy"}}),))
    (failed,) = compare(wrong, out)
    assert isinstance(failed.error, SettingsError)


def test_each_process_of_a_launcher_takes_its_share(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(rank: int) -> list[Job]:
        for name, value in zip(_jobs.LAUNCHER, (rank, 2, rank), strict=False):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(_jobs, "run_all", lambda todo, work, workers: ((job, None, None) for job in todo))
        return [done.job for done in compare(plan, tmp_path / "none.csv", workers=1)]

    jobs = list(plan.jobs())
    assert told(0) == jobs[::2] and told(1) == jobs[1::2]


def test_the_command_tells_and_summarises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for each in (
        row("a", "6x64", "x", 0, {0: 1.0, 1: 40.0}),
        row("random", "6x64", "x", 0, {1: 9.0, 20: 30.0}, kind="random"),
    ):
        _jobs.append_row(tmp_path / "compared.csv", each)
    shown = run("compare", "--summarise")
    assert shown.code == 0 and "a after 1 epoch is ahead of random after 20 in 1 of 1 cells" in shown.out
    facts = json.loads(run("compare", "--summarise", "--json").out)
    assert facts["starts"]["a"]["accuracy"] == 40.0 and facts["path"] == "compared.csv"
    new, broken = ("compare", "random", "--shapes", "1x64", "--out", "new.csv"), tmp_path / "broken"
    for name in ("train/a/0", "train/b/0", "train/b/1", "test/a/0", "test/b/0"):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(broken / f"{name}.png")
    (broken / "train" / "a" / "9.png").write_text("no image")
    for args, said in (
        (("compare",), "a plan without starts"),
        (("compare", "--summarise", "--out", "none.csv"), "holds no runs"),
        ((*new, "--data", "./nowhere"), "no file or folder './nowhere'"),
        ((*new, "--data", "signdigits", "--data", "./nowhere"), "no file or folder './nowhere'"),
        ((*new, "--data", str(broken)), "all 1 runs failed"),
        (("compare", "no-such-learngene", "--shapes", "6x64", "--data", "signdigits"), "no-such-learngene"),
    ):
        refused = run(*args)
        assert refused.code == 1 and said in refused.err and "Traceback" not in refused.err, (args, refused)
        assert not (tmp_path / "new.csv").exists(), "before the data is looked at, nothing is run"
    assert run("compare", "random", "--seeds", "a").code == 2


def test_a_file_of_other_rows_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match="no column start"):
        read_rows(file)
    assert file.read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\nfrom learngene_hub import _jobs\n\n"
        "def work(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(60)\n\n"
        "if __name__ == '__main__':\n    list(_jobs.run_all([os.sys.argv[1]], work, 1))\n"
    )
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(script), str(file)])
    _until(lambda: file.exists() and file.read_text() != "", 60)
    worker = int(file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not _alive(worker), 15)


def _until(true: Callable[[], bool], seconds: float) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


# Mimetic starts -------------------------------------------------------------------------------------------------------


def test_mimetic_attention_has_the_products_that_the_paper_asks() -> None:
    shape = ViTShape(depth=1, width=64, heads=2, head_dim=32, patch=8, image_size=32, classes=10)
    model = build_pico(shape)
    write_mimetic(model, seed=4)
    attention, width = model.blocks[0].attn, 64
    query, key, value = attention.qkv.weight.detach().chunk(3)
    generator = torch.Generator().manual_seed(4)
    for head in range(2):
        wanted = 0.7 * torch.randn(width, width, generator=generator) / 8 + 0.7 * torch.eye(width)
        rows = slice(32 * head, 32 * head + 32)
        u, s, vh = torch.linalg.svd(wanted)
        best = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in range(32))  # Eckart and Young
        torch.testing.assert_close(query[rows].T @ key[rows], best, atol=1e-4, rtol=1e-4)
    wanted = 0.4 * torch.randn(width, width, generator=generator) / 8 - 0.4 * torch.eye(width)
    torch.testing.assert_close(value.T @ attention.proj.weight.detach().T, wanted, atol=1e-4, rtol=1e-4)
    table = model.pos_embed[0].detach()
    assert not table[0].any() and float(table[1:].std()) == pytest.approx(0.2, rel=1e-5)


def test_sinusoids_by_hand() -> None:
    table = sinusoids(2, 8)  # frequencies 1 and 1/100; sines and cosines of the row, then of the column
    angle = torch.tensor([1.0, 0.01])
    one = torch.cat([angle.sin(), angle.cos()])
    none = torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(
        table, torch.stack([torch.cat(p) for p in ((none, none), (none, one), (one, none), (one, one))])
    )


def test_starts_say_what_they_are() -> None:
    assert Start.of("random").is_fresh and Start.of("mimetic").is_fresh and not Start.of("front").is_fresh
    with pytest.raises(LearngeneError, match="one of them would work"):
        Start.of("a", {"method": "lets", "learngene": "b"})

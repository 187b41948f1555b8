"""`learngene pool` and `learngene select`: options that go together, names, sizes, hints, interrupted runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import RESNET
from pools import ONCE, TINY, look
from test_pool_cli import QUICK, SMALL, Call
from test_pool_cli import here as here  # fixtures
from test_pool_cli import run as run
from timm.models._hub import save_for_hf

from learngene_hub import _pool_add, _pool_choose, _pool_file, _pool_options, _pool_select, errors, hub, pool, training
from learngene_hub import data as data_sets
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool, Selection
from learngene_hub.registry import ENVIRONMENT
from learngene_hub.training import Step


@pytest.fixture
def mine(here: Path, run: Call) -> Path:
    """A pool of one entry in ``mine``."""
    run("pool", "create", "mine", "anchor", *SMALL)
    run("pool", "add", "mine", *QUICK)
    return here / "mine"


def entry_of(folder: Path) -> Path:
    (path,) = (folder / "entries").iterdir()
    return path


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_images_have_64_pixels_where_the_patches_tile_them(here: Path, run: Call) -> None:
    made = run("pool", "create", "usual", "anchor")
    assert Pool.load("usual").manifest.key.image_size == 64 != TINY.image_size
    assert "Images of 64 px, as all commands take where none is asked; --image-size 16 takes the anchor's" in made.err
    asked = run("pool", "create", "asked", "anchor", "--image-size", 32)
    assert Pool.load("asked").manifest.key.image_size == 32 and "Images of" not in asked.err
    assert "[64; the anchor's if its patches don't tile that]" in " ".join(run("pool", "create", "--help").out.split())


def test_the_anchors_size_is_taken_where_its_patches_do_not_tile_64(here: Path, run: Call) -> None:
    from conftest import build_pico
    from planted import FACTS

    from learngene_hub import factory

    odd = replace(TINY, patch=5, image_size=15)
    factory.extract("net2net", build_pico(odd), {}, facts=FACTS).save_pretrained("odd")
    made = run("pool", "create", "other", "odd")
    assert Pool.load("other").manifest.key.image_size == 15 and "Images of 15 px\n" in made.err


def test_a_pool_and_a_mixture_grow_at_the_size_of_the_pool(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", "--image-size", 32)
    run("pool", "add", "mine", *QUICK)
    run("select", "mine", "--data", "signdigits", "--limit", 20, "--unlabelled", "--out", "mixed")
    quick = ["--limit", 8, "--epochs", 1, "--batch-size", 8]
    for name in ("mine", "mixed"):
        assert run("show", name, "--json").json()["descendant"]["image_size"] == 32
        fits = run("fit-size", name, "--max-params", "1M", "--json").json()
        assert fits["taken"]["flops"] == run("show", name, "--json", "--max-params", "1M").json()["descendant"]["flops"]
        assert run("expand", name, f"{name}-grown", "--json").json()["image_size"] == 32
        assert run("finetune", name, "--data", "signdigits", *quick, "--out", f"{name}-tuned").code == 0
        assert run("finetune", f"{name}-tuned", "--data", "signdigits", *quick, "--image-size", 32, "--out", "x",
                   "--yes").code == 0  # fmt: skip
    asked = run("expand", "mixed", "other", "--image-size", 16, "--json").json()
    assert asked["image_size"] == 16
    run("pool", "create", "second", "mixed")
    assert Pool.load("second").manifest.key.image_size == 32


# --- Options of add ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *(["--epochs", 3], ["--lr", 0.1], ["--batch-size", 8], ["--dtype", "float16"], ["--precision", "bf16"]),
        *(["--ancestor", "a"], ["--max-residual", 0.5], ["--data", "signdigits"], ["--limit", 9], ["--split", "test"]),
        *(["--seed", 2], ["--resume"], ["--skip-unreadable"], ["--ancestor-weights", "w"]),
    ],
)
def test_an_entry_that_is_made_takes_no_option_of_making_one(mine: Path, run: Call, options: list[Any]) -> None:
    found = run("pool", "add", "mine", "--entry", entry_of(mine), "--name", "x", *options)
    assert (found.code, found.out) == (2, "")
    assert f"--entry and {options[0]} asked; " in found.err and Pool.load("mine").names == ("signdigits",)


def test_images_that_an_epoch_leaves_out_are_told(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    odd = ["--data", "signdigits", "--limit", 40, "--epochs", 1, "--batch-size", 32]
    said = (
        "signdigits: an epoch trains on 32 of 40 images, drawn anew each time, in whole batches of 32; --batch-size 20 "
        "takes 40"
    )
    added = run("pool", "add", "mine", *odd)
    assert added.code == 0 and said in added.err.splitlines()
    tuned = run("finetune", "mine", *odd, "--test-split", "", "--out", "tuned")
    assert tuned.code == 0 and said in tuned.err.splitlines()
    assert "an epoch trains on" not in run("pool", "add", "mine", *QUICK, "--name", "even").err
    few = run("pool", "add", "mine", *odd[:3], 20, *odd[4:], "--name", "few")
    assert few.code == 0 and "an epoch trains on" not in few.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ancestor", "a", "--lr", 0.1], "--lr asked with --ancestor and without --epochs"),
        (["--ancestor", "a", "--batch-size", 8], "--batch-size asked with --ancestor and without --epochs"),
        (["--ancestor", "a", "--precision", "bf16"], "--precision asked with --ancestor and without --epochs"),
        (["--ancestor", "a", "--resume"], "--resume asked with --ancestor and without --epochs"),
        (["--max-residual", 0.5], "--max-residual asked without --ancestor"),
        (["--ancestor", "a", "--epochs", 2, "--max-residual", 0.5], "--max-residual and --epochs asked"),
        (["--ancestor", "a", "--max-residual", "nan"], "--max-residual nan asked; it is a share, from 0 to 1"),
        (["--ancestor", "a", "--max-residual", -1], "--max-residual -1 asked"),
        (["--ancestor", "a", "--max-residual", "inf"], "--max-residual inf asked"),
    ],
)
def test_options_without_effect_are_refused(here: Path, run: Call, options: list[Any], told: str) -> None:
    found = run("pool", "add", "mine", "--data", "signdigits", *options)
    assert (found.code, found.out) == (2, "") and told in found.err, found.err


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my photos", "my-photos"),
        ("pacs/train.parquet", "pacs"),
        ("pacs/data/train-00000-of-00002.parquet", "pacs"),
        ("pacs/art.parquet", "art"),
        ("pacs/test", "pacs"),
        ("org/some_set", "some_set"),
        ("_x.y_/", "x.y"),
        ("a" * 63 + ".b", "a" * 63),
        ("signdigits", "signdigits"),
        ("Ärger & Co", "rger-Co"),
    ],
)
def test_an_entry_is_named_after_its_data(data: str, name: str) -> None:
    assert _pool_file.name_after(data_sets.called(data)) == name


def test_a_file_without_a_folder_is_named_after_the_one_it_is_in(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pacs").mkdir()
    (tmp_path / "pacs" / "train.parquet").touch()
    monkeypatch.chdir(tmp_path / "pacs")
    assert data_sets.called("train.parquet") == data_sets.called(".") == "pacs"
    assert data_sets.called("/data/train") == "train"  # and not as the root of the disk


def test_data_of_which_no_name_can_be_made_need_one(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    line = run("pool", "add", "mine", "--data", "写真").refused()
    assert "--name NAME) would work" in line


# --- Where a pool is --------------------------------------------------------------------------------------------------


def test_a_pool_that_is_elsewhere_is_pulled_first(
    mine: Path, here: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"name": "rp", "method": "net2net", "uri": "mine", "sha256": Pool.load("mine").anchor.digest}]
    rows[0] |= {"license": "apache-2.0", "card": "registry.yaml", "description": "A pool."}
    size = (mine / "learngene.safetensors").stat().st_size
    (here / "registry.yaml").write_text(json.dumps([rows[0] | {"bytes": size}]))
    monkeypatch.setenv(ENVIRONMENT, str(here / "registry.yaml"))
    for name in ("rp", "org/pool"):
        line = run("pool", "add", name, *QUICK).refused()
        assert f"no folder '{name}'" in line and line.endswith(f"(next: learngene pool pull {name} FOLDER)")
    assert run("verify", "rp").code == 0 and run("registry", "check", "registry.yaml").code == 0
    again = run("registry", "add", "mine", "--name", "rp2", "--registry", "registry.yaml")
    assert "mine is a pool: the row pins its anchor; `learngene verify rp2` looks at all of it" in again.err
    entry_of(mine).unlink()
    found = run("verify", "rp")
    assert found.code == 1 and "rp\tno\t" in found.out
    assert "the pool that it is the anchor of: " in found.err and "is missing" in found.err
    assert found.err.splitlines()[0].endswith("(next: learngene pool verify rp)")
    assert run("verify", "mine").code == 1
    checked = run("registry", "check", "registry.yaml", "--json")
    assert checked.code == 1 and "is missing" in json.loads(checked.out)[0]["problems"][0]
    line = run("select", "mine", "--data", "signdigits").refused()
    assert line.endswith("(next: learngene pool verify mine)")
    assert run("pool", "add", "mine", *QUICK).refused().endswith("(next: learngene pool verify mine)")
    assert run("pool", "verify", "mine").refused().endswith("or a copy of your own)")


def test_commands_of_a_learngene_say_that_a_pool_is_one(mine: Path, run: Call) -> None:
    said = "mine is a pool, and its anchor alone is used here: "
    show = run("show", "mine")
    assert said + "`learngene pool show mine`" in show.err and "learngene select mine" in show.err
    grown = run("expand", "mine", "grown", "--num-labels", 3)
    assert said + "`learngene select mine --data FEW_IMAGES --out DIR` writes a mixture" in grown.err
    tuned = run("finetune", "mine", "--data", "signdigits", "--limit", 8, "--epochs", 1, "--test-split", "",
                "--image-size", 16, "--batch-size", 8, "--out", "tuned")  # fmt: skip
    assert tuned.code == 0 and said in tuned.err
    sent = run("push", "mine", "no-repository")
    assert said + "`learngene pool push mine no-repository` sends all of it" in sent.err
    assert "is a pool" not in run("show", "anchor").err and "is a pool" not in run("show", "mine", "--json").err


def test_list_has_a_row_for_each_entry(mine: Path, run: Call) -> None:
    path = entry_of(mine)
    row = {"name": "signdigits", "sha256": path.stem, "bytes": path.stat().st_size, "images": 40, "classes": 10}
    assert run("pool", "list", "mine", "--json").json() == [row]
    lines = run("pool", "list", "mine").out.splitlines()
    assert lines[0] == "name\tsha256\tbytes\timages\tclasses"
    assert lines[1].startswith(f"signdigits\t{path.stem}\t") and lines[1].endswith("\t40\t10")
    assert run("pool", "list", "mine", "-q").out == run("pool", "show", "mine", "-q").out == "signdigits\n"


def test_a_shape_that_extract_refuses_names_a_command_that_works(here: Path, run: Call) -> None:
    save_for_hf(RESNET.build(), "cnn", safe_serialization=True)
    line = run("extract", "net2net", "cnn", "--out", "x").refused()
    assert line.endswith("(next: learngene methods net2net)")


# --- Selections -------------------------------------------------------------------------------------------------------


def test_an_empty_selection_says_why(mine: Path, run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"0": 0.7, "0.3": 0.6, "1": 0.8}

    def chosen(self: Pool, *_: Any, **given: Any) -> pool.Selection:
        return pool.Selection(
            anchor=self.anchor.digest, pool=self.manifest.digest, entries=(), abstained=False, residual=0.1,
            threshold=0.2, images=20, labelled=True, scores=scores, rule=given.get("rule", "tals"),
        )  # fmt: skip

    monkeypatch.setattr(Pool, "select", chosen)
    found = run("select", "mine", "--data", "signdigits", "--limit", 20)
    assert found.code == 0 and "entries\t-\n" in found.out
    assert "all weights fell below the least, 0.05: the anchor alone is selected" in found.err
    scores["0"] = 0.6
    found = run("select", "mine", "--data", "signdigits", "--limit", 20)
    assert "images of it that were held out are read as well without them: the anchor alone is selected" in found.err
    assert "rule nearest selects no entry" in run("select", "mine", "--data", "signdigits", "--rule", "nearest").err
    assert run("select", "mine", "--data", "signdigits", "--json").json()["entries"] == []


def test_an_unwritable_place_is_told_before_the_selection(
    mine: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("selected")

    monkeypatch.setattr(Pool, "select", never)
    Path("file").write_text("x")
    for place in ("file/mixed", "file/mixed.safetensors", "nowhere/mixed.safetensors", "/proc/mixed"):
        assert (
            f"{place} cannot be written: "
            in run("select", "mine", "--data", "signdigits", "--limit", 20, "--out", place).refused()
        )
    assert not Path("nowhere").exists()


# --- Interrupted ------------------------------------------------------------------------------------------------------


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the epoch after so many."""

    def interrupted(steps: Iterator[Step], **_: Any) -> Iterator[Step]:
        for step in steps:
            if step.epoch == epochs:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(training, "show_progress", interrupted)


LONGER = [*QUICK[:4], "--epochs", "3", "--batch-size", "20"]


def told(path: Path) -> Any:
    return Learngene.load(path).tensors


def test_an_interrupted_training_goes_on_and_ends_in_the_same_entry(
    here: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pool", "create", "straight", "anchor", *SMALL)
    shutil.copytree("straight", "mine")
    run("pool", "add", "straight", *LONGER)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        stopped = run("pool", "add", "mine", *LONGER)
    state = here / "mine.signdigits.training-state"
    assert stopped.code == 130 and state.is_dir() and Pool.load("mine").names == ()
    assert "(next: the same command with --resume)" in stopped.err
    begun = run("pool", "add", "mine", *LONGER).refused()
    assert "--resume goes on with it, --yes starts afresh" in begun
    assert begun.endswith("(next: the same command with --resume)")
    other = run("pool", "add", "mine", *LONGER, "--lr", 0.1, "--resume").refused()
    assert "lr 0.0008 there, 0.1 asked" in other
    assert other.endswith("(next: the same command with --yes in place of --resume starts afresh)")
    done = run("pool", "add", "mine", *LONGER, "--resume", "--json").json()
    assert (done["steps"], done["entries"]) == (6, 1) and not state.exists()
    ours, theirs = told(entry_of(here / "mine")), told(entry_of(here / "straight"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = run("pool", "add", "mine", *LONGER, "--resume")
    assert again.code == 0 and "signdigits is finished already" in again.err and len(Pool.load("mine")) == 1


def test_a_training_whose_name_was_taken_meanwhile_is_kept(
    here: Path, run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)

    def beaten(steps: Iterator[Step], **_: Any) -> Iterator[Step]:
        yield from steps
        Pool.load("mine").add(look(1), name="x", recipe=ONCE)

    monkeypatch.setattr(training, "show_progress", beaten)
    line = run("pool", "add", "mine", *QUICK, "--name", "x").refused()
    assert "name x was given to another entry" in line
    assert line.endswith("(next: learngene pool add mine --entry FILE --name OTHER)")
    assert not list(here.glob("*.training-state")) and Pool.load("mine").names == ("x",)
    (kept,) = {path.stem for path in (here / "mine" / "entries").iterdir()} - {Pool.load("mine").row("x").sha256}
    assert run("pool", "add", "mine", "--entry", f"mine/entries/{kept}.safetensors", "--name", "y").code == 0
    assert run("pool", "verify", "mine").code == 0


def test_a_run_that_may_be_anothers_is_not_removed(here: Path, run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert run("pool", "add", "mine", *LONGER, "--name", "x").code == 130
    shutil.move("mine.x.training-state", "aside")
    run("pool", "add", "mine", *QUICK, "--name", "x", "--seed", 5)
    shutil.move("aside", "mine.x.training-state")
    line = run("pool", "add", "mine", *LONGER, "--name", "x", "--resume").refused()
    assert "x is in the pool already" in line and "renamed to mine.OTHER.training-state" in line
    shutil.move("mine.x.training-state", "mine.OTHER.training-state")
    done = run("pool", "add", "mine", *LONGER, "--name", "OTHER", "--resume", "--json").json()
    assert done["steps"] == 6 and Pool.load("mine").names == ("x", "OTHER")


def test_yes_starts_an_interrupted_training_afresh(here: Path, run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert run("pool", "add", "mine", *LONGER, "--name", "x").code == 130
    done = run("pool", "add", "mine", *LONGER, "--name", "x", "--lr", 0.001, "--yes", "--json").json()
    assert done["steps"] == 6 and not (here / "mine.x.training-state").exists()
    fresh = run("pool", "add", "mine", *LONGER, "--name", "y", "--resume")
    assert fresh.code == 0 and "holds no interrupted run; starting" in fresh.err


def test_the_state_lies_beside_the_pool(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _pool_add.state_of("a/mine/", "x") == Path("a/mine.x.training-state")
    (here / "mine").mkdir()
    monkeypatch.chdir(here / "mine")
    assert _pool_add.state_of(".", "x") == here / "mine.x.training-state"
    assert issubclass(_pool_options.ElsewhereError, errors.StoreError)
    assert hub.POOL_FILE == _pool_file.MANIFEST


def test_a_task_that_is_refused_is_told_what_would_take_it() -> None:
    found = Selection(
        anchor="a", pool="p", entries=(), abstained=True, residual=0.5, threshold=0.2, images=10, labelled=True
    )
    told = _pool_choose._why_none(found, "photos/")
    assert "2.5 times as far as 95 % of samples of 10 images of their own data)" in told
    assert "--tolerance 2.6 allows more" in told
    many = _pool_choose._why_none(replace(found, images=50), "photos/")
    assert "samples of 10 images of their own data; with labels of that few, for they judge the rest)" in many
    plain = _pool_choose._why_none(replace(found, images=50, labelled=False), "photos/")
    assert "samples of 50 images of their own data)" in plain
    assert _pool_choose._facts(replace(found, images=50), plain=True)["threshold_images"] == 10
    assert _pool_choose.SAMPLED == _pool_select.SAMPLE

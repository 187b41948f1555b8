"""The commands extract and finetune when they are interrupted, and their options of size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_pico
from PIL import Image
from planted import planted, variant
from typer.testing import CliRunner

from learngene_hub import _resume, _state, cli
from learngene_hub.learngene import Learngene

SETTINGS = ["epochs=4", "steps_per_epoch=3", "batch_size=8", "alpha_lr=0.5", "average=0.9", "distil=1.0"]
SETTINGS += ["distil_size=32", 'distil_on=["signdigits"]', "alone=0.3"]
# No learned rows: the pseudo-inverse behind them rounds differently from process to process, interrupted or not.
STAGE = ["widths=[32,96]", "epochs=2", "steps_per_epoch=3", "batch_size=4", "score_images=8"]
EXTRACT = ["extract", "lsamd", "ancestor", "--data", "signdigits", "--data", "other.parquet", "--image-size", "16"]
EXTRACT += ["--limit", "16", *(f"--set={pair}" for pair in SETTINGS), *(f"--widen={pair}" for pair in STAGE)]

# Runs the command line in a process of its own, which sends itself a signal at one step of one training loop.
SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
from learngene_hub import _state, training
from learngene_hub.cli import main
loop, step, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:4]
_state.SAVE_SECONDS = 0.0
loops = []
def show(steps, **_):
    loops.append(1)
    for found in steps:
        yield found
        if (len(loops), found.step) == (loop, step):
            os.kill(os.getpid(), getattr(signal, name))
training.show_progress = show
main()
"""

Call = Callable[..., Any]


def save_ancestor(folder: str, seed: int) -> None:
    """A folder of a pico ViT."""
    from learngene_hub.descendant import Descendant

    planted(build_pico(variant("token"), seed)).save(f"{folder}.safetensors")
    Descendant.from_learngene(f"{folder}.safetensors", seed=seed).save_pretrained(folder)


@pytest.fixture
def run() -> Call:
    def call(*args: str | Path) -> Any:
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an ancestor and a second data set; the state is written after every update."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_state, "SAVE_SECONDS", 0.0)
    save_ancestor("ancestor", 0)
    sample = Path(cli.__file__).parent / "samples" / "signdigits" / "test.parquet"
    Path("other.parquet").write_bytes(sample.read_bytes())
    return tmp_path


def killed(loop: int, step: int, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The command, ended by a signal at a step of its training loop number ``loop``."""
    package = str(Path(cli.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(loop), str(step), name, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def told(path: Path | str) -> str:
    """The digest of a learngene without the seconds that it took."""
    learngene = Learngene.load(path)
    facts = json.loads(json.dumps(dict(learngene.provenance)))
    facts.pop("seconds")
    return replace(learngene, provenance=facts).digest


@pytest.mark.parametrize(
    ("loop", "step", "name"),
    [
        pytest.param(1, 2, "SIGKILL", marks=pytest.mark.slow),  # phase A
        (1, 7, "SIGKILL"),  # phase B
        pytest.param(1, 7, "SIGINT", marks=pytest.mark.slow),
        pytest.param(1, 11, "SIGKILL", marks=pytest.mark.slow),  # phase C
        pytest.param(2, 3, "SIGKILL", marks=pytest.mark.slow),  # the width stage
        (2, 3, "SIGINT"),
    ],
)
def test_a_killed_extraction_resumes_to_the_same_learngene(
    run: Call, here: Path, monkeypatch: pytest.MonkeyPatch, loop: int, step: int, name: str
) -> None:
    assert run(*EXTRACT, "--out", "straight").exit_code == 0
    died = killed(loop, step, name, *EXTRACT, "--out", "stopped")
    if name == "SIGINT":
        assert died.returncode == 130 and len(died.stderr.splitlines()) == 1, died.stderr
        assert "the same command with --resume" in died.stderr
    else:
        assert died.returncode == -signal.SIGKILL
    assert sorted(path.name for path in Path("stopped").iterdir()) == [_resume.STATE]
    steps = _counted(monkeypatch)
    done = run(*EXTRACT, "--out", "stopped", "--resume", "--json")
    assert done.exit_code == 0, done.stderr
    assert told("stopped/learngene.safetensors") == told("straight/learngene.safetensors")
    assert steps == ([*range(step, 13), *range(1, 7)] if loop == 1 else [*range(step, 7)])
    assert [path.name for path in Path("stopped").iterdir()] == ["learngene.safetensors"]


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all steps from now on."""
    from learngene_hub import training

    numbers: list[int] = []

    def show(steps: Any, **_: Any) -> Any:
        for step in steps:
            numbers.append(step.step)
            yield step

    monkeypatch.setattr(training, "show_progress", show)
    return numbers


def _stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C at a step."""
    from learngene_hub import training

    def show(steps: Any, **_: Any) -> Any:
        for step in steps:
            yield step
            if step.step == at:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "show_progress", show)


def test_a_state_lies_beside_a_file_and_is_never_dropped_unasked(
    run: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stopping(patch, 5)
        stopped = run(*EXTRACT, "--out", "made/wide.safetensors")
    assert stopped.exit_code == 130 and "--resume" in stopped.stderr
    state = Path("made/wide.training-state")
    assert [path.name for path in Path("made").iterdir()] == [state.name]
    again = run(*EXTRACT, "--out", "made/wide.safetensors")
    assert again.exit_code == 1 and len(again.stderr.splitlines()) == 1
    assert f"{state} holds an interrupted run; --resume goes on with it, --yes starts afresh" in again.stderr
    other = run(*EXTRACT, "--out", "made/wide.safetensors", "--resume", "--set", "lr=1e-4")
    assert other.exit_code == 1 and "setting lr 0.0005 there, 0.0001 asked" in other.stderr
    assert len(other.stderr.splitlines()) == 1 and (state / "search" / _state.STATE_FILE).is_file()
    steps = _counted(monkeypatch)
    assert run(*EXTRACT, "--out", "made/wide.safetensors", "--yes").exit_code == 0
    assert steps == [*range(1, 13), *range(1, 7)]
    assert [path.name for path in Path("made").iterdir()] == ["wide.safetensors"]


def test_an_interruption_before_a_state_says_so(run: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state, "SAVE_SECONDS", 60.0)
    plain = [part for part in EXTRACT if not part.startswith(("--widen", "--set=distil"))]
    with monkeypatch.context() as patch:
        _stopping(patch, 5)
        stopped = run(*plain, "--out", "made")
    assert stopped.exit_code == 130 and "before a state was written" in stopped.stderr
    assert "--resume" not in stopped.stderr and not Path("made").exists()
    assert run(*plain, "--out", "made", "--resume").exit_code == 0  # nothing to go on with: from the start


FINETUNE = ["finetune", "ancestor", "--data", "signdigits", "--limit", "32", "--batch-size", "8", "--epochs", "3"]


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_killed_finetune_resumes_to_the_same_weights(run: Call, here: Path, name: str) -> None:
    assert run(*FINETUNE, "--out", "straight").exit_code == 0
    died = killed(1, 7, name, *FINETUNE, "--out", "stopped")
    assert died.returncode == (130 if name == "SIGINT" else -signal.SIGKILL), died.stderr
    done = run(*FINETUNE, "--out", "stopped", "--resume", "--json")
    assert list(json.loads(done.stdout)["epochs"]) == ["2", "3"]
    assert Path("stopped/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()
    assert not Path("stopped", _resume.STATE).exists()


def test_a_finetune_of_another_model_or_other_images_is_refused(
    run: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stopping(patch, 7)
        assert run(*FINETUNE, "--out", "stopped").exit_code == 130
    again = run(*FINETUNE, "--out", "stopped")
    assert again.exit_code == 1 and "--resume goes on with it" in again.stderr
    save_ancestor("other", 1)
    for wrong, line in (
        ([part.replace("ancestor", "other") for part in FINETUNE], "weights at the start"),
        ([*FINETUNE, "--train-split", "test", "--test-split", ""], "data images"),
        ([*FINETUNE, "--lr", "1e-3"], "lr 0.0003 there, 0.001 asked"),
    ):
        refused = run(*wrong, "--out", "stopped", "--resume")
        assert refused.exit_code == 1 and line in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert run(*FINETUNE, "--out", "stopped", "--resume").exit_code == 0


def test_image_size_is_the_name_and_size_still_works(run: Call, here: Path) -> None:
    for command in ("extract", "finetune"):
        page = run(command, "--help").stdout
        assert "--image-size" in page and " --size" not in page
    old = [part.replace("--image-size", "--size") for part in EXTRACT]
    both = run(*EXTRACT, "--size", "32", "--out", "x")
    assert both.exit_code == 1 and "--image-size 16 and --size 32 asked" in both.stderr
    assert run(*old, "--out", "old").exit_code == 0
    assert Learngene.load("old/learngene.safetensors").provenance["image_size"] == 16
    grown = ["--depth", "2", "--width", "32", "--heads", "1", "--data", "signdigits", "--limit", "16", "--epochs", "1"]
    for number, option in enumerate(("--image-size", "--size")):
        done = run("finetune", "old", *grown, option, "32", "--out", f"t{number}")
        assert done.exit_code == 0, done.stderr
        assert json.loads(Path(f"t{number}/config.json").read_text())["model_args"]["img_size"] == 32


@pytest.mark.parametrize(
    ("option", "line"),
    [("--image-size=16", "--image-size 16 asked; ancestor has 32"), ("--heads=3", "--heads 3 asked; ancestor has 2")],
)
def test_a_saved_model_has_its_sizes(run: Call, here: Path, option: str, line: str) -> None:
    refused = run(*FINETUNE, option, "--out", "x")
    assert refused.exit_code == 1 and line in refused.stderr and not Path("x").exists()


def test_heads_that_do_not_fit_a_width_are_refused(run: Call, here: Path, pico_learngene: Learngene) -> None:
    pico_learngene.save_pretrained("pico")
    asked = ["finetune", "pico", "--data", "signdigits", "--limit", "16", "--image-size", "32", "--out", "x"]
    assert "2 heads would work" in run(*asked, "--width", "64", "--heads", "4").stderr


def test_a_method_that_needs_no_data_is_asked_without(run: Call, here: Path) -> None:
    assert run("extract", "net2net", "ancestor", "--out", "made").exit_code == 0
    assert sorted(path.name for path in Path("made").iterdir()) == ["learngene.safetensors"]
    refused = run("extract", "lsamd", "ancestor", "--out", "x")
    assert refused.exit_code == 1 and "0 data sets asked" in refused.stderr and not Path("x").exists()
    useless = run("extract", "front", "ancestor", "--out", "x", "--data", "signdigits", "--widen", "widths=[32]")
    assert useless.exit_code == 1 and "learngenes of front have none" in useless.stderr


def _folder(place: Path, splits: dict[str, tuple[str, ...]], seed: int = 0) -> Path:
    """Class folders of four noisy images each; each class has a colour of its own."""
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "black": (0, 0, 0)}
    drawn = np.random.default_rng(seed)
    for split, classes in splits.items():
        for name in classes:
            (place / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.clip(np.array(colours[name]) + drawn.integers(-60, 60, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / split / name / f"{i}.png")
    return place


def test_labels_count_as_the_model_counts_them(run: Call, here: Path) -> None:
    """A split that lacks a class, or a model's classes in another order, would silently be numbered anew."""
    small = ["--batch-size", "4", "--epochs", "8", "--lr", "3e-3", "--head", "means", "--json"]
    sizes = ["--image-size", "16"]
    _folder(here / "all", {"train": ("blue", "green", "red"), "test": ("green", "red")})
    done = run("finetune", "ancestor.safetensors", *sizes, "--data", "all", "--out", "t", *small)
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("t/config.json").read_text())["label_names"] == ["blue", "green", "red"]
    reached = json.loads(done.stdout)["epochs"]
    assert reached["8"]["accuracy"] == 100.0  # numbered anew, green would be called blue, and red green
    found = json.loads(run("evaluate", "t", "--data", "all", "--json").stdout)
    assert found["accuracy"] == 100.0 and found["images"] == 8


def test_other_classes_are_refused_or_get_a_new_head(run: Call, here: Path) -> None:
    sizes = ["--image-size", "16"]
    _folder(here / "all", {"train": ("blue", "green", "red"), "test": ("blue", "red")})
    other = _folder(here / "other", {"train": ("black", "blue", "green"), "test": ("black",)})
    assert run("expand", "ancestor.safetensors", "grown", *sizes, "--num-labels", "3").exit_code == 0
    short = ["--batch-size", "4", "--epochs", "1"]
    assert run("finetune", "grown", "--data", "all", "--out", "t", *short).exit_code == 0
    named = json.loads(Path("t/config.json").read_text())["label_names"]
    assert named == ["blue", "green", "red"]  # of a model without names of its own: those of the data
    for args in (("evaluate", "t", "--data", str(other)), ("finetune", "t", "--data", "other", "--out", "u", *short)):
        refused = run(*args)
        assert refused.exit_code == 1 and len(refused.stderr.splitlines()) == 1, refused.stderr
        assert "'black', which is not one of blue, green, red" in refused.stderr
        assert "--head means" in refused.stderr and not Path("u").exists()
    assert run("finetune", "t", "--data", "other", "--out", "u", *short, "--head", "means").exit_code == 0
    assert json.loads(Path("u/config.json").read_text())["label_names"] == ["black", "blue", "green"]

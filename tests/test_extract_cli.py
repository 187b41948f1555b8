"""The command extract: ancestors and teachers of any architecture and source, refusals before any image is read,
progress where nobody watches, and what --resume says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build_pico
from PIL import Image
from planted import variant
from timm.models._hub import save_for_hf
from torch import nn
from typer.testing import CliRunner, Result

from learngene_hub import _steps, cli, data
from learngene_hub.learngene import Learngene
from learngene_hub.shape import ViTShape

AUXILIARY = ["width=32", "head_dim=16", "patch=8", "depth=2", "layout=token", "teacher_size=32"]
QUICK = ["epochs=1", "batch_size=8", "crop_padding=2", *AUXILIARY]
CNN = "test_resnet.r160_in1k"  # timm's own model for tests: a ResNet of 470,000 parameters


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def sets(*pairs: str) -> list[str]:
    return [f"--set={pair}" for pair in (*QUICK, *pairs)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images of two classes."""
    monkeypatch.delenv("LEARNGENE_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    for shade, name in enumerate(("red", "green")):
        for i in range(8):
            place = tmp_path / "photos" / "train" / name
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (90 * shade, 30 * i, 90)).save(place / f"{i}.png")
    return tmp_path


def saved(model: nn.Module, folder: str) -> str:
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def made(name: str, classes: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=classes).eval()


DATA = ["--data", "photos", "--image-size", "32", "--out", "gene"]


def refused(*args: str | Path) -> str:
    """The one line of a command that ends without anything written."""
    said = run(*args)
    assert said.exit_code == 1 and len(said.stderr.splitlines()) == 1, said.stderr
    assert "LEARNGENE_DEBUG" not in said.stderr and not Path("gene").exists()
    return said.stderr


# A CNN as ancestor, as teacher, by folder and by name with weights of one's own ---------------------------------------


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("tleg", []),
        ("sws", ["stages=[1,1]"]),
        ("ldr", ["phases=[1]"]),
        ("lets", ["learngene_depth=2", "learngene_width=16", "mlp_ratio=4", "drop_path=0"]),
    ],
)
def test_a_cnn_teaches_each_of_the_four(here: Path, method: str, more: list[str]) -> None:
    saved(made(CNN), "cnn")
    pairs = [pair for pair in QUICK if method != "sws" or not pair.startswith("depth=")]
    done = run("extract", method, "cnn", *DATA, *(f"--set={pair}" for pair in (*pairs, *more)), "--json")
    assert done.exit_code == 0, done.stderr
    learngene, told = Learngene.from_pretrained("gene"), json.loads(done.stdout)
    assert learngene.shape == ViTShape(
        depth=2, width=32, heads=2, head_dim=16, patch=8, image_size=32, classes=2
    )  # fmt: skip
    assert learngene.ancestor["source"] == "./cnn" and told["images_seen"] == 16
    assert told["flops"] == 16 * learngene.shape.flops()


@pytest.mark.parametrize(
    ("method", "more", "deep"),
    [
        ("lets", ["depth=4", "learngene_depth=2", "learngene_width=32", "mlp_ratio=4"], "depth=N"),
        ("sws", ["stages=[2,2]"], "stages=[N,N]"),
    ],
)
def test_an_auxiliary_much_larger_than_the_ancestor_is_told_before_it_is_trained(
    here: Path, method: str, more: list[str], deep: str
) -> None:
    vit = ViTShape(depth=1, width=32, heads=2, patch=8, image_size=32, classes=2)
    saved(build_pico(vit), "vit")
    base = ["epochs=1", "batch_size=8", "crop_padding=2", "head_dim=16", "patch=8", "layout=token", "teacher_size=32"]
    asked = ["extract", method, "vit", *DATA]
    pairs = [*base, "drop_path=0", "teacher=once", "mixup=0", "cutmix=0", *more]
    large = run(*asked, *(f"--set={pair}" for pair in (*pairs, "width=64")))
    assert large.exit_code == 0, large.stderr
    shape = replace(vit, depth=4, width=64, heads=4, classes=0)
    times, own = round(shape.params() / vit.params()), f"{vit.params():,}"
    lines = large.stderr.splitlines()
    told = next(line for line in lines if "trains an auxiliary" in line)
    assert f"of 4x64: {shape.params():,} parameters, {times} times the ancestor's {own}; --set {deep}" in told
    assert lines.index(told) < next(i for i, line in enumerate(lines) if "epoch" in line or "Next" in line)
    small = run("extract", "tleg", "vit", *DATA[:-1], "small", *(f"--set={pair}" for pair in base))
    assert small.exit_code == 0 and "auxiliary" not in small.stderr


def test_a_name_of_timms_takes_weights_from_a_file(here: Path) -> None:
    """The same learngene as from a folder of the same model, and its own source."""
    model = made(CNN, classes=5)
    saved(model, "cnn")
    for source, out in ((["cnn"], "one"), ([CNN, "--ancestor-weights", "cnn/model.safetensors"], "two")):
        done = run("extract", "tleg", *source, *DATA[:-1], out, *sets())
        assert done.exit_code == 0, done.stderr
    one, two = (Learngene.from_pretrained(out) for out in ("one", "two"))
    assert one.shape.classes == two.shape.classes == 5
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())
    assert two.ancestor["name"] == CNN and two.ancestor["source"] == "./model.safetensors"
    assert one.ancestor["sha256"] == two.ancestor["sha256"]


def test_a_teacher_beside_the_ancestor(here: Path) -> None:
    """Sizes and first weights of a ViT, logits of a CNN of other classes: as with the library itself."""
    from learngene_hub import factory
    from learngene_hub.teacher import Teacher

    ancestor, teacher = build_pico(variant("token")), made(CNN, classes=5)
    saved(ancestor, "vit")
    saved(teacher, "cnn")
    pairs = ["epochs=1", "batch_size=8", "crop_padding=2", "start=ancestor", "teacher_size=32", "lr=1e-12"]
    done = run("extract", "tleg", "vit", "--teacher", "cnn", *DATA, *(f"--set={pair}" for pair in pairs))
    assert done.exit_code == 0, done.stderr
    learngene = Learngene.from_pretrained("gene")
    assert (learngene.shape.width, learngene.shape.classes) == (64, 5)
    block = ancestor.state_dict()["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(learngene.tensors["base.mlp.fc1.weight"], block)
    assert learngene.provenance["teacher"] == {"name": "cnn", "sha256": factory.state_digest(teacher)}
    images = data.load_images("photos", size=32)
    settings = {"epochs": 1, "batch_size": 8, "crop_padding": 2, "start": "ancestor", "teacher_size": 32, "lr": 1e-12}
    said: Any = timm.data.resolve_model_data_config(teacher)  # type: ignore[attr-defined]
    from learngene_hub.shape import Preprocessing

    own = Preprocessing(mean=said["mean"], std=said["std"])
    found = factory.extract(
        "tleg", ancestor, {"photos": images}, settings=settings, teacher=Teacher(teacher, own, name="cnn")
    )  # fmt: skip
    assert found.provenance["loss"] == learngene.provenance["loss"]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading images fails the test."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr(data, "load_images", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("lsamd cnn", "lsamd needs a plain ViT as ancestor: ResNet given"),
        ("net2net cnn", "net2net needs a plain ViT as ancestor: ResNet given"),
        ("tleg cnn", "depth, width, head_dim, patch, layout of the ancestor asked: ResNet given"),
        ("tleg cnn --set width=32 --set head_dim=16 --set patch=8 --set layout=avg", "depth of the ancestor asked"),
        ("lets cnn --set start=ancestor", "start of the ancestor asked: ResNet given"),
        ("tleg nowhere", "no folder 'nowhere', and timm has no model of that name"),
        ("tleg resnet81", "timm has no model of that name; did you mean resnet"),
        ("tleg cnn/none --ancestor-weights x.safetensors", "weights belong to a name of timm's"),
        (
            "tleg resnet18 --ancestor-weights x.safetensors",
            "no file x.safetensors; a .safetensors file with the weights",
        ),
        ("tleg resnet18 --ancestor-weights cnn/model.safetensors", "does not hold the weights of resnet18"),
        ("tleg vit --teacher nowhere", "no folder 'nowhere'"),
        ("tleg vit --teacher-weights cnn/model.safetensors", "asked without --teacher"),
        ("lsamd vit --teacher cnn", "--teacher cnn asked; lsamd takes no teacher: "),
        ("lsamd vit --teacher-cache kept", "--teacher-cache kept asked; lsamd takes no teacher: "),
        ("ldr vit --set basis=wavelet", "basis 'wavelet' asked; there are chebyshev"),
        ("ldr vit --set components=13", "components 13 asked; there are 12"),
    ],
)
def test_what_cannot_be_is_refused_before_an_image_is_read(here: Path, args: str, line: str) -> None:
    saved(made(CNN), "cnn")
    saved(build_pico(variant("token")), "vit")
    assert line in refused("extract", *args.split(), *DATA)


@pytest.mark.usefixtures("unread")
def test_weights_that_cannot_be_downloaded_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("resnet18", "timm/deit_tiny_patch16_224.fb_in1k"):
        said = refused("extract", "tleg", name, *DATA)
        known = name.removeprefix("timm/")
        assert f"the weights of {known} cannot be had from the Hub" in said and "--ancestor-weights" in said


def test_classes_that_are_not_the_teachers_are_refused_before_training(here: Path) -> None:
    saved(made(CNN, classes=5), "cnn")
    said = refused("extract", "tleg", "cnn", *DATA, *sets("labels=0.5"))
    assert "photos has 2 classes, the ancestor 5; labels=0, the distillation alone, would work" in said
    saved(build_pico(variant("token", classes=2)), "vit")
    said = refused("extract", "tleg", "vit", "--teacher", "cnn", *DATA, *sets("labels=0.5"))
    assert "photos has 2 classes, the teacher 5" in said
    said = refused("extract", "tleg", "cnn", *DATA, *sets("teacher=live"), "--teacher-cache", "kept")
    assert "a teacher cache asked with teacher 'live'" in said


# Progress and --resume ------------------------------------------------------------------------------------------------


def test_progress_is_told_where_stderr_is_no_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 updates: a line at each tenth of them; in JSON, and of a run of less than a second, none."""
    monkeypatch.setattr(_steps, "TELL_LEAST", 0.0)
    saved(build_pico(variant("token")), "vit")
    quick = ["--set=epochs=10", "--set=batch_size=8", "--set=crop_padding=2"]
    done = run("extract", "tleg", "vit", *DATA, *quick)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tleg: step")]
    assert [line.split(",")[0] for line in lines] == [
        f"tleg: step {2 * n} of 20 ({10 * n}%)" for n in range(1, 11)
    ]  # fmt: skip
    assert all("loss " in line and f"epoch {n}" in line for n, line in enumerate(lines, 1))
    again = run("extract", "tleg", "vit", *DATA, *quick, "--yes", "--json")
    assert again.exit_code == 0 and again.stderr == ""
    monkeypatch.setattr(_steps, "TELL_LEAST", 3600.0)
    assert "step" not in run("extract", "tleg", "vit", *DATA, *quick, "--yes").stderr


def test_a_line_is_told_every_half_minute_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 updates of 7 seconds each: after 35, 70, 105 seconds."""
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(_steps.time, "perf_counter", lambda: float(next(clock)))
    steps = [
        _steps.Step(step=n, epoch=0, of=100_000, loss=1.0, lr=1.0, images=n, seconds=7.0 * n) for n in range(1, 16)
    ]
    told: list[str] = []
    assert list(_steps.show_progress(steps, tell=told.append)) == steps
    assert [line.split()[2] for line in told] == ["5", "10", "15"]


def test_resume_says_that_there_is_nothing_and_that_it_is_finished(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(build_pico(variant("token")), "vit")
    asked = ["extract", "tleg", "vit", *DATA, "--set=epochs=1", "--set=batch_size=8", "--set=crop_padding=2"]
    first = run(*asked, "--resume")
    assert first.exit_code == 0 and "nothing to resume" in first.stderr and "starting" in first.stderr
    before = Path("gene/learngene.safetensors").read_bytes()
    monkeypatch.setattr(data, "load_images", lambda *_, **__: pytest.fail("images were read"))
    again = run(*asked, "--resume")
    assert again.exit_code == 0 and "is finished already" in again.stderr
    told = json.loads(run(*asked, "--resume", "--json").stdout)
    assert told["sha256"] == Learngene.from_pretrained("gene").digest and told["images_seen"] == 16
    other = run(*asked, "--set", "epochs=2", "--resume")
    assert other.exit_code == 1 and "a finished extraction of tleg with other settings" in other.stderr
    assert len(other.stderr.splitlines()) == 1
    assert Path("gene/learngene.safetensors").read_bytes() == before
    assert "--yes" in run(*asked).stderr  # without --resume it is still never written over unasked


def test_a_learngene_that_is_larger_than_its_ancestor_is_told(here: Path) -> None:
    ancestor = build_pico(variant("token"))
    saved(ancestor, "vit")
    pairs = ["epochs=1", "batch_size=8", "crop_padding=2", "teacher_size=32", "labels=0"]
    for phases, larger in (("[1]", False), ("[1,2,4,8]", True)):
        done = run("extract", "ldr", "vit", *DATA, "--yes", *(f"--set={pair}" for pair in (*pairs, f"phases={phases}")))
        assert done.exit_code == 0, done.stderr
        count = sum(parameter.numel() for parameter in ancestor.parameters())
        assert (f"larger than its ancestor, which has {count:,} parameters" in done.stderr) == larger

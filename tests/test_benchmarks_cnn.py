"""The benchmark of CNNs: what a twin is, what is trained, what is stale, what the rows say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _cnn_sources  # noqa: E402
import _cnn_summary  # noqa: E402
import cnn  # noqa: E402
from _runs import read_rows  # noqa: E402
from cnn import Job, Row  # noqa: E402

from learngene_hub.data import Images  # noqa: E402
from learngene_hub.shape import IMAGENET  # noqa: E402
from learngene_hub.training import Recipe, classification_loss  # noqa: E402

CONFIG: dict[str, Any] = {
    "data": "many",
    "image_size": 32,
    "precision": "fp32",
    "ancestors": {
        "resnet": {
            "family": "resnet",
            "stages": [[8, 8], [8, 8], [16, 16], [16, 16]],
            "recipe": {"epochs": 1, "lr": 1e-3, "batch_size": 8},
        },
        "collective": {
            "start": [[4], [8], [8, 8]],
            "order": [[1, 4]],
            "head_hidden": 8,
            "tasks": 2,
            "classes_per_task": 2,
            "recipe": {"epochs": 1, "lr": 1e-3, "batch_size": 4},
        },
    },
    "search": {"per_class": 2},
    "fisher": {"per_class": 2},
    "sets": {
        "tasks": {"ways": 5, "shots": 2, "epochs": [1, 2], "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0,
                  "batch_size": 4, "seeds": [1, 2]},
        "few": {"images": 8, "test": 4, "epochs": [1], "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0,
                "batch_size": 4, "seeds": [1]},
    },
    "arms": {
        "resnet-auto": {"ancestor": "resnet", "method": "auto", "settings": {"layers": [0, 3]}},
        "resnet-middle": {"ancestor": "resnet", "method": "auto", "settings": {"layers": [1, 2]},
                          "twin": "resnet-auto"},
        "resnet-heuristic": {"ancestor": "resnet", "method": "heuristic", "anchor": 3.0,
                             "settings": {"fisher": 4, "last_k": 2, "front": [8, 8, 16]}},
        "resnet-whole": {"ancestor": "resnet"},
        "grown": {"ancestor": "collective", "method": "heuristic",
                  "settings": {"last_k": 1, "front": [4], "head_hidden": 8}},
    },
}  # fmt: skip


def pictures(folder: Path, classes: int, each: int) -> None:
    """Plain colours, one per class."""
    for label in range(classes):
        place = folder / f"{label:02}"
        place.mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (32, 32), (6 * label, 40 * number, 90)).save(place / f"{number}.png")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> cnn.Sources:
    """Two data sets of plain colours, of 40 and of 3 classes, with ancestors and learngenes made."""
    root = tmp_path_factory.mktemp("cnn")
    for name, classes in (("many", 40), ("few", 3)):
        pictures(root / name / "train", classes, 4)
        pictures(root / name / "test", classes, 2)
    config = root / "cnn.yaml"
    config.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    found = cnn.Sources(data=root, work=root / "work", config=config)
    for name in CONFIG["ancestors"]:
        _cnn_sources.make_ancestor(name, found)
    for arm, about in CONFIG["arms"].items():
        if "method" in about:
            _cnn_sources.make_learngene(arm, found)
    return found


def row(arm: str, accuracies: str, seed: int = 0, digest: str = "d") -> Row:
    return Row(
        set="tasks", arm=arm, seed=seed, accuracies=accuracies, params=10, inherited=5, flops=100, images_seen=20,
        stored_bytes=2_000_000, extraction_seconds=1.0, extraction_flops=4, seconds=2.0, digest=digest, machine="m",
    )  # fmt: skip


ROWS = [
    row("resnet-auto", "1 2", digest="old"),
    row("resnet-auto", "30 50"),
    row("resnet-auto", "30 60", seed=1),
    row("resnet-auto", "30 70", seed=2),
    row("resnet-auto-twin", "20 49"),
    row("resnet-auto-twin", "20 62", seed=1),
    row("resnet-whole", "90 80", seed=1),
]


def test_summary_by_hand() -> None:
    """Differences to the twin 1 and -2: mean -0.5, variance 4.5, so the standard error is sqrt(4.5 / 2)."""
    found = _cnn_summary.summary(ROWS, CONFIG, {"ancestors": {}, "learngenes": {}})["sets"]["tasks"]
    assert found["accuracy"]["resnet-auto"]["2"] == {"mean": 60.0, "sd": 10.0, "n": 3}
    gaps = found["differences"]
    assert gaps["resnet-auto - resnet-auto-twin"] == {
        "1": {"mean": 10.0, "se": 0.0, "n": 2, "won": 2},
        "2": {"mean": -0.5, "se": 1.5, "n": 2, "won": 1},
    }
    assert gaps["resnet-auto - resnet-whole"]["2"] == {"mean": -20.0, "se": None, "n": 1, "won": 0}
    assert found["compute"]["resnet-auto"]["tuning_teraflops"] == round(3 * 100 * 20 / 1e12, 2)
    told = _cnn_summary.table({"sets": {"tasks": found}}, CONFIG, "tasks").splitlines()
    assert told[2].startswith(
        "| resnet-auto | 30.0 ± 0.0 | 60.0 ± 10.0 | +10.0 ± 0.0 (2/2) | -0.5 ± 1.5 (1/2) | -20.0 (0/1)"
    )
    assert told[2].endswith("| 50% | 2.00 |")


def test_every_arm_has_a_twin_but_the_whole_ancestor() -> None:
    arms = cnn.arms_of(CONFIG)
    assert arms == [
        "resnet-auto", "resnet-auto-twin", "resnet-middle", "resnet-heuristic", "resnet-heuristic+anchor",
        "resnet-heuristic-twin", "resnet-whole", "grown", "grown-twin",
    ]  # fmt: skip
    twins = {arm: _cnn_summary.twin_of(arm, CONFIG) for arm in arms}
    assert twins["resnet-middle"] == twins["resnet-auto"] == "resnet-auto-twin"
    assert twins["resnet-heuristic+anchor"] == twins["resnet-heuristic"] == "resnet-heuristic-twin"
    assert twins["resnet-whole"] is None and twins["grown-twin"] is None
    assert _cnn_summary.rivals("resnet-heuristic+anchor", CONFIG) == {
        "twin": "resnet-heuristic-twin", "whole": "resnet-whole", "without the anchor": "resnet-heuristic",
    }  # fmt: skip


def test_the_parts_of_the_classes_share_none() -> None:
    base, opened, novel = cnn.split_classes(100)
    assert (len(base), len(opened), len(novel)) == (64, 16, 20) and sorted(base + opened + novel) == list(range(100))
    with pytest.raises(SystemExit, match="a set of 37 classes given; 38 are the least"):
        cnn.split_classes(37)


@pytest.mark.parametrize(
    ("arm", "inherited"),
    [
        ("resnet-auto", {"conv1": "conv1", "layer1.0.conv2": "layer1.0.conv2", "layer4.0.bn1": "layer4.0.bn1"}),
        ("resnet-middle", {"layer2.0.conv1": "layer2.0.conv1", "layer3.0.downsample.0": "layer3.0.downsample.0"}),
        ("resnet-heuristic", {"layer4.1.conv1": "layer4.1.conv1", "layer4.1.bn2": "layer4.1.bn2"}),
        ("resnet-whole", {"conv1": "conv1", "layer4.1.conv2": "layer4.1.conv2"}),
    ],
)
def test_a_twin_differs_in_what_is_inherited_alone(arm: str, inherited: dict[str, str], sources: cnn.Sources) -> None:
    own = cnn.open_ancestor(sources.ancestor("resnet")).state_dict()
    grown, names = cnn.start(Job(set="tasks", arm=arm, seed=3), sources, 5)
    twin, same = cnn.start(Job(set="tasks", arm=f"{arm}-twin", seed=3), sources, 5)
    one, other = grown.state_dict(), twin.state_dict()
    for there, here in inherited.items():
        assert torch.equal(one[f"{there}.weight"], own[f"{here}.weight"])
    assert names == same and names and one.keys() == other.keys() and len(one["fc.bias"]) == 5
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - set(names))
    kernels = [name for name in names if one[name].dim() == 4]
    assert kernels and not any(torch.equal(one[name], other[name]) for name in kernels)
    assert all(int(other[name]) == 0 for name in names if name.endswith("num_batches_tracked"))
    again, _ = cnn.start(Job(set="tasks", arm=f"{arm}-twin", seed=3), sources, 5)
    assert all(torch.equal(tensor, other[name]) for name, tensor in again.state_dict().items())


def test_the_anchor_adds_its_quadratic_term(sources: cnn.Sources) -> None:
    """weight / 2 * F * d^2 for one number moved by d, and nothing where nothing has moved."""
    job = Job(set="tasks", arm="resnet-heuristic+anchor", seed=1)
    model, _ = cnn.start(job, sources, 5)
    images, _ = cnn.images_of("tasks", 1, sources)
    batch = (images.pixels.float() / 255, images.labels)
    anchored, plain = cnn.loss_of(job, model, sources), cnn.loss_of(replace(job, arm=job.base), model, sources)
    assert float(anchored(model, batch).detach()) == pytest.approx(float(plain(model, batch).detach()))
    # The stem is unit 0, and each of the seven blocks before layer4.1 has two.
    fisher = cnn.open_learngene(sources.learngene(job.base)).tensors["fisher.conv.15.weight"]
    place, target = int(fisher.argmax()), model.get_parameter("layer4.1.conv1.weight")
    model.train()  # BatchNorm keeps the loss small, however far the number has moved
    with torch.no_grad():
        target.view(-1)[place] += 1e4
    gap = float((anchored(model, batch) - plain(model, batch)).detach())
    assert gap == pytest.approx(3.0 / 2 * float(fisher.view(-1)[place]) * 1e8, rel=1e-3) and gap > 0.01


def test_training_is_sgd_with_momentum() -> None:
    """Against the rule written out: v = 0.9 v + g + wd w, w = w - lr v, on batches of all images."""
    images = Images(torch.full((4, 3, 8, 8), 200, dtype=torch.uint8), torch.tensor([0, 1, 0, 0]), ("a", "b"), "set")
    stage = {"batch_size": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "epochs": [1, 3]}

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(x), 2)

    model = Bias()
    assert list(cnn.train(model, images, stage, classification_loss(Recipe()), 0, False)) == [1, 2, 3]
    w, v = torch.tensor([0.0, 1.0]), torch.zeros(2)
    for _ in range(3):
        v = 0.9 * v + (w.softmax(0) - torch.tensor([0.75, 0.25])) + 0.5 * w
        w = w - 0.1 * v
    torch.testing.assert_close(model.bias.detach(), w)


def test_a_row_is_stale_where_its_recipe_or_its_learngene_changed(sources: cnn.Sources, tmp_path: Path) -> None:
    job = Job(set="tasks", arm="resnet-auto", seed=1)
    twin, whole = replace(job, arm="resnet-auto-twin"), replace(job, arm="resnet-whole")
    assert cnn.digest_of(job, sources) == cnn.digest_of(replace(job, seed=2), sources)
    digests = {cnn.digest_of(each, sources) for each in (job, twin, whole, replace(job, set="few"))}
    assert len(digests) == 4
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(CONFIG | {"precision": "bf16"}))
    faster = replace(sources, config=other)
    assert not digests & {cnn.digest_of(each, faster) for each in (job, twin, whole)}


def test_a_run_fills_its_row(sources: cnn.Sources) -> None:
    job = Job(set="tasks", arm="resnet-auto", seed=1)
    one, again = cnn.measure(job, sources), cnn.measure(job, sources)
    assert one.job == job and (one.accuracies, one.digest) == (again.accuracies, again.digest)
    assert len(one.curve) == 2 and one.images_seen == 2 * 8  # 10 images make two batches of 4, twice
    assert one.stored_bytes == sources.learngene("resnet-auto").stat().st_size
    stages = 8 * 8 * 9 * 2 + 16 * 16 * 9 * 2  # two convolutions of a block of stage 0, two of stage 3
    shortcut = 64 * 8 + 2 * 8  # of stage 0, whose stem has 64 channels
    first = 64 * 8 * 9 - 8 * 8 * 9
    assert one.inherited == 3 * 64 * 49 + 2 * 64 + stages + first + shortcut + 4 * 8 + 4 * 16 + 16 * 16 + 2 * 16
    twin = cnn.measure(replace(job, arm="resnet-auto-twin"), sources)
    assert (twin.params, twin.flops) == (one.params, one.flops) and twin.inherited == twin.stored_bytes == 0


def test_a_probe_by_numpy(sources: cnn.Sources) -> None:
    """The share of the eigenvalues of the features' covariance, and the nearest class mean, written out."""
    job = Job(set="tasks", arm="resnet-whole", seed=1)
    found = cnn.probe(job, sources)
    (images, test), (model, _) = cnn.images_of("tasks", 1, sources), cnn.start(job, sources, 5)
    scale = torch.tensor(IMAGENET.std).view(3, 1, 1)
    model.train()
    one, other = [
        model.forward_features((each.pixels / 255 - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / scale)  # type: ignore[operator]
        .mean((2, 3)).detach().double().numpy()
        for each in (images, test)
    ]  # fmt: skip
    values = np.linalg.eigvalsh(np.cov(one.T))
    assert found["rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), abs=0.01)
    right = 0
    for feature, label in zip(other - one.mean(0), test.labels.tolist(), strict=True):
        means = [(one - one.mean(0))[images.labels.numpy() == c].mean(0) for c in range(5)]
        cosines = [feature @ mean / np.linalg.norm(feature) / np.linalg.norm(mean) for mean in means]
        right += int(np.argmax(cosines)) == label
    assert found["nearest_mean"] == pytest.approx(100 * right / len(other), abs=0.01)


def test_what_is_told_of_ancestors_and_learngenes(sources: cnn.Sources, tmp_path: Path) -> None:
    _cnn_sources.write_facts(tmp_path / "out.csv", sources)
    facts = json.loads((tmp_path / "out_sources.json").read_text())
    collective = facts["ancestors"]["collective"]
    assert collective["shape"]["stages"] == [[4], [12], [8, 8]]  # widened once, before task 2
    assert len(collective["calmness"]) == 2 and {len(task) for task in collective["calmness"]} == {4}
    assert collective["images_seen"] == 2 * 8  # two tasks of two classes of four images
    assert facts["learngenes"]["resnet-auto"]["kept"] == [0, 3]


@pytest.mark.slow
def test_a_call_makes_what_is_missing(sources: cnn.Sources, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--data", str(sources.data), "--work", str(sources.work), "--config", str(sources.config)]
    command += ["--workers", "1", "--out", str(tmp_path / "out.csv"), "--arms"]
    assert cnn.main([*command, "resnet-auto,resnet-auto-twin", "--sets", "tasks"]) == 0
    assert cnn.main([*command, "resnet-auto,resnet-auto-twin,grown", "--sets", "tasks,few"]) == 0
    assert "9 runs, 4 there already" in capfd.readouterr().out
    rows = read_rows(tmp_path / "out.csv", Row)
    assert [(r.set, r.arm, r.seed) for r in rows[:5]] == [
        ("tasks", "resnet-auto", 1), ("tasks", "resnet-auto-twin", 1), ("tasks", "resnet-auto", 2),
        ("tasks", "resnet-auto-twin", 2), ("tasks", "grown", 1),
    ]  # fmt: skip
    assert (tmp_path / "out.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="no arm nonsense"):
        cnn.main([*command, "nonsense"])

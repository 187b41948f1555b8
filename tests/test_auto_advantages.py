"""The benchmark of the four advantages: what is run, on which images, and what the rows say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import advantages  # noqa: E402
from _advantages_summary import Job, Row, as_text, draw, epochs_to, summarise  # noqa: E402

from learngene_hub.data import Images  # noqa: E402


def row(measure: str, arm: str, accuracies: str, seed: int = 0, shots: int = 20, **more: object) -> Row:
    values = {"lr": 0.01, "decay": 0.0, "epochs": 2, "digest": "new"} | more
    return Row(
        measure=measure, arm=arm, accuracies=accuracies, seed=seed, shots=shots, params=10, seconds=1.0, machine="m",
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


ROWS = [
    row("curve", "auto", "9 9", digest="old"),
    row("curve", "auto", "50.00 60.00 70.00"),
    row("curve", "auto", "60.00 61.00 80.00", seed=1),
    row("shots", "auto", "30.00", shots=1),
    row("grid", "auto", "20.00", lr=0.1),
    row("grid", "auto", "70.00", lr=0.01),
    row("grid", "auto", "30.00", lr=0.1, seed=1),
    row("grid", "auto", "50.00", lr=0.01, seed=1),
    row("curve", "scratch", "20.00 30.00 59.00"),
    row("curve", "scratch", "20.00 30.00 60.00", seed=1),
]


def test_the_four_measures_by_hand() -> None:
    summary = summarise(ROWS, 60.0)
    auto, scratch = summary["arms"]["auto"], summary["arms"]["scratch"]
    assert auto["epochs_to_target"] == [2, 1] and scratch["epochs_to_target"] == [None, 3]
    assert auto["grid_spread"] == [50.0, 20.0] and auto["grid_mean"] == [45.0, 40.0] and auto["grid_best"] == [70, 50]
    assert auto["fixed_budget"] == [70.0, 80.0] and auto["by_shots"] == {"1": [30.0], "20": [70.0, 80.0]}
    assert auto["curve"] == [55.0, 60.5, 75.0] and scratch["grid_spread"] == []
    table = [[cell.strip() for cell in line.split("|")] for line in as_text(summary).splitlines()]
    assert table[1] == ["auto", "1.5", "35.0 +- 21.2", "42.5 +- 3.5", "60.0 +- 14.1", "75.0 +- 7.1", "30.0",
                        "75.0 +- 7.1", "-", "-", "10"]  # fmt: skip
    assert table[2][:3] == ["scratch", "3.0 (1 of 2)", "-"]
    assert epochs_to([59.9, 60.0], 60.0) == 2 and epochs_to([10.0], 60.0) is None


def test_a_grid_that_is_not_whole_does_not_count() -> None:
    half = [*ROWS, row("grid", "auto", "90.00", lr=0.1, seed=2), row("grid", "scratch", "10.00", lr=0.1)]
    arms = summarise(half, 60.0)["arms"]
    assert arms["auto"]["grid_spread"] == [50.0, 20.0] and arms["scratch"]["grid_spread"] == []


def test_differences_are_paired_over_tasks() -> None:
    """auto less scratch: 70 - 59 and 80 - 60; 2 epochs against never, which counts as 4, and 1 against 3."""
    found = summarise(ROWS, 60.0)["minus"]["auto - scratch"]
    assert found["fixed_budget"] == {"mean": 15.5, "se": 4.5, "n": 2}
    assert found["epochs_to_target"] == {"mean": -2.0, "se": 0.0, "n": 2}
    assert set(found) == {"fixed_budget", "epochs_to_target"}  # scratch has no grid, and no run of one image
    assert "auto - scratch: epochs_to_target -2.0 +- 0.0 (2), fixed_budget +15.5 +- 4.5 (2)" in as_text(
        summarise(ROWS, 60.0)
    )


def test_a_probe_sees_classes_in_the_tokens_that_carry_them() -> None:
    """A stand-in ViT whose patch tokens are the colour of the image, and whose class token is noise."""
    shades = torch.tensor([[250, 0, 0], [0, 250, 0]], dtype=torch.uint8)
    labels = torch.arange(20) % 2
    images = Images(shades[labels].view(20, 3, 1, 1).expand(20, 3, 2, 2), labels, ("red", "green"), "set")

    class Tokens(nn.Module):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(len(x), 1, 3, generator=torch.Generator().manual_seed(len(x)))
            return torch.cat([noise, x.flatten(2).transpose(1, 2)], 1)

    class_token, patches = advantages.probe(Tokens(), images, images)
    assert patches == 100.0 and class_token < 90.0


def test_the_plot_is_written(tmp_path: Path) -> None:
    draw(summarise(ROWS, 60.0), tmp_path / "four.png")
    assert (tmp_path / "four.png").stat().st_size > 10_000


def test_every_arm_meets_every_cell_and_a_finished_one_is_not_made_again() -> None:
    wanted = advantages.jobs(advantages.ARMS, [0, 1])
    assert len(wanted) == len(set(wanted)) == 2 * 7 * (1 + 1 + 3 + 16)
    assert {job.seed for job in wanted[:147]} == {0}  # seed by seed
    assert advantages.jobs(advantages.ARMS, [0, 1], ["grid"]) == [job for job in wanted if job.measure == "grid"]
    grid = {(job.lr, job.decay) for job in wanted if job.measure == "grid"}
    assert grid == {(lr, wd) for lr in (1e-4, 1e-3, 1e-2, 1e-1) for wd in (0.0, 1e-4, 5e-4, 1e-3)}
    assert {job.shots for job in wanted if job.measure != "grid"} == {1, 5, 10, 20}
    made = row("curve", "auto", "1 2")
    assert isinstance(made.job, Job) and type(made.job) is Job and made.job == replace(made, accuracies="3").job


def test_the_search_and_the_tasks_share_no_class() -> None:
    for count, opened, novel in ((100, 16, 20), (30, 4, 6), (7, 2, 5)):
        ours = advantages.split_classes(count)
        assert (len(ours[0]), len(ours[1])) == (opened, novel) and not set(ours[0]) & set(ours[1])
    with pytest.raises(SystemExit, match="a set of 6 classes given; 7 are the least"):
        advantages.split_classes(6)


def test_fewer_images_are_a_part_of_more_and_labels_follow_the_classes() -> None:
    labels = torch.arange(40) % 4
    pixels = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 1, 2, 2)
    images = Images(pixels, labels, ("a", "b", "c", "d"), "set")
    two, five = (advantages.of_classes(images, [3, 1], count, seed=7) for count in (2, 5))
    assert two.classes == ("d", "b") and two.labels.tolist() == [0, 0, 1, 1] and len(five) == 10
    assert all(int(p[0, 0, 0]) % 4 == (3, 1)[label] for p, label in zip(five.pixels, five.labels.tolist(), strict=True))
    assert {int(p[0, 0, 0]) for p in two.pixels} < {int(p[0, 0, 0]) for p in five.pixels}
    other = advantages.of_classes(images, [3, 1], 5, seed=8)
    assert not torch.equal(other.pixels, five.pixels)
    assert len(advantages.of_classes(images, [0], None, seed=0)) == 10


def test_blocks_of_the_arms_without_a_search() -> None:
    assert advantages.blocks_of("first", 6, 12, 0) == [0, 1, 2, 3, 4, 5]
    assert advantages.blocks_of("last", 6, 12, 0) == [6, 7, 8, 9, 10, 11]
    assert advantages.blocks_of("published", 6, 12, 0) == [0, 1, 8, 9, 10, 11]  # as the authors' code has it
    with pytest.raises(SystemExit, match="keeps 6 of 12 blocks of a vit, not 3 of 6"):
        advantages.blocks_of("published", 3, 6, 0)
    drawn = [advantages.blocks_of("random", 6, 12, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 6 and drawn[0] != drawn[2]


@pytest.mark.parametrize("shots", [1, 20])
def test_a_run_makes_the_same_number_of_updates_whatever_the_images(shots: int) -> None:
    """Counted by torch's own SGD: its momentum after as many updates."""
    images = Images(
        torch.randint(256, (5 * shots, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        torch.arange(5 * shots) % 5, tuple("abcde"), "set",
    )  # fmt: skip
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return self.linear(x.flatten(1))

    job = Job(measure="curve", arm="scratch", lr=0.01, decay=0.0, shots=shots, epochs=3, seed=0)
    model = Net()
    before = model.linear.weight.detach().clone()
    assert list(advantages.train(model, images, job)) == [1, 2, 3]
    assert seen == [min(20, 5 * shots)] * 15 and not torch.equal(model.linear.weight, before)

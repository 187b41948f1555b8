"""Heuristic learngene's statistic by hand, its tasks and collective, and the anchor that the released code loses."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import FACTS
from small_heuristic import VGG16, extracted, pictures
from torch import nn

from learngene_hub import factory
from learngene_hub._conv import ConvShape
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.methods import _heuristic_calm as calm
from learngene_hub.methods import _heuristic_cut as cut
from learngene_hub.methods._heuristic_anchor import anchored_loss, diagonal_fisher
from learngene_hub.methods._heuristic_tasks import ORDER, START, Tasks, grow_collective, own_outputs_loss, together
from learngene_hub.methods.heuristic import Heuristic, anchor
from learngene_hub.shape import IMAGENET
from learngene_hub.training import Recipe, fit, image_batches
from learngene_hub.transforms import BLOCK_KEYS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import calmness_plot  # noqa: E402


def with_gradient(values: list[float]) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values, dtype=torch.float32)
    return parameter


# The statistic --------------------------------------------------------------------------------------------------------


def test_rho_is_the_share_of_gradients_above_sigma_and_the_mean_over_updates() -> None:
    meter = calm.Meter(seed=0, sigma=0.5)
    units = [[with_gradient([0.6, -0.7, 0.1, 0.2]), with_gradient([0.5, 0.51])], [with_gradient([0.0, 9.0])]]
    meter.add(units, epoch_done=False)  # 3 of 6, 1 of 2
    units = [[with_gradient([0.6, 0.0, 0.0, 0.0]), with_gradient([0.0, 0.0])], [with_gradient([1.0, 1.0])]]
    meter.add(units, epoch_done=True)  # 1 of 6, 2 of 2
    meter.add(units, epoch_done=True)
    assert np.allclose(meter.rows, [[(3 / 6 + 1 / 6) / 2, (1 / 2 + 1) / 2], [1 / 6, 1]])


def test_gradients_below_minus_sigma_count_too() -> None:
    """The released code counts g > sigma alone: half of them are never seen."""
    meter = calm.Meter(seed=0, sigma=0.5)
    meter.add([[with_gradient([-1.0, -1.0, 1.0, 0.0])]], epoch_done=True)
    assert meter.rows == [[0.75]]


def test_sigma_is_the_quantile_of_the_first_updates_gradients() -> None:
    """numpy's "inverted_cdf" over all units and all updates of the first epoch, or of the first EARLY."""
    rng = np.random.default_rng(0)
    sizes = ((30, 1), (20, 3))
    draws = [[(k * rng.normal(size=n)).astype(np.float32) for n, k in sizes] for _ in range(calm.EARLY + 2)]
    for count in (3, calm.EARLY + 2):
        meter = calm.Meter(seed=0, quantile=0.8)
        for i, draw in enumerate(draws[:count]):
            meter.add([[with_gradient(list(unit))] for unit in draw], epoch_done=i == count - 1)
        early = np.abs(np.concatenate([unit for draw in draws[: min(count, calm.EARLY)] for unit in draw]))
        sigma = np.quantile(early, 0.8, method="inverted_cdf")
        assert meter.sigma == pytest.approx(sigma, rel=1e-6)
        rho = [np.mean([np.mean(np.abs(draw[u]) > sigma) for draw in draws[:count]]) for u in (0, 1)]
        assert np.allclose(meter.rows, [rho], atol=1e-6)


def test_a_large_unit_is_sampled_at_the_same_places_each_time() -> None:
    size = 3 * calm.SAMPLE
    values = torch.linspace(0, 1, size)
    meter = calm.Meter(seed=0, sigma=0.25)
    for _ in range(2):
        parameter = nn.Parameter(torch.zeros(size))
        parameter.grad = values
        meter.add([[parameter]], epoch_done=True)
    assert meter.rows[0] == meter.rows[1] and meter.rows[0][0] == pytest.approx(0.75, abs=0.02)


def test_the_score_by_hand() -> None:
    """Eight tasks: quarters of two. Unit 0 settles, 1 falls by less than 12 %, 2 rises, 3 has a peak but no drop."""
    rho = torch.tensor(
        [[0.4, 0.2, 0.1, 0.2], [0.6, 0.2, 0.1, 0.2], [0.7, 0.2, 0.2, 0.9], *[[0.3, 0.2, 0.3, 0.2]] * 3]
        + [[0.1, 0.18, 0.4, 0.2], [0.3, 0.18, 0.4, 0.2]],
        dtype=torch.float64,
    )
    late, first, peak = 0.2, 0.5, 0.7
    expected = [(first - late) + (peak - late), 0, 0, 0]
    assert torch.allclose(calm.scores(rho), torch.tensor(expected, dtype=torch.float64))


def test_the_calmest_units_stand_in_a_row_and_ties_go_to_the_later() -> None:
    assert calm.calmest(torch.tensor([0.0, 0.3, 0.4, 0.0, 0.5, 0.0]), 2) == range(1, 3)
    assert calm.calmest(torch.tensor([0.0, 0.3, 0.4, 0.0, 0.5, 0.0]), 3) == range(2, 5)
    assert calm.calmest(torch.zeros(6), 3) == range(3, 6)  # the published choice, where nothing settles
    assert calm.calmest(torch.tensor([0.1, 0.2, 0.2, 0.1]), 1) == range(2, 3)
    assert calm.calmest(torch.tensor([0.9, 0.0, 0.1]), 1, first=1) == range(2, 3)
    with pytest.raises(SettingsError, match="3 units asked of 2; 1 to 2 would work"):
        calm.calmest(torch.zeros(3), 3, first=1)


def test_a_curve_keeps_tasks_and_epochs_apart_and_stays_small() -> None:
    meter = calm.Meter(seed=0, sigma=1.0, rows=[[0.1 * task + 0.01 * e, 0.5] for task in range(3) for e in range(2)])
    curve = calm.Curve.of(meter, 2, ["a", "b"])
    assert np.allclose(curve.tasks()[:, 0], [0.005, 0.105, 0.205]) and curve.facts()["row"] == "epoch"
    assert curve.facts()["rho"][3] == [0.11, 0.5]
    meter.rows = [[0.123456789] * 13 for _ in range(500 * 100)]
    facts = calm.Curve.of(meter, 100, [f"features.{i}" for i in range(13)]).facts()
    assert facts["row"] == "task" and 100 <= len(facts["rho"]) <= calm.ROWS and facts["rho"][0][0] == 0.1235
    meter.rows = [[0.123456789] * 130 for _ in range(500)]
    many = calm.Curve.of(meter, 1, [f"features.{i}" for i in range(130)]).facts()
    assert len(str(facts)) < 2**15 and len(str(many)) < 2**16 - 2**14  # the header of a learngene has 64 KiB


# Tasks and the collective ---------------------------------------------------------------------------------------------


def test_pitfall_5_all_tasks_share_five_logits() -> None:
    """Pitfall 5: each class has an output of its own, and a task moves those of its own classes alone."""
    images = pictures(classes=6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for classes, labels in (([1, 4], [4, 1, 1, 4]), ([0, 2, 5], [0, 2, 5, 0])):
        model.zero_grad()
        loss = own_outputs_loss(torch.tensor(classes))(model, (x, torch.tensor(labels)))
        loss.backward()
        logits = model(x).detach()
        by_hand = [
            math.log(sum(math.exp(row[c]) for c in classes)) - row[y]
            for row, y in zip(logits.tolist(), labels, strict=True)
        ]
        assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
        moved = model[1].bias.grad.nonzero().flatten().tolist()  # type: ignore[union-attr]
        assert moved == classes
    drawn = Tasks(count=80, classes=2, recipe=Recipe()).draw(images)
    assert {tuple(c.tolist()) for c in drawn} == {(a, b) for a in range(6) for b in range(a + 1, 6)}


def test_outputs_of_other_classes_stay_as_they_are_to_the_last_bit() -> None:
    """In a whole run too: neither weight decay nor momentum reaches them."""
    images = pictures()
    recipe = Recipe(epochs=2, batch_size=6, lr=1e-2, weight_decay=0.5, schedule="constant")
    given = {"start": ((3,), (4,)), "order": (), "head_hidden": 0, "classes_per_task": 2, "recipe": recipe}
    before = grow_collective({"a": images}, tasks=1, **{**given, "recipe": replace(recipe, lr=1e-12)})
    after = grow_collective({"a": images}, tasks=1, **given)
    named = {name.split("/")[1] for task in after.tasks for name in task}
    old, new = (stream.model.get_parameter("head.fc.weight") for stream in (before, after))
    for place, name in enumerate(images.classes):
        assert torch.equal(old[place], new[place]) == (name not in named), name


def test_pitfall_2_a_softmax_before_the_cross_entropy() -> None:
    """Pitfall 2: cross-entropy of a softmax cannot fall below ln(e + C - 1) - 1 = 3.40 at C = 80; ours falls to 0."""
    perfect = torch.full((1, 80), -1e4)
    perfect[0, 3] = 1e4
    twice = nn.functional.cross_entropy(perfect.softmax(-1), torch.tensor([3]))
    assert twice.item() == pytest.approx(math.log(math.e + 79) - 1, abs=1e-5)
    assert twice.item() == pytest.approx(3.40, abs=0.01)
    assert own_outputs_loss(torch.arange(80))(lambda x: perfect, (perfect, torch.tensor([3]))) == 0


def test_data_sets_are_put_together_with_classes_of_their_own() -> None:
    one, two = pictures(classes=2, each=2), pictures(classes=3, each=1, seed=1)
    both = together({"one": one, "two": two})
    assert both.labels.tolist() == [0, 0, 1, 1, 2, 3, 4] and len(both.classes) == 5
    assert torch.equal(both.pixels[4:], two.pixels)
    with pytest.raises(DataError, match="tasks need images of one size"):
        together({"one": one, "two": pictures(side=40)})
    with pytest.raises(DataError, match="no images given"):
        together({})


def test_the_published_widenings_end_with_vgg16() -> None:
    widths = [width for stage in START for width in stage]
    assert widths == [64] * 4 + [128] * 3 + [256] * 6 and len(ORDER) == 20  # before the tasks 1 to 20
    for layer, more in ORDER:
        widths[layer] += more
    assert tuple(widths) == sum(VGG16.stages, ())
    assert [len(stage) for stage in START] == [len(stage) for stage in VGG16.stages]  # pools after 2, 4, 7, 10, 13


def test_a_small_collective_grows_learns_and_is_an_ancestor() -> None:
    recipe = Recipe(epochs=6, batch_size=12, lr=1e-2, weight_decay=5e-4, schedule="constant")
    losses: list[float] = []

    def watch(steps: Any) -> Any:
        for step in steps:
            losses.append(step.loss)
            yield step

    stream = grow_collective(
        {"a": pictures()}, tasks=3, classes_per_task=2, start=((4,), (6, 6), (6,)), order=((1, 2), (3, 4)),
        head_hidden=10, recipe=recipe, watch=watch,
    )  # fmt: skip
    shape = ConvShape.of(stream.model)
    assert shape.stages == ((4,), (8, 6), (10,)) and shape.head_kernel == 4 and shape.classes == 6
    assert stream.curve.rho.shape == (3, 6, 4) and stream.images_seen == 3 * 6 * 12 and stream.steps == 18
    assert len(losses) == 18 and losses[5] < 0.7 * losses[0]  # the first task is learned
    assert bool(torch.stack([p.isfinite().all() for p in stream.model.state_dict().values()]).all())
    widths = [((4,), (6, 6), (6,)), ((4,), (8, 6), (6,)), ((4,), (8, 6), (10,))]
    cost = [replace(shape, stages=stages).flops() * 6 * 12 for stages in widths]
    assert stream.flops == sum(cost)
    method = Heuristic(last_k=2, fisher=2)
    learngene = method.extract_collective(stream, {"a": pictures()}, facts=FACTS, preprocessing=IMAGENET)
    assert learngene.shape == shape and learngene.provenance["calmness"] == stream.curve.facts()
    assert learngene.provenance["steps"] == 18 and learngene.provenance["kept"] == ["features.7", "features.11"]
    plain = factory.extract("heuristic", stream.model, {}, settings={"last_k": 2}, facts=FACTS)
    assert all(torch.equal(tensor, learngene.tensors[name]) for name, tensor in plain.tensors.items())
    assert factory.expand(learngene, num_labels=2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


# The anchor ---------------------------------------------------------------------------------------------------------


def test_pitfall_1_the_anchor_is_always_zero() -> None:
    """Pitfall 1: in the released code it is 0 after a unit shift. By hand: lambda / 2 sum F 1^2."""
    model = nn.Linear(2, 3)
    fisher = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "bias": torch.tensor([0.5, 0.25, 0.25])}
    zero = lambda model, batch: torch.zeros(())  # noqa: E731
    both = anchored_loss(model, ["weight", "bias"], fisher, 10.0, zero)
    one = anchored_loss(model, ["bias"], fisher, 4.0, zero)
    assert both(model, None) == 0 and one(model, None) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert both(model, None).item() == pytest.approx(10 / 2 * (21 + 1), rel=1e-6)
    assert one(model, None).item() == pytest.approx(4 / 2 * 1, rel=1e-6)
    both(model, None).backward()
    assert torch.allclose(model.weight.grad, 10.0 * fisher["weight"])  # type: ignore[arg-type]


def test_the_anchor_holds_what_is_inherited_while_training() -> None:
    learngene = extracted("vgg", fisher=4)
    shape = factory.plan(learngene, num_labels=3)
    fisher = anchor(learngene, shape)
    kept = [unit.conv for unit in cut.units(shape)[-2:]]  # type: ignore[arg-type]
    assert set(fisher) == {f"{m}.{kind}" for c in kept for m in (c.name, c.norm) for kind in ("weight", "bias")}
    images = pictures(classes=3)
    moved = []
    for lam in (0.0, 1e6):
        model = factory.expand(learngene, num_labels=3)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        ones = {name: torch.ones_like(tensor) for name, tensor in fisher.items()}
        recipe = Recipe(epochs=3, batch_size=9, lr=1e-3, weight_decay=0.0, schedule="constant")
        batches, count = image_batches(images, recipe, IMAGENET)
        loss = anchored_loss(model, list(ones), ones, lam)
        for _ in fit(model, batches, loss, recipe=recipe, steps_per_epoch=count):
            pass
        moved.append(sum(float((p.detach() - start[n]).norm()) for n, p in model.named_parameters() if n in ones))
    assert 0 < moved[1] < 0.7 * moved[0]


def test_fisher_by_hand() -> None:
    """Softmax regression: d log p(y|x) / d W = (onehot(y) - p) x^T, squared, the mean over the images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    model = nn.Linear(4, 3)
    p = model(x).softmax(-1).detach()
    per_image = [torch.outer(torch.eye(3)[label] - p[i], x[i]) for i, label in enumerate(y)]
    found = diagonal_fisher(model, ["weight"], [(x[:3], y[:3]), (x[3:], y[3:])], labels="data")
    assert torch.allclose(found["weight"], torch.stack(per_image).square().mean(0), atol=1e-6)
    found = diagonal_fisher(model, ["weight"], [(x, y)], labels="batch")
    assert torch.allclose(found["weight"], torch.stack(per_image).mean(0).square(), atol=1e-6)
    expected = sum(
        p[i, c] * torch.outer(torch.eye(3)[c] - p[i], x[i]).square() for i in range(5) for c in range(3)
    ) / 5  # fmt: skip
    drawn = diagonal_fisher(model, ["weight"], [(x.repeat(300, 1), y.repeat(300))], generator=generator)
    assert torch.allclose(drawn["weight"], torch.as_tensor(expected), rtol=0.15, atol=0.02)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_stored_fisher_is_that_of_the_ancestor() -> None:
    """Of the kept blocks alone, not 0, and by the descendant's names."""
    learngene = extracted("vit", fisher=3)
    stored = learngene.group("fisher")
    assert set(stored) == {f"block.{i}.{key}" for i in (2, 3) for key in BLOCK_KEYS}
    assert all(float(tensor.min()) >= 0 and float(tensor.max()) > 0 for tensor in stored.values())
    grown: Any = factory.plan(learngene, depth=5)
    assert torch.equal(anchor(learngene, grown)["blocks.4.mlp.fc2.bias"], stored["block.3.mlp.fc2.bias"])
    model = factory.expand(learngene, depth=5)
    anchored_loss(model, list(anchor(learngene, grown)), anchor(learngene, grown), 1.0)
    with pytest.raises(SettingsError, match="width 96 asked; the Fisher information is of width 64"):
        anchor(learngene, factory.plan(learngene, width=96))
    with pytest.raises(SettingsError, match="has no Fisher information"):
        anchor(extracted("vit"), grown)


def test_pitfall_1_an_anchor_that_could_not_work_is_refused() -> None:
    """Pitfall 1 again: a missing tensor is an error, never a silent 0."""
    model, fisher = nn.Linear(2, 3), {"weight": torch.ones(3, 2)}
    with pytest.raises(SettingsError, match="fisher of bias is none; the parameter is"):
        anchored_loss(model, ["weight", "bias"], fisher, 1.0)
    with pytest.raises(SettingsError, match=r"fisher of weight is \[2\]"):
        anchored_loss(model, ["weight"], {"weight": torch.ones(2)}, 1.0)
    with pytest.raises(SettingsError, match="odd is no parameter of Linear"):
        anchored_loss(model, ["odd"], fisher, 1.0)
    with pytest.raises(SettingsError, match="lam -1 asked"):
        anchored_loss(model, ["weight"], fisher, -1)
    with pytest.raises(KeyError):
        anchored_loss(model, ["weight"], fisher, 1.0)(nn.Sequential(model), (torch.zeros(1, 2), torch.tensor([0])))
    with pytest.raises(SettingsError, match="no images given"):
        diagonal_fisher(model, ["weight"], [])


# The picture of the curves --------------------------------------------------------------------------------------------


def test_the_stored_curves_are_drawn(tmp_path: Path) -> None:
    """The map has a pixel's colour per task and layer; a learngene without curves is told so."""
    learngene = extracted("vgg", tasks=8, epochs=1, lr=3e-2, last_k=2)
    path = tmp_path / "curves.png"
    calmness_plot.draw(learngene, path)
    picture = Image.open(path)
    colours = picture.convert("RGB").getcolors(2**24) or []
    assert picture.format == "PNG" and picture.width > 1000 and len(colours) > 50
    found = calmness_plot.curves(learngene)
    assert len(found["rho"]) == 8 and len(found["units"]) == len(found["score"]) == 6
    with pytest.raises(SettingsError, match="without curves given"):
        calmness_plot.draw(extracted("vgg"), path)

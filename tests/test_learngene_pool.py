"""Learngene Pool: the loss of the distillation by hand, maps that learn and start the linear layers, a pool of 18."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS
from taught import TINY, compare_interrupted, noise, pictures
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Augment, Images, ordered_batches
from learngene_hub.errors import BudgetError, DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lesson, get_method
from learngene_hub.methods._stitch_growth import net_of
from learngene_hub.methods._stitch_net import fresh, least_squares, resized
from learngene_hub.methods._stitch_training import Draws, make_lesson, pool_loss, run, taught
from learngene_hub.methods._stitching import one_way
from learngene_hub.methods.learngene_pool import Auxiliary, LearngenePool, hidden, positions, soft_cross_entropy
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.teacher import Teacher

DEEP = replace(TINY, depth=12)
LESSON: dict[str, Any] = {
    "widths": [4, 8], "epochs": 1, "first_epochs": 1, "batch_size": 8, "crop_padding": 2, "init_images": 8,
    "held_out": 0.25, "seed": 3, "first_lr": 1e-2, "lr": 1e-2,
}  # fmt: skip


def extract(ancestor: nn.Module | None = None, **settings: Any) -> Learngene:
    chosen = LESSON | settings
    given = build_pico(DEEP) if ancestor is None else ancestor
    return factory.extract("learngene-pool", given, {"one": pictures()}, settings=chosen, facts=FACTS)


@cache
def pool_of_18() -> Learngene:
    """The desk-top version of the published pool: two auxiliaries of 6 blocks, of an ancestor of 12. Read only."""
    return extract()


def with_table(learngene: Learngene, accuracy: dict[int, float]) -> Learngene:
    """The same with a table that says so."""
    table: Any = learngene.provenance["routes"]
    rows = [[*row[:-1], accuracy[row[0]]] for row in table["rows"]]
    return replace(learngene, provenance={**learngene.provenance, "routes": {**table, "rows": rows}})


# The distillation -----------------------------------------------------------------------------------------------------


def test_positions_are_the_published_ones() -> None:
    assert [positions(depth, 3) for depth in (6, 9, 12)] == [[1, 3, 5], [2, 5, 8], [3, 7, 11]]
    assert [positions(depth, 2) for depth in (6, 12)] == [[2, 5], [5, 11]]
    assert [positions(depth, 1) for depth in (1, 6, 12)] == [[0], [5], [11]]
    method = LearngenePool()
    shapes = method.instances(ViTShape(depth=12, width=768, heads=12))
    assert {n: (shape.depth, shape.width, method._places(n, shapes)) for n, shape in shapes.items()} == {
        0: (6, 192, 3),
        2: (6, 768, 1),
    }


def tokens(vit: Any, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, tokens after each block and what attention adds in each, block by block."""
    blocks, attentions = [], []
    flow = vit._pos_embed(vit.patch_embed(x))
    for block in vit.blocks:
        attentions.append(block.attn(block.norm1(flow)))
        middle = flow + attentions[-1]
        flow = middle + block.mlp(block.norm2(middle))
        blocks.append(flow)
    return vit.forward_head(vit.norm(flow)), blocks, attentions


def mean_square(a: Tensor, b: Tensor) -> float:
    return float(((a - b) ** 2).sum() / a.numel())


@pytest.mark.parametrize("reduction", ["batchmean", "published"])
def test_the_loss_of_the_first_stage_is_the_papers(reduction: str) -> None:
    """Term by term, from the blocks of timm; labels are counted as they are."""
    settings = LearngenePool(first_labels=0.1, reduction=reduction, label_smoothing=0.0, temperature=2.0)
    ancestor: Any = build_pico(DEEP, seed=1)
    auxiliary = Auxiliary(settings, replace(TINY, depth=6, width=4, heads=1), DEEP, 0, 3).eval()
    x, y = noise(2, 3, 8, 8), torch.tensor([3, 0])
    with torch.no_grad():
        got = float(auxiliary.lesson(settings, ancestor, settings.recipe(first=True))(auxiliary, (x, y)))
        z, blocks, attentions = tokens(auxiliary.vit, x)
        told, told_blocks, told_attentions = tokens(ancestor, x)
    wanted, ours = (torch.softmax(each / 2.0, -1) for each in (told, z))
    logit = -sum(float(wanted[b, c] * ours[b, c].log()) for b in range(2) for c in range(4)) / (
        2 if reduction == "batchmean" else 2 * 4
    )
    total = logit
    for p, (own, theirs) in enumerate(zip([1, 3, 5], [3, 7, 11], strict=True)):
        m, q = (layers[p] for layers in (auxiliary.blocks, auxiliary.attentions))
        with torch.no_grad():
            total += mean_square(blocks[own], told_blocks[theirs] @ m.weight.T + m.bias)  # type: ignore[operator]
            total += mean_square(attentions[own], told_attentions[theirs] @ q.weight.T + q.bias)  # type: ignore[operator]
    truth = -sum(float(torch.log_softmax(z, -1)[b, c]) for b, c in enumerate((3, 0))) / 2
    assert got == pytest.approx(0.1 * truth + 0.9 * total, rel=1e-5)


def test_what_is_looked_at_is_before_the_residual_sum_and_after_the_block() -> None:
    vit: Any = build_pico(replace(TINY, depth=3))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        logits, blocks, attentions = hidden(vit, x, [0, 2])
        want, all_blocks, all_attentions = tokens(vit, x)
    torch.testing.assert_close(logits, want)
    for place, i in enumerate((0, 2)):
        torch.testing.assert_close(blocks[place], all_blocks[i])
        torch.testing.assert_close(attentions[place], all_attentions[i])
    assert not vit.blocks[0]._forward_hooks and not vit.blocks[0].attn._forward_hooks  # nothing is left behind


@cache
def first_stage() -> tuple[Auxiliary, list[Tensor], list[Tensor]]:
    """(the narrow auxiliary as extract trains it, its maps before, the gradients of the last update)."""
    settings = get_method("learngene-pool", LESSON)
    assert isinstance(settings, LearngenePool)
    ancestor = build_pico(DEEP)
    lesson = make_lesson(settings, Teacher(ancestor), {"one": pictures()}, DEEP, IMAGENET, "learngene-pool")
    auxiliary = Auxiliary(settings, replace(DEEP, depth=6, width=4, heads=1), DEEP, 0, 3)
    before = [parameter.detach().clone() for parameter in auxiliary.parameters()]
    recipe = settings.recipe(first=True)
    run(auxiliary, auxiliary.lesson(settings, resized(ancestor, 8), recipe), recipe, lesson, iter, None)
    return auxiliary, before, [parameter.grad for parameter in auxiliary.parameters()]  # type: ignore[misc]


def test_pitfall_the_maps_are_in_the_optimiser() -> None:
    """One released version trains the auxiliary alone, so that its learned maps are random matrices."""
    auxiliary, before, gradients = first_stage()
    names = [name for name, _ in auxiliary.named_parameters()]
    maps = [i for i, name in enumerate(names) if name.startswith(("blocks.", "attentions."))]
    assert len(maps) == 2 * 3 * 2
    for i in maps:
        parameter = auxiliary.get_parameter(names[i]).detach()
        assert bool(gradients[i].any()) and float((parameter - before[i]).abs().max()) > 1e-3, names[i]


def test_the_linear_layers_start_from_the_maps_that_were_learned() -> None:
    """With a pool that hardly trains, each is the transpose of the mean of the three maps of the first stage."""
    learngene, (auxiliary, before, _) = extract(lr=1e-9), first_stage()
    learned = [layer.weight.detach() for layer in auxiliary.blocks]
    names = [name for name, _ in auxiliary.named_parameters()]
    random = [before[names.index(f"blocks.{p}.weight")] for p in range(3)]
    want, wrong = (sum(maps[1:], maps[0]).T / 3 for maps in (learned, random))
    for layer in range(5):
        got = learngene.tensors[f"stitch.0-2.{layer}.weight"]
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        assert float((got - wrong).abs().max()) > 1e-3
    for i in range(6):  # and the auxiliary is the one that learned with them
        own = learngene.tensors[f"instance.0.block.{i}.attn.qkv.weight"]
        torch.testing.assert_close(own, auxiliary.vit.blocks[i].attn.qkv.weight, atol=1e-6, rtol=0)


# Pitfalls of the released code ----------------------------------------------------------------------------------------


def test_pitfall_soft_losses_are_not_divided_by_the_classes_unless_asked() -> None:
    ours, theirs = noise(4, 5, seed=1), noise(4, 5, seed=2)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    divergence = float((p * (p / q).log()).sum()) / 4
    assert float(taught(LearngenePool(), ours, theirs)) == pytest.approx(divergence, rel=1e-5)
    assert float(taught(LearngenePool(reduction="published"), ours, theirs)) == pytest.approx(divergence / 5, rel=1e-5)
    whole, published = (soft_cross_entropy(ours, theirs, 1.0, each) for each in ("batchmean", "published"))
    assert float(whole) == pytest.approx(5 * float(published), rel=1e-5)


def test_pitfall_labels_are_not_shifted() -> None:
    """One released version takes 1 from each label of one data set."""
    settings = LearngenePool(labels=1.0, distil=0.0)
    lesson = make_lesson(settings, Teacher(build_pico(TINY)), {"one": pictures()}, TINY, IMAGENET, "x")
    logits, y = noise(3, 4), torch.tensor([0, 3, 1])
    want = -(logits[0].log_softmax(-1)[0] + logits[1].log_softmax(-1)[3] + logits[2].log_softmax(-1)[1]) / 3
    torch.testing.assert_close(pool_loss(settings, lesson, logits, noise(3, 3, 8, 8), y, 0.0), want)


def test_pitfall_drop_path_is_honoured() -> None:
    """One released version builds its blocks anew without it."""
    auxiliary = Auxiliary(LearngenePool(drop_path=0.5), replace(TINY, depth=6), TINY, 0, 1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in auxiliary.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(auxiliary.train()(x)[0], auxiliary(x)[0])  # it is at work while the auxiliary learns
        assert torch.equal(auxiliary.eval()(x)[0], auxiliary(x)[0])


def test_pitfall_the_ancestor_is_in_eval_mode_and_its_own_is_left_alone() -> None:
    state = build_pico(DEEP).state_dict()
    dropping = DEEP.build(drop_path_rate=0.5)
    dropping.load_state_dict(state)
    learngene = extract(dropping.train())
    assert dropping.training and all(parameter.grad is None for parameter in dropping.parameters())
    want = pool_of_18()
    assert all(torch.equal(learngene.tensors[name], tensor) for name, tensor in want.tensors.items())


def test_pitfall_sampling_by_cost_draws_the_auxiliaries_more_often_than_one_route_in_all() -> None:
    """Uniform sampling gives each of them one update in 18."""
    shapes = {number: ViTShape(depth=6, width=width, heads=width // 64) for number, width in ((0, 192), (2, 768))}
    routes = one_way({0: 6, 2: 6}, nearest=False)
    uniform = Draws.of(LearngenePool(), routes, shapes)
    assert all(uniform.share(route.id) == pytest.approx(1 / 18) for route in routes)
    grouped = Draws.of(LearngenePool(sampling="flops", flops_gap=1e9), routes, shapes)
    costs = {route.id: route.shape(shapes).flops() / 2e9 for route in routes}
    assert grouped.groups[0] == [0]  # 0.6 billion multiply-adds; the next has 2.1
    for group in grouped.groups:
        assert max(costs[n] for n in group) - min(costs[n] for n in group) <= 1.0
    assert grouped.share(0) == pytest.approx(1 / len(grouped.groups)) and grouped.share(0) > 2 * uniform.share(0)
    assert sum(grouped.share(route.id) for route in routes) == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [grouped.next(generator) for _ in range(2000)]
    for number in (0, 2, 26):
        assert drawn.count(number) / 2000 == pytest.approx(grouped.share(number), abs=0.03)


def test_the_second_stage_sees_no_mixed_images_and_no_smoothed_labels() -> None:
    first, second = (LearngenePool().recipe(first=first) for first in (True, False))
    assert first.augment == Augment(flip=True, crop_padding=4, erase=0.25, mixup=0.8, cutmix=1.0)
    assert second.augment == Augment(flip=True, crop_padding=4, erase=0.25)
    assert (first.label_smoothing, second.label_smoothing) == (0.1, 0.0)
    assert (first.epochs, second.epochs, first.batch_size, first.lr) == (100, 50, 256, 2.5e-4)


# The pool -------------------------------------------------------------------------------------------------------------


def test_every_route_of_the_pool_is_trained_measured_and_grown() -> None:
    learngene = pool_of_18()
    table: Any = learngene.provenance["routes"]
    assert table["columns"] == ["id", "route", "params", "flops", "accuracy"]
    assert [row[0] for row in table["rows"]] == [0, 2, *range(19, 35)]
    assert learngene.reach.routes == 18 and learngene.reach.depths == (6, 8)
    assert (
        learngene.shape == replace(TINY, depth=6) and learngene.provenance["measured"] == "labels, on 4 images held out"
    )
    held = pictures().split(0.25, torch.Generator().manual_seed(3))[1]
    for number, name, params, flops, accuracy in table["rows"]:
        model = factory.expand(learngene, settings={"route": number})
        assert sum(p.numel() for p in model.parameters()) == params, name
        assert factory.plan(learngene, settings={"route": number}).flops() == flops
        assert factory.evaluate(model, held).accuracy == pytest.approx(accuracy, abs=1e-3), name
    told: Any = learngene.provenance
    assert told["steps"] == 3 and told["images_seen"] == 3 * 8 and len(told["loss"]["first"]) == 2
    assert told["teacher_flops"] == 24 * DEEP.flops()
    alone = [replace(TINY, depth=6, width=width, heads=width // 4).flops() for width in (4, 8)]
    mean = sum(row[3] for row in table["rows"]) / 18
    assert told["flops"] == 8 * sum(alone) + round(8 * mean)


def test_the_loss_falls() -> None:
    """Of each auxiliary in the first stage; and of every route, against a pool that did not train. Each class has a
    colour of its own."""
    labels = torch.arange(16) % 4
    colours = torch.tensor([[250, 5, 5], [5, 250, 5], [5, 5, 250], [250, 250, 250]], dtype=torch.uint8)
    images = Images(colours[labels][:, :, None, None].expand(16, 3, 8, 8).clone(), labels, tuple("abcd"), "colours")
    plain = LESSON | {"first_epochs": 6, "depth": 3, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "held_out": 0.0}
    before, after = (
        factory.extract("learngene-pool", build_pico(DEEP), {"colours": images}, settings=plain | more)
        for more in ({"lr": 1e-9}, {"epochs": 20})
    )
    loss: Any = after.provenance["loss"]
    assert loss["first"][5] < 0.9 * loss["first"][0] and loss["first"][11] < 0.9 * loss["first"][6]
    for row in after.provenance["routes"]["rows"]:  # type: ignore[index]
        models = [factory.expand(each, settings={"route": row[0]}) for each in (before, after)]
        start, end = (factory.evaluate(model, images).loss for model in models)
        assert end < (start if row[0] == 0 else 0.7 * start), row[1]  # one update in 9 reaches the narrow head


def test_pitfall_least_squares_start_a_pool_as_well() -> None:
    """One released version refuses that mode. With a pool that hardly trains they are those of the instances."""
    learngene = extract(init="least-squares", lr=1e-9)
    net = net_of(learngene, nearest=False)
    train = pictures().split(0.25, torch.Generator().manual_seed(3))[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))[:8]
    x, _ = next(ordered_batches(train.subset(order), 8, IMAGENET))
    least_squares(net, x)
    for name, tensor in net.stitches.state_dict().items():
        torch.testing.assert_close(learngene.tensors[f"stitch.{name}"], tensor, atol=1e-4, rtol=1e-3)


def test_three_widths_make_a_pool_of_every_pair() -> None:
    learngene = extract(widths=[4, 8, 12], depth=2, epochs=1)
    rows: Any = learngene.provenance["routes"]["rows"]
    assert [row[0] for row in rows] == list(range(3 + 3 * 4)) and learngene.reach.routes == 15
    assert learngene.tensors["stitch.0-1.0.weight"].shape == (8, 4)
    assert learngene.tensors["stitch.1-2.0.weight"].shape == (12, 8)


def test_an_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LESSON | {"depth": 2, "held_out": 0.0, "places": [2, 1]}
    compare_interrupted("learngene-pool", settings, tmp_path, monkeypatch, stops_after=5, of=6)


# The choice -----------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_most_accurate_route_that_fits() -> None:
    accuracy = {n: float(n) for n in (0, 2, *range(19, 35))}
    learngene = with_table(pool_of_18(), accuracy)
    sizes = {n: factory.plan(learngene, settings={"route": n}) for n in accuracy}
    assert factory.plan(learngene) == learngene.shape == sizes[2]  # nothing asked: the native one
    assert factory.plan(learngene, depth=6) == sizes[32]  # of 20, 23, 26, 29, 32 and the two auxiliaries
    assert factory.plan(learngene, width=4) == sizes[0] and factory.plan(learngene, heads=1) == sizes[0]
    for budget in (sizes[0].params(), sizes[32].params(), sizes[29].params(), 10**9):
        fitting = [n for n, shape in sizes.items() if shape.params() <= budget]
        assert factory.plan(learngene, max_params=budget) == sizes[max(fitting)]
    best = with_table(learngene, accuracy | {20: 99.0})
    assert factory.plan(best, max_params=10**9) == sizes[20] and factory.plan(best, depth=6) == sizes[20]
    assert factory.plan(best, depth=6, width=8) == sizes[2]  # both sizes of an instance: it alone, whatever it scores
    assert factory.plan(best, depth=6, width=8, max_params=sizes[2].params() - 1) == sizes[20]
    for limit in (sizes[0].flops(), sizes[25].flops(), 10**12):  # the same by any other limit
        fitting = [n for n, shape in sizes.items() if shape.flops() <= limit]
        assert factory.plan(learngene, max_flops=limit) == sizes[max(fitting)]
        assert factory.plan(learngene, depth=7, max_flops=10**12) == sizes[max(n for n in sizes if sizes[n].depth == 7)]
    assert factory.plan(learngene, max_params=10**9, prefer=lambda shape: -shape.params()) == sizes[0]
    untold = replace(learngene, provenance={})
    assert factory.plan(untold, max_params=10**9) == sizes[21]  # the largest


@pytest.mark.parametrize("odd", [None, 3, {"columns": ["id"], "rows": [[1]]}, {"rows": [[0, "", 1, 1, "x"]]}, []])
def test_a_table_that_is_none_is_no_table(odd: Any) -> None:
    learngene = replace(pool_of_18(), provenance={"routes": odd})
    assert factory.plan(learngene, max_params=10**9) == factory.plan(learngene, settings={"route": 21})


def test_what_no_route_has_is_refused_with_the_nearest_and_who_has_it() -> None:
    learngene = pool_of_18()
    for sizes, message in (
        (
            {"width": 12},
            "width 12 asked; .*depth 6-8 and end 4, 8 wide: .*nearest are route 2 .*net2net grows every depth",
        ),
        ({"width": 10}, "width 10 asked; .*; heads are 4 wide everywhere"),
        ({"depth": 9}, "depth 9 asked; .*nearest are route 21 "),
        ({"depth": 8, "width": 4}, "depth 8 and width 4 asked"),
        ({"heads": 5}, "heads 5 asked"),
        ({"settings": {"route": 3}}, "route 3 asked; this pool has 0, 2, 19-34"),
        ({"settings": {"route": 19}, "depth": 6}, "depth 6 asked with route 19, which is 1x4.6x8"),
        ({"image_size": 9}, "multiple of patch"),
    ):
        with pytest.raises(ShapeError, match=message):
            factory.plan(learngene, **sizes)  # type: ignore[arg-type]
    least = factory.plan(learngene, settings={"route": 0}).params()
    with pytest.raises(
        BudgetError, match=f"the smallest in reach, {factory.plan(learngene, settings={'route': 0})}, has {least:,}"
    ):
        factory.plan(learngene, max_params=least - 1)


def test_the_head_is_inherited_where_the_classes_are_as_many() -> None:
    learngene = pool_of_18()
    stored = learngene.tensors["instance.2.head.weight"]
    same, other = (factory.expand(learngene, num_labels=n, settings={"route": 24}) for n in (4, 7))
    assert torch.equal(same.head.weight, stored) and other.head.weight.shape == (7, 8)  # type: ignore[union-attr]
    anew = factory.expand(learngene, settings={"route": 24, "head": "fresh"}, seed=1)
    assert not torch.equal(anew.head.weight, stored)  # type: ignore[union-attr]
    grey = factory.expand(learngene, settings={"route": 24}, in_chans=1, image_size=12)
    with torch.no_grad():
        assert grey(noise(1, 1, 12, 12)).shape == (1, 4)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": [8, 4]}, "two or three that rise"),
        ({"widths": [4]}, "two or three that rise"),
        ({"widths": [4, 6]}, "width 6 asked; the ancestor's heads are 4 wide"),
        ({"depth": 1}, "1 blocks asked"),
        ({"places": [4, 1]}, "a number from 1 to 3"),
        ({"depth": 2, "places": [3, 1]}, "3 places asked; 2 blocks have fewer"),
        ({"first_labels": 1.0}, "first_labels 1.0 asked"),
        ({"init": "eye"}, "init 'eye' asked; there are least-squares, transpose, random"),
        ({"sampling": "often"}, "sampling 'often' asked"),
        ({"labels": 0.0, "distil": 0.0}, "at least one of them is above 0"),
        ({"held_out": 0.99}, "cannot hold out"),
        ({"crop_padding": 8}, "below the image size 8"),
        ({"route": -2}, "route -2 asked"),
    ],
)
def test_settings_are_refused_before_anything_is_trained(settings: dict[str, Any], message: str) -> None:
    def never(steps: Any) -> Any:
        raise AssertionError("training began")

    with pytest.raises(SettingsError, match=message):
        factory.extract(
            "learngene-pool", build_pico(DEEP), {"one": pictures()}, settings=LESSON | settings, watch=never
        )


def test_data_are_refused_before_anything_is_trained() -> None:
    ancestor = build_pico(DEEP)
    with pytest.raises(SettingsError, match="3 classes, the pool 4; labels=0"):
        factory.extract("learngene-pool", ancestor, {"one": pictures(3)}, settings=LESSON)
    with pytest.raises(DataError, match="1 channels asked; the pool takes 3"):
        factory.extract("learngene-pool", ancestor, {"one": pictures(channels=1)}, settings=LESSON)
    with pytest.raises(SettingsError, match="no data sets asked"):
        factory.extract("learngene-pool", ancestor, {}, settings=LESSON)
    headless = build_pico(replace(DEEP, classes=0))
    with pytest.raises(SettingsError, match="without a classifier"):
        factory.extract("learngene-pool", headless, {"one": pictures()}, settings=LESSON)


def test_images_of_another_size_are_learned_at_their_own() -> None:
    """The ancestor's positions are resampled; the pool is of the images' size."""
    data = {"one": pictures(size=12)}
    learngene = factory.extract("learngene-pool", build_pico(DEEP), data, settings=LESSON | {"depth": 2})
    assert learngene.shape.image_size == 12 and learngene.tensors["instance.0.stem.pos_embed"].shape == (1, 10, 4)


def test_without_labels_the_table_counts_agreement_with_the_teacher() -> None:
    data = {"one": pictures(3), "two": pictures(5)}
    settings = LESSON | {"labels": 0.0, "first_labels": 0.0, "depth": 2, "held_out": 0.0}
    learngene = factory.extract("learngene-pool", build_pico(DEEP), data, settings=settings)
    assert learngene.provenance["measured"] == "agreement with the teacher, on the 32 images learned from"
    ancestor, model = build_pico(DEEP), factory.expand(learngene)
    x, _ = next(ordered_batches(_lesson.pooled(data, labelled=False, method="x"), 32, IMAGENET))
    with torch.no_grad():
        agreed = (model(x).argmax(-1) == ancestor(x).argmax(-1)).float().mean()
    rows: Any = learngene.provenance["routes"]["rows"]
    assert dict((row[0], row[-1]) for row in rows)[2] == pytest.approx(100 * float(agreed), abs=1e-3)


def test_fresh_instances_are_drawn_with_their_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (fresh(TINY, seed).state_dict()["blocks.0.attn.qkv.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)

"""LSAMD: the acceptance tests of its specification, formulas by hand, searches for planted optima, rules by table."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, VARIANTS, features, planted, variant
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images, normalise
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lsamd_data as lsamd_data
from learngene_hub.methods import _lsamd_search as searching
from learngene_hub.methods import _lsamd_training as training
from learngene_hub.methods import get_method
from learngene_hub.methods.lsamd import Lsamd
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.teacher import teacher_logits
from learngene_hub.training import Step

QUICK: dict[str, Any] = {"epochs": 4, "steps_per_epoch": 2, "batch_size": 9, "alpha_lr": 0.5, "crop_padding": 2}


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_images(name: str, seed: int, *, count: int = 20, classes: int = 3, size: int = 32) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    return Images(pixels, labels, tuple(str(i) for i in range(classes)), name)


def data_sets(size: int = 32) -> dict[str, Images]:
    return {name: random_images(name, i, classes=3 + i, size=size) for i, name in enumerate(("one", "two", "three"))}


def extract(settings: dict[str, Any], ancestor: nn.Module, data: dict[str, Images] | None = None) -> Learngene:
    return Lsamd(**(QUICK | settings)).extract(ancestor, data or data_sets(), facts=FACTS, preprocessing=IMAGENET)


def super_ancestor(ancestor: nn.Module, **more: Any) -> searching.SuperAncestor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return searching.SuperAncestor(ancestor, [4, 5], **({"adapter": "bottleneck", "rank": 4} | more))


def a_search(method: Lsamd | None = None, *, steps: int = 100, per_epoch: int = 10) -> training._Search:
    """The moving parts over one data set of each kind, without any training."""
    data = [random_images("one", 1, classes=4), random_images("two", 2, classes=5)]
    tasks = [lsamd_data.Task(d.name, d, d.subset([0, 1]), d, None, 4) for d in data]
    model = super_ancestor(build_pico(variant("token")))
    return training._Search(method or Lsamd(), model, tasks, IMAGENET, steps, per_epoch)


def a_step(step: int, *, epoch: int = 0, done: bool = True) -> Step:
    return Step(step=step, epoch=epoch, of=100, loss=1.0, lr=0.1, images=1, seconds=0.1, epoch_done=done)


# Acceptance tests of the specification, section 7 --------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("adapter", searching.ADAPTERS)
def test_1_at_the_start_every_path_of_every_data_set_is_the_ancestor(name: str, adapter: str) -> None:
    ancestor = build_pico(variant(name))
    model, x = super_ancestor(ancestor, adapter=adapter), noise(2, 3, 32, 32, seed=5)
    want = features(ancestor, x)
    with torch.no_grad():
        for task, path in itertools.product(range(2), itertools.product((0, 1), repeat=3)):
            torch.testing.assert_close(model.features(x, task, path), want, rtol=0, atol=1e-5)
        gates = searching.gumbel_gates(model.alpha[0], 1.0, torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.sampled(x, 0, gates), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.mixed(x, 0, gates), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.ancestral(x, range(3)), want, rtol=0, atol=1e-5)


def count_blocks(model: searching.SuperAncestor) -> list[str]:
    """A list that gets a letter for every block that runs."""
    ran: list[str] = []
    for letter, blocks in (("B", [model.base.blocks]), ("S", model.specific)):
        for block in itertools.chain.from_iterable(blocks):
            block.register_forward_hook(lambda *_, letter=letter: ran.append(letter))
    return ran


def test_2_a_sampled_forward_runs_exactly_one_block_per_position() -> None:
    model = super_ancestor(build_pico(variant("token")))
    ran, x = count_blocks(model), noise(1, 3, 32, 32)
    for seed in range(4):
        gates = searching.gumbel_gates(model.alpha[1], 5.0, torch.Generator().manual_seed(seed))
        model.sampled(x, 1, gates)
        assert ran == ["BS"[int(k)] for k in gates.argmax(-1)]
        ran.clear()
        model.features(x, 1, gates.argmax(-1).tolist())
        assert len(ran) == 3
        ran.clear()
    model.mixed(x, 0, gates)
    assert sorted(ran) == ["B"] * 3 + ["S"] * 3


@pytest.mark.parametrize("kind", ["sampled", "mixed"])
def test_3_alpha_gets_a_gradient_from_its_own_data_sets_alone(kind: str) -> None:
    model = super_ancestor(build_pico(variant("token")))
    with torch.no_grad():
        for block in model.specific[1]:
            block.mlp.fc2.weight.add_(
                noise(64, 256), alpha=0.1
            )  # at the start both updates are equal, and so is the loss
        for adapter in model.adapters[1]:
            adapter.up.weight.add_(noise(64, 4), alpha=0.1)
    gates = searching.gumbel_gates(model.alpha[1], 1.0, torch.Generator().manual_seed(1))
    model.heads[1](getattr(model, kind)(noise(2, 3, 32, 32), 1, gates)).square().sum().backward()
    gradient = model.alpha.grad
    assert gradient is not None
    assert bool((gradient[1] != 0).all()) and not gradient[0].any()
    torch.testing.assert_close(gradient[1].sum(-1), torch.zeros(3), rtol=0, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_4_with_all_blocks_kept_and_a_base_that_stays_the_descendant_is_the_ancestor(name: str) -> None:
    ancestor = build_pico(variant(name))
    before = {key: tensor.clone() for key, tensor in ancestor.state_dict().items()}
    learngene = extract({"keep": 3, "base_lr": 0.0}, ancestor)
    grown = factory.expand(learngene).state_dict()
    for key, tensor in before.items():
        assert torch.equal(ancestor.state_dict()[key], tensor), key
        assert key.startswith("head.") or torch.equal(grown[key], tensor), key


def test_4b_a_learning_rate_of_zero_leaves_the_ancestor_too() -> None:
    """The specification says "lr 0": of the whole step, not only of the base."""
    ancestor = build_pico(variant("token"))
    grown = factory.expand(extract({"keep": 3, "base_lr": 0.0, "lr": 0.0}, ancestor)).state_dict()
    assert all(torch.equal(grown[k], t) for k, t in ancestor.state_dict().items() if not k.startswith("head."))


def test_5_extraction_is_deterministic_under_ties() -> None:
    """alpha_lr 0: every path is base everywhere, every frequency and probability ties."""
    ancestor = build_pico(variant("token", depth=5))
    found = [extract({"alpha_lr": 0.0, "keep": 3, "epochs": 2, "steps_per_epoch": 1}, ancestor) for _ in range(2)]
    assert found[0].tensors["search.frequency"].tolist() == [1.0] * 5
    assert {n.split(".")[1] for n in found[0].tensors if n.startswith("block.")} == {"0", "2", "4"}
    assert all(torch.equal(found[0].tensors[n], found[1].tensors[n]) for n in found[0].tensors)


def test_6_the_artefact_holds_no_adapter_specific_block_or_head() -> None:
    learngene = extract({"keep": 2}, build_pico(variant("token")))
    groups = {name.split(".")[0] for name in learngene.tensors}
    assert groups == {"stem", "block", "tail", "search"}
    assert groups <= Lsamd.groups
    for word in ("dad", "spec", "head", "adapter"):
        assert not any(word in name for name in learngene.tensors)


# The super ancestor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rank"), [("token", 4), ("odd", 16)])
def test_the_super_ancestor_has_the_parameters_that_the_formula_says(name: str, rank: int) -> None:
    """L (T + 1) blocks of 12 d^2 + 13 d, and T L adapters of 2 d r + r + 3 d; stem, tail and heads beside them."""
    shape = variant(name)
    depth, width, sets = shape.depth, shape.width, 2
    model = super_ancestor(build_pico(shape), rank=rank)
    blocks = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("base.blocks", "specific")))
    adapters = sum(p.numel() for p in model.adapters.parameters())
    assert blocks == depth * (sets + 1) * (12 * width**2 + 13 * width)
    assert adapters == sets * depth * (2 * width * rank + rank + 3 * width)
    assert [head.out_features for head in model.heads] == [4, 5]
    assert model.alpha.shape == (2, depth, 2) and not model.alpha.any()


def test_a_bottleneck_adapter_is_z_plus_u_gelu_of_v_of_the_norm() -> None:
    adapter = searching.make_adapter("bottleneck", 6, 3)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.add_(noise(*parameter.shape, seed=i))
    assert isinstance(adapter, searching.BottleneckAdapter)
    z = noise(2, 5, 6)
    centred = z - z.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * adapter.norm.weight + adapter.norm.bias
    inner = normed @ adapter.down.weight.T + adapter.down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    want = z + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(z), want, rtol=1e-5, atol=1e-5)


def test_the_paths_of_the_super_ancestor_take_the_blocks_they_name() -> None:
    """Base then adapter, or specific, or nothing: against the blocks called one by one."""
    model = super_ancestor(build_pico(variant("token")), candidates=3)
    with torch.no_grad():
        for i, parameter in enumerate(itertools.chain(model.specific.parameters(), model.adapters.parameters())):
            parameter.add_(noise(*parameter.shape, seed=i), alpha=0.05)
        x = noise(2, 3, 32, 32)
        z = model.stem(x)
        z = model.adapters[1][0](model.base.blocks[0](z))
        z = model.specific[1][1](z)
        want = model.base.norm(z)[:, 0]
        torch.testing.assert_close(model.features(x, 1, [0, 1, 2]), want)
        gates = torch.eye(3)  # base, specific, skip
        torch.testing.assert_close(model.mixed(x, 1, gates), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.sampled(x, 1, gates), want, rtol=1e-4, atol=1e-4)
        plain = model.base.blocks[2](model.base.blocks[0](model.stem(x)))
        torch.testing.assert_close(model.ancestral(x, [0, 2]), model.base.norm(plain)[:, 0])


# Gates ---------------------------------------------------------------------------------------------------------------


def test_gates_are_one_hot_and_their_gradient_is_that_of_the_softmax() -> None:
    alpha, tau, weights = noise(4, 3, seed=1).requires_grad_(), 0.7, noise(4, 3, seed=2)
    gates = searching.gumbel_gates(alpha, tau, torch.Generator().manual_seed(9))
    uniform = torch.rand((4, 3), generator=torch.Generator().manual_seed(9))
    noisy = alpha.detach() - torch.log(-torch.log(uniform))
    want = torch.zeros(4, 3)
    want[torch.arange(4), noisy.argmax(-1)] = 1.0
    torch.testing.assert_close(gates.detach(), want, rtol=0, atol=1e-6)
    (gates * weights).sum().backward()
    soft = (noisy / tau).softmax(-1)  # d/da_j sum_k w_k s_k = s_j (w_j - sum_k w_k s_k) / tau
    formula = soft * (weights - (weights * soft).sum(-1, keepdim=True)) / tau
    torch.testing.assert_close(alpha.grad, formula, rtol=1e-4, atol=1e-6)


def test_gates_are_one_hot_to_the_last_bit() -> None:
    """A gate of 1 - 1e-7 would make the sampled forward another one than that of the path."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gates = searching.gumbel_gates(noise(12, 2), 0.9, generator)
        assert bool(((gates == 0) | (gates == 1)).all()) and gates.sum() == 12


@pytest.mark.parametrize("tau", [5.0, 0.1])
def test_branches_are_sampled_as_the_softmax_of_alpha_says_at_any_temperature(tau: float) -> None:
    alpha = torch.tensor([0.0, 1.0, -0.5]).repeat(20000, 1)
    gates = searching.gumbel_gates(alpha, tau, torch.Generator().manual_seed(4))
    want = torch.tensor([1.0, math.e, math.exp(-0.5)]) / (1 + math.e + math.exp(-0.5))
    torch.testing.assert_close(gates.mean(0), want, rtol=0, atol=0.015)  # 4 standard deviations: 4 sqrt(.25 / 20000)


def test_uniform_paths_take_every_candidate_alike() -> None:
    path = searching.uniform_path(6000, 3, torch.Generator().manual_seed(0))
    assert all(abs(path.count(k) - 2000) < 150 for k in range(3))


# The objective of the path logits ------------------------------------------------------------------------------------


def test_the_penalty_by_hand() -> None:
    """softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2)."""
    alpha = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    spread = (-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) + math.log(2.0)) / 2
    assert float(training.alpha_penalty(alpha, 0.3, 0.0)) == pytest.approx(0.3 * 0.625)
    assert float(training.alpha_penalty(alpha, -0.2, 0.01)) == pytest.approx(-0.2 * 0.625 - 0.01 * spread)
    certain = torch.tensor([[[100.0, -100.0]]], requires_grad=True)
    training.alpha_penalty(certain, 0.1, 0.01).backward()
    assert certain.grad is not None and bool(certain.grad.isfinite().all())


def test_the_dual_control_by_hand() -> None:
    """lambda <- clip(lambda + 0.05 (s - 0.35), -0.5, 0.5): up while too many blocks are specific, down below that."""
    search = a_search()
    with torch.no_grad():
        search.model.alpha[..., 1] = math.log(3.0)  # s = 3/4
    search._end_of_epoch(a_step(10), "B")
    assert search.penalty == pytest.approx(0.05 * 0.4)
    search._end_of_epoch(a_step(20, epoch=1), "B")
    assert search.penalty == pytest.approx(2 * 0.05 * 0.4)
    with torch.no_grad():
        search.model.alpha[..., 1] = -50.0  # s = 0
    for _ in range(3):
        search._end_of_epoch(a_step(30), "B")
    assert search.penalty == pytest.approx(2 * 0.05 * 0.4 - 3 * 0.05 * 0.35)
    for _ in range(40):
        search._end_of_epoch(a_step(40), "B")
    assert search.penalty == -0.5
    for phase in "AC":
        search._end_of_epoch(a_step(50), phase)
    assert search.penalty == -0.5


def test_phases_temperature_and_entropy_follow_the_schedule() -> None:
    """100 updates: A 0-19, B 20-79, C 80-99; the temperature falls from 5 to 0.1 over B; the bonus ends half-way."""
    search = a_search(steps=100)
    letters = []
    for step in range(100):
        search.step = step
        letters.append(search.phase)
    assert "".join(letters) == "A" * 20 + "B" * 60 + "C" * 20
    for step, tau in ((0, 5.0), (20, 5.0), (50, math.sqrt(5.0 * 0.1)), (80, 0.1), (99, 0.1)):
        search.step = step
        assert search.tau == pytest.approx(tau)
    for step, bonus in ((20, 0.01), (49, 0.01), (50, 0.0), (79, 0.0)):
        search.step = step
        assert search._entropy() == bonus


def test_alpha_is_the_mean_over_the_last_epochs_of_the_search() -> None:
    search = a_search(Lsamd(alpha_epochs=2))
    for value in (5.0, 1.0, 3.0):
        with torch.no_grad():
            search.model.alpha.fill_(value)
        search._end_of_epoch(a_step(10), "B")
    assert search.alpha().unique().tolist() == [2.0]


def test_the_alpha_step_moves_alpha_alone() -> None:
    search = a_search(Lsamd(alpha_lr=0.1))
    search.step = 30
    before = {name: p.detach().clone() for name, p in search.model.named_parameters()}
    search._alpha_step()
    for name, parameter in search.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "alpha"), name
        assert parameter.grad is None or not parameter.grad.any(), name


def test_a_search_drives_alpha_to_the_branch_that_is_better() -> None:
    """One data set's specific blocks are disturbed, the other's adapters; labels are what the ancestor would say.

    The disturbance is mild: the gradient of a gate is that of a straight line at the sampled path, and says little of a
    branch far away.
    """
    search = a_search(Lsamd(alpha_lr=0.1))
    with torch.no_grad():
        for task, parts in enumerate((search.model.specific[0], search.model.adapters[1])):
            for i, parameter in enumerate(parts.parameters()):
                parameter.add_(noise(*parameter.shape, seed=i), alpha=0.1)
            head = search.model.heads[task]
            head.weight.copy_(noise(*head.weight.shape, seed=task))
            images = search.tasks[task].paths = search.tasks[task].whole
            x = normalise(images.pixels, IMAGENET)
            images.labels.copy_(head(search.model.ancestral(x, range(3))).argmax(-1))
    for step in range(20, 60):
        search.step = step
        search._alpha_step()
    share = search.model.alpha.detach().softmax(-1).mean(1)
    assert float(share[0, 0]) > 0.7 and float(share[1, 1]) > 0.7


def test_the_running_mean_of_the_base_is_exponential() -> None:
    search = a_search(Lsamd(average=0.9))
    weight = search.model.base.blocks[0].mlp.fc1.weight
    mean = None
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)
        search._average()
        mean = value if mean is None else 0.9 * mean + 0.1 * value
    torch.testing.assert_close(search.mean["blocks.0.mlp.fc1.weight"], torch.full_like(weight, mean))


# Data and the ancestor as teacher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [0.25, 0.0])
def test_every_image_meets_its_own_teacher_logits(held_out: float) -> None:
    """Image i is grey i, and the teacher says i of it: in every phase for split A, never for split B."""
    method = Lsamd(flip=False, crop_padding=0, held_out=held_out, distil=1.0, distil_on=("one",), batch_size=8)
    pixels = torch.arange(16, dtype=torch.uint8).reshape(16, 1, 1, 1).expand(16, 3, 32, 32).contiguous()
    images = Images(pixels, torch.arange(16) % 3, ("a", "b", "c"), "one")
    rest, paths = lsamd_data.split_images(method, images, 0)
    whole = rest if paths is rest else lsamd_data.joined(rest, paths)
    told = whole.pixels[: len(rest), :1, 0, 0].float()
    search = a_search(method)
    search.tasks[0] = task = lsamd_data.Task("one", rest, paths, whole, told, 8)
    for step in (0, 50, 90):
        search.step = step
        batch = search.draw(task, 0, salt=0)
        grey = (batch.x[:, 0, 0, 0] * IMAGENET.std[0] + IMAGENET.mean[0]) * 255
        assert batch.teacher is not None, f"phase {search.phase}"
        heard = batch.teacher[:, 0].isfinite()  # NaN would say that the ancestor did not see an image
        assert bool(heard.any())
        torch.testing.assert_close(batch.teacher[heard, 0], grey[heard], rtol=0, atol=1e-2)
        assert torch.equal(batch.y, grey.round().long() % 3)
    search.step = 50
    assert search.draw(task, 0, salt=1).teacher is None


@pytest.mark.parametrize("limit", [0, 4])
def test_a_limited_teacher_does_not_limit_the_images_that_are_trained_on(limit: int) -> None:
    """``distil_limit`` is of the images that the ancestor sees; the cross-entropy has all of them."""
    method = Lsamd(
        flip=False, crop_padding=0, held_out=0.25, distil=1.0, distil_on=("one",), distil_size=32, distil_limit=limit
    )
    images = random_images("one", 0, count=20)
    splits = {
        "one": lsamd_data.split_images(method, images, 0),
        "two": lsamd_data.split_images(method, random_images("two", 1), 1),
    }
    search = a_search(method)
    search.tasks = lsamd_data.make_tasks(method, build_pico(variant("token")), splits, IMAGENET)
    seen = set()
    for step in range(12):
        search.step = step
        batch = search.draw(search.tasks[0], 0, salt=0)
        seen |= {tuple(x.flatten()[:9].tolist()) for x in batch.x}
    assert len(seen) == 15


def test_the_teacher_says_what_the_ancestor_says_image_by_image() -> None:
    ancestor, images = build_pico(variant("token")).train(), random_images("one", 0, count=5, size=16)
    said = teacher_logits(ancestor, images, size=32, preprocessing=IMAGENET, batch_size=2)
    assert ancestor.training and said.shape == (5, 10) and not said.requires_grad
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
    for image, told in zip(images.pixels, said, strict=True):
        large = nn.functional.interpolate(image[None] / 255, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(ancestor((large - mean) / std)[0], told, rtol=1e-4, atol=1e-4)


def test_split_b_is_unseen_by_the_weights_until_the_last_phase() -> None:
    method = Lsamd(held_out=0.25)
    images = random_images("one", 0, count=40)
    rest, paths = lsamd_data.split_images(method, images, 0)
    assert (len(rest), len(paths)) == (30, 10)
    keys = [{tuple(p.flatten()[:20].tolist()) for p in part.pixels} for part in (rest, paths)]
    assert not keys[0] & keys[1]
    again = lsamd_data.split_images(method, images, 0)
    assert torch.equal(again[1].pixels, paths.pixels)


def test_the_batch_is_shared_as_the_square_roots_of_the_sizes() -> None:
    data = {"small": random_images("small", 0, count=20), "large": random_images("large", 1, count=180)}
    splits = {name: lsamd_data.split_images(Lsamd(held_out=0.5), images, 0) for name, images in data.items()}
    tasks = lsamd_data.make_tasks(Lsamd(held_out=0.5, batch_size=40), build_pico(variant("token")), splits, IMAGENET)
    assert [task.batch for task in tasks] == [10, 30]  # sqrt(10) : sqrt(90) = 1 : 3


def test_distillation_keeps_the_base_nearer_to_the_ancestor() -> None:
    """Strong distillation on both sets against none, same seed: the base alone agrees more with the ancestor."""
    ancestor, x = build_pico(variant("token")), noise(32, 3, 32, 32)
    two = {name: images for name, images in data_sets().items() if name != "three"}
    with torch.no_grad():
        want, gaps = ancestor(x).softmax(-1), []
    for distil in (0.0, 100.0):
        settings = {"distil": distil, "distil_on": ("one", "two"), "distil_size": 32, "base_lr": 3e-3, "keep": 3}
        grown = factory.expand(extract(settings | {"epochs": 3, "steps_per_epoch": 4}, ancestor, two))
        with torch.no_grad():
            gaps.append(float((ancestor.head(features(grown, x)).softmax(-1) - want).abs().mean()))
    assert gaps[1] < 0.8 * gaps[0]


def test_a_size_that_the_ancestor_cannot_see_is_refused_only_where_it_is_asked() -> None:
    ancestor = build_pico(variant("token"))
    with pytest.raises((SettingsError, ShapeError), match="30"):
        extract({"distil": 1.0, "distil_on": ("one",), "distil_size": 30}, ancestor)
    extract({"distil_size": 30, "epochs": 1, "steps_per_epoch": 1}, ancestor)


# What is extracted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequency", "probability", "ranked"),
    [
        ([1.0] * 6, [0.5] * 6, (0, 5, 2, 1, 3, 4)),  # 2 and 3 are both 2 away: the lower; then all are 1 away
        ([1.0] * 5, [0.5] * 5, (0, 4, 2, 1, 3)),
        ([0.2, 0.4, 0.6, 0.8], [0.5] * 4, (3, 2, 1, 0)),  # frequency alone
        ([0.8, 1.0, 0.8, 0.8, 0.8], [0.5] * 5, (1, 4, 0, 2, 3)),  # 4 is 3 away from 1; 0, 2 and 3 are 1 away
        ([1.0] * 6, [0.5, 0.5, 0.5, 0.9, 0.5, 0.5], (0, 5, 3, 1, 2, 4)),  # 2 and 3 tie by distance: the more probable
        ([0.0, 1.0, 1.0, 0.0], [0.5, 0.2, 0.7, 0.5], (2, 1, 0, 3)),  # neither end among the best: the more probable
        ([0.5, 0.5, 1.0], [0.5] * 3, (2, 0, 1)),
        ([0.0, 1.0, 1.0, 1.0], [0.9] * 4, (3, 1, 2, 0)),  # without the first, the last position starts
        ([1.0], [0.1], (0,)),
    ],
)
def test_positions_are_ranked_by_frequency_then_coverage(
    frequency: list[float], probability: list[float], ranked: tuple[int, ...]
) -> None:
    assert searching.rank_positions(frequency, probability) == ranked


def test_what_is_kept_follows_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """keep=0: every position that at least half of the data sets chose, and no fewer than three."""
    ancestor = build_pico(variant("token", depth=6))
    for frequency, kept in (([1, 0.5, 0.4, 0.5, 0, 1], {0, 1, 3, 5}), ([0, 0, 0.2, 0.4, 0, 0.2], {2, 3, 5})):
        found = training.Found(
            state=dict(ancestor.state_dict()),
            alpha=torch.zeros(2, 6, 2),
            paths=torch.zeros(2, 6, dtype=torch.int64),
            frequency=torch.tensor(frequency),
            probability=torch.full((6,), 0.5),
            provenance={},
        )
        monkeypatch.setattr(training, "train", lambda *_, found=found: found)
        learngene = Lsamd().extract(ancestor, {}, facts=FACTS, preprocessing=IMAGENET)
        assert {int(n.split(".")[1]) for n in learngene.tensors if n.startswith("block.")} == kept


def test_frequencies_paths_and_the_log_agree() -> None:
    learngene = extract({}, build_pico(variant("token")))
    paths, alpha = learngene.tensors["search.paths"], learngene.tensors["search.alpha"]
    assert paths.shape == (3, 3) and torch.equal(paths, alpha.argmax(-1).float())
    frequency = learngene.tensors["search.frequency"]
    assert frequency.tolist() == pytest.approx([sum(float(p) == 0 for p in column) / 3 for column in paths.T])
    torch.testing.assert_close(learngene.tensors["search.probability"], alpha.softmax(-1)[..., 0].mean(0))
    facts = learngene.provenance
    assert facts["paths"] == {
        name: "".join("BSX"[int(k)] for k in row) for name, row in zip(data_sets(), paths, strict=True)
    }
    assert facts["base_rate"] == pytest.approx(frequency.tolist(), abs=1e-4)
    assert [row["epoch"] for row in facts["log"]] == [1, 2, 3, 4]
    assert all(0 <= row["base_rate"] <= 1 and 0 <= row["specific_share"] <= 1 for row in facts["log"])
    assert facts["steps"] == 8 and facts["drift"] > 0
    json.dumps(facts, allow_nan=False)


def test_skipping_is_a_third_candidate() -> None:
    learngene = extract({"allow_skip": True, "alpha_lr": 3.0}, build_pico(variant("token")))
    assert learngene.tensors["search.alpha"].shape == (3, 3, 3)
    frequency = (learngene.tensors["search.paths"] == 0).float().mean(0)
    torch.testing.assert_close(learngene.tensors["search.frequency"], frequency)


def test_a_frozen_base_stays_the_ancestor() -> None:
    ancestor = build_pico(variant("token"))
    learngene = extract({"freeze_base": True, "keep": 3, "base_lr": 0.1}, ancestor)
    grown = factory.expand(learngene).state_dict()
    assert all(torch.equal(grown[k], t) for k, t in ancestor.state_dict().items() if not k.startswith("head."))


def test_the_base_learns_at_its_own_rate() -> None:
    """Everything of the base moves, also its stem and last norm; the ancestor that was handed in does not."""
    ancestor = build_pico(variant("token"))
    before = {key: tensor.clone() for key, tensor in ancestor.state_dict().items()}
    grown = factory.expand(extract({"keep": 3, "base_lr": 1e-3, "search": "spos_ea"}, ancestor)).state_dict()
    for key, tensor in before.items():
        assert torch.equal(ancestor.state_dict()[key], tensor), key
        assert key.startswith("head.") or not torch.equal(grown[key], tensor), key


def test_position_embeddings_stay_the_ancestors_when_the_images_have_another_size() -> None:
    ancestor = build_pico(variant("token"))
    learngene = extract({"base_lr": 1e-2}, ancestor, data_sets(size=16))
    assert torch.equal(learngene.tensors["stem.pos_embed"], ancestor.pos_embed)
    assert not torch.equal(learngene.tensors["stem.cls_token"], ancestor.cls_token)
    assert learngene.shape.image_size == 32


@pytest.mark.parametrize(
    ("data", "settings", "told"),
    [
        ({"one": random_images("one", 0)}, {}, "1 data sets.*at least 2"),
        ({"a": random_images("a", 0), "b": random_images("b", 0, size=16)}, {}, "'a': 32, 'b': 16"),
        ({"a": random_images("a", 0), "b": random_images("b", 0)}, {"distil": 1.0, "distil_on": ("c",)}, "'c'.*a, b"),
        ({"a": random_images("a", 0, size=30), "b": random_images("b", 0, size=30)}, {}, "30.*24 or 32"),
    ],
)
def test_data_that_cannot_be_searched_is_refused(data: dict[str, Images], settings: dict[str, Any], told: str) -> None:
    with pytest.raises((SettingsError, ShapeError), match=told) as caught:
        extract(settings, build_pico(variant("token")), data)
    assert "\n" not in str(caught.value)


# The fallback search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 12])
def test_evolution_finds_a_planted_path(length: int) -> None:
    """By enumeration at 5 positions, by evolution at 12, where 50 + 20 x 25 of 4096 paths may be looked at."""
    planted_path = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0][:length]
    asked: list[tuple[int, ...]] = []

    def score(path: list[int]) -> float:
        asked.append(tuple(path))
        return -float(sum(a != b for a, b in zip(path, planted_path, strict=True)))

    generator = torch.Generator().manual_seed(0)
    path, base_share = searching.evolve_path(score, length, generator=generator)
    assert path == planted_path
    assert len(set(asked)) == len(asked) <= (32 if length == 5 else 550)
    assert len(base_share) == length
    assert all((share > 0.5) == (branch == 0) for share, branch in zip(base_share, planted_path, strict=True))


def test_equal_paths_of_the_evolution_go_to_the_base() -> None:
    path, _ = searching.evolve_path(lambda path: 0.0, 4, generator=torch.Generator().manual_seed(0))
    assert path == [0, 0, 0, 0]


def test_the_fallback_search_prefers_the_base_where_nothing_is_gained() -> None:
    """lr 0: both branches are the ancestor, so accuracy ties and every specific block costs 0.02 / L."""
    learngene = extract({"search": "spos_ea", "base_lr": 0.0, "lr": 1e-9, "epochs": 1}, build_pico(variant("token")))
    assert learngene.tensors["search.frequency"].tolist() == [1.0] * 3
    assert set(learngene.provenance["paths"].values()) == {"BBB"}


# Growth --------------------------------------------------------------------------------------------------------------

TWELVE = ViTShape(depth=12, width=32, heads=1, patch=8, image_size=16, classes=2)
FREQUENCY = [1.0, 0.2, 0.6, 0.2, 0.8, 0.2, 0.2, 0.6, 0.2, 0.8, 0.2, 1.0]
KEPT = (0, 2, 4, 7, 9, 11)


@pytest.fixture(scope="module")
def twelve() -> Learngene:
    """Six kept blocks of twelve: 0 and 11 chosen by all, 4 and 9 by 0.8, 2 and 7 by 0.6 of the data sets."""
    return planted(build_pico(TWELVE), kept=KEPT, frequency=FREQUENCY)


@pytest.mark.parametrize(
    ("settings", "depth", "positions"),
    [
        ({}, 6, KEPT),
        ({}, 4, (0, 4, 9, 11)),
        ({}, 5, (0, 2, 4, 9, 11)),  # 2 and 7 are both 2 away from what is taken, equally probable: the lower
        ({}, 2, (0, 11)),
        ({"select": "even"}, 3, (0, 7, 11)),  # of the kept, ranks 0, 2.5 -> 3, 5
        ({"select": "even"}, 6, KEPT),
        ({}, 12, (0, 0, 2, 2, 4, 4, 7, 7, 7, 9, 9, 11)),  # ties 1, 3, 8, 10 go down; 5 is nearer to 4, 6 to 7
        ({}, 7, (0, 2, 4, 4, 7, 9, 11)),  # places 0 1.83 3.67 5.5 7.33 9.17 11; 5.5 is a tie between 4 and 7
        ({"fill": "random"}, 6, KEPT),
        ({"fill": "random"}, 12, (0, None, 2, None, 4, None, None, 7, None, 9, None, 11)),  # at their relative places
    ],
)
def test_which_blocks_a_depth_takes(
    twelve: Learngene, settings: dict[str, Any], depth: int, positions: tuple[int | None, ...]
) -> None:
    assert Lsamd(**settings).positions(twelve, depth) == positions


@pytest.mark.parametrize(
    ("kept", "depth", "positions"),
    [
        ((0, 1, 2), 12, (0, 1, 2, *[None] * 9)),
        ((0, 1, 11), 6, (0, 1, None, None, None, 11)),  # places 0, 0.45, 5: 0 is taken, so 1 stands beside it
        ((10, 11), 4, (None, None, 10, 11)),  # places 2.7 and 3
    ],
)
def test_random_fill_keeps_blocks_at_their_relative_places(
    kept: tuple[int, ...], depth: int, positions: tuple[int | None, ...]
) -> None:
    """The vanilla learngene: what was learned for the first blocks stays in the first blocks."""
    assert Lsamd(fill="random").positions(planted(build_pico(TWELVE), kept=kept), depth) == positions


def test_the_control_base_even_extracts_evenly_spaced_blocks() -> None:
    """Not the evenly spaced of those that the search chose: the same trained base, evenly spaced."""
    ancestor = build_pico(variant("token", depth=5))
    for select, kept in (("even", {"0", "2", "4"}), ("frequency", {"1", "2", "3"})):
        settings = {"select": select, "keep": 3, "base_lr": 0.0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("learngene_hub.methods.lsamd.rank_positions", lambda *_: (2, 1, 3, 0, 4))
            learngene = extract(settings | {"epochs": 1, "steps_per_epoch": 1}, ancestor)
        assert {n.split(".")[1] for n in learngene.tensors if n.startswith("block.")} == kept


@pytest.mark.parametrize("repeat", ["copy", "share", "identity"])
@pytest.mark.parametrize("depth", [2, 4, 6, 9])
def test_the_blocks_of_a_descendant_are_those_of_the_table(twelve: Learngene, depth: int, repeat: str) -> None:
    """Where a block occurs c times, "share" divides by c what each copy adds to the residual stream, and "identity"
    takes it from all but the first; no more."""
    assert Lsamd().repeat == "share"
    grown = factory.expand(replace(twelve, settings={"repeat": repeat}), depth=depth).state_dict()
    positions = Lsamd().positions(twelve, depth)
    for place, position in enumerate(positions):
        writes = {"copy": 1.0, "share": 1 / positions.count(position), "identity": positions.index(position) == place}
        for key, tensor in twelve.group(f"block.{position}").items():
            wanted = tensor * writes[repeat] if key.startswith(("attn.proj.", "mlp.fc2.")) else tensor
            assert torch.allclose(grown[f"blocks.{place}.{key}"], wanted, rtol=1e-6, atol=0)


def test_deeper_than_the_ancestor_lsamd_base_computes_what_it_computes_at_its_depth() -> None:
    """Net2DeeperNet's identity: the copies add nothing until they are trained."""
    base = Learngene.from_pretrained("lsamd-base")
    native, deeper = (factory.expand(base, depth=depth, num_labels=2, image_size=64).eval() for depth in (12, 20))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = native.forward_features(images), deeper.forward_features(images)  # type: ignore[operator]
    assert len(deeper.blocks) == 20 and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_random_fill_leaves_fresh_blocks_between(twelve: Learngene) -> None:
    learngene = replace(twelve, settings={"fill": "random"})
    grown = factory.expand(learngene, depth=12, seed=3).state_dict()
    for place, position in enumerate(Lsamd(fill="random").positions(learngene, 12)):
        weight = grown[f"blocks.{place}.mlp.fc1.weight"]
        if position is None:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
            assert not grown[f"blocks.{place}.mlp.fc1.bias"].any()
            assert bool((grown[f"blocks.{place}.norm1.weight"] == 1).all())
        else:
            assert torch.equal(weight, learngene.tensors[f"block.{position}.mlp.fc1.weight"])


@pytest.mark.parametrize("width", [32, 96])
def test_expand_is_differentiable_in_the_learngene(width: int) -> None:
    """Finite differences on single entries; also through position resampling and channel adaptation."""
    learngene = planted(build_pico(variant("token")), kept=[0, 2])
    shape = variant("token", width=width, heads=width // 32, image_size=48, in_chans=1)
    weights: dict[str, Tensor] = {}

    def value(tensors: dict[str, Tensor]) -> Tensor:
        state = Lsamd(form="exact").expand(replace(learngene, tensors=tensors), shape)
        total = torch.zeros((), dtype=torch.float64)
        for i, (name, tensor) in enumerate(state.items()):
            if tensor is not None:
                weights.setdefault(name, noise(*tensor.shape, seed=i).double())
                total = total + (weights[name] * tensor.double()).sum()
        return total

    tensors = {name: tensor.double().requires_grad_() for name, tensor in learngene.tensors.items()}
    names = ["stem.pos_embed", "stem.patch_embed.proj.weight", "block.0.attn.proj.weight", "block.2.mlp.fc2.bias"]
    gradients = torch.autograd.grad(value(tensors), [tensors[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        entry = int(gradient.abs().argmax())
        moved = [tensors[name].detach().clone() for _ in range(2)]
        for sign, tensor in zip((1, -1), moved, strict=True):
            tensor.view(-1)[entry] += sign * 0.5  # expand is linear in each tensor
        slope = float((value(tensors | {name: moved[0]}) - value(tensors | {name: moved[1]})).detach())
        assert float(gradient.detach().flatten()[entry]) == pytest.approx(slope, rel=1e-3), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch": 16}, "patch 16 asked.*8 would work"),
        ({"pool": "avg"}, "pool avg asked.*token would work"),
        ({"pool": "avg", "class_token": False}, "class_token False asked"),
        ({"heads": 4, "head_dim": 16}, "head_dim 16 asked.*32 would work"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0 asked.*4.0 would work"),
    ],
)
def test_what_cannot_be_changed_is_refused(change: dict[str, Any], told: str) -> None:
    learngene = planted(build_pico(variant("token")))
    with pytest.raises(ShapeError, match=told):
        Lsamd().expand(learngene, variant("token", **change))


def test_an_mlp_ratio_that_is_no_short_decimal_can_be_widened() -> None:
    """500 hidden units at width 192 are a ratio of 2.6042, 166 at width 64 of 2.6, as shortest decimals."""
    native = variant("token", depth=1, width=192, heads=6, mlp_ratio=500 / 192)
    learngene = planted(build_pico(native))
    for width in range(32, 385, 32):
        shape = replace(native, width=width, heads=width // 32)
        hidden = Lsamd().expand(learngene, shape)["blocks.0.mlp.fc1.bias"]
        assert hidden is not None and hidden.shape == (shape.hidden,)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"distil": 0.5, "distil_on": ("a", "b"), "fill": "random", "form": "exact", "allow_skip": True, "keep": 7}],
)
def test_settings_survive_json(settings: dict[str, Any]) -> None:
    method = Lsamd(**settings)
    assert get_method("lsamd", json.loads(json.dumps(asdict(method)))) == method


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"adapter": "lora"}, "adapter 'lora'.*bottleneck, linear"),
        ({"search": "darts"}, "search 'darts'.*gumbel, spos_ea"),
        ({"select": "best"}, "select"),
        ({"fill": "zeros"}, "fill"),
        ({"form": "lemon"}, "form"),
        ({"epochs": 0}, "epochs 0"),
        ({"epochs": 1.5}, "epochs 1.5"),
        ({"keep": -1}, "keep -1"),
        ({"keep": 2.5}, "keep 2.5"),
        ({"batch_size": True}, "batch_size True"),
        ({"held_out": 1.5}, "held_out 1.5"),
        ({"warmup_share": 0.7, "search_share": 0.7}, "together"),
        ({"tau_end": 0.0}, "tau_end 0.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"base_lr": "fast"}, "base_lr 'fast'"),
        ({"tau_start": "hot"}, "tau_start 'hot'"),
        ({"alpha_lr": -1.0}, "alpha_lr -1.0"),
        ({"control_limit": -1.0}, "control_limit -1.0"),
        ({"distil_limit": -1}, "distil_limit -1"),
        ({"distil_on": "cifar"}, "distil_on 'cifar'"),
        ({"seed": -1}, "seed -1"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"allow_skip": True, "search": "spos_ea"}, "allow_skip.*spos_ea"),
        ({"momentum": 0.9}, "momentum.*epochs"),
    ],
)
def test_settings_that_make_no_sense_are_refused_on_one_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        get_method("lsamd", settings)
    assert "\n" not in str(caught.value)

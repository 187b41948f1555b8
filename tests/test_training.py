"""fit: numbers by hand, one update written out, resuming bit for bit, and two processes against one."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learngene_hub import _fit
from learngene_hub.data import Augment, Images
from learngene_hub.errors import DataError, SettingsError, StoreError, TrainingError
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import (
    Recipe,
    StateDir,
    Step,
    classification_loss,
    distillation_loss,
    fit,
    image_batches,
    log_steps,
    parameter_groups,
    show_progress,
)

SHAPE = ViTShape(depth=2, width=32, heads=2, patch=8, image_size=16, classes=4)


def vit(drop_path: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return SHAPE.build(drop_path_rate=drop_path)


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


def made_images(count: int = 32) -> Images:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 200, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Images(pixels + (10 * labels).to(torch.uint8)[:, None, None, None], labels, tuple("abcd"), "made")


def train(model: nn.Module, recipe: Recipe, count: int = 32, **settings: Any) -> list[Step]:
    batches, steps = image_batches(made_images(count), recipe, IMAGENET)
    return list(fit(model, batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps, **settings))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def furthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class TestRecipe:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"epochs": 0},
            {"epochs": 1.5},
            {"batch_size": True},
            {"accumulate": 0},
            {"lr": 0},
            {"lr": math.nan},
            {"weight_decay": -1},
            {"schedule": "step"},
            {"warmup": 1},
            {"label_smoothing": 1},
            {"clip": 0},
            {"precision": "fp8"},
            {"seed": -1},
        ],
    )
    def test_nonsense_is_refused_by_name(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            Recipe(**wrong)

    @pytest.mark.parametrize(("total", "warmup"), [(10, 0.3), (78, 0.3), (7, 0.0), (33, 0.85), (5, 0.25), (1, 0.3)])
    def test_one_cycle_is_torchs(self, total: int, warmup: float) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
        torchs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.02, total_steps=total, pct_start=warmup, cycle_momentum=False
        )
        recipe = Recipe(lr=0.02, warmup=warmup)
        for step in range(1, total + 1):
            assert recipe.lr * recipe.rate(step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            if step < total:
                torchs.step()

    def test_one_cycle_where_torch_divides_by_zero(self) -> None:
        assert Recipe(warmup=0.1).rate(1, 10) == 1.0

    def test_cosine_by_hand(self) -> None:
        recipe = Recipe(schedule="cosine", warmup=0.2)
        got = [recipe.rate(step, 10) for step in range(1, 11)]
        assert got[:3] == [0.5, 1.0, 1.0]
        assert got[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
        assert got[4] == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
        assert got[9] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 8))

    def test_constant(self) -> None:
        assert {Recipe(schedule="constant").rate(step, 9) for step in range(1, 10)} == {1.0}


class TestLosses:
    def test_distillation_by_hand(self) -> None:
        student, teacher = torch.tensor([[0.0, 2.0 * math.log(3)]]), torch.tensor([[0.0, 0.0]])
        # softened by 2: student (1/4, 3/4), teacher (1/2, 1/2); KL = 1/2 ln 2 + 1/2 ln (2/3)
        wanted = 4 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3))
        assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(wanted, abs=1e-6)
        both = distillation_loss(torch.cat([student, teacher]), torch.cat([teacher, teacher]), 2.0)
        assert both.item() == pytest.approx(wanted / 2, abs=1e-6)

    def test_classification_by_hand(self) -> None:
        logits = torch.tensor([[0.0, math.log(3.0)]])
        loss = classification_loss(Recipe())
        assert loss(lambda _: logits, (torch.empty(0), torch.tensor([1]))).item() == pytest.approx(math.log(4 / 3))
        soft = torch.tensor([[0.25, 0.75]])
        wanted = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
        assert loss(lambda _: logits, (torch.empty(0), soft)).item() == pytest.approx(wanted)
        smoothed = classification_loss(Recipe(label_smoothing=0.5))  # 1/4 and 3/4 of the weight
        assert smoothed(lambda _: logits, (torch.empty(0), torch.tensor([1]))).item() == pytest.approx(wanted)


class TestGroups:
    def test_what_does_not_decay(self) -> None:
        model = vit()
        decay, plain = parameter_groups(model, Recipe(weight_decay=0.3))
        names = {id(p): name for name, p in model.named_parameters()}
        spared = {names[id(p)] for p in plain["params"]}
        assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"} <= spared
        assert {names[id(p)] for p in decay["params"]} == {
            name for name in names.values() if name.endswith("weight") and "norm" not in name
        }
        assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
        assert len(spared) + len(decay["params"]) == len(names)

    def test_frozen_parameters_are_in_no_group(self) -> None:
        model = linear().requires_grad_(False)
        assert parameter_groups(model, Recipe()) == []
        with pytest.raises(SettingsError, match="nothing to train"):
            train(model, Recipe())

    def test_the_schedule_multiplies_each_rate(self) -> None:
        model, extra = linear(), nn.Parameter(torch.ones(4))
        before = [p.detach().clone() for p in (*model.parameters(), extra)]
        groups = [{"params": list(model.parameters()), "name": "all"}, {"params": [extra], "lr": 0.5, "name": "extra"}]
        recipe = Recipe(epochs=1, lr=0.01, schedule="cosine", warmup=0.5, weight_decay=0.0, batch_size=8)
        batches, _ = image_batches(made_images(), recipe, IMAGENET)

        def loss(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(called(batch[0]) * extra, batch[1])

        step = next(fit(model, batches, loss, recipe=recipe, steps_per_epoch=4, groups=groups))
        assert step.lr == pytest.approx(0.005)  # half-way up
        moved = [(p - old).abs().max().item() for p, old in zip((*model.parameters(), extra), before, strict=True)]
        assert moved == pytest.approx([0.005, 0.005, 0.25], rel=1e-3)  # Adam's first step is the rate itself


class TestUpdate:
    def test_equals_the_written_out_loop(self) -> None:
        recipe = Recipe(epochs=2, lr=1e-3, batch_size=8, clip=1.0, weight_decay=0.1)
        mine, theirs = vit(), vit()
        steps = train(mine, recipe)
        batches, per_epoch = image_batches(made_images(), recipe, IMAGENET)
        optimizer = torch.optim.AdamW(parameter_groups(theirs, recipe), lr=1e-3, foreach=False)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 2 * per_epoch, cycle_momentum=False)
        losses = []
        for pixels, labels in itertools.chain(batches(0), batches(1)):
            loss = F.cross_entropy(theirs(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            schedule.step() if len(losses) < 7 else None
            losses.append(loss.item())
        assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
        assert furthest(mine, theirs) < 1e-5

    def test_steps_tell_the_run(self) -> None:
        steps = train(linear(), Recipe(epochs=2, batch_size=8))
        assert [step.step for step in steps] == list(range(1, 9))
        assert [step.epoch for step in steps] == [0] * 4 + [1] * 4
        assert [step.images for step in steps] == list(range(8, 72, 8))
        assert [step.epoch_done for step in steps] == [False] * 3 + [True] + [False] * 3 + [True]
        assert {step.of for step in steps} == {8}
        assert all(later.seconds > sooner.seconds for sooner, later in itertools.pairwise(steps))

    def test_loss_on_eight_images_falls(self) -> None:
        steps = train(vit(), Recipe(epochs=60, batch_size=8, lr=3e-3), count=8)
        assert steps[0].loss > 1.2
        assert steps[-1].loss < 0.1

    def test_checkpointing_changes_no_number_and_is_switched_back(self) -> None:
        plain, recomputed = vit(), vit()
        train(plain, Recipe(epochs=1, batch_size=16))
        train(recomputed, Recipe(epochs=1, batch_size=16, checkpointing=True))
        assert same(plain, recomputed)
        assert recomputed.grad_checkpointing is False
        with pytest.raises(SettingsError, match="Sequential cannot recompute activations"):
            train(linear(), Recipe(checkpointing=True))

    def test_bf16_keeps_float32_weights(self) -> None:
        model, exact = vit(), vit()
        rough = train(model, Recipe(epochs=2, batch_size=8, precision="bf16"))
        wanted = train(exact, Recipe(epochs=2, batch_size=8))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert [s.loss for s in rough] == pytest.approx([s.loss for s in wanted], abs=0.05)
        assert not same(model, exact)

    @pytest.mark.slow
    def test_compile(self) -> None:
        plain, compiled = vit(), vit()
        train(plain, Recipe(epochs=1, batch_size=16))
        train(compiled, Recipe(epochs=1, batch_size=16, compile=True))
        assert furthest(plain, compiled) < 1e-4

    def test_the_model_trains_even_if_the_caller_evaluates_between(self) -> None:
        model, seen = vit(), []
        recipe = Recipe(epochs=1, batch_size=8)
        batches, steps = image_batches(made_images(), recipe, IMAGENET)

        def loss(called: Any, batch: Any) -> Tensor:
            seen.append(called.training)
            return classification_loss(recipe)(called, batch)

        for _ in fit(model, batches, loss, recipe=recipe, steps_per_epoch=steps):
            model.eval()
        assert seen == [True] * 4

    def test_the_caller_may_train_something_else_between(self) -> None:
        """As a path search does: batches of any structure, and a second optimiser over other parameters of one loss."""
        model, gate = linear(), nn.Parameter(torch.zeros(()))
        other = torch.optim.SGD([gate], lr=0.1)
        recipe = Recipe(epochs=1, lr=1e-2, batch_size=8)
        plain, _ = image_batches(made_images(), recipe, IMAGENET)

        def batches(epoch: int) -> Iterator[dict[str, Any]]:
            for pixels, labels in plain(epoch):
                yield {"task": "made", "views": [pixels, pixels.flip(-1)], "labels": labels}

        def loss(called: nn.Module, batch: dict[str, Any]) -> Tensor:
            one, two = (called(view) for view in batch["views"])
            return F.cross_entropy(torch.lerp(one, two, gate.sigmoid()), batch["labels"])

        gates, held = [], next(iter(batches(9)))
        for step in fit(model, batches, loss, recipe=recipe, steps_per_epoch=4):
            kept = [p.detach().clone() for p in model.parameters()]
            other.zero_grad()
            loss(model, held).backward()
            other.step()
            gates.append(gate.item())
            assert step.images == 8 * step.step
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), kept, strict=True))
        assert len(set(gates)) == 4


class TestRandomness:
    def test_the_callers_generators_are_untouched(self) -> None:
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        recipe = Recipe(epochs=1, batch_size=8, augment=Augment(flip=True, crop_padding=2, mixup=0.2))
        batches, steps = image_batches(made_images(), recipe, IMAGENET)
        for _ in fit(vit(0.5), batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps):
            assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_the_callers_draws_between_steps_change_nothing(self) -> None:
        recipe = Recipe(epochs=1, batch_size=8)
        one, other = vit(0.5), vit(0.5)
        train(one, recipe)
        batches, steps = image_batches(made_images(), recipe, IMAGENET)
        for _ in fit(other, batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps):
            torch.rand(17)
        assert same(one, other)

    def test_seeds_and_steps_differ(self) -> None:
        one, other = vit(0.5), vit(0.5)
        train(one, Recipe(epochs=1, batch_size=32, seed=1))
        train(other, Recipe(epochs=1, batch_size=32, seed=2))
        assert not same(one, other)
        drawn: list[float] = []

        def loss(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            drawn.append(torch.rand(()).item())
            return called(batch[0]).sum()

        recipe = Recipe(epochs=2, batch_size=16, accumulate=2)
        batches, steps = image_batches(made_images(), recipe, IMAGENET)
        list(fit(linear(), batches, loss, recipe=recipe, steps_per_epoch=steps))
        assert len(set(drawn)) == 8


def loader_batches(epoch: int) -> Any:
    """A data loader that shuffles and distorts with the global generators, as most people's do."""
    images = made_images()
    pairs = [(pixels.float() / 255, int(label)) for pixels, label in zip(images.pixels, images.labels, strict=True)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    return ((pixels + 0.1 * torch.randn_like(pixels), labels) for pixels, labels in loader)


class TestResume:
    recipe = Recipe(
        epochs=3,
        batch_size=8,
        accumulate=2,
        clip=1.0,
        augment=Augment(flip=True, crop_padding=2, color=0.3, erase=0.3, mixup=0.2, cutmix=1.0),
    )

    def start(self, model: nn.Module, batches: Callable[[int], Any] | None = None, **settings: Any) -> Iterator[Step]:
        made, steps = image_batches(made_images(), self.recipe, IMAGENET)
        loss = classification_loss(self.recipe)
        return fit(model, batches or made, loss, recipe=self.recipe, steps_per_epoch=steps, **settings)

    @pytest.mark.parametrize("batches", [None, loader_batches])
    @pytest.mark.parametrize("stop", [4, 5, 11])
    def test_equals_the_straight_run_bit_for_bit(self, tmp_path: Path, stop: int, batches: Any) -> None:
        straight, resumed = vit(0.4), vit(0.4)
        wanted = list(self.start(straight, batches))
        got = list(itertools.islice(self.start(resumed, batches, state_dir=tmp_path, save_every=1), stop))
        with torch.no_grad():  # what the model holds meanwhile does not matter
            for p in resumed.parameters():
                p.fill_(9.0)
        torch.rand(5)
        got += list(self.start(resumed, batches, state_dir=tmp_path, save_every=1))
        assert [(s.step, s.loss, s.lr, s.images) for s in got] == [(s.step, s.loss, s.lr, s.images) for s in wanted]
        assert same(straight, resumed)

    def test_a_finished_run_has_no_steps_left(self, tmp_path: Path) -> None:
        one, other = vit(), vit()
        assert len(list(self.start(one, state_dir=tmp_path))) == 12
        assert list(self.start(other, state_dir=tmp_path)) == []
        assert same(one, other)

    def test_without_save_every_each_epoch_is_kept(self, tmp_path: Path) -> None:
        list(itertools.islice(self.start(vit(), state_dir=tmp_path), 7))
        assert next(self.start(vit(), state_dir=tmp_path)).step == 5

    def test_what_the_caller_does_after_a_saved_step_is_kept(self, tmp_path: Path) -> None:
        model = linear()
        steps = self.start(model, state_dir=tmp_path, save_every=2)
        next(steps), next(steps)
        with torch.no_grad():
            model[1].bias.fill_(3.0)
        next(steps)
        state = torch.load(tmp_path / _fit.STATE_FILE, weights_only=True)
        assert state["progress"]["step"] == 2
        assert state["model"]["1.bias"].tolist() == [3.0] * 4

    def test_parameters_outside_the_model_are_kept(self, tmp_path: Path) -> None:
        def run(extra: nn.Parameter, **settings: Any) -> Iterator[Step]:
            batches, _ = image_batches(made_images(), self.recipe, IMAGENET)
            model = linear()
            groups = [{"params": [extra]}, {"params": list(model.parameters())}]

            def loss(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(called(batch[0]) * extra, batch[1])

            return fit(model, batches, loss, recipe=self.recipe, steps_per_epoch=4, groups=groups, **settings)

        straight, stopped, resumed = (nn.Parameter(torch.ones(4)) for _ in range(3))
        list(run(straight))
        list(itertools.islice(run(stopped, state_dir=tmp_path), 6))
        list(run(resumed, state_dir=tmp_path))
        assert torch.equal(straight, resumed)

    def test_what_stands_outside_the_model_is_saved_in_the_same_file(self, tmp_path: Path) -> None:
        """Another optimiser of the caller: it never falls behind the weights, nor ahead of them."""

        class Count:
            def __init__(self) -> None:
                self.steps: list[int] = []

            def state_dict(self) -> dict[str, Any]:
                return {"steps": self.steps}

            def load_state_dict(self, state: Any) -> None:
                self.steps = list(state["steps"])

        for _ in range(3):
            count = Count()
            for step in itertools.islice(self.start(vit(), state_dir=tmp_path, save_every=1, extra=count), 3):
                count.steps.append(step.step)  # the last of the three is not saved: nobody asked for the next step
            state = torch.load(tmp_path / _fit.STATE_FILE, weights_only=True)
            assert state["extra"]["steps"] == list(range(1, state["progress"]["step"] + 1))
            assert state["progress"]["step"] == count.steps[-1] - 1
        with pytest.raises(SettingsError, match="another model or groups"):
            next(self.start(vit(), state_dir=tmp_path))

    def test_a_run_of_another_identity_is_refused(self, tmp_path: Path) -> None:
        list(itertools.islice(self.start(vit(), state_dir=StateDir(tmp_path, {"data": "a"}), save_every=1), 2))
        for other, line in (({"data": "b"}, "data 'a' there, 'b' asked"), ({}, "data 'a' there, None asked")):
            with pytest.raises(SettingsError, match=line):
                next(self.start(vit(), state_dir=StateDir(tmp_path, other)))
        assert next(self.start(vit(), state_dir=StateDir(tmp_path, {"data": "a"}))).step == 3

    def test_a_timed_state_is_written_once_a_minute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(_fit.time, "perf_counter", lambda: now[0])
        written: list[int] = []
        monkeypatch.setattr(_fit, "write_state", lambda _, state, **__: written.append(state["progress"]["step"]))
        for _ in self.start(linear(), state_dir=StateDir(tmp_path, {}, timed=True)):
            now[0] += 13.0  # the clock of one update
        assert written == [6, 11, 12]

    def test_another_run_is_refused(self, tmp_path: Path) -> None:
        next(self.start(vit(), state_dir=tmp_path, save_every=1))
        with pytest.raises(SettingsError, match="holds the state of another model"):
            next(self.start(linear(), state_dir=tmp_path))
        with pytest.raises(SettingsError, match=r"other settings: epochs 3 there, 5 asked; use another folder"):
            train(vit(), replace(self.recipe, epochs=5), state_dir=tmp_path)
        train(vit(), replace(self.recipe, checkpointing=True), state_dir=tmp_path)  # moves no number

    @pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
    def test_a_damaged_state_is_one_line(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / _fit.STATE_FILE).write_bytes(content)
        with pytest.raises(StoreError, match="not a readable training state; remove it to start afresh"):
            next(self.start(vit(), state_dir=tmp_path))

    def test_no_code_is_run_from_a_state(self, tmp_path: Path) -> None:
        torch.save({"facts": {}, "progress": io.StringIO}, tmp_path / _fit.STATE_FILE)
        with pytest.raises(StoreError):
            next(self.start(vit(), state_dir=tmp_path))

    @pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("writer failed")])
    def test_an_interrupted_save_leaves_the_old_state(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
    ) -> None:
        model = vit()
        steps = self.start(model, state_dir=tmp_path, save_every=1)
        next(steps)

        def half(_: object, file: Any) -> None:
            file.write(b"half a state")
            raise fault

        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", half)
            with pytest.raises(StoreError, match="state of step 2 .*the previous state is intact"):
                next(steps)
        assert [path.name for path in tmp_path.iterdir()] == [_fit.STATE_FILE]
        assert next(self.start(vit(), state_dir=tmp_path)).step == 2

    def test_a_killed_process_leaves_the_old_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = self.start(vit(), state_dir=tmp_path, save_every=1)
        next(steps)
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            next(steps)
        monkeypatch.undo()
        assert next(self.start(vit(), state_dir=tmp_path)).step == 2


class TestBadInput:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite(self, bad: float) -> None:
        model, kept = linear(), []
        recipe = Recipe(epochs=1, batch_size=8, lr=0.01)
        batches, steps = image_batches(made_images(), recipe, IMAGENET)
        factors = iter([1.0, 1.0, bad, 1.0])

        def loss(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return classification_loss(recipe)(called, batch) * next(factors)

        with pytest.raises(TrainingError, match=rf"the loss is {bad} at step 3 of 4 \(epoch 0\).*below 0.01"):
            for _ in fit(model, batches, loss, recipe=recipe, steps_per_epoch=steps):
                kept = [p.detach().clone() for p in model.parameters()]
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), kept, strict=True))

    def test_batches_that_run_out(self) -> None:
        recipe = Recipe(epochs=1, batch_size=8)
        batches, _ = image_batches(made_images(), recipe, IMAGENET)
        steps = fit(linear(), batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=6)
        with pytest.raises(DataError, match=r"batches\(0\) ended before its 6 batches, at step 5 of 6"):
            list(steps)

    def test_numbers_devices_and_precisions(self) -> None:
        with pytest.raises(SettingsError, match="save_every"):
            train(linear(), Recipe(), save_every=0)
        with pytest.raises(SettingsError, match="no device is called 'gpu7'"):
            train(linear(), Recipe(), device="gpu7")
        with pytest.raises(SettingsError, match="fp16.*'bf16' or 'fp32' work"):
            train(linear(), Recipe(precision="fp16"), device="cpu")
        with pytest.raises(SettingsError, match="steps_per_epoch"):
            fit(linear(), lambda _: [], classification_loss(Recipe()), recipe=Recipe(), steps_per_epoch=0)

    def test_bf16_on_a_cpu_without_it_warns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_fit, "has_bf16", lambda: False)
        with pytest.warns(UserWarning, match="tens of times slower than 'fp32', which would work"):
            train(linear(), Recipe(epochs=1, precision="bf16"), count=8, device="cpu")
        train(linear(), Recipe(epochs=1), count=8, device="cpu")  # warnings are errors: none here
        monkeypatch.setattr(_fit, "has_bf16", lambda: True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(linear(), Recipe(epochs=1, precision="bf16"), count=8, device="cpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self) -> None:
        with pytest.raises(SettingsError, match="torch sees no GPU; device='cpu' works"):
            train(linear(), Recipe(), device="cuda")

    def test_batches_that_do_not_divide(self) -> None:
        with pytest.raises(SettingsError, match="8 images per update do not divide into 3 micro-batches"):
            train(linear(), Recipe(batch_size=8, accumulate=3))
        with pytest.raises(DataError, match="holds no images"):
            train(linear(), Recipe(), count=0)

    def test_fewer_images_than_a_batch(self) -> None:
        assert [step.images for step in train(linear(), Recipe(epochs=2, batch_size=64), count=10)] == [10, 20]
        assert [s.images for s in train(linear(), Recipe(epochs=1, batch_size=64, accumulate=4), count=10)] == [8]


class TestFollowing:
    def test_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "log" / "run.csv"
        recipe = Recipe(epochs=2, batch_size=16)
        batches, n = image_batches(made_images(), recipe, IMAGENET)

        def run() -> Iterator[Step]:
            loss = classification_loss(recipe)
            return fit(linear(), batches, loss, recipe=recipe, steps_per_epoch=n, state_dir=tmp_path, save_every=1)

        first = list(itertools.islice(log_steps(run(), path), 3))
        rest = list(log_steps(run(), path))
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
        assert [float(row["loss"]) for row in rows] == [step.loss for step in first + rest]
        list(log_steps(iter(first), path))  # a run from its first step starts the file afresh
        assert len(path.read_text().splitlines()) == 4

    def test_other_things_pass_through(self, tmp_path: Path) -> None:
        step = Step(step=1, epoch=0, of=1, loss=0.5, lr=0.1, images=8, seconds=0.1)
        assert list(show_progress(log_steps([step, "evaluation"], tmp_path / "a.csv"))) == [step, "evaluation"]

    def test_unwritable(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        step = Step(step=1, epoch=0, of=1, loss=0.5, lr=0.1, images=8, seconds=0.1)
        with pytest.raises(StoreError, match="cannot write"):
            list(log_steps([step], tmp_path / "file" / "a.csv"))

    def test_tensorboard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Step(step=1, epoch=0, of=1, loss=0.5, lr=0.1, images=8, seconds=0.1)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(SettingsError, match="pip install tensorboard, or a path that ends in .csv"):
            list(log_steps([step], tmp_path / "board"))

    def test_tensorboard_file(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        step = Step(step=1, epoch=0, of=1, loss=0.5, lr=0.1, images=8, seconds=0.1)
        assert list(log_steps([step], tmp_path / "board")) == [step]
        assert any(path.name.startswith("events") for path in (tmp_path / "board").iterdir())

    def test_progress_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.StringIO()
        screen.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", screen)
        list(show_progress(train(linear(), Recipe(epochs=1, batch_size=16)), label="learning"))
        assert "learning" in screen.getvalue()


# No attention in it: the gradient of a key's bias is 0 but for rounding, and Adam turns rounding into whole steps.
PLAIN = """
import torch
from torch import nn

def plain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
"""
WORKER = """
import sys
from learngene_hub.data import Images
from learngene_hub.shape import IMAGENET
from learngene_hub.training import Recipe, classification_loss, fit, image_batches

pixels, labels = torch.load(sys.argv[1] + "/images.pt", weights_only=True)
recipe, model = Recipe(epochs=2, batch_size=16, accumulate=2), plain()
batches, n = image_batches(Images(pixels, labels, tuple("abcd"), "made"), recipe, IMAGENET)
loss = classification_loss(recipe)
steps = list(fit(model, batches, loss, recipe=recipe, steps_per_epoch=n, device=DEVICE, state_dir=sys.argv[1]))
if torch.distributed.get_rank() == 1:
    torch.save((model.state_dict(), [(s.loss, s.images) for s in steps]), sys.argv[1] + "/result.pt")
torch.distributed.destroy_process_group()
"""


def plain() -> nn.Module:
    names: dict[str, Any] = {}
    exec(PLAIN, names)
    return names["plain"]()


def test_accumulation_equals_one_big_batch() -> None:
    whole, parts = plain(), plain()
    one = train(whole, Recipe(epochs=3, batch_size=16))
    four = train(parts, Recipe(epochs=3, batch_size=16, accumulate=4))
    assert [step.loss for step in four] == pytest.approx([step.loss for step in one], abs=1e-6)
    assert [step.images for step in four] == [step.images for step in one]
    assert furthest(whole, parts) < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param(None, marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, device: str | None) -> None:
    """Two processes of two micro-batches each, started by torchrun, over gloo; also where no device is asked and there
    is no GPU, where accelerate by itself leaves each process alone with all images."""
    images = made_images()
    torch.save((images.pixels, images.labels), tmp_path / "images.pt")
    (tmp_path / "worker.py").write_text(PLAIN + WORKER.replace("DEVICE", repr(device)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(_fit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    weights, seen = torch.load(tmp_path / "result.pt", weights_only=True)
    alone, both = plain(), plain()
    steps = train(alone, Recipe(epochs=2, batch_size=16))
    both.load_state_dict(weights)
    assert [images for _, images in seen] == [step.images for step in steps]
    assert [loss for loss, _ in seen] == pytest.approx([step.loss for step in steps], abs=1e-6)
    assert furthest(alone, both) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    recipe = Recipe(epochs=20, batch_size=8, lr=3e-3, precision=precision, augment=Augment(flip=True, mixup=0.2))
    batches, steps = image_batches(made_images(8).to("cuda"), recipe, IMAGENET)
    state = torch.cuda.get_rng_state()

    def run() -> Iterator[Step]:
        loss = classification_loss(recipe)
        return fit(vit(0.1), batches, loss, recipe=recipe, steps_per_epoch=steps, state_dir=tmp_path, device="cuda")

    first = list(itertools.islice(run(), 10))
    rest = list(run())
    assert rest[0].step == 11
    assert rest[-1].loss < first[0].loss
    assert torch.equal(torch.cuda.get_rng_state(), state)

"""Learning inside the caller's ``torch.no_grad`` and ``torch.inference_mode``: extraction, the width stage, tuning."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from conftest import build_pico
from planted import FACTS, variant
from taught import pictures
from test_contract import QUICK, data_sets, learngene_of, timeless

from learngene_hub import factory
from learngene_hub.errors import SettingsError
from learngene_hub.methods import BUILT_IN
from learngene_hub.training import Recipe
from learngene_hub.widening import Widening, widen

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
RECIPE = Recipe(epochs=1, batch_size=8, lr=1e-2)


def mode(name: str) -> AbstractContextManager[None]:
    return MODES[name]()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_extracts_the_same_inside_as_outside(name: str) -> None:
    """Inside ``inference_mode`` the ancestor too is made there, as by somebody who loads it for evaluation."""
    want = timeless(learngene_of(name, "token")).digest
    for inside in MODES:
        with mode(inside):
            ancestor = build_pico(variant("token", depth=4))
            found = factory.extract(name, ancestor, data_sets(), settings=QUICK[name], facts=FACTS)
            assert torch.is_grad_enabled() is False and torch.is_inference_mode_enabled() is (inside != "no_grad")
        assert timeless(found).digest == want
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in found.tensors.values())


@pytest.mark.parametrize("inside", MODES)
def test_the_width_stage_is_the_same(inside: str) -> None:
    learngene = learngene_of("lsamd", "token")
    settings = Widening(widths=(32,), epochs=1, steps_per_epoch=2, batch_size=8)
    want = widen(learngene, data_sets(), settings)
    with mode(inside):
        found = widen(learngene, data_sets(), settings)
    assert timeless(found).digest == timeless(want).digest


@pytest.mark.parametrize("inside", MODES)
def test_a_descendant_grown_and_tuned_inside_is_that_grown_and_tuned_outside(inside: str) -> None:
    learngene, images = learngene_of("net2net", "token"), pictures(classes=4, size=32)
    want = factory.expand(learngene, depth=2, num_labels=4)
    losses = [step.loss for step in factory.finetune(want, images, recipe=RECIPE)]
    with mode(inside):
        model = factory.expand(learngene, depth=2, num_labels=4)
        assert [step.loss for step in factory.finetune(model, images, recipe=RECIPE)] == losses
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in want.state_dict().items())
    list(factory.finetune(model, images, recipe=RECIPE))  # and it still learns outside


def test_a_model_that_torch_never_trains_is_refused() -> None:
    with torch.inference_mode():
        model = build_pico(variant("token"))
    with pytest.raises(SettingsError, match=r"made inside torch.inference_mode\(\) given"):
        factory.finetune(model, pictures(classes=4, size=32), recipe=RECIPE)

"""The rivals that the ancestor teaches, ``distilled`` and ``adapted``, beside a loop in plain torch and timm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from conftest import build_pico
from timm.layers import resample_abs_pos_embed

from learngene_hub import expand, load_images
from learngene_hub._compare_make import DISTILLED, Making, learngene_of, make
from learngene_hub.comparison import Job, Plan
from learngene_hub.data import Images
from learngene_hub.descendant import wrap
from learngene_hub.errors import DataError
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import image_batches

SIZE, SEEN_AT, UPDATES, SIZES = 40, 48, 3, 4  # pixels of the plan, of the teacher; updates; sizes that share the cost
ANCESTOR = ViTShape(depth=3, width=64, heads=2, head_dim=32, patch=8, image_size=32, classes=7)


def plain_vit(depth: int, width: int, size: int) -> torch.nn.Module:
    """timm's own, by its own arguments."""
    return timm.models.VisionTransformer(
        img_size=size, patch_size=8, depth=depth, embed_dim=width, num_heads=width // 32, num_classes=7
    )


def at(size: int) -> torch.nn.Module:
    """The ancestor at another image size, its position embedding resampled by timm."""
    state = build_pico(ANCESTOR).state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [size // 8, size // 8])
    model = plain_vit(3, 64, size)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    wrap(build_pico(ANCESTOR), preprocessing=IMAGENET, num_labels=7).save_pretrained(tmp_path / "ancestor")
    flops = {kind: budget(3 if kind == "adapted" else 2) for kind in ("distilled", "adapted")}
    taught = {"sizes": SIZES, "teacher_size": SEEN_AT, "limit": 40, "data": {"a": "signdigits", "b": "signdigits"}}
    return Plan.of(
        {
            "starts": {kind: {**taught, "flops": flops[kind]} for kind in flops},
            "shapes": ["2x64"],
            "data": ["signdigits"],
            "image_size": SIZE,
            "ancestor": str(tmp_path / "ancestor"),
            "work": str(tmp_path / "made"),
        }
    )


def flops_of(depth: int, width: int, size: int) -> float:
    """Of one image's forward, from the shapes alone: two for each multiply-add."""
    tokens = (size // 8) ** 2 + 1
    block = 12 * width * width * tokens + 2 * tokens * tokens * width  # qkv 3, proj 1, MLP 8; scores and their sum
    return 2.0 * ((tokens - 1) * 3 * 64 * width + depth * block + width * 7)


def budget(depth: int) -> float:
    """FLOPs of all sizes that leave each its part of the teacher's 80 forwards and UPDATES and a half of 64 images."""
    return 80 * flops_of(3, 64, SEEN_AT) + SIZES * 3 * (UPDATES + 0.5) * 64 * flops_of(depth, 64, SIZE)


def pixels(size: int) -> torch.Tensor:
    """(80, 3, size, size): the images of both sets, normalised, as the ancestor sees them."""
    images = load_images("signdigits", size=SIZE, limit=40).pixels.float() / 255
    if size != SIZE:
        images = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    return torch.cat([(images - mean) / std] * 2)


def taught_by_hand(student: torch.nn.Module, peak: float) -> torch.nn.Module:
    """UPDATES of AdamW on KL(ancestor at 48 px || student at 40 px); the batches alone are the package's."""
    with torch.no_grad():
        said = at(SEEN_AT)(pixels(SEEN_AT)).softmax(-1)
    raw = load_images("signdigits", size=SIZE, limit=40).pixels
    numbered = Images(torch.cat([raw, raw]), torch.arange(80), tuple(map(str, range(80))), "both")
    batches, per_epoch = image_batches(numbered, DISTILLED, IMAGENET)
    assert per_epoch == 1  # 64 of 80: each update is the first of an epoch
    named = dict(student.named_parameters())
    plain = [n for n, p in named.items() if p.ndim < 2 or n in ("pos_embed", "cls_token")]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in plain], "weight_decay": 0.05},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
        ]
    )
    student.train()
    for update in range(UPDATES):  # a tenth of 3 updates, rounded, is no warm-up
        for group in optimizer.param_groups:
            group["lr"] = peak * (0.5 + 0.5 * math.cos(math.pi * update / UPDATES))
        x, number = next(iter(batches(update)))
        student_log = student(x).log_softmax(-1)
        loss = (said[number] * (said[number].log() - student_log)).sum() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


@pytest.mark.parametrize(("kind", "depth", "peak"), [("distilled", 2, 1e-3), ("adapted", 3, 2e-4)])
def test_what_the_ancestor_teaches_is_what_a_plain_loop_learns(kind: str, depth: int, peak: float, plan: Plan) -> None:
    if kind == "distilled":  # timm's own first weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = plain_vit(depth, 64, SIZE)
    else:
        student = at(SIZE)
    begun = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    expected = taught_by_hand(student, peak).state_dict()
    make(Making(plan.start(kind), shape="2x64" if kind == "distilled" else ""), plan, "cpu")
    learngene, _ = learngene_of(plan, Job(start=kind, shape="2x64", data="signdigits", seed=0))
    grown = expand(learngene, depth=depth, image_size=SIZE, num_labels=7).state_dict()
    for name, tensor in expected.items():
        if name.startswith("head."):
            continue  # a descendant's is its own
        moved = (tensor - begun[name]).abs().max().item()
        assert moved > 0, name
        assert torch.allclose(grown[name], tensor, rtol=1e-3, atol=2e-4), (name, moved)  # the file is in float16
        assert (grown[name] - tensor).abs().max() < 0.2 * moved + 1e-3 * tensor.abs().max(), name
    said = learngene.provenance
    assert (said["steps"], said["images_seen"], said["data"]) == (UPDATES, UPDATES * 64, {"a": 40, "b": 40})
    assert said["flops"] == pytest.approx(UPDATES * 64 * flops_of(depth, 64, SIZE), rel=1e-6)
    assert said["teacher_flops"] == pytest.approx(80 * flops_of(3, 64, SEEN_AT) / SIZES, rel=1e-6)


def test_a_budget_that_leaves_no_update_is_refused(plan: Plan, tmp_path: Path) -> None:
    facts = {"flops": 80 * flops_of(3, 64, SEEN_AT), "sizes": SIZES, "teacher_size": SEEN_AT, "limit": 40}
    poor = Plan.of(
        {
            "starts": {"adapted": {**facts, "data": {"a": "signdigits", "b": "signdigits"}}},
            "shapes": ["2x64"],
            "data": ["signdigits"],
            "image_size": SIZE,
            "ancestor": plan.ancestor,
            "work": str(tmp_path / "poor"),
        }
    )
    with pytest.raises(DataError, match="leave none to learn with"):
        make(Making(poor.start("adapted")), poor, "cpu")

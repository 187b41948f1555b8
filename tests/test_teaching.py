"""What lets, tleg, sws and ldr are taught with: any teacher, as the ancestor or beside it, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS
from small_lets import Convnet
from taught import TINY, ancestor_of, noise, pictures
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, DataError, LearngeneError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import BUILT_IN, Method, _lesson, get_method, is_taught, require_ancestor
from learngene_hub.methods.tleg import Tleg
from learngene_hub.shape import IMAGENET, Preprocessing
from learngene_hub.teacher import Answers, Teacher, teacher_logits
from learngene_hub.training import Step

ODD = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
SIZES: dict[str, Any] = {"width": 16, "head_dim": 8, "patch": 4, "layout": "token", "mlp_ratio": 4.0}
TRAINING: dict[str, Any] = {"epochs": 2, "batch_size": 8, "crop_padding": 2, "teacher": "once", "lr": 1e-2, "seed": 3}
OWN: dict[str, dict[str, Any]] = {
    "tleg": {"depth": 2},
    "sws": {"stages": [1, 1]},
    "ldr": {"depth": 2, "phases": [1, 2], "epochs": 1, "labels": 0.0},
    "lets": {"depth": 2, "learngene_depth": 2, "learngene_width": 8, "mixup": 0.0, "cutmix": 0.0},
}
four = pytest.mark.parametrize("name", OWN)


def extract(name: str, ancestor: nn.Module, data: dict[str, Images] | None = None, **more: Any) -> Learngene:
    """An extraction with sizes of its own; ``more`` are settings and, of ``factory.extract``, teacher and cache."""
    asked = {key: more.pop(key) for key in ("teacher_model", "teacher_cache", "watch", "state_dir") if key in more}
    teacher = asked.pop("teacher_model", None)
    settings = SIZES | TRAINING | OWN[name] | more
    sets = {"one": pictures()} if data is None else data
    return factory.extract(name, ancestor, sets, settings=settings, facts=FACTS, teacher=teacher, **asked)


def told(learngene: Learngene) -> str:
    facts = {key: value for key, value in learngene.provenance.items() if key != "seconds"}
    return replace(learngene, provenance=facts).digest


def never(steps: Iterator[Step]) -> Iterator[Step]:
    for _ in steps:
        pytest.fail("training began")
    yield from ()


# A teacher of another family ------------------------------------------------------------------------------------------


def test_the_four_are_those_that_take_a_teacher() -> None:
    assert {name for name, method in BUILT_IN.items() if is_taught(method)} >= OWN.keys()
    assert not is_taught(BUILT_IN["lsamd"]) and not is_taught(BUILT_IN["net2net"])


@four
def test_a_convnet_teaches_an_auxiliary_of_asked_sizes(name: str) -> None:
    """Its flops by hand: 6 x 6 places of 4 kernels of 27 numbers, and 5 outputs of 4, two per multiply-add."""
    learngene = extract(name, Convnet())
    shape, facts = learngene.shape, learngene.provenance
    assert (shape.depth, shape.width, shape.heads, shape.patch, shape.classes) == (2, 16, 2, 4, 5)
    assert (shape.class_token, shape.pool, shape.image_size, shape.in_chans) == (True, "token", 8, 3)
    assert facts["teacher_flops"] == 16 * 2 * (36 * 4 * 27 + 20)
    live = extract(name, Convnet(), teacher="live").provenance
    assert live["teacher_flops"] == 32 * 2 * (36 * 4 * 27 + 20)
    assert len(facts["loss"]) == 2 and all(loss > 0 for loss in facts["loss"])


@four
def test_the_cost_is_told_in_one_form(name: str) -> None:
    facts = extract(name, Convnet(), {"one": pictures(), "two": pictures(7)}).provenance
    own = {"learngene"} if name == "lets" else set()
    keys = {"data", "image_size", "steps", "images_seen", "flops", "teacher_flops", "seconds", "loss"}
    assert facts.keys() == keys | own
    assert facts["data"] == {"one": {"images": 16}, "two": {"images": 16}} and facts["image_size"] == 8
    assert (facts["steps"], facts["images_seen"]) == (8, 64)
    native = replace(TINY, depth=2, width=16, heads=2, head_dim=8, classes=5)
    assert facts["flops"] == 64 * native.flops()


@four
def test_open_sizes_are_the_ancestors_and_a_convnet_has_none(name: str) -> None:
    method = get_method(name, OWN[name] | {"width": 0, "layout": "ancestor"})
    require_ancestor(method, build_pico(TINY))
    with pytest.raises(ShapeError, match="width.*layout of the ancestor asked: Convnet given; only timm's plain"):
        require_ancestor(method, Convnet())
    require_ancestor(get_method(name, SIZES | OWN[name]), Convnet())
    with pytest.raises(ShapeError, match="net2net needs a plain ViT as ancestor: Convnet given"):
        require_ancestor(get_method("net2net"), Convnet())


def test_a_method_may_say_itself_what_ancestors_it_takes() -> None:
    class Choosy(Tleg):
        def require_ancestor(self, ancestor: nn.Module) -> None:
            raise ShapeError(f"{type(ancestor).__name__} asked")

    choosy: Method = Choosy()
    with pytest.raises(ShapeError, match="Linear asked"):
        require_ancestor(choosy, nn.Linear(1, 1))


def test_hidden_units_are_four_per_channel_where_the_ancestor_has_none() -> None:
    assert extract("tleg", Convnet(), mlp_ratio=0.0).shape.mlp_ratio == 4.0
    vit = build_pico(replace(TINY, mlp_ratio=2.0))
    assert extract("tleg", vit, mlp_ratio=0.0).shape.mlp_ratio == 2.0


# Beside the ancestor --------------------------------------------------------------------------------------------------


@four
def test_a_teacher_beside_the_ancestor_gives_the_logits_and_the_ancestor_the_sizes(name: str) -> None:
    """Sizes left open are the ancestor's; everything else is as if the teacher had been the ancestor."""
    ancestor, teacher = build_pico(TINY), Convnet()
    open_ones: dict[str, Any] = {"width": 0, "head_dim": 0, "patch": 0, "layout": "ancestor", "mlp_ratio": 0.0}
    more: dict[str, Any] = {"learngene_width": 4} if name == "lets" else {}
    beside = extract(name, ancestor, **open_ones, **more, teacher_model=teacher)
    sizes: dict[str, Any] = {"width": 8, "head_dim": 4, "patch": 4, "layout": "token", "mlp_ratio": 4.0}
    alone = extract(name, teacher, **sizes, **more)
    assert beside.shape == alone.shape and beside.shape.classes == 5
    assert all(torch.equal(tensor, alone.tensors[key]) for key, tensor in beside.tensors.items())
    assert beside.ancestor["sha256"] == factory.state_digest(ancestor)
    assert beside.provenance["teacher"] == {"name": "", "sha256": factory.state_digest(teacher)}
    assert "teacher" not in alone.provenance
    assert beside.provenance["loss"] == alone.provenance["loss"]


def test_the_ancestors_weights_start_an_auxiliary_of_the_teachers_classes() -> None:
    """The blocks, stem and norm are the ancestor's; the head of five classes is random, and timm's."""
    ancestor = ancestor_of()
    settings: dict[str, Any] = TRAINING | {"start": "ancestor"}
    method = Tleg(**settings)
    lesson = _lesson.prepare(
        method, ancestor, {"one": pictures()}, depth=0, method="tleg", preprocessing=IMAGENET,
        teacher=Teacher(Convnet()),
    )  # fmt: skip
    from learngene_hub.methods._auxiliary import ancestor_parts

    outer, (block,) = ancestor_parts(ancestor, lesson.native, [0.5], seed=3)
    state = ancestor.state_dict()
    assert outer["head.weight"].shape == (5, 8) and 0.01 < float(outer["head.weight"].std()) < 0.03
    assert torch.equal(block["attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert torch.equal(outer["tail.norm.weight"], state["norm.weight"])
    for name in ("tleg", "sws", "ldr", "lets"):
        open_ones: dict[str, Any] = {"width": 0, "head_dim": 0, "patch": 0, "layout": "ancestor", "mlp_ratio": 0.0}
        more: dict[str, Any] = {"learngene_width": 4} if name == "lets" else {}
        learngene = extract(name, ancestor, **open_ones, **more, start="ancestor", teacher_model=Convnet())
        assert learngene.shape.classes == 5


@pytest.mark.parametrize("start", ["width", "patch", "head_dim", "layout", "mlp_ratio"])
def test_weights_of_an_ancestor_of_other_sizes_are_refused(start: str) -> None:
    own: dict[str, Any] = {"width": 8, "head_dim": 4, "patch": 4, "layout": "token", "mlp_ratio": 4.0}
    other = {"width": 12, "head_dim": 8, "patch": 2, "layout": "avg", "mlp_ratio": 2.0}[start]
    with pytest.raises(ShapeError, match="start 'ancestor' asked with .*which would work"):
        extract("tleg", build_pico(TINY), **(own | {start: other}), start="ancestor", watch=never)


def by_hand(teacher: nn.Module, images: Images, preprocessing: Preprocessing) -> Tensor:
    x = images.pixels.double() / 255
    for channel in range(3):
        x[:, channel] = (x[:, channel] - preprocessing.mean[channel]) / preprocessing.std[channel]
    with torch.no_grad():
        return teacher.eval()(x.float())


@pytest.mark.parametrize("kind", ["once", "live"])
def test_a_teacher_sees_pixels_as_it_expects_them(kind: str) -> None:
    """The batches are normalised for the auxiliary; the teacher has a mean and deviation of its own."""
    images, teacher = pictures(), Convnet()
    answers = Answers(Teacher(teacher, ODD), {"one": images}, preprocessing=IMAGENET)
    if kind == "once":
        said = answers.of_all()
    else:
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET.mean, IMAGENET.std))
        said = answers.of_batch((images.pixels / 255 - mean) / std)
    torch.testing.assert_close(said, by_hand(teacher, images, ODD), rtol=1e-4, atol=1e-5)
    assert float((by_hand(teacher, images, ODD) - by_hand(teacher, images, IMAGENET)).abs().max()) > 0.1


def test_a_plain_vit_sees_another_size_with_resampled_positions() -> None:
    vit: Any = build_pico(TINY)
    answers = Answers(Teacher(vit), {"one": pictures(size=16)}, size=16, preprocessing=IMAGENET)
    wide: Any = build_pico(replace(TINY, image_size=16))
    state = vit.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [4, 4], num_prefix_tokens=1)
    wide.load_state_dict(state)
    want = teacher_logits(wide, pictures(size=16), size=16, preprocessing=IMAGENET)
    torch.testing.assert_close(answers.of_all(), want, rtol=1e-3, atol=1e-4)
    assert answers.flops == replace(TINY, image_size=16).flops()


def test_a_teacher_is_copied_and_asked_in_eval_mode() -> None:
    teacher = Convnet().train()
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    generator = torch.get_rng_state()
    first, second = (told(extract("tleg", ancestor_of(), teacher_model=teacher)) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), generator)
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


# Refusals: each one line, before any training -------------------------------------------------------------------------


class Headless(Convnet):
    num_classes = 0


class Grey(nn.Module):
    """Takes one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3))


@four
@pytest.mark.parametrize(
    ("more", "error", "line"),
    [
        ({"labels": 0.5}, SettingsError, "one has 4 classes, the teacher 5; labels=0, the distillation alone"),
        ({"teacher_model": Headless()}, SettingsError, "a teacher without a classifier given.*or a teacher that has"),
        ({"teacher_model": nn.Conv2d(3, 4, 3)}, SettingsError, r"the teacher gives \[1, 4, 6, 6\] for one image"),
        ({"teacher_model": Grey()}, SettingsError, "the teacher fails on an image of 8 px and 3 channels"),
        (
            {"teacher_model": ancestor_of(replace(TINY, in_chans=1))},
            DataError,
            "images of 3 channels asked; the teacher takes 1",
        ),
        ({"width": 20}, ShapeError, "width 20 asked; the heads are 8 wide: a multiple of head_dim 8 would work"),
        ({"patch": 3}, ShapeError, "image size 8 asked; it must be a multiple of patch 3"),
        ({"teacher": "live", "teacher_cache": "kept"}, SettingsError, "a teacher cache asked with teacher 'live'"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_training(
    name: str, more: dict[str, Any], error: type[LearngeneError], line: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"teacher_model": Convnet()} | more
    given |= {"teacher_cache": tmp_path / "kept"} if "teacher_cache" in more else {}
    with pytest.raises(error, match=line) as caught:
        extract(name, ancestor_of(), **given, watch=never)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [{"teacher": Convnet()}, {"teacher_cache": "kept"}])
def test_a_method_without_a_teacher_refuses_one(asked: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="a teacher or its cache asked; net2net takes none: .*tleg"):
        factory.extract("net2net", ancestor_of(), {}, **asked)


def test_a_run_with_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    def stop(steps: Iterator[Step]) -> Iterator[Step]:
        yield from steps
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract("tleg", ancestor_of(), teacher_model=Convnet(), watch=stop, state_dir=tmp_path)
    other = Convnet()
    with torch.no_grad():
        other.head.bias.add_(1.0)
    with pytest.raises(SettingsError, match="teacher's weights"):
        extract("tleg", ancestor_of(), teacher_model=other, state_dir=tmp_path)
    assert told(extract("tleg", ancestor_of(), teacher_model=Convnet(), state_dir=tmp_path)) == told(
        extract("tleg", ancestor_of(), teacher_model=Convnet())
    )


# The classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tleg", "sws", "ldr"])
def test_an_inherited_head_is_the_auxiliarys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descendant of the native shape then says what the auxiliary said at the end, and so do copies of twice its
    width; with other classes, or none stored, the head is as fresh as ever."""
    auxiliaries, train = [], _lesson.train

    def watched(auxiliary: nn.Module, *rest: Any) -> _lesson.Log:
        auxiliaries.append(auxiliary)
        return train(auxiliary, *rest)

    monkeypatch.setattr(_lesson, "train", watched)
    learngene, x = extract(name, Convnet(), head="inherit"), noise(3, 3, 8, 8)
    with torch.no_grad():
        want = auxiliaries[-1].eval()(x)
        torch.testing.assert_close(factory.expand(learngene)(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(factory.expand(learngene, width=32)(x), want, rtol=1e-3, atol=1e-3)
        if name == "ldr":
            torch.testing.assert_close(factory.constrain(learngene).eval()(x), want, rtol=1e-4, atol=1e-4)
    plain = extract(name, Convnet())
    assert learngene.tensors.keys() - plain.tensors.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, learngene.tensors[key]) for key, tensor in plain.tensors.items())
    fresh = factory.expand(plain).state_dict()["head.weight"]
    assert torch.equal(factory.expand(plain, settings={"head": "inherit"}).state_dict()["head.weight"], fresh)
    assert torch.equal(factory.expand(learngene, settings={"head": "fresh"}).state_dict()["head.weight"], fresh)
    both = [factory.expand(each, num_labels=7).state_dict()["head.weight"] for each in (learngene, plain)]
    assert torch.equal(*both)
    shapes = {key: tuple(tensor.shape) for key, tensor in learngene.tensors.items()}
    method = get_method(name, learngene.settings)
    method.check(shapes, learngene.shape)
    for wrong in ({"head.bias": (4,)}, {"head.more": (5,)}):
        with pytest.raises(ArtefactError):
            method.check(shapes | wrong, learngene.shape)
    with pytest.raises(ArtefactError, match="head.weight"):
        method.check({key: shape for key, shape in shapes.items() if key != "head.weight"}, learngene.shape)


# Asked once for each data set, kept on disk ---------------------------------------------------------------------------


class Counted:
    """Counts the forward calls of a module and of its copies, which take its hooks along."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self.hook)

    def hook(self, *_: Any) -> None:
        self.calls += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        return self


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_a_second_extraction_does_not_ask_the_teacher_again(kind: str, tmp_path: Path) -> None:
    """Of any method, seed and sizes; and each ends in the bytes of one without a cache."""
    teacher = Convnet() if kind == "convnet" else build_pico(TINY, seed=7)
    counted, cache = Counted(teacher), tmp_path / "kept"
    without = {name: told(extract(name, teacher)) for name in OWN}
    assert counted.calls >= len(OWN)
    counted.calls = 0
    assert told(extract("tleg", teacher, teacher_cache=cache)) == without["tleg"]
    assert counted.calls == (2 if kind == "convnet" else 1)  # 16 images are one batch; and one for its flops
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    counted.calls = 0
    for name in OWN:
        assert told(extract(name, teacher, teacher_cache=str(cache))) == without[name]
    extract("sws", teacher, seed=9, width=24, teacher_cache=cache)
    extract("sws", ancestor_of(), teacher_model=Teacher(teacher, cache=cache))
    assert counted.calls == 0 and len(list(cache.iterdir())) == 1


def test_each_data_set_is_kept_for_itself(tmp_path: Path) -> None:
    teacher, one, two = Convnet(), pictures(), pictures(7)
    counted = Counted(teacher)
    extract("tleg", teacher, {"one": one}, teacher_cache=tmp_path)
    counted.calls = 0
    both = extract("tleg", teacher, {"two": two, "one": one}, teacher_cache=tmp_path)
    assert counted.calls == 1 and len(list(tmp_path.iterdir())) == 2  # of "two", in one batch
    counted.calls = 0
    assert told(extract("tleg", teacher, {"two": two, "one": one}, teacher_cache=tmp_path)) == told(both)
    assert told(extract("tleg", teacher, {"two": two, "one": one})) == told(both) and counted.calls > 0


def test_an_interrupted_extraction_goes_on_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learngene_hub._state.SAVE_SECONDS", 0.0)

    def stop(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            yield step
            if step.step == 3:
                raise KeyboardInterrupt

    kept: dict[str, Any] = {"state_dir": tmp_path / "state", "teacher_cache": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        extract("ldr", Convnet(), epochs=2, **kept, watch=stop)
    assert told(extract("ldr", Convnet(), epochs=2, **kept)) == told(extract("ldr", Convnet(), epochs=2))

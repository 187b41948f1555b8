"""Descendant: grown from a learngene, wrapped without copies, labelled, saved whole or not at all, loaded back."""

from __future__ import annotations

import json
import os
import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import VARIANTS, planted, variant
from torch import nn

from learngene_hub import __version__
from learngene_hub.descendant import Descendant, wrap, write_weights
from learngene_hub.errors import SettingsError, ShapeError, StoreError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape

TINY = ViTShape(depth=2, width=64, heads=2, patch=8, image_size=32, classes=3)
ANIMALS = {0: "cat", 1: "dog", 2: "fox"}
FACTS = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop_pct=0.8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learngene of three blocks of 64 in heads of 32, for 32 px."""
    file = tmp_path_factory.mktemp("genes") / "pico.safetensors"
    planted(build_pico(variant("token"))).save(file)
    return file


def tiny(seed: int = 0, **more: Any) -> nn.Module:
    return build_pico(replace(TINY, **more), seed)


def wrapped(**more: Any) -> Descendant:
    return wrap(tiny(**more), preprocessing=FACTS)


def images(model: Descendant, count: int = 2) -> torch.Tensor:
    shape = ViTShape.of(model.timm_model)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, shape.in_chans, shape.image_size, shape.image_size, generator=generator)


@torch.no_grad()
def logits(model: Descendant) -> torch.Tensor:
    return model(pixel_values=images(model)).logits


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- wrapping -------------------------------------------------------------------------------------------------------


def test_wrapping_neither_copies_nor_initialises_nor_draws() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    random = torch.get_rng_state()
    descendant = wrap(model, preprocessing=IMAGENET)
    assert descendant.timm_model is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert torch.equal(torch.get_rng_state(), random)
    assert not descendant.training


def test_it_computes_what_its_timm_model_computes() -> None:
    model = wrapped()
    assert torch.equal(logits(model), model.timm_model(images(model)).detach())


def test_the_loss_is_cross_entropy() -> None:
    model, labels = wrapped(), torch.tensor([2, 0])
    out = model(pixel_values=images(model), labels=labels)
    assert torch.equal(out.loss, nn.functional.cross_entropy(out.logits, labels))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_plain_shape_survives_saving(name: str, tmp_path: Path) -> None:
    model = wrap(build_pico(variant(name)), preprocessing=FACTS)
    model.save_pretrained(tmp_path / "saved")
    loaded = Descendant.from_pretrained(tmp_path / "saved")
    assert type(loaded) is Descendant and loaded.loss_type == model.loss_type
    assert ViTShape.of(loaded.timm_model) == variant(name)
    assert same_bytes(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_no_head_is_refused() -> None:
    with pytest.raises(ShapeError, match="without a head given"):
        wrap(tiny(classes=0), preprocessing=IMAGENET)


def test_no_plain_vit_is_refused() -> None:
    with pytest.raises(ShapeError, match="only timm's plain VisionTransformer"):
        wrap(nn.Linear(2, 2), preprocessing=IMAGENET)


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_labels": 0}, "num_labels 0 asked; a classifier has a whole number of at least 1"),
        ({"num_labels": -2}, "num_labels -2 asked"),
        ({"num_labels": 3.0}, "num_labels 3.0 asked"),
        ({"num_labels": True}, "num_labels True asked"),
        ({"num_labels": 4}, "4 labels asked; the head has 3 outputs: 3 labels would work"),
        ({"num_labels": 4, "id2label": ANIMALS}, "num_labels 4 asked, id2label names 3 classes"),
        ({"id2label": {0: "cat", 1: "dog"}}, "2 labels asked; the head has 3 outputs"),
        ({"id2label": {0: "cat", 1: "dog", 3: "fox"}}, "id2label numbers 0, 1, 3 asked; 3 classes are numbered 0 to 2"),
        ({"id2label": {1: "cat", 2: "dog", 3: "fox"}}, "3 classes are numbered 0 to 2"),
        ({"id2label": {}}, "it maps each class number to a name"),
        ({"id2label": ["cat", "dog", "fox"]}, "it maps each class number to a name"),
        ({"id2label": {0: 1, 1: 2, 2: 3}}, "it maps each class number to a name"),
    ],
)
def test_labels_that_contradict_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        wrap(tiny(), preprocessing=IMAGENET, **asked)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [ANIMALS, {str(number): name for number, name in ANIMALS.items()}])
def test_label_names_survive_saving(names: Any, tmp_path: Path) -> None:
    model = wrap(tiny(), preprocessing=IMAGENET, id2label=names)
    assert model.config.id2label == ANIMALS and model.config.label2id == {"cat": 0, "dog": 1, "fox": 2}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["cat", "dog", "fox"]
    assert Descendant.from_pretrained(tmp_path).config.id2label == ANIMALS


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    model = wrap(tiny(classes=1000), preprocessing=IMAGENET)  # a thousand: transformers would guess ImageNet's names
    assert model.config.num_labels == 1000 and model.config.id2label[999] == "LABEL_999"
    model.save_pretrained(tmp_path)
    assert Descendant.from_pretrained(tmp_path).config.id2label[999] == "LABEL_999"


def test_one_name_twice_is_allowed() -> None:
    model = wrap(tiny(), preprocessing=IMAGENET, id2label={0: "a", 1: "a", 2: "b"})
    assert model.config.id2label == {0: "a", 1: "a", 2: "b"}


# ---- the saved folder -----------------------------------------------------------------------------------------------


def test_the_folder_is_timms_layout(tmp_path: Path) -> None:
    model = wrap(tiny(), preprocessing=FACTS, id2label=ANIMALS, provenance={"name": "pico", "digest": "00"})
    model.save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["saved"]
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_classes"] == 3
    assert config["model_args"]["embed_dim"] == 64 and config["model_args"]["img_size"] == 32
    cfg = config["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == (list(FACTS.mean), list(FACTS.std))
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["input_size"]) == ("bilinear", 0.8, [3, 32, 32])
    assert config["architectures"] == ["TimmWrapperForImageClassification"] and config["model_type"] == "timm_wrapper"
    assert config["learngene"] == {"name": "pico", "digest": "00"}
    assert str(tmp_path) not in json.dumps(config)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = wrapped()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    Descendant.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    for file in ("config.json", "model.safetensors"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_saving_over_a_folder_keeps_what_else_is_there(tmp_path: Path) -> None:
    wrapped(seed=1).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card")
    model = wrapped(seed=2, depth=3)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    assert same_bytes(Descendant.from_pretrained(tmp_path), model)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="could not be written") as caught:
            wrapped().save_pretrained(target)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("over", [False, True])
def test_without_space_nothing_is_left_and_the_old_folder_stands(over: bool, tmp_path: Path) -> None:
    small, model = wrapped(depth=1), wrapped(depth=8)
    if over:
        small.save_pretrained(tmp_path / "saved")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="could not be written"):
            model.save_pretrained(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == (["saved"] if over else [])
    if over:
        assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]
        assert same_bytes(Descendant.from_pretrained(tmp_path / "saved"), small)


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wrapped().save_pretrained(tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert os.listdir(tmp_path) == []


def test_a_given_state_is_saved_under_plain_names(tmp_path: Path) -> None:
    state = wrapped(seed=5).state_dict()
    wrapped(seed=6).save_pretrained(tmp_path, state_dict=state)
    assert same_bytes(Descendant.from_pretrained(tmp_path), wrapped(seed=5))
    with pytest.raises(SettingsError, match=r"other names given, head\.bias for one"):
        wrapped().save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if not k.endswith("head.bias")})


def test_push_to_hub_while_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="push_to_hub"):
        wrapped().save_pretrained(tmp_path, push_to_hub=True)


def test_sizes_changed_since_are_saved_as_they_are(tmp_path: Path) -> None:
    model = wrap(tiny(), preprocessing=FACTS, id2label=ANIMALS)
    model.timm_model.reset_classifier(5)
    model.timm_model.set_input_size(img_size=48)
    model.save_pretrained(tmp_path)
    loaded = Descendant.from_pretrained(tmp_path)
    assert ViTShape.of(loaded.timm_model) == replace(TINY, classes=5, image_size=48)
    assert same_bytes(loaded, model)
    assert loaded.config.id2label == {i: f"LABEL_{i}" for i in range(5)}


def test_loading_with_another_head(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = Descendant.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert ViTShape.of(loaded.timm_model) == replace(TINY, classes=7)
    assert torch.equal(loaded.timm_model.blocks[1].mlp.fc1.weight, model.timm_model.blocks[1].mlp.fc1.weight)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6))
def test_weights_are_a_safetensors_file_with_aligned_matrices(tmp_path_factory: Any, sizes: list[list[int]]) -> None:
    import safetensors.torch

    state = {f"t{i}": torch.randn(size).to([torch.float32, torch.bfloat16][i % 2]) for i, size in enumerate(sizes)}
    state["matrix"] = torch.randn(4, 16)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_weights(state, path)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length + json.loads(raw[8 : 8 + length])["matrix"]["data_offsets"][0]) % 64 == 0


def test_weights_of_an_odd_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"count is torch\.int64"):
        write_weights({"count": torch.tensor([1])}, tmp_path / "model.safetensors")


# ---- growing --------------------------------------------------------------------------------------------------------


def test_growing_at_the_native_sizes_inherits_every_byte(path: Path) -> None:
    model = Descendant.from_learngene(path, num_labels=10)
    ancestor = build_pico(variant("token")).state_dict()
    grown = model.timm_model.state_dict()
    assert all(torch.equal(grown[name], ancestor[name]) for name in ancestor if not name.startswith("head."))
    assert not model.training and model.device.type == "cpu"


def test_growing_takes_every_size(path: Path) -> None:
    model = Descendant.from_learngene(
        path, depth=4, width=128, heads=4, id2label=ANIMALS, image_size=48, in_chans=1, drop_path_rate=0.3
    )
    asked = ViTShape(depth=4, width=128, heads=4, patch=8, image_size=48, in_chans=1, classes=3)
    assert ViTShape.of(model.timm_model) == asked
    assert model.config.id2label == ANIMALS and model.config.num_labels == 3
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.timm_model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert logits(model).shape == (2, 3)


def test_drop_path_survives_saving_and_acts_in_training_only(path: Path, tmp_path: Path) -> None:
    model = Descendant.from_learngene(path, num_labels=3, drop_path_rate=0.5)
    model.save_pretrained(tmp_path)
    loaded = Descendant.from_pretrained(tmp_path)
    assert loaded.timm_model.blocks[-1].drop_path1.drop_prob == 0.5
    assert torch.equal(logits(loaded), logits(model)) and torch.equal(logits(loaded), logits(loaded))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded.train()
        assert not torch.equal(logits(loaded), logits(loaded))


def test_it_records_where_it_came_from(path: Path, tmp_path: Path) -> None:
    model = Descendant.from_learngene(path, depth=2, num_labels=3)
    gene = Learngene.load(path)
    facts = {
        "name": "pico.safetensors",  # of a path on this machine the name only
        "digest": gene.digest,
        "revision": None,  # nor of any repository
        "license": gene.license,
        "ancestor": gene.ancestor,
        "method": "lsamd",
        "learngene_shape": gene.shape.to_dict(),
        "version": __version__,
    }
    assert model.config.learngene == facts
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["learngene"] == facts
    assert Descendant.from_pretrained(tmp_path).config.learngene == facts


def test_the_seed_decides_the_head_and_nothing_outside(path: Path) -> None:
    random = torch.get_rng_state()
    first, again, other = (Descendant.from_learngene(path, num_labels=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random)
    assert same_bytes(first, again)
    assert not torch.equal(first.timm_model.head.weight, other.timm_model.head.weight)
    assert torch.equal(first.timm_model.blocks[0].mlp.fc1.weight, other.timm_model.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16", "float32", None])
def test_dtypes_survive_saving(dtype: Any, path: Path, tmp_path: Path) -> None:
    model = Descendant.from_learngene(path, num_labels=3, dtype=dtype)
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {asked} and model.config.dtype == asked
    model.save_pretrained(tmp_path)
    loaded = Descendant.from_pretrained(tmp_path)
    assert loaded.dtype == asked and same_bytes(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_growing_on_meta_allocates_nothing(path: Path) -> None:
    model = Descendant.from_learngene(path, num_labels=3, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"dtype": "int8"}, SettingsError, "dtype int8 asked; there are float32, float16, bfloat16, float64"),
        ({"dtype": torch.int64}, SettingsError, "dtype int64 asked"),
        ({"device": "gpu"}, SettingsError, "device 'gpu' asked"),
        ({"num_labels": 0}, ShapeError, "num_labels 0 asked"),
        ({"num_labels": 2, "id2label": ANIMALS}, ShapeError, "id2label names 3 classes"),
        ({"depth": 0}, ShapeError, "depth 0"),
        ({"depth": 99}, ShapeError, "depth 6 would work"),
        ({"width": 100}, ShapeError, "width 96 or 128 would work"),
        ({"heads": 5}, ShapeError, "2 heads would work"),
        ({"image_size": 50}, ShapeError, "48 or 56 would work"),
        ({"in_chans": 0}, ShapeError, "in_chans 0"),
        ({"drop_path_rate": 1.0}, ShapeError, "drop_path_rate 1.0"),
    ],
)
def test_bad_requests_are_one_line(asked: dict[str, Any], error: type[Exception], message: str, path: Path) -> None:
    with pytest.raises(error) as caught:
        Descendant.from_learngene(path, **{"num_labels": 3, **asked})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_learngene_without_classes_needs_num_labels(tmp_path: Path) -> None:
    file = tmp_path / "headless.safetensors"
    planted(build_pico(variant("token", classes=0))).save(file)
    with pytest.raises(ShapeError, match="num_labels is left out"):
        Descendant.from_learngene(file)
    assert Descendant.from_learngene(file, num_labels=2).config.num_labels == 2


# ---- training -------------------------------------------------------------------------------------------------------


def gradients(model: Descendant) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixel_values=images(model), labels=torch.tensor([0, 2])).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = wrapped().train()
    plain, plain_logits = gradients(model), logits(model)
    with warnings.catch_warnings():  # newer transformers have another name for it, too
        warnings.filterwarnings("ignore", message=".*activation_checkpointing_enable.*", category=FutureWarning)
        model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing
    kept = gradients(model)
    assert plain.keys() == kept.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    assert torch.equal(logits(model), plain_logits)
    model.timm_model.set_grad_checkpointing(False)
    assert not model.timm_model.grad_checkpointing


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch says so on Python 3.13.0
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_in_one_graph(backend: str) -> None:
    model = wrapped()
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(pixel_values=images(model)).logits, logits(model), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_compiles_with_inductor() -> None:
    model = wrapped()
    compiled: Callable[..., Any] = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(pixel_values=images(model)).logits, logits(model), atol=1e-5)
    torch._dynamo.reset()


def test_a_compiled_timm_model_saves_under_plain_names(tmp_path: Path) -> None:
    model = wrapped()
    expected = logits(model)
    model.timm_model = torch.compile(model.timm_model, backend="eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Descendant.from_pretrained(tmp_path)), expected)


def test_hidden_states_are_given_on_request() -> None:
    model = wrapped()
    with torch.no_grad():
        out = model(pixel_values=images(model), output_hidden_states=True)
    assert len(out.hidden_states) == TINY.depth
    assert torch.allclose(out.logits, logits(model), atol=1e-6)


@pytest.mark.gpu
def test_growing_on_an_accelerator_gives_the_same_weights(path: Path) -> None:
    on_gpu = Descendant.from_learngene(path, width=128, num_labels=3, device="cuda")
    on_cpu = Descendant.from_learngene(path, width=128, num_labels=3)
    assert on_gpu.device.type == "cuda"
    assert same_bytes(on_gpu.cpu(), on_cpu)

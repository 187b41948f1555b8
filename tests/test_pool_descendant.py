"""A descendant of a pool: the selected mixture at any depth and width, as plain timm and transformers load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from planted import features
from pools import TINY, anchor_of, look, noise_images, pool_of
from taught import noise

from learngene_hub import Descendant, Pool, Selection, _pool_features, factory
from learngene_hub.data import normalise
from learngene_hub.errors import SettingsError, ShapeError, StoreError


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Read only."""
    return pool_of(tmp_path_factory.mktemp("pools") / "two", (1, 2), count=40)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("sizes", [{}, {"depth": 2}, {"depth": 6, "width": 32}])
def test_it_is_grown_from_the_merged_learngene(pool: Pool, sizes: dict[str, int]) -> None:
    found = pool.select(look(1, 20, seed=3), unlabelled=True)
    model = Descendant.from_learngene(pool, selection=found, num_labels=5, **sizes)  # type: ignore[arg-type]
    want = factory.expand(pool.merge(found), num_labels=5, **sizes)  # type: ignore[arg-type]
    assert isinstance(found, Selection) and [chosen.name for chosen in found.entries] == ["look-1"]
    assert same(model.timm_model, want)
    anchor = Descendant.from_learngene(pool, num_labels=5, **sizes)  # type: ignore[arg-type]
    assert same(anchor.timm_model, factory.expand(pool.anchor, num_labels=5, **sizes))  # type: ignore[arg-type]
    assert not same(anchor.timm_model, want)


def test_one_hot_at_full_depth_is_the_entrys_own_model(pool: Pool) -> None:
    model = Descendant.from_learngene(pool, selection={"look-2": 1.0}, num_labels=3)
    parts = pool.read("look-2").group("increment")
    for i in range(TINY.depth):
        want = pool.anchor.tensors[f"block.{i}.attn.qkv.weight"] + parts["1.attn.qkv.weight"]
        want = want + i / TINY.depth * parts["2.attn.qkv.weight"]
        torch.testing.assert_close(model.timm_model.state_dict()[f"blocks.{i}.attn.qkv.weight"], want)


def test_the_folder_of_a_pool_does_as_well(pool: Pool) -> None:
    own, read = (
        Descendant.from_learngene(source, selection={"look-1": 0.5}, num_labels=2) for source in (pool, pool.folder)
    )
    assert same(own, read)
    assert same(
        Descendant.from_learngene(pool.folder, num_labels=2).timm_model, factory.expand(pool.anchor, num_labels=2)
    )


def test_it_takes_images_of_the_pools_size_where_none_is_asked(tmp_path: Path) -> None:
    """What a descendant of the native depth sees in an image is then what the pool's keys are made of."""
    other = pool_of(tmp_path / "pool", image_size=32)
    assert TINY.image_size == 16
    other.merge({}).save(tmp_path / "mixture.safetensors")
    sources = [(other, None), (other, {}), (other.folder, None), (tmp_path / "mixture.safetensors", None)]
    for source, selection in sources:
        model = Descendant.from_learngene(source, selection=selection, num_labels=2)  # type: ignore[arg-type]
        assert model.config.pretrained_cfg["input_size"] == [3, 32, 32]
        task = look(1, 3, size=32)
        x = normalise(task.pixels, other.anchor.preprocessing)
        want = _pool_features.features(_pool_features.seeing(other.anchor, other.manifest.key), task, other.anchor)
        torch.testing.assert_close(features(model.timm_model, x), want, rtol=1e-4, atol=1e-5)
    asked = Descendant.from_learngene(other, selection={}, num_labels=2, image_size=16)
    assert same(asked.timm_model, factory.expand(anchor_of(), num_labels=2))
    with pytest.raises(ShapeError, match="image_size 0"):
        Descendant.from_learngene(other, num_labels=2, image_size=0)


def test_a_task_like_none_gets_the_anchor(pool: Pool) -> None:
    found = pool.select(noise_images(20))
    model = Descendant.from_learngene(pool, selection=found, num_labels=2)
    assert found.abstained and same(model.timm_model, factory.expand(pool.anchor, num_labels=2))


def test_it_is_saved_with_where_it_came_from_and_loaded_without_the_pool(pool: Pool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = Descendant.from_learngene(pool, selection={"look-1": 0.5}, depth=2, num_labels=2)
    model.save_pretrained(tmp_path / "grown")
    said = json.loads((tmp_path / "grown" / "config.json").read_text())["learngene"]
    assert said["name"] == "two" and said["digest"] == pool.merge({"look-1": 0.5}).digest and said["revision"] is None
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "grown")
    x = noise(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_what_makes_no_sense_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="revision 'main' asked of a pool that is loaded already, two"):
        Descendant.from_learngene(pool, revision="main", num_labels=2)
    pool.anchor.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match="is not a pool: it has no pool.json"):
        Descendant.from_learngene(tmp_path, selection={"look-1": 1.0}, num_labels=2)
    with pytest.raises(LookupError, match="no entry 'look-9'"):
        Descendant.from_learngene(pool, selection={"look-9": 1.0}, num_labels=2)
    other = pool_of(tmp_path / "other", (1,), kind="ldr")
    found = other.select(look(1, 20, seed=3), unlabelled=True)
    with pytest.raises(SettingsError, match="a selection from a pool on the anchor"):
        Descendant.from_learngene(pool, selection=found, num_labels=2)


def test_a_pool_that_was_moved_is_the_same(pool: Pool, tmp_path: Path) -> None:
    moved = Pool.load(shutil.copytree(pool.folder, tmp_path / "moved"))
    assert moved.merge({"look-1": 0.3}).digest == pool.merge({"look-1": 0.3}).digest

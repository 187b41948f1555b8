"""Growing a pool: what an increment learns and what stands still; projections; topologies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS, features
from pools import ONCE, TINY, anchor_of, files_of, look, pool_of
from taught import noise
from torch import Tensor, nn

from learngene_hub import factory
from learngene_hub._pool_grow import Trainee, _taught
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _adaptive_merge as merge
from learngene_hub.pool import Pool
from learngene_hub.training import StateDir, Step, classification_loss, parameter_groups


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=atol)


# Training -------------------------------------------------------------------------------------------------------------


def test_before_the_first_step_the_model_is_the_anchor() -> None:
    anchor = anchor_of()
    zero = {f"{n}.{k}": t * 0 for n in (1, 2) for k, t in anchor.group("block.0").items()}
    trainee = Trainee.of(anchor, zero, merge.table(anchor, "components", 2), classes=5, image_size=16)
    grown = factory.expand(anchor, num_labels=5)
    grown.load_state_dict(grown.state_dict() | {f"head.{k}": t for k, t in trainee.module.heads().items()})
    x = noise(2, 3, 16, 16)
    torch.testing.assert_close(trainee.module(x), grown(x), rtol=1e-4, atol=1e-5)
    names = {name for name, _ in trainee.module.named_parameters()}
    assert names == {f"increment.{name}" for name in zero} | {"head.weight", "head.bias"}


def test_one_step_is_that_of_the_chain_rule() -> None:
    """The gradient of part n is sum_l T_(n-1)(l / L) times that of block l of the plain model that was grown alone."""
    anchor, images = anchor_of(), look(1, 8)
    zero = {f"{n}.{k}": t * 0 for n in (1, 2) for k, t in anchor.group("block.0").items()}
    trainee = Trainee.of(anchor, zero, merge.table(anchor, "components", 2), classes=2, image_size=16)
    plain = factory.expand(anchor, num_labels=2)
    plain.load_state_dict(plain.state_dict() | {f"head.{k}": t for k, t in trainee.module.heads().items()})
    x = (images.pixels.float() / 255 - 0.4) / 0.2
    for model in (trainee.module, plain):
        nn.functional.cross_entropy(model(x), images.labels).backward()
    own, theirs = dict(trainee.module.named_parameters()), dict(plain.named_parameters())
    for key in ("attn.qkv.weight", "mlp.fc2.bias", "norm2.weight"):
        grads = [theirs[f"blocks.{i}.{key}"].grad for i in range(3)]
        assert all(grad is not None for grad in grads)
        constant, line = sum(grads), sum(i / 3 * grad for i, grad in enumerate(grads) if grad is not None)  # type: ignore[arg-type]
        torch.testing.assert_close(own[f"increment.1.{key}"].grad, constant, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own[f"increment.2.{key}"].grad, line, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["net2net", "ldr", "tleg", "adaptive"])
@pytest.mark.parametrize("entry", merge.FORMS)
def test_one_hot_at_full_depth_is_the_model_that_was_trained(
    tmp_path: Path, kind: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Trainee] = []
    own = Trainee.increment

    def keeping(trainee: Trainee) -> dict[str, Tensor]:
        kept.append(trainee)
        return own(trainee)

    monkeypatch.setattr(Trainee, "increment", keeping)
    anchor = anchor_of(kind) if kind != "tleg" else tleg()
    pool = Pool.create(tmp_path / "pool", anchor, entry=entry, features=64).add(look(1), recipe=ONCE)
    trained = kept[-1].module.materialise()
    grown = factory.expand(pool.merge({"look-1": 1.0}), num_labels=2)
    x = noise(3, 3, 16, 16)
    torch.testing.assert_close(features(grown, x), features(trained, x), rtol=1e-5, atol=1e-5)
    alone = factory.expand(pool.merge({}), num_labels=2)
    assert (features(alone, x) - features(trained, x)).abs().max() > 1e-2


def tleg() -> Learngene:
    from taught import randomised

    return randomised("tleg", TINY, ["base", "slope"])


def test_the_loss_falls_and_the_entry_says_what_it_took(tmp_path: Path) -> None:
    recipe = replace(ONCE, epochs=12, lr=1e-2)
    both = [look(kind, 20).pixels for kind in (1, 2)]
    images = Images(torch.cat(both), torch.arange(40) // 20, ("one", "two"), "look-1")
    told = pool_of(tmp_path / "pool").add(images, recipe=recipe).read("look-1").provenance
    assert told["loss"][-1] < 0.7 * told["loss"][0] and len(told["loss"]) == 12
    assert told["steps"] == 12 * 5 and told["images_seen"] == 12 * 40
    assert told["flops"] == 480 * replace(TINY, classes=2).flops() and told["data"] == {"look-1": {"images": 40}}


def test_the_same_call_gives_the_same_bytes_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    pools = [pool_of(tmp_path / name, (1,)) for name in ("a", "b")]
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (pool.read("look-1") for pool in pools)
    assert first.digest == second.digest


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    recipe = replace(ONCE, epochs=3)
    whole = pool_of(tmp_path / "whole", (1,), recipe=recipe).read("look-1")

    def stopping(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            yield step
            if step.step == 4:
                raise KeyboardInterrupt

    pool, state = pool_of(tmp_path / "pool"), StateDir(tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        pool.add(look(1), recipe=recipe, watch=stopping, state_dir=state)
    assert len(Pool.load(pool.folder)) == 0
    resumed = pool.add(look(1), recipe=recipe, state_dir=state).read("look-1")
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in resumed.tensors.items())
    with pytest.raises(SettingsError, match="data"):
        pool.add(look(2), recipe=recipe, state_dir=state)


def test_a_teacher_is_learned_from(tmp_path: Path) -> None:
    teacher, calls = build_pico(replace(TINY, classes=2), seed=5), list[Tensor]()
    x, y = noise(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    said = noise(4, 2, seed=8)

    def model(pixels: Tensor) -> Tensor:
        calls.append(pixels)
        return said

    p, q = teacher(x).softmax(-1), said.softmax(-1)
    want = -q[range(4), y].log().mean() + (p * (p / q).log()).sum(1).mean()
    got = _taught(classification_loss(ONCE), teacher, 2)(model, (x, y))
    torch.testing.assert_close(got, want)
    assert len(calls) == 1
    taught = pool_of(tmp_path / "a").add(look(1), recipe=ONCE, teacher=teacher).read("look-1")
    alone = pool_of(tmp_path / "b", (1,)).read("look-1")
    assert taught.provenance["loss"] != alone.provenance["loss"]
    with pytest.raises(SettingsError, match="teacher of 4 classes asked; the images have 2"):
        pool_of(tmp_path / "c").add(look(1), recipe=ONCE, teacher=build_pico(TINY))


def test_an_increment_may_be_stored_in_half(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool").add(look(1), recipe=ONCE, dtype=torch.float16)
    entry = pool.read("look-1")
    assert entry.tensors["increment.1.attn.qkv.weight"].dtype == torch.float16
    assert entry.tensors["key.mean"].dtype == torch.float32
    same(pool.merge({"look-1": 1.0}).tensors, pool_of(tmp_path / "b", (1,)).merge({"look-1": 1.0}).tensors, atol=1e-3)  # type: ignore[arg-type]


def test_training_costs_no_more_parameters_than_two_blocks(tmp_path: Path) -> None:
    entry = pool_of(tmp_path / "pool", (1,)).read("look-1")
    block = replace(TINY, depth=2).params() - replace(TINY, depth=1).params()
    assert sum(t.numel() for name, t in entry.tensors.items() if name.startswith("increment.")) == 2 * block


# Projection -----------------------------------------------------------------------------------------------------------


def moved(model: nn.Module, scale: float, seed: int = 3) -> nn.Module:
    """A copy whose blocks, and nothing else, have other numbers."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(other.named_parameters()):
            if name.startswith("blocks."):
                parameter.add_(noise(*parameter.shape, seed=seed + i), alpha=scale)
    return other


def test_an_ancestor_within_reach_of_two_components_is_kept_whole(tmp_path: Path) -> None:
    trained = pool_of(tmp_path / "a", (1,))
    ancestor = factory.expand(trained.merge({"look-1": 1.0}), num_labels=2)
    pool = pool_of(tmp_path / "b").add(look(1), ancestor=ancestor)
    told = pool.read("look-1").provenance
    assert told["residual"] < 1e-3 and told["outside"] == 0 and "steps" not in told
    same(pool.merge({"look-1": 1.0}).tensors, trained.merge({"look-1": 1.0}).tensors, atol=1e-4)  # type: ignore[arg-type]


def test_an_ancestor_that_two_components_cannot_hold_is_refused_with_its_residual(tmp_path: Path) -> None:
    """Independent numbers in each of 3 blocks: of their length the part beside a plane of 3 axes is sqrt(1/3)."""
    pool = pool_of(tmp_path / "pool", components=1)
    ancestor = moved(factory.expand(anchor_of(), num_labels=2), 0.1)
    with pytest.raises(SettingsError, match=r"residual of 0\.8[12]\d asked, above the limit 0.6: 1 parts cannot hold"):
        pool.add(look(1), ancestor=ancestor)
    assert list(files_of(pool.folder)) == ["learngene.safetensors"]
    pool = pool.add(look(1), ancestor=ancestor, limit=0.9)
    assert pool.read("look-1").provenance["residual"] == pytest.approx((2 / 3) ** 0.5, abs=0.01)
    pool = pool.add(look(1), name="tuned", ancestor=ancestor, recipe=ONCE)
    told = pool.read("tuned").provenance
    assert told["residual"] > 0.8 and told["steps"] == 6


def test_blocks_hold_any_ancestor(tmp_path: Path) -> None:
    ancestor = moved(factory.expand(anchor_of(), num_labels=2), 0.1)
    pool = pool_of(tmp_path / "pool", entry="blocks").add(look(1), ancestor=ancestor)
    assert pool.read("look-1").provenance["residual"] < 1e-6
    grown = factory.expand(pool.merge({"look-1": 1.0}), num_labels=2)
    x = noise(2, 3, 16, 16)
    torch.testing.assert_close(features(grown, x), features(ancestor, x), rtol=1e-5, atol=1e-5)
    half = factory.expand(pool.merge({"look-1": 1.0}), num_labels=2, depth=2)  # its blocks 0 and 2
    for mine, theirs in ((0, 0), (1, 2)):
        got = half.state_dict()[f"blocks.{mine}.mlp.fc1.weight"]
        torch.testing.assert_close(got, ancestor.state_dict()[f"blocks.{theirs}.mlp.fc1.weight"], rtol=0, atol=1e-6)


def test_what_lies_outside_of_the_blocks_is_told(tmp_path: Path) -> None:
    ancestor = factory.expand(anchor_of(), num_labels=2)
    with torch.no_grad():
        ancestor.get_parameter("norm.weight").mul_(1.5)
    pool = pool_of(tmp_path / "pool").add(look(1), ancestor=ancestor)
    told, state = pool.read("look-1").provenance, anchor_of().tensors
    theirs = {k: t for k, t in ancestor.state_dict().items() if not k.startswith(("blocks.", "head."))}
    want = 0.5 * state["tail.norm.weight"].norm() / torch.cat([t.flatten() for t in theirs.values()]).norm()
    assert told["outside"] == pytest.approx(float(want), rel=1e-4) and told["residual"] == 0


def test_ancestors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool")
    for other, told in (
        (replace(TINY, depth=4), "depth 4 instead of 3"),
        (replace(TINY, heads=4, head_dim=4), "heads 4 instead of 2, head_dim 4 instead of 8"),
        (replace(TINY, patch=8), "patch 8 instead of 4"),
        (replace(TINY, in_chans=1), "in_chans 1 instead of 3"),
    ):
        with pytest.raises(ShapeError, match=f"{told} given; the anchor itself, finetuned, would work"):
            pool.add(look(1), ancestor=build_pico(other))
    with pytest.raises(ShapeError):
        pool.add(look(1), ancestor=nn.Linear(3, 3))


def test_an_ancestor_that_was_never_the_anchor_is_refused(tmp_path: Path) -> None:
    """In a pool of blocks its projection leaves nothing out, so that the residual alone would not tell."""
    pool, stranger = pool_of(tmp_path / "pool", entry="blocks"), TINY.build()
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(9))
    with pytest.raises(SettingsError, match="stem and last norm lie .* away from the anchor's"):
        pool.add(look(1), ancestor=stranger)
    broken = factory.expand(anchor_of(), num_labels=2)
    with torch.no_grad():
        broken.get_parameter("blocks.1.norm2.bias")[3] = float("nan")
    with pytest.raises(SettingsError, match=r"NaN or infinite numbers in blocks\.1\.norm2\.bias"):
        pool.add(look(1), ancestor=broken)
    for limit in (float("nan"), -1.0, "x"):
        with pytest.raises(SettingsError, match="limit .* asked; it is a share"):
            pool.add(look(1), ancestor=factory.expand(anchor_of(), num_labels=2), limit=limit)  # type: ignore[arg-type]
    assert Pool.load(tmp_path / "pool").names == () and not (tmp_path / "pool" / "entries").exists()


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (pool_of(tmp_path / name, (1, 2)) for name in ("one", "other"))
    assert files_of(one.folder) == files_of(other.folder)
    assert one.manifest.digest == other.manifest.digest


# Topologies -----------------------------------------------------------------------------------------------------------


def test_in_a_chain_each_stands_on_all_before_it(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", (1, 2, 3), topology="chain")
    rows = pool.manifest.entries
    assert [list(method.parents.items()) for method in pool.methods().values()] == [
        [], [(rows[0].sha256, 1.0)], [(rows[1].sha256, 1.0)],
    ]  # fmt: skip
    total: dict[str, Tensor] = {}
    for row in rows:
        merge.add_scaled(total, pool.read(row.sha256).group("increment"), 1.0)
    same(pool.merge({"look-3": 1.0}).tensors, merge.merged_tensors(pool.anchor, total, pool.table()))  # type: ignore[arg-type]
    star = pool_of(tmp_path / "star", (1, 2, 3))
    assert all(not method.parents for method in star.methods().values())
    other = pool_of(tmp_path / "other", topology="chain")
    with pytest.raises(ArtefactError, match=f"stands on {rows[1].sha256[:12]}, which this pool does not hold"):
        other.adopt(pool.read("look-3"), "look-3")


def test_in_an_adaptive_pool_an_entry_stands_on_what_its_data_look_like(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", (1, 2), topology="adaptive", count=40)
    first = pool.methods()
    assert all(not method.parents for method in first.values())  # look 2 is nothing like look 1
    pool = pool.add(look(1, 40, seed=9), name="again", recipe=ONCE)
    parents = pool.methods()[pool.row("again").sha256].parents
    assert parents == {pool.row("look-1").sha256: pytest.approx(0.5, abs=0.05)}
    total: dict[str, Tensor] = {}
    merge.add_scaled(total, pool.read("again").group("increment"), 0.7)
    merge.add_scaled(total, pool.read("look-1").group("increment"), 0.7 * next(iter(parents.values())))
    same(pool.merge({"again": 0.7}).tensors, merge.merged_tensors(pool.anchor, total, pool.table()))  # type: ignore[arg-type]


# Growing descendants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"depth": 2}, {"depth": 6, "width": 32}, {"width": 8}])
def test_what_is_merged_grows_to_every_size_of_the_anchor(tmp_path: Path, sizes: dict[str, Any]) -> None:
    pool = pool_of(tmp_path / "pool", (1, 2))
    merged = pool.merge({"look-1": 0.6, pool.row("look-2").sha256: 0.3})
    assert merged.reach == pool.anchor.reach and merged.method == "net2net"
    assert merged.provenance["selection"] == {"look-1": 0.6, "look-2": 0.3}
    merged.save(tmp_path / "merged.safetensors")
    grown = factory.expand(Learngene.load(tmp_path / "merged.safetensors"), num_labels=3, **sizes)
    plain, late = factory.expand(pool.anchor, num_labels=3, **sizes).state_dict(), dict[str, Tensor]()
    for name, tensor in plain.items():
        late[name] = tensor.clone()
    for entry, weight in (("look-1", 0.6), ("look-2", 0.3)):
        one = factory.expand(pool.merge({entry: 1.0}), num_labels=3, **sizes).state_dict()
        late = {name: late[name] + weight * (one[name] - plain[name]) for name in late}
    same(grown.state_dict(), late)


def test_an_anchor_in_half_precision_is_summed_in_full(tmp_path: Path) -> None:
    half = factory.extract("net2net", build_pico(TINY), {}, facts=FACTS).to(torch.float16)
    pool = Pool.create(tmp_path / "pool", half, features=64).add(look(1), recipe=ONCE)
    merged = pool.merge({"look-1": 1.0})
    assert merged.tensors["block.0.attn.qkv.weight"].dtype == torch.float32
    assert factory.expand(merged, depth=2, num_labels=2)(noise(1, 3, 16, 16)).shape == (1, 2)


def test_the_groups_that_are_trained_do_not_let_vectors_decay() -> None:
    anchor = anchor_of()
    zero = {f"{n}.{k}": t * 0 for n in (1, 2) for k, t in anchor.group("block.0").items()}
    module = Trainee.of(anchor, zero, merge.table(anchor, "components", 2), classes=2, image_size=16).module
    decay, plain = parameter_groups(module, ONCE)
    assert all(p.ndim >= 2 for p in decay["params"]) and all(p.ndim == 1 for p in plain["params"])

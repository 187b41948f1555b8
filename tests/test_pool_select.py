"""TALS: mixtures that are known in advance, weights by brute force, abstention, amounts, the same for a seed."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import features
from pools import ONCE, look, noise_images, pool_of
from taught import noise
from torch import Tensor

from learngene_hub import _pool_amounts, _pool_baselines, _pool_features, factory
from learngene_hub.data import Images, normalise
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.methods import _adaptive_key as key
from learngene_hub.methods._adaptive_match import convex_weights, matched
from learngene_hub.pool import Chosen, Pool, Selection

NEVER = float("-inf")  # of what is left as a rule: matching goes on


# Matching -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_convex_weights_are_those_of_a_search_over_the_simplex(seed: int) -> None:
    keys, target = noise(3, 5, seed=seed), noise(5, seed=seed + 100)
    steps = 100
    grid = [(a, b, steps - a - b) for a in range(steps + 1) for b in range(steps + 1 - a)]
    w = torch.tensor(grid, dtype=torch.float64) / steps
    errors = (target.double() - w @ keys.double()).norm(dim=1)
    found = convex_weights(target, keys)
    assert float(found.sum()) == pytest.approx(1) and float(found.min()) >= 0
    error = float((target.double() - found @ keys.double()).norm())
    assert error <= float(errors.min()) + 2e-3  # the row of the sum has a finite weight
    torch.testing.assert_close(found, w[errors.argmin()], rtol=0, atol=0.02)


def test_a_narrow_data_set_does_not_win_by_its_length() -> None:
    """The largest product with the task would be that of the longer key, the least distance is that of the nearer."""
    keys, task = torch.tensor([[0.9, 0.3, 0.0], [0.4, 0.0, 0.0]]), torch.tensor([0.42, 0.0, 0.0])
    assert int((keys @ task).argmax()) == 0
    assert list(matched(task, keys, 1, lambda _: NEVER)[0]) == [1]


def test_what_is_known_to_be_mixed_is_found() -> None:
    keys = torch.nn.functional.normalize(noise(6, 40), dim=1)
    task = 0.6 * keys[4] + 0.3 * keys[1] + 0.1 * keys[5]
    shares, left = matched(task, keys, 3, lambda _: NEVER)
    assert shares == {4: pytest.approx(0.6, abs=2e-3), 1: pytest.approx(0.3, abs=2e-3), 5: pytest.approx(0.1, abs=2e-3)}
    assert left < 1e-3
    assert list(matched(task, keys, 2, lambda _: NEVER)[0]) == [4, 1]
    assert list(matched(task, keys, 3, lambda chosen: 0.7)[0]) == [4]  # as little is left of samples: no more is needed
    assert matched(keys[2], keys, 3, lambda _: NEVER)[0] == {2: pytest.approx(1.0)}


def sources(count: int = 6, width: int = 12, spread: float = 0.25) -> list[Tensor]:
    """Clouds of directions around as many axes, 400 of each."""
    clouds = [noise(400, width, seed=t) * spread + torch.eye(width)[t] for t in range(count)]
    return [torch.nn.functional.normalize(cloud, dim=1) for cloud in clouds]


@pytest.mark.parametrize("seed", range(10))
def test_ten_images_of_two_of_six_sources_name_both_and_their_shares(seed: int) -> None:
    """Half and half, five images of each: the support is exact and the shares are 0.5 +- 0.1."""
    clouds = sources()
    space = key.Space(scale=key.scale_of(torch.cat(clouds)[::8], 0))
    keys = [key.key_of([cloud[:300]], space) for cloud in clouds]
    a, b = sorted(torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    pick = torch.randperm(100, generator=torch.Generator().manual_seed(seed + 50))[:10] + 300  # of no key's images
    task = key.key_of([torch.cat([clouds[a][pick[:5]], clouds[b][pick[5:]]])], space, measure=False)

    def enough(chosen: Any) -> float:
        return max(keys[t].residual_at(0.95, 10) for t in chosen)

    shares, left = matched(task.mean, torch.stack([one.mean for one in keys]), 3, enough)
    assert sorted(shares) == [a, b]
    assert all(share == pytest.approx(0.5, abs=0.1) for share in shares.values())
    assert left <= enough(list(shares))


# A pool ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A pool of six looks. Read only."""
    return pool_of(tmp_path_factory.mktemp("pools") / "six", range(1, 7), count=60, recipe=replace(ONCE, epochs=1))


def mixed(kinds: tuple[int, ...], each: int, *, seed: int = 5) -> Images:
    parts = [look(kind, each, seed=seed) for kind in kinds]
    pixels, labels = (torch.cat([getattr(part, what) for part in parts]) for what in ("pixels", "labels"))
    return Images(pixels, labels, ("0", "1"), "task")


@pytest.mark.parametrize("kinds", list(itertools.combinations(range(1, 7), 2)))
def test_images_of_two_entries_name_both(six: Pool, kinds: tuple[int, int]) -> None:
    found = six.select(mixed(kinds, 5), unlabelled=True)
    assert sorted(chosen.name for chosen in found.entries) == [f"look-{kind}" for kind in kinds]
    assert all(chosen.share == pytest.approx(0.5, abs=0.1) for chosen in found.entries)
    assert all(chosen.weight == pytest.approx(chosen.share / 2, abs=1e-6) for chosen in found.entries)
    assert not found.abstained and found.residual <= found.threshold and found.scores == {}


@pytest.mark.parametrize("labelled", [True, False])
def test_noise_is_like_none_of_them(six: Pool, labelled: bool) -> None:
    found = six.select(noise_images(30), unlabelled=not labelled)
    assert found.abstained and found.entries == () and found.residual > found.threshold
    assert six.merge(found).digest == six.anchor.digest
    assert six.select(noise_images(30), unlabelled=True, tolerance=100.0).entries


def shortlisted(pool: Pool, count: int) -> tuple[Chosen, ...]:
    """What the images of the second look alone say."""
    return pool.select(look(2, count, seed=3), unlabelled=True, tolerance=100.0).entries


@pytest.mark.parametrize(
    ("count", "labelled", "sample"), [(5, False, 5), (40, False, 40), (5, True, 5), (10, True, 10), (40, True, 10)]
)
def test_a_task_may_lie_as_far_as_as_many_images_of_an_entry_and_with_labels_as_ten(
    six: Pool, count: int, labelled: bool, sample: int
) -> None:
    found = six.select(look(2, count, seed=3), unlabelled=not labelled, tolerance=100.0)
    if not labelled:
        assert found.entries[0].name == "look-2" and found.entries[0].share > 0.9
    own = [key.Key.of(six.read(chosen.name).tensors).residual_at(0.95, sample) for chosen in shortlisted(six, count)]
    assert found.threshold == pytest.approx(max(own), abs=1e-6)


def test_the_same_images_and_seed_give_the_same_selection(six: Pool) -> None:
    task = mixed((2, 5), 8)
    state = torch.get_rng_state()
    first, second = six.select(task, seed=3), Pool.load(six.folder).select(task, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second and first.seconds > 0
    assert first.labelled and first.scores.keys() == {"0", "0.3", "0.5", "0.7", "1"}
    assert six.select(task, seed=4) != first
    assert json.loads(json.dumps(first.to_dict()))["entries"][0]["name"] in ("look-2", "look-5")


def test_pixels_and_labels_are_taken_as_images_are(six: Pool) -> None:
    task = mixed((2, 5), 8)
    assert six.select(task.pixels, task.labels) == six.select(task)
    assert six.select(task.pixels) == six.select(task, unlabelled=True)
    for wrong in ({"labels": task.labels}, {"labels": task.labels, "unlabelled": True}):
        with pytest.raises(SettingsError, match="labels asked beside"):
            six.select(task, **wrong)


def test_at_most_k_are_chosen(six: Pool) -> None:
    task = mixed((1, 2, 3), 12)
    assert len(six.select(task, unlabelled=True, tolerance=9.0).entries) == 3
    one = six.select(task, unlabelled=True, k=1, tolerance=9.0)
    assert len(one.entries) == 1 and one.entries[0].share == 1
    for k in (0, 9, True, 1.5):
        with pytest.raises(SettingsError, match="k "):
            six.select(task, k=k)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="tolerance 0 asked"):
        six.select(task, tolerance=0)


def test_tasks_that_cannot_be_used_are_refused(six: Pool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images of 3 x 20 x 20; this pool's are 3 x 16 x 16"):
        six.select(noise_images(10, size=20))
    with pytest.raises(DataError, match="images of 1 x 16 x 16"):
        six.select(noise_images(10, channels=1))
    few = Images(noise_images(3).pixels, torch.tensor([0, 1, 4]), tuple("abcde"), "few")
    with pytest.raises(DataError, match="few has 3 images of 5 classes"):
        six.select(few)
    assert six.select(few, unlabelled=True).images == 3
    with pytest.raises(DataError, match="holds no images"):
        six.select(noise_images(0))
    with pytest.raises(DataError):
        six.select(torch.zeros(4, 3, 16, 16))
    with pytest.raises(SettingsError, match="the pool is empty"):
        pool_of(tmp_path / "empty").select(look(1))


def test_one_image_is_enough(six: Pool) -> None:
    one = look(3, 1, classes=1)
    found = six.select(one)
    assert [chosen.name for chosen in found.entries] in (["look-3"], []) and found.images == 1


def test_of_many_images_a_thousand_are_looked_at(six: Pool) -> None:
    found = six.select(look(3, 1100, seed=8), unlabelled=True)
    assert found.images == 1000 and [chosen.name for chosen in found.entries] == ["look-3"]


def test_a_selection_of_another_pool_is_refused(six: Pool, tmp_path: Path) -> None:
    other = pool_of(tmp_path / "other", (1,), kind="ldr")
    found = six.select(look(1, 20, seed=4), unlabelled=True)
    with pytest.raises(SettingsError, match="a selection from a pool on the anchor"):
        other.merge(found)
    copy = Selection(**{**vars(found), "entries": (Chosen(name="x", sha256="0" * 64, weight=1.0, share=1.0),)})
    with pytest.raises(LookupError, match="no entry '0000"):
        six.merge(copy)


@pytest.mark.parametrize(
    ("more", "kind"), [({"entry": "blocks"}, "whole blocks"), ({"topology": "chain"}, "in a chain")]
)
def test_where_only_one_can_be_chosen_one_is(tmp_path: Path, more: dict[str, str], kind: str) -> None:
    pool = pool_of(tmp_path / "pool", (1, 2), count=40, **more)
    task = mixed((1, 2), 10)
    assert len(pool.select(task, unlabelled=True, tolerance=9.0).entries) == 1
    with pytest.raises(SettingsError, match=f"k 2 asked of a pool whose entries .*{kind}; k=1"):
        pool.select(task, k=2)


# Amounts --------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_mixture_is_that_of_the_merged_learngene(six: Pool) -> None:
    chosen = [six.row(name).sha256 for name in ("look-2", "look-4")]
    model = _pool_features.seeing(six.anchor, six.manifest.key)
    mixture = _pool_amounts.Mixture.of(six, chosen, model)
    merged = factory.expand(six.merge({chosen[0]: 0.4, chosen[1]: 1.2})).state_dict()
    state = mixture.state(torch.tensor([0.4, 1.2]))
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    x = look(2, 5)
    grown = factory.expand(six.merge({chosen[0]: 0.4, chosen[1]: 1.2}))
    want = features(grown, normalise(x.pixels, six.anchor.preprocessing))
    got = _pool_features.features(model, x, six.anchor, state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (12, 30), (9, 9)])
def test_a_head_is_where_its_gradient_vanishes(count: int, width: int) -> None:
    x, y = noise(count, width) * torch.arange(1.0, width + 1) + 7, torch.arange(count) % 3
    (head,) = _pool_amounts.fitted_heads(x, y, 3, torch.ones(1, count))
    z = (x - x.mean(0)) / x.std(0, correction=0)
    w, b = head.weight_DC.clone().requires_grad_(), head.bias_C.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ w + b, y) + _pool_amounts.RIDGE / 2 * w.square().sum()
    loss.backward()
    assert w.grad is not None and b.grad is not None
    assert float(w.grad.abs().max()) < 1e-4 and float(b.grad.abs().max()) < 1e-4
    torch.testing.assert_close(head(x), z @ head.weight_DC + head.bias_C, rtol=1e-4, atol=1e-4)


def test_held_out_images_are_read_by_heads_that_never_saw_them() -> None:
    """Five images, five folds: each by the head of the other four."""
    x, y = noise(5, 3), torch.tensor([0, 1, 0, 1, 0])
    want = 0.0
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        (head,) = _pool_amounts.fitted_heads(x[rest], y[rest], 2, torch.ones(1, 4))
        want += float(torch.nn.functional.cross_entropy(head(x[i : i + 1]), y[i : i + 1])) / 5
    assert _pool_amounts.held_out(x, y, 2, seed=0) == pytest.approx(want, rel=1e-3)
    assert _pool_amounts.held_out(x[:1], y[:1], 2, seed=0) == pytest.approx(math.log(2))


def test_an_increment_that_does_nothing_is_dropped_and_one_that_helps_is_kept(tmp_path: Path) -> None:
    """Of the first the loss has no gradient but that of its size, which takes it below the floor."""
    data = two_looks(30)
    pool = pool_of(tmp_path / "pool").add(data, name="good", recipe=replace(ONCE, epochs=12, lr=1e-2))
    entry = pool.read("good")
    nothing = {name: t * 0 if name.startswith("increment.") else t for name, t in entry.tensors.items()}
    pool = pool.adopt(replace(entry, tensors=nothing), "nothing")
    model = _pool_features.seeing(pool.anchor, pool.manifest.key)
    shares = {pool.row(name).sha256: 0.5 for name in ("good", "nothing")}
    task = two_looks(10, seed=7)
    plain = _pool_features.features(model, task, pool.anchor)
    weights, scores = _pool_amounts.amounts(pool, model, task, plain, shares, seed=0)
    assert list(weights) == [pool.row("good").sha256] and 0.05 <= weights[pool.row("good").sha256] <= 1.5
    assert scores["1"] < scores["0"]


def test_where_the_anchor_alone_does_as_well_nothing_is_added(six: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scores that are given: the first is that of the anchor."""
    task, given = mixed((2, 5), 8), list[float]()

    def held_out(*_: Any) -> float:
        return given.pop(0)

    monkeypatch.setattr(_pool_amounts, "held_out", held_out)
    for scores, added in (
        ([0.5, 0.6, 0.6, 0.7, 0.9], False),
        ([0.5, 0.6, 0.5, 0.7, 0.9], False),
        ([0.5, 0.6, 0.4, 0.7, 0.9], True),
    ):
        given[:] = scores
        found = six.select(task)
        assert not found.abstained and list(found.scores.values()) == scores
        assert bool(found.entries) is added
    given[:] = [0.5, 0.6, 0.5, 0.7, 0.9]
    assert six.merge(six.select(task)).digest == six.anchor.digest


def two_looks(each: int, seed: int = 0) -> Images:
    """Images of two looks; which of them is the label."""
    pixels = torch.cat([look(kind, each, seed=seed).pixels for kind in (1, 2)])
    return Images(pixels, torch.arange(2 * each) // each, ("one", "two"), "two")


def test_the_weights_are_moved_by_the_gradient_of_the_loss(six: Pool) -> None:
    """Against differences of the loss, through functions of the library that know nothing of mixtures."""
    chosen, task = [six.row(name).sha256 for name in ("look-1", "look-2")], two_looks(4)
    model = _pool_features.seeing(six.anchor, six.manifest.key)
    mixture = _pool_amounts.Mixture.of(six, chosen, model)
    (head,) = _pool_amounts.fitted_heads(
        _pool_features.features(model, task, six.anchor), task.labels, 2, torch.ones(1, len(task))
    )
    x, w = normalise(task.pixels, six.anchor.preprocessing), torch.tensor([0.3, 0.8], requires_grad=True)

    def loss_at(state: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(head(torch.func.functional_call(model, state, (x,))), task.labels)

    loss_at(mixture.state(w)).backward()
    assert w.grad is not None
    for i in range(2):
        values = []
        for step in (0.05, -0.05):
            weights = {sha: v + step * (j == i) for j, (sha, v) in enumerate(zip(chosen, w.tolist(), strict=True))}
            merged = factory.expand(six.merge(weights), num_labels=2).state_dict()
            values.append(float(loss_at({k: t for k, t in merged.items() if not k.startswith("head.")})))
        assert float(w.grad[i]) == pytest.approx((values[0] - values[1]) / 0.1, rel=0.05, abs=1e-4)


def test_batches_show_each_image_as_often_as_any_other() -> None:
    drawn = torch.cat(list(_pool_amounts._batches(24, seed=0)))
    assert len(drawn) == 60 * 16 and set(drawn.bincount(minlength=24).tolist()) == {40}
    assert [len(batch) for batch in _pool_amounts._batches(5, seed=0)] == [5] * 60


# Simpler rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(30, 4), (6, 9)])
def test_logme_is_the_largest_evidence_of_a_linear_model(count: int, width: int) -> None:
    """Against log N(y; 0, 1/b + F F' / a) itself, on a grid of a and b."""
    x, y = noise(count, width, seed=5), torch.arange(count) % 3
    want = 0.0
    for label in range(3):
        target, values = (y == label).double(), []
        for a in torch.logspace(-3, 6, 91, dtype=torch.float64):
            for b in torch.logspace(-2, 4, 91, dtype=torch.float64):
                cov = torch.eye(count, dtype=torch.float64) / b + x.double() @ x.double().T / a
                values.append((cov, target))
        covs = torch.stack([cov for cov, _ in values])
        root = torch.linalg.cholesky(covs)
        z = torch.linalg.solve_triangular(root, target.expand(len(covs), -1)[..., None], upper=False)[..., 0]
        logs = -0.5 * z.square().sum(1) - root.diagonal(dim1=1, dim2=2).log().sum(1) - count / 2 * math.log(2 * math.pi)
        want += float(logs.max()) / count / 3
    assert _pool_baselines.logme(x, y, 3) == pytest.approx(want, abs=2e-3)


def test_logme_prefers_features_that_tell_the_classes_apart() -> None:
    y = torch.arange(40) % 2
    useless = noise(40, 5)
    useful = useless.clone()
    useful[:, 0] += 3 * y
    assert _pool_baselines.logme(useful, y, 2) > _pool_baselines.logme(useless, y, 2)


def test_the_simpler_rules_are_what_they_say(six: Pool) -> None:
    task = look(4, 20, seed=3)
    assert six.select(task, rule="anchor").entries == ()
    soup = six.select(noise_images(20), rule="soup")
    assert [chosen.weight for chosen in soup.entries] == [pytest.approx(1 / 6, abs=1e-6)] * 6 and not soup.abstained
    nearest = six.select(task, rule="nearest", unlabelled=True)
    assert [(chosen.name, chosen.weight) for chosen in nearest.entries] == [
        ("look-4", 1.0)
    ] and nearest.rule == "nearest"
    assert max(nearest.scores, key=lambda name: nearest.scores[name]) == "look-4" and len(nearest.scores) == 6
    best = six.select(task, rule="logme")
    assert len(best.entries) == 1 and best.entries[0].weight == 1 and best == six.select(task, rule="logme")
    model = _pool_features.seeing(six.anchor, six.manifest.key)
    for name, score in best.scores.items():
        state = factory.expand(six.merge({name: 1.0}), num_labels=1).state_dict()
        seen = _pool_features.features(model, task, six.anchor, {k: t for k, t in state.items() if "head" not in k})
        assert score == pytest.approx(_pool_baselines.logme(seen, task.labels, 2), abs=1e-4)
    with pytest.raises(SettingsError, match="rule 'logme' asked without labels"):
        six.select(task, rule="logme", unlabelled=True)
    with pytest.raises(SettingsError, match="rule 'best' asked; there are tals, logme, nearest, soup, anchor"):
        six.select(task, rule="best")

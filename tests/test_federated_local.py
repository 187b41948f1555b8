"""The parts of GENE-FL by their formulas: Fisher information, sensitivities, the constraint, subspaces, partitions."""

from __future__ import annotations

import math

import fed
import pytest
import torch
from conftest import build_pico
from planted import variant
from torch import Tensor, nn

from learngene_hub.data import Images, normalise
from learngene_hub.errors import DataError
from learngene_hub.federated import subspace
from learngene_hub.federated.local import CUT, constraint, fisher_weights, recipe_of, train
from learngene_hub.federated.partition import partition
from learngene_hub.methods._gene_fl_layers import layer_entries
from learngene_hub.methods._gene_fl_sensitivity import condensed, sensitivities
from learngene_hub.methods._heuristic_anchor import diagonal_fisher
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import classification_loss, fit, image_batches

SHAPE = variant("token", depth=2)


def pictures(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, tuple("0123456789"), "noise")


def log_likelihood_gradients(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """(N, ...) gradients of log p(y | x), image by image."""
    parameter, found = dict(model.named_parameters())[name], []
    for i in range(len(y)):
        log_p = torch.log_softmax(model(x[i : i + 1]), -1)[0, y[i]]
        found.append(torch.autograd.grad(log_p, parameter)[0])
    return torch.stack(found)


def test_fisher_is_the_mean_of_true_per_sample_squares() -> None:
    model, images = build_pico(SHAPE), pictures(5)
    x, y = normalise(images.pixels, IMAGENET), images.labels
    name = "blocks.1.mlp.fc1.weight"
    found = diagonal_fisher(model, [name], [(x, y)], labels="data")[name]
    each = log_likelihood_gradients(model, x, y, name)
    torch.testing.assert_close(found, (each**2).mean(0), atol=1e-8, rtol=1e-4)
    assert bool((found >= 0).all())
    squared_mean = each.mean(0) ** 2  # the mistake to avoid
    assert float(squared_mean.sum()) < 0.6 * float(found.sum())


def test_only_high_fisher_numbers_are_held_by_their_share_cut_at_ten() -> None:
    fisher = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([[5.0, 6.0, 7.0, 8.0, 1000.0]])}
    held = fisher_weights(fisher, 0.8)
    mean = (7.0 + 8.0 + 1000.0) / 3
    assert held["a"].tolist() == [0.0] * 5
    torch.testing.assert_close(held["b"], torch.tensor([[0.0, 0.0, 7 / mean, 8 / mean, 1000 / mean]]))
    assert fisher_weights(fisher, 0.8, plain=True)["b"].tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]
    spiky = {"a": torch.cat([torch.full((990,), 1.0), torch.full((10,), 1e6)])}
    assert float(fisher_weights(spiky, 0.5)["a"].max()) == CUT
    assert not fisher_weights({"a": torch.zeros(4)}, 0.8)["a"].any()


def test_the_constraint_is_mu_zeta_plus_nu_mask_fbar_on_what_was_received() -> None:
    model, images = build_pico(SHAPE), pictures(4)
    names = [name for name in layer_entries(SHAPE)[1].values()]
    state = model.state_dict()
    received = {name: state[name].clone() for name in names}
    batch = (normalise(images.pixels, IMAGENET), images.labels)
    zeta = dict.fromkeys(names, 0.5)
    weights = constraint(model, received, zeta, batch, fed.tiny(mu=0.2, nu=0.0))
    assert weights.keys() == received.keys() and all(torch.all(w == 0.2 * 0.5) for w in weights.values())
    both = constraint(model, received, zeta, batch, fed.tiny(mu=0.2, nu=3.0))
    held = fisher_weights(diagonal_fisher(model, names, [batch], labels="data"), 0.8)
    for name in names:
        torch.testing.assert_close(both[name], 0.1 + 3.0 * held[name])
    assert constraint(model, received, zeta, batch, fed.tiny(mu=0.0, nu=0.0)) == {}
    paper = constraint(model, received, zeta, batch, fed.tiny(paper_mode=True, lam=0.5))
    values = torch.cat([w.flatten() for w in paper.values()]).unique()
    torch.testing.assert_close(values, torch.tensor([0.25, 0.5]))  # lam^2, and twice where it is held


def test_the_constraint_pulls_to_what_was_received_and_one_client_alone_is_fit() -> None:
    images, settings = pictures(32), fed.tiny(epochs=2)
    recipe = recipe_of(settings, client=0, round=1)
    held, free, plain = build_pico(SHAPE), build_pico(SHAPE), build_pico(SHAPE)
    names = list(layer_entries(SHAPE)[0].values())
    received = {name: tensor.clone() for name, tensor in held.state_dict().items() if name in names}
    strong = {name: torch.full_like(tensor, 1e3) for name, tensor in received.items()}
    train(held, images, recipe, IMAGENET, received, strong)
    train(free, images, recipe, IMAGENET, received, {})
    moved = [sum(float((model.state_dict()[n] - received[n]).square().sum()) for n in names) for model in (held, free)]
    assert moved[0] < 0.2 * moved[1]
    batches, steps = image_batches(images, recipe, IMAGENET)
    for _ in fit(plain, batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps, device="cpu"):
        pass
    assert all(torch.equal(a, free.state_dict()[name]) for name, a in plain.state_dict().items())


@pytest.mark.parametrize("shape", [SHAPE, variant("odd", depth=3)])
def test_sensitivities_sum_to_one_and_are_the_mean_of_g_theta(shape: ViTShape) -> None:
    model, images = build_pico(shape), pictures(6)
    x, y = normalise(images.pixels, IMAGENET), images.labels
    xi = sensitivities(model, layer_entries(shape), x, y)
    assert float(xi.sum()) == pytest.approx(1.0, abs=1e-12) and bool((xi > 0).all()) and len(xi) == shape.depth
    loss = nn.functional.cross_entropy(model(x), y)
    raw = []
    for layer in layer_entries(shape):
        own = [dict(model.named_parameters())[name] for name in layer.values()]
        products = [
            (g * p).abs().flatten() for g, p in zip(torch.autograd.grad(loss, own, retain_graph=True), own, strict=True)
        ]
        raw.append(float(torch.cat([p.detach() for p in products]).double().mean()))
    assert xi.tolist() == pytest.approx([value / sum(raw) for value in raw], rel=1e-4)
    assert condensed(xi.tolist(), 1, "sensitive") == (int(xi.argmax()),)
    assert condensed(xi.tolist(), 1, "stable") == (int(xi.argmin()),)


def test_principal_angles_are_those_of_known_planes_whatever_the_signs() -> None:
    e = torch.eye(5)
    tilted = torch.stack([math.cos(0.3) * e[0] + math.sin(0.3) * e[2], e[1]], 1)
    plane = e[:2].T
    torch.testing.assert_close(
        subspace.principal_angles(plane, tilted),
        torch.tensor([0.0, math.degrees(0.3)], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
    turned = plane @ torch.tensor([[0.6, -0.8], [-0.8, -0.6]])  # another basis of the same plane
    assert subspace.distance(plane, turned) == pytest.approx(0.0, abs=1e-3)
    assert subspace.distance(plane, e[3:].T) == pytest.approx(90.0)
    assert subspace.distance(plane, tilted, "smallest") == pytest.approx(0.0, abs=1e-3)


def test_clusters_are_found_by_average_linkage() -> None:
    generator = torch.Generator().manual_seed(0)
    planes = [torch.linalg.qr(torch.randn(30, 3, generator=generator))[0] for _ in range(2)]
    owner = [0, 1, 1, 0, 1]
    bases = [subspace.orthonormal(planes[k] + 0.05 * torch.randn(30, 3, generator=generator)).float() for k in owner]
    apart = subspace.distances(bases)
    assert subspace.agglomerate(apart, clusters=2) == owner == subspace.agglomerate(apart, threshold=40.0)
    assert subspace.agglomerate(apart, clusters=1) == [0] * 5
    assert len(set(subspace.agglomerate(apart, threshold=0.0))) == 5
    groups = {k: [b for b, o in zip(bases, owner, strict=True) if o == k] for k in (0, 1)}
    newcomer = subspace.orthonormal(planes[1] + 0.05 * torch.randn(30, 3, generator=generator)).float()
    assert subspace.nearest(newcomer, groups)[0] == 1
    basis, spread = subspace.mean_subspace(groups[0], 3)
    assert subspace.distance(basis, planes[0]) < 20 and bool((spread <= 1 + 1e-5).all())


def test_what_clusters_tell_of_subspaces_is_no_members_own() -> None:
    e = torch.eye(8)
    one, two = e[:, [0, 1, 2]], e[:, [0, 5]]
    found = subspace.shared_subspace([one, two])
    assert found is not None
    torch.testing.assert_close(found[0].abs(), e[:, :1])  # the direction that both have, and no other
    assert found[1].tolist() == pytest.approx([1.0])
    assert subspace.shared_subspace([one]) is None and subspace.shared_subspace([]) is None
    assert subspace.shared_subspace([e[:, :2], e[:, 4:6]]) is None
    near, half = (torch.stack([math.cos(t) * e[0] + math.sin(t) * e[1]], 1) for t in (0.0, math.pi / 4))
    both = subspace.shared_subspace([near, half])
    assert both is not None and both[1].tolist() == pytest.approx([(1 + math.cos(math.pi / 4)) / 2])
    assert subspace.distance(both[0], near) == pytest.approx(22.5) == subspace.distance(both[0], half)


def test_small_classes_do_not_show_in_a_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 40, generator=generator)
    labels = torch.tensor([0] * 22 + [1] * 3)
    basis = subspace.class_basis(x, labels, vectors=2, min_per_class=20)
    assert basis.shape == (40, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    assert subspace.class_basis(x, torch.arange(25), vectors=2, min_per_class=20).shape == (40, 2)  # all as one class
    with pytest.raises(DataError, match="min_per_class"):
        subspace.class_basis(x[:10], labels[:10], vectors=2, min_per_class=20)
    noisy = subspace.noisy(basis, 0.5, generator)
    assert 1 < subspace.distance(basis, noisy) < 60


def test_partitions_are_disjoint_whole_and_of_their_kind() -> None:
    labels = torch.arange(400) % 10
    for kind, more in (("dirichlet", {"alpha": 0.3}), ("labels", {"labels_per_client": 2}), ("domain", {})):
        domains = [("photo", "sketch", "art")[i % 3] for i in range(400)]
        shares = partition(kind, labels, 10, seed=1, domains=domains, **more)  # type: ignore[arg-type]
        assert sorted(torch.cat(shares).tolist()) == list(range(400)), kind
        assert [s.tolist() for s in shares] == [
            s.tolist()
            for s in partition(kind, labels, 10, seed=1, domains=domains, **more)  # type: ignore[arg-type]
        ]
        if kind == "labels":
            assert all(len(labels[share].unique()) == 2 for share in shares)
        if kind == "domain":
            assert all(len({domains[i] for i in share.tolist()}) == 1 for share in shares)
    even = partition("dirichlet", labels, 4, seed=0, alpha=1e4)
    assert max(map(len, even)) - min(map(len, even)) < 15
    with pytest.raises(DataError, match="3 clients or more"):
        partition("domain", labels, 2, seed=0, domains=domains)
    with pytest.raises(DataError, match="10 labels"):
        partition("labels", labels, 2, seed=0, labels_per_client=11)
    with pytest.raises(DataError, match="leave one with 1; it needs 2: fewer clients, or more images"):
        partition("labels", labels[:12], 6, seed=0, labels_per_client=1)
    with pytest.raises(DataError, match="2 clients or fewer would work"):
        partition("dirichlet", labels[:20], 9, seed=0)

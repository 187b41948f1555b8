"""Auto-Learngene's bilevel loop: derivatives of phi by differences and by a reverse pass, steps by torch's own SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from taught import TINY, noise, pictures
from torch import Tensor, nn
from torch.func import functional_call

from learngene_hub._conv import ConvShape
from learngene_hub.methods import Auto
from learngene_hub.methods import _auto_search as searching
from learngene_hub.methods._auto_features import ResNetFeatures, VGGFeatures, ViTFeatures, block_groups
from learngene_hub.methods._auto_loop import Bilevel, Inner, Searched, hypergradient, sgd
from learngene_hub.methods._auto_matching import MetaNetwork, Pseudo, distance, match_term, pool
from learngene_hub.shape import IMAGENET
from learngene_hub.training import Recipe, fit

INNER = Inner(lr=0.3, momentum=0.9, weight_decay=0.05, steps=2, match=0.7, order=2)


class Toy(nn.Module):
    """Two layers: images (B, 2, 4, 4) -> (logits (B, 3), maps of 2 channels after each layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        one = torch.tanh(self.first(x))
        two = torch.tanh(self.second(one))
        return self.head(two.mean((2, 3))), [one, two]


class Setting:
    """A pseudo descendant, phi, and everything that an update needs, in float64."""

    def __init__(self, body: nn.Module, ancestor: list[Tensor], own: list[int], x: Tensor, meta: Tensor) -> None:
        widths = [f.shape[1 if f.dim() == 4 else 2] for f in ancestor]
        sizes = [pool(f).shape[1] for f in ancestor]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.pseudo, self.phi = Pseudo(body, widths, own).double(), MetaNetwork(sizes, len(own)).double()
        self.ancestor, self.x, self.y, self.meta = ancestor, x, torch.arange(len(x)) % 3, meta
        self.velocity = {n: noise(*p.shape, seed=9).double() * 0.1 for n, p in self.pseudo.named_parameters()}

    def hyper(self, inner: Inner = INNER, rate: float = 0.3) -> tuple[float, list[Tensor]]:
        return hypergradient(
            self.pseudo, self.phi, self.ancestor, self.meta, (self.x, self.y), self.velocity, rate, inner
        )  # fmt: skip


def toy() -> Setting:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = Toy()
    ancestor = [
        noise(5, 3, 4, 4, seed=6).double(),
        noise(5, 2, 2, 2, seed=7).double(),
    ]  # resized to 2 x 2; of that size
    return Setting(body, ancestor, [2, 2], noise(4, 2, 4, 4, seed=2).double(), noise(5, 2, 4, 4, seed=3).double())


def vit() -> Setting:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = ViTFeatures(TINY.build(), [0, 2])
    ancestor = [noise(5, 4, 8, seed=6).double(), noise(5, 4, 6, seed=7).double()]  # of 4 patches; identity and linear
    return Setting(body, ancestor, [8, 8], noise(4, 3, 8, 8, seed=2).double(), noise(5, 3, 8, 8, seed=3).double())


def vgg() -> Setting:
    """With BatchNorm, ReLU and pooling."""
    shape = ConvShape(family="vgg", stages=((3,), (4,)), image_size=8, classes=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = VGGFeatures(shape.build())
    ancestor = [noise(5, 3, 8, 8, seed=6).double(), noise(5, 2, 4, 4, seed=7).double()]
    return Setting(body, ancestor, [3, 4], noise(4, 3, 8, 8, seed=2).double(), noise(5, 3, 8, 8, seed=3).double())


def resnet() -> Setting:
    """With shortcuts, and a map that is resized."""
    shape = ConvShape(family="resnet", stages=((3,), (4,), (4,), (5,)), image_size=16, classes=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = ResNetFeatures(shape.build())
    ancestor = [noise(4, 6, 4, 4, seed=6).double(), noise(4, 7, 2, 2, seed=7).double()]
    x, meta = noise(6, 3, 16, 16, seed=2).double(), noise(4, 3, 16, 16, seed=3).double()
    return Setting(body, ancestor, [3, 4, 4, 5], x, meta)


# The derivatives of phi -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_phi_is_that_of_differences_on_a_two_layer_toy(steps: int) -> None:
    setting, inner = toy(), replace(INNER, steps=steps)
    _, found = setting.hyper(inner)
    assert len(found) == 4 and max(float(g.abs().max()) for g in found) > 1e-4
    for parameter, gradient in zip(setting.phi.parameters(), found, strict=True):
        for index in range(parameter.numel()):
            values = []
            for shift in (1e-5, -2e-5):
                parameter.data.view(-1)[index] += shift
                values.append(setting.hyper(inner)[0])
            parameter.data.view(-1)[index] += 1e-5
            assert float(gradient.view(-1)[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("make", [vit, vgg, resnet])
def test_the_gradient_of_phi_is_that_of_differences_on_whole_networks(make: Callable[[], Setting]) -> None:
    """Along a random direction of every parameter at once."""
    setting = make()
    _, found = setting.hyper()
    directions = [noise(*p.shape, seed=i).double() for i, p in enumerate(setting.phi.parameters())]
    want = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    values = []
    for shift in (1e-6, -2e-6):
        for parameter, direction in zip(setting.phi.parameters(), directions, strict=True):
            parameter.data += shift * direction
        values.append(setting.hyper()[0])
    assert want == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4) and abs(want) > 1e-5


def reverse(setting: Setting, inner: Inner, rate: float, *, curved: bool) -> list[Tensor]:
    """The adjoints of each step by hand, last to first; without ``curved`` a gradient does not depend on w.

    X = <g, a_v - lr a_w>; a_w <- (1 - lr wd) a_w + wd a_v + dX/dw; a_v <- mu a_v - lr mu a_w; phi gets dX/dphi.
    """
    pseudo, lambdas = setting.pseudo, setting.phi([pool(f) for f in setting.ancestor])

    def copies() -> dict[str, Tensor]:
        return {n: b.clone() for n, b in pseudo.named_buffers()}

    def match(w: dict[str, Tensor], lam: Tensor) -> Tensor:
        return match_term(lam, setting.ancestor, functional_call(pseudo, w | copies(), (setting.meta,))[1])

    def labels(w: dict[str, Tensor], lam: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(pseudo, w | copies(), (setting.x,))[0], setting.y)

    objectives: list[Callable[..., Tensor]] = [match] * inner.steps + [labels]
    w = {n: p.detach().clone() for n, p in pseudo.named_parameters()}
    v, states = setting.velocity, []
    for objective in objectives:
        states.append(w)
        g = torch.func.grad(objective)(w, lambdas.detach())
        v = {n: inner.momentum * v[n] + g[n] + inner.weight_decay * w[n] for n in w}
        w = {n: w[n] - rate * v[n] for n in w}
    a_w = torch.func.grad(labels)(w, lambdas.detach())
    a_v = {n: torch.zeros_like(t) for n, t in w.items()}
    a_lambda = torch.zeros_like(lambdas)
    for objective, at in zip(reversed(objectives), reversed(states), strict=True):
        along = {n: a_v[n] - rate * a_w[n] for n in at}

        def x_of(
            w: dict[str, Tensor], lam: Tensor, objective: Any = objective, along: dict[str, Tensor] = along
        ) -> Tensor:
            g = torch.func.grad(objective)(w, lam)
            return torch.stack([(g[n] * along[n]).sum() for n in g]).sum()

        dw, dlambda = torch.func.grad(x_of, argnums=(0, 1))(at, lambdas.detach())
        a_lambda = a_lambda + dlambda
        a_v, a_w = (
            {n: inner.momentum * along[n] for n in at},
            {n: a_w[n] + inner.weight_decay * along[n] + (dw[n] if curved else 0.0) for n in at},
        )
    return list(torch.autograd.grad(lambdas, list(setting.phi.parameters()), a_lambda))


@pytest.mark.parametrize("make", [toy, vit, vgg, resnet])
@pytest.mark.parametrize("order", [2, 1])
def test_both_orders_are_the_reverse_pass_by_hand(make: Callable[[], Setting], order: int) -> None:
    """Order 1 leaves the second derivative by w out, and nothing else; so the two differ."""
    setting, inner = make(), replace(INNER, order=order, steps=3)
    _, found = setting.hyper(inner)
    for got, want in zip(found, reverse(setting, inner, 0.3, curved=order == 2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    other = reverse(setting, inner, 0.3, curved=order == 1)
    assert max(float((a - b).abs().max()) for a, b in zip(found, other, strict=True)) > 1e-6


@pytest.mark.parametrize("order", [2, 1])
def test_steps_ii_to_iv_leave_the_pseudo_descendant_alone(order: int) -> None:
    """Weights, velocity and running statistics; they end elsewhere only on tensors beside it."""
    setting = toy()
    setting.pseudo.body = nn.Sequential()
    body = Toy().double()
    normed = nn.BatchNorm2d(2).double()

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = body, normed

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self.body(self.norm(x))

    setting.pseudo.body = Normed()
    setting.velocity = {n: torch.ones_like(p) for n, p in setting.pseudo.named_parameters()}
    before = {n: t.clone() for n, t in setting.pseudo.state_dict().items()}
    setting.hyper(replace(INNER, order=order))
    assert "body.norm.running_mean" in before
    assert all(torch.equal(t, before[n]) for n, t in setting.pseudo.state_dict().items())
    assert all(bool((t == 1).all()) for t in setting.velocity.values())
    assert all(p.grad is None for p in [*setting.pseudo.parameters(), *setting.phi.parameters()])


def test_a_step_is_torchs_sgd() -> None:
    """Three steps with momentum and decay, at falling rates."""
    weights = {"a": noise(3, 2, seed=1), "b": noise(4, seed=2)}
    parameters = {n: nn.Parameter(t.clone()) for n, t in weights.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0, momentum=0.9, weight_decay=0.1)
    velocity = {n: torch.zeros_like(t) for n, t in weights.items()}
    for step, rate in enumerate((0.3, 0.2, 0.1)):
        gradients = {n: noise(*t.shape, seed=10 + step) for n, t in weights.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        weights, velocity = sgd(weights, velocity, gradients, rate, replace(INNER, weight_decay=0.1))
        for name, parameter in parameters.items():
            torch.testing.assert_close(weights[name], parameter.detach())


# Lambda and the match term --------------------------------------------------------------------------------------------


def test_lambda_by_hand() -> None:
    """Maps (1, 2, 1, 2) of means 2 and -1: 1 + 2 w_1 - w_2, between 0 and 6."""
    feature = torch.tensor([[[[1.0, 3.0]], [[-1.5, -0.5]]]])
    assert pool(feature).tolist() == [[2.0, -1.0]]
    phi = MetaNetwork([2], 3)
    with torch.no_grad():
        phi.pairs[0].weight.copy_(torch.tensor([[0.5, 0.25], [3.0, 1.0], [-1.0, 0.0]]))  # type: ignore[union-attr]
    lambdas = phi([pool(feature)])
    assert lambdas.shape == (1, 1, 3) and lambdas.flatten().tolist() == [1.75, 6.0, 0.0]


def test_a_vit_is_pooled_over_its_channels_so_that_phi_reads_patches() -> None:
    feature = torch.tensor([[[1.0, 3.0], [0.0, 4.0], [5.0, 5.0]]])  # one image, 3 patches of 2 channels
    assert pool(feature).tolist() == [[2.0, 2.0, 5.0]]


def test_distances_by_hand() -> None:
    """Tokens: mean |.|. Maps: mean square, the ancestor's resized: the mean of each 2 x 2 where its side is halved."""
    tokens = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 4.0]], [[3.0, -1.0]]])
    assert distance(*tokens).tolist() == [1.5, 2.0]
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)  # its means of four are 2.5, 4.5, 10.5, 12.5
    coarse = torch.tensor([[[[2.5, 5.5], [10.5, 14.5]]]])
    assert float(distance(fine, coarse)) == pytest.approx((0 + 1 + 0 + 4) / 4)


@pytest.mark.parametrize("make", [toy, vit])
def test_the_match_term_by_a_naive_loop(make: Callable[[], Setting]) -> None:
    setting = make()
    setting.pseudo.requires_grad_(False)
    lambdas = setting.phi([pool(f) for f in setting.ancestor]).detach()
    _, features = setting.pseudo.body(setting.meta)
    total = 0.0
    for b in range(len(setting.meta)):
        for m, f in enumerate(setting.ancestor):
            for n, g in enumerate(features):
                r = setting.pseudo.matchers[m][n]  # type: ignore[index]
                matched, wanted = r(g[b : b + 1]), f[b : b + 1]
                if wanted.dim() == 4 and wanted.shape[-1] == 4:  # toy's first: 4 x 4 to 2 x 2, means of four
                    wanted = nn.functional.avg_pool2d(wanted, 2)
                gap = (wanted - matched).square() if wanted.dim() == 4 else (wanted - matched).abs()
                total += float(lambdas[b, m, n]) * float(gap.mean()) / len(setting.meta)
    _, matched = setting.pseudo(setting.meta)
    assert float(match_term(lambdas, setting.ancestor, matched)) == pytest.approx(total, rel=1e-10)


def test_matchers_of_a_vit_are_the_identity_where_widths_agree_and_of_maps_always_convolutions() -> None:
    rows = vit().pseudo.matchers
    assert [[type(r) for r in row] for row in rows] == [[nn.Identity] * 2, [nn.Linear] * 2]  # type: ignore[union-attr]
    rows = toy().pseudo.matchers
    assert all(type(r) is nn.Conv2d and r.kernel_size == (1, 1) for row in rows for r in row)  # type: ignore[union-attr]


# The loop -------------------------------------------------------------------------------------------------------------


def looped(setting: Setting, count: int, *, decay: float = 0.2, lr: float = 0.05) -> tuple[Searched, Bilevel]:
    """``count`` updates in epochs of 2, on one batch."""
    model = Searched(setting.pseudo, setting.phi)
    loop = Bilevel(setting.ancestor, setting.meta, INNER, lambda k: 0.3 / k, phi_decay=decay, last=count - 1)
    recipe = Recipe(epochs=count // 2, lr=lr, weight_decay=0.0, schedule="constant")
    groups = [{"params": list(model.phi.parameters()), "weight_decay": 0.0}]
    batches = partial(_batches, setting)
    for step in fit(
        model, batches, loop.loss, recipe=recipe, steps_per_epoch=2, groups=groups, extra=loop, device="cpu"
    ):
        loop.after(step)
    return model, loop


def _batches(setting: Setting, epoch: int) -> list[tuple[Tensor, Tensor]]:
    return [(setting.x, setting.y)] * 2


def test_only_step_i_moves_the_pseudo_descendant_and_adam_with_decay_moves_phi() -> None:
    """The whole loop again, with torch's SGD for step (i) and torch's Adam for step (v)."""
    setting, other = toy(), toy()
    model, loop = looped(setting, 4)
    pseudo, phi = other.pseudo, other.phi
    adam = torch.optim.Adam(phi.parameters(), lr=0.05, weight_decay=0.2)
    sgd_i = torch.optim.SGD(pseudo.parameters(), lr=1.0, momentum=0.9, weight_decay=0.05)
    losses, seen = [], []
    for step in range(4):
        rate = 0.3 / (step + 1)
        lambdas = phi([pool(f) for f in other.ancestor]).detach()
        sgd_i.param_groups[0]["lr"] = rate
        sgd_i.zero_grad()
        label = nn.functional.cross_entropy(pseudo(other.x)[0], other.y)
        (label + 0.7 * match_term(lambdas, other.ancestor, pseudo(other.meta)[1])).backward()
        sgd_i.step()
        other.velocity = {
            n: sgd_i.state[p]["momentum_buffer"].clone() for n, p in pseudo.named_parameters()
        }  # fmt: skip
        loss, found = other.hyper(rate=rate)
        for parameter, gradient in zip(phi.parameters(), found, strict=True):
            parameter.grad = gradient
        adam.step()
        losses.append(loss)
        seen.append(lambdas.mean(0))
    for name, tensor in pseudo.state_dict().items():
        torch.testing.assert_close(model.pseudo.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)
    for name, tensor in phi.state_dict().items():
        torch.testing.assert_close(model.phi.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)
    assert not torch.equal(phi.pairs[0].bias, torch.ones(2).double())  # type: ignore[union-attr]
    torch.testing.assert_close(loop.similarity(), torch.stack(seen[2:]).mean(0))  # of the last epoch
    assert [entry["loss"] for entry in loop.log] == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], abs=1e-5
    )


def test_silence_is_the_share_of_lambdas_at_zero() -> None:
    setting = toy()
    with torch.no_grad():
        for linear in setting.phi.pairs:
            linear.weight.zero_()  # type: ignore[union-attr]
        setting.phi.pairs[0].bias[1] = -50.0  # type: ignore[union-attr]
    _, loop = looped(setting, 2, lr=1e-6)
    assert loop.silence().tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert float(loop.similarity()[0, 1]) == 0.0
    torch.testing.assert_close(loop.similarity()[1], torch.ones(2).double(), atol=1e-4, rtol=0)


def test_pitfall_relu6_dies_unless_the_bias_starts_at_one() -> None:
    """Before anything is learned, features without a sign give lambdas around 1, and every pair has a gradient."""
    setting = toy()
    setting.ancestor = [0.01 * f for f in setting.ancestor]
    lambdas = setting.phi([pool(f) for f in setting.ancestor]).detach()
    assert float((lambdas - 1).abs().max()) < 0.05
    _, found = setting.hyper()
    assert all(bool((gradient != 0).all()) for gradient in found)
    with torch.no_grad():
        for linear in setting.phi.pairs:
            linear.bias.fill_(-1.0)  # type: ignore[union-attr]
    assert all(bool((gradient == 0).all()) for gradient in setting.hyper()[1])


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "size", "want"),
    [(12, 2, 6), (3, 2, 2), (4, 4, 1), (1, 2, 1), (5, 1, 5)],
)
def test_groups_are_successive_and_hold_every_block_once(depth: int, size: int, want: int) -> None:
    groups = block_groups(depth, size)
    assert len(groups) == want and [i for group in groups for i in group] == list(range(depth))
    assert all(len(group) == size for group in groups[:-1])


@pytest.mark.parametrize("pooled", [False, True])
def test_a_vits_features_are_the_patches_that_hooks_see_and_its_logits_are_its_own(pooled: bool) -> None:
    shape = replace(TINY, class_token=False, pool="avg") if pooled else TINY
    model, seen = shape.build().eval(), {}
    x = noise(2, 3, 8, 8)
    want = model(x)
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, place=place: seen.__setitem__(place, out))  # type: ignore[union-attr]
    logits, features = ViTFeatures(model, [1, 2])(x)
    torch.testing.assert_close(logits, want)
    first = 0 if pooled else 1
    assert len(features) == 2 and features[0].shape == (2, 4, 8)
    assert all(torch.equal(f, seen[place][:, first:]) for f, place in zip(features, (1, 2), strict=True))


def test_a_vggs_features_stand_before_each_pooling_and_a_resnets_after_each_stage() -> None:
    x = noise(2, 3, 32, 32)
    vgg = ConvShape(family="vgg", stages=((4,), (6, 6)), head_hidden=5, head_kernel=2, image_size=32, classes=3)
    resnet = ConvShape(family="resnet", stages=((4,), (6, 6), (8,), (8,)), image_size=32, classes=3)
    layers = [f"layer{stage}" for stage in (1, 2, 3, 4)]
    for shape, kind, modules in ((vgg, VGGFeatures, ["features.2", "features.9"]), (resnet, ResNetFeatures, layers)):
        model, seen = shape.build().eval(), {}
        with torch.no_grad():
            want = model(x)
            for place in modules:
                model.get_submodule(place).register_forward_hook(
                    lambda module, args, out, place=place, seen=seen: seen.__setitem__(place, out.clone())
                )
            logits, features = kind(model)(x)
        torch.testing.assert_close(logits, want)
        assert len(features) == len(modules)
        assert all(torch.equal(f, seen[place]) for f, place in zip(features, modules, strict=True)), kind


def test_pitfall_the_fixed_batch_is_arbitrary_so_it_is_the_seeds() -> None:
    images = pictures(count=16)
    first, again, other = (searching.fixed_batch(Auto(meta_batch=4, seed=seed), images, IMAGENET) for seed in (0, 0, 1))
    assert first.shape == (4, 3, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)
    assert len(searching.fixed_batch(Auto(batch_size=8), images, IMAGENET)) == 8
    assert len(searching.fixed_batch(Auto(meta_batch=99), images, IMAGENET)) == 16

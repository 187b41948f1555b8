"""The network of all routes at once, and where its linear layers start: from least squares, or from learned maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.methods._stitching import Pair, Route, layers_of, uses_of
from learngene_hub.shape import ViTShape
from learngene_hub.transforms import resample_positions

INITS = ("least-squares", "transpose", "random")
CHUNK = 32  # images whose features are held at a time


class StitchNet(nn.Module):
    """Instances (plain timm ViTs, one number of tokens) and the linear layers between them.

    ``forward(x, number)`` runs route ``number``: images (B, C, S, S) -> logits (B, classes). Layers between instances
    of one width are identities. They start as torch starts a Linear, drawn with ``seed``.
    """

    def __init__(self, instances: Mapping[int, nn.Module], routes: Sequence[Route], *, seed: int = 0) -> None:
        super().__init__()
        self.routes = {route.id: route for route in routes}
        self.instances = nn.ModuleDict({str(number): vit for number, vit in instances.items()})
        self.stitches = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for (front, end), count in layers_of(routes).items():
                before, after = (instances[number].embed_dim for number in (front, end))
                layers = [
                    nn.Identity() if before == after else nn.Linear(before, after)  # type: ignore[arg-type]
                    for _ in range(count)
                ]
                self.stitches[f"{front}-{end}"] = nn.ModuleList(layers)

    def instance(self, number: int) -> Any:
        """One of the ViTs."""
        return self.instances[str(number)]

    def stitch(self, pair: Pair, layer: int) -> Any:
        """One of the linear layers from ``pair[0]`` to ``pair[1]``."""
        layers: Any = self.stitches[f"{pair[0]}-{pair[1]}"]
        return layers[layer]

    def forward(self, x: Tensor, number: int) -> Tensor:
        route = self.routes[number]
        last = self.instance(route.legs[-1].instance)
        x = embed(self.instance(route.legs[0].instance), x)
        for place, leg in enumerate(route.legs):
            if place:
                switch = route.switches[place - 1]
                x = self.stitch(switch.pair, switch.layer)(x)
            for block in self.instance(leg.instance).blocks[leg.first : leg.last + 1]:
                x = block(x)
        return last.forward_head(last.norm(x))

    def train_stitches_alone(self) -> None:
        """From now on only the linear layers and the class tokens learn."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("stitches.") or name.endswith("cls_token"))


def embed(vit: Any, x: Tensor) -> Tensor:
    """The tokens (B, N, D) that enter the first block."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))


def features(vit: Any, x: Tensor) -> list[Tensor]:
    """Tokens (B, N, D) before the first block, and after each."""
    found = [embed(vit, x)]
    for block in vit.blocks:
        found.append(block(found[-1]))
    return found


class NormalEquations:
    """The sums that the least-squares map from X (n, D) to Y (n, D') needs, over any number of rows, in float64."""

    def __init__(self) -> None:
        self.left: Tensor | float = 0.0  # [X 1]^T [X 1]
        self.right: Tensor | float = 0.0  # [X 1]^T Y

    def add(self, x: Tensor, y: Tensor) -> None:
        ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
        self.left = self.left + ones.T @ ones
        self.right = self.right + ones.T @ y.double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """(W (D', D), b (D',)) of the map x -> W x + b with the least squared error, the smallest of several."""
        assert isinstance(self.left, Tensor) and isinstance(self.right, Tensor)
        solution = torch.linalg.pinv(self.left, hermitian=True) @ self.right
        return solution[:-1].T, solution[-1]


@torch.no_grad()
def least_squares(net: StitchNet, x: Tensor) -> None:
    """Sets each linear layer to the map that fits the end instance's features best, over the tokens of images ``x``
    (B, C, S, S), as they come: normalised, not augmented.

    For (j, k): from the tokens after block j of the front to those before block k of the end (the embedding, where k is
    0). A layer that several (j, k) share gets the mean of their maps. Features are taken in eval mode, and the net is
    put back afterwards. (Our reading: the released code takes them in training mode, of mixed images, in float32; here
    the normal equations are summed in float64.)

    Source: Pan, Cai, Zhuang, arXiv:2302.06586, section 3.2.
    """
    training, place = net.training, next(net.parameters()).device
    uses = uses_of(list(net.routes.values()))
    sums = {(*key, j, k): NormalEquations() for key, pairs in uses.items() for j, k in pairs}
    net.to(place).eval()  # instances may come from different places
    try:
        for part in x.split(CHUNK):
            found = {
                int(n): [t.flatten(0, 1) for t in features(vit, part.to(place))] for n, vit in net.instances.items()
            }
            for ((front, end), _, j, k), equations in sums.items():
                equations.add(found[front][j + 1], found[end][k])
    finally:
        net.train(training)
    for (pair, layer), pairs in uses.items():
        stitch = net.stitch(pair, layer)
        if isinstance(stitch, nn.Identity):
            continue
        maps = [sums[pair, layer, j, k].solve() for j, k in pairs]
        stitch.weight.copy_(torch.stack([w for w, _ in maps]).mean(0))
        stitch.bias.copy_(torch.stack([b for _, b in maps]).mean(0))


@torch.no_grad()
def transpose(net: StitchNet, maps: Mapping[int, Sequence[Tensor]]) -> None:
    """Sets each linear layer to what the learned maps say; the bias stays where it is.

    ``maps`` holds, for each instance, the matrices (D, D_A) that took the ancestor's tokens to its own while it was
    distilled. A layer from the front instance to one as wide as the ancestor is the transpose of the mean of the
    front's: a transpose, not an inverse. To any other it goes on through the mean of the end's: (D', D_A) (D_A, D).

    Source: Learngene Pool (AAAI 2024), arXiv:2312.05743; the composition is our reading.
    """
    means = {number: torch.stack([m.detach().float().cpu() for m in each]).mean(0) for number, each in maps.items()}
    for name, layers in net.stitches.items():
        front, end = map(int, name.split("-"))
        weight = means[front].T
        if net.instance(end).embed_dim != weight.shape[0]:
            weight = means[end] @ weight
        for layer in layers:  # type: ignore[union-attr]
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(weight)


def resized(vit: nn.Module, side: int, *, drop_path: float = 0.0) -> Any:
    """A copy of a plain timm ViT on the CPU, in float32, for images of ``side`` pixels.

    Raises:
        ShapeError: it is no plain ViT, or its patches do not tile such images.
    """
    own = ViTShape.of(vit)
    shape = replace(own, image_size=side)
    state = {name: tensor.detach().cpu().float().clone() for name, tensor in vit.state_dict().items()}
    state["pos_embed"] = resample_positions(state["pos_embed"], side // shape.patch, int(shape.class_token))
    copied = shape.build(drop_path_rate=drop_path)
    copied.load_state_dict(state)
    return copied.eval()


def fresh(shape: ViTShape, seed: int, *, drop_path: float = 0.0) -> Any:
    """A ViT as timm starts one, drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build(drop_path_rate=drop_path)

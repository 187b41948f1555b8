"""Auto-Learngene's match term: how much each group of the pseudo descendant should resemble each of the ancestor's.

For the group m of the ancestor (feature f_m), the group n of the pseudo descendant (g_n) and an image x

    M(x) = sum_mn lambda_mn(x) d(f_m, r_mn(g_n)),    lambda_mn(x) = min(max(w_mn . p(f_m) + b_mn, 0), 6),

with d the mean square over a map of a CNN, the mean absolute difference over the tokens of a ViT. A matcher r_mn is a
1 x 1 convolution of a CNN; of a ViT it is the identity where the widths are equal and a linear map where they are not
(our reading). A map of the ancestor is resized, bilinear, to the size of the pseudo descendant's. p is the mean over
the pixels of a map, (C,); over the channels of a ViT's tokens, (N,), so that w_mn has one number per patch. The w and b
are the meta-network phi. Every b_mn starts at 1: where an output is 0 the gradient is 0 as well, and a pair that starts
there would never be heard of again.

Source: arXiv:2305.02279, as its authors' code has it, which is that of Jang et al., "Learning What and Where to
Transfer", ICML 2019, arXiv:1905.05901.

Legend: B images, M and N groups, P patches, D and C channels, H x W pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from learngene_hub.methods._auto_features import ViTFeatures

Features = Sequence[Tensor]  # (B, P, D) each of a ViT, (B, C, H, W) of a CNN


class MetaNetwork(nn.Module):
    """phi: the pooled features of M groups, (B, size) each -> lambda (B, M, N), in [0, 6]."""

    def __init__(self, sizes: Sequence[int], targets: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Linear(size, targets) for size in sizes)
        for linear in self.pairs:
            nn.init.ones_(linear.bias)  # type: ignore[arg-type]

    def forward(self, pooled: Features) -> Tensor:
        said = [linear(each) for linear, each in zip(self.pairs, pooled, strict=True)]
        return nn.functional.relu6(torch.stack(said, 1))


def pool(feature: Tensor) -> Tensor:
    """What phi sees of a feature: (B, C) of (B, C, H, W), (B, P) of (B, P, D)."""
    return feature.mean((2, 3)) if feature.dim() == 4 else feature.mean(2)


def channels(feature: Tensor) -> int:
    """The width of a feature."""
    return feature.shape[1] if feature.dim() == 4 else feature.shape[2]


class Pseudo(nn.Module):
    """The pseudo descendant and its matchers.

    Images -> (logits, r_mn(g_n) for each n of each m).

    Args:
        body: gives logits and N features.
        wanted: the width of each of the ancestor's M features.
        own: the width of each of the N features.
    """

    def __init__(self, body: nn.Module, wanted: Sequence[int], own: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        make = _token_matcher if isinstance(body, ViTFeatures) else _map_matcher
        self.matchers = nn.ModuleList(nn.ModuleList(make(n, m) for n in own) for m in wanted)

    def forward(self, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        logits, features = self.body(x)
        matched = [[r(g) for r, g in zip(row, features, strict=True)] for row in self.matchers]  # type: ignore[arg-type]
        return logits, matched


def _token_matcher(own: int, wanted: int) -> nn.Module:
    return nn.Identity() if own == wanted else nn.Linear(own, wanted)


def _map_matcher(own: int, wanted: int) -> nn.Module:
    return nn.Conv2d(own, wanted, 1)


def distance(ancestor: Tensor, pseudo: Tensor) -> Tensor:
    """d(f, r(g)) of each image, (B,): two features of one width."""
    if ancestor.dim() == 3:
        return (ancestor - pseudo).abs().mean((1, 2))
    if ancestor.shape[2:] != pseudo.shape[2:]:
        ancestor = nn.functional.interpolate(ancestor, pseudo.shape[2:], mode="bilinear", align_corners=False)
    return (ancestor - pseudo).square().mean((1, 2, 3))


def match_term(lambdas: Tensor, ancestor: Features, matched: Sequence[Features]) -> Tensor:
    """The mean over the images of sum_mn lambda_mn d(f_m, r_mn(g_n)); ``lambdas`` (B, M, N)."""
    rows = [torch.stack([distance(f, g) for g in row], 1) for f, row in zip(ancestor, matched, strict=True)]
    return (lambdas * torch.stack(rows, 1)).mean(0).sum()

"""LSAMD's searchable super ancestor and the path search in it; the method itself is in ``lsamd.py``.

For data set t and position l there are two candidates: the base block B_l, which all data sets share, followed by the
data set's own adapter DAD_tl(z) = z + U GELU(V LN(z)); and a specific block S_tl. At the start S_tl is a copy of B_l
and U is zero, so every path of every data set computes the ancestor. Path logits alpha (T, L, K) are searched by Gumbel
straight-through: g = onehot(argmax(alpha + G)), with the gradient of softmax((alpha + G) / tau), and
z_(l+1) = z_l + g_k (O_lk(z_l) - z_l).

Source: Shi et al., arXiv:2605.08209, of which only the abstract could be read: everything below the level of "dataset
specific blocks, dataset adapters, one path per data set, most frequent base blocks" is our reading.

Legend: B images, N tokens, D width, T data sets, L positions, K candidates (base, specific and, if allowed, skip).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.errors import SettingsError
from learngene_hub.transforms import resample_positions

BASE, SPECIFIC, SKIP = 0, 1, 2
ADAPTERS = ("bottleneck", "linear")


class BottleneckAdapter(nn.Module):
    """A data set's adapter, z + U GELU(V LN(z)): (B, N, D) -> (B, N, D), the identity at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, z_BND: Tensor) -> Tensor:
        return z_BND + self.up(nn.functional.gelu(self.down(self.norm(z_BND))))


def make_adapter(kind: str, width: int, rank: int) -> nn.Module:
    """An adapter of ``kind``, one of ADAPTERS; ``linear`` is a D x D map that starts as the identity.

    Raises:
        SettingsError: an unknown kind.
    """
    if kind == "bottleneck":
        return BottleneckAdapter(width, rank)
    if kind == "linear":
        adapter = nn.Linear(width, width)
        nn.init.eye_(adapter.weight)
        nn.init.zeros_(adapter.bias)
        return adapter
    raise SettingsError(f"unknown adapter {kind!r}; known adapters: {', '.join(ADAPTERS)}")


class SuperAncestor(nn.Module):
    """The ancestor widened into base blocks, specific blocks, adapters and heads for T data sets.

    Args:
        ancestor: a timm ViT; copied.
        classes: the number of classes of each of the T data sets.
        candidates: 2, or 3 with the candidate "skip".
    """

    base: Any  # timm's VisionTransformer
    specific: Any  # T x L blocks
    adapters: Any  # T x L
    heads: Any  # T

    def __init__(
        self, ancestor: nn.Module, classes: Sequence[int], *, adapter: str, rank: int, candidates: int = 2
    ) -> None:
        super().__init__()
        self.base = copy.deepcopy(ancestor)
        blocks, width = self.base.blocks, self.base.embed_dim
        self.specific = nn.ModuleList(copy.deepcopy(blocks) for _ in classes)
        self.adapters = nn.ModuleList(
            nn.ModuleList(make_adapter(adapter, width, rank) for _ in blocks) for _ in classes
        )
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.alpha = nn.Parameter(torch.zeros(len(classes), len(blocks), candidates))

    def stem(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S) of any size divisible by the patch -> tokens (B, N, D)."""
        base, prefix = self.base, self.base.num_prefix_tokens
        kernel = base.patch_embed.proj
        patches = kernel(x).flatten(2).transpose(1, 2)
        positions = resample_positions(base.pos_embed, x.shape[-1] // kernel.kernel_size[0], prefix)
        if base.cls_token is not None:
            patches = torch.cat([base.cls_token.expand(len(x), -1, -1), patches], dim=1)
        return patches + positions

    def candidate(self, z: Tensor, task: int, position: int, branch: int) -> Tensor:
        """O_(l,k)(z) of one data set: (B, N, D) -> (B, N, D)."""
        if branch == BASE:
            return self.adapters[task][position](self.base.blocks[position](z))
        return self.specific[task][position](z) if branch == SPECIFIC else z

    def features(self, x: Tensor, task: int, path: Sequence[int]) -> Tensor:
        """Pooled features (B, D) along a fixed path (L branches); exactly L blocks run."""
        z = self.stem(x)
        for position, branch in enumerate(path):
            z = self.candidate(z, task, position, branch)
        return self.tail(z)

    def sampled(self, x: Tensor, task: int, gates_LK: Tensor) -> Tensor:
        """Pooled features along the sampled path, each update gated: alpha gets a gradient, exactly L blocks run."""
        z = self.stem(x)
        for position, gate_K in enumerate(gates_LK):
            branch = int(gate_K.argmax())
            z = z + gate_K[branch] * (self.candidate(z, task, position, branch) - z)
        return self.tail(z)

    def mixed(self, x: Tensor, task: int, gates_LK: Tensor) -> Tensor:
        """As ``sampled``, but with every candidate evaluated, so that each logit gets a loss signal of its own."""
        z = self.stem(x)
        for position, gate_K in enumerate(gates_LK):
            updates = [self.candidate(z, task, position, k) - z for k in range(len(gate_K))]
            z = z + sum(gate * update for gate, update in zip(gate_K, updates, strict=True))
        return self.tail(z)

    def ancestral(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Pooled features of the base blocks at ``positions`` alone: no adapter, no specific block."""
        z = self.stem(x)
        for position in positions:
            z = self.base.blocks[position](z)
        return self.tail(z)

    def tail(self, z: Tensor) -> Tensor:
        """Tokens (B, N, D) -> pooled, normalised features (B, D)."""
        return self.base.forward_head(self.base.norm(z), pre_logits=True)


def gumbel_gates(alpha_LK: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """Straight-through one-hot gates (L, K) of one sampled path; the gradient is that of the softmax at ``tau``."""
    uniform = torch.rand(alpha_LK.shape, generator=generator).clamp_min(1e-20).to(alpha_LK.device)
    noisy = alpha_LK - torch.log(-torch.log(uniform))
    soft = (noisy / tau).softmax(-1)
    hard = nn.functional.one_hot(noisy.argmax(-1), alpha_LK.shape[-1]).to(soft)
    return hard + (soft - soft.detach())


def uniform_path(positions: int, candidates: int, generator: torch.Generator) -> list[int]:
    """A path with every candidate equally likely at every position (the warm-up)."""
    return torch.randint(candidates, (positions,), generator=generator).tolist()


def rank_positions(frequency: Sequence[float], probability: Sequence[float]) -> tuple[int, ...]:
    """All positions, best first: by how many data sets chose the base block, ties by coverage.

    Inside a tie the position farthest from all that stand before it comes next (the first position starts, then the
    last), then the one with the higher mean base probability, then the lower index.
    """
    last = len(frequency) - 1
    taken: list[int] = []
    for value in sorted(set(frequency), reverse=True):
        tied = [i for i, f in enumerate(frequency) if f == value]
        while tied:
            best = min(tied, key=lambda i: (-_distance(i, taken, last), -probability[i], i))
            taken.append(best)
            tied.remove(best)
    return tuple(taken)


def _distance(position: int, taken: Sequence[int], last: int) -> int:
    """The distance to the nearest taken position; with none taken, the first position comes first, then the last."""
    if taken:
        return min(abs(position - t) for t in taken)
    return 2 if position == 0 else int(position == last)


def evolve_path(
    score: Callable[[list[int]], float],
    length: int,
    *,
    generator: torch.Generator,
    population: int = 50,
    generations: int = 20,
    exhaustive: int = 128,
) -> tuple[list[int], list[float]]:
    """The best path in {0, 1}^length under ``score`` (path -> float), and the share of base per position among the
    best.

    All paths are tried when there are at most ``exhaustive`` (the best tenth counts); otherwise evolution: the better
    half stays, children take each gene of the first parent with probability 1 - 0.25 (crossover) and flip with
    probability 0.1.
    """
    if 2**length <= exhaustive:
        paths = [[(code >> i) & 1 for i in range(length)] for code in range(2**length)]
        generations = 0
    else:
        paths = torch.randint(2, (population, length), generator=generator).tolist()
    known = {tuple(path): float(score(path)) for path in paths}
    for _ in range(generations):
        parents = sorted(known, key=lambda p: (-known[p], p))[: population // 2]
        for _ in range(population - len(parents)):
            child = _child(parents, generator)
            if child not in known:
                known[child] = float(score(list(child)))
    order = sorted(known, key=lambda p: (-known[p], p))
    top = order[: max(1, len(order) // 10 if generations == 0 else population // 2)]
    base_share = [sum(path[i] == BASE for path in top) / len(top) for i in range(length)]
    return list(order[0]), base_share


def _child(parents: Sequence[tuple[int, ...]], generator: torch.Generator) -> tuple[int, ...]:
    first, second = (parents[int(torch.randint(len(parents), (1,), generator=generator))] for _ in range(2))
    length = len(first)
    crossed = (torch.rand(length, generator=generator) < 0.25).tolist()
    flipped = (torch.rand(length, generator=generator) < 0.1).tolist()
    return tuple(
        (b if cross else a) ^ int(flip) for a, b, cross, flip in zip(first, second, crossed, flipped, strict=True)
    )

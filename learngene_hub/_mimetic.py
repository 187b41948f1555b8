"""Mimetic initialisation: a random ViT whose attention starts as that of pre-trained ones tends to look. A rival.

With Z of independent N(0, 1 / d) entries and head_dim k, in every block

    each head:   W_q W_k'  is the best rank-k approximation of  0.7 Z + 0.7 I
    all heads:   W_v W_o   is                                   0.4 Z - 0.4 I

(as row vectors are multiplied), both split by a singular value decomposition, half of each singular value to either
side; position embeddings are sinusoidal in two dimensions. All else stays as timm draws it.

Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023, arXiv:2305.09828, section 3.
Our reading: where heads times head_dim is not d, W_v W_o is of that rank; the class token's position is zero; the
position table is scaled to timm's deviation of 0.02 times 10, about that of a trained one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

QUERY_KEY = (0.7, 0.7)  # alpha of Z, beta of I
VALUE_OUT = (0.4, -0.4)
POSITION_DEVIATION = 0.2


@torch.no_grad()
def write_mimetic(model: Any, *, seed: int) -> None:
    """Overwrite attention and positions of a plain timm ViT with mimetic ones, drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        attention = block.attn
        inner, width = attention.num_heads * attention.head_dim, attention.qkv.in_features
        queries, keys = [], []
        for _ in range(attention.num_heads):
            left, right = _split(_near_identity(width, *QUERY_KEY, generator), attention.head_dim)
            queries.append(left)
            keys.append(right)
        values, out = _split(_near_identity(width, *VALUE_OUT, generator), inner)
        rows = torch.cat([*queries, *keys, values])  # (3 inner, width)
        attention.qkv.weight.copy_(rows)
        attention.qkv.bias.zero_()
        attention.proj.weight.copy_(out.T)
        attention.proj.bias.zero_()
    table = model.pos_embed  # (1, tokens, width)
    tokens, width = table.shape[1:]
    side = math.isqrt(tokens)
    positions = sinusoids(side, width)
    table.zero_()
    table[0, tokens - side * side :] = positions * (POSITION_DEVIATION / positions.std())


def _near_identity(width: int, alpha: float, beta: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(width, width, generator=generator) / math.sqrt(width)
    return alpha * noise + beta * torch.eye(width)


def _split(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B), each (rank, d), where A' B is the best approximation of ``product`` of that rank; zeros beyond d."""
    u, s, vh = torch.linalg.svd(product)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = torch.zeros(rank, len(s)), torch.zeros(rank, len(s))
    a[:kept], b[:kept] = (u[:, :kept] * root).T, root[:, None] * vh[:kept]
    return a, b


def sinusoids(side: int, width: int) -> Tensor:
    """(side^2, width): sines and cosines of the row, then of the column, at geometric frequencies down to 1/10000."""
    quarter = width // 4
    frequencies = 1 / 10000 ** (torch.arange(quarter) / max(quarter, 1))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    found = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))

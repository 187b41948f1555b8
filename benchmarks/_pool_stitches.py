"""Where the stitches of a pool lead: what they make of the tokens of one instance, beside what the other one expects.

Of a route that switches after block j of the front to block k of the end: X, the front's tokens after block j, and Y,
the end's own tokens before its block k, of the same images. The stitch gives W X + b.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _pool_arms import Sources
from torch import Tensor

from learngene_hub.data import Images, ordered_batches
from learngene_hub.learngene import Learngene
from learngene_hub.methods._stitch_growth import net_of
from learngene_hub.methods._stitch_net import features

IMAGES = 200  # of the test images


@torch.no_grad()
def look(learngene: Learngene, images: Images) -> dict[str, Any]:
    """Of a pool: the mean norm of the tokens after each block of each instance, the embedding first; and of each route
    that switches ``error`` |W X + b - Y|^2 / |Y - mean Y|^2 (0: exactly what the end expects; 1: no better than its
    mean token), ``cosine``, the mean over the tokens, and ``norm``, the mean norm of W X + b over that of Y."""
    net = net_of(learngene, nearest=learngene.method == "sn-net")
    x, _ = next(ordered_batches(images, len(images), learngene.preprocessing))
    tokens = {int(number): features(vit, x) for number, vit in net.instances.items()}
    routes = {}
    for route in net.routes.values():
        for switch in route.switches:
            front, end = switch.pair
            made = net.stitch(switch.pair, switch.layer)(tokens[front][switch.j + 1])
            routes[str(route)] = compared(made, tokens[end][switch.k])
    norms = {number: [_norm(each) for each in all_tokens] for number, all_tokens in tokens.items()}
    means = {
        key: round(sum(row[key] for row in routes.values()) / len(routes), 3) for key in ("error", "cosine", "norm")
    }
    return {"norms": norms, "mean": means, "routes": routes}


def compared(made: Tensor, wanted: Tensor) -> dict[str, float]:
    """``error``, ``cosine`` and ``norm`` of tokens (B, N, D)."""
    spread = (wanted - wanted.mean((0, 1))).square().sum()
    return {
        "error": round(float((made - wanted).square().sum() / spread), 3),
        "cosine": round(float(torch.nn.functional.cosine_similarity(made, wanted, dim=-1).mean()), 3),
        "norm": round(float(made.norm(dim=-1).mean() / wanted.norm(dim=-1).mean()), 3),
    }


def _norm(tokens: Tensor) -> float:
    return round(float(tokens.norm(dim=-1).mean()), 2)


def write(sources: Sources, out: Path) -> str:
    """Look at every pool of the first seed that is kept; the means, as text."""
    config = sources.read()
    images, found = sources.images("test").subset(range(IMAGES)), {}
    for arm in config["arms"]:
        file = sources.stored(arm, config["seeds"][0])
        if file.exists():
            learngene = Learngene.load(file)
            found[arm] = {"digest": learngene.digest} | look(learngene, images)
    out.write_text(json.dumps(found, indent=1) + "\n")
    return "\n".join(f"{arm}: {told['mean']}" for arm, told in found.items())

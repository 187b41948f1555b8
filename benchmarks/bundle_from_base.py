"""Put learngenes of other methods into the package, whose ancestor is lsamd-base's own descendant of 12x192.

    python benchmarks/bundle_from_base.py --data DIR [--only NAME] [--ancestor deit_tiny_patch16_224.fp16.safetensors]

That descendant is DeiT-Tiny as LSAMD's training left it: what it knows at 64 px DeiT-Tiny itself does not (compare.py).
cluster-base looks at 1,000 images of each data set of lsamd-base's extraction; auto-base keeps whole blocks. Minutes.

Made in the same way and left out, because a few blocks of DeiT-Tiny do better (results/left_out.csv): gene-fl's three
most sensitive blocks (on cifar100: the first three), lets and ldr after 30,000 images; and sws (``--only sws-base``,
half an hour), whose stages begin with the descendant's blocks and learn from 2,000 images of each data set, six times,
what DeiT-Tiny says of them at 160 px.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _arms import machine
from _bundle import ROOT, bundle

from learngene_hub import Learngene, expand, extract, load_images
from learngene_hub._ancestors import load_named
from learngene_hub.teacher import Teacher

SIZE = 64
TEACHER = "deit_tiny_patch16_224"
LESSON = {
    "start": "ancestor", "teacher_size": 160, "epochs": 6, "lr": 5e-4, "warmup": 0.1, "batch_size": 64,
    "crop_padding": 6,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Made:
    """A learngene to make."""

    method: str
    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: int = 0  # images of each data set that it looks at
    taught: bool = False  # by DeiT-Tiny itself; the descendant has no classifier


MADE = {
    "auto-base": Made(
        method="auto",
        settings={"layers": [0, 1, 10, 11]},
        description="First two and last two blocks of lsamd-base's 12x192, to stand below fresh ones (Auto-Learngene).",
    ),
    "cluster-base": Made(
        method="cluster",
        settings={"ffn_groups": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]},
        limit=1000,
        description="lsamd-base's heads by clusters, one FFN for each two layers: any number of heads in each block.",
    ),
}
LEFT_OUT = {
    "sws-base": Made(
        method="sws",
        settings=LESSON | {"stages": [3, 3, 3, 3]},
        limit=2000,
        taught=True,
        description="Four blocks of lsamd-base's 12x192, each trained to serve three blocks in a row (SWS).",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME/train.parquet")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224, which teaches")
    parser.add_argument("--cache", type=Path, help="folder that keeps what it says")
    parser.add_argument("--only", choices=[*MADE, *LEFT_OUT], help="this one alone")
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write NAME.safetensors there and bundle none")
    args = parser.parse_args()
    for name in [args.only] if args.only else MADE:
        asked = (MADE | LEFT_OUT)[name]
        learngene = made(asked, args.data, args.ancestor, args.cache)
        if args.only_write:
            args.only_write.mkdir(parents=True, exist_ok=True)
            learngene.save(args.only_write / f"{name}.safetensors")
        else:
            bundle(learngene, name, asked.description)


def made(asked: Made, data: Path, weights: Path | None, cache: Path | None) -> Learngene:
    """The learngene, in float16, with the command that made it."""
    base = Learngene.from_pretrained("lsamd-base")
    terms = yaml.safe_load((ROOT / "benchmarks" / "lsamd_base.yaml").read_text())["data"] if asked.limit else {}
    images = {name: load_images(data / name, size=SIZE, limit=asked.limit) for name in terms}
    facts = {
        "name": "lsamd-base, 12x192",
        "license": base.license,
        "source": "DeiT-Tiny as lsamd-base grows it at its native shape",
    }
    ancestor = expand(base, image_size=SIZE if images else None).eval()
    learngene = extract(
        asked.method,
        ancestor,
        images,
        settings=asked.settings,
        facts=facts,
        preprocessing=base.preprocessing,
        teacher=teacher(weights, cache) if asked.taught else None,
    )
    command = f"python benchmarks/bundle_from_base.py --data DIR{' --ancestor FILE' if asked.taught else ''}"
    notes = {"command": command, "machine": machine("cpu")}
    notes |= {"terms": terms} if images else {}
    return replace(learngene.to(torch.float16), provenance={**learngene.provenance, **notes})


def teacher(weights: Path | None, cache: Path | None) -> Teacher:
    """DeiT-Tiny with its 1000 classes."""
    if weights is None:
        raise SystemExit("--ancestor is missing: DeiT-Tiny's weights")
    model, preprocessing = load_named(TEACHER, weights)
    return Teacher(model.float().eval(), preprocessing, name=TEACHER, cache=cache)


if __name__ == "__main__":
    main()

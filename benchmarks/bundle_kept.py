"""Put smaller learngenes made of lsamd-base's blocks into the package: what `keep` blocks, evenly spaced, come to.

    python benchmarks/bundle_kept.py [--only-write DIR]

LSAMD trains and searches before it decides how many blocks it keeps, so keeping fewer of lsamd-base's is the very
extraction with ``keep`` set lower (and ``select`` "even", which lsamd-base grows with): nothing is trained again. A
descendant deeper than what is kept repeats blocks; each copy then writes its share of the block's update (``repeat``
"share"), without which 12 blocks of 6 know little: before training, a head of class means of 300 images reads mnist and
gtsrb with 71.5 and 45.5 % instead of 47.5 and 12.0 % (12x192 of six blocks).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from _bundle import bundle

from learngene_hub import Learngene
from learngene_hub.transforms import even_positions

KEPT = {  # name -> blocks, description
    "lsamd-small": (
        6,
        "Six of lsamd-base's twelve blocks, evenly spaced: half its bytes, for any width in steps of 64.",
    ),
    "lsamd-mini": (
        3,
        "Three of lsamd-base's twelve blocks, evenly spaced: a quarter of its bytes, for any width in steps of 64.",
    ),
    "lsamd-tiny": (
        4,
        "Four of lsamd-base's twelve blocks, evenly spaced: a third of its bytes, for any width in steps of 64.",
    ),
}


def kept(learngene: Learngene, count: int) -> Learngene:
    """The learngene with ``count`` evenly spaced blocks alone."""
    positions = set(even_positions(learngene.shape.depth, count))
    tensors = {
        name: tensor
        for name, tensor in learngene.tensors.items()
        if not name.startswith("block.") or int(name.split(".")[1]) in positions
    }
    return dataclasses.replace(
        learngene, tensors=tensors, settings={**learngene.settings, "keep": count, "select": "even", "repeat": "share"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write NAME.safetensors there and bundle none")
    args = parser.parse_args()
    base = Learngene.from_pretrained("lsamd-base")
    for name, (count, description) in KEPT.items():
        learngene = kept(base, count)
        if args.only_write:
            args.only_write.mkdir(parents=True, exist_ok=True)
            learngene.save(args.only_write / f"{name}.safetensors")
        else:
            bundle(learngene, name, description)


if __name__ == "__main__":
    main()

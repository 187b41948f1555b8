"""Put a learngene of parts.py into the package, the file of its first seed: the very one that its runs were grown from.

    python benchmarks/bundle_parts.py [--parts build/parts]

Then ``make numbers`` writes its card, and compare.py says whether it is worth its place: cluster-deit-tiny and the pool
of pool_small.yaml were bundled once, and are not (README.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from _bundle import ROOT, bundle

from learngene_hub.learngene import Learngene

PARTS = {  # name -> arm of parts.yaml, description
    "auto-deit-tiny": (
        "four-ends",
        "DeiT-Tiny's first two and last two blocks, to stand below fresh ones, as Auto-Learngene inherits.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "parts", help="where parts.py keeps them")
    args = parser.parse_args()
    seed = yaml.safe_load((ROOT / "benchmarks" / "parts.yaml").read_text())["seeds"][0]
    for name, (arm, description) in PARTS.items():
        bundle(Learngene.load(args.parts / f"{arm}-{seed}.safetensors"), name, description)


if __name__ == "__main__":
    main()

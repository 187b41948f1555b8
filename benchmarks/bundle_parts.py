"""Put learngenes of parts.py and of pool.py's small pool into the package, the files of their first seed.

    python benchmarks/bundle_parts.py [--parts build/parts] [--pool build/pool_small]

They are the very files that the runs of that seed were grown from. Then ``make numbers`` writes their cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from _bundle import ROOT, bundle

from learngene_hub.learngene import Learngene

PARTS = {  # name -> arm of parts.yaml, description
    "cluster-deit-tiny": (
        "cluster-pairs",
        "DeiT-Tiny's heads by clusters and one FFN for each two layers, for any number of heads in each block.",
    ),
    "auto-deit-tiny": (
        "four-ends",
        "DeiT-Tiny's first two and last two blocks, to stand below fresh ones, as Auto-Learngene inherits.",
    ),
}
POOL = ("pool-deit-tiny", "sn-net-cut", "Two small ViTs cut out of DeiT-Tiny, and stitches between them: {} networks.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "parts", help="where parts.py keeps them")
    parser.add_argument("--pool", type=Path, default=ROOT / "build" / "pool_small", help="where pool.py keeps it")
    args = parser.parse_args()
    seed = yaml.safe_load((ROOT / "benchmarks" / "parts.yaml").read_text())["seeds"][0]
    for name, (arm, description) in PARTS.items():
        bundle(Learngene.load(args.parts / f"{arm}-{seed}.safetensors"), name, description)
    name, arm, description = POOL
    pool = args.pool / f"{arm}-{seed}.safetensors"
    if pool.exists():
        learngene = Learngene.load(pool)
        bundle(learngene, name, description.format(len(learngene.provenance["routes"]["rows"])))


if __name__ == "__main__":
    main()

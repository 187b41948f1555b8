"""Put the learngenes of learned.py's first seed into the package: model_cards/lets-cifar100 and ldr-cifar100.

    python benchmarks/bundle_learned.py [--work build/learned]

They are the very files that the runs of that seed were grown from. Then ``make numbers`` writes their cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from _bundle import ROOT, bundle

from learngene_hub.learngene import Learngene

NAMES = {
    "lets": "DeiT-Tiny finetuned on cifar100, condensed with LeTs: four small blocks, and maps to sizes up to 12x192.",
    "ldr": "DeiT-Tiny finetuned on cifar100, condensed with LDR: four components, mixed by polynomials at any depth.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "learned", help="where learned.py keeps them")
    work = parser.parse_args().work
    config = yaml.safe_load((ROOT / "benchmarks" / "learned.yaml").read_text())
    for arm, description in NAMES.items():
        learngene = Learngene.load(work / f"{arm}-{config['seeds'][0]}.safetensors")
        bundle(learngene, f"{arm}-{config['data']}", description)


if __name__ == "__main__":
    main()

"""Put learngenes of other methods into the package, whose ancestor is lsamd-base's own descendant of 12x192.

    python benchmarks/bundle_from_base.py --data DIR --ancestor deit_tiny_patch16_224.fp16.safetensors [--only NAME]

That descendant is DeiT-Tiny as LSAMD's training left it: what it knows at 64 px DeiT-Tiny itself does not (compare.py).
lets-base and ldr-base learn what DeiT-Tiny says at 160 px of 1,000 images of each data set of lsamd-base's extraction,
six times each; cluster-base looks at the same images; auto-base and gene-base keep whole blocks. Minutes each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _arms import machine, open_ancestor
from _bundle import ROOT, bundle

from learngene_hub import Learngene, Teacher, expand, extract, fit_head, load_images

LIMIT = 1000  # images of each data set
SIZE = 64
ONE = ("cifar100",)
LESSON = {
    "start": "ancestor",
    "batch_size": 64,
    "warmup": 0.1,
    "teacher": "once",
    "teacher_size": 160,
    "crop_padding": 6,
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A learngene to make."""

    method: str
    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: bool = False  # whether it looks at images
    sets: tuple[str, ...] = ()  # only these; all of lsamd-base's extraction where none is named
    taught: bool = False  # by DeiT-Tiny


MADE = {
    "auto-base": Made(
        method="auto",
        settings={"layers": [0, 1, 10, 11]},
        description="First two and last two blocks of lsamd-base's 12x192, to stand below fresh ones (Auto-Learngene).",
    ),
    "gene-base": Made(
        method="gene-fl",
        settings={"images": 512},
        data=True,
        sets=ONE,
        description="The three blocks of lsamd-base's 12x192 that the loss hangs on most (GENE-FL's choice).",
    ),
    "cluster-base": Made(
        method="cluster",
        settings={"ffn_groups": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]},
        data=True,
        description="lsamd-base's heads by clusters, one FFN for each two layers: any number of heads in each block.",
    ),
    "lets-base": Made(
        method="lets",
        settings={**LESSON, "teacher": "once", "color": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0,
                  "drop_path": 0.0, "epochs": 6, "lr": 1e-3, "depth": 12, "width": 192, "head_dim": 64, "patch": 16,
                  "layout": "ancestor", "learngene_depth": 4, "learngene_width": 128, "scheme": "sel_noisy",
                  "depth_scheme": "alternate"},
        data=True,
        taught=True,
        description="lsamd-base's 12x192 condensed with LeTs: four small blocks, and maps to sizes up to 12x192.",
    ),
    "ldr-base": Made(
        method="ldr",
        settings={**LESSON, "phases": [1, 2, 4], "epochs": 2, "order_offset": 0, "labels": 0.0},
        data=True,
        taught=True,
        description="lsamd-base's 12x192 condensed with LDR: four components, mixed by polynomials at any depth.",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME/train.parquet")
    parser.add_argument("--ancestor", type=Path, required=True, help="safetensors file of deit_tiny_patch16_224")
    parser.add_argument("--only", choices=MADE, help="this one alone")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "from_base", help="what the teacher said")
    parser.add_argument("--only-write", type=Path, metavar="DIR", help="write NAME.safetensors there and bundle none")
    args = parser.parse_args()
    for name in [args.only] if args.only else MADE:
        learngene = made(MADE[name], args.data, args.ancestor, args.work)
        if args.only_write:
            args.only_write.mkdir(parents=True, exist_ok=True)
            learngene.save(args.only_write / f"{name}.safetensors")
        else:
            bundle(learngene, name, MADE[name].description)


def made(asked: Made, data: Path, ancestor: Path, work: Path) -> Learngene:
    """The learngene, in float16, with the command that made it."""
    base = Learngene.from_pretrained("lsamd-base")
    terms = yaml.safe_load((ROOT / "benchmarks" / "lsamd_base.yaml").read_text())["data"]
    images = {name: load_images(data / name, size=SIZE, limit=LIMIT) for name in terms if name in (asked.sets or terms)}
    images = images if asked.data else {}
    facts = {
        "name": "lsamd-base, 12x192",
        "license": base.license,
        "source": f"DeiT-Tiny as lsamd-base (sha256 {base.digest}) grows it at its native shape",
    }
    teacher = Teacher(open_ancestor(str(ancestor)), name="deit_tiny_patch16_224", cache=work) if asked.taught else None
    ancestor_of_it = expand(base, image_size=SIZE if images else None, num_labels=100 if asked.sets == ONE else None)
    if asked.sets == ONE:  # its loss is what is looked at
        fit_head(ancestor_of_it, images["cifar100"])
    learngene = extract(
        asked.method, ancestor_of_it.eval(), images, settings=asked.settings, facts=facts, teacher=teacher,
        preprocessing=base.preprocessing,
    )  # fmt: skip
    notes = {"command": "python benchmarks/bundle_from_base.py --data DIR --ancestor FILE", "machine": machine("cpu")}
    notes |= {"terms": {name: terms[name] for name in images}} if images else {}
    return replace(learngene.to(torch.float16), provenance={**learngene.provenance, **notes})


if __name__ == "__main__":
    main()

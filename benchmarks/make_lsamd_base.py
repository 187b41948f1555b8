"""Make model_cards/lsamd-base: LSAMD on the DeiT-Tiny ancestor and five data sets, then the width transform.

    python benchmarks/make_lsamd_base.py --data DIR --ancestor deit_tiny.safetensors

DIR holds one folder per data set, NAME/train.parquet. The ancestor is a safetensors file of timm's
deit_tiny_patch16_224. Writes the artefact, its row of registry.yaml and the card. The settings stand in
benchmarks/lsamd_base.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import yaml
from _bundle import bundle
from safetensors.torch import load_file

from learngene_hub import Learngene, extract, load_images
from learngene_hub.data import Images
from learngene_hub.training import Step, show_progress
from learngene_hub.widening import Widening, widen

ROOT = Path(__file__).resolve().parent.parent
NAME = "lsamd-base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME/train.parquet")
    parser.add_argument("--ancestor", type=Path, required=True, help="safetensors file of deit_tiny_patch16_224")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "lsamd_base.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / NAME, help="where the stages are kept")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads used")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    args.work.mkdir(parents=True, exist_ok=True)
    searched = args.work / "searched.safetensors"
    if not searched.exists():  # an interrupted search goes on where it was
        searched_learngene(args, config).save(searched)
        shutil.rmtree(args.work / "state")
    learngene = Learngene.load(searched)
    if config.get("width"):
        images = {name: small(args.data / name, config) for name in config["data"]}
        learngene = widen(learngene, images, Widening(**config["width"]), watch=watched)
    finished = dataclasses.replace(
        learngene,
        tensors={name: tensor.half() for name, tensor in learngene.tensors.items()},
        settings={**learngene.settings, **config.get("growth", {})},
    )
    bundle(finished, NAME, config["description"])


def searched_learngene(args: argparse.Namespace, config: dict) -> Learngene:
    """Stage one, in float32."""
    ancestor = timm.create_model("deit_tiny_patch16_224")
    ancestor.load_state_dict({name: tensor.float() for name, tensor in load_file(args.ancestor).items()})
    facts = {
        "name": "deit_tiny_patch16_224",
        "license": "Apache-2.0",
        "source": f"timm names, file sha256 {hashlib.sha256(args.ancestor.read_bytes()).hexdigest()}",
    }
    images = {name: load_images(args.data / name, size=config["image_size"]) for name in config["data"]}
    began = time.perf_counter()
    learngene = extract(
        "lsamd",
        ancestor.eval(),
        images,
        settings=config["lsamd"],
        facts=facts,
        watch=watched,
        state_dir=args.work / "state",
    )
    notes = {
        "command": f"python benchmarks/make_lsamd_base.py --data DIR --ancestor {args.ancestor.name}",
        "machine": args.machine,
        "terms": config["data"],
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    return dataclasses.replace(learngene, provenance={**learngene.provenance, **notes})


def small(source: Path, config: dict) -> Images:
    return load_images(source, size=config["image_size"], limit=config.get("width_images", 1000))


def watched(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, with a line per tenth of an epoch's end on stdout: a log that survives without a terminal."""
    for step in show_progress(steps):
        if step.step % 20 == 0 or step.epoch_done:
            print(f"step {step.step}/{step.of} loss {step.loss:.3f} {step.seconds:.0f} s", flush=True)
        yield step


if __name__ == "__main__":
    main()

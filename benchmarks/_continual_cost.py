"""What a selection costs, and whether its memory grows with the pool: each measured in a process of its own.

    python benchmarks/_continual_cost.py POOL SIZE THREADS IMAGES

selects from a pool's first SIZE entries for a task in a safetensors file of ``pixels`` and ``labels``, and prints a
line of JSON. ``measured`` makes the pool and asks for all of them, and measures what adding an entry costs. Its entries
are trained for one update each: what a selection costs does not depend on how good they are.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _arms import machine
from _continual_data import Sources, corpus, joined, of_classes, per_class, recipe
from _continual_growth import BASE, open_learngene, stored
from safetensors.torch import load_file, save_file

from learngene_hub import _pool_amounts
from learngene_hub._pool_grow import RECIPE
from learngene_hub.data import Images
from learngene_hub.factory import expand, finetune
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool
from learngene_hub.training import Recipe

NEVER = 1e6  # times the distance at which a task is refused


def large_pool(sources: Sources, entries: int) -> Pool:
    """A pool of so many entries, each of images drawn from a corpus and trained for one update."""
    config, folder = sources.read(), sources.work / "large-pool"
    names = list(config["corpora"])
    if folder.exists():
        pool = Pool.load(folder)
    else:
        pool = Pool.create(
            folder, open_learngene(stored(sources, BASE, 0)), entry=config["pool"]["entry"],
            components=config["pool"]["components"], image_size=config["image_size"],
        )  # fmt: skip
    for number in range(len(pool), entries):
        whole = corpus(sources, names[number % len(names)], "train")
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(number))[:100]
        once = Recipe(epochs=1, batch_size=100, lr=1e-4, schedule="constant", warmup=0.0, seed=number)
        pool = pool.add(whole.subset(order), name=f"{whole.name}-{number}", recipe=once)
    return pool


def task_file(sources: Sources, images: int) -> Path:
    """A task of so many labelled images, five classes of each of two corpora: a file for the other process."""
    names = list(sources.read()["corpora"])
    parts = []
    for name in (names[0], names[-1]):
        whole = corpus(sources, name, "test")
        parts.append(per_class(of_classes(whole, whole.classes[:5], name), images // 10, 0))
    few, path = joined(parts, "task"), sources.work / "cost-task.safetensors"
    save_file({"pixels": few.pixels, "labels": few.labels}, path)
    return path


def peak_megabytes() -> float:
    """The most memory that this process ever had in use.

    Linux counts into ``ru_maxrss`` what the process that started this one had; what it tells of this one comes first.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    told = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return round(int(told[0] if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024, 1)


def _never(scores: Mapping[str, float]) -> bool:
    """That the amounts are always trained: what a selection costs at most."""
    del scores
    return False


def selected(folder: Path, size: int, images: Path) -> dict[str, Any]:
    """One selection from the first ``size`` entries, in this process: seconds, and the most memory it ever had."""
    pool = Pool.load(folder)
    pool = replace(pool, manifest=replace(pool.manifest, entries=pool.manifest.entries[:size]))
    task = load_file(images)
    _pool_amounts.is_anchor_best = _never  # entries of one update help no task, and what they cost would not be seen
    before = peak_megabytes()
    began, worked = time.perf_counter(), time.process_time()
    found = pool.select(task["pixels"], task["labels"], tolerance=NEVER)
    return {
        "entries": size,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - worked, 2),  # of all threads: what a machine with other work hides
        "selected": len(found.entries),
        "peak_megabytes": peak_megabytes(),
        "before_megabytes": before,
    }


def adding(sources: Sources) -> list[dict[str, Any]]:
    """CPU seconds of an entry of some images (training, and its key) and of finetuning the base on them, in turn: as
    the pool of the other stages grows, and with the default recipe. The ratio is the median of the rounds' ratios."""
    config = sources.read()
    base, images = open_learngene(stored(sources, BASE, 0)), corpus(sources, list(config["corpora"])[0], "train")
    images = images.subset(range(config["cost"]["added"]))
    as_grown = recipe(config["pool"], precision=config["precision"], seed=1)
    added(sources, base, images.subset(range(32)), as_grown)  # a warm-up
    rows = []
    for how in (as_grown, replace(RECIPE, precision=config["precision"], seed=1)):
        entry, tuned = [], []
        for _ in range(config["cost"]["rounds"]):
            entry.append(added(sources, base, images, how))
            tuned.append(finetuned(config, base, images, how))
        rows.append(
            {
                "images": len(images), "epochs": how.epochs, "batch_size": how.batch_size,
                "entry_cpu_seconds": [round(one, 2) for one in entry],
                "finetuning_cpu_seconds": [round(one, 2) for one in tuned],
                "ratio": round(statistics.median(a / b for a, b in zip(entry, tuned, strict=True)), 3),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def added(sources: Sources, base: Learngene, images: Images, how: Recipe) -> float:
    """CPU seconds of an entry of these images in a new pool."""
    config, folder = sources.read(), sources.work / "added-pool"
    shutil.rmtree(folder, ignore_errors=True)
    pool = Pool.create(
        folder, base, entry=config["pool"]["entry"], components=config["pool"]["components"],
        image_size=config["image_size"],
    )  # fmt: skip
    began = time.process_time()
    pool.add(images, recipe=how)
    return time.process_time() - began


def finetuned(config: dict[str, Any], base: Learngene, images: Images, how: Recipe) -> float:
    """CPU seconds of the base grown at its own size and finetuned on these images."""
    began = time.process_time()
    shape = {"depth": base.shape.depth, "width": base.shape.width, "image_size": config["image_size"]}
    model = expand(base, num_labels=len(images.classes), seed=1, **shape)
    for _ in finetune(model, images, recipe=how):
        pass
    return time.process_time() - began


def measured(sources: Sources, repeats: int) -> dict[str, Any]:
    """Selections of each size of pool and number of threads, one after the other."""
    torch.set_num_threads(1)
    stage = sources.read()["cost"]
    pool, rows = large_pool(sources, max(stage["entries"])), []
    images = task_file(sources, stage["images"])
    for _ in range(repeats):
        for size, threads in [(size, 1) for size in stage["entries"]] + [(max(stage["entries"]), 2)]:
            command = [sys.executable, __file__, str(pool.folder), str(size), str(threads), str(images)]
            # Threads that wait sleep: where other work has the second core, spinning ones took ten times as long.
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
            told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(told))
            print(told.strip(), flush=True)
    return {
        "adding": adding(sources),
        "task_images": stage["images"],
        "selections": rows,
        "entry_megabytes": round(pool.manifest.entries[0].bytes / 1e6, 2),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "machine": machine("cpu"),
    }


def main(argv: list[str]) -> int:
    """A selection in this process, told as JSON."""
    folder, size, threads, images = argv
    torch.set_num_threads(int(threads))
    print(json.dumps(selected(Path(folder), int(size), Path(images))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

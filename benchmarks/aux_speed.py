"""An auxiliary step, trained through ``expand``, beside a plain step of the same ViT: all in one run, in turn.

    python benchmarks/aux_speed.py [--shape 12x192] [--image-size 64] [--device cuda]

Every step is one update of ``training.fit``: a batch that is there already, cross-entropy, forward, backward, AdamW.
The plain one trains a timm model that owns its weights; those of lets, ldr, tleg and sws train the auxiliary with which
these methods extract, of the same shape, whose weights are made anew from a learngene's tensors at each update. ldr is
in its last phase, with all but its last few components frozen. A ratio is the median over the rounds of an auxiliary's
seconds over the plain step's of the same round. On a CPU all is measured with one thread, where the seconds of the
processor count, and with as many threads as torch takes, where those of the wall do: such a run needs a quiet machine.
Writes benchmarks/results/aux_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub import Recipe, Step, ViTShape, fit
from learngene_hub.methods import _auxiliary, _lets_start, _lets_training
from learngene_hub.methods._lets_maps import narrow
from learngene_hub.methods.ldr import Ldr
from learngene_hub.methods.lets import Lets
from learngene_hub.methods.sws import Sws
from learngene_hub.methods.tleg import Tleg
from learngene_hub.shape import IMAGENET

RESULT = Path(__file__).parent / "results" / "aux_speed.json"
GOAL = 1.10  # of the plain step
FIRST = 2  # rounds that are not counted
METHODS = ("lets", "ldr", "tleg", "sws")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="12x192", help="DEPTHxWIDTH of the auxiliary")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    depth, width = (int(part) for part in args.shape.split("x"))
    shape = ViTShape(
        depth=depth, width=width, heads=width // args.head_dim, patch=args.patch, image_size=args.image_size, classes=10
    )
    threads = [1, torch.get_num_threads()] if args.device == "cpu" else [torch.get_num_threads()]
    runs = [measured(shape, args.batch, args.rounds, args.device, count) for count in dict.fromkeys(threads)]
    result = {
        "shape": args.shape,
        "patch": args.patch,
        "image_size": args.image_size,
        "batch": args.batch,
        "rounds": args.rounds,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "runs": runs,
        "ratio": max(run["ratio"] for run in runs),  # of the slowest
        "goal": GOAL,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measured(shape: ViTShape, batch: int, rounds: int, device: str, threads: int) -> dict[str, Any]:
    """What is told of the updates with so many threads."""
    torch.set_num_threads(threads)
    clock = processor if device == "cpu" and threads == 1 else wall
    seconds = measure(shape, batch, rounds, device, clock)
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)), 3)
        for name in METHODS
    }
    return {
        "threads": threads,
        "clock": clock.__name__,
        "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "ratios": ratios,
        "ratio": max(ratios.values()),
    }


def measure(
    shape: ViTShape, batch: int, rounds: int, device: str, clock: Callable[[str], float]
) -> dict[str, list[float]]:
    """Seconds of each update of each model, in rounds that run forwards and backwards in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, shape.in_chans, shape.image_size, shape.image_size, generator=generator).to(device)
    y = torch.randint(shape.classes, (batch,), generator=generator).to(device)
    models = {"plain": shape.build()} | {name: auxiliary(name, shape) for name in METHODS}
    runs = {name: updates(name, model, x, y, rounds + FIRST, device) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + FIRST):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            began = clock(device)
            next(runs[name])
            if turn >= FIRST:
                seconds[name].append(clock(device) - began)
    return seconds


def processor(_: str) -> float:
    """Seconds of this process."""
    return time.process_time()


def wall(device: str) -> float:
    """Seconds of the wall; on a GPU after all that was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def updates(name: str, model: nn.Module, x: Tensor, y: Tensor, count: int, device: str) -> Iterator[Step]:
    """The updates of ``fit``, one at each ``next``."""

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield x, y

    def loss(asked: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(asked(batch[0]), batch[1])

    recipe = Recipe(epochs=1, lr=1e-4, batch_size=len(x), schedule="constant")
    groups = _lets_training.groups(model) if name == "lets" else None  # type: ignore[arg-type]
    return fit(model, batches, loss, recipe=recipe, steps_per_epoch=count, groups=groups, device=device)


def auxiliary(name: str, shape: ViTShape) -> _auxiliary.Auxiliary:
    """The auxiliary of a method, of this shape, as its extraction begins to train it."""
    if name == "lets":
        lets = Lets(drop_path=0.0)
        small = narrow(shape, max(2, shape.depth // 4 * 2), max(1, shape.heads // 2) * shape.head_dim)
        return _lets_training.auxiliary(lets, shape, _lets_start.initial_tensors(lets, shape, small), IMAGENET)
    if name == "tleg":
        return Tleg().begin(shape, None, {}, IMAGENET)
    if name == "sws":
        each, more = divmod(shape.depth, 5)  # five stages, as published
        stages = tuple(count for stage in range(5) if (count := each + int(stage < more)))
        return Sws(stages=stages).begin(shape, None, {}, IMAGENET)
    ldr = Ldr()
    outer, start = ldr.begin(shape, None)
    tensors, head = _auxiliary.without_head(outer)
    before, last = ldr.phases[-2:]
    for n in range(before + 1, last + 1):
        tensors |= _auxiliary.prefixed(f"component.{n}", start[n - 1])
    return ldr.phase(tensors, start[:before], head, shape, {}, IMAGENET)


if __name__ == "__main__":
    main()

"""fit against a hand-written loop over the same timm model: images per second, median ratio of alternating rounds.

    python benchmarks/fit_speed.py                                              # two CPU cores, some minutes
    python benchmarks/fit_speed.py --device cuda --shape 12x384 --image-size 224 --batch 512 --precision bf16 --compile

Both loops take the same uint8 images, recipe, and fused AdamW with the same parameter groups, and each does all the
work of a training: shuffle, gather, normalise, forward, backward, update, schedule, read the loss. Each round trains
`--steps` updates after `--warm` that are not timed, first one loop, then the other, in the opposite order next time.
On a CPU the ratio of CPU seconds stands beside that of the clock, since it does not see what else the machine does;
on a GPU the share of the measured bf16 matrix peak and the peak memory do. A result replaces the one of the same
settings and machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from learngene_hub.data import Images
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import Recipe, classification_loss, fit, image_batches, parameter_groups

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="12x192", help="DEPTHxWIDTH, heads of 64")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=12, help="timed updates of a round")
    parser.add_argument("--warm", type=int, default=2, help="updates before the clock starts")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fit_speed.json")
    return parser.parse_args()


def shape_of(asked: argparse.Namespace) -> ViTShape:
    depth, width = (int(number) for number in asked.shape.split("x"))
    return ViTShape(depth=depth, width=width, heads=max(1, width // 64), image_size=asked.image_size, classes=10)


def images_of(asked: argparse.Namespace) -> Images:
    generator = torch.Generator().manual_seed(0)
    size = (asked.batch * (asked.steps + asked.warm), 3, asked.image_size, asked.image_size)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, size[:1], generator=generator)
    return Images(pixels, labels, tuple("0123456789"), "noise").to(asked.device)


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def by_fit(model: nn.Module, images: Images, recipe: Recipe, asked: argparse.Namespace) -> tuple[float, float]:
    """Seconds by the clock and of the CPU that the timed updates take through `fit`."""
    batches, steps = image_batches(images, recipe, IMAGENET)
    run = fit(model, batches, classification_loss(recipe), recipe=recipe, steps_per_epoch=steps, device=asked.device)
    for _ in itertools.islice(run, asked.warm):
        pass
    started, busy = clock(asked.device), time.process_time()
    losses = [step.loss for step in run]
    seconds = clock(asked.device) - started, time.process_time() - busy
    if len(losses) != asked.steps:
        raise SystemExit(f"{len(losses)} updates were timed, not {asked.steps}")
    return seconds


def by_hand(model: nn.Module, images: Images, recipe: Recipe, asked: argparse.Namespace) -> tuple[float, float]:
    """Seconds by the clock and of the CPU of the same updates as one would write them down."""
    model.to(asked.device).train()
    called: Callable[..., Any] = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, fused=True)
    total = asked.warm + asked.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total, cycle_momentum=False)
    mean = 255 * torch.tensor(IMAGENET.mean, device=asked.device).view(-1, 1, 1)
    std = 255 * torch.tensor(IMAGENET.std, device=asked.device).view(-1, 1, 1)
    dtype = DTYPES[recipe.precision]
    kind = torch.device(asked.device).type
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(kind, dtype)
    order = torch.randperm(len(images)).to(asked.device)
    losses, started, busy = [], 0.0, 0.0
    for step, chosen in enumerate(order.split(recipe.batch_size)):
        if step == asked.warm:
            started, busy = clock(asked.device), time.process_time()
        pixels = (images.pixels[chosen].float() - mean) / std
        with autocast:
            loss = F.cross_entropy(called(pixels).float(), images.labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step() if step + 1 < total else None
        losses.append(loss.item())
    return clock(asked.device) - started, time.process_time() - busy


def matrix_peak(device: str) -> float:
    """bf16 FLOP/s of a large matrix product, best of ten."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(10):
        started = clock(device)
        for _ in range(10):
            a @ a
        best = min(best, (clock(device) - started) / 10)
    return 2 * 8192**3 / best


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    shape, images = shape_of(asked), images_of(asked)
    recipe = Recipe(epochs=1, batch_size=asked.batch, precision=asked.precision, compile=asked.compile)
    models = {"fit": shape.build(), "hand": shape.build()}  # one each, so that compiled code is found again
    loops = {"fit": by_fit, "hand": by_hand}
    seconds: dict[str, list[float]] = {"fit": [], "hand": []}
    busy: dict[str, list[float]] = {"fit": [], "hand": []}
    memory = dict.fromkeys(loops, 0)
    for turn in range(-1, asked.rounds):  # turn -1 only warms up
        for name in ("fit", "hand") if turn % 2 else ("hand", "fit"):
            if asked.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            took, cpu = loops[name](models[name], images, recipe, asked)
            if asked.device.startswith("cuda"):
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
            if turn >= 0:
                seconds[name].append(took)
                busy[name].append(cpu)
    count = asked.steps * asked.batch
    ratios = [hand / fitted for fitted, hand in zip(seconds["fit"], seconds["hand"], strict=True)]
    result: dict[str, Any] = {
        "shape": asked.shape,
        "image_size": asked.image_size,
        "batch": asked.batch,
        "precision": asked.precision,
        "compile": asked.compile,
        "device": asked.device,
        "machine": machine(asked.device),
        "torch": torch.__version__,
        "rounds": asked.rounds,
        "fit_images_per_second": round(count / statistics.median(seconds["fit"]), 1),
        "hand_images_per_second": round(count / statistics.median(seconds["hand"]), 1),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }
    if asked.device == "cpu":
        cpu_ratios = [hand / fitted for fitted, hand in zip(busy["fit"], busy["hand"], strict=True)]
        result["ratio_median_cpu_seconds"] = round(statistics.median(cpu_ratios), 4)
    if asked.device.startswith("cuda"):
        peak = matrix_peak(asked.device)
        used = 3 * shape.flops() * result["fit_images_per_second"]  # backward is twice the forward
        result |= {"bf16_peak_tflops": round(peak / 1e12, 1), "share_of_peak": round(used / peak, 4)}
        result |= {f"{name}_peak_bytes": peak_bytes for name, peak_bytes in memory.items()}
    return result


def main() -> None:
    asked = arguments()
    if asked.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    result = measure(asked)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(asked.out.read_text()) if asked.out.exists() else []
    key = ("shape", "image_size", "batch", "precision", "compile", "machine")
    kept = [row for row in there if any(row[name] != result[name] for name in key)]
    asked.out.write_text(json.dumps([*kept, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

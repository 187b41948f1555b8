"""Growing a descendant against reading the same model back from disk: time, and memory beyond the descendant's bytes.

    python benchmarks/grow_speed.py --learngene lsamd-base

Time: ``Descendant.from_learngene`` at 12x384 against transformers' ``from_pretrained`` of that very model saved to
disk, in one warm process, fp32 on the CPU, by turns; the medians of 10. It must take at most 1.0 times as long.
from_pretrained maps the file instead of copying it, and a page comes in when it is first used, so both are also timed
up to the first logits of one image ("used").
Memory: one fresh process each, which has imported everything and made the smallest model once; by how much its resident
set has grown at its peak, while it makes the big model, over the model's bytes. It must be at most 1.3 times. (For the
reading side the pages of the mapped file come later, so its figure says nothing about what the model needs in use.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _arms import machine
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from learngene_hub import Descendant, ViTShape

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
LIMITS = {"time": 1.0, "memory": 1.3}  # times from_pretrained; times the descendant's bytes

Make = Callable[[], nn.Module]


def grow(learngene: str, depth: int, width: int) -> Descendant:
    """The descendant of this shape."""
    return Descendant.from_learngene(learngene, depth=depth, width=width, num_labels=CLASSES)


def read(folder: str) -> nn.Module:
    """The model in this folder, as plain transformers reads it."""
    return AutoModelForImageClassification.from_pretrained(folder)


def timed(make: Make, image: torch.Tensor) -> tuple[float, float]:
    """(milliseconds until the model is there, until its first logits are)."""
    began = time.perf_counter()
    model = make()
    made = time.perf_counter()
    with torch.no_grad():
        model(image)
    return 1e3 * (made - began), 1e3 * (time.perf_counter() - began)


def alternate(makes: dict[str, Make], image: torch.Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Per maker the medians over ``rounds``, milliseconds, taken by turns after one turn that does not count."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in makes}
    for number in range(rounds + 1):
        for name, make in makes.items():
            figures = timed(make, image)
            if number:
                taken[name].append(figures)
    return {
        name: {
            "made_ms": round(statistics.median(made for made, _ in figures), 2),
            "used_ms": round(statistics.median(used for _, used in figures), 2),
            "made_ms_all": [round(made, 2) for made, _ in figures],
        }
        for name, figures in taken.items()
    }


def resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (at its peak) of this process, bytes. Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def probe(warm: Make, make: Make) -> dict[str, float]:
    """Bytes of the model that ``make`` makes, and the growth of the resident set at its peak meanwhile."""
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    model = make()
    growth = resident("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"model_bytes": size, "peak_growth_bytes": growth, "ratio": round(growth / size, 3)}


def probed(argv: Sequence[str]) -> dict[str, float]:
    """What a fresh process reports for ``--probe``."""
    command = [sys.executable, __file__, *argv]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(learngene: str, depth: int, width: int, rounds: int) -> dict[str, Any]:
    """The whole report."""
    with tempfile.TemporaryDirectory() as folder:
        big, small = f"{folder}/big", f"{folder}/small"
        first = grow(learngene, depth, width)
        first.save_pretrained(big)
        grow(learngene, 2, 64).save_pretrained(small)
        shape = ViTShape.of(first.timm_model)
        image = torch.zeros(1, shape.in_chans, shape.image_size, shape.image_size)
        del first
        makes: dict[str, Make] = {"grow": partial(grow, learngene, depth, width), "read": partial(read, big)}
        speed = alternate(makes, image, rounds)
        sizes = ["--depth", str(depth), "--width", str(width), "--learngene", learngene]
        memory = {
            "grow": probed(["--probe", "grow", *sizes]),
            "read": probed(["--probe", "read", "--folders", small, big]),
        }
    ratio = speed["grow"]["made_ms"] / speed["read"]["made_ms"]
    return {
        "shape": f"{depth}x{width}",
        "machine": machine("cpu"),
        "torch": torch.__version__,
        "rounds": rounds,
        "time": speed | {"ratio": round(ratio, 3), "limit": LIMITS["time"]},
        "memory": memory | {"limit": LIMITS["memory"]},
        "within": {"time": ratio <= LIMITS["time"], "memory": memory["grow"]["ratio"] <= LIMITS["memory"]},
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learngene", default="lsamd-base", help="name or path; default: lsamd-base")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "grow_speed.json")
    parser.add_argument("--probe", choices=("grow", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the report, or be one of its processes; 1 where a limit is broken."""
    args = arguments(argv)
    logging.disable_progress_bar()  # in favour of reading
    if args.probe == "grow":
        wanted = partial(grow, args.learngene, args.depth, args.width)
        print(json.dumps(probe(partial(grow, args.learngene, 2, 64), wanted)))
        return 0
    if args.probe == "read":
        print(json.dumps(probe(*(partial(read, folder) for folder in args.folders))))
        return 0
    report = measure(args.learngene, args.depth, args.width, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if all(report["within"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

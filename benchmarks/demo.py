"""The main job in five minutes on two cores: ViTs of three sizes, grown, beside the same networks from random weights.

    python benchmarks/demo.py                  # make demo

Each size is grown from the learngene and finetuned on the hand signs that ship with the package (signdigits: 1,651
images for training, 411 for testing, 64 px); then its random twin, the same network with timm's own initialisation, is
trained with the same recipe and the same seed. Only the peak learning rate is each side's own: 3e-4 for inherited
weights, 1e-3 for random ones. One descendant is saved, and read back by a process that imports timm and transformers
and not this library. Everything is written to demo/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from learngene_hub import (
    Descendant,
    Images,
    LearngeneError,
    Recipe,
    ViTShape,
    evaluate,
    finetune,
    list_learngenes,
    load_images,
)
from learngene_hub.training import show_progress

SAMPLE = "signdigits"
SIZE = 64  # pixels
RATES = {"grown": 3e-4, "random": 1e-3}  # peak learning rates
COLORS = {"grown": "#0b6e4f", "random": "#b0413e"}

READ_BACK = """
import sys
import timm, torch
from transformers import AutoModelForImageClassification
from transformers.utils import logging
logging.disable_progress_bar()
folder, pixels, out = sys.argv[1:]
x = torch.load(pixels, weights_only=True)
with torch.no_grad():
    by_timm = timm.create_model("local-dir:" + folder, pretrained=True).eval()(x)
    by_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits
torch.save({"timm": by_timm, "transformers": by_transformers, "known": "learngene_hub" in sys.modules}, out)
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the demo does."""

    learngene: str = "lsamd-base"
    shapes: tuple[tuple[int, int], ...] = ((4, 128), (7, 320), (12, 384))
    saved: tuple[int, int] = (7, 320)
    epochs: int = 3
    limit: int | None = None  # images of each split; None: all
    seed: int = 0
    out: Path = Path("demo")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One network, trained."""

    shape: str
    start: str  # "grown" or "random"
    params: int
    grow_seconds: float
    accuracy: tuple[float, ...]  # on the test images after each epoch, per cent
    seconds: float  # of training and testing


def train(model: nn.Module, start: str, train: Images, test: Images, plan: Plan) -> tuple[tuple[float, ...], float]:
    """(accuracy after each epoch, seconds) of ``model``, trained in place."""
    began = time.perf_counter()
    recipe = Recipe(epochs=plan.epochs, lr=RATES[start], seed=plan.seed)
    shape = ViTShape.of(getattr(model, "timm_model", model))
    steps = show_progress(finetune(model, train, recipe=recipe, device="cpu"), label=f"{shape} {start}")
    accuracy = tuple(evaluate(model, test).accuracy for step in steps if step.epoch_done)
    return accuracy, time.perf_counter() - began


def grow(plan: Plan, depth: int, width: int, classes: tuple[str, ...]) -> tuple[Descendant, float]:
    """(the descendant, seconds it took to grow)."""
    began = time.perf_counter()
    model = Descendant.from_learngene(
        plan.learngene, depth=depth, width=width, id2label=dict(enumerate(classes)), image_size=SIZE, seed=plan.seed
    )
    return model, time.perf_counter() - began


def twin(descendant: Descendant, seed: int) -> tuple[nn.Module, float]:
    """(the same network with timm's own initialisation, seconds it took to build)."""
    began = time.perf_counter()
    shape = ViTShape.of(descendant.timm_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build(), time.perf_counter() - began


def compare(plan: Plan, console: Console) -> list[Result]:
    """Every shape grown and random; the descendant of shape ``plan.saved`` is saved and read back."""
    known = load_images(SAMPLE, split="train", size=SIZE, limit=plan.limit)
    unseen = load_images(SAMPLE, split="test", size=SIZE, limit=plan.limit)
    console.print(f"{SAMPLE}: {len(known)} images of hand signs for training, {len(unseen)} for testing\n")
    grow(plan, *plan.shapes[0], known.classes)  # imports and first reads, which are nobody's growing time
    results = []
    for depth, width in plan.shapes:
        descendant, grown_in = grow(plan, depth, width, known.classes)
        random, built_in = twin(descendant, plan.seed)
        for start, model, seconds in (("grown", descendant, grown_in), ("random", random, built_in)):
            params = sum(p.numel() for p in model.parameters())
            accuracy, spent = train(model, start, known, unseen, plan)
            result = Result(
                shape=f"{depth}x{width}",
                start=start,
                params=params,
                grow_seconds=seconds,
                accuracy=accuracy,
                seconds=spent,
            )
            results.append(result)
            figures = ", ".join(f"{a:.1f}" for a in accuracy)
            console.print(f"{result.shape:>7} {start:<6} {figures} % after each epoch, {spent:.0f} s")
        if (depth, width) == plan.saved:
            console.print(read_back(descendant, unseen, plan))
    return results


def read_back(descendant: Descendant, images: Images, plan: Plan) -> str:
    """One line on what plain timm and plain transformers compute with the saved descendant, in their own process."""
    from learngene_hub.data import normalise
    from learngene_hub.shape import IMAGENET

    folder = plan.out / f"{plan.saved[0]}x{plan.saved[1]}"
    pixels, answers = plan.out / "pixels.pt", plan.out / "logits.pt"
    descendant.save_pretrained(folder)
    x = normalise(images.pixels[:8], IMAGENET)
    with torch.no_grad():
        own = descendant.eval()(x).logits
    torch.save(x, pixels)
    try:
        command = [sys.executable, "-I", "-W", "ignore", "-c", READ_BACK, str(folder), str(pixels), str(answers)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        read = torch.load(answers, weights_only=True)
    finally:
        for path in (pixels, answers):
            path.unlink(missing_ok=True)
    gaps = {name: float((read[name] - own).abs().max()) for name in ("timm", "transformers")}
    equal = "equal logits" if not any(gaps.values()) else "largest difference of a logit: " + str(gaps)
    without = "with" if read["known"] else "without"
    return f"        saved to {folder}, read back {without} learngene_hub by plain timm and plain transformers: {equal}"


def learngene_table() -> Table:
    """The learngenes that there are."""
    table = Table(title="Learngenes", title_justify="left")
    for column in ("name", "method", "size", "licence", "description"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for entry in list_learngenes():
        table.add_row(entry.name, entry.method, f"{entry.bytes / 1e6:.1f} MB", entry.license, entry.description)
    return table


def result_table(results: Sequence[Result]) -> Table:
    """What was measured: two lines per shape."""
    table = Table(title=f"Test accuracy on {SAMPLE}, % after each epoch", title_justify="left")
    table.add_column("shape")
    table.add_column("start")
    for column in (
        "parameters",
        "grown in",
        *(f"epoch {i + 1}" for i in range(len(results[0].accuracy))),
        "trained in",
    ):
        table.add_column(column, justify="right")
    for result in results:
        grown = result.start == "grown"
        figures = [f"{a:.1f}" for a in result.accuracy]
        table.add_row(
            result.shape if grown else "",
            result.start,
            f"{result.params:,}" if grown else "",
            f"{result.grow_seconds:.2f} s" if grown else "",
            *figures,
            f"{result.seconds:.0f} s",
            style="bold" if grown else "dim",
            end_section=not grown,
        )
    return table


def plot(results: Sequence[Result], classes: int, path: Path) -> None:
    """Accuracy after each epoch, a panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(result.shape for result in results))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.3 * len(shapes) + 0.6, 3.7), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        pair = [result for result in results if result.shape == shape]
        epochs = range(1, len(pair[0].accuracy) + 1)
        top, bottom = pair[0].accuracy[-1], pair[1].accuracy[-1]
        apart = max(0.0, 14 - abs(top - bottom)) / 2 * (1 if top >= bottom else -1)  # two lines of text are 14 % high
        for result, shift in zip(pair, (apart, -apart), strict=True):
            grown = result.start == "grown"
            color, last = COLORS[result.start], result.accuracy[-1]
            axis.plot(epochs, result.accuracy, "-o" if grown else "--o", color=color, lw=2, ms=5)
            label = f"{'grown' if grown else 'random'}\n{last:.0f} %"
            axis.text(epochs[-1] + 0.12, last + shift, label, va="center", color=color, weight="bold", linespacing=1.1)
        axis.plot([0.75, epochs[-1]], [100 / classes] * 2, color="#999999", lw=0.8, ls=":", zorder=0)
        axis.set_title(f"{shape}\n{pair[0].params / 1e6:.1f} M parameters", fontsize=11)
        axis.set_xticks(list(epochs))
        axis.set_xlim(0.75, epochs[-1] + 0.38 * len(epochs) / 1.5)
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeeeee")
    axes[0][0].set_ylim(0, 108)
    axes[0][0].set_yticks(range(0, 101, 20))
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].text(0.78, 100 / classes - 1.5, "chance", color="#777777", va="top", size=8)
    title = f"{SAMPLE}: ViTs grown from one learngene, and the same networks from random weights"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The plan that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learngene", default=Plan.learngene, help=f"name or path; default: {Plan.learngene}")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--out", type=Path, default=Plan.out, help="folder; default: demo")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes and few images: does it run at all?")
    args = parser.parse_args(argv)
    if args.quick:
        return Plan(
            learngene=args.learngene, shapes=((2, 64), (4, 128)), saved=(4, 128), epochs=2, limit=128, seed=args.seed,
            out=args.out,
        )  # fmt: skip
    return Plan(learngene=args.learngene, seed=args.seed, out=args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 1 where the library refuses something."""
    plan, console, began = parse(argv), Console(highlight=False, soft_wrap=True), time.perf_counter()
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        console.print(learngene_table())
        results = compare(plan, console)
    except LearngeneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    plot(results, 10, plan.out / "demo.png")
    console.print("", result_table(results), sep="\n")
    console.print(f"{time.perf_counter() - began:.0f} s in all; the plot is {plan.out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

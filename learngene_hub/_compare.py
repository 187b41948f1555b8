"""The command ``compare``: learngenes, methods and baselines beside each other, a row of a CSV per run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import read_settings
from learngene_hub._extraction import AncestorWeightsOption
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.comparison import Done, Plan

StartsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[START]...",
        help="Learngenes; methods that need no data: net2net, weight-selection, front; and random, mimetic, even, "
        "first (blocks of the ancestor), full (the whole ancestor).",
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Starts, shapes, data and recipe in a YAML or JSON file.")
]
OutOption = Annotated[Path, typer.Option("--out", help="The CSV of the runs; what is in it is not run again.")]
ShapesOption = Annotated[str | None, typer.Option("--shapes", metavar="DxW[,DxW...]", help="Such as 6x192,4x128.")]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="A sample, parquet or image folder, or Hub data set; repeat it for more."),
]
SeedsOption = Annotated[str | None, typer.Option("--seeds", metavar="N[,N...]", help="One run with each [0].")]
AncestorOption = Annotated[
    str | None, typer.Option("--ancestor", help="Of methods and baselines: a folder, or timm's name of a ViT.")
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Of what inherits [3; 10 of fewer than 1,000 images].")
]
FreshEpochsOption = Annotated[int | None, typer.Option("--fresh-epochs", help="Of random and mimetic starts [20].")]
RateOption = Annotated[float | None, typer.Option("--lr", help="Peak learning rate of what inherits [3e-4].")]
PixelsOption = Annotated[int | None, typer.Option("--image-size", help="Side of the images, pixels [64].")]
HeadOption = Annotated[
    str | None, typer.Option("--head", help="fresh; means, whitened: from the class means of its own features [means].")
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", help="Training images of each data set; all if left out.")
]
TestedOption = Annotated[int | None, typer.Option("--tested", help="Test images of each data set; all if left out.")]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes of one thread each; 1: this one, with all.")]
DevicesOption = Annotated[
    str | None, typer.Option("--devices", help="cpu, or cuda:0,cuda:1; runs are dealt out. All GPUs if left out.")
]
SummaryOption = Annotated[bool, typer.Option("--summarise", help="Run nothing; tell what the CSV says.")]


def compare(
    out: Output,
    starts: StartsArgument = None,
    path: OutOption = Path("compared.csv"),
    plan: PlanOption = None,
    shapes: ShapesOption = None,
    data: DataOption = None,
    seeds: SeedsOption = None,
    ancestor: AncestorOption = None,
    ancestor_weights: AncestorWeightsOption = None,
    epochs: EpochsOption = None,
    fresh_epochs: FreshEpochsOption = None,
    lr: RateOption = None,
    head: HeadOption = None,
    image_size: PixelsOption = None,
    images: ImagesOption = None,
    tested: TestedOption = None,
    workers: WorkersOption = 1,
    devices: DevicesOption = None,
    summarise: SummaryOption = False,
) -> None:
    """Compare learngenes, methods and baselines with one recipe.

    Every start is grown or drawn at every shape, trained on every data set with every seed, and tested; a run is a row
    of the CSV. Runs that are there are not made again, so the same command goes on after an interruption. Told in the
    end are the means, and how each start differs from the best training-free one, paired.

    With `accelerate launch -m learngene_hub.cli compare ...` each process, and its GPU, takes its share of the runs.

    \b
    learngene compare lsamd-base random --shapes 6x192,4x128 --data signdigits --workers 2
    learngene compare lsamd-base net2net random --ancestor deit_tiny_patch16_224 --shapes 6x192 --data photos/ \\
        --seeds 0,1,2 --head means --out compared.csv
    learngene compare --plan compare.yaml --out compared.csv
    learngene compare --out compared.csv --summarise --json
    """
    from learngene_hub import comparison

    failed = 0
    if not summarise:
        asked = {
            "starts": starts, "shapes": _listed(shapes), "data": data, "seeds": _numbers(seeds), "ancestor": ancestor,
            "ancestor_weights": ancestor_weights and str(ancestor_weights), "head": head, "image_size": image_size,
            "images": images, "tested": tested, "recipe": {"epochs": epochs, "lr": lr},
            "fresh": {"epochs": fresh_epochs},
        }  # fmt: skip
        found = _plan(plan, asked, path)
        failed = _told(out, comparison.compare(found, path, workers=workers, devices=_devices(devices)), found)
    rank, processes = comparison.process()
    if rank > 0:  # of several processes of a launcher one tells
        return
    if processes > 1 and not summarise:
        out.note("Other processes may still run; the same command with --summarise tells of all their rows")
    rows = comparison.read_rows(path)
    if not rows and failed:
        raise errors.TrainingError(f"all {failed} runs failed, as told above; {path} was not written")
    if not rows:
        raise errors.StoreError(
            f"{path} holds no runs; learngene compare START --shapes 6x192 --data SOURCE makes some"
        )
    summary = comparison.summarise(rows)
    if out.human:
        out.lines(comparison.as_text(summary))
    else:
        out.facts({"path": str(path), **summary}, key="path")
    if failed:
        raise errors.TrainingError(f"{failed} runs failed; the same command tries them again")


def _plan(file: Path | None, asked: dict[str, Any], out: Path) -> Plan:
    """The plan of a file, with what was asked beside it laid over; starts that the file describes stay as it says."""
    from learngene_hub.comparison import Plan

    said = read_settings(file, [])
    known = said.get("starts")
    if isinstance(known, dict) and asked["starts"] and all(name in known for name in asked["starts"]):
        asked = {**asked, "starts": {name: known[name] for name in asked["starts"]}}  # these of the plan
    for key, value in asked.items():
        if key in ("recipe", "fresh"):
            value = {**(said.get(key) or {}), **{k: v for k, v in value.items() if v is not None}} or None
        if value is not None and value != []:
            said[key] = value
    said.setdefault("work", str(out.parent / f"{out.stem}-made"))
    return Plan.of(said)


def _told(out: Output, runs: Iterable[Done], plan: Plan) -> int:
    """A line for each run; how many failed."""
    failed, unreachable = 0, set()
    for done in runs:
        job = done.job
        where = f"{done.count} of {done.of}: {job.start} {job.shape} {job.data} seed {job.seed}"
        if done.row is not None:
            course = ", ".join(f"{accuracy:.1f}" for accuracy in done.row.reached().values())
            out.note(f"{where}: {course} % after epochs {done.row.epochs} ({done.row.wall_seconds:.0f} s)")
        elif done.out_of_reach:
            if (job.start, job.shape) not in unreachable:
                unreachable.add((job.start, job.shape))
                out.note(f"{job.start} has no {job.shape}, left out: {done.error}")
        else:
            failed += 1
            out.note(f"{where} failed: {type(done.error).__name__}: {done.error}")
    return failed


def _listed(written: str | None) -> list[str] | None:
    return None if written is None else [part.strip() for part in written.split(",") if part.strip()]


def _numbers(written: str | None) -> list[int] | None:
    parts = _listed(written)
    if parts is None:
        return None
    if not parts or not all(part.isdecimal() and len(part) <= 9 for part in parts):
        raise typer.BadParameter(f"{written!r} is no list of numbers; 0,1,2 would work", param_hint="--seeds")
    return [int(part) for part in parts]


def _devices(written: str | None) -> tuple[str, ...]:
    """Those that were asked for, or every GPU, or the CPU."""
    import torch

    asked = tuple(_listed(written) or ())
    for name in asked:
        try:
            torch.device(name)
        except RuntimeError:
            raise typer.BadParameter(
                f"no device is called {name!r}; cpu, cuda:0 would work", param_hint="--devices"
            ) from None
    if asked:
        return asked
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)

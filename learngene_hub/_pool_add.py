"""The command ``learngene pool add``: an entry that is trained, projected, or taken from a copy of the pool."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    DtypeOption,
    LimitOption,
    PrecisionOption,
    SeedOption,
    SkipOption,
    require_dtype,
    tell_left_out,
    tell_skipped,
)
from learngene_hub._output import Output
from learngene_hub._pool_options import SplitOption, images_for, own_pool
from learngene_hub._resume import STATE, goes_on, interruptible, is_begun

if TYPE_CHECKING:
    from torch import nn

    from learngene_hub.learngene import Learngene
    from learngene_hub.pool import Pool
    from learngene_hub.training import Recipe, StateDir, Step

FolderArgument = Annotated[str, typer.Argument(metavar="POOL", help="The folder of a pool.")]
SourceOption = Annotated[
    str | None, typer.Option("--data", help="A sample (signdigits), parquet or image folder, or Hub data set.")
]
EntryNameOption = Annotated[
    str | None, typer.Option("--name", help="Of the entry; made from that of the data if left out.")
]
EntryOption = Annotated[
    Path | None, typer.Option("--entry", metavar="FILE", help="Take this increment, of a copy of the pool.")
]
AncestorOption = Annotated[
    str | None, typer.Option("--ancestor", help="Project this model, finetuned from the anchor; no training.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--ancestor-weights", help="A .safetensors file, for a model named as timm does.")
]
ResidualOption = Annotated[
    float | None, typer.Option("--max-residual", help="Refuse a projection that leaves out more, a share [0.6].")
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Passes over the images [30; with --ancestor none].")
]
RateOption = Annotated[float | None, typer.Option("--lr", help="Peak learning rate [0.0008].")]
BatchOption = Annotated[int | None, typer.Option("--batch-size", help="Images per update [64].")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")]
AfreshOption = Annotated[bool, typer.Option("--yes", "-y", help="Start afresh where a training was interrupted.")]


def add(
    out: Output,
    folder: FolderArgument,
    data: SourceOption = None,
    name: EntryNameOption = None,
    entry: EntryOption = None,
    ancestor: AncestorOption = None,
    ancestor_weights: WeightsOption = None,
    limit_residual: ResidualOption = None,
    epochs: EpochsOption = None,
    lr: RateOption = None,
    batch_size: BatchOption = None,
    precision: PrecisionOption = "fp32",
    dtype: DtypeOption = "float32",
    split: SplitOption = "train",
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    yes: AfreshOption = False,
) -> None:
    """Add an entry: train an increment on new data alone, with all that is there frozen.

    Nothing that the pool holds is changed, and no earlier data is needed. With --ancestor the increment is the nearest
    to a model that was finetuned already, in closed form; with --epochs too, training begins there. An interrupted
    training goes on with the same command and --resume; what was done of the last epoch is lost.

    \b
    learngene pool add mypool --data photos/ --epochs 30
    learngene pool add mypool --data photos/ --epochs 30 --resume
    learngene pool add mypool --data photos/ --name photos-2 --ancestor trained
    learngene pool add mypool --entry theirs/entries/0123.safetensors --name theirs
    """
    training = {"--epochs": epochs, "--lr": lr, "--batch-size": batch_size}
    training |= {"--precision": _unless(precision, "fp32"), "--resume": resume or None, "--yes": yes or None}
    reading = {"--split": _unless(split, "train"), "--limit": limit, "--skip-unreadable": skip_unreadable or None}
    projecting = {"--ancestor": ancestor, "--ancestor-weights": ancestor_weights, "--max-residual": limit_residual}
    rest = {"--dtype": _unless(dtype, "float32"), "--seed": seed or None}
    _require_together(data, entry, projecting, training, reading | rest)
    began, pool = time.perf_counter(), own_pool(folder)
    chosen = _entry_name(name, data, entry)
    if entry is not None:
        _tell_added(out, pool.adopt(_increment(entry), chosen), folder, chosen, began)
        return
    state = state_of(folder, chosen)
    if resume and chosen in pool.names:
        _forget(state, state_of(folder, "OTHER"), chosen, yes=yes)
        _tell_added(out, pool, folder, chosen, began)
        out.note(f"{chosen} is finished already; nothing is left to resume")
        return
    made = _Making(
        data=str(data), split=split, limit=limit, skip_unreadable=skip_unreadable, ancestor=ancestor,
        weights=ancestor_weights, limit_residual=limit_residual, dtype=dtype,
        recipe=_recipe(epochs, lr, batch_size, precision, seed) if ancestor is None or epochs is not None else None,
    )  # fmt: skip
    if made.recipe is not None and not goes_on(out, state, resume=resume, yes=yes):
        shutil.rmtree(state, ignore_errors=True)
    _tell_added(out, made.added(out, pool, chosen, state), folder, chosen, began)


@dataclass(frozen=True, kw_only=True)
class _Making:
    """How an entry is made, as it was asked."""

    data: str
    split: str
    limit: int | None
    skip_unreadable: bool
    ancestor: str | None
    weights: Path | None
    limit_residual: float | None
    dtype: str
    recipe: Recipe | None  # None: nothing is trained

    def added(self, out: Output, pool: Pool, name: str, state: Path) -> Pool:
        """The pool with the entry; what was kept in ``state`` meanwhile is gone."""
        from learngene_hub._pool_grow import LIMIT

        trained = self.recipe is not None
        with interruptible(out, state):
            images = images_for(pool, self.data, self.split, self.limit, self.skip_unreadable)
            tell_skipped(out, images)
            if self.recipe is not None:
                tell_left_out(out, images, self.recipe.batch_size)
            model = _ancestor(self.ancestor, self.weights)
            try:
                pool = pool.add(
                    images,
                    name=name,
                    recipe=self.recipe,
                    ancestor=model,
                    limit=LIMIT if self.limit_residual is None else self.limit_residual,
                    dtype=require_dtype(self.dtype),
                    watch=_watching(out, name),
                    state_dir=_kept(state, model) if trained else None,
                )
            except errors.NameTakenError:
                shutil.rmtree(state, ignore_errors=True)  # of a training that is done, and kept elsewhere
                raise
        if trained:
            shutil.rmtree(state, ignore_errors=True)
        return pool


def _entry_name(name: str | None, data: str | None, entry: Path | None) -> str:
    """The name that was asked, or one made from that of the file or of the data."""
    from learngene_hub._pool_file import name_after, require_name
    from learngene_hub.data import called

    if name is not None:
        require_name(name)
        return name
    return name_after(entry.stem[:12] if entry is not None else called(str(data)))


def _forget(state: Path, other: Path, name: str, *, yes: bool) -> None:
    """Removes the state of a training whose entry is there; ``other`` is where one of another name would have it.

    Raises:
        StoreError: the state may be that of another training, and nobody said that it may go.
    """
    if is_begun(state) and not yes:
        raise errors.StoreError(
            f"{name} is in the pool already, and {state} holds an interrupted run, which may be that of another entry: "
            f"renamed to {other.name}, it goes on with --name OTHER --resume; --yes removes it"
        )
    shutil.rmtree(state, ignore_errors=True)


def _unless(value: str, default: str) -> str | None:
    """What was asked, where it is not what is taken anyway."""
    return None if value == default else value


def _require_together(
    data: str | None,
    entry: Path | None,
    projecting: Mapping[str, Any],
    training: Mapping[str, Any],
    others: Mapping[str, Any],
) -> None:
    """Refuse options of ``pool add`` beside which another has no effect.

    Raises:
        typer.BadParameter: there are two, which it names; or a share that is none.
        SettingsError: neither data nor an entry is asked.
    """

    def given(options: Mapping[str, Any]) -> list[str]:
        return [option for option, value in options.items() if value is not None]

    limit, epochs = projecting["--max-residual"], training["--epochs"]
    if entry is not None:
        if found := given({"--data": data, **projecting, **training, **others}):
            raise typer.BadParameter(
                f"--entry and {found[0]} asked; an increment that is made already is taken as it is: leave out one"
            )
        return
    if data is None:
        raise errors.SettingsError("neither --data nor --entry asked; give one of them")
    if limit is not None and not (math.isfinite(limit) and 0 <= limit <= 1):
        raise typer.BadParameter(f"--max-residual {limit:g} asked; it is a share, from 0 to 1")
    if projecting["--ancestor"] is None:
        if limit is not None:
            raise typer.BadParameter("--max-residual asked without --ancestor, whose projection it judges; add it")
    elif epochs is None and (found := given(training)):
        raise typer.BadParameter(
            f"{found[0]} asked with --ancestor and without --epochs: nothing is trained then; --epochs 5 trains"
        )
    elif epochs is not None and limit is not None:
        raise typer.BadParameter(
            "--max-residual and --epochs asked; training goes on from any projection: leave out one of them"
        )


def _increment(path: Path) -> Learngene:
    from learngene_hub.learngene import Learngene

    return Learngene.load(path)


def state_of(folder: str, name: str) -> Path:
    """Where the training of an entry keeps its state: beside the pool, whose own folder holds nothing unfinished."""
    path = Path(folder)
    path = path if path.name not in ("", "..") else Path(os.path.abspath(folder))
    return path.with_name(f"{path.name}.{name}.{STATE}")


def _kept(state: Path, ancestor: nn.Module | None) -> StateDir:
    """The state of a training, which a run from another ancestor is refused."""
    from learngene_hub.factory import state_digest
    from learngene_hub.training import StateDir

    return StateDir(state, {} if ancestor is None else {"ancestor": state_digest(ancestor)})


def _watching(out: Output, label: str) -> Callable[[Iterator[Step]], Iterator[Step]]:
    """What shows the progress of a training."""
    from learngene_hub import training

    return lambda steps: training.show_progress(steps, label=label, tell=out.note)


def _tell_added(out: Output, pool: Pool, folder: str, name: str, began: float) -> None:
    """What is told of an entry that is there now, since ``began`` (``time.perf_counter``)."""
    row = pool.row(name)
    told = pool.read(row.sha256).provenance
    shown = ("residual", "outside", "steps", "images_seen")
    facts = {"name": row.name, "path": folder, "bytes": row.bytes, "sha256": row.sha256}
    out.facts(
        facts
        | {key: told[key] for key in shown if key in told}
        | {"entries": len(pool)}
        | {"seconds": time.perf_counter() - began},
        key="name",
    )
    out.note(f"Next: learngene select {shlex.quote(folder)} --data FEW_IMAGES")


def _recipe(epochs: int | None, lr: float | None, batch_size: int | None, precision: str, seed: int) -> Recipe:
    from dataclasses import replace

    from learngene_hub._pool_grow import RECIPE

    asked = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    changed = {name: value for name, value in asked.items() if value is not None}
    return replace(RECIPE, **changed, precision=precision, seed=seed)


def _ancestor(source: str | None, weights: Path | None) -> Any:
    """The model that is to be projected, or None."""
    from learngene_hub._extraction import load_model

    if source is None:
        if weights is not None:
            raise errors.SettingsError(
                f"--ancestor-weights {weights} asked without --ancestor, the name of their model"
            )
        return None
    return load_model(source, weights).model

"""What `fit` yields, and ways to follow it: a log file, a progress bar, a line now and then.

Public names: those of `learngene_hub.training`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from learngene_hub.errors import SettingsError, StoreError

Item = TypeVar("Item")
TELL_SHARE, TELL_SECONDS = 0.1, 30.0  # of a run, from one line to the next: whichever comes first
TELL_LEAST = 1.0  # seconds between two lines


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update that has been made."""

    step: int  # from 1
    epoch: int  # from 0
    of: int  # updates of the whole run
    loss: float  # mean over the batch, before the update
    lr: float  # recipe.lr at this update; a group with an lr of its own has moved in proportion
    images: int  # seen so far, over all processes
    seconds: float  # of training so far, also before a run was continued, without the caller's own work
    epoch_done: bool = False  # the last update of its epoch


def log_steps(steps: Iterable[Item], path: str | Path) -> Iterator[Item]:
    """Passes everything through, writing each `Step` to a file if `path` ends in .csv, else to a TensorBoard folder.

    A run that is continued (its first step is not 1) adds to the file.

    Raises:
        SettingsError: TensorBoard is asked for and not installed.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    return _log_csv(steps, path) if path.suffix == ".csv" else _log_tensorboard(steps, path)


def _log_csv(steps: Iterable[Item], path: Path) -> Iterator[Item]:
    names = [field.name for field in dataclasses.fields(Step)]
    with contextlib.ExitStack() as stack:
        writer = None
        for step in steps:
            if isinstance(step, Step):
                if writer is None:
                    fresh = step.step == 1 or not path.exists()
                    try:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        file = stack.enter_context(path.open("w" if fresh else "a", newline="", buffering=1))
                    except OSError as error:
                        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
                    writer = csv.writer(file)
                    if fresh:
                        writer.writerow(names)
                writer.writerow([getattr(step, name) for name in names])
            yield step


def _log_tensorboard(steps: Iterable[Item], folder: Path) -> Iterator[Item]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            f"{folder} asks for TensorBoard: pip install tensorboard, or a path that ends in .csv"
        ) from error
    with SummaryWriter(str(folder)) as writer:
        for step in steps:
            if isinstance(step, Step):
                writer.add_scalar("loss", step.loss, step.step)
                writer.add_scalar("lr", step.lr, step.step)
                writer.add_scalar("images_per_second", step.images / max(step.seconds, 1e-9), step.step)
            yield step


def show_progress(
    steps: Iterable[Item], *, label: str = "training", tell: Callable[[str], None] | None = None
) -> Iterator[Item]:
    """Passes everything through under a progress bar on stderr.

    Where stderr is not a terminal there is no bar: ``tell``, if given, is handed a line at every tenth of the run, and
    every half minute where that takes longer.
    """
    if tell is not None and not sys.stderr.isatty():
        yield from _tell_progress(steps, label, tell)
        return
    from tqdm.auto import tqdm

    with tqdm(desc=label, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step in steps:
            if isinstance(step, Step):
                bar.total = step.of
                bar.set_postfix(loss=f"{step.loss:.3f}", epoch=step.epoch, refresh=False)
                bar.update(step.step - bar.n)
            yield step


def _tell_progress(steps: Iterable[Item], label: str, tell: Callable[[str], None]) -> Iterator[Item]:
    told_at, told = time.perf_counter(), 0  # when, and after which tenth of the run
    for step in steps:
        if isinstance(step, Step):
            now, done = time.perf_counter(), step.step / step.of
            parts = int(done / TELL_SHARE + 1e-9)
            if (parts > told or now - told_at >= TELL_SECONDS) and now - told_at >= TELL_LEAST:
                told_at, told = now, parts
                tell(
                    f"{label}: step {step.step} of {step.of} ({done:.0%}), epoch {step.epoch + 1}, "
                    f"loss {step.loss:.4g}, {step.seconds:.0f} s"
                )
        yield step

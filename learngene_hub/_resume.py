"""What extract, finetune and pool add share: where an interrupted run keeps its state, and what becomes of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from learngene_hub import errors
from learngene_hub._command import UnfinishedError, require_new
from learngene_hub._output import Output

IMAGE_SIZE = 64  # pixels of the images that extract learns from, and of a model that finetune grows itself
STATE = "training-state"  # what an interrupted run leaves, inside --out or beside it, and --resume reads

ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]
OldSizeOption = Annotated[int | None, typer.Option("--size", hidden=True, help="The former name of --image-size.")]


def state_of(path: Path) -> Path:
    """Where a run that writes ``path`` keeps its state: in the folder, or beside the file."""
    return path.with_name(f"{path.stem}.{STATE}") if path.suffix == ".safetensors" else path / STATE


def claim(out: Output, path: Path, state: Path, *, resume: bool, yes: bool) -> None:
    """Makes sure that ``path`` may be written, and that ``state`` is a run to go on with, or gone.

    Raises:
        ThereError, UnfinishedError: something is there, and nobody said what to do with it.
    """
    if goes_on(out, state, resume=resume, yes=yes):
        return
    require_new(out, path, yes=yes)
    shutil.rmtree(state, ignore_errors=True)


def goes_on(out: Output, state: Path, *, resume: bool, yes: bool) -> bool:
    """Whether ``state`` is a run to go on with; False: one starts, and what is in ``state`` may go.

    Raises:
        UnfinishedError: an interrupted run is there, and nobody said what to do with it.
    """
    there = is_begun(state)
    if resume and there:
        return True
    if resume:
        out.note(f"nothing to resume: {state} holds no interrupted run; starting")
    if there and not yes:
        raise UnfinishedError(f"{state} holds an interrupted run; --resume goes on with it, --yes starts afresh")
    return False


def is_finished(product: Path, state: Path) -> bool:
    """Whether a run wrote its ``product``, its last file, and left no state to go on with."""
    return product.is_file() and not is_begun(state)


def is_begun(state: Path) -> bool:
    """Whether an interrupted run left something in ``state``."""
    return state.is_dir() and any(state.iterdir())


@contextlib.contextmanager
def interruptible(out: Output, state: Path) -> Iterator[None]:
    """Ctrl-C inside is one line that says whether --resume has something to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        if any(state.rglob("*.pt")):
            out.error(f"interrupted; {state} holds the run (next: the same command with --resume)")
        else:
            out.error("interrupted before a state was written (next: the same command)")
        raise typer.Exit(130) from None


def one_size(image_size: int | None, size: int | None) -> int | None:
    """The value of --image-size, or of --size, as it was called before.

    Raises:
        SettingsError: both are given and differ.
    """
    if None not in (image_size, size) and image_size != size:
        raise errors.SettingsError(
            f"--image-size {image_size} and --size {size} asked; they are one option: leave out --size"
        )
    return size if image_size is None else image_size

"""What all commands share: the options, the one place where an error becomes a line, and questions.

Exit status: 0 done, 1 refused (one line on stderr that names the next command; with LEARNGENE_DEBUG=1 the traceback
instead), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._output import Format, Output, may_color

if TYPE_CHECKING:
    import torch

    from learngene_hub.data import Images


class ThereError(errors.StoreError):
    """Something is there already, and nobody said that it may go."""


class UnfinishedError(errors.StoreError):
    """An interrupted run is there, and nobody said what becomes of it."""


NEXT: Mapping[type, str] = {  # error -> the command that helps, where one does; the nearest class counts
    errors.LearngeneError: "learngene {command} --help",
    errors.ShapeError: "learngene show {name}",
    errors.ArtefactError: "learngene verify",
    errors.RegistryError: "learngene list",
    errors.TrainingError: "learngene {command} with a lower learning rate",
    errors.OtherRunError: "the same command with --yes in place of --resume starts afresh",
    ThereError: "the same command with --yes, or with another name",
    UnfinishedError: "the same command with --resume",
}

COUNTS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def parse_count(written: str | int) -> int:
    """The number that ``5M``, ``500K``, ``1.5G`` or a plain number stand for.

    Raises:
        typer.BadParameter: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMG]?)", str(written).strip().upper(), re.ASCII)
    count = int(float(match[1]) * COUNTS[match[2]]) if match else 0
    if count < 1:
        raise typer.BadParameter(f"{written!r} is no number; 5M, 500K, 1.5G or 5000000 would work")
    return count


MIXTURE = "`learngene select {name} --data FEW_IMAGES --out DIR` writes a mixture of it, a learngene to grow"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A registry name, a path, or ORG/REPO[@REVISION].")]
DepthOption = Annotated[int | None, typer.Option("--depth", help="Blocks; native where left out.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="Numbers per token; native where left out.")]
HeadsOption = Annotated[
    str | None,
    typer.Option("--heads", metavar="N[,N...]", help="Attention heads, or one number per block; native if left out."),
]
MaxParamsOption = Annotated[
    int | None,
    typer.Option(
        "--max-params", parser=parse_count, metavar="N", help="The best size of at most so many parameters: 5M, 500K."
    ),
]
GrowthOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A growth setting (`learngene methods METHOD`); repeat it."),
]
LabelsOption = Annotated[
    int | None, typer.Option("--num-labels", help="Classes; the ancestor's number where left out.")
]
ImageSizeOption = Annotated[int | None, typer.Option("--image-size", help="Side in pixels; native where left out.")]
ChannelsOption = Annotated[int, typer.Option("--in-chans", help="Channels of an image.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
DataOption = Annotated[
    str, typer.Option("--data", help="A sample (signdigits), parquet or image folder, or Hub data set.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the best one where left out.")
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="fp32, bf16 or fp16.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="Use this many images of each split, drawn at random.")
]
SkipOption = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that can't be decoded.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Write over what is there, without asking.")]

FormatOption = Annotated[Format, typer.Option("--format", help="How to print the result; auto is human.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Short for --format quiet: identifiers only.")]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="No colour; NO_COLOR=1 does the same.")]


def chosen_output(
    format: FormatOption = Format.auto,
    json: JsonOption = False,
    quiet: QuietOption = False,
    no_color: NoColorOption = False,
) -> Output:
    """The sink that these options ask for.

    Raises:
        typer.BadParameter: two of them contradict each other.
    """
    asked = {kind for kind, on in ((Format.json, json), (Format.quiet, quiet)) if on} | {format} - {Format.auto}
    if len(asked) > 1:
        raise typer.BadParameter(
            f"{' and '.join(sorted(asked))} contradict each other; choose one", param_hint="--format"
        )
    return Output(format=asked.pop() if asked else Format.auto, color=may_color(refused=no_color))


def verb(run: Callable[..., None], hints: Mapping[type, str] = MappingProxyType({})) -> Callable[..., None]:
    """``run(out, ...)`` as a command: its own options, then those of ``chosen_output``, from which ``out`` is made.

    Typer reads a command's options from its signature, so the signature that it is shown is the sum of the two.
    ``hints`` are laid over ``NEXT``; they may name any argument in braces.
    """
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    shared = list(inspect.signature(chosen_output, eval_str=True).parameters.values())
    both = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *shared]]

    @functools.wraps(run)
    def command(**given: Any) -> None:
        out = chosen_output(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        name = next((str(given[key]) for key in ("name", "model") if given.get(key)), "NAME")
        said = {key: shlex.quote(str(value)) for key, value in {**given, "name": name}.items()}
        said["command"] = run.__name__.rstrip("_").replace("_", "-")
        call(functools.partial(run, out, **given), out, {**NEXT, **hints}, said)

    del command.__wrapped__
    command.__signature__ = inspect.Signature(both)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in both}
    return command


class Notes(logging.Handler):
    """The lines of a log as notes."""

    def __init__(self, out: Output) -> None:
        super().__init__(logging.INFO)
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        self.out.note(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


@contextlib.contextmanager
def noting(out: Output, name: str) -> Iterator[None]:
    """Inside, what a log says are notes."""
    log, notes = logging.getLogger(name), Notes(out)
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


def call(run: Callable[[], None], out: Output, hints: Mapping[type, str], said: Mapping[str, str]) -> None:
    """Runs a command; whatever it raises becomes one line on stderr, with the hint for it, and an exit status."""
    debug = os.environ.get("LEARNGENE_DEBUG") == "1"
    if not out.interactive:  # the libraries below read these when they are imported, which is later
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with noting(out, "learngene_hub.hub"), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: out.note(f"warning: {message}")
            run()
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        out.error("interrupted; nothing half-written is left (next: the same command)")
        raise typer.Exit(130) from None
    except errors.LearngeneError as error:
        if debug:
            raise
        fits = next(hints[kind] for kind in type(error).__mro__ if kind in hints)
        out.error(f"{error} (next: {fits.format(**said)})")
        raise typer.Exit(1) from None
    except Exception as error:  # the last line of defence: a bug, or a machine that is out of memory or disk
        if debug:
            raise
        out.error(f"{type(error).__name__}: {error} (next: the same command with LEARNGENE_DEBUG=1 shows where)")
        raise typer.Exit(1) from None


def tell_skipped(out: Output, images: Images) -> None:
    """Say how many images were left out, where any were."""
    if images.skipped:
        out.note(f"{images.name}: {images.skipped} of {len(images) + images.skipped} images unreadable, left out")


MUCH = 0.1  # of the images: so many that an epoch leaves out are told


def tell_left_out(out: Output, images: Images, batch_size: int) -> None:
    """Say how many images are left of the last whole batch of an epoch, where they are many."""
    count = len(images)
    batches = -(-count // batch_size)
    left, better = count % min(count, batch_size), count // batches
    if left < MUCH * count:
        return
    out.note(
        f"{images.name}: an epoch trains on {count - left} of {count} images, drawn anew each time, in whole batches "
        f"of {batch_size}; --batch-size {better} takes {better * batches}"
    )


def require_new(out: Output, path: Path, *, yes: bool) -> None:
    """Makes sure that ``path`` may be written: it is new, an empty folder, or the user agrees.

    Raises:
        ThereError: it is there, and nobody can be asked.
    """
    there = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if not there or yes:
        return
    if not out.interactive:
        raise ThereError(f"{path} is there already; --yes writes over it, another name keeps it")
    typer.confirm(f"{path} is there already. Write over it?", abort=True, err=True)


def require_place(path: Path) -> None:
    """Makes sure, by a file that is gone at once, that something can be written at ``path``: before it is computed.

    Raises:
        StoreError: it cannot.
    """
    there = Path(os.path.abspath(path.parent if path.suffix == ".safetensors" else path))
    missing = path.suffix != ".safetensors"  # folders are made where they are missing, a file's are not
    while missing and not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise errors.StoreError(
            f"{path} cannot be written: {there}: {error.strerror}; a place in a folder of your own would work"
        ) from error


def tell_pool(out: Output, name: str, instead: str) -> None:
    """Says of a learngene that is the anchor of a pool that it alone is used, and what is meant ``instead``.

    Raises:
        LearngeneError: there is nothing of that name.
    """
    from learngene_hub.hub import pool_at, seen

    path = seen(name)
    if path is not None and pool_at(path):
        out.note(f"{name} is a pool, and its anchor alone is used here: {instead.format(name=shlex.quote(name))}")


NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def require_dtype(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        SettingsError: there is no such dtype.
    """
    import torch

    if name not in NUMBER_BYTES:
        raise errors.SettingsError(f"dtype {name!r} asked; there are {', '.join(NUMBER_BYTES)}")
    return getattr(torch, name)


def read_heads(written: str | None) -> int | tuple[int, ...] | None:
    """The number of heads, or one for each block, that ``--heads`` names.

    Raises:
        typer.BadParameter: it names none.
    """
    if written is None:
        return None
    parts = written.split(",")
    if not all(part.strip().isdecimal() and len(part.strip()) <= 9 for part in parts):
        raise typer.BadParameter(f"{written!r} is no number of heads; 6, or 3,3,6 of three blocks, would work")
    first, *others = (int(part) for part in parts)
    return (first, *others) if others else first


def read_settings(config: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """A method's settings from a file (JSON or YAML), then from KEY=VALUE pairs (VALUE in JSON, else text).

    Raises:
        SettingsError: the file or a pair cannot be read.
    """
    settings = _read_config(config) if config else {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise errors.SettingsError(f"{pair} asked; a setting is KEY=VALUE, such as epochs=10")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise errors.SettingsError(f"--config {path} asked; {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise errors.SettingsError(f"--config {path} is not {path.suffix or 'YAML'}: {error}") from error
    if not isinstance(settings, dict):
        raise errors.SettingsError(
            f"--config {path} holds a {type(settings).__name__}; a mapping of settings would work"
        )
    return {str(key): _number(value) for key, value in settings.items()}


def _number(value: Any) -> Any:
    """YAML takes 1e-4 for text; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value

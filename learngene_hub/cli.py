"""The command line: one command per verb, each a thin call of the library.

Conventions (those of `hf`): data goes to stdout in the form of --format, everything else to stderr. Heavy imports stand
inside the commands, so that --help and ``list`` answer at once.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import (
    _compare,
    _exchange,
    _export,
    _extraction,
    _federate,
    _finetune,
    _fit_size,
    _pool_commands,
    _registry_commands,
    _shelf,
    _workshop,
    errors,
)
from learngene_hub._command import (
    MIXTURE,
    NUMBER_BYTES,
    ChannelsOption,
    DepthOption,
    DtypeOption,
    GrowthOption,
    HeadsOption,
    ImageSizeOption,
    LabelsOption,
    MaxParamsOption,
    NameArgument,
    SeedOption,
    WidthOption,
    YesOption,
    read_heads,
    read_settings,
    require_new,
    tell_pool,
    verb,
)
from learngene_hub._hf_extension import hf_extension
from learngene_hub._output import Output
from learngene_hub._plain_help import plain_help
from learngene_hub._version import __version__

if TYPE_CHECKING:
    from learngene_hub.shape import Shape

app = typer.Typer(
    name="learngene",
    help="Grow pre-trained vision transformers of any depth and width from small files called learngenes.",
    epilog="Start with `learngene list`, then `learngene show lsamd-base --depth 12 --width 384`.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: instant, and the same when piped
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"learngene {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("ls", hidden=True)(verb(_shelf.list_))
app.command("list")(verb(_shelf.list_))


@app.command()
@verb
def show(
    out: Output,
    name: NameArgument,
    depth: DepthOption = None,
    width: WidthOption = None,
    heads: HeadsOption = None,
    num_labels: LabelsOption = None,
    image_size: ImageSizeOption = None,
    in_chans: ChannelsOption = 3,
    max_params: MaxParamsOption = None,
    settings: GrowthOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """A learngene, and the cost of a descendant, before growing.

    \b
    learngene show lsamd-base
    learngene show lsamd-base --depth 12 --width 384 --num-labels 10 --json
    """
    from learngene_hub.factory import plan
    from learngene_hub.hub import locate, pull

    learngene = pull(name)
    shape = plan(
        learngene,
        depth=depth,
        width=width,
        heads=read_heads(heads),
        num_labels=num_labels,
        image_size=image_size,
        in_chans=in_chans,
        max_params=max_params,
        settings=read_settings(None, settings or []),
    )
    facts = {
        "name": name,
        "method": learngene.method,
        "ancestor": learngene.ancestor["name"],
        "license": learngene.license,
        "native": str(learngene.shape),
        "reach": str(learngene.reach),
        "params": learngene.params,
        "bytes": locate(name).path.stat().st_size,
        "sha256": learngene.digest,
        "descendant": _cost(shape, dtype),
    }
    out.facts(facts, key="name")
    tell_pool(out, name, "`learngene pool show {name}` tells of its entries, and " + MIXTURE)


def _cost(shape: Shape, dtype: str) -> dict[str, Any]:
    """What a descendant of ``shape`` is and takes, from closed formulas."""
    if dtype not in NUMBER_BYTES:
        raise errors.SettingsError(f"dtype {dtype!r} asked; there are {', '.join(NUMBER_BYTES)}")
    kind = {} if shape.kind == "vit" else {"kind": shape.kind, "shape": str(shape)}
    heads = getattr(shape, "heads", None)
    return {
        **kind,
        "depth": shape.depth,
        "width": shape.width,
        **({} if heads is None else {"heads": list(heads) if isinstance(heads, tuple) else heads}),
        "image_size": shape.image_size,
        "in_chans": shape.in_chans,
        "num_labels": shape.classes,
        "dtype": dtype,
        "params": shape.params(),
        "flops": shape.flops(),
        "bytes": shape.bytes(NUMBER_BYTES[dtype]),
    }


app.command("fit-size")(verb(_fit_size.fit_size))


def methods(
    out: Output,
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show the settings of this one.")] = None,
) -> None:
    """The methods that make learngenes, or one's settings.

    A setting acts at extraction (extract --set) or at growth (show, expand and finetune --set; extract stores it as the
    learngene's own).

    \b
    learngene methods
    learngene methods lsamd
    """
    from learngene_hub.methods import METHODS, get_method

    if name is None:
        rows = [
            {"name": key, "paper": METHODS[key].paper, "summary": _summary(METHODS[key])} for key in sorted(METHODS)
        ]
        out.rows(rows, key="name", columns=["name", "paper", "summary"])
        return
    rows = _settings(get_method(name))
    out.rows(rows, key="setting", columns=["setting", "default", "type", "acts", "description"])


app.command()(verb(methods, {errors.SettingsError: "learngene methods"}))


def _settings(method: Any) -> list[dict[str, Any]]:
    """What is told of each setting of a method: those of extraction first, then those of growth."""
    from learngene_hub.methods import growth_of, words

    said, grown = words(type(method)), growth_of(type(method))
    rows = [
        {
            "setting": field.name,
            "default": getattr(method, field.name),
            "type": field.type,
            "acts": None if grown is None else "growth" if field.name in grown else "extraction",
            "description": said.get(field.name, ""),
        }
        for field in fields(method)
    ]
    return sorted(rows, key=lambda row: row["acts"] == "growth")


def _summary(method: type) -> str:
    """What a method is, in one line: the first of its file's docstring."""
    lines = (sys.modules[method.__module__].__doc__ or method.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


@app.command()
@verb
def expand(
    out: Output,
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write the descendant to.")],
    depth: DepthOption = None,
    width: WidthOption = None,
    heads: HeadsOption = None,
    num_labels: LabelsOption = None,
    image_size: ImageSizeOption = None,
    in_chans: ChannelsOption = 3,
    settings: GrowthOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    max_params: MaxParamsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    yes: YesOption = False,
) -> None:
    """Grow a descendant into a folder.

    Plain transformers and plain timm load a ViT or a ResNet, on machines that have never heard of learngenes; networks
    that timm has not, after `import learngene_hub.descendant`.

    \b
    learngene expand lsamd-base grown --depth 12 --width 384 --num-labels 10
    learngene expand lsamd-base grown --depth 7 --width 320 --image-size 64 --dry-run
    """
    from learngene_hub import factory
    from learngene_hub.hub import pull

    asked: dict[str, Any] = {
        "depth": depth,
        "width": width,
        "heads": read_heads(heads),
        "num_labels": num_labels,
        "image_size": image_size,
        "in_chans": in_chans,
        "max_params": max_params,
        "settings": read_settings(None, settings or []),
    }
    shape = factory.plan(pull(name), **asked)
    tell_pool(out, name, MIXTURE)
    facts = {"path": str(folder), "learngene": name, "written": not dry_run} | _cost(shape, dtype)
    if not dry_run:
        require_new(out, folder, yes=yes)
        facts["seconds"] = _grow(name, folder, asked, dtype, seed)
    out.facts(facts, key="path")
    out.note(
        f"Next: learngene {'expand, without --dry-run' if dry_run else f'finetune {folder} --data SOURCE --out DIR'}"
    )


def _grow(name: str, folder: Path, asked: dict[str, Any], dtype: str, seed: int) -> float:
    """Seconds that growing and saving took."""
    import torch

    from learngene_hub.descendant import Descendant

    began = time.perf_counter()
    model = Descendant.from_learngene(name, **asked, dtype=getattr(torch, dtype), seed=seed)
    model.save_pretrained(folder)
    return time.perf_counter() - began


app.command()(verb(_extraction.extract, {errors.ShapeError: "learngene methods {method}"}))
app.command()(verb(_finetune.finetune))
app.command()(verb(_workshop.evaluate))
app.command()(verb(_compare.compare, {errors.TrainingError: "the same command, once what is told above is mended"}))
app.command()(verb(_export.export))
app.command()(verb(_exchange.push))
app.command()(verb(_exchange.pull))
app.command()(verb(_shelf.verify))
app.add_typer(_registry_commands.app)
_pool_commands.mount(app)
app.command()(
    verb(
        _federate.federate,
        dict.fromkeys((errors.SettingsError, errors.TrainingError), "learngene federate --list-settings"),
    )
)
app.command("hf-extension")(verb(hf_extension))
plain_help(app)


def main() -> None:
    """The entry point of the command ``learngene``."""
    app()


if __name__ == "__main__":
    main()

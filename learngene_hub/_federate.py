"""The command ``learngene federate``: a federated run on this machine, or the folder that ``flwr run`` takes."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import SeedOption, YesOption, noting, read_settings, require_new
from learngene_hub._output import Output

LOG_FILE = "flower.log"  # in `out`: what Flower itself says
NAMED = 8  # clusters that are named beside the first
CLIENTS = 12  # where no other number is asked
FolderOption = Annotated[
    Path | None, typer.Option("--out", help="The folder for learngenes, rounds and traffic; a run there goes on.")
]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting (--list-settings); repeat it.")
]


def federate(
    out: Output,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A sample, parquet or image folder, or Hub data set; clients divide it [signdigits, a sample].",
        ),
    ] = None,
    folder: FolderOption = None,
    clients: Annotated[
        int | None, typer.Option("--clients", help=f"How many divide the data, in simulation [{CLIENTS}].")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Of training and averaging [10].")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="gene-fl, early, late; or a baseline without learngene: local, fedavg, fedprox, fedavg-bytes.",
        ),
    ] = None,
    ancestor: Annotated[
        str | None, typer.Option("--ancestor", help="A learngene, or timm's name of a ViT; random where left out.")
    ] = None,
    ancestor_weights: Annotated[
        Path | None, typer.Option("--ancestor-weights", help="A .safetensors file, for a model named as timm does.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML or JSON file of settings.")] = None,
    pairs: SettingOption = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="process: clients one by one in here [the default]; flower: Flower's, on Ray."),
    ] = None,
    seed: SeedOption = 0,
    write_app: Annotated[
        Path | None, typer.Option("--write-app", metavar="DIR", help="Only write a Flower app, for `flwr run DIR`.")
    ] = None,
    list_settings: Annotated[bool, typer.Option("--list-settings", help="Only list the settings of a run.")] = False,
    yes: YesOption = False,
) -> None:
    """Train learngenes across clients that can't share data.

    The method is GENE-FL, the engine Flower.

    Needs learngene-hub[federated]. With --write-app the same run starts by `flwr run`, in simulation or on a SuperLink
    with SuperNodes on many machines.

    \b
    learngene federate --data signdigits --clients 12 --rounds 10 --out federated
    learngene federate --data photos/ --set partition=labels --set depth=6 --strategy fedavg --out fedavg
    learngene federate --data photos/ --rounds 50 --write-app my-app
    """
    from learngene_hub.federated.settings import federation

    given = read_settings(config, pairs or [])
    options: dict[str, Any] = {
        "data": data, "out": folder, "rounds": rounds, "strategy": strategy, "ancestor": ancestor,
        "ancestor_weights": ancestor_weights,
    }  # fmt: skip
    given |= {name: str(v) if isinstance(v, Path) else v for name, v in options.items() if v is not None}
    settings = federation({"seed": seed} | given)
    if list_settings:
        _list(out, settings)
        return
    if write_app is not None:
        if engine is not None:
            raise errors.SettingsError(f"engine {engine} asked with --write-app; an app runs by flwr run: leave it out")
        _write(out, write_app, settings, CLIENTS if clients is None else clients, yes=yes)
        return
    _run(out, settings, CLIENTS if clients is None else clients, engine or "process")


def _list(out: Output, settings: Any) -> None:
    """Every setting with its value and meaning; of the strategy what each of them is."""
    from dataclasses import fields

    from learngene_hub.federated.settings import STRATEGIES
    from learngene_hub.methods import words

    said = words(type(settings))
    each = " | ".join(f"{name}: {what}" for name, what in STRATEGIES.items())
    said["strategy"] = f"{said.get('strategy', '')}. {each}"
    rows = [
        {"setting": f.name, "value": getattr(settings, f.name), "type": f.type, "description": said.get(f.name, "")}
        for f in fields(settings)
    ]
    out.rows(rows, key="setting", columns=["setting", "value", "type", "description"])


def _write(out: Output, folder: Path, settings: Any, clients: int, *, yes: bool) -> None:
    from learngene_hub.federated.apps import write_app

    require_new(out, folder, yes=yes)
    paths = write_app(folder, settings, clients)
    out.facts({"path": str(folder), "files": len(paths), "clients": clients}, key="path")
    if not settings.out:
        out.note("The setting out is empty: the app will keep nothing; --out DIR, a folder of the server's, keeps it")
    place = shlex.quote(str(folder))
    out.note(f"Next: flwr run {place} --federation-config num-supernodes={clients}; {place}/README.md says more")


def _run(out: Output, settings: Any, clients: int, engine: str) -> None:
    from learngene_hub.federated.apps import simulate
    from learngene_hub.federated.traffic import totals

    _tell_image_size(out, settings)
    with _going_on(out, settings.out), _flowers_log(out, Path(settings.out) / LOG_FILE if settings.out else None):
        outcome = simulate(settings, clients, engine=engine)
    last = outcome.history[-1] if outcome.history else {}
    facts: dict[str, Any] = {
        "strategy": settings.strategy,
        "path": settings.out or None,
        "rounds": int(last.get("round", 0)),
        "clients": clients,
        "accuracy": last.get("accuracy"),
        "learngenes": len(outcome.learngenes),
        "learngene_bytes": [learngene.nbytes for learngene in outcome.learngenes],
        **{f"{name}_bytes": value for name, value in totals(outcome.lines).items() if value or name != "newcomer"},
        "seconds": outcome.seconds,
    }
    out.facts(facts, key="strategy")
    if outcome.done_before == len(outcome.history):
        out.note(f"This run was finished: nothing was trained or written; --rounds above {facts['rounds']} goes on")
    left = outcome.strategy.left_out if outcome.strategy is not None else []
    for why in sorted({each.why for each in left}):
        count = sum(each.why == why for each in left)
        out.note(f"{count} of {clients} clients left out of the last round: {why}")
    if outcome.learngenes and settings.out:
        out.note(_next(Path(settings.out), len(outcome.learngenes), settings.image_size))


def _next(folder: Path, clusters: int, image_size: int) -> str:
    """What can be done with the learngenes of so many clusters."""
    place = shlex.quote(str(folder / "cluster-0" / "learngene.safetensors"))
    said = f"Next: learngene finetune {place} --data SOURCE --image-size {image_size} --out DIR"
    others = [f"cluster-{number}" for number in range(1, clusters)]
    more = [f"and {len(others) - NAMED} more"] if len(others) > NAMED else []
    return f"{said}; likewise {', '.join(others[:NAMED] + more)}" if others else said


def _tell_image_size(out: Output, settings: Any) -> None:
    """Says of an ancestor that it is grown for images of another size than its own."""
    from learngene_hub.federated.models import ancestor_of

    ancestor = ancestor_of(settings.ancestor, settings.ancestor_weights)
    if ancestor is not None and ancestor.image_size != settings.image_size:
        out.note(
            f"Images of {settings.image_size} px; the ancestor's are {ancestor.image_size} px. --set image_size=N "
            "takes others: larger ones are nearer to the ancestor's, and take longer"
        )


@contextmanager
def _going_on(out: Output, folder: str) -> Iterator[None]:
    """Ctrl-C inside is one line that says how the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        place = shlex.quote(folder)
        kept = f"the rounds that were finished are in {place} (next: the same command goes on after them)"
        lost = "without --out nothing was kept (next: the same command with --out DIR can go on when interrupted)"
        out.error(f"interrupted; {kept if folder else lost}")
        raise typer.Exit(130) from None


@contextmanager
def _flowers_log(out: Output, path: Path | None) -> Iterator[None]:
    """Flower's own lines go to the file ``path``, or nowhere, for they are many and coloured; the run's become notes.

    Both end with the context.
    """
    flower = logging.getLogger("flwr")
    before = flower.handlers, flower.level
    kept = logging.FileHandler(path, delay=True, encoding="utf-8") if path else logging.NullHandler()
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    flower.handlers = [kept]
    flower.setLevel(logging.INFO)
    try:
        with noting(out, "flwr.gene_fl"):
            yield
    finally:
        kept.close()
        flower.handlers, level = before
        flower.setLevel(level)

"""The commands of pools: ``learngene pool create | add | list | show | verify | push | pull``, and ``select``."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import (
    DataOption,
    DtypeOption,
    LimitOption,
    PrecisionOption,
    SeedOption,
    SkipOption,
    require_dtype,
    require_new,
    require_place,
    tell_skipped,
    verb,
)
from learngene_hub._output import Output
from learngene_hub._resume import IMAGE_SIZE, STATE, goes_on, interruptible

if TYPE_CHECKING:
    from torch import nn

    from learngene_hub.data import Images
    from learngene_hub.learngene import Learngene
    from learngene_hub.pool import Pool
    from learngene_hub.pool import Row as Row
    from learngene_hub.training import Recipe, StateDir, Step

PoolArgument = Annotated[
    str, typer.Argument(metavar="POOL", help="The folder of a pool, a registry name, or ORG/REPO[@REVISION].")
]
SplitOption = Annotated[str, typer.Option("--split", help="The split of the data to use.")]
WHOLE = {errors.ArtefactError: "learngene pool verify {name}"}  # of commands whose NAME is a pool
SPLITS = re.compile(r"(train|training|test|val|valid|validation|dev|data)(-.*)?")  # files and folders so called


class ElsewhereError(errors.StoreError):
    """A pool that is asked for is not in a folder of one's own."""


app = typer.Typer(
    name="pool",
    help="Make a pool of learngenes, add to it, look at it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def create(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="POOL", help="The folder to make.")],
    name: Annotated[str, typer.Argument(metavar="ANCHOR", help="The learngene that all entries will stand on.")],
    topology: Annotated[
        str,
        typer.Option("--topology", help="What an entry stands on: star (the anchor), chain (all before), adaptive."),
    ] = "star",
    entry: Annotated[
        str, typer.Option("--entry", help="The form of the entries: components, or blocks (larger, any ancestor).")
    ] = "components",
    components: Annotated[int, typer.Option("--components", help="Of an entry of components.")] = 2,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            help=f"Side of all images, pixels [{IMAGE_SIZE}; the anchor's if its patches don't tile that].",
        ),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Make a pool around an anchor: a learngene of net2net, lsamd, ldr, tleg or adaptive.

    \b
    learngene pool create mypool lsamd-base --image-size 64
    learngene pool create mypool my-ldr --topology adaptive
    """
    from learngene_hub.hub import pull
    from learngene_hub.pool import Pool

    anchor = pull(name)
    pixels = image_size or _usual_size(anchor)
    pool = Pool.create(
        folder, anchor, topology=topology, entry=entry, components=components, image_size=pixels, seed=seed
    )
    out.facts(_facts(pool), key="path")
    own = anchor.shape.image_size
    if image_size is None:
        other = f", as all commands take where none is asked; --image-size {own} takes the anchor's own"
        out.note(f"Images of {pool.manifest.key.image_size} px{'' if pixels in (None, own) else other}")
    out.note(f"Next: learngene pool add {shlex.quote(str(folder))} --data SOURCE")


def _usual_size(anchor: Learngene) -> int | None:
    """The size of images that all commands take, where the anchor's patches tile it; None: the anchor's."""
    patch = getattr(anchor.shape, "patch", 0)
    return IMAGE_SIZE if patch and IMAGE_SIZE % patch == 0 else None


def add(
    out: Output,
    folder: Annotated[str, typer.Argument(metavar="POOL", help="The folder of a pool.")],
    data: Annotated[
        str | None, typer.Option("--data", help="A sample (signdigits), parquet or image folder, or Hub data set.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the entry; made from that of the data if left out.")
    ] = None,
    entry: Annotated[
        Path | None, typer.Option("--entry", metavar="FILE", help="Take this increment, of a copy of the pool.")
    ] = None,
    ancestor: Annotated[
        str | None, typer.Option("--ancestor", help="Project this model, finetuned from the anchor; no training.")
    ] = None,
    ancestor_weights: Annotated[
        Path | None, typer.Option("--ancestor-weights", help="A .safetensors file, for a model named as timm does.")
    ] = None,
    limit_residual: Annotated[
        float | None, typer.Option("--max-residual", help="Refuse a projection that leaves out more, a share [0.6].")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the images [30; with --ancestor none].")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate [0.0008].")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images per update [64].")] = None,
    precision: PrecisionOption = "fp32",
    dtype: DtypeOption = "float32",
    split: SplitOption = "train",
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start afresh where a training was interrupted.")] = False,
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
    from learngene_hub._pool_grow import LIMIT

    training = {"--epochs": epochs, "--lr": lr, "--batch-size": batch_size}
    training |= {"--precision": _unless(precision, "fp32"), "--resume": resume or None, "--yes": yes or None}
    reading = {"--split": _unless(split, "train"), "--limit": limit, "--skip-unreadable": skip_unreadable or None}
    projecting = {"--ancestor": ancestor, "--ancestor-weights": ancestor_weights, "--max-residual": limit_residual}
    rest = {"--dtype": _unless(dtype, "float32"), "--seed": seed or None}
    _require_together(data, entry, projecting, training, reading | rest)
    began, pool = time.perf_counter(), _own(folder)
    if entry is not None:
        pool = pool.adopt(_increment(entry), name or _name_of(entry.stem[:12], str(entry)))
        _tell_added(out, pool, folder, pool.names[-1], began)
        return
    chosen = name or _name_of(_called(str(data)), str(data))
    trained = ancestor is None or epochs is not None
    state = _state_of(folder, chosen)
    if resume and chosen in pool.names:
        shutil.rmtree(state, ignore_errors=True)  # of a run that was killed after its last write
        _tell_added(out, pool, folder, chosen, began)
        out.note(f"{chosen} is finished already; nothing is left to resume")
        return
    if trained and not goes_on(out, state, resume=resume, yes=yes):
        shutil.rmtree(state, ignore_errors=True)
    with interruptible(out, state):
        images = _images(pool, str(data), split, limit, skip_unreadable)
        tell_skipped(out, images)
        model = _ancestor(ancestor, ancestor_weights)
        pool = pool.add(
            images,
            name=chosen,
            recipe=_recipe(epochs, lr, batch_size, precision, seed) if trained else None,
            ancestor=model,
            limit=LIMIT if limit_residual is None else limit_residual,
            dtype=require_dtype(dtype),
            watch=_watching(out, chosen),
            state_dir=_kept(state, model) if trained else None,
        )
    if trained:
        shutil.rmtree(state, ignore_errors=True)
    _tell_added(out, pool, folder, chosen, began)


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


def _own(folder: str) -> Pool:
    """The pool in a folder on this machine.

    Raises:
        ElsewhereError: there is no such folder, and the name is one of a repository or of the registry.
        StoreError, ArtefactError: as ``Pool.load``.
    """
    from learngene_hub.hub import is_repository, known
    from learngene_hub.pool import Pool

    if not Path(folder).exists() and (is_repository(folder) or folder in known().entries):
        raise ElsewhereError(
            f"no folder {folder!r}; entries are added in a folder of your own, which `learngene pool pull` makes of a "
            "pool on the Hub or in the registry"
        )
    return Pool.load(folder)


def _increment(path: Path) -> Learngene:
    from learngene_hub.learngene import Learngene

    return Learngene.load(path)


def _called(data: str) -> str:
    """What a data set is called: as its folder or file, or as the folder above "train.parquet" and the like."""
    path = Path(os.path.abspath(data)) if os.path.exists(data) else Path(data)
    names = [part.removesuffix(".parquet") for part in reversed(path.parts)]
    return next((name for name in names if not SPLITS.fullmatch(name)), names[0] if names else "")


def _name_of(called: str, source: str) -> str:
    """A name for an entry, of letters, digits, '.', '_' and '-'.

    Raises:
        SettingsError: none is left.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", called).strip("._-")[:64].rstrip("._-")
    if not name:
        raise errors.SettingsError(f"no entry can be named after {source!r}; --name NAME would work")
    return name


def _state_of(folder: str, name: str) -> Path:
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


def _images(pool: Pool, data: str, split: str, limit: int | None, skip_unreadable: bool) -> Images:
    """One split at the size and channels of a pool."""
    from learngene_hub.data import load_images

    return load_images(
        data,
        split=split,
        size=pool.manifest.key.image_size,
        in_chans=pool.anchor.shape.in_chans,
        limit=limit,
        skip_unreadable=skip_unreadable,
    )


def show(out: Output, name: PoolArgument) -> None:
    """A pool and its entries.

    \b
    learngene pool show mypool
    learngene pool show org/pool --json
    """
    from learngene_hub.hub import pull_pool

    pool = pull_pool(name)
    if out.format == "quiet":
        out.rows([{"name": entry} for entry in pool.names], key="name", columns=["name"])
        return
    entries = {}
    for row, learngene in pool.entries():
        told = learngene.provenance
        parents = dict(learngene.settings["parents"])
        entries[row.name] = {
            **_entry(row, learngene),
            **{key: told[key] for key in ("residual", "steps", "seconds") if key in told},
            **({"parents": {pool.row(sha256).name: weight for sha256, weight in parents.items()}} if parents else {}),
        }
    out.facts(_facts(pool) | {"entries": entries}, key="path")


def list_(out: Output, name: PoolArgument) -> None:
    """The entries of a pool, a row for each, the oldest first.

    \b
    learngene pool list mypool
    learngene pool list mypool --quiet
    """
    from learngene_hub.hub import pull_pool

    pool = pull_pool(name)
    if out.format == "quiet":
        rows = [{"name": entry} for entry in pool.names]
    else:
        rows = [{"name": row.name, **_entry(row, learngene)} for row, learngene in pool.entries()]
    out.rows(rows, key="name", columns=["name", "sha256", "bytes", "images", "classes"])


def _entry(row: Row, learngene: Learngene) -> dict[str, Any]:
    """What is told of an entry wherever it is."""
    classes = learngene.provenance.get("classes", ())
    count = int(learngene.tensors["key.count"])
    return {"sha256": row.sha256, "bytes": row.bytes, "images": count, "classes": len(classes)}


def _facts(pool: Pool) -> dict[str, Any]:
    manifest = pool.manifest
    return {
        "path": str(pool.folder),
        **({"repository": pool.origin[0], "revision": pool.origin[1]} if pool.origin else {}),
        "anchor": pool.anchor.method,
        "native": str(pool.anchor.shape),
        "reach": str(pool.anchor.reach),
        "sha256": manifest.anchor.sha256,
        "topology": manifest.topology,
        "entry": manifest.entry,
        "components": manifest.components,
        "image_size": manifest.key.image_size,
        "bytes": manifest.anchor.bytes + sum(row.bytes for row in manifest.entries),
    }


def verify(out: Output, name: PoolArgument) -> None:
    """Check every file of a pool against its manifest. Exit status 1 where something is wrong.

    \b
    learngene pool verify mypool
    """
    from learngene_hub.hub import pull_pool

    pool = pull_pool(name)
    wrong = pool.verify()
    for line in wrong:
        out.error(line)
    if wrong:
        raise typer.Exit(1)
    out.facts({"path": str(pool.folder), "entries": len(pool), "digest": pool.manifest.digest, "ok": True}, key="path")


def push(
    out: Output,
    name: PoolArgument,
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, and make sure that it is.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    branch: Annotated[str | None, typer.Option("--branch", help="Push to this branch; made where missing.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    description: Annotated[str, typer.Option("--description", help="One line for the card.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen; nothing is sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Replace another pool that is there.")] = False,
) -> None:
    """Put a pool on the Hub, in one commit. One that has grown is pushed again the same way.

    \b
    learngene pool push mypool org/pool --dry-run
    learngene pool push mypool org/pool --private
    """
    from learngene_hub.hub import pull_pool, push_pool

    pushed = push_pool(
        pull_pool(name), repo, private=private, create_pr=create_pr, branch=branch, message=message,
        description=description, dry_run=dry_run, overwrite=yes,
    )  # fmt: skip
    told = ("repo", "uri", "url", "sha256", "license", "private", "created", "changed", "files", "pull_request")
    facts = {key: getattr(pushed, key) for key in told}
    out.facts({**facts, "files": list(pushed.files), "sent": pushed.changed and not dry_run}, key="uri")
    if not pushed.changed:
        out.note(f"{pushed.repo} holds this very pool already; nothing {'would be' if dry_run else 'was'} sent")
    elif dry_run:
        out.note("Next: the same command without --dry-run")
    else:
        out.note(f"Next: learngene pool pull {pushed.repo} FOLDER")


def pull(
    out: Output,
    name: PoolArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
) -> None:
    """Fetch a pool into a folder of its own, every file checked, so that it can be added to.

    \b
    learngene pool pull org/pool mypool
    """
    from learngene_hub.hub import pull_pool

    out.facts(_facts(pull_pool(name).copy(folder)), key="path")
    out.note(f"Next: learngene pool add {shlex.quote(str(folder))} --data SOURCE")


def select(
    out: Output,
    name: PoolArgument,
    data: DataOption,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Look at the images alone; the amounts are then half of the shares.")
    ] = False,
    k: Annotated[int | None, typer.Option("--k", help="At most so many entries [3; 1 of blocks or a chain].")] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="How many times farther than the pool's own data a task may be.")
    ] = 1.0,
    rule: Annotated[
        str, typer.Option("--rule", help="tals, or one to compare it with: logme, nearest, soup, anchor.")
    ] = "tals",
    path: Annotated[
        Path | None, typer.Option("--out", help="Also write the mixture, a learngene: NAME.safetensors or a folder.")
    ] = None,
    split: SplitOption = "train",
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write over what is there, without asking.")] = False,
) -> None:
    """Which entries of a pool fit a task, and how much of each.

    A few images of the task say it. A task that is like none of the pool's data gets no entry: the anchor alone.

    \b
    learngene select mypool --data photos/ --limit 100
    learngene select mypool --data photos/ --unlabelled --k 1 --json
    learngene select mypool --data photos/ --out mixed; learngene finetune mixed --depth 6 --data photos/ --out tuned
    """
    from learngene_hub._pool_amounts import FLOOR, is_anchor_best
    from learngene_hub.hub import pull_pool

    if path is not None:
        require_new(out, path, yes=yes)
        require_place(path)
    pool = pull_pool(name)
    images = _images(pool, data, split, limit, skip_unreadable)
    tell_skipped(out, images)
    found = pool.select(images, unlabelled=unlabelled, k=k, tolerance=tolerance, rule=rule, seed=seed)
    told = found.to_dict()
    entries = told.pop("entries")
    facts: dict[str, Any] = {"pool": name, "data": data, "abstained": found.abstained}
    facts |= {"entries": entries if out.format == "json" else {row["name"]: _row(row) for row in entries} or None}
    facts |= {key: told[key] for key in ("rule", "residual", "threshold", "images", "labelled", "scores", "seconds")}
    facts |= {"anchor_sha256": found.anchor, "pool_digest": found.pool}
    if path is not None:
        merged = pool.merge(found)
        if path.suffix == ".safetensors":
            merged.save(path)
        else:
            merged.save_pretrained(path)
        facts |= {"out": str(path)}
    if out.format == "quiet":
        out.rows(entries, key="name", columns=["name"])
    else:
        out.facts(facts, key="pool")
    if found.abstained:
        out.note(f"{data} is like none of the entries: the anchor alone is selected; --tolerance 2 allows more")
    elif not entries and rule == "tals" and is_anchor_best(found.scores):
        out.note(
            f"{data} looks like some of the entries, but images of it that were held out are read as well "
            "without them: the anchor alone is selected; --unlabelled takes the weights from the shares"
        )
    elif not entries and rule == "tals":
        out.note(
            f"{data} looks like some of the entries, but all weights fell below the least, {FLOOR:g}: the anchor alone "
            "is selected; --unlabelled takes the weights from the shares"
        )
    elif not entries:
        out.note(f"rule {rule} selects no entry: the anchor alone")


def _row(row: dict[str, Any]) -> dict[str, float]:
    return {"weight": row["weight"], "share": row["share"]}


def _grouped(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` under its name in full, which the hint after an error repeats."""

    @functools.wraps(run)
    def command(*args: Any, **given: Any) -> None:
        run(*args, **given)

    command.__name__ = f"pool {run.__name__}".rstrip("_")
    return command


MENDED = {errors.ArtefactError: "learngene pool pull ORG/REPO FOLDER, or a copy of your own"}
ADDED = {
    errors.ArtefactError: "learngene pool verify {folder}",
    errors.ShapeError: "learngene show {folder}",
    ElsewhereError: "learngene pool pull {folder} FOLDER",
}

app.command("create")(verb(_grouped(create)))
app.command("add")(verb(_grouped(add), ADDED))
app.command("list")(verb(_grouped(list_), WHOLE))
app.command("show")(verb(_grouped(show), WHOLE))
app.command("verify")(verb(_grouped(verify), MENDED))
app.command("push")(verb(_grouped(push), WHOLE))
app.command("pull")(verb(_grouped(pull), WHOLE))


def mount(root: typer.Typer) -> None:
    """Puts these commands under the root."""
    root.add_typer(app)
    root.command()(verb(select, WHOLE))

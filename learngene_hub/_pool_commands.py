"""The commands of pools: ``learngene pool create | add | show | verify | push | pull``, and ``learngene select``."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
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
    tell_skipped,
    verb,
)
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.data import Images
    from learngene_hub.pool import Pool
    from learngene_hub.training import Recipe, Step

PoolArgument = Annotated[
    str, typer.Argument(metavar="POOL", help="The folder of a pool, a registry name, or ORG/REPO[@REVISION].")
]
SplitOption = Annotated[str, typer.Option("--split", help="The split of the data to use.")]

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
        int | None, typer.Option("--image-size", help="Side of all images, pixels; the anchor's where left out.")
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

    pool = Pool.create(
        folder, pull(name), topology=topology, entry=entry, components=components, image_size=image_size, seed=seed
    )
    out.facts(_facts(pool), key="path")
    out.note(f"Next: learngene pool add {folder} --data SOURCE")


def add(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="POOL", help="The folder of a pool.")],
    data: Annotated[
        str | None, typer.Option("--data", help="A sample (signdigits), parquet or image folder, or Hub data set.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the entry; that of the data where left out.")] = None,
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
        float, typer.Option("--max-residual", help="Refuse a projection that leaves out more than this share.")
    ] = 0.6,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the images [30; with --ancestor none].")
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 8e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per update.")] = 64,
    precision: PrecisionOption = "fp32",
    dtype: DtypeOption = "float32",
    split: SplitOption = "train",
    limit: LimitOption = None,
    skip_unreadable: SkipOption = False,
    seed: SeedOption = 0,
) -> None:
    """Add an entry: train an increment on new data alone, with all that is there frozen.

    Nothing that the pool holds is changed, and no earlier data is needed. With --ancestor the increment is the nearest
    to a model that was finetuned already, in closed form; with --epochs too, training begins there.

    \b
    learngene pool add mypool --data photos/ --epochs 30
    learngene pool add mypool --data photos/ --name photos-2 --ancestor trained
    learngene pool add mypool --entry theirs/entries/0123.safetensors --name theirs
    """
    from learngene_hub.learngene import Learngene
    from learngene_hub.pool import Pool
    from learngene_hub.training import show_progress

    if (data is None) == (entry is None):
        raise errors.SettingsError("--data and --entry asked together or not at all; give one of them")
    began, pool = time.perf_counter(), Pool.load(folder)
    if entry is not None:
        pool = pool.adopt(Learngene.load(entry), name or entry.stem[:12])
    else:
        images = _images(pool, str(data), split, limit, skip_unreadable)
        tell_skipped(out, images)

        def watch(steps: Iterator[Step]) -> Iterator[Step]:
            return show_progress(steps, label=name or images.name, tell=out.note)

        trained = ancestor is None or epochs is not None
        pool = pool.add(
            images,
            name=name,
            recipe=_recipe(epochs, lr, batch_size, precision, seed) if trained else None,
            ancestor=_ancestor(ancestor, ancestor_weights),
            limit=limit_residual,
            dtype=require_dtype(dtype),
            watch=watch,
        )
    row = pool.manifest.entries[-1]
    told = pool.read(row.sha256).provenance
    shown = ("residual", "outside", "steps", "images_seen")
    facts = {"name": row.name, "path": str(folder), "bytes": row.bytes, "sha256": row.sha256}
    out.facts(
        facts
        | {key: told[key] for key in shown if key in told}
        | {"entries": len(pool)}
        | {"seconds": time.perf_counter() - began},
        key="name",
    )
    out.note(f"Next: learngene select {folder} --data FEW_IMAGES")


def _recipe(epochs: int | None, lr: float, batch_size: int, precision: str, seed: int) -> Recipe:
    from dataclasses import replace

    from learngene_hub._pool_grow import RECIPE

    passes = RECIPE.epochs if epochs is None else epochs
    return replace(RECIPE, epochs=passes, lr=lr, batch_size=batch_size, precision=precision, seed=seed)


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
    entries = {}
    for row, learngene in pool.entries():
        told = learngene.provenance
        parents = dict(learngene.settings["parents"])
        entries[row.name] = {
            "sha256": row.sha256,
            "bytes": row.bytes,
            "images": int(learngene.tensors["key.count"]),
            "classes": len(told.get("classes", ())),
            **{key: told[key] for key in ("residual", "steps", "seconds") if key in told},
            **({"parents": {pool.row(sha256).name: weight for sha256, weight in parents.items()}} if parents else {}),
        }
    out.facts(_facts(pool) | {"entries": entries}, key="path")


def _facts(pool: Pool) -> dict[str, Any]:
    manifest = pool.manifest
    return {
        "path": str(pool.folder),
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
    out.facts({**facts, "files": list(pushed.files), "sent": not dry_run}, key="uri")


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
    out.note(f"Next: learngene pool add {folder} --data SOURCE")


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
    """Which entries of a pool fit a task, and how much of each, from few of its images.

    A task that is like none of the pool's data gets no entry: the anchor alone.

    \b
    learngene select mypool --data photos/ --limit 100
    learngene select mypool --data photos/ --unlabelled --k 1 --json
    learngene select mypool --data photos/ --out mixed; learngene finetune mixed --depth 6 --data photos/ --out tuned
    """
    from learngene_hub.hub import pull_pool

    pool = pull_pool(name)
    images = _images(pool, data, split, limit, skip_unreadable)
    tell_skipped(out, images)
    if path is not None:
        require_new(out, path, yes=yes)
    found = pool.select(images, unlabelled=unlabelled, k=k, tolerance=tolerance, rule=rule, seed=seed)
    told = found.to_dict()
    entries = told.pop("entries")
    facts: dict[str, Any] = {"pool": name, "data": data, "abstained": found.abstained}
    facts |= {"entries": entries if out.format == "json" else {row["name"]: _row(row) for row in entries}}
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


def _row(row: dict[str, Any]) -> dict[str, float]:
    return {"weight": row["weight"], "share": row["share"]}


def _grouped(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` under its name in full, which the hint after an error repeats."""

    @functools.wraps(run)
    def command(*args: Any, **given: Any) -> None:
        run(*args, **given)

    command.__name__ = f"pool {run.__name__}"
    return command


app.command("create")(verb(_grouped(create)))
app.command("add")(verb(_grouped(add)))
app.command("show")(verb(_grouped(show)))
app.command("verify")(verb(_grouped(verify)))
app.command("push")(verb(_grouped(push)))
app.command("pull")(verb(_grouped(pull)))


def mount(root: typer.Typer) -> None:
    """Puts these commands under the root."""
    root.add_typer(app)
    root.command()(verb(select))

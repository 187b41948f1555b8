"""The commands of pools: ``learngene pool create | add | list | show | verify | push | pull``, and ``select``."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import SeedOption, verb
from learngene_hub._output import Output
from learngene_hub._pool_add import add
from learngene_hub._pool_choose import select
from learngene_hub._pool_options import AloneError, ElsewhereError, PoolArgument, facts_of
from learngene_hub._resume import IMAGE_SIZE

if TYPE_CHECKING:
    from learngene_hub.learngene import Learngene
    from learngene_hub.pool import Row as Row

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
    out.facts(facts_of(pool), key="path")
    own = anchor.image_size
    if image_size is None:
        other = f", as all commands take where none is asked; --image-size {own} takes the anchor's own"
        out.note(f"Images of {pool.manifest.key.image_size} px{'' if pixels in (None, own) else other}")
    out.note(f"Next: learngene pool add {shlex.quote(str(folder))} --data SOURCE")


def _usual_size(anchor: Learngene) -> int | None:
    """The size of images that all commands take, where the anchor's patches tile it; None: the anchor's own,
    as that of a mixture, which has the size of its pool."""
    patch = getattr(anchor.shape, "patch", 0)
    if anchor.pool_size:
        return None
    return IMAGE_SIZE if patch and IMAGE_SIZE % patch == 0 else None


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
    out.facts(facts_of(pool) | {"entries": entries}, key="path")


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

    out.facts(facts_of(pull_pool(name).copy(folder)), key="path")
    out.note(f"Next: learngene pool add {shlex.quote(str(folder))} --data SOURCE")


def _grouped(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` under its name in full, which the hint after an error repeats."""

    @functools.wraps(run)
    def command(*args: Any, **given: Any) -> None:
        run(*args, **given)

    command.__name__ = f"pool {run.__name__}".rstrip("_")
    return command


# What helps where a command on a pool is refused, by the error. What is no pool is a learngene, which pull_pool found.
POOLS = {errors.NoPoolError: "learngene pool create FOLDER {name}"}
WHOLE = {**POOLS, errors.ArtefactError: "learngene pool verify {name}"}
MENDED = {**POOLS, errors.ArtefactError: "learngene pool pull ORG/REPO FOLDER, or a copy of your own"}
ADDED = {
    errors.NoPoolError: "learngene pool create FOLDER ANCHOR",
    AloneError: "learngene pool create FOLDER {folder}",
    errors.ArtefactError: "learngene pool verify {folder}",
    errors.NameTakenError: "learngene pool add {folder} --entry FILE --name OTHER",
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

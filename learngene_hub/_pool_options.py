"""What the commands of pools share: arguments, the pool and the images that these name, what is told of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors

if TYPE_CHECKING:
    from learngene_hub.data import Images
    from learngene_hub.pool import Pool

PoolArgument = Annotated[
    str, typer.Argument(metavar="POOL", help="The folder of a pool, a registry name, or ORG/REPO[@REVISION].")
]
SplitOption = Annotated[str, typer.Option("--split", help="The split of the data to use.")]


class ElsewhereError(errors.StoreError):
    """A pool that is asked for is not in a folder of one's own."""


class AloneError(errors.NoPoolError):
    """A learngene is asked for in place of a pool, which could be made around it."""


def own_pool(folder: str) -> Pool:
    """The pool in a folder on this machine.

    Raises:
        ElsewhereError: there is no such folder, and the name is one of a repository or of the registry.
        AloneError: it is a learngene, and no pool.
        StoreError, ArtefactError: as ``Pool.load``.
    """
    from learngene_hub.hub import FILE_NAME, POOL_FILE, is_repository, known, pool_at, seen
    from learngene_hub.pool import Pool

    entry = None if Path(folder).exists() else known().entries.get(folder)
    path = Path(folder) / FILE_NAME if entry is None else None if entry.is_remote else seen(folder)
    if path is not None and path.exists() and not pool_at(path):
        raise AloneError(f"{folder} is not a pool: it has no {POOL_FILE}; a pool around it can be added to")
    if entry is not None or (is_repository(folder) and not Path(folder).exists()):
        raise ElsewhereError(
            f"no folder {folder!r}; entries are added in a folder of your own, which `learngene pool pull` makes of a "
            "pool on the Hub or in the registry"
        )
    return Pool.load(folder)


def images_for(
    pool: Pool, data: str, split: str, limit: int | None, skip_unreadable: bool, *, unlabelled: bool = False
) -> Images:
    """One split at the size and channels of a pool."""
    from learngene_hub.data import load_images

    return load_images(
        data,
        split=split,
        size=pool.manifest.key.image_size,
        in_chans=pool.anchor.shape.in_chans,
        limit=limit,
        skip_unreadable=skip_unreadable,
        unlabelled=unlabelled,
    )


def facts_of(pool: Pool) -> dict[str, Any]:
    """What is told of a pool, without its entries."""
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

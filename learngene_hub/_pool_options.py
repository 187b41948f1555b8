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


def own_pool(folder: str) -> Pool:
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

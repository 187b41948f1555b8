"""Putting an increment into a pool's folder: its file, then the manifest. Private to ``pool.py``.

For one process at a time (``_pool_file.changing``), and of the pool as it is now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from learngene_hub import _pool_file
from learngene_hub._format import shown
from learngene_hub._pool_file import Manifest, Row
from learngene_hub.errors import ArtefactError, NameTakenError, StoreError
from learngene_hub.learngene import Learngene
from learngene_hub.methods.adaptive import Adaptive

if TYPE_CHECKING:
    from learngene_hub.pool import Pool


def put(pool: Pool, learngene: Learngene, name: str) -> Pool:
    """The pool with this entry.

    Raises:
        ArtefactError: an increment whose parents are not here, or that does not stand on the last of a chain.
        SettingsError: the name, or the increment, is here already.
        StoreError: it cannot be written; the pool is as it was.
    """
    method, rows = pool.require(learngene), pool.manifest.entries
    if missing := sorted(set(method.parents) - {row.sha256 for row in rows}):
        raise ArtefactError(
            f"an increment that stands on {missing[0][:12]}, which this pool does not hold; add it first"
        )
    require_last(pool.manifest, method, rows)
    row = Row(name=name, sha256=learngene.digest, bytes=9)
    replace(pool.manifest, entries=(*rows, row))  # refuses a name that is taken before anything is written
    row = replace(row, bytes=_written(pool, learngene, row).stat().st_size)
    manifest = replace(pool.manifest, entries=(*rows, row), key=method.space)
    _pool_file.write_manifest(pool.folder, manifest)
    return replace(pool, manifest=manifest)


def put_trained(pool: Pool, learngene: Learngene, name: str) -> Pool:
    """The pool with this entry, whose training nobody wants to see lost.

    Raises:
        NameTakenError: there is another entry of this name by now; the increment is beside it, under no name.
        ArtefactError, SettingsError, StoreError: as ``put``.
    """
    others = {row.name: row.sha256 for row in pool.manifest.entries}
    if name not in others or learngene.digest in others.values():
        return put(pool, learngene, name)
    path = _written(pool, learngene, Row(name=name, sha256=learngene.digest, bytes=9))
    raise NameTakenError(
        f"name {name} was given to another entry of the pool during the training; what was trained is kept in "
        f"{shown(path)}, which can be added under another name"
    )


def _written(pool: Pool, learngene: Learngene, row: Row) -> Path:
    path = _pool_file.place_of(pool.folder, row)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {shown(path.parent)}: {error.strerror}") from error
    learngene.save(path)
    return path


def require_last(manifest: Manifest, method: Adaptive, before: Sequence[Row]) -> None:
    """Refuse an increment of a chain that does not stand on the one before it.

    Raises:
        ArtefactError: it does not.
    """
    wanted = {before[-1].sha256: 1.0} if before else {}
    if manifest.topology == "chain" and dict(method.parents) != wanted:
        last = before[-1].name if before else "the anchor"
        raise ArtefactError(f"an increment that does not stand on {last}, the last of this chain; train it again")

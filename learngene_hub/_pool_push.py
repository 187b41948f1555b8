"""Push of a pool: the anchor, all entries, the manifest and a card, to a repository of the Hub, in one commit.

A pool that has grown since its last push needs no leave to replace what is there: entries are only ever added, and only
the manifest and the card are written anew. Any other difference is refused, as for a learngene.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from learngene_hub._client import Repository
from learngene_hub._format import FILE_NAME
from learngene_hub._push import CARD, _license, _order
from learngene_hub._send import Pushed, send
from learngene_hub._store import Files, HubStore
from learngene_hub.errors import ArtefactError, StoreError

if TYPE_CHECKING:
    from learngene_hub._pool_file import Manifest
    from learngene_hub.pool import Pool


def push_pool(
    pool: Pool,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    message: str | None = None,
    description: str = "",
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Pushed:
    """Puts a pool into a repository, which is made where it is missing; arguments as for ``hub.push``.

    The licence is the anchor's, whose bytes cannot be changed any more.

    Raises:
        SettingsError: the anchor names no licence, or arguments that contradict each other.
        ArtefactError: a file of the pool is not what its manifest promises.
        StoreError: not allowed, not reachable, public although private was asked, or another pool is there.
    """
    from learngene_hub._pool_file import MANIFEST, path_within, place_of  # here: it imports torch

    license = _license(pool.anchor.license, "the anchor, which cannot be given one any more")
    if wrong := pool.verify(strangers=False):
        raise ArtefactError(f"{wrong[0]}; nothing was sent")
    store = HubStore(file_name=MANIFEST, token=token)
    order = _order(repo, branch, private, create_pr, message or "Push a pool", overwrite, dry_run)
    there = None if overwrite else _same_pool(pool.manifest, store, order.target)
    if there is not None:
        if not create_pr:
            _require_kept(pool.manifest, there, order.target)
        if pool.manifest.entries[: len(there.entries)] == there.entries:
            order = _order(repo, branch, private, create_pr, message or "Push a pool that has grown", True, dry_run)
    rows = (pool.manifest.anchor, *pool.manifest.entries)
    files: Files = {
        **{path_within(row): place_of(pool.folder, row) for row in rows},
        MANIFEST: pool.manifest.encode(),
        CARD: pool_card(pool, order.target.repo, description).encode(),
    }
    return send(files, order, HubStore(token=token), sha256=pool.manifest.anchor.sha256, license=license)


def _same_pool(manifest: Manifest, store: HubStore, target: Repository) -> Manifest | None:
    """What a repository holds of this pool, with whatever entries; None where it holds no pool, or another one."""
    from learngene_hub._pool_file import parse

    try:
        there = parse(store.read(str(target)).read_bytes())
    except (StoreError, ArtefactError, OSError):
        return None
    names = ("anchor", "topology", "entry", "components")
    return there if all(getattr(there, name) == getattr(manifest, name) for name in names) else None


def _require_kept(manifest: Manifest, there: Manifest, target: Repository) -> None:
    """Makes sure that every entry of the manifest that is there is in the one that would take its place.

    Raises:
        StoreError: one is not.
    """
    from learngene_hub._pool_file import MANIFEST

    own = {row.sha256 for row in manifest.entries}
    if lost := [row.name for row in there.entries if row.sha256 not in own]:
        names, them = (f"entry {lost[0]}", "it") if len(lost) == 1 else (f"entries {', '.join(lost[:20])}", "them")
        raise StoreError(
            f"{target} has another {MANIFEST}, of this pool: {names} would leave it; `learngene pool pull {target} "
            f"FOLDER` fetches {them}, for `learngene pool add --entry`; overwrite=True (--yes) replaces what is there"
        )


def pool_card(pool: Pool, repo: str, description: str) -> str:
    """The card of the anchor, which a reader who knows nothing of pools may use, with the entries under it."""
    from learngene_hub.card import card_text, text  # here: it imports torch

    manifest = pool.manifest
    about = (
        description or f"A pool of {len(pool)} increments on a learngene of {pool.anchor.method}: {pool.anchor.reach}."
    )
    card = card_text(pool.anchor, name=repo.split("/")[1], source=repo, description=about, nbytes=manifest.anchor.bytes)
    rows = ["| entry | images | classes | bytes | sha256 |", "|---|---|---|---|---|"]
    for row, learngene in pool.entries():
        classes = learngene.provenance.get("classes")
        count = len(classes) if isinstance(classes, list) else 0
        cells = (
            text(row.name),
            f"{int(learngene.tensors['key.count']):,}",
            str(count),
            f"{row.bytes:,}",
            row.sha256[:12],
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            card.rstrip("\n"),
            "",
            "## Pool",
            "",
            f"Topology {manifest.topology}, entries of the form {manifest.entry}, images of {manifest.key.image_size} "
            f"px; `{FILE_NAME}` is the anchor, which grows by itself too. An increment fits where the task's images "
            "look like its data:",
            "",
            "```python",
            "from learngene_hub import Descendant, load_images",
            "from learngene_hub.hub import pull_pool",
            "",
            f'pool = pull_pool("{repo}")',
            f'found = pool.select(load_images("photos", size={manifest.key.image_size}, limit=100))',
            "model = Descendant.from_learngene(pool, selection=found, depth=6, num_labels=10)",
            "```",
            "",
            *rows,
            "",
        ]
    )

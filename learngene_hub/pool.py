"""Pool: an anchor and increments on it, in a folder that grows without old data and never changes a byte of it.

    pool = Pool.create("mypool", Learngene.from_pretrained("lsamd-base"))
    pool = pool.add(photos, name="photos")                  # trains an increment, with the anchor frozen
    found = pool.select(few)                                # which increments fit this task, and how much of each
    model = Descendant.from_learngene(pool, selection=found, depth=6, width=256, num_labels=10)

The folder is specified in ``_pool_file.py``, the sum in ``methods/_adaptive_merge.py``, training in ``_pool_grow.py``,
the selection in ``_pool_select.py``. A Pool reads its manifest and its anchor when it is loaded, and an entry whenever
it is asked for it, one at a time: memory does not grow with the number of entries.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from learngene_hub import _pool_file, _pool_grow, _pool_merge, _pool_select, _pool_write
from learngene_hub._format import FILE_NAME, naming, shown
from learngene_hub._pool_file import Manifest, Row
from learngene_hub._pool_select import Chosen as Chosen
from learngene_hub._pool_select import Selection as Selection
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, LearngeneError, RegistryError, SettingsError, StoreError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method
from learngene_hub.methods._adaptive_key import Space
from learngene_hub.methods._adaptive_merge import places, table
from learngene_hub.methods.adaptive import Adaptive

if TYPE_CHECKING:
    import torch

    from learngene_hub.training import Recipe, StateDir, Step


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """A pool in a folder. ``add`` and ``adopt`` return the pool as it is afterwards; this one stays as it was read."""

    folder: Path
    manifest: Manifest
    anchor: Learngene = field(repr=False)
    origin: tuple[str, str] | None = None  # of the Hub: org/name, commit

    @property
    def name(self) -> str:
        """That of its repository, or of its folder."""
        return self.origin[0] if self.origin else self.folder.resolve().name

    @property
    def revision(self) -> str | None:
        """The commit, of a pool from the Hub."""
        return self.origin[1] if self.origin else None

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        anchor: Learngene,
        *,
        topology: str = "star",
        entry: str = "components",
        components: int = 2,
        image_size: int | None = None,
        features: int = 1024,
        seed: int = 0,
    ) -> Pool:
        """A new pool without entries.

        Args:
            topology: what an increment is trained on: the anchor ("star"); the anchor and all entries before it
                ("chain"); the anchor and the entries most like its data ("adaptive").
            entry: the form of the increments: "components", a few for the whole depth, or "blocks", one for each part
                of the anchor: larger, and the only form into which any finetuned ancestor can be projected.
            components: of an increment, where ``entry`` is "components".
            image_size: at which images are looked at, increments trained and descendants grown; the anchor's where left
                out. The pool's copy of the anchor says it, so that its digest is not that of ``anchor``.
            features, seed: of the keys.

        Raises:
            SettingsError: a learngene that is no anchor, or settings out of range.
            StoreError: something is in the folder, or it cannot be written.
        """
        place = Path(folder)
        if not isinstance(anchor, Learngene):
            raise SettingsError(f"anchor {anchor!r:.80} given; a learngene would work: Learngene.from_pretrained(NAME)")
        count = len(places(anchor)) if entry == "blocks" else components
        table(anchor, entry, count)
        space = Space(features=features, seed=seed, image_size=image_size or anchor.image_size)
        replace(anchor.shape, image_size=space.image_size)  # a ShapeError where the patches do not tile it
        anchor = anchor.in_pool(space.image_size)
        with _pool_file.whole(place) as made:
            path = anchor.save_pretrained(made)
            row = Row(name="anchor", sha256=anchor.digest, bytes=path.stat().st_size)
            manifest = Manifest(anchor=row, topology=topology, entry=entry, components=count, key=space)
            _pool_file.write_manifest(made, manifest)
        return cls(folder=place, manifest=manifest, anchor=anchor)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Pool:
        """The pool in a folder, its manifest and its anchor checked; its entries are checked when they are read.

        Raises:
            NoPoolError: there is none; StoreError: it cannot be read.
            ArtefactError: it was edited, or a file is missing; DigestError: the anchor is another one.
        """
        place = Path(folder)
        manifest = _pool_file.read_manifest(place)
        for row in (manifest.anchor, *manifest.entries):
            _pool_file.require_there(place, row)
        anchor = Learngene.load(place / FILE_NAME, sha256=manifest.anchor.sha256)
        pool = cls(folder=place, manifest=manifest, anchor=anchor)
        with naming(place / _pool_file.MANIFEST):
            try:
                pool.table()
            except LearngeneError as error:
                raise ArtefactError(f"its anchor and its settings do not fit: {error}") from error
        return pool

    def copy(self, folder: str | os.PathLike[str]) -> Pool:
        """The same pool in a new folder of its own, every file checked.

        Raises:
            StoreError: something is in the folder, or it cannot be written.
            ArtefactError: a file is not what the manifest promises.
        """
        place = Path(folder)
        if wrong := self.verify(strangers=False):
            raise ArtefactError(wrong[0])
        with _pool_file.whole(place) as made:
            (made / _pool_file.ENTRIES).mkdir()
            for row in (self.manifest.anchor, *self.manifest.entries):
                shutil.copyfile(_pool_file.place_of(self.folder, row), _pool_file.place_of(made, row))
            _pool_file.write_manifest(made, self.manifest)
        return Pool.load(place)

    def __len__(self) -> int:
        return len(self.manifest.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The entries, the oldest first."""
        return tuple(row.name for row in self.manifest.entries)

    def table(self) -> Tensor:
        """C (P, N): how much of part n of an increment goes to part p of the anchor; see ``_adaptive_merge``."""
        return table(self.anchor, self.manifest.entry, self.manifest.components)

    def row(self, name: str) -> Row:
        """The row of an entry, by its name or its sha256.

        Raises:
            RegistryError: there is none.
        """
        for row in self.manifest.entries:
            if name in (row.name, row.sha256):
                return row
        there = ", ".join(self.names[:20]) or "none"
        raise RegistryError(f"no entry {name!r:.80} in {shown(self.folder)}; there are {there}")

    def read(self, name: str) -> Learngene:
        """An entry, by its name or its sha256, checked.

        Raises:
            RegistryError: there is none.
            ArtefactError: it is not what the manifest promises, or of another pool.
        """
        row = self.row(name)
        path = _pool_file.place_of(self.folder, row)
        learngene = Learngene.load(path, sha256=row.sha256)
        with naming(path):
            self.require(learngene)
        return learngene

    def entries(self) -> Iterator[tuple[Row, Learngene]]:
        """Each entry, the oldest first, read when it is its turn."""
        for row in self.manifest.entries:
            yield row, self.read(row.sha256)

    def require(self, learngene: Learngene) -> Adaptive:
        """The settings of an increment, where it is one of this pool's anchor, form and keys.

        Raises:
            ArtefactError: it is not.
        """
        method = get_method(learngene.method, learngene.settings)
        if not isinstance(method, Adaptive) or not method.anchor:
            raise ArtefactError(f"a learngene of {learngene.method}, not an increment; `learngene pool add` makes one")
        if method.anchor != self.manifest.anchor.sha256:
            raise ArtefactError(
                f"an increment on the anchor {method.anchor[:12]}; this pool's is {self.manifest.anchor.sha256[:12]}: "
                "increments of two anchors cannot be summed"
            )
        if method.parents and self.manifest.topology == "star":
            raise ArtefactError("an increment that stands on others; those of a star stand on the anchor alone")
        own, space = self.manifest, self.manifest.key
        count = sum(name.endswith(".norm1.bias") for name in learngene.tensors)
        theirs = {"form": method.entry, "parts": count, "key": method.space, "shape": learngene.shape}
        ours = {"form": own.entry, "parts": own.components, "key": space, "shape": self.anchor.shape}
        if not space.scale and not self.manifest.entries:
            ours["key"] = replace(space, scale=method.space.scale)  # the first entry brings it
        for what, value in theirs.items():
            if value != ours[what]:
                raise ArtefactError(f"an increment with {what} {value}; this pool's is {ours[what]}")
        return method

    def methods(self) -> dict[str, Adaptive]:
        """The settings of each entry by its sha256, the oldest first; no tensor is kept."""
        return {row.sha256: cast(Adaptive, self.require(learngene)) for row, learngene in self.entries()}

    def adopt(self, learngene: Learngene, name: str) -> Pool:
        """The pool with this increment, which another copy of the pool may have made.

        Raises:
            ArtefactError: an increment of another anchor, form or key, or one whose parents are not here.
            SettingsError: the name is taken or no name, or the increment is here already.
            StoreError: it cannot be written; the pool is as it was.
        """
        if not isinstance(learngene, Learngene):
            raise SettingsError(f"{learngene!r:.80} given; an increment, a Learngene, would work")
        self._require_own()
        self.require(learngene)
        with _pool_file.changing(self.folder):
            return _pool_write.put(self.current(), learngene, name)

    def current(self) -> Pool:
        """The pool as it is in its folder now: another process may have added to it.

        Raises:
            ArtefactError: its anchor is another one by now.
        """
        now = _pool_file.read_manifest(self.folder)
        if now.anchor != self.manifest.anchor:
            raise ArtefactError(f"{shown(self.folder)} has another anchor by now; load it again")
        return replace(self, manifest=now)

    def _require_own(self) -> None:
        if (self.folder / _pool_file.MANIFEST).is_symlink():
            raise StoreError(
                f"{shown(self.folder)} is in the cache of the Hub's client; `learngene pool pull` makes a folder of "
                "your own"
            )

    def add(
        self,
        images: Images,
        *,
        name: str | None = None,
        recipe: Recipe | None = None,
        ancestor: nn.Module | None = None,
        limit: float = _pool_grow.LIMIT,
        teacher: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
        device: torch.device | str | None = None,
    ) -> Pool:
        """The pool with one more entry, trained on these images alone with everything that is there frozen.

        Args:
            name: of the entry; made from that of the images where left out, as by `learngene pool add`.
            recipe: of the training; ``_pool_grow.RECIPE`` where left out.
            ancestor: a plain ViT finetuned from the anchor. The entry is then its projection, in closed form; with a
                ``recipe`` beside it training begins there.
            limit: a projection without training whose residual is above it is refused.
            teacher: any module images -> logits of the same classes, whose predictions are learned beside the labels.
            dtype: of the increment in its file; float32 where left out.
            state_dir: where an interrupted training goes on.

        Raises:
            DataError: images of another size or channels than the pool's, or too few.
            SettingsError: the name is taken, or a projection above the limit.
            NameTakenError: another process took the name during the training; what was trained is kept in a file that
                the error names, for ``adopt``.
            ShapeError: an ancestor of another shape than the anchor.
        """
        if not isinstance(images, Images):
            raise SettingsError(f"images {images!r:.80} given; Images would work: load_images(SOURCE, size=...)")
        self._require_own()
        pool, chosen = self.current(), _pool_file.name_after(images.name) if name is None else name
        Row(name=chosen, sha256="0" * 64, bytes=9)  # refused now, not after the training
        if chosen in (*pool.names, "anchor"):
            raise SettingsError(f"name {chosen} is in the pool already; another name would work")
        learngene = _pool_grow.grown(
            pool, images, recipe=recipe, ancestor=ancestor, limit=limit, teacher=teacher, watch=watch,
            state_dir=state_dir, device=device,
        )  # fmt: skip
        if dtype is not None:
            small = {name: t.to(dtype) for name, t in learngene.tensors.items() if name.startswith("increment.")}
            learngene = replace(learngene, tensors={**learngene.tensors, **small})
        with _pool_file.changing(pool.folder):
            now = pool.current()
            if now.manifest.key.scale not in (0, pool.manifest.key.scale):  # another process added the first one
                learngene = _pool_grow.rekeyed(now, images, learngene)
            return _pool_write.put_trained(now, learngene, chosen)

    def select(
        self,
        images: Images | Tensor,
        labels: Tensor | None = None,
        *,
        unlabelled: bool = False,
        k: int | None = None,
        tolerance: float = _pool_select.TOLERANCE,
        rule: str = "tals",
        seed: int = 0,
    ) -> Selection:
        """Which entries fit a task, and how much of each, from few of its images; see ``_pool_select.select``.

        Args:
            images: of the pool's size: ``Images``, whose labels are used too unless ``unlabelled``, or pixels, uint8
                (n, channels, size, size).
            labels: int64 (n,) of pixels; without them only the images are looked at.
            k: at most so many entries; 3 where left out, 1 of a pool of the form "blocks" or the topology "chain".
            tolerance: the selection is empty where the task lies farther from the mixture than this times what 95 % of
                samples of the entries' own data do: of as many images, with labels of ten at most.
            rule: "tals", or one to compare it with, see ``_pool_baselines.py``: logme, nearest, soup, anchor.

        Raises:
            SettingsError: the pool is empty, an unknown rule, or ``k`` is out of range.
            DataError: no images, images of another size or channels, or fewer images than classes.
        """
        return _pool_select.select(
            self, images, labels, unlabelled=unlabelled, k=k, tolerance=tolerance, rule=rule, seed=seed
        )  # fmt: skip

    def merge(self, selection: Selection | Mapping[str, float]) -> Learngene:
        """The anchor with the selected increments added: a learngene of the anchor's method, of all its depths and
        widths. ``selection`` may also map names or sha256 of entries to weights, numbers from -10 to 10.

        Raises:
            SettingsError: a selection from another pool, an entry that is named twice, or a weight that is no such
                number.
            RegistryError: an entry that is not there.
        """
        weights = _pool_merge.weights_of(self, selection)
        anchor = self.anchor.in_pool(self.manifest.key.image_size)
        told = {name: weight for name, weight in ((self.row(sha).name, weight) for sha, weight in weights.items())}
        provenance: dict[str, Any] = {**anchor.provenance, "pool": self.manifest.digest, "selection": told}
        return replace(anchor, tensors=self.merged(weights), provenance=provenance) if weights else anchor

    def merged(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The anchor's tensors with these weights (by sha256) of increments and their parents added."""
        return _pool_merge.merged(self, weights)

    def verify(self, *, strangers: bool = True) -> list[str]:
        """What is wrong with the files of this pool, one line each; nothing, where all are as promised.

        ``strangers`` counts files too that no manifest names.
        """
        wrong = [
            f"{name} is in {_pool_file.ENTRIES}, and no entry; `pool add --entry` takes it in, if it is one"
            for name in (_pool_file.strangers(self.folder, self.manifest) if strangers else ())
        ]
        rows = self.manifest.entries
        for place, row in enumerate(rows):
            try:
                method = self.require(self.read(row.sha256))
                _pool_write.require_last(self.manifest, method, rows[:place])
                if missing := sorted(set(method.parents) - {other.sha256 for other in rows[:place]}):
                    wrong.append(f"{row.name} stands on {missing[0][:12]}, which is not there before it")
            except LearngeneError as error:
                wrong.append(f"{row.name}: {error}")
        return wrong

"""Growing a pool: an increment trained on new data alone, or projected from an ancestor. Private to ``pool.py``.

Trained are the increment, which starts at zero, so that the first step is the anchor's, and a head, which is thrown
away; the anchor, its stem and its norms stand still, and so do the entries that the increment stands on. The loss is
the cross-entropy, and with a teacher KL(teacher || model) beside it.

Source: section 3.2 of LDR (NeurIPS 2024) for the frozen components; the rest is our reading, see ``methods/adaptive``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learngene_hub import _pool_features
from learngene_hub._check import is_number
from learngene_hub.data import Augment, Images
from learngene_hub.errors import DataError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _adaptive_merge as merge
from learngene_hub.methods import _auxiliary, get_method
from learngene_hub.methods._adaptive_key import LEAST, Key, Space, key_of, scale_of
from learngene_hub.methods._lesson import Log
from learngene_hub.methods.adaptive import Adaptive
from learngene_hub.shape import Reach, ViTShape
from learngene_hub.training import (
    Recipe,
    StateDir,
    Step,
    classification_loss,
    distillation_loss,
    fit,
    image_batches,
    images_digest,
    logits_of,
    state_digest,
)
from learngene_hub.transforms import BLOCK_KEYS, HEAD_KEYS, expected_shapes

if TYPE_CHECKING:
    from learngene_hub.pool import Pool

LIMIT = 0.6  # of the residual of a projection
OUTSIDE = 0.5  # of how far an ancestor's stem and last norm, which the entry leaves out, may lie from the anchor's
RECIPE = Recipe(
    epochs=30, lr=8e-4, batch_size=64, schedule="cosine", warmup=0.1, augment=Augment(flip=True, crop_padding=4)
)
_UNLABELLED = 0.5  # of what the images alone say: the share of its nearest entries that an increment stands on


def grown(
    pool: Pool,
    images: Images,
    *,
    recipe: Recipe | None,
    ancestor: nn.Module | None,
    limit: float,
    teacher: nn.Module | None,
    watch: Callable[[Iterator[Step]], Iterator[Step]],
    state_dir: StateDir | None,
    device: torch.device | str | None,
) -> Learngene:
    """The increment of these images, with their key; see ``Pool.add``."""
    _pool_features.require_images(images, pool.anchor, pool.manifest.key)
    if len(images) < LEAST:
        raise DataError(f"{images.name} has {len(images)} images; at least {LEAST} make an entry")
    key, space = _key(pool, images)
    parents = _parents(pool, key)
    base = replace(pool.anchor, tensors=pool.merged(parents))
    increment, told = _zero(base.shape, pool.manifest.components), dict[str, Any]()
    if ancestor is not None:
        increment, told = _projected(base, ancestor, pool.table(), None if recipe else limit)
    if ancestor is None or recipe is not None:
        _require_classes(images)
        chosen = recipe or RECIPE
        trainee = Trainee.of(
            base, increment, pool.table(), classes=len(images.classes), image_size=space.image_size, seed=chosen.seed
        )
        told |= trainee.train(
            images, chosen, teacher, watch, _identified(state_dir, pool, images, parents, ancestor, teacher), device
        )
        increment = trainee.increment()
    told |= {"classes": list(images.classes), "counts": images.labels.bincount(minlength=len(images.classes)).tolist()}
    told |= {"data": {images.name: {"images": len(images)}}}
    return _as_learngene(pool, increment, key, space, parents, told)


def _require_classes(images: Images) -> None:
    """Nothing, where an increment can be trained on these images (DataError)."""
    count = len(images.classes)
    if count < 2 or len(images) < count:
        what = f"{images.name} has {len(images)} images of {count} class{'' if count == 1 else 'es'}"
        raise DataError(f"{what}; two classes or more, with an image of each at least, would train an entry")


def rekeyed(pool: Pool, images: Images, learngene: Learngene) -> Learngene:
    """The increment of these images with its key in the space that the pool has by now."""
    key, space = _key(pool, images)
    settings = {**learngene.settings, "key_scale": space.scale}
    return replace(learngene, tensors={**learngene.tensors, **key.tensors()}, settings=settings)


def _key(pool: Pool, images: Images) -> tuple[Key, Space]:
    """The key of a data set, and the space that it is in: the first data set of a pool fixes the scale."""
    space = pool.manifest.key
    model = _pool_features.seeing(pool.anchor, space)
    phi = _pool_features.directions(_pool_features.features(model, images, pool.anchor))
    if not space.scale:
        space = replace(space, scale=scale_of(phi, space.seed))
    return key_of(phi.split(_pool_features.BATCH), space), space


def _parents(pool: Pool, key: Key) -> dict[str, float]:
    """What a new increment stands on beside the anchor: sha256 of entries -> weights."""
    rows = pool.manifest.entries
    if pool.manifest.topology == "star" or not rows:
        return {}
    if pool.manifest.topology == "chain":  # each stands on the one before, and so on all
        return {rows[-1].sha256: 1.0}
    from learngene_hub._pool_select import shortlist

    found = shortlist(pool, key, k=3, tolerance=1.0)
    return {} if found.abstained else {sha: round(_UNLABELLED * share, 6) for sha, share in found.shares.items()}


def _zero(shape: ViTShape, count: int) -> dict[str, Tensor]:
    sizes = expected_shapes(shape, {0})
    return {f"{n}.{key}": torch.zeros(sizes[f"block.0.{key}"]) for n in range(1, count + 1) for key in BLOCK_KEYS}


def _projected(
    base: Learngene, ancestor: nn.Module, table_PN: Tensor, limit: float | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The increment nearest to what an ancestor's blocks have beyond those of ``base``, and what it leaves out.

    Raises:
        SettingsError: it leaves out more than the limit; the ancestor holds NaN, or was not finetuned from the anchor.
        ShapeError: the ancestor is no plain ViT, or has another shape.
    """
    if limit is not None and not (is_number(limit) and limit >= 0):
        raise SettingsError(f"limit {limit!r:.40} asked; it is a share, such as {LIMIT}")
    state = ancestor.state_dict()
    _require_finetuned(base, ancestor, state)
    found, residual = merge.fitted(merge.changes(base, state), merge.layers(base, table_PN))
    if limit is not None and residual > limit:
        raise SettingsError(
            f"a projection with a residual of {residual:.3f} asked, above the limit {limit:g}: {table_PN.shape[1]} "
            "parts cannot hold what the ancestor learned; a recipe beside it (--epochs 5) trains on from there, and a "
            "pool of the entry form blocks holds it whole"
        )
    outside = _outside(base, state)
    if outside > OUTSIDE:
        raise SettingsError(
            f"an ancestor whose stem and last norm lie {outside:.2f} of their size away from the anchor's given, above "
            f"{OUTSIDE:g}; a model that was grown from the anchor and finetuned would work"
        )
    return found, {"residual": round(residual, 6), "outside": round(outside, 6)}


def _require_finetuned(base: Learngene, ancestor: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that is not of the anchor's shape, apart from classes and image size, or holds NaN."""
    have, own = ViTShape.of(ancestor), base.shape
    same = replace(have, classes=own.classes, image_size=own.image_size)
    if odd := [field.name for field in fields(own) if getattr(same, field.name) != getattr(own, field.name)]:
        told = ", ".join(f"{name} {getattr(have, name)} instead of {getattr(own, name)}" for name in odd)
        raise ShapeError(f"an ancestor with {told} given; the anchor itself, finetuned, would work")
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SettingsError(f"an ancestor with NaN or infinite numbers in {name} given; it cannot be projected")


def _outside(base: Learngene, state: Mapping[str, Tensor]) -> float:
    """How far stem and last norm, which stay the anchor's, lie from the ancestor's: |difference| / |theirs|."""
    own = get_method(base.method, base.settings).expand(base, base.shape)
    apart, whole = 0.0, 0.0
    for name, tensor in own.items():
        theirs = state.get(name)
        if name in HEAD_KEYS or name.startswith("blocks.") or tensor is None or theirs is None:
            continue
        if theirs.shape == tensor.shape:  # positions at another image size cannot be compared
            apart += float((theirs.cpu().float() - tensor.float()).square().sum())
            whole += float(theirs.float().square().sum())
    return (apart / whole) ** 0.5 if whole else 0.0


def _identified(
    state_dir: StateDir | None,
    pool: Pool,
    images: Images,
    parents: Mapping[str, float],
    ancestor: nn.Module | None,
    teacher: nn.Module | None,
) -> StateDir | None:
    """Where a run keeps its state, which another run is then refused."""
    if state_dir is None:
        return None
    facts = {"anchor": pool.manifest.anchor.sha256, "parents": dict(parents), "data": images_digest(images)}
    facts |= {name: state_digest(m) for name, m in (("begun", ancestor), ("teacher", teacher)) if m is not None}
    return replace(state_dir, identity={**state_dir.identity, **facts})


@dataclass(frozen=True, eq=False)
class Trainee:
    """The model of an anchor and one increment: a module whose parameters are the increment and a head."""

    module: _auxiliary.Auxiliary
    preprocessing: Any
    flops: int  # of one image's forward

    @classmethod
    def of(
        cls,
        base: Learngene,
        increment: Mapping[str, Tensor],
        table_PN: Tensor,
        *,
        classes: int,
        image_size: int,
        seed: int = 0,
    ) -> Trainee:
        """A trainee for images of this size and number of classes; its head is drawn with ``seed``."""
        shape = replace(base.shape, classes=classes, image_size=image_size)
        base, frozen = base.to(torch.float32), _auxiliary.FROZEN
        plain = get_method(base.method, base.settings).expand(base, shape)
        rest = {name: t for name, t in plain.items() if not (name in HEAD_KEYS or name.startswith("blocks."))}
        held = {f"{frozen}.rest.{name}": tensor for name, tensor in rest.items() if tensor is not None}
        held |= _auxiliary.prefixed(f"{frozen}.blocks", merge.blocks_of(plain, shape.depth))
        layers = {key: phi_LN.float() for key, phi_LN in merge.layers(base, table_PN).items()}
        held |= _auxiliary.prefixed(f"{frozen}.layers", layers)

        def expand(learngene: Learngene, shape: ViTShape) -> Mapping[str, Tensor | None]:
            # Not by the method's own ``expand``, which would make the anchor anew at each update.
            del shape
            still = learngene.group(f"{frozen}.blocks")
            blocks = merge.raised(still, learngene.group("increment"), learngene.group(f"{frozen}.layers"))
            return {**learngene.group(f"{frozen}.rest"), **blocks}

        blank = replace(base, tensors={**_auxiliary.prefixed("increment", increment), **held})
        weight = torch.empty(classes, shape.width)
        nn.init.trunc_normal_(weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        head = {"weight": weight, "bias": torch.zeros(classes)}
        return cls(_auxiliary.Auxiliary(blank, expand, shape, head), base.preprocessing, shape.flops())

    def train(
        self,
        images: Images,
        recipe: Recipe,
        teacher: nn.Module | None,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
        state_dir: StateDir | None,
        device: torch.device | str | None,
    ) -> dict[str, Any]:
        """Trains the increment and the head; what it took."""
        batches, per_epoch = image_batches(images, recipe, self.preprocessing)
        loss, log = classification_loss(recipe), Log()
        if teacher is not None:
            loss = _taught(loss, teacher, len(images.classes))
        steps = fit(
            self.module, batches, loss, recipe=recipe, steps_per_epoch=per_epoch, state_dir=state_dir, device=device,
            extra=log,
        )  # fmt: skip
        for step in watch(steps):
            log.add(step)
        return {
            "recipe": asdict(recipe), "loss": log.losses, "steps": log.steps, "images_seen": log.images,
            "flops": log.images * self.flops,
        }  # fmt: skip

    def increment(self) -> dict[str, Tensor]:
        """What was trained, without the head: "n.key" -> tensor on the CPU."""
        return {name.removeprefix("increment."): tensor for name, tensor in self.module.found().items()}


def _taught(loss: Callable[[Any, Any], Tensor], teacher: nn.Module, classes: int) -> Callable[[Any, Any], Tensor]:
    """The loss with KL(teacher || model) added, on the pixels that the model sees."""

    def both(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, _ = batch
        teacher.to(pixels.device).eval()
        with torch.no_grad():
            said = logits_of(teacher(pixels))
        if said.shape[-1] != classes:
            raise SettingsError(
                f"a teacher of {said.shape[-1]} classes asked; the images have {classes}, which would work"
            )
        logits = logits_of(model(pixels))
        return loss(lambda _: logits, batch) + distillation_loss(logits, said)

    return both


def _as_learngene(
    pool: Pool,
    increment: Mapping[str, Tensor],
    key: Key,
    space: Space,
    parents: Mapping[str, float],
    told: dict[str, Any],
) -> Learngene:
    anchor, native = pool.anchor, pool.anchor.shape
    method = Adaptive(
        anchor=pool.manifest.anchor.sha256, entry=pool.manifest.entry, parents=dict(parents),
        key_features=space.features, key_seed=space.seed, key_scale=space.scale, key_size=space.image_size,
    )  # fmt: skip
    tensors = {f"increment.{name}": tensor.contiguous() for name, tensor in increment.items()} | key.tensors()
    return Learngene(
        tensors=tensors, method=method.name, settings=asdict(method), shape=native,
        reach=Reach(depths=(native.depth,) * 2, widths=(native.width, native.width, native.head_dim)),
        ancestor=anchor.ancestor, preprocessing=anchor.preprocessing, license=anchor.license, provenance=told,
    )  # fmt: skip

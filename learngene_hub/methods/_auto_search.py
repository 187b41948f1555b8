"""Auto-Learngene's search: a pseudo descendant trained on the open-world classes, and the similarity matrix it leaves.

Source: arXiv:2305.02279 (see ``_auto_loop.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learngene_hub.data import Augment, Images, normalise, seed_of
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.methods._auto_loop import Bilevel, Inner, Searched
from learngene_hub.methods._auto_matching import MetaNetwork, Pseudo, channels, pool
from learngene_hub.shape import Preprocessing
from learngene_hub.training import Recipe, StateDir, Step, fit, image_batches

if TYPE_CHECKING:
    from learngene_hub.methods.auto import Auto

Built = TypeVar("Built", bound=nn.Module)
Watch = Callable[[Iterator[Step]], Iterator[Step]]


@dataclass(frozen=True)
class Pair:
    """The ancestor and an untrained pseudo descendant, both for the images' size and each with its features."""

    ancestor: nn.Module  # frozen, in eval mode
    pseudo: nn.Module
    flops: tuple[int, int]  # of one image's forward
    steps: int  # T as published for this kind
    match: float  # c as published for this kind


@dataclass(frozen=True)
class Found:
    """What a search found: S of M groups of the ancestor and N of the pseudo descendant."""

    similarity: Tensor  # (M, N)
    provenance: dict[str, Any]


def joined(data: Mapping[str, Images], in_chans: int) -> Images:
    """All images as one set whose classes are those of all sets, side by side (our reading, where there are several).

    Raises:
        SettingsError: no data, or of one class alone.
        DataError: images of different shapes, of other channels than ``in_chans``, or none.
    """
    if not data:
        raise SettingsError("no data sets asked; auto needs at least one, of classes that the ancestor was not taught")
    shapes = {name: tuple(images.pixels.shape[1:]) for name, images in data.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"images of shapes {shapes} asked; load all with one size")
    if (given := next(iter(shapes.values()))[0]) != in_chans:
        raise DataError(f"images of {given} channels asked; the ancestor takes {in_chans}")
    if empty := [name for name, images in data.items() if not len(images)]:
        raise DataError(f"{empty[0]} is empty; auto needs images")
    classes, labels = [], []
    for name, images in data.items():
        labels.append(images.labels + len(classes))
        classes += [f"{name} {each}" for each in images.classes]
    if len(classes) < 2:
        raise SettingsError(f"one class asked, {classes[0]}; a cross-entropy needs at least 2")
    pixels = torch.cat([images.pixels for images in data.values()])
    return Images(pixels, torch.cat(labels), tuple(classes), "+".join(data))


def drawn(make: Callable[[], Built], *seed: int | str) -> Built:
    """What ``make`` builds, its random numbers drawn with the seed; the caller's are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("auto", *seed))
        return make()


def recipe(method: Auto) -> Recipe:
    """The recipe of phi, for ``fit``: its decay is in its gradient.

    Raises:
        SettingsError: a setting is out of its range.
    """
    return Recipe(
        epochs=method.epochs, lr=method.meta_lr, batch_size=method.batch_size, weight_decay=0.0, schedule="constant",
        augment=Augment(flip=method.flip, crop_padding=method.crop_padding), seed=method.seed,
    )  # fmt: skip


def search(
    method: Auto,
    pair: Pair,
    images: Images,
    names: Mapping[str, int],
    preprocessing: Preprocessing,
    watch: Watch,
    state: StateDir | None,
) -> Found:
    """Run the bilevel loop; ``state`` continues an interrupted one.

    Raises:
        SettingsError: several processes, whose pseudo descendants would each be another one.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise SettingsError(f"{dist.get_world_size()} processes asked; auto searches in one")
    phi_recipe = recipe(method)
    batches, per_epoch = image_batches(images, phi_recipe, preprocessing)
    meta = fixed_batch(method, images, preprocessing).cpu()
    with torch.no_grad():
        features = pair.ancestor(meta)[1]
        shapes = _shapes_of(pair.pseudo, meta[:1])
    sizes, widths = [pool(each).shape[1] for each in features], [channels(each) for each in features]
    own = [channels(each) for each in shapes]
    model = drawn(
        lambda: Searched(Pseudo(pair.pseudo, widths, own), MetaNetwork(sizes, len(own))), method.seed, "matchers"
    )
    steps = method.inner_steps or pair.steps
    cosine = Recipe(epochs=method.epochs, lr=method.lr, schedule="cosine", warmup=0.0)
    inner = Inner(
        lr=method.lr, momentum=method.momentum, weight_decay=method.weight_decay, steps=steps,
        match=method.match or pair.match, order=method.order,
    )  # fmt: skip
    of = method.epochs * per_epoch
    loop = Bilevel(
        features, meta, inner, lambda step: method.lr * cosine.rate(step, of), phi_decay=method.meta_weight_decay,
        last=of - per_epoch + 1,
    )  # fmt: skip
    for step in watch(
        fit(
            model,
            batches,
            loop.loss,
            recipe=phi_recipe,
            steps_per_epoch=per_epoch,
            state_dir=state,
            extra=loop,
            groups=[{"name": "phi", "params": list(model.phi.parameters()), "weight_decay": 0.0}],
        )  # fmt: skip
    ):
        loop.after(step)
    return Found(loop.similarity(), _report(loop, pair, inner, images, names))


@torch.no_grad()
def _shapes_of(pseudo: nn.Module, x: Tensor) -> list[Tensor]:
    """The features of one image, for their shapes; running statistics stay as they are."""
    try:
        return pseudo.eval()(x)[1]
    finally:
        pseudo.train()


def fixed_batch(method: Auto, images: Images, preprocessing: Preprocessing) -> Tensor:
    """The batch of the match term, normalised and not augmented: as many images as asked, drawn with the seed.

    As published it is one arbitrary batch; which one is drawn is our reading.
    """
    count = min(method.meta_batch or method.batch_size, len(images))
    generator = torch.Generator().manual_seed(seed_of("auto", method.seed, "fixed batch"))
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.pixels.device)
    return normalise(images.pixels[chosen], preprocessing)


def _report(loop: Bilevel, pair: Pair, inner: Inner, images: Images, names: Mapping[str, int]) -> dict[str, Any]:
    """The provenance of a search."""
    fixed = len(loop.meta)
    once, pseudo = pair.flops
    forwards = 3 * loop.images + (1 + inner.steps) * fixed * loop.step  # of the pseudo descendant, images
    return {
        "data": {name: {"images": count} for name, count in names.items()},
        "classes": len(images.classes),
        "image_size": images.pixels.shape[-1],
        "gradients": "second order" if inner.order == 2 else "first order, an approximation of the published method",
        "inner_steps": inner.steps,
        "match_weight": inner.match,
        "fixed_batch": fixed,
        "steps": loop.step,
        "images_seen": loop.images,
        "flops": forwards * pseudo + fixed * once,  # of forwards, all steps of the inner loop counted
        "seconds": round(loop.seconds, 3),
        "silent": [[round(share, 4) for share in row] for row in loop.silence().tolist()],
        "log": loop.log,
    }

"""Which descendant is meant: its shape, from the sizes that were asked, each of which may be left out. Private to
``factory.py``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from learngene_hub._check import require_int
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method, growth_of, is_planning
from learngene_hub.methods._plain_plan import plan_plain
from learngene_hub.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is asked of a descendant; None: left out."""

    depth: int | None = None
    width: int | None = None
    heads: int | Sequence[int] | None = None
    num_labels: int | None = None
    image_size: int | None = None
    in_chans: int = 3


def with_settings(learngene: Learngene, settings: Mapping[str, Any] | None) -> Learngene:
    """The same learngene with these settings laid over its own; itself where there are none.

    Raises:
        SettingsError: a setting that its method does not have, one that acts at extraction alone, a value out of its
            range, or one that its tensors do not fit.
    """
    if not settings:
        return learngene
    kind: Any = type(get_method(learngene.method, learngene.settings))
    acting = growth_of(kind)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else settings.keys()
    if acting is not None and (odd := sorted(settings.keys() - known)):
        near = difflib.get_close_matches(odd[0], acting, n=1)
        raise SettingsError(
            f"{learngene.method} has no setting {odd[0]!r}; {f'did you mean {near[0]!r}? ' if near else ''}"
            f"of a learngene that is extracted already {', '.join(acting) or 'none'} act"
        )
    changed = replace(learngene, settings={**learngene.settings, **settings})
    method = get_method(changed.method, changed.settings)
    if acting is not None and (idle := sorted(settings.keys() - set(acting))):
        raise SettingsError(
            f"setting {idle[0]} asked of a learngene that is extracted already; of {changed.method} "
            f"{', '.join(acting) or 'none'} act at growth, and {idle[0]} at extraction"
        )
    try:
        method.check({name: tuple(tensor.shape) for name, tensor in changed.tensors.items()}, changed.shape)
    except ArtefactError as error:
        raise SettingsError(
            f"settings {dict(settings)} asked; this learngene was not made with them: {error}"
        ) from error
    return changed


def plan_of(learngene: Learngene, sizes: Sizes) -> Shape:
    """The shape of these sizes, of which those left out are the native ones, of the images the pool's; of no budget.

    Raises:
        ShapeError: there is no such network, or it is outside the learngene's reach.
    """
    labels = sizes.num_labels
    if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int) or labels < 1):
        raise ShapeError(f"num_labels {labels!r} asked; a classifier has a whole number of at least 1")
    asked = None if sizes.heads is None else _heads(sizes.heads)
    _require_sizes(learngene, {name: getattr(sizes, name) for name in ("depth", "width", "image_size", "in_chans")})
    size = learngene.pool_size if sizes.image_size is None else sizes.image_size
    method = get_method(learngene.method, learngene.settings)
    if is_planning(method):
        return method.plan(
            learngene, depth=sizes.depth, width=sizes.width, heads=asked, num_labels=labels,
            image_size=size, in_chans=sizes.in_chans,
        )  # fmt: skip
    return plan_plain(
        learngene, depth=sizes.depth, width=sizes.width, heads=asked, num_labels=labels,
        image_size=size, in_chans=sizes.in_chans,
    )  # fmt: skip


def _require_sizes(learngene: Learngene, sizes: Mapping[str, int | None]) -> None:
    """Nothing, where each of them is None or a whole number from 1 on.

    Raises:
        ShapeError: one is not; of a depth or a width below 1 it names what is within reach.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if name in ("depth", "width") and type(size) is int and size < 1:
            native = {"depth": learngene.shape.depth, "width": learngene.shape.width}
            learngene.reach.require(**native | {name: size})
        require_int(name, size, at_least=1)


def _heads(heads: Any) -> int | tuple[int, ...]:
    """One number of heads, or one for each block.

    Raises:
        ShapeError: it is neither.
    """
    numbers: tuple[Any, ...] = tuple(heads) if isinstance(heads, (list, tuple)) and heads else (heads,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ShapeError(f"heads {number!r} asked; it is a whole number, or one for each block")
        if number < 1:
            raise ShapeError(f"{number} heads asked; 1 is the least that works")
    return numbers if isinstance(heads, (list, tuple)) else numbers[0]

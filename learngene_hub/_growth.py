"""Growing: which descendant is meant, and its model with every tensor in place. Private to ``factory.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub._check import require_int
from learngene_hub.errors import ArtefactError, LearngeneError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method, growth_of, is_planning
from learngene_hub.methods._plain_plan import plan_plain
from learngene_hub.shape import Shape

MAX_PARAMS = 2_000_000_000  # the default budget of a descendant, parameters


def with_settings(learngene: Learngene, settings: Mapping[str, Any] | None) -> Learngene:
    """The same learngene with these settings laid over its own; itself where there are none.

    Raises:
        SettingsError: a setting that its method does not have, one that acts at extraction alone, a value out of its
            range, or one that its tensors do not fit.
    """
    if not settings:
        return learngene
    changed = replace(learngene, settings={**learngene.settings, **settings})
    method = get_method(changed.method, changed.settings)
    acting = growth_of(type(method))
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


def plan(
    learngene: Learngene,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    image_size: int | None = None,
    in_chans: int = 3,
    max_params: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Shape:
    """The shape that ``expand`` would grow with these sizes, checked, without allocating anything.

    Raises:
        ShapeError: there is no such network, or it is outside the learngene's reach.
        BudgetError: it has more than ``max_params`` parameters (MAX_PARAMS where left out).
        SettingsError: ``settings`` that this learngene cannot be grown with.
    """
    learngene = with_settings(learngene, settings)
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ShapeError(f"num_labels {num_labels!r} asked; a classifier has a whole number of at least 1")
    if max_params is not None:
        require_int("max_params", max_params, at_least=1)
    asked = None if heads is None else _heads(heads)
    _require_sizes(learngene, {"depth": depth, "width": width, "image_size": image_size, "in_chans": in_chans})
    method = get_method(learngene.method, learngene.settings)
    if is_planning(method):
        shape = method.plan(
            learngene, depth=depth, width=width, heads=asked, num_labels=num_labels, image_size=image_size,
            in_chans=in_chans, max_params=max_params,
        )  # fmt: skip
    else:
        shape = plan_plain(
            learngene, depth=depth, width=width, heads=asked, num_labels=num_labels, image_size=image_size,
            in_chans=in_chans,
        )  # fmt: skip
    shape.require_budget(MAX_PARAMS if max_params is None else max_params)
    return shape


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


def expand(
    learngene: Learngene,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    image_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_params: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The timm model of these sizes grown from ``learngene``; a size left out is the native one.

    What the method leaves fresh (the head) is drawn with ``seed``, as ``Shape.fresh`` says; in a ViT: weights from a
    normal of 0.02 cut at 2 deviations, biases 0, norms 1. ``dtype`` defaults to float32. ``settings`` are laid over
    those of the learngene for this call, such as ``{"components": 2}`` of ldr.

    Raises:
        ShapeError: there is no such network, or it is outside the learngene's reach.
        BudgetError: it has more than ``max_params`` parameters; nothing was allocated.
        SettingsError: ``settings`` that this learngene cannot be grown with.
    """
    learngene = with_settings(learngene, settings)
    shape = plan(
        learngene, depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size,
        in_chans=in_chans, max_params=max_params,
    )  # fmt: skip
    return grow(learngene, shape, drop_path_rate=drop_path_rate, dtype=dtype, device=device, seed=seed)


@torch.inference_mode(False)
def grow(
    learngene: Learngene,
    shape: Shape,
    *,
    drop_path_rate: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> nn.Module:
    """The timm model of a planned ``shape``, in eval mode; counters (whole numbers) stay whole numbers in any dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise ShapeError(f"dtype {dtype} asked; torch.float32, torch.bfloat16 and torch.float16 would work")
    model = shape.build(device="meta", drop_path_rate=drop_path_rate, preprocessing=learngene.preprocessing)
    wanted = model.state_dict()
    state = grown_state(learngene, shape, {name: tensor.shape for name, tensor in wanted.items()}, seed=seed)
    place, number = torch.device(device or "cpu"), dtype or torch.float32
    owned: set[int] = {tensor.untyped_storage().data_ptr() for tensor in learngene.tensors.values()}
    for name in list(state):
        kind = number if wanted[name].is_floating_point() else wanted[name].dtype
        tensor = state[name].to(place, kind).contiguous()
        state[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in owned else tensor
        owned.add(state[name].untyped_storage().data_ptr())
    model.load_state_dict(state, strict=True, assign=True)
    _require_whole(model, wanted)
    return model.eval()


def _require_whole(model: nn.Module, wanted: Iterable[str]) -> None:
    """Nothing, where no buffer beside those of the state dict was left unallocated.

    Raises:
        LearngeneError: one was.
    """
    known = set(wanted)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in known]
    if left:
        raise LearngeneError(f"{type(model).__name__} keeps {left[0]} outside its state dict; nothing can fill it")


@torch.no_grad()
def grown_state(
    learngene: Learngene,
    shape: Shape,
    wanted: Mapping[str, torch.Size],
    *,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The state dict of a descendant, ``wanted`` (name -> size): what the method expands, the rest drawn with ``seed``.

    Raises:
        LearngeneError: the method's names are not those of the model, or a tensor has another shape.
        SettingsError: ``settings`` that this learngene cannot be grown with.
    """
    learngene = with_settings(learngene, settings)
    expanded = get_method(learngene.method, learngene.settings).expand(learngene, shape)
    silent, unknown = sorted(wanted.keys() - expanded.keys()), sorted(expanded.keys() - wanted.keys())
    if silent or unknown:
        raise LearngeneError(f"{learngene.method} does not account for {silent} and invents {unknown}")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in wanted.items():
        tensor = expanded[name]
        if tensor is None:
            tensor = shape.fresh(name, size, generator)
        if tensor.shape != size:
            raise LearngeneError(f"{learngene.method} makes {name} {list(tensor.shape)}; the model's is {list(size)}")
        state[name] = tensor.detach()
    return state

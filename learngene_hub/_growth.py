"""Growing: which descendant is meant, and its model with every tensor in place. Private to ``factory.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub._planning import Sizes
from learngene_hub._planning import with_settings as with_settings
from learngene_hub._sizing import MAX_PARAMS as MAX_PARAMS
from learngene_hub._sizing import Budget, Prefer, choose
from learngene_hub.errors import LearngeneError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import get_method
from learngene_hub.shape import Shape


def plan(
    learngene: Learngene,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | Sequence[int] | None = None,
    num_labels: int | None = None,
    image_size: int | None = None,
    in_chans: int = 3,
    max_params: float | None = None,
    max_flops: float | None = None,
    max_bytes: float | None = None,
    max_latency_ms: float | None = None,
    prefer: Prefer = "balanced",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Shape:
    """The shape that ``expand`` would grow with these sizes, checked, without allocating anything.

    A size left out is the native one; beside a budget (``max_...``) a depth or width left out is chosen, as
    ``_sizing.py`` says. ``dtype`` and ``device`` are those of ``max_bytes`` and ``max_latency_ms``.

    Raises:
        ShapeError: there is no such network, or it is outside the learngene's reach.
        BudgetError: the network asked, or every one within reach, is beyond the budget (MAX_PARAMS where left out).
        SettingsError: ``settings`` that this learngene cannot be grown with, or an unknown ``prefer``.
    """
    learngene = with_settings(learngene, settings)
    sizes = Sizes(
        depth=depth, width=width, heads=heads, num_labels=num_labels, image_size=image_size, in_chans=in_chans
    )
    budget = Budget(
        max_params=max_params, max_flops=max_flops, max_bytes=max_bytes, max_latency_ms=max_latency_ms, dtype=dtype,
        device=device,
    )  # fmt: skip
    return choose(learngene, sizes, budget, prefer)


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
    max_params: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The timm model of these sizes grown from ``learngene``; a size left out is the native one, beside ``max_params``
    the best that fits (``plan``, which takes other budgets too).

    What the method leaves fresh (the head) is drawn with ``seed``, as ``Shape.fresh`` says; in a ViT: weights from a
    normal of 0.02 cut at 2 deviations, biases 0, norms 1. ``dtype`` defaults to float32. ``settings`` are laid over
    those of the learngene for this call, such as ``{"components": 2}`` of ldr.

    Raises:
        ShapeError: there is no such network, or it is outside the learngene's reach.
        BudgetError: more than ``max_params`` parameters; nothing was allocated.
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

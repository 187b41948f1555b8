"""What the kinds of shapes have in common: how their timm model is built, and what is said of one that is too large.

Importing this file imports neither timm nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from learngene_hub._check import is_number, require_keys
from learngene_hub.errors import BudgetError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from learngene_hub._kinds import Shape
    from learngene_hub.shape import Preprocessing

# Of timm's ViTs on "meta": ten times as fast, and there is nothing to initialise.
SKIPPED: Mapping[str, Any] = MappingProxyType({"weight_init": "skip"})


def build(
    shape: Shape,
    *,
    device: torch.device | str,
    drop_path_rate: float,
    preprocessing: Preprocessing,
    on_meta: Mapping[str, Any] = SKIPPED,
) -> nn.Module:
    """``timm.create_model`` with the arguments of ``shape``, and with ``on_meta`` where nothing is allocated.

    The ``pretrained_cfg`` is complete, so that timm can save the model. The global random state is left as it was.

    Raises:
        ShapeError: drop_path_rate is outside [0, 1).
    """
    import timm
    import torch

    import learngene_hub.architectures  # noqa: F401  # timm finds those of ours by their names

    if not (is_number(drop_path_rate) and 0 <= drop_path_rate < 1):
        raise ShapeError(f"drop_path_rate {drop_path_rate!r} asked; it must be at least 0 and below 1")
    place = torch.device(device)
    arguments = shape.model_args() | (dict(on_meta) if place.type == "meta" else {})
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    forked = [] if place.type in ("cpu", "meta") else [place.index or 0]
    with torch.random.fork_rng(devices=forked, device_type=place.type if forked else "cuda"):
        return timm.create_model(
            shape.architecture,
            pretrained=False,
            pretrained_cfg=shape.pretrained_cfg(preprocessing),
            num_classes=shape.classes,
            device=place,
            **arguments,
        )


@lru_cache(maxsize=512)
def keys(shape: Shape) -> frozenset[str]:
    """The names of the built model's state dict."""
    return frozenset(shape.build(device="meta").state_dict())


def require_budget(shape: Shape, max_params: int, what_fits: Callable[[], str]) -> None:
    """Nothing, where ``shape`` has at most ``max_params`` parameters.

    Raises:
        BudgetError: it has more; the message ends with ``what_fits()``.
    """
    if shape.params() > max_params:
        raise BudgetError(
            f"{shape} asked: {shape.params():,} parameters; at most {max_params:,} are allowed: {what_fits()}"
        )


def own_fields(cls: Any, values: Mapping[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """``values`` without the name of the kind, for the constructor of ``cls``.

    Raises:
        ShapeError: a key is unknown or missing, or the kind is another.
    """
    known = [field.name for field in fields(cls)]
    require_keys(values, known=[*known, "kind"], needed=needed, error=ShapeError)
    if values.get("kind", cls.kind) != cls.kind:
        raise ShapeError(f"a shape of kind {values['kind']!r:.40} given; a {cls.__name__} is of kind {cls.kind!r}")
    return {name: value for name, value in values.items() if name != "kind"}

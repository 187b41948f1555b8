"""LeTs' training: the learngene and its maps, trained inside the auxiliary by one run of ``fit``.

Every step expands once, in float32 and outside autocast, and runs timm's own model, built on the meta device, with what
came out (``_auxiliary.py``). What the auxiliary learns from stands in ``_lesson.py``. Source: see ``lets.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary, _lesson
from learngene_hub.methods._lets_maps import Groups, narrow
from learngene_hub.methods._lets_start import initial_tensors
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import NEVER_DECAYED, StateDir

if TYPE_CHECKING:
    from learngene_hub.methods.lets import Lets


@dataclass(frozen=True)
class Found:
    """What was trained: the learngene's tensors, the shapes of the auxiliary and of the learngene inside it."""

    tensors: dict[str, Tensor]
    native: ViTShape
    small: ViTShape
    provenance: dict[str, Any]


def train(
    method: Lets,
    ancestor: nn.Module,
    data: Mapping[str, Images],
    preprocessing: Preprocessing,
    watch: _lesson.Watch,
    state: StateDir | None,
    teacher: Teacher | None,
) -> Found:
    """See ``Lets.extract``."""
    lesson = _lesson.prepare(
        method, ancestor, data, depth=method.depth, method=method.name, preprocessing=preprocessing, teacher=teacher
    )
    native = lesson.native
    small = narrow(native, method.learngene_depth, method.learngene_width)
    Groups.of(native.depth, small.depth)
    model = auxiliary(method, native, initial_tensors(method, native, small, ancestor), preprocessing)
    lesson.ask(state)
    log = _lesson.train(model, lesson, method.recipe(), watch, state, groups(model))
    provenance = _lesson.report(lesson, [log]) | {"learngene": str(small)}
    return Found(dict(sorted(model.found().items())), native, small, provenance)


def auxiliary(
    method: Lets, native: ViTShape, tensors: Mapping[str, Tensor], preprocessing: Preprocessing
) -> _auxiliary.Auxiliary:
    """The auxiliary of shape ``native`` of these tensors, the classifier among them."""
    frame = Learngene(
        tensors=tensors, method=method.name, settings={}, shape=native, ancestor={}, license="", provenance={},
        reach=Reach(depths=(1, native.depth), widths=(native.head_dim, native.width, native.head_dim)),
        preprocessing=preprocessing,
    )  # fmt: skip
    whole = replace(method, select="continuous", layer_map=(), coefficients=(), head="inherit")
    return _auxiliary.Auxiliary(frame, whole.expand, native, {}, drop_path=method.drop_path)


def groups(model: _auxiliary.Auxiliary) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; vectors, coefficients of G, class token and position embeddings do not."""
    named = dict(sorted(model.tensors().items()))
    plain = {
        name
        for name, tensor in named.items()
        if tensor.ndim < 2 or name.startswith("depth.") or name.rsplit(".", 1)[-1] in NEVER_DECAYED
    }
    decays = {"name": "decay", "params": [tensor for name, tensor in named.items() if name not in plain]}
    stays = {"name": "no-decay", "params": [tensor for name, tensor in named.items() if name in plain]}
    return [decays, stays | {"weight_decay": 0.0}]

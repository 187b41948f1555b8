"""What a learngene of ``heuristic`` holds of a ViT or a CNN, by which names, and its provenance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from learngene_hub import transforms
from learngene_hub.data import Images
from learngene_hub.methods import _heuristic_cut as cut
from learngene_hub.methods._heuristic_tasks import Stream
from learngene_hub.shape import ViTShape


def anchored(native: Any, kept: Sequence[int], shape: Any = None) -> dict[str, str]:
    """The parameters of the kept layers: name in a learngene -> name in a descendant of ``shape`` (None: in the
    ancestor)."""
    if isinstance(native, ViTShape):
        first = kept[0] if shape is None else shape.depth - len(kept)
        places = enumerate(kept, first)
        return {f"block.{i}.{key}": f"blocks.{place}.{key}" for place, i in places for key in transforms.BLOCK_KEYS}
    whole = {name: theirs for name, (theirs, _) in cut.stored(native, kept).items()}
    names = whole if shape is None else cut.placed(native, kept, shape)
    return {name: theirs for name, theirs in names.items() if "running_" not in name}


def expected(native: Any, kept: Sequence[int], *, stem: bool, fisher: bool) -> dict[str, tuple[int, ...]]:
    """Name -> size of what a learngene of these layers holds.

    Raises:
        ArtefactError: layers that the ancestor does not have.
    """
    if isinstance(native, ViTShape):
        want = transforms.expected_shapes(native, set(kept))
        want = {name: size for name, size in want.items() if stem or not name.startswith("stem.")}
    else:
        want = cut.expected(native, kept)
    return want | ({f"fisher.{name}": want[name] for name in anchored(native, kept)} if fisher else {})


def names(native: Any) -> list[str]:
    """The names of the layers, in the ancestor."""
    if isinstance(native, ViTShape):
        return [f"blocks.{i}" for i in range(native.depth)]
    return [unit.conv.name for unit in cut.units(native)]


def numbers(names: Mapping[str, Any], group: str) -> list[int]:
    """The numbers n of the names ``group.n.rest``, ascending; what is no number is -1."""
    seconds = {name.split(".")[1] for name in names if name.startswith(f"{group}.")}
    return sorted({int(text) if text.isdecimal() and len(text) <= 4 else -1 for text in seconds})


def report(data: Mapping[str, Images], stream: Stream | None, began: float) -> dict[str, Any]:
    """The provenance: what was looked at, what the tasks cost (``began``: ``time.perf_counter``), and the curves."""
    report: dict[str, Any] = {
        "data": {name: {"images": len(images)} for name, images in data.items()},
        "steps": stream.steps if stream else 0,
        "images_seen": stream.images_seen if stream else 0,
        "flops": stream.flops if stream else 0,  # of training: images seen times the FLOPs of one
        "seconds": round(time.perf_counter() - began, 3),
    }
    return report | ({"calmness": stream.curve.facts()} if stream else {})

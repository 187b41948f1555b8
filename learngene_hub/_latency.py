"""How long a network takes for one image on this device, and how much memory: measured, and kept on disk. Private to
``factory.py``.

A measurement is of one forward in eval mode, batch 1, without gradients, on random weights and pixels: the median of 5
to 50 runs after 3 that do not count. It is kept in a file of its own in ``latency/`` of the package's cache: the folder
LEARNGENE_CACHE, or else ``learngene_hub`` in XDG_CACHE_HOME or ``~/.cache``. The key is the name of the device, of a
CPU also the number of threads, torch's version, the dtype and the whole shape with its image size. What else the
machine was doing at the time is not in it: ``again=True`` measures anew.

Peak memory is that of the weights and the forward together, the image not counted. On a GPU it is what torch's
allocator says; elsewhere the tensors alive at once are counted, and what a kernel uses inside itself is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learngene_hub.errors import SettingsError
from learngene_hub.shape import Shape

ENVIRONMENT = "LEARNGENE_CACHE"
FORMAT = 1  # of the kept files and of the way of measuring
WARM_UP, LEAST, MOST = 3, 5, 50  # forwards
ENOUGH = 1.0  # seconds of measuring, after which LEAST forwards suffice


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one forward of one image took."""

    ms: float  # milliseconds
    peak_bytes: int  # of weights and activations


def measured(
    shape: Shape,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    again: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """What a network of ``shape`` takes on ``device`` (the CPU where left out) in ``dtype`` (float32).

    Args:
        again: measure it even where it was measured before, and keep the new numbers.
        clock: seconds.

    Raises:
        SettingsError: there is no such device here.
    """
    place, number = _device(device), dtype or torch.float32
    key = _key(shape, place, number)
    path = cache_folder() / "latency" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    kept = None if again else _read(path, key)
    if kept is not None:
        return kept
    found = measure(shape, place, number, clock)
    _write(path, {"key": json.loads(key), "ms": found.ms, "peak_bytes": found.peak_bytes})
    return found


def cache_folder() -> Path:
    """The folder of what this package keeps and could make again."""
    if own := os.environ.get(ENVIRONMENT):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "learngene_hub"


@torch.inference_mode()
def measure(shape: Shape, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Measured:
    """The measurement itself."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if gpu else 0
    generator = torch.Generator().manual_seed(0)
    model = _filled(shape, device, dtype, generator)
    size = (1, shape.in_chans, shape.image_size, shape.image_size)
    pixels = torch.randn(size, generator=generator).to(device, dtype)
    _wait(device)
    for _ in range(WARM_UP):
        model(pixels)
    _wait(device)
    seconds = _timed(lambda: model(pixels), device, clock)
    if gpu:
        peak = torch.cuda.max_memory_allocated(device) - before - pixels.nbytes
    else:
        peak = _weights_bytes(model) + _activations_bytes(model, pixels)
    return Measured(ms=1000 * statistics.median(seconds), peak_bytes=peak)


def _timed(forward: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of LEAST to MOST forwards."""
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < ENOUGH):
        began = clock()
        forward()
        _wait(device)
        seconds.append(clock() - began)
    return seconds


def _filled(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """The model with small random weights, and ones in its buffers: initialising it takes longer than measuring."""
    model = shape.build(device="meta").to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
    for buffer in model.buffers():
        buffer.fill_(1)
    return model.to(device, dtype)


def _wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _weights_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _activations_bytes(model: nn.Module, pixels: Tensor) -> int:
    """The most bytes that the tensors made by one forward had at once."""
    with _Alive() as alive:
        model(pixels)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts, after every operation, the bytes of the storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, Any] = {}  # address -> reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:  # a view makes nothing
                storage = leaf.untyped_storage()
                self._made[storage.data_ptr()] = weakref.ref(storage)
        alive = {place: storage for place, made in self._made.items() if (storage := made()) is not None}
        self._made = {place: self._made[place] for place in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return made


def _device(asked: torch.device | str | None) -> torch.device:
    """The device, where something can be measured on it.

    Raises:
        SettingsError: it is none, or not there.
    """
    try:
        device = torch.device(asked or "cpu")
    except RuntimeError as error:
        raise SettingsError(f"device {asked!r} asked; cpu or cuda would work") from error
    if device.type == "cpu":
        return device
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here is not None else 0
    if here is None or here.type != device.type or (device.index or 0) >= count:
        have = ", ".join(["cpu", *(f"{here.type}:{i}" for i in range(count) if here is not None)])
        raise SettingsError(f"device {device} asked; it is not on this machine: {have} would work")
    return device


def _key(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """What a measurement is of, in one way of writing."""
    facts = {
        "format": FORMAT,
        "device": _device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"kind": shape.kind, **shape.to_dict()},
    }
    return json.dumps(facts, sort_keys=True)


def _device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if device.type == "cpu" else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{device.type} of {platform.processor() or platform.machine()}"


def _read(path: Path, key: str) -> Measured | None:
    """What was kept under this key; None where nothing was, or it cannot be read."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):  # damaged, or of another format
        said = json.loads(path.read_text(encoding="utf-8"))
        found = Measured(ms=float(said["ms"]), peak_bytes=int(said["peak_bytes"]))
        if said["key"] == json.loads(key) and 0 < found.ms < math.inf and found.peak_bytes >= 0:
            return found
    return None


def _write(path: Path, values: dict[str, Any]) -> None:
    """Keep them, whole or not at all; where that cannot be, the next call measures again."""
    staged = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)

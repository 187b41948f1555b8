"""The work behind `training.fit`: a `Run` holds what one call of it needs between updates. Private to `training.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learngene_hub._processes import average_gradients, forked, move, place, same_everywhere, share_first, start_reading
from learngene_hub._state import (
    STATE_FILE,
    StateDir,
    Stateful,
    read_state,
    require_same,
    wait_seconds,
    write_state,
)
from learngene_hub.data import seed_of
from learngene_hub.errors import DataError, SettingsError, StoreError, TrainingError

if TYPE_CHECKING:
    from learngene_hub.training import Batches, Loss, Recipe

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE_TO_CHANGE = {"compile", "checkpointing"}  # of a continued run: no result depends on them


def has_bf16() -> bool:
    """Whether this CPU has instructions for bf16, or at least for products of it as fast as of float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_where_slow(precision: str, device: torch.device) -> None:
    """Warns of bf16 on a CPU that has no instructions for it, where it is tens of times slower than fp32."""
    if precision != "bf16" or device.type != "cpu" or has_bf16():
        return
    warnings.warn(
        "precision 'bf16' asked on a CPU without instructions for it, where it is tens of times slower than 'fp32', "
        "which would work",
        stacklevel=2,
    )


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Gradients are recorded inside, whether or not the caller is in ``torch.no_grad`` or ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def plain_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Attention as plain matrix products inside, on a CPU; as it was outside.

    timm's blocks ask torch for fused attention. On a GPU that is faster; on a CPU, at the few tokens of small images,
    its backward pass is slow, and slowest in bf16 (benchmarks/README.md).
    """
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)] if device.type == "cpu" else []
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


class Run:
    """What one call of `fit` holds between updates."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        recipe: Recipe,
        steps_per_epoch: int,
        groups: Sequence[dict[str, Any]],
        kept: StateDir | None,
        extra: Stateful | None,
        device: torch.device | str | None,
    ) -> None:
        self.model, self.loss, self.recipe, self.place, self.extra = model, loss, recipe, kept, extra
        self.steps_per_epoch, self.of = steps_per_epoch, steps_per_epoch * recipe.epochs
        self.step, self.images, self.seconds = 0, 0, 0.0
        self.saved_at, self.saving = time.perf_counter(), 0.0  # when the state was written last, and how long it took
        self.rank, self.world, self.device = place(device)
        dtype = PRECISIONS[recipe.precision]
        if dtype is torch.float16 and self.device.type == "cpu":
            raise SettingsError("precision 'fp16' needs a GPU; on a CPU 'bf16' or 'fp32' work")
        warn_where_slow(recipe.precision, self.device)
        if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
            raise SettingsError(
                "a model made inside torch.inference_mode() given, which torch never trains: one made outside would "
                "work"
            )
        model.to(self.device)
        self.autocast = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype is torch.float16 else None
        self.optimizer = _optimizer(groups, recipe, self.device)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        known = {id(p) for p in model.parameters()}
        self.outside = [p for p in self.parameters if id(p) not in known]
        self.called = torch.compile(model) if recipe.compile else model
        if self.world > 1:
            share_first([*model.parameters(), *model.buffers(), *self.outside])

    def stream(self, batches: Batches, epoch: int) -> Iterator[Any]:
        """The batches of an epoch that this run has not had yet."""
        with forked(self.device):
            self._seed("epoch", epoch)
            stream = iter(batches(epoch))
            for step in range(epoch * self.steps_per_epoch, self.step):
                for micro in range(self.recipe.accumulate):
                    self._next(stream, step, micro)
        return stream

    def update(self, stream: Iterator[Any], epoch: int) -> float:
        """Makes one update from the next micro-batches; returns the loss."""
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        rate = self.recipe.rate(self.step + 1, self.of)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        with forked(self.device), learning():
            loss = self._backward(stream)()
            self._apply(loss, epoch)
        self.step += 1
        return loss

    def _backward(self, stream: Iterator[Any]) -> Callable[[], float]:
        """Gradients, averaged over the next micro-batches and the processes; returns how to get the loss."""
        count = self.recipe.accumulate
        total = torch.zeros((), device=self.device)
        reading: Callable[[], float] = total.item
        for micro in range(count):
            batch = move(self._next(stream, self.step, micro), self.device)
            self.images += _count(batch) * self.world
            self._seed("forward", self.step, micro)
            with self.autocast:
                value = self.loss(self.called, batch) / count
            total += value.detach()
            if micro == count - 1:
                reading = start_reading(total, self.world)
            (value if self.scaler is None else self.scaler.scale(value)).backward()
        if self.world > 1:
            average_gradients(self.parameters, self.world)
        return reading

    def _apply(self, loss: float, epoch: int) -> None:
        """The optimiser's part of an update, unless the loss forbids it."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step + 1} of {self.of} (epoch {epoch}), so it was not applied; "
                f"try an lr below {self.recipe.lr:g}, clip=1.0, or precision='fp32'"
            )
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _next(self, stream: Iterator[Any], step: int, micro: int) -> Any:
        """The next batch; what is drawn from the global generators for it depends on its place in the run alone."""
        self._seed("batch", step, micro)
        for batch in stream:
            return batch
        epoch, wanted = step // self.steps_per_epoch, self.steps_per_epoch * self.recipe.accumulate
        raise DataError(f"batches({epoch}) ended before its {wanted} batches, at step {step + 1} of {self.of}")

    def _seed(self, *place: int | str) -> None:
        """Seeds torch's generators of the CPU and of this GPU."""
        seed = seed_of(self.recipe.seed, self.rank, *place)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)

    @contextlib.contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing inside, if the recipe asks for it; as it was outside."""
        if not self.recipe.checkpointing:
            yield
            return
        switch = getattr(self.model, "set_grad_checkpointing", None)
        if switch is None:
            raise SettingsError(f"{type(self.model).__name__} cannot recompute activations; checkpointing=False works")
        before = bool(getattr(self.model, "grad_checkpointing", False))
        switch(True)
        try:
            yield
        finally:
            switch(before)

    def versions(self) -> int:
        """A number that changes when anybody writes into the parameters or buffers."""
        return sum(tensor._version for tensor in (*self.parameters, *self.model.parameters(), *self.model.buffers()))

    def facts(self) -> dict[str, Any]:
        """What a continued run must have in common with the one that wrote the state."""
        recipe = dataclasses.asdict(self.recipe)
        facts = {"steps_per_epoch": self.steps_per_epoch}
        facts |= {k: v for k, v in recipe.items() if k not in FREE_TO_CHANGE}
        return facts | dict(self.place.identity if self.place else {})

    def due(self, save_every: int | None) -> bool:
        """Whether the state is to be written after the update just made."""
        if self.place is None:
            return False
        if self.step == self.of:
            return True
        if self.place.timed and save_every is None:
            return time.perf_counter() - self.saved_at >= wait_seconds(self.saving)
        return self.step % (save_every or self.steps_per_epoch) == 0

    def save(self) -> None:
        """Writes the state; the file is the old one or the new one."""
        if self.place is None or self.rank:
            return
        began = time.perf_counter()
        state = {
            "facts": self.facts(),
            "model": self.model.state_dict(),
            "outside": [p.detach() for p in self.outside],
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "extra": None if self.extra is None else self.extra.state_dict(),
            "progress": {"step": self.step, "images": self.images, "seconds": self.seconds},
        }
        write_state(self.place.path / STATE_FILE, state, what=f"step {self.step}")
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - began

    def load(self) -> None:
        """Continues from the saved state, if there is one."""
        path = None if self.place is None else self.place.path / STATE_FILE
        if path is not None and path.exists():
            self._restore(path)
        if not same_everywhere(self.step, self.device):
            raise StoreError(f"the processes do not see the same state in {path}; give them a shared folder")

    def _restore(self, path: Path) -> None:
        state = read_state(path, ("facts", "progress"))
        require_same(path, state["facts"], self.facts())
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, saved in zip(self.outside, state["outside"], strict=True):
                    parameter.copy_(saved)
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            if (self.extra is None) != (state["extra"] is None):
                raise KeyError("extra")
            if self.extra is not None:
                self.extra.load_state_dict(state["extra"])
            progress = state["progress"]
            self.step, self.images, self.seconds = progress["step"], progress["images"], progress["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{path} holds the state of another model or groups; use another folder") from error


def _optimizer(groups: Sequence[dict[str, Any]], recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the groups. Fused where torch has it: one kernel, and on a CPU several times the default's speed."""
    if not any(group["params"] for group in groups):
        raise SettingsError("nothing to train: no parameter of the model requires a gradient")
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW([dict(g) for g in groups], recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


def _count(batch: Any) -> int:
    """Images in a batch: the length of the first tensor in it, 0 without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for part in parts if (count := _count(part))), 0)

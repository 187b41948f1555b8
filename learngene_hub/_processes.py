"""What differs between machines: the device, the process group, the moving of batches. The importer of `accelerate`.

Private to `training.py`. From accelerate come the process group of `accelerate launch` or `torchrun`, the device and
the moving of batches. Its `Accelerator` is not used: it fixes one precision for the life of the process and patches the
model's forward, while here a loss sees the caller's own model, in any number of runs. So gradients are averaged after
the backward pass, not by a wrapper around the model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learngene_hub.errors import SettingsError


def process() -> tuple[int, int]:
    """(rank, number of processes) of the process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def place(asked: torch.device | str | None) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device; joins the process group of the launcher, if there is one."""
    try:
        device = None if asked is None else torch.device(asked)
    except RuntimeError as error:
        raise SettingsError(f"no device is called {asked!r}; 'cpu', 'cuda' and 'cuda:0' are examples") from error
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {str(device)!r} is asked for, but torch sees no GPU; device='cpu' works")
    several = process()[1] > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device is None or several:
        from accelerate import PartialState

        on_cpu = several and not torch.accelerator.is_available() if device is None else device.type == "cpu"
        found = PartialState(cpu=on_cpu).device or torch.device("cpu")  # else no processes are joined without a GPU
        device = found if device is None or device.type == found.type else device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    rank, world = process()
    return rank, world, device


def forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Puts torch's generators of the CPU and of this GPU back afterwards."""
    return torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else [])


def start_reading(total: Tensor, world: int) -> Callable[[], float]:
    """A function that gives the number. On a GPU its copy starts now, and waiting for it waits for no later work."""
    if world > 1:
        dist.all_reduce(total)
        total /= world
    if total.device.type != "cuda":
        return total.item
    host = torch.empty((), dtype=total.dtype, pin_memory=True)
    host.copy_(total, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(host)

    return read


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Mean over the processes of every gradient that any of them has; one message in all."""
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    dist.all_reduce(used)
    shared = [p for p, uses in zip(parameters, used.tolist(), strict=True) if uses]
    for p in shared:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in shared if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def move(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device, whatever its structure."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def share_first(tensors: Sequence[Tensor]) -> None:
    """Overwrites the tensors with those of the first process."""
    for tensor in tensors:
        dist.broadcast(tensor.data, src=0)


def same_everywhere(number: int, device: torch.device) -> bool:
    """Whether every process has the same number; all of them must ask."""
    if process()[1] == 1:
        return True
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])

"""An auxiliary step, trained through ``expand``, beside a plain step of the same model: both in one run, in turn.

    python benchmarks/aux_speed.py [--shape 12x192] [--image-size 64] [--device cuda]

The plain step is forward, backward and AdamW of a timm model that owns its weights. The auxiliary step makes the same
weights anew from a learngene's tensors by ``expand``, from the native width to the asked one, runs the same model by
``torch.func.functional_call``, and updates the learngene's tensors. Writes benchmarks/results/aux_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from learngene_hub import Learngene, ViTShape
from learngene_hub.methods import get_method

RESULT = Path(__file__).parent / "results" / "aux_speed.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learngene", default="lsamd-base")
    parser.add_argument("--shape", default="12x192", help="DEPTHxWIDTH of the auxiliary")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    learngene = Learngene.from_pretrained(args.learngene)
    depth, width = (int(part) for part in args.shape.split("x"))
    heads = width // learngene.shape.head_dim
    shape = replace(learngene.shape, depth=depth, width=width, heads=heads, image_size=args.image_size, classes=10)
    steps = {
        "plain": plain_step(learngene, shape, args.device),
        "auxiliary": auxiliary_step(learngene, shape, args.device),
    }
    x = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    y = torch.randint(10, (args.batch,), device=args.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + 2):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            steps[name](x, y)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "shape": args.shape,
        "image_size": args.image_size,
        "batch": args.batch,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": {name: round(value, 5) for name, value in median.items()},
        "ratio": round(median["auxiliary"] / median["plain"], 3),
        "goal": 1.10,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def plain_attention(model: nn.Module, device: str) -> None:
    """Both sides alike: plain matrix products on a CPU, as ``fit`` trains."""
    for module in model.modules():
        if device == "cpu" and getattr(module, "fused_attn", False):
            module.fused_attn = False


def plain_step(learngene: Learngene, shape: ViTShape, device: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    model = learngene.expand(
        depth=shape.depth, width=shape.width, num_labels=10, image_size=shape.image_size, device=device
    ).train()
    plain_attention(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def auxiliary_step(learngene: Learngene, shape: ViTShape, device: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    trained = {
        name: nn.Parameter(tensor.float().to(device)) if name.split(".")[0] in ("stem", "block", "tail") else tensor
        for name, tensor in learngene.tensors.items()
    }
    source = replace(learngene, tensors=trained)
    method = get_method(source.method, source.settings)
    model = shape.build(device="meta").train()
    plain_attention(model, device)
    head = {"head.weight": nn.Parameter(torch.zeros(10, shape.width, device=device))}
    head["head.bias"] = nn.Parameter(torch.zeros(10, device=device))
    own = [tensor for tensor in trained.values() if isinstance(tensor, nn.Parameter)]
    optimizer = torch.optim.AdamW([*own, *head.values()], 1e-4, fused=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        state = {name: tensor for name, tensor in method.expand(source, shape).items() if tensor is not None} | head
        nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), y).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()

"""The command ``export``: a saved descendant as one file for onnxruntime or torch.export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from learngene_hub._command import YesOption, require_new
from learngene_hub._output import Output
from learngene_hub._workshop import ModelArgument, saved

TargetArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: model.onnx or model.pt2.")]
OpsetOption = Annotated[
    int | None, typer.Option("--opset", help="Version of ONNX's operators, 18 to 23; 20 where left out.")
]
FileDtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the model's own where left out.")
]


def export(
    out: Output,
    model: ModelArgument,
    path: TargetArgument,
    opset: OpsetOption = None,
    dtype: FileDtypeOption = None,
    yes: YesOption = False,
) -> None:
    """Write a saved descendant as ONNX or as a torch.export program.

    The suffix of OUT says which. The file takes pixel_values, any number of images, and gives logits. It is run before
    it gets its name: the difference told is the largest between its logits and the model's.

    \b
    learngene export trained model.onnx
    learngene export trained model.pt2 --json
    """
    grown = saved(model)
    from learngene_hub import exporting

    require_new(out, path, yes=yes)
    began = time.perf_counter()
    found = exporting.export(grown, path, opset=opset, dtype=dtype)
    facts = {
        "path": str(path),
        "model": model,
        "format": found.format,
        "opset": found.opset,
        "dtype": found.dtype,
        "bytes": path.stat().st_size,
        "difference": found.difference,
        "tolerance": found.tolerance,
        "seconds": time.perf_counter() - began,
    }
    out.facts(facts, key="path")

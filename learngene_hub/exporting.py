"""A descendant as a file that other runtimes run, ONNX or PyTorch's .pt2; the only importer of onnxruntime.

Both kinds of file hold graph and weights and take ``pixel_values`` (images, channels, side, side), already normalised;
they give ``logits`` (images, classes). The number of images is free, all else is fixed. Beside that they hold one text
under the key ``descendant``, JSON: ``label_names``, ``image_size``, ``in_chans``, ``mean``, ``std``, ``interpolation``,
``crop_pct``, and ``learngene``, where the model came from. No path of this machine is in them.

A file appears under its name only after it has been run and gave the model's logits.
"""

from __future__ import annotations

import copy
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from learngene_hub.descendant import Descendant
from learngene_hub.errors import ExportError, SettingsError, StoreError
from learngene_hub.shape import Shape, shape_of

FACTS = "descendant"  # the key of what a file says of its model
OPSETS = range(18, 24)  # that torch writes by itself and every onnxruntime of the extra runs
OPSET = 20
ONNX_BYTES = 2**31 - 2**24  # one file is one protobuf message of less than 2 GiB; the graph needs a little of it
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}  # of the largest logit, or of 1 where that is less
BATCHES = (1, 3)  # images at a time, when a file is run

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that ``export`` wrote, and how far its logits are from the model's."""

    path: Path
    format: str  # onnx or pt2
    opset: int | None  # of ONNX
    dtype: str  # of weights, pixels and logits
    difference: float  # the largest, absolute
    tolerance: float  # what would have been allowed


def export(
    model: Descendant,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Exported:
    """Write a descendant to ``path``, .onnx or .pt2, and compare the file's logits with the model's.

    The file is run on random pixels, one image and three: .onnx with onnxruntime, .pt2 with ``torch.export.load``, both
    on the CPU. The model itself is not changed. What stands at ``path`` is replaced once the new file has passed.

    Args:
        path: the suffix says the format.
        opset: the version of ONNX's operators, 18 to 23; 20 where left out.
        dtype: of the file, and of the model that it is compared with; the model's own where left out.

    Raises:
        SettingsError: no such format, opset or dtype, a model too large for one ONNX file, or the packages of the
            extra ``export`` are not installed.
        ExportError: the file cannot be run, or gives other logits; it is not kept.
        StoreError: it cannot be written.
    """
    path, number = Path(path), str(dtype or model.dtype).removeprefix("torch.")
    _require(path, number, opset)
    opset = (opset or OPSET) if path.suffix == ".onnx" else None
    network = _Logits(model, getattr(torch, number))
    _require_small(network, opset)
    facts = json.dumps(_facts(model, network.shape))
    with _staged(path) as staged, torch.no_grad():
        program = _traced(network)
        run = _write_pt2(program, staged, facts) if opset is None else _write_onnx(program, staged, facts, opset)
        difference, tolerance = _compare(network, run)
    return Exported(
        path=path, format=path.suffix[1:], opset=opset, dtype=number, difference=difference, tolerance=tolerance
    )


class _Logits(nn.Module):
    """A copy of a descendant's timm model, on the CPU, whose input has the name that transformers uses."""

    def __init__(self, model: Descendant, dtype: torch.dtype) -> None:
        super().__init__()
        plain = getattr(model.timm_model, "_orig_mod", model.timm_model)  # compiled: what was compiled
        self.timm_model = copy.deepcopy(plain).to("cpu", dtype)
        self.shape, self.dtype = shape_of(self.timm_model), dtype
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.timm_model(pixel_values)

    def pixels(self, count: int) -> Tensor:
        """Random pixels of so many images, always the same."""
        side = self.shape.image_size
        drawn = torch.randn(count, self.shape.in_chans, side, side, generator=torch.Generator().manual_seed(count))
        return drawn.to(self.dtype)


def _require(path: Path, dtype: str, opset: int | None) -> None:
    """Nothing, where this can be written; else SettingsError."""
    if path.suffix not in (".onnx", ".pt2"):
        raise SettingsError(f"{path} asked; the suffix says the format: .onnx or .pt2 would work")
    if dtype not in TOLERANCES:
        raise SettingsError(f"dtype {dtype} asked; there are {', '.join(TOLERANCES)}")
    if path.suffix == ".pt2":
        if opset is not None:
            raise SettingsError(f"opset {opset} asked; a .pt2 file has none: leave it out, or write .onnx")
        return
    if dtype == "bfloat16":
        raise SettingsError("ONNX in bfloat16 asked; onnxruntime does not run it: dtype float32, or .pt2, would work")
    if opset is not None and opset not in OPSETS:
        raise SettingsError(f"opset {opset} asked; {OPSETS[0]} to {OPSETS[-1]} would work")
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise SettingsError(
            f"ONNX asked; {missing[0]} is not installed here: pip install 'learngene-hub[export]' would work"
        )


def _require_small(network: nn.Module, opset: int | None) -> None:
    there = sum(tensor.nbytes for tensor in network.state_dict().values())
    if opset is not None and there > ONNX_BYTES:
        raise SettingsError(
            f"ONNX asked for {there:,} bytes of weights; one file takes {ONNX_BYTES:,}: .pt2, or float16, would work"
        )


def _facts(model: Descendant, shape: Shape) -> dict[str, Any]:
    """What a file says of its model."""
    names: dict[Any, str] = dict(model.config.id2label or {})
    return {
        "label_names": [names.get(number, f"LABEL_{number}") for number in range(shape.classes)],
        "image_size": shape.image_size,
        "in_chans": shape.in_chans,
        **model.preprocessing.for_channels(shape.in_chans).to_dict(),
        "learngene": getattr(model.config, "learngene", None),
    }


def _traced(network: _Logits) -> ExportedProgram:
    """The graph of the network for any number of images, without the lines of code that it came from."""
    images = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (network.pixels(2),), dynamic_shapes=images)  # 1 might become a constant
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_onnx(program: ExportedProgram, path: Path, facts: str, opset: int) -> Run:
    """Writes an ONNX file, and gives what runs it."""
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        opset_version=opset,
        verbose=False,
    )
    assert written is not None  # of the older exporter
    written.model.metadata_props[FACTS] = facts
    written.save(path, external_data=False)
    return _onnx_run(path)


def _write_pt2(program: ExportedProgram, path: Path, facts: str) -> Run:
    """Writes a .pt2 file, and gives what runs it."""
    buffer = io.BytesIO()  # given a path, torch names the archive's folder after it
    torch.export.save(program, buffer, extra_files={FACTS: facts})
    path.write_bytes(buffer.getbuffer())
    return torch.export.load(path).module()


def _onnx_run(path: Path) -> Run:
    """What runs an ONNX file, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no root of their own
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot read the file: {error}") from error
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


def _compare(network: _Logits, run: Run) -> tuple[float, float]:
    """The largest difference of logits, and what is allowed.

    Raises:
        ExportError: it is more, or is no number.
    """
    batches = [network.pixels(count) for count in BATCHES]
    wanted = torch.cat([network(pixels) for pixels in batches])
    found = torch.cat([run(pixels) for pixels in batches])
    difference = (found.double() - wanted.double()).abs().max().item()
    tolerance = TOLERANCES[str(network.dtype).removeprefix("torch.")] * max(1.0, wanted.abs().max().item())
    if not difference <= tolerance:
        raise ExportError(
            f"the file's logits differ by {difference:.2g} from the model's, {tolerance:.2g} is allowed; the file is "
            "not kept: another opset, or dtype float32, would work"
        )
    return difference, tolerance


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its name, on disk whole, unless something is raised; then it is gone.

    Raises:
        StoreError: no file can be made or named there.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}{path.suffix}"
    try:
        temporary.touch(exist_ok=False)  # here, and not after minutes
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        why = error.strerror or error
        raise StoreError(f"{path} could not be written: {why}; a folder of your own, with space, would work") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)

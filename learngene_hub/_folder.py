"""Writing the folder of a descendant: its weights, how large they are, and files that appear whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learngene_hub.errors import SettingsError

_ALIGNMENT = 64  # bytes, as torch allocates
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_COUNTER = "num_batches_tracked"  # of every BatchNorm: the one entry of a model that is a whole number


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file in which every matrix stands at a multiple of 64 bytes.

    transformers computes on the mapped file itself. Where its matrices are not aligned as freshly allocated ones are,
    the processor's kernels add in another order, and the logits differ from the saved model's in the last bit.

    Raises:
        SettingsError: a tensor that is no floating-point number of 16, 32 or 64 bits, nor BatchNorm's counter.
    """
    header, ordered = weights_header(state)
    with path.open("wb") as file:
        file.write(header)
        for name in ordered:
            file.write(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def weights_header(state: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """What stands before the tensors in the file of ``write_weights``, and their names in its order.

    Raises:
        SettingsError: as ``write_weights``.
    """
    dtypes = {name: FLOATS.get(tensor.dtype) for name, tensor in state.items()}
    dtypes |= {name: "I64" for name in state if name.endswith(_COUNTER) and state[name].dtype == torch.int64}
    if odd := sorted(name for name in state if dtypes[name] is None):
        raise SettingsError(f"{odd[0]} is {state[odd[0]].dtype}; model.to(torch.float32) can be saved")
    ordered = sorted(state, key=lambda name: (state[name].nbytes % _ALIGNMENT != 0, -state[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        begin, end = end, end + state[name].nbytes
        header[name] = {"dtype": dtypes[name], "shape": list(state[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, ordered


def saved_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the file that ``write_weights`` would write; of tensors on "meta" too."""
    header, _ = weights_header(state)
    return len(header) + sum(tensor.nbytes for tensor in state.values())


def publish(staged: Path, folder: Path, *, whole: bool) -> None:
    """Move what is staged into place, after it has reached the disk; the config last, since a reader begins with it."""
    files = sorted(staged.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    if whole:
        staged.rename(folder)
        return
    for path in files:
        path.replace(folder / path.name)

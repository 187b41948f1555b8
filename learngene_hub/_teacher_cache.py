"""What a teacher says of a data set, kept on disk for every extraction that asks the same of it.

A folder of safetensors files, one for each data set: the tensor ``logits`` (N, classes) in float32, and under the one
metadata key ``teacher`` what they are of, as JSON: the teacher's digest, the images' digest, the size and the
preprocessing with which it saw them, the precision, its FLOPs for one image, and the sha256 of the numbers. The file's
name is the sha256 of the first five. A file that is damaged, or of something else, counts as absent and is written
anew.

Written by hand and read by hand, because this much of the format is a header and one block of numbers, and every byte
of it is checked. Private to ``teacher.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.errors import StoreError
from learngene_hub.shape import Preprocessing
from learngene_hub.training import images_digest, state_digest

_ALIGNMENT = 64  # bytes
_MAX_HEADER = 2**16  # bytes


@dataclass(frozen=True, eq=False)
class Said:
    """Logits (N, classes), float32 on the CPU, and the FLOPs of one image."""

    logits: Tensor
    flops: int


class TeacherCache:
    """The folder, for one teacher that sees images in one way.

    Raises:
        StoreError: the folder cannot be made, or not be written.
    """

    def __init__(
        self, folder: Path, teacher: nn.Module, size: int, preprocessing: Preprocessing, precision: str
    ) -> None:
        self.folder = folder
        self.facts = {
            "teacher": teacher_digest(teacher),
            "size": size,
            "preprocessing": preprocessing.to_dict(),
            "precision": precision,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be made: {error.strerror or error}; a folder of yours would work"
            ) from error
        if not os.access(folder, os.W_OK):
            raise StoreError(f"{folder} cannot be written; a folder of yours would work")

    def read(self, images: Images) -> Said | None:
        """What was kept of these images; None, where nothing is, or nothing whole."""
        path, facts = self._place(images)
        try:
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length]) if 0 < length <= _MAX_HEADER else {}
            numbers = content[8 + length :]
            told = json.loads(header["__metadata__"]["teacher"])
            count, classes = header["logits"]["shape"]
            flops, sha256 = told.pop("flops"), told.pop("sha256")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        whole = header["logits"] == _entry(count, classes) and len(numbers) == 4 * count * classes
        if not whole or told != facts or count != len(images) or type(flops) is not int:
            return None
        if hashlib.sha256(numbers).hexdigest() != sha256:
            return None
        return Said(torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(count, classes), flops)

    def write(self, images: Images, said: Said) -> None:
        """Keeps it: the file is the whole one, or the old one.

        Raises:
            StoreError: it cannot be written.
        """
        path, facts = self._place(images)
        numbers = said.logits.contiguous().numpy().tobytes()
        told = facts | {"flops": said.flops, "sha256": hashlib.sha256(numbers).hexdigest()}
        header = {"__metadata__": {"teacher": _canonical(told)}, "logits": _entry(*said.logits.shape)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text + numbers)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error.strerror or error}; another folder would work"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, images: Images) -> tuple[Path, dict[str, Any]]:
        """The file of these images, and what they are and how they are seen."""
        facts = self.facts | {"images": images_digest(images)}
        return self.folder / f"{hashlib.sha256(_canonical(facts).encode()).hexdigest()}.safetensors", facts


def teacher_digest(model: nn.Module) -> str:
    """The sha256 of what a model computes with: its state, and its layers as they print themselves."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # where a function lies in memory
    return hashlib.sha256(f"{state_digest(model)}{layers}".encode()).hexdigest()


def _entry(count: int, classes: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [count, classes], "data_offsets": [0, 4 * count * classes]}


def _canonical(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))

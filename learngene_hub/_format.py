"""The header of a learngene file: every check that needs neither its tensors nor torch, and the one way to write it.

The format is specified in ``learngene_hub.learngene``.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from learngene_hub.errors import ArtefactError, LearngeneError, StoreError
from learngene_hub.shape import Preprocessing, Reach, Shape, shape_from_dict

FILE_NAME = "learngene.safetensors"
FORMAT = 1
READ_BY = "0.1.0"
MAX_HEADER = 2**20  # bytes
MAX_METADATA = 2**16  # characters
MAX_DEPTH = 32  # of objects and lists in each other, the metadata itself being the first
MAX_TENSORS = 4096
MAX_BYTES = 2**32  # of all tensors together
MAX_AXES, MAX_AXIS = 8, 2**31 - 1
MAX_NUMBER = 2**20  # of a native shape or a reach
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # in the order of the file
TENSOR_NAME = re.compile(r"(?=.{3,128}\Z)[a-z][a-z0-9_]*(\.[A-Za-z0-9_-]+)+\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
KEYS = ("ancestor", "license", "method", "preprocessing", "provenance", "reach", "settings", "shape")
TYPED = ("preprocessing", "reach", "shape")  # objects of their own classes
ANCESTOR_KEYS = ("license", "name", "sha256", "source")
STRANGERS = {  # what other files start with
    b"PK\x03\x04": "a zip archive, such as torch.save writes (a pickle)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"version https://git-lfs": "a git-lfs pointer: run `git lfs pull`",
    b"<": "a web page",
}
# What code may raise that is handed nonsense:
ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the header of a learngene says, read without its tensors."""

    method: str
    settings: Mapping[str, Any]
    shape: Shape  # native
    reach: Reach
    ancestor: Mapping[str, str]
    preprocessing: Preprocessing
    license: str
    provenance: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype as written in the file, shape
    file_bytes: int

    @property
    def params(self) -> int:
        """Numbers stored."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def read_facts(path: str | os.PathLike[str]) -> Facts:
    """What the header of this file says; neither torch nor the method is needed, and the tensors are not read.

    Raises:
        ArtefactError: the header is not that of a learngene of format 1.
        StoreError: the file cannot be read.
    """
    path = Path(path)
    with naming(path), opened(path) as (file, size):
        return read_head(file, size)[1]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path before the message of every ArtefactError."""
    try:
        yield
    except ArtefactError as error:
        raise type(error)(f"{shown(path)}: {error}") from error.__cause__


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file opened to read, and its size. Links are followed: the Hub's client keeps its cache behind them."""
    try:
        _require_file(path.stat(), path)  # a pipe would block, a device never end, and some notice being opened
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            _require_file(status, path)  # what was looked at may have been exchanged before it was opened
            yield file, status.st_size
    except LearngeneError:
        raise
    except FileNotFoundError as error:
        raise StoreError(f"no file {shown(path)}; give the path of a {FILE_NAME}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise StoreError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    except MemoryError as error:
        raise StoreError(f"no memory left to read {shown(path)}; twice its size is needed") from error


def _require_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{shown(path)} is not a file; give the path of a {FILE_NAME}")


def _without_waiting(path: str, flags: int) -> int:
    """``os.open`` that does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def read_head(file: BinaryIO, size: int) -> tuple[bytes, Facts]:
    """The first bytes up to the tensors, and what they say once everything in them is checked."""
    if size == 0:  # or a file of the kernel, which may well have bytes, and wait for more
        raise ArtefactError("empty; a learngene was expected: fetch it again")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if not (8 <= length <= MAX_HEADER and length % 8 == 0 and size >= 8):
        raise ArtefactError(_stranger(start + file.read(32)))
    if size < 8 + length:
        raise ArtefactError(f"truncated: {size} bytes, of a header of {8 + length}; fetch it again")
    header = file.read(length)
    return start + header, parse(header, size)


def _stranger(start: bytes) -> str:
    """Why a file without a header of a legal length is refused."""
    for magic, kind in STRANGERS.items():
        if start.startswith(magic):
            return f"not a safetensors file, whatever its name: it starts like {kind}"
    length = int.from_bytes(start[:8], "little")
    return f"not a learngene: its header would have {length} bytes; multiples of 8 up to {MAX_HEADER} are legal"


def parse(header: bytes, size: int) -> Facts:
    """What a header says, once it is known to be that of a whole file of ``size`` bytes in format 1."""
    try:
        top = _from_json(header.decode().rstrip(" "))
        metadata = _parse_metadata(top)
        tensors = _parse_tensors(top, size - 8 - len(header))
        facts = _parse_facts(metadata)
        canonical = encode(canonical_metadata(facts), tensors)[0] == header
    except LearngeneError as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"its facts do not hold: {one_line(error)}") from error
    except ODD as error:
        raise ArtefactError(f"its header cannot be read: {one_line(error)}") from error
    if not canonical:
        raise ArtefactError("its header is not written in the one way that format 1 has; save it with learngene_hub")
    return Facts(**facts, tensors=tensors, file_bytes=size)


def _parse_metadata(top: Any) -> dict[str, Any]:
    """The object under ``learngene``, of this format and with the right keys."""
    outer = top.pop("__metadata__", None) if isinstance(top, dict) else None
    if not isinstance(outer, dict) or "learngene" not in outer:
        raise ArtefactError("not a learngene: a safetensors file without the metadata key 'learngene'")
    text = outer["learngene"]
    if len(outer) != 1 or not isinstance(text, str):
        raise ArtefactError(f"{len(outer)} metadata keys; exactly one, 'learngene', a string, is legal")
    if len(text) > MAX_METADATA:
        raise ArtefactError(f"{len(text)} characters of metadata; {MAX_METADATA} are legal")
    metadata = _from_json(text)
    number = metadata.get("format") if isinstance(metadata, dict) else None
    if type(number) is not int or number < 1:
        raise ArtefactError(f"format {short(number)}; this library reads format {FORMAT}")
    if number > FORMAT:
        first = str(metadata.get("read_by"))
        version = f"{first} or later" if re.fullmatch(r"[0-9][0-9a-z.]{0,31}", first) else "of a later version"
        reader = f"learngene-hub {version} reads it: pip install --upgrade learngene-hub"
        raise ArtefactError(f"format {short(number)}; this library reads format {FORMAT}; {reader}")
    if set(metadata) != {*KEYS, "format", "read_by"}:
        odd = sorted(set(metadata) ^ {*KEYS, "format", "read_by"})
        raise ArtefactError(f"metadata keys missing or unknown: {short(odd)}")
    return metadata


def _parse_tensors(top: dict[str, Any], there: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor; together they fill the ``there`` bytes after the header."""
    if not 1 <= len(top) <= MAX_TENSORS:
        raise ArtefactError(f"{len(top)} tensors; 1 to {MAX_TENSORS} are legal")
    tensors, end = {}, 0
    for name, info in top.items():
        if not TENSOR_NAME.match(name):
            raise ArtefactError(f"tensor name {short(name)}; names are group.rest, of letters, digits, _ and -")
        dtype, shape = info["dtype"], info["shape"]
        if dtype not in ITEM_BYTES:
            raise ArtefactError(f"{name} has dtype {short(dtype)}; {', '.join(ITEM_BYTES)} are legal")
        if type(shape) is not list or len(shape) > MAX_AXES or not all(_is_count(n, MAX_AXIS) for n in shape):
            raise ArtefactError(
                f"{name} has shape {short(shape)}; at most {MAX_AXES} axes of 1 to {MAX_AXIS} are legal"
            )
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        if info["data_offsets"] != [begin, end]:
            there_is = short(info["data_offsets"])
            raise ArtefactError(f"{name} lies at {there_is}; from its place and shape it would be [{begin}, {end}]")
        tensors[name] = (dtype, tuple(shape))
    if end > MAX_BYTES:
        raise ArtefactError(f"{end} bytes of tensors; {MAX_BYTES} are legal")
    if end != there:
        problem = "truncated" if there < end else "longer than its header says"
        raise ArtefactError(f"{problem}: {there} bytes after the header, {end} by its header; fetch it again")
    return tensors


def _parse_facts(metadata: dict[str, Any]) -> dict[str, Any]:
    """The values of a Learngene that metadata hold."""
    ancestor = metadata["ancestor"]
    if not isinstance(ancestor, dict) or sorted(ancestor) != list(ANCESTOR_KEYS):
        raise ArtefactError(f"ancestor {short(ancestor)}; it has {', '.join(ANCESTOR_KEYS)}")
    for text in (metadata["method"], metadata["license"], *ancestor.values()):
        if not (isinstance(text, str) and text.isprintable()):
            raise ArtefactError(f"method, license or ancestor is {short(text)}; they are strings of one line")
    if ancestor["sha256"] and not SHA256.match(ancestor["sha256"]):
        raise ArtefactError(f"the ancestor's sha256 is {short(ancestor['sha256'])}; it is 64 hex digits, or empty")
    for key in ("settings", "provenance", "shape", "reach", "preprocessing"):
        if not isinstance(metadata[key], dict):
            raise ArtefactError(f"{key} is {short(metadata[key])}; it is an object")
    for key in ("shape", "reach"):  # before a loop over depth or a table over width is made of them
        if any(isinstance(n, (int, float)) and not abs(n) <= MAX_NUMBER for n in _leaves(metadata[key])):
            raise ArtefactError(f"{key} {short(metadata[key])}; no number above {MAX_NUMBER} is legal")
    parsed = {
        "shape": shape_from_dict(metadata["shape"]),
        "reach": Reach.from_dict(metadata["reach"]),
        "preprocessing": Preprocessing.from_dict(metadata["preprocessing"]),
    }
    return {key: metadata[key] for key in KEYS} | parsed


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in objects and lists, however deep."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, (dict, list)):
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
        else:
            yield inner


def canonical_metadata(facts: Mapping[str, Any]) -> str:
    """The canonical JSON that stands under ``learngene``."""
    values: dict[str, Any] = {"format": FORMAT, "read_by": READ_BY}
    for key, value in facts.items():
        values[key] = value.to_dict() if key in TYPED and hasattr(value, "to_dict") else value
    try:
        plain = _from_json(json.dumps(values, allow_nan=False))  # keys that are numbers become text, then are sorted
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        if "\\ud" in text:  # may be half of a pair, which no terminal and no file can show
            json.dumps(plain, ensure_ascii=False).encode()
    except ODD as error:
        raise ArtefactError(f"settings, ancestor or provenance are not JSON: {one_line(error)}") from error
    _check_depth(plain)
    return text


def _check_depth(value: Any) -> None:
    """Refuse what is nested so deep that only some programs could write it again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
    if level:
        raise ArtefactError(f"metadata nested more than {MAX_DEPTH} deep")


def encode(metadata: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The header in its one way of writing, and the tensors' names in its order."""
    order = list(ITEM_BYTES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name))
    top: dict[str, Any] = {"__metadata__": {"learngene": metadata}}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        top[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(top, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), names


def _from_json(text: str) -> Any:
    """JSON without repeated keys, NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def shown(path: str | os.PathLike[str]) -> str:
    """A path, fit for one line of a message whatever its name is."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def short(value: Any) -> str:
    """A value out of a file, fit for one line of a message."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """The message of an error, fit for one line, whatever of a file it quotes."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."

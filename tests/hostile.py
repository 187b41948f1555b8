"""Learngene files made by hand: a small good one, and every way that we know to make a bad one."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from learngene_hub.errors import ArtefactError, SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Preprocessing, Reach, ViTShape


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """As much of a method as a file needs."""

    name: ClassVar[str] = "tiny"
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block"})
    speed: float = 0.5

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        want = {"stem.scale": (native.width,), "stem.shift": (native.width,), "block.0.norm1.weight": (2, native.width)}
        if shapes != want:
            raise ArtefactError(f"{sorted(shapes)} given; {sorted(want)} are needed")


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Tiny:
    if name != "tiny":
        raise SettingsError(f"unknown method {name!r}; known methods: tiny")
    return Tiny(**(settings or {}))


@contextmanager
def only_method_is_tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learngene_hub.methods.get_method", get_method)
        yield


def small(**changes: Any) -> Learngene:
    """A learngene of three tensors, one of each dtype."""
    values: dict[str, Any] = {
        "tensors": {
            "block.0.norm1.weight": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4) / 4,
            "stem.scale": torch.tensor([1.0, -2.0, 0.5, 65504.0], dtype=torch.float16),
            "stem.shift": torch.tensor([0.1, 1e-30, -3e38, 0.0]),
        },
        "method": "tiny",
        "settings": {"speed": 0.25},
        "shape": ViTShape(depth=1, width=4, heads=1, patch=2, image_size=4, classes=0),
        "reach": Reach(depths=(1, 2), widths=(4, 8, 4)),
        "ancestor": {"name": "pico", "sha256": "", "license": "Apache-2.0", "source": "made up"},
        "preprocessing": Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "license": "Apache-2.0",
        "provenance": {"data": ["caf\u00e9"], "seconds": 1.5},
    }
    return Learngene(**{**values, **changes})


def compact(value: Any) -> str:
    """The canonical JSON of metadata."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def assemble(header: bytes, buffer: bytes, length: int | None = None) -> bytes:
    """A file with this header, padded to a multiple of 8."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + buffer


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(header without metadata, metadata, buffer) of a good file."""
    length = int.from_bytes(data[:8], "little")
    top = json.loads(data[8 : 8 + length])
    metadata = json.loads(top.pop("__metadata__")["learngene"])
    return top, metadata, data[8 + length :]


def put_together(top: dict[str, Any], metadata: Any, buffer: bytes) -> bytes:
    """The inverse of ``take_apart``, for good parts; ``metadata`` may be the text itself."""
    text = metadata if isinstance(metadata, str) else compact(metadata)
    header = json.dumps({"__metadata__": {"learngene": text}, **top}, separators=(",", ":"), ensure_ascii=False)
    return assemble(header.encode(), buffer)


def corpus(good: bytes) -> Iterator[tuple[str, bytes]]:
    """(what is wrong, bytes) of every hostile file."""
    yield from _not_safetensors(good)
    yield from _bad_headers(good)
    yield from _bad_metadata(good)
    yield from _bad_facts(good)
    yield from _bad_tensors(good)
    yield from _bad_values(good)


def _not_safetensors(good: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "one byte", b"\0"
    yield "seven bytes", good[:7]
    yield "only a length", good[:8]
    for protocol in range(2, 6):
        yield f"pickle, protocol {protocol}", pickle.dumps({"weight": [0.0] * 100}, protocol=protocol)
    for modern in (True, False):
        file = io.BytesIO()
        torch.save({"weight": torch.zeros(8)}, file, _use_new_zipfile_serialization=modern)
        yield f"torch.save, {'zip' if modern else 'legacy'}", file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("learngene.safetensors", good)
    yield "zip of a good file", file.getvalue()
    yield "good file, then a zip", good + file.getvalue()
    yield "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
    yield "web page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "text", b"not found" * 20


def _bad_headers(good: bytes) -> Iterator[tuple[str, bytes]]:
    top, metadata, buffer = take_apart(good)
    header = good[8 : -len(buffer)]
    for length in (0, 7, 8, len(header) - 8, len(header) + 8, 2**20 + 8, 2**31, 2**63, 2**64 - 1):
        yield f"header length {length}", assemble(header, buffer, length)
    for name, text in {
        "leading space": b" " + header.rstrip(),
        "tabs as padding": header.rstrip() + b"\t" * (8 + -len(header.rstrip()) % 8),
        "eight spaces more": header + b" " * 8,
        "not UTF-8": header.replace(b"stem", b"st\xffm"),
        "byte order mark": b"\xef\xbb\xbf" + header.rstrip(),
        "not JSON": b"{" + header,
        "a list": b"[" + header.rstrip() + b"]",
        "null": b"null",
        "a string": b'"learngene"',
        "spaces inside": header.replace(b",", b", "),
        "escaped letters": header.replace(b"stem.scale", b"\\u0073tem.scale"),
        "100,000 brackets": b"[" * 100_000,
        "a million objects": b'{"a":' * 200_000,
        "a tensor twice": header.rstrip()[:-1] + b"," + json.dumps(top).encode()[1:],
        "a key twice": header.replace(b'"dtype":', b'"dtype":"F32","dtype":', 1),
        "a huge integer": header.replace(b"[0,", b"[" + b"9" * 5000 + b",", 1),
        "a float that is infinite": header.replace(b"[0,", b"[1e999,", 1),
        "NaN": header.replace(b"[0,", b"[NaN,", 1),
        "minus zero": header.replace(b"[0,", b"[-0,", 1),
        "a number as text": header.replace(b"[0,", b'["0",', 1),
        "half a surrogate pair, raw": header.replace(b"stem", b"st\xed\xa0\x80m", 1),
        "half a surrogate pair, escaped": header.replace(b"stem", b"\\ud800stem", 1),
        "UTF-16": header.rstrip().decode().encode("utf-16"),
        "zero bytes as padding": header.rstrip() + b"\0" * (8 + -len(header.rstrip()) % 8),
        "metadata twice": b'{"__metadata__":{"learngene":"{}"},' + header.rstrip()[1:],
        "the text twice": header.replace(b'{"learngene":', b'{"learngene":"{}","learngene":', 1),
        "a MiB of empty lists": b"[" + b"[]," * 349_000 + b"[]]",
        "100,000 tensors": header.rstrip()[:-1] + b"".join(b',"%x":0' % i for i in range(100_000)) + b"}",
        "a number of a million digits": header.replace(b"[0,", b"[" + b"9" * 1_000_000 + b",", 1),
    }.items():
        yield f"header: {name}", assemble(text, buffer)
    upside_down = dict(reversed(top.items()))
    yield "tensors in another order, offsets kept", put_together(upside_down, metadata, buffer)
    shuffled, end = {}, 0
    for name, info in upside_down.items():
        size = info["data_offsets"][1] - info["data_offsets"][0]
        shuffled[name] = {**info, "data_offsets": [end, end + size]}
        end += size
    yield "tensors in another order", put_together(shuffled, metadata, buffer)
    text = json.dumps({**top, "__metadata__": {"learngene": compact(metadata)}}, separators=(",", ":")).encode()
    yield "metadata last", assemble(text, buffer)


def _bad_metadata(good: bytes) -> Iterator[tuple[str, bytes]]:
    top, metadata, buffer = take_apart(good)

    def outer(value: Any) -> bytes:
        return assemble(json.dumps({"__metadata__": value, **top}, separators=(",", ":")).encode(), buffer)

    text = compact(metadata)
    yield "no metadata", assemble(json.dumps(top, separators=(",", ":")).encode(), buffer)
    for name, value in {
        "null": None,
        "empty": {},
        "a string": text,
        "another key": {"format": "pt"},
        "two keys": {"learngene": text, "format": "pt"},
        "an object in place of the text": {"learngene": metadata},
        "a number in place of the text": {"learngene": 1},
    }.items():
        yield f"metadata: {name}", outer(value)
    for name, inner in {
        "empty text": "",
        "not JSON": "{",
        "spaces": json.dumps(metadata, sort_keys=True),
        "not sorted": json.dumps(dict(reversed(sorted(metadata.items()))), separators=(",", ":")),
        "not ASCII": json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
        "a list": f"[{text}]",
        "a key twice": '{"license":"MIT",' + text[1:],
        "64 KiB and more": compact({**metadata, "provenance": {"text": "x" * 2**16}}),
        "5 MB": compact({**metadata, "provenance": {"text": "x" * 5_000_000}}),
        "nested 30,000 deep": compact(metadata).replace('"caf\\u00e9"', "[" * 30_000 + "]" * 30_000),
        "nested 900 deep and not canonical": text.replace('"caf\\u00e9"', " " + "[" * 900 + "]" * 900),
        "NaN": text.replace("1.5", "NaN"),
        "Infinity": text.replace("1.5", "-Infinity"),
        "1e999": text.replace("1.5", "1e999"),
        "a float written long": text.replace("1.5", "1.50"),
        "a number of 5,000 digits": text.replace("1.5", "9" * 5000),
        "minus zero": text.replace("1.5", "-0"),
        "a number with an exponent": text.replace("1.5", "15e-1"),
        "34 deep": text.replace('"caf\\u00e9"', "[" * 30 + "[]" + "]" * 30),
        "900 deep": text.replace('"caf\\u00e9"', "[" * 900 + "]" * 900),
        "half a surrogate pair": text.replace("caf", "\\ud800"),
        "half a surrogate pair as a key": text.replace('"seconds"', '"s\\udfff"'),
        **{
            f"a key twice in {key}": re.sub(rf'("{key}":{{)("\w+":)', r"\1\g<2>0,\2", text, count=1)
            for key, value in metadata.items()
            if isinstance(value, dict)
        },
        "a key twice further in": text.replace('"caf\\u00e9"', '{"a":[{"b":0,"b":0}]}'),
    }.items():
        yield f"metadata text: {name}", put_together(top, inner, buffer)


# What a stranger may put in place of a fact, or change of a mapping of facts.
WRONG: dict[str, list[Any]] = {
    "format": [0, -1, 2, 10**30, "1", True, 1.0],
    "read_by": ["", "0.0.9"],
    "method": ["", "nope", "../tiny", "os.system", "tiny\x1b[31m", "tiny\u202e"],
    "settings": [{"unknown": 1}, {"speed": 0.25, "name": "x"}],
    "license": ["MIT\nx", "\x1b[31m"],
}
WRONG_SHAPE: list[dict[str, Any]] = [
    {"depth": 0},
    {"depth": -1},
    {"depth": True},
    {"depth": 1.0},
    {"depth": "1"},
    {"depth": None},
    {"depth": 10**9},
    {"width": 8},
    {"width": 10**400, "heads": 10**400},
    {"width": 10**9, "heads": 7},
    {"mlp_ratio": 4},
    {"mlp_ratio": 1e308},
    {"head_dim": 0},
    {"image_size": 3},
    {"pool": ["token"]},
    {"pool": "nope"},
    {"extra": 1},
    {"kind": "vit"},
    {"kind": "unknown"},
    {"kind": "learngene_hub._conv"},
    {"kind": "os.system"},
    {"kind": 5},
    {"kind": None},
    {"kind": ["conv"]},
    {"kind": "heads"},
    {"kind": "stitched"},
    {"kind": "conv"},
]
CONV = {
    "kind": "conv", "family": "vgg", "head_hidden": 0, "head_kernel": 0, "image_size": 4, "in_chans": 3,
    "classes": 0, "stages": [[4]],
}  # fmt: skip
WRONG_CONV: list[dict[str, Any]] = [  # the first is a network, but tiny grows plain ViTs
    {},
    {"family": "os.system"},
    {"stages": [[10**9]]},
    {"stages": [[10**400]]},
    {"stages": [[4] * 8000]},
    {"stages": {"a": {"b": 10**9}}},
    {"stages": []},
]
WRONG_HEADS: list[Any] = [[2, 3], [10**9], [1] * 9000, "23", {"0": 2}]  # of each block
WRONG_REACH: list[dict[str, Any]] = [
    *({"depths": [1, 2], "widths": [4, 8, 4], "heads": heads} for heads in ([2, 1], [1], [1, 2**30], None, {"0": 1})),
    *({"depths": [1, 2], "widths": [4, 8, 4], "routes": routes} for routes in (0, -1, True, "3", 2.0, 2**30, None)),
    {"depths": [1, 2]},
    {"depths": [2, 1], "widths": [4, 8, 4]},
    {"depths": [1, 10**9], "widths": [4, 8, 4]},
    {"depths": [1, 2], "widths": [4, 8, 0]},
    {"depths": [1, 2], "widths": [4, 8]},
    {"depths": [1, "2"], "widths": [4, 8, 4]},
    {"depths": {"0": 1, "1": 2}, "widths": [4, 8, 4]},
]
WRONG_ANCESTOR: list[dict[str, Any]] = [
    {"sha256": "0" * 63},
    {"sha256": "Z" * 64},
    {"name": 1},
    {"name": "a\nb"},
    {"path": "/etc"},
]
WRONG_PREPROCESSING: list[dict[str, Any]] = [
    {"mean": []},
    {"mean": "0.5"},
    {"mean": ["0.5", "0.5", "0.5"]},
    {"mean": [10**400, 0.5, 0.5]},
    {"mean": [True, 0.5, 0.5]},
    {"std": [0, 0, 0]},
    {"std": [-0.0, 0.5, 0.5]},
    {"std": [0.5]},
    {"crop_pct": "0.9"},
    {"crop_pct": 0},
    {"crop_pct": 1.5},
    {"interpolation": "os.system"},
    {"x": 1},
]


def _bad_facts(good: bytes) -> Iterator[tuple[str, bytes]]:
    top, metadata, buffer = take_apart(good)
    for key in metadata:
        yield f"without {key}", put_together(top, {k: v for k, v in metadata.items() if k != key}, buffer)
        for value in (None, [], 7, "x\n", *([{"a": 1}] if key != "provenance" else [])):
            yield f"{key} is {value!r}", put_together(top, {**metadata, key: value}, buffer)
    yield "an unknown key", put_together(top, {**metadata, "url": "https://example.com"}, buffer)
    for key, values in (WRONG | _wrong_mappings(metadata)).items():
        for value in values:
            yield f"{key} is {value!r}", put_together(top, {**metadata, key: value}, buffer)


def _wrong_mappings(metadata: dict[str, Any]) -> dict[str, list[Any]]:
    """Facts that are mappings, with one thing wrong in each."""
    shape = metadata["shape"]
    heads = {key: value for key, value in shape.items() if key not in ("depth", "heads")} | {"kind": "heads"}
    shapes = [{**shape, **change} for change in WRONG_SHAPE] + [{**CONV, **change} for change in WRONG_CONV]
    return {
        "shape": shapes + [{**heads, "heads": counts} for counts in WRONG_HEADS],
        "reach": WRONG_REACH,
        "ancestor": [{**metadata["ancestor"], **change} for change in WRONG_ANCESTOR],
        "preprocessing": [{**metadata["preprocessing"], **change} for change in WRONG_PREPROCESSING],
    }


def _bad_tensors(good: bytes) -> Iterator[tuple[str, bytes]]:
    top, metadata, buffer = take_apart(good)
    first = next(iter(top))
    names = (
        "../../etc/passwd",
        "stem",
        "stem.",
        ".x",
        "Stem.x",
        "stem..x",
        "stem/x.y",
        "stem.x/y",
        "stem.x\n",
        "stem.x ",
    )
    alike = ("st\u0435m.x", "\uff53tem.x", "stem\u2024x", "stem.\u202ex", "stem.x\u0661", "/etc/passwd", "..\\x", "~.x")
    others = ("", "stem.\0", "stem.\u00e9", "stem." + "x" * 200, "width.x", "stem.other", "con.x", "__metadata__.x")
    for name in (*names, *alike, *others):
        renamed = {name if key == first else key: info for key, info in top.items()}
        yield f"tensor name {name!r:.40}", put_together(renamed, metadata, buffer)
    yield "no tensors", put_together({}, metadata, b"")
    yield "a tensor missing", put_together({first: top[first]}, metadata, buffer[:16])
    for count in (4097, 100_000):
        many = {f"stem.x{i:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
        yield f"{count} empty tensors", put_together(many, metadata, b"")
    many = {f"stem.{i:x}": {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(5000)}
    yield "5,000 tensors", put_together(many, metadata, b"\0" * 10_000)
    changes: list[dict[str, Any]] = [
        {"dtype": kind} for kind in ("F64", "I64", "I8", "BOOL", "F8_E4M3", "C64", "", None, ["F32"])
    ]
    shapes = (
        [0],
        [-4],
        [4.0],
        ["4"],
        [True],
        [2, 2, 1],
        [1] * 9 + [4],
        4,
        None,
        "4",
        [2**62, 0],
        [2**63],
        [2**32, 2**32],
        [2**31 - 1] * 8,
        [2**61, 2**3, 2],
    )
    changes += [{"shape": shape} for shape in (*shapes, [[4]], {"0": 4}, [])]
    offsets = (
        [0, 8],
        [0, 24],
        [4, 20],
        [-4, 12],
        [16, 0],
        [0],
        [0, 16, 16],
        None,
        "0",
        [0.0, 16.0],
        [False, 16],
        [0, 2**64],
    )
    changes += [{"data_offsets": value} for value in offsets] + [{"url": "https://example.com"}]
    for change in changes:
        yield f"a tensor with {change!r}", put_together({**top, first: {**top[first], **change}}, metadata, buffer)
    for info in (None, [], "F32", {}, {"dtype": "F32"}):
        yield f"a tensor that is {info!r}", put_together({**top, first: info}, metadata, buffer)
    yield from _misplaced(top, metadata, buffer)
    for size in (0, 1, len(buffer) - 1):
        yield f"truncated to {size} bytes of tensors", good[: len(good) - len(buffer) + size]
    yield "one byte more", good + b"\0"


def _misplaced(top: dict[str, Any], metadata: Any, buffer: bytes) -> Iterator[tuple[str, bytes]]:
    """Tensors over each other, and holes between them, also where the file is as long as the last of them needs."""
    names = [*top]
    for which in (1, 2):
        for step in (-8, -1, 1, 8, 2**63, -(2**40)):
            moved = {
                name: {**info, "data_offsets": [end + step * (name in names[which:]) for end in info["data_offsets"]]}
                for name, info in top.items()
            }
            grown = buffer + bytes(step) if 0 < step < 10 else buffer[:step] if -10 < step < 0 else buffer
            yield f"tensors from {which} on moved by {step}", put_together(moved, metadata, grown)
    begin, end = top[names[0]]["data_offsets"]
    last = {**top[names[-1]], "data_offsets": [begin, begin + 8]}
    yield "a tensor inside another", put_together({**top, names[-1]: last}, metadata, buffer[:-8])
    yield "a hole before the first", put_together(top, metadata, b"\0" * 8 + buffer)


def _bad_values(good: bytes) -> Iterator[tuple[str, bytes]]:
    top, _, buffer = take_apart(good)
    start = len(good) - len(buffer)
    special = {"F32": (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff")}
    special["BF16"] = tuple(value[2:] for value in special["F32"])
    special["F16"] = (b"\0\x7e", b"\0\x7c", b"\0\xfc")
    for name, info in top.items():
        for value, bits in zip(("NaN", "Infinity", "-Infinity"), special[info["dtype"]], strict=True):
            at = start + info["data_offsets"][1] - len(bits)
            yield f"{value} in {name}", good[:at] + bits + good[at + len(bits) :]

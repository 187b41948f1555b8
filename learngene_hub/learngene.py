"""Learngene: the artefact, and the one file that holds it. The only file that imports safetensors.

The file, ``learngene.safetensors``, format 1
---------------------------------------------
A safetensors file with less freedom, so that one learngene has exactly one byte string and a sha256 pins it:

    8 bytes     N, the length of the header: unsigned, little-endian, a multiple of 8, at most 1 MiB
    N bytes     the header: JSON in UTF-8 without spaces, then spaces up to N
    the rest    the tensors' bytes, little-endian, row-major, in the header's order, without holes; at most 4 GiB

The header is one object. Its first key is ``__metadata__``. The others are tensors, F32 first, then BF16, then F16,
each sorted by name, and map to ``{"dtype":...,"shape":[...],"data_offsets":[begin,end]}``, counted from the end of
the header.

- At most 4096 tensors. Names are ``group.rest``: a group of lower-case letters, digits and ``_``, then one or more
  parts of letters, digits, ``_`` and ``-``, with a dot before each; at most 128 characters. Each method declares its
  groups.
- At most 8 axes, each of 1 to 2^31 - 1 entries. Values are finite.
- ``__metadata__`` has exactly one key, ``learngene`` (several would be written in any order). Its value is a string
  of at most 64 KiB: canonical JSON, which is ASCII, keys sorted, no spaces, no NaN or Infinity, floats as Python
  writes them (the shortest decimal that reads back). Objects and lists stand at most 32 deep in each other, and no
  string has half a surrogate pair. That object has exactly these keys:

    ``format``         1
    ``read_by``        the first version of learngene-hub that reads this format: "0.1.0" for format 1
    ``method``         name of the method that grows it, looked up in the table of methods and nowhere else
    ``settings``       an object; the method's settings
    ``shape``          the native shape: its ``to_dict``, no number above 2^20. Its ``kind`` says which class it is of:
                       absent: ViTShape; "heads": HeadsShape; "stitched": StitchedShape; "conv": ConvShape; no other
    ``reach``          the shapes it can be grown to: ``Reach.to_dict``, no number above 2^20; ``heads`` (a list of
                       two) and ``routes`` (a number) only where the learngene has them
    ``ancestor``       ``name``, ``sha256`` (64 hex digits or empty), ``license`` and ``source``: strings of one line
    ``preprocessing``  of the ancestor's images: ``Preprocessing.to_dict``
    ``license``        SPDX identifier of the learngene, or empty
    ``provenance``     an object of free facts: data sets, seconds, seeds, versions, ... One of them acts:
                       ``pool_image_size``, of the anchor of a pool and of a mixture, is the side of the images, in
                       pixels, for which it is grown where no other is asked

A reader refuses everything else. It looks at ``format`` before the rest: a later format is refused with its
``read_by``. It checks the whole header, and the tensors' shapes against the native shape (the method knows how),
before it reads a tensor; then the digest, if one was promised; then that every value is finite. There is no other
format to fall back to, pickle least of all, and no path, module or URL that stands in a file is ever opened or
imported.

A writer writes to a temporary name in the same folder, flushes, and renames: a file is whole or absent. A writer that
was killed may leave its temporary file, ``.<16 hex digits>.tmp``, which nothing reads and anyone may delete.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learngene_hub._format import (
    FILE_NAME,
    KEYS,
    ODD,
    SHA256,
    Facts,
    canonical_metadata,
    encode,
    naming,
    one_line,
    opened,
    parse,
    read_head,
    short,
    shown,
)
from learngene_hub._format import read_facts as read_facts
from learngene_hub.errors import ArtefactError, DigestError, LearngeneError, SettingsError, StoreError
from learngene_hub.shape import Preprocessing, Reach, ViTShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from learngene_hub.hub import Pushed

POOL_SIZE = "pool_image_size"  # the fact of a provenance that acts
MAX_REREAD = 2**26  # bytes of a refused file that are read to tell whether it was the promised one


@dataclass(frozen=True, kw_only=True, eq=False)
class Learngene:
    """Tensors, and the facts needed to grow them. Two learngenes are the same where their digests are."""

    tensors: Mapping[str, Tensor] = field(repr=False)  # `group.rest`, as stored: in float16 if the file has them so
    method: str
    settings: Mapping[str, Any]  # JSON
    shape: Any  # native, a Shape; a ViTShape unless the method has a ``plan`` of its own
    reach: Reach
    ancestor: Mapping[str, str]  # name, sha256, license, source
    preprocessing: Preprocessing
    license: str  # SPDX; may be empty until it is pushed
    provenance: Mapping[str, Any] = field(repr=False)  # JSON

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sha256: str | None = None) -> Learngene:
        """The learngene in this file, on the CPU, in the stored dtypes.

        Raises:
            ArtefactError: the file is not a learngene of format 1.
            DigestError: its bytes have another sha256 than the promised one.
            StoreError: the file cannot be read.
            SettingsError: the promised sha256 is not one.
        """
        promised = _promised(sha256)
        path = Path(path)
        with naming(path), opened(path) as (file, size):
            try:
                head, facts = read_head(file, size)
                _check_method(facts)
            except ArtefactError as error:
                if promised is not None and size <= MAX_REREAD:  # a damaged copy is to be told as one
                    file.seek(0)
                    _check_digest(hashlib.sha256(file.read(size)).hexdigest(), promised, path, f" ({error})")
                raise
            file.seek(0)
            data = file.read(size + 1)
            if len(data) != size or not data.startswith(head):
                raise ArtefactError("changed while it was read; try again")
            digest = hashlib.sha256(data).hexdigest()
            _check_digest(digest, promised, path)
            tensors = _tensors(data)
        learngene = cls(tensors=tensors, **{key: getattr(facts, key) for key in KEYS})
        vars(learngene)["digest"] = digest  # one learngene has one byte string, and this was it
        return learngene

    def save(self, path: str | os.PathLike[str]) -> str:
        """The digest of the file written: whole, or not at all.

        Raises:
            ArtefactError: the file could not be loaded again, such as for a value that is not finite.
            StoreError: it cannot be written there, or no space is left.
        """
        path = Path(path)
        header, names = self._header()
        _check_method(parse(header, 8 + len(header) + self.nbytes))
        _check_finite(self.tensors)
        head = len(header).to_bytes(8, "little") + header
        digest = hashlib.sha256()
        _write(path, _hashed((head, *(_raw(self.tensors[name]) for name in names)), digest), len(head) + self.nbytes)
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file that ``save`` writes."""
        header, names = self._header()
        digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
        for name in names:
            digest.update(_raw(self.tensors[name]))
        return digest.hexdigest()

    def to(self, dtype: torch.dtype) -> Learngene:
        """The same with every tensor in ``dtype``, such as torch.float16 for half the bytes."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def pool_size(self) -> int | None:
        """Pixels of the images of the pool that it is of; None of a learngene that is of no pool."""
        size = self.provenance.get(POOL_SIZE)
        return size if type(size) is int and size > 0 else None

    def in_pool(self, image_size: int) -> Learngene:
        """The same as part of a pool whose images have so many pixels."""
        return replace(self, provenance={**self.provenance, POOL_SIZE: image_size})

    @property
    def image_size(self) -> int:
        """Pixels of the images of a descendant where none are asked: the pool's, else the native ones."""
        return self.pool_size or self.shape.image_size

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def params(self) -> int:
        """Numbers stored."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of one group, without its prefix; empty where it has none."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    @classmethod
    def from_pretrained(cls, name_or_path_or_uri: str | os.PathLike[str], *, revision: str | None = None) -> Learngene:
        """The learngene of this path, registry name or Hub repository; see ``learngene_hub.hub.pull``."""
        from learngene_hub.hub import pull

        return pull(name_or_path_or_uri, revision=revision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        create_pr: bool = False,
        branch: str | None = None,
        message: str | None = None,
        description: str = "",
        license: str | None = None,
        token: str | None = None,
        overwrite: bool = False,
    ) -> Pushed:
        """This and its card, in a Hub repository; see ``learngene_hub.hub.push``."""
        from learngene_hub.hub import push

        return push(
            self,
            repo_id,
            private=private,
            create_pr=create_pr,
            branch=branch,
            message=message,
            description=description,
            license=license,
            token=token,
            overwrite=overwrite,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """The file written: ``folder/learngene.safetensors``. The folder is made where it is missing.

        Raises:
            ArtefactError, StoreError: as ``save``.
        """
        path = Path(folder) / FILE_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"cannot make the folder {shown(path.parent)}: {why}; choose another") from error
        self.save(path)
        return path

    def expand(
        self,
        *,
        depth: int | None = None,
        width: int | None = None,
        heads: int | Sequence[int] | None = None,
        num_labels: int | None = None,
        image_size: int | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        max_params: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """The timm model grown from this learngene; see ``learngene_hub.factory.expand``."""
        from learngene_hub.factory import expand

        return expand(
            self,
            depth=depth,
            width=width,
            heads=heads,
            num_labels=num_labels,
            image_size=image_size,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            dtype=dtype,
            device=device,
            seed=seed,
            max_params=max_params,
            settings=settings,
        )

    def _header(self) -> tuple[bytes, list[str]]:
        """The padded JSON of the file, and the tensors' names in its order."""
        tensors = {name: (_dtype_name(name, tensor), tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        facts = {key: getattr(self, key) for key in KEYS}
        return encode(canonical_metadata(facts), tensors)


def _promised(sha256: str | None) -> str | None:
    """A sha256 in lower case.

    Raises:
        SettingsError: it is not one.
    """
    if sha256 is not None and not (isinstance(sha256, str) and SHA256.match(sha256.lower())):
        raise SettingsError(f"sha256 {sha256!r} asked; it is 64 hex digits")
    return sha256 and sha256.lower()


def _check_digest(digest: str, promised: str | None, path: Path, besides: str = "") -> None:
    if promised is not None and digest != promised:
        place = shown(os.path.realpath(path))
        raise DigestError(
            f"its sha256 is {digest}, {promised} was promised; delete {place} and fetch it again{besides}"
        )


def _check_method(facts: Facts) -> None:
    """Known method, declared groups, shapes that its native shape allows."""
    from learngene_hub.methods import get_method, is_planning  # reached here only: methods stand above this file

    shapes = {name: shape for name, (_, shape) in facts.tensors.items()}
    try:
        method = get_method(facts.method, facts.settings)
        if not (isinstance(facts.shape, ViTShape) or is_planning(method)):
            raise ArtefactError(f"a native shape of kind {facts.shape.kind}; {facts.method} grows plain ViTs alone")
        unknown = sorted({name.partition(".")[0] for name in shapes} - method.groups)
        if unknown:
            declared = ", ".join(sorted(method.groups))
            raise ArtefactError(f"groups {short(unknown)}; those of {facts.method} are {declared}")
        method.check(shapes, facts.shape)
    except ArtefactError:
        raise
    except LearngeneError as error:
        raise ArtefactError(one_line(error)) from error
    except ODD as error:
        raise ArtefactError(f"{facts.method} cannot use its settings or shapes: {one_line(error)}") from error


def _tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file whose header is checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtefactError(f"safetensors refuses it: {one_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, beside every class that can be imported
            raise
        raise MemoryError(one_line(error)) from error  # the one reason left, once the header is checked
    _check_finite(tensors)
    return tensors


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity. One sum per tensor, and a second look where it may have overflowed."""
    import torch

    for name, tensor in tensors.items():
        if not math.isfinite(tensor.detach().sum(dtype=torch.float32).item()) and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ArtefactError(f"{name} has {bad} values that are NaN or infinite; extract it again")


def _dtype_name(name: str, tensor: Tensor) -> str:
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise ArtefactError(f"{name} is a {type(tensor).__name__}; a dense torch tensor can be saved")
    if tensor.dtype not in names or tensor.is_meta:
        raise ArtefactError(f"{name} is {tensor.dtype} on {tensor.device}; cast it to float32, bfloat16 or float16")
    return names[tensor.dtype]


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _hashed(chunks: Iterable[bytes | memoryview], digest: hashlib._Hash) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _write(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> None:
    """Write a whole file, or nothing: temporary name in the same folder, flushed, renamed."""
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        if path.exists() and not path.is_file():  # a device would be replaced by a file
            raise FileExistsError(errno.EEXIST, "it is not a file")
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # makes the new name last too, where folders can be flushed
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise StoreError(_why_unwritten(path, size, error)) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def _why_unwritten(path: Path, size: int, error: OSError | ValueError) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free
        return f"no space left for {shown(path)}: {size} bytes are needed, {free} are free; nothing was written"
    if code == errno.ENOENT:
        return f"no folder {shown(path.parent)}; make it first"
    return f"cannot write {shown(path)}: {getattr(error, 'strerror', None) or error}; nothing was written"

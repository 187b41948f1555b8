"""Reading image collections: parquet, class folders and Hub data sets become `Rows`, and rows become uint8 pixels.

Private half of `data.py`. Parquet and folders are read with pyarrow and Pillow; the `datasets` library is imported only
for a Hub id. Nothing here runs code of a data set.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from learngene_hub.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev", "eval"})
SAMPLES = ("signdigits",)  # data sets that ship inside the package, under samples/
LABEL_NAMES = ("label", "labels", "class", "target")  # tried in this order when no feature says which column it is


@dataclass(frozen=True)
class Rows:
    """Encoded images, not read yet: `read(i)` gives the bytes of row i, `where(i)` names it in an error."""

    read: Callable[[int], bytes]
    where: Callable[[int], str]
    labels: Sequence[Any]
    classes: tuple[str, ...] | None  # None: no names there; they are numbered


def read_source(
    source: str | Path,
    split: str,
    image_column: str | None,
    label_column: str | None,
    *,
    unlabelled: bool = False,
) -> Rows:
    """Rows of a parquet file, a folder, or a Hub id, whichever `source` is; unlabelled ones all have the label 0."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path} is a file but not .parquet; give a parquet file, a folder, or a Hub data set id")
        return parquet_rows([path], image_column, label_column, unlabelled=unlabelled)
    if path.is_dir():
        return folder_rows(path, split, image_column, label_column, unlabelled=unlabelled)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(source)) and path.suffix != ".parquet":
        return hub_rows(str(source), split, image_column, label_column, unlabelled=unlabelled)
    raise DataError(f"no file or folder {str(source)!r}; give a parquet file, a folder, a sample or a Hub data set id")


def folder_rows(
    folder: Path, split: str, image_column: str | None, label_column: str | None, *, unlabelled: bool = False
) -> Rows:
    """Rows of one split of a folder: its parquet files, or else class folders, under the split's name or directly; of
    unlabelled ones images in any folders, or in none."""
    inside = image_rows if unlabelled else class_folder_rows
    patterns = (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet")
    for place in (folder, folder / "data"):
        files = sorted(file for pattern in patterns for file in place.glob(pattern))
        if files:
            return parquet_rows(files, image_column, label_column, unlabelled=unlabelled)
    if _holds_folders(folder / split) or (unlabelled and split in _flat_splits(folder)):
        return inside(folder / split)
    found = sorted({*splits_there(folder), *(_flat_splits(folder) if unlabelled else ())})
    if found:
        raise DataError(f"{folder} has no split {split!r}; there: {', '.join(found)}")
    if split != "train":
        raise DataError(
            f"{folder} is not divided into splits, so it has no {split!r}: the folder that holds {split}/ would work, "
            f"or none (--test-split '', or Images.split)"
        )
    return inside(folder)


def splits_there(folder: Path) -> list[str]:
    """Names of the splits of a folder, from its parquet files and its sub-folders."""
    files = [file for place in (folder, folder / "data") for file in place.glob("*.parquet")]
    names = {re.sub(r"-\d+(-of-\d+)?$", "", file.stem) for file in files}
    names |= {place.name for place in folder.iterdir() if place.name in SPLITS and _holds_folders(place)}
    return sorted(names)


def _holds_folders(place: Path) -> bool:
    """True of a split of class folders, False of a class that is called "train"."""
    return place.is_dir() and any(inside.is_dir() for inside in place.iterdir())


def _flat_splits(folder: Path) -> list[str]:
    """The folders of a folder, where each is called as a split is; none, where one may be a class."""
    names = [place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")]
    return names if SPLITS.issuperset(names) else []


def image_rows(folder: Path) -> Rows:
    """Rows of all images in a folder and in the folders inside it, all of the label 0."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise DataError(f"{folder} holds no images and no parquet; expected {folder.name}/IMAGE")
    return Rows(lambda i: files[i].read_bytes(), lambda i: str(files[i]), [0] * len(files), None)


def class_folder_rows(folder: Path) -> Rows:
    """Rows of a folder whose sub-folders are the classes, in the order of their names."""
    kinds = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if not kinds:
        raise DataError(f"{folder} holds no class folders and no parquet; expected {folder.name}/CLASS/IMAGE")
    files: list[Path] = []
    labels: list[int] = []
    for label, kind in enumerate(kinds):
        inside = sorted(file for file in kind.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        files += inside
        labels += [label] * len(inside)
    return Rows(lambda i: files[i].read_bytes(), lambda i: str(files[i]), labels, tuple(kind.name for kind in kinds))


def parquet_rows(
    files: Sequence[Path], image_column: str | None, label_column: str | None, *, unlabelled: bool = False
) -> Rows:
    """Rows of one or several parquet files of one schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[pa.Table] = []
    image, label, features = image_column, label_column, {}
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                features = features or _features(schema.metadata)
                image, label = choose_columns(schema.names, features, image, label, str(file), unlabelled=unlabelled)
                tables.append(opened.read(columns=[image, *([label] if label else [])]))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as parquet: {_line(error)}") from error
    encoded = [chunk for table in tables for chunk in table.column(image).chunks]
    starts = np.cumsum([0] + [len(chunk) for chunk in encoded])
    labels = [v for table in tables for v in (table.column(label).to_pylist() if label else [0] * len(table))]

    def read(i: int) -> bytes:
        chunk = int(np.searchsorted(starts, i, side="right")) - 1
        return _bytes(encoded[chunk][i - int(starts[chunk])].as_py())

    names = features.get(label or "", {}).get("names")
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    return Rows(read, lambda i: f"row {i} of {source}", labels, tuple(names) if names else None)


def _sample_like(source: str) -> str:
    """A hint at a bundled sample of nearly this name."""
    near = difflib.get_close_matches(source, SAMPLES, n=1)
    return f"; did you mean the sample {near[0]!r}?" if near else ""


def hub_rows(
    source: str, split: str, image_column: str | None, label_column: str | None, *, unlabelled: bool = False
) -> Rows:
    """Rows of a Hub data set (or anything else that `datasets.load_dataset` takes), through the `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is neither a file nor a folder; reading it from the Hub needs: pip install datasets"
        ) from error
    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # the client raises dozens of classes, all of which mean: not there or not readable
        raise DataError(
            f"no file or folder {source!r}, and as a data set, split {split!r}, it cannot be had from the Hub: "
            f"{_line(error)}{_sample_like(source)}"
        ) from error
    features = {name: _feature(feature) for name, feature in table.features.items()}
    image, label = choose_columns(
        list(table.column_names), features, image_column, label_column, source, unlabelled=unlabelled
    )
    plain = table.cast_column(image, datasets.Image(decode=False))
    names = features.get(label or "", {}).get("names")

    def read(i: int) -> bytes:
        cell = plain[i][image]  # bytes, or the path of a file that the library has downloaded
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None and cell["path"] else _bytes(cell)

    return Rows(
        read,
        lambda i: f"row {i} of {source}",
        list(plain[label]) if label else [0] * len(plain),
        tuple(names) if names else None,
    )


def choose_columns(
    columns: Sequence[str],
    features: dict[str, Any],
    image: str | None,
    label: str | None,
    source: str,
    *,
    unlabelled: bool = False,
) -> tuple[str, str | None]:
    """The image and the label column: as asked, as the features say, or by name. DataError lists the columns.

    Unlabelled images need no label column, and none is looked for.
    """
    there = f"{source} has the columns {', '.join(columns)}"
    for asked in (image, label):
        if asked is not None and asked not in columns:
            raise DataError(f"no column {asked!r}; {there}")
    image = image or _only(columns, features, "Image") or next((c for c in ("image", "img") if c in columns), None)
    if image is None:
        raise DataError(f"no image column found; {there}; name it with image_column")
    if unlabelled:
        return image, None
    label = label or _only(columns, features, "ClassLabel") or next((c for c in LABEL_NAMES if c in columns), None)
    if label is None:
        raise DataError(f"no label column found; {there}; name it with label_column")
    return image, label


def decode(encoded: bytes, size: int, channels: int) -> np.ndarray:
    """Pixels (channels, size, size), uint8: shorter side to `size` (bicubic), centre cropped. Raises as Pillow does."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded)) as opened:
        opened.draft("RGB", (2 * size, 2 * size))  # JPEG only: decodes large photos at a half, a quarter, ...
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def decode_rows(
    rows: Rows, indices: Sequence[int], size: int, channels: int, skip_unreadable: bool
) -> tuple[np.ndarray, list[int]]:
    """Pixels (n, channels, size, size) of the chosen rows, and the indices that were readable.

    Raises:
        DataError: a row cannot be read and is not to be skipped; the message names it.
    """
    pixels = np.empty((len(indices), channels, size, size), dtype=np.uint8)

    def fill(position: int) -> str | None:
        try:
            pixels[position] = decode(rows.read(indices[position]), size, channels)
        except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
            return _line(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
        faults = list(workers.map(fill, range(len(indices))))
    bad = [position for position, fault in enumerate(faults) if fault is not None]
    if bad and not skip_unreadable:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(
            f"unreadable image {rows.where(indices[bad[0]])}{more}: {faults[bad[0]]}; "
            "repair or remove it, or leave such ones out: --skip-unreadable, skip_unreadable=True"
        )
    if not bad:
        return pixels, list(indices)
    good = [position for position, fault in enumerate(faults) if fault is None]
    return pixels[good], [indices[position] for position in good]


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Hugging Face features from a parquet schema's metadata; {} where there are none."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: feature for name, feature in found.items() if isinstance(feature, dict)}


def _feature(feature: Any) -> dict[str, Any]:
    """A `datasets` feature in the form that it has in parquet metadata."""
    return {"_type": type(feature).__name__, "names": getattr(feature, "names", None)}


def _only(columns: Sequence[str], features: dict[str, Any], kind: str) -> str | None:
    """The one column whose feature is of this kind; None where there is none, or more than one."""
    found = [name for name in columns if features.get(name, {}).get("_type") == kind]
    return found[0] if len(found) == 1 else None


def _bytes(value: Any) -> bytes:
    """Encoded bytes of a parquet image cell: raw bytes, or a struct with a field `bytes`."""
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise ValueError("it holds no image bytes")
    return encoded


def _line(error: BaseException) -> str:
    """First line of an error, with its class where the text alone would say little."""
    text = str(error).strip().splitlines()
    if not text:
        return type(error).__name__
    return "of no known image format" if text[0].startswith("cannot identify image file") else text[0]

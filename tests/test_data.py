"""Images from real files, and every augmentation against a naive loop or an identity."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from learngene_hub import _augment, _decode
from learngene_hub.data import (
    Augment,
    Images,
    load_images,
    normalise,
    ordered_batches,
    seed_of,
    shuffled_indices,
)
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.shape import IMAGENET, Preprocessing

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def encoded(
    color: tuple[int, ...] | int, size: tuple[int, int] = (20, 20), kind: str = "PNG", mode: str = "RGB"
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, images: list[Any], labels: list[Any], names: list[str] | None = None) -> Path:
    """A parquet file as `datasets` writes it; without names it has no features either."""
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array([{"bytes": b, "path": None} for b in images], cell), "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_classes(folder: Path, kinds: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> Path:
    for kind, color in zip(kinds, COLORS, strict=False):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            (folder / kind / f"{i}.png").write_bytes(encoded(color))
    return folder


class TestSources:
    def test_sample(self) -> None:
        images = load_images("signdigits", split="test", size=32, limit=30)
        assert images.pixels.shape == (30, 3, 32, 32)
        assert images.classes == tuple("0123456789")
        assert images.name == "signdigits"

    def test_limit_is_drawn_by_seed(self) -> None:
        one, same, other = (load_images("signdigits", split="test", size=16, limit=20, seed=s) for s in (0, 0, 1))
        assert torch.equal(one.pixels, same.pixels)
        assert not torch.equal(one.labels, other.labels)

    def test_parquet_file_with_features(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", [encoded(c) for c in COLORS], [2, 0, 1], ["x", "y", "z"])
        images = load_images(file, size=8)
        assert images.classes == ("x", "y", "z")
        assert images.labels.tolist() == [2, 0, 1]
        assert images.pixels[1, :, 4, 4].tolist() == [30, 200, 30]

    def test_parquet_without_features_numbers_the_classes(self, tmp_path: Path) -> None:
        images = load_images(write_parquet(tmp_path / "a.parquet", [encoded(c) for c in COLORS], [2, 0, 0]), size=8)
        assert images.classes == ("0", "1", "2")

    @pytest.mark.parametrize(
        "names", [["test.parquet"], ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]]
    )
    @pytest.mark.parametrize("place", ["", "data"])
    def test_folder_of_parquet(self, tmp_path: Path, names: list[str], place: str) -> None:
        for i, name in enumerate(names):
            write_parquet(tmp_path / place / name, [encoded(COLORS[i])] * 2, [i, i], ["x", "y"])
        write_parquet(tmp_path / place / "train.parquet", [encoded(COLORS[2])], [0], ["x", "y"])
        images = load_images(tmp_path, split="test", size=8)
        assert images.labels.tolist() == [i for i in range(len(names)) for _ in range(2)]
        assert images.pixels[-1, :, 0, 0].tolist() == list(COLORS[len(names) - 1])

    def test_class_folders(self, tmp_path: Path) -> None:
        write_classes(tmp_path)
        (tmp_path / "cat" / "notes.txt").write_text("not an image")
        (tmp_path / ".cache").mkdir()
        images = load_images(tmp_path, size=8)
        assert images.classes == ("cat", "dog")
        assert images.labels.tolist() == [0, 0, 1, 1]

    def test_class_folders_under_splits(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "train")
        write_classes(tmp_path / "test", count=3)
        assert len(load_images(tmp_path, split="test", size=8)) == 6
        with pytest.raises(DataError, match="no split 'validation'; there: test, train"):
            load_images(tmp_path, split="validation", size=8)

    def test_images_are_called_after_the_folder_above_a_split(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "pets" / "train")
        file = write_parquet(
            tmp_path / "maps" / "data" / "test-00000-of-00001.parquet", [encoded(COLORS[0])], [0], ["x"]
        )
        assert load_images(tmp_path / "pets", size=8).name == "pets"
        assert load_images(tmp_path / "pets" / "train", size=8).name == "pets"
        assert load_images(file, size=8).name == "maps"

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_classes(tmp_path, ("bus", "train"))
        assert load_images(tmp_path, size=8).classes == ("bus", "train")

    def test_undivided_folder_has_no_test_split(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not divided into splits"):
            load_images(write_classes(tmp_path), split="test", size=8)

    def test_unlabelled_images_stand_in_any_folders_or_none(self, tmp_path: Path) -> None:
        flat, kinds = tmp_path / "flat", write_classes(tmp_path / "kinds")
        (flat / ".thumbnails").mkdir(parents=True)
        for name in ("a.png", "b.jpg", ".thumbnails/c.png"):
            (flat / name).write_bytes(encoded(COLORS[0]))
        (flat / "notes.txt").write_text("no image")
        with pytest.raises(DataError, match="holds no class folders"):
            load_images(flat, size=20)
        images = load_images(flat, size=20, unlabelled=True)
        assert (len(images), images.labels.tolist(), images.classes, images.name) == (2, [0, 0], ("0",), "flat")
        read = load_images(kinds, size=20, unlabelled=True)
        assert torch.equal(read.pixels, load_images(kinds, size=20).pixels) and read.labels.tolist() == [0] * 4
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="empty holds no images and no parquet; expected empty/IMAGE"):
            load_images(tmp_path / "empty", unlabelled=True)

    def test_unlabelled_images_have_splits_too(self, tmp_path: Path) -> None:
        for split, count in (("train", 3), ("test", 1)):
            (tmp_path / split).mkdir()
            for i in range(count):
                (tmp_path / split / f"{i}.png").write_bytes(encoded(COLORS[0]))
        assert len(load_images(tmp_path, size=20, unlabelled=True)) == 3
        assert len(load_images(tmp_path, size=20, split="test", unlabelled=True)) == 1
        with pytest.raises(DataError, match="has no split 'val'; there: test, train"):
            load_images(tmp_path, split="val", unlabelled=True)
        write_classes(tmp_path, ("cat",))  # now train may be a class
        assert len(load_images(tmp_path, size=20, unlabelled=True)) == 6

    def test_unlabelled_parquet_needs_no_label_column(self, tmp_path: Path) -> None:
        cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"image": pa.array([{"bytes": encoded(COLORS[0]), "path": None}] * 3, cell)})
        pq.write_table(table, tmp_path / "some.parquet")
        with pytest.raises(DataError, match="no label column"):
            load_images(tmp_path / "some.parquet")
        assert load_images(tmp_path / "some.parquet", size=20, unlabelled=True).labels.tolist() == [0, 0, 0]

    def test_datasets_reads_a_folder_without_scripts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "set"
        write_parquet(folder / "train.parquet", [encoded(c) for c in COLORS], [1, 0, 1], ["x", "y"])
        rows = _decode.hub_rows(str(folder), "train", None, None)
        assert (list(rows.labels), rows.classes) == ([1, 0, 1], ("x", "y"))
        assert _decode.decode(rows.read(1), 8, 3)[:, 0, 0].tolist() == [30, 200, 30]
        with pytest.raises(DataError, match="split 'test'.*Unknown split"):
            _decode.hub_rows(str(folder), "test", None, None)

    def test_unreachable_hub_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def refuse(*_: Any, **__: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub\nTraceback: many lines")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(DataError) as caught:
            load_images("nobody/nothing")
        assert str(caught.value) == (
            "no file or folder 'nobody/nothing', and as a data set, split 'train', it cannot be had from the Hub: "
            "Couldn't reach the Hub"
        )

    def test_datasets_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(DataError, match="pip install datasets"):
            load_images("nobody/nothing")


class TestNumbered:
    def test_by_hand(self) -> None:
        images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]), ("cat", "dog"), "few")
        found = images.numbered(["ant", "dog", "cat"])
        assert found.labels.tolist() == [2, 1, 1, 2] and found.classes == ("ant", "dog", "cat")
        assert found.pixels is images.pixels and found.name == "few"
        assert images.numbered(("cat", "dog")) is images
        for classes, said in (
            (["ant", "dog"], "'cat', which is not one of ant, dog"),
            (["cat", "cat", "dog"], "'cat'"),
        ):
            with pytest.raises(DataError, match=said):
                images.numbered(classes)


class TestBadInput:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file or folder"):
            load_images(tmp_path / "missing")
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match="not .parquet"):
            load_images(tmp_path / "a.txt")

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no class folders and no parquet"):
            load_images(tmp_path)
        (tmp_path / "cat").mkdir()
        with pytest.raises(DataError, match="holds no images"):
            load_images(tmp_path)
        with pytest.raises(DataError, match="holds no images"):
            load_images(write_parquet(tmp_path / "a.parquet", [], pa.array([], pa.int64())))

    def test_unreadable_file_is_named_and_skipped_only_on_request(self, tmp_path: Path) -> None:
        write_classes(tmp_path)
        whole = encoded(COLORS[0], (64, 64), "JPEG")
        (tmp_path / "cat" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"cat/broken\.jpg: (?i:.*truncated.*)skip_unreadable=True"):
            load_images(tmp_path, size=8)
        images = load_images(tmp_path, size=8, skip_unreadable=True)
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert images.pixels[2, :, 0, 0].tolist() == list(COLORS[1])

    def test_unreadable_row_is_named(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", [encoded(COLORS[0]), b"junk", None], [0, 0, 0])
        with pytest.raises(DataError, match=r"row 1 of .*a\.parquet \(and 1 more\): of no known image format"):
            load_images(file)
        assert len(load_images(file, size=8, skip_unreadable=True)) == 1
        with pytest.raises(DataError, match="none of its 1 images can be read"):
            load_images(write_parquet(tmp_path / "b.parquet", [b"junk"], [0]), skip_unreadable=True)

    @pytest.mark.parametrize("label", [-1, 2])
    def test_label_out_of_range(self, tmp_path: Path, label: int) -> None:
        file = write_parquet(tmp_path / "a.parquet", [encoded(COLORS[0])] * 2, [0, label], ["x", "y"])
        with pytest.raises(DataError, match=rf"row 1 of .* has label {label}; .* has 2 classes, 0 to 1"):
            load_images(file)

    @pytest.mark.parametrize("labels", [["cat", "dog"], [0.0, 1.0], [None, 1], [True, False]])
    def test_labels_that_are_no_whole_numbers(self, tmp_path: Path, labels: list[Any]) -> None:
        with pytest.raises(DataError, match="row 0 of .* labels are whole numbers from 0"):
            load_images(write_parquet(tmp_path / "a.parquet", [encoded(COLORS[0])] * 2, labels))

    def test_missing_column_lists_those_there(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", [encoded(COLORS[0])], [0])
        with pytest.raises(DataError, match="no column 'picture'; .* has the columns image, label"):
            load_images(file, image_column="picture")
        pq.write_table(pa.table({"a": [1], "image": [encoded(COLORS[0])]}), file)
        with pytest.raises(DataError, match="no label column found; .* columns a, image; name it with label_column"):
            load_images(file)
        assert load_images(file, size=8, label_column="a").labels.tolist() == [1]

    def test_files_of_one_split_have_one_schema(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", [encoded(COLORS[0])], [0])
        pq.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "train-1.parquet")
        with pytest.raises(DataError, match=r"no column 'image'; .*train-1\.parquet has the columns img, label"):
            load_images(tmp_path)

    def test_no_parquet_inside(self, tmp_path: Path) -> None:
        (tmp_path / "train.parquet").write_bytes(b"not parquet at all")
        with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet"):
            load_images(tmp_path)

    @pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 1.5}, {"limit": 0}, {"in_chans": 2}])
    def test_settings(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            load_images("signdigits", **wrong)


class TestDecode:
    @pytest.mark.parametrize(
        ("mode", "color", "kind"),
        [
            ("L", 90, "PNG"),
            ("RGBA", (90, 90, 90, 10), "PNG"),
            ("P", 7, "GIF"),
            ("1", 1, "PNG"),
            ("I;16", 90 * 256, "PNG"),
        ],
    )
    def test_every_mode_becomes_rgb(self, mode: str, color: Any, kind: str) -> None:
        pixels = _decode.decode(encoded(color, kind=kind, mode=mode), 8, 3)
        assert pixels.shape == (3, 8, 8)
        assert (pixels == pixels[0, 0, 0]).all()  # grey stays grey
        if mode in ("L", "RGBA", "I;16"):
            assert pixels[0, 0, 0] == 90

    def test_one_channel(self) -> None:
        pixels = _decode.decode(encoded((30, 60, 90)), 8, 1)
        assert pixels.shape == (1, 8, 8)
        assert pixels[0, 0, 0] == round(0.299 * 30 + 0.587 * 60 + 0.114 * 90)

    def test_shorter_side_is_resized_and_the_centre_kept(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (10, 30, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        wanted = Image.fromarray(noise).resize((15, 5), Image.Resampling.BICUBIC).crop((5, 0, 10, 5))
        assert (_decode.decode(buffer.getvalue(), 5, 3).transpose(1, 2, 0) == np.asarray(wanted)).all()

    def test_a_fitting_image_is_untouched(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        assert (_decode.decode(buffer.getvalue(), 16, 3).transpose(1, 2, 0) == noise).all()

    def test_orientation_of_a_camera(self) -> None:
        half = np.zeros((16, 16, 3), np.uint8)
        half[:8] = 255  # bright above; tag 6 says: turn right, so bright comes to the right
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        Image.fromarray(half).save(buffer, "PNG", exif=exif)
        pixels = _decode.decode(buffer.getvalue(), 16, 3)
        assert (pixels[:, :, 8:] == 255).all()
        assert (pixels[:, :, :8] == 0).all()


class TestImages:
    def make(self, count: int = 10, classes: int = 3) -> Images:
        pixels = torch.arange(count * 12, dtype=torch.uint8).view(count, 3, 2, 2)
        return Images(pixels, torch.arange(count) % classes, tuple("abc"[:classes]), "made")

    def test_subset_and_split(self) -> None:
        images = self.make()
        assert torch.equal(images.subset([3, 1]).pixels, images.pixels[[3, 1]])
        rest, held = images.split(0.3, torch.Generator().manual_seed(0))
        assert (len(rest), len(held)) == (7, 3)
        both = torch.cat([rest.pixels, held.pixels])[:, 0, 0, 0].sort().values
        assert torch.equal(both, images.pixels[:, 0, 0, 0].sort().values)

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, 0.99])
    def test_split_leaves_both_sides_some(self, fraction: float) -> None:
        with pytest.raises(SettingsError, match="cannot hold out"):
            self.make().split(fraction, torch.Generator())

    def test_refusals(self) -> None:
        pixels, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 5])
        with pytest.raises(DataError, match="label 5; 2 classes allow 0 to 1"):
            Images(pixels, labels, ("a", "b"), "x")
        with pytest.raises(DataError, match="uint8"):
            Images(pixels.float(), labels, ("a", "b"), "x")
        with pytest.raises(DataError, match="labels are int64"):
            Images(pixels, labels[:1], ("a", "b"), "x")

    def test_ordered_batches_give_each_image_once(self) -> None:
        images = self.make()
        batches = list(ordered_batches(images, 4, IMAGENET))
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
        assert torch.equal(torch.cat([pixels for pixels, _ in batches]), normalise(images.pixels, IMAGENET))


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    facts = Preprocessing(mean=(0.5, 0.1, 0.2), std=(0.5, 0.1, 0.4))
    assert normalise(pixels, facts).flatten().tolist() == pytest.approx([-1.0, 1.0, 2.0], abs=1e-6)
    assert torch.allclose(normalise(pixels.float() / 255, facts), normalise(pixels, facts), atol=1e-6)
    grey = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    facts = Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.25, 0.25, 0.25))
    assert normalise(grey, facts)[0, 0, 0, 0].item() == pytest.approx(2)


class TestOrder:
    def test_each_image_once_and_the_rest_dropped(self) -> None:
        batches = list(shuffled_indices(23, 5, seed=1, epoch=0))
        assert [len(b) for b in batches] == [5] * 4
        assert len(set(torch.cat(batches).tolist())) == 20

    def test_processes_and_micro_batches_share_one_order(self) -> None:
        whole = list(shuffled_indices(24, 8, seed=1, epoch=2))
        parts = [list(shuffled_indices(24, 8, seed=1, epoch=2, rank=r, world=2, accumulate=2)) for r in (0, 1)]
        for update, wanted in enumerate(whole):
            got = [parts[rank][2 * update + micro] for micro in (0, 1) for rank in (0, 1)]
            assert torch.equal(torch.cat(got), wanted)

    def test_epochs_and_seeds_differ(self) -> None:
        orders = {tuple(next(shuffled_indices(9, 9, seed=s, epoch=e)).tolist()) for s in (0, 1) for e in (0, 1)}
        assert len(orders) == 4
        assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", 23)}) == 3


class TestAugment:
    @pytest.fixture
    def pixels(self) -> Tensor:
        return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def test_nothing_by_default(self, pixels: Tensor) -> None:
        assert torch.equal(Augment()(pixels, self.generator()), pixels)

    def test_flip(self, pixels: Tensor) -> None:
        mirrored = torch.tensor([True, False, True, True, False, False])
        once = _augment._flip(pixels, mirrored)
        for i, mirror in enumerate(mirrored):
            assert torch.equal(once[i], pixels[i].flip(-1) if mirror else pixels[i])
        assert torch.equal(_augment._flip(once, mirrored), pixels)
        twice = Augment(flip=True)(Augment(flip=True)(pixels, self.generator()), self.generator())
        assert torch.equal(twice, pixels)
        many = Augment(flip=True)(torch.arange(2.0).expand(1000, 1, 2, 2), self.generator())
        assert 430 < (many[:, 0, 0, 0] == 1).sum() < 570

    def test_crop_is_the_naive_window(self, pixels: Tensor) -> None:
        offsets = torch.tensor([[0, 1, 2, 3, 4, 4], [4, 0, 2, 1, 3, 4]])
        padded = torch.nn.functional.pad(pixels, [2] * 4, mode="reflect")
        got = _augment._crop(pixels, 2, offsets)
        for i, (down, right) in enumerate(offsets.T.tolist()):
            assert torch.equal(got[i], padded[i, :, down : down + 8, right : right + 8])
        assert torch.equal(got[2], pixels[2])  # offset = padding: nothing moved
        assert torch.equal(_augment._crop(pixels, 0, torch.zeros(2, 6, dtype=torch.int64)), pixels)

    def test_color_by_loop(self, pixels: Tensor) -> None:
        factors = 1 + 0.5 * torch.randn(3, 6, generator=self.generator())
        got = _augment._recolor(pixels, factors)
        for i in range(6):
            x = pixels[i] * factors[0, i]
            x = x.mean() + factors[1, i] * (x - x.mean())
            grey = x.mean(0, keepdim=True)
            x = grey + factors[2, i] * (x - grey)
            assert torch.allclose(got[i], x.clamp(0, 1), atol=1e-5)
        assert torch.allclose(_augment._recolor(pixels, torch.ones(3, 6)), pixels, atol=1e-6)

    def test_erase_by_loop(self, pixels: Tensor) -> None:
        rectangles = torch.tensor([[0, 1, 2, 0, 3, 5], [8, 4, 2, 1, 8, 6], [0, 2, 0, 7, 1, 3], [8, 5, 8, 8, 2, 7]])
        got = _augment._erase(pixels, rectangles)
        for i, (top, bottom, left, right) in enumerate(rectangles.T.tolist()):
            wanted = pixels[i].clone()
            wanted[:, top:bottom, left:right] = pixels[i].mean((1, 2))[:, None, None]
            assert torch.equal(got[i], wanted)
        assert torch.equal(got[2], pixels[2])  # an empty rectangle

    def test_rectangles_stay_inside_and_keep_their_share(self) -> None:
        top, bottom, left, right = _augment._rectangles(4000, 32, 0.25, self.generator())
        hit = bottom > top
        assert 0.22 < hit.float().mean() < 0.28
        assert top.min() >= 0 and left.min() >= 0 and bottom.max() <= 32 and right.max() <= 32
        area = ((bottom - top) * (right - left))[hit] / 32**2
        assert 0.015 < area.min() and area.max() < 0.36

    def test_mixup_is_the_hand_mix(self, pixels: Tensor) -> None:
        labels = torch.arange(6) % 3
        got, targets = Augment(mixup=0.4).mix(pixels, labels, 3, self.generator())
        replay = self.generator()
        share = _augment._beta(0.4, replay)
        other = torch.randperm(6, generator=replay)
        assert 0 <= share <= 1
        for i in range(6):
            assert torch.allclose(got[i], share * pixels[i] + (1 - share) * pixels[other[i]], atol=1e-6)
            wanted = torch.zeros(3)
            wanted[labels[i]] += share
            wanted[labels[other[i]]] += 1 - share
            assert torch.allclose(targets[i], wanted, atol=1e-6)

    def test_cutmix_weighs_labels_by_area(self) -> None:
        marks = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 16)  # image i is all i
        labels = torch.arange(6)
        for seed in range(5):
            got, targets = Augment(cutmix=1.0).mix(marks, labels, 6, self.generator(seed))
            for i in range(6):
                shares = torch.stack([(got[i, 0] == j).float().mean() for j in range(6)])
                assert torch.allclose(targets[i], shares, atol=1e-6)

    def test_both_mixes_take_turns(self, pixels: Tensor) -> None:
        labels = torch.zeros(6, dtype=torch.int64)
        both = Augment(mixup=1.0, cutmix=1.0)
        blended = [
            not bool(torch.isin(both.mix(pixels, labels, 1, self.generator(seed))[0], pixels).all())
            for seed in range(20)
        ]
        assert 2 < sum(blended) < 18

    def test_beta(self) -> None:
        generator = self.generator()
        draws = torch.tensor([_augment._beta(2.0, generator) for _ in range(2000)])
        assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
        assert draws.var().item() == pytest.approx(1 / 20, abs=0.005)  # a b / ((a+b)^2 (a+b+1))

    def test_input_and_global_generator_are_left_alone(self, pixels: Tensor) -> None:
        everything = Augment(flip=True, crop_padding=2, color=0.4, erase=0.5, mixup=0.2, cutmix=1.0)
        before, state = pixels.clone(), torch.random.get_rng_state()
        one = everything(pixels, self.generator(5))
        everything.mix(one, torch.zeros(6, dtype=torch.int64), 2, self.generator(5))
        assert torch.equal(everything(pixels, self.generator(5)), one)
        assert one.shape == pixels.shape and 0 <= one.min() and one.max() <= 1
        assert torch.equal(pixels, before)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize(
        "wrong",
        [{"color": -0.1}, {"color": 1.5}, {"erase": 2}, {"mixup": math.nan}, {"crop_padding": 1.5}, {"flip": "yes"}],
    )
    def test_settings(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            Augment(**wrong)

    def test_padding_beyond_the_image(self, pixels: Tensor) -> None:
        with pytest.raises(SettingsError, match="below the image size 8"):
            Augment(crop_padding=8)(pixels, self.generator())

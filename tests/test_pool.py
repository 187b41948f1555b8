"""The pool as data: bytes that never change, a manifest that notices edits, files that are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from planted import FACTS
from pools import ONCE, TINY, anchor_of, files_of, look, noise_images, pool_of

from learngene_hub import factory
from learngene_hub._pool_file import MANIFEST, Manifest, Row, parse, place_of
from learngene_hub.errors import (
    ArtefactError,
    DataError,
    DigestError,
    LearngeneError,
    NameTakenError,
    RegistryError,
    SettingsError,
    ShapeError,
    StoreError,
)
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool
from learngene_hub.training import Step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pool of two entries. Read only."""
    folder = tmp_path_factory.mktemp("pools") / "two"
    pool_of(folder, (1, 2))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    import shutil

    return Path(shutil.copytree(made, tmp_path / "copy"))


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_adding_an_entry_changes_no_earlier_byte(tmp_path: Path) -> None:
    pool, before = pool_of(tmp_path / "pool"), dict[str, bytes]()
    for number in (1, 2, 3):
        pool = pool.add(look(number), recipe=ONCE)
        now = files_of(pool.folder)
        assert before.items() <= now.items() and len(now) == number + 1
        before = now
    for name, data in before.items():
        digest = hashlib.sha256(data).hexdigest()
        assert (
            digest == pool.anchor.digest if name == "learngene.safetensors" else name == f"entries/{digest}.safetensors"
        )


def test_the_manifest_says_what_is_there(made: Path) -> None:
    said = json.loads((made / MANIFEST).read_bytes())
    files = files_of(made)
    assert said["anchor"] == {"sha256": anchor_of().in_pool(16).digest, "bytes": len(files["learngene.safetensors"])}
    assert [row["name"] for row in said["entries"]] == ["look-1", "look-2"]
    for row in said["entries"]:
        data = files[f"entries/{row['sha256']}.safetensors"]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["sha256"], row["bytes"])
    rest = {key: value for key, value in said.items() if key != "digest"}
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert said["digest"] == hashlib.sha256(compact.encode()).hexdigest()
    assert 0 < said["key"]["scale"] < 2 and said["format"] == 1


def test_a_pool_read_again_is_the_same(made: Path) -> None:
    pool = Pool.load(made)
    assert pool.names == ("look-1", "look-2") and len(pool) == 2 and pool.verify() == []
    assert pool.anchor.digest == anchor_of().in_pool(16).digest
    assert pool.read("look-1").digest == pool.manifest.entries[0].sha256
    assert parse(pool.manifest.encode()) == pool.manifest


def test_the_folder_of_a_pool_is_that_of_its_anchor(made: Path) -> None:
    assert Learngene.from_pretrained(made).digest == anchor_of().in_pool(16).digest


def test_an_entry_holds_an_increment_a_key_and_no_image(made: Path) -> None:
    entry = Pool.load(made).read("look-2")
    assert {name.partition(".")[0] for name in entry.tensors} == {"increment", "key"}
    assert entry.tensors["key.mean"].shape == (256,) and entry.tensors["key.centre"].shape == (TINY.width,)
    assert entry.provenance["classes"] == ["0", "1"] and entry.provenance["counts"] == [12, 12]
    kept = sum(tensor.numel() for name, tensor in entry.tensors.items() if name.startswith("key."))
    assert kept == 256 + 2 * TINY.width + 2 * 3 + 1  # a mean, two moments, two levels at three counts, the count


# Edits ----------------------------------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    """The manifest after ``change``, its digest made to fit where it is to be sealed."""
    path = folder / MANIFEST
    said = json.loads(path.read_bytes())
    change(said)
    if seal:
        rest = {key: value for key, value in said.items() if key != "digest"}
        compact = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        said["digest"] = hashlib.sha256(compact.encode()).hexdigest()
    path.write_text(json.dumps(said, sort_keys=True, indent=2) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["entries"].pop(),
        lambda said: said["entries"].reverse(),
        lambda said: said["entries"][0].update(name="photos"),
        lambda said: said["key"].update(scale=1.0),
        lambda said: said.update(topology="chain"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edited(copy, change)
    with pytest.raises(ArtefactError, match="pool.json: its digest .* edited by hand"):
        Pool.load(copy)


def set_deep(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        place: Any = said
        for part in outer:
            place = place[int(part) if part.isdecimal() else part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("format", value) for value in (0, 2, "1", True, None, 10**30)),
        *(("entries", value) for value in (None, {}, [None], [[]], "x", [{}])),
        *(("anchor", value) for value in (None, [], {}, {"sha256": "0" * 64})),
        *(("anchor.sha256", value) for value in (None, 5, "x", "Z" * 64, "0" * 63)),
        *(("anchor.bytes", value) for value in (None, -1, True, 1.0, 10**30)),
        *(("entries.0.name", value) for value in ("", "../x", "a b", "a/b", "x\n", 5, None, "x" * 65)),
        *(("entries.0.name", value) for value in ("anchor", "look-2")),
        *(("entries.0.sha256", value) for value in ("../../etc/passwd", "", None, ["x"])),
        ("entries.0.path", "/etc/passwd"),
        *(("topology", value) for value in ("ring", None, 5, ["star"])),
        *(("entry", value) for value in ("rows", None, {})),
        *(("components", value) for value in (0, -1, None, 1.5, True, "2", 4, 10**9)),
        *(("key", value) for value in (None, [], {}, {"features": 5, "more": 1})),
        *(("key.features", value) for value in (0, -1, 10**9, "x", None)),
        *(("key.scale", value) for value in (-1, 3, "x", None)),
        *(("key.image_size", value) for value in (0, None, "16")),
        ("url", "https://example.com"),
        ("read_by", "9.9.9"),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused_in_one_line(copy: Path, path: str, value: Any) -> None:
    """Whatever it says, and though its digest fits."""
    edited(copy, set_deep(path, value), seal=True)
    with pytest.raises((ArtefactError, StoreError)) as caught:
        Pool.load(copy)
    assert "\n" not in str(caught.value) and MANIFEST in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"format":1}', b" " * 2_000_000, b"NaN"],
    ids=lambda data: f"{len(data)} bytes, {data[:8]!r}",
)
def test_what_is_no_manifest_is_refused(copy: Path, data: bytes) -> None:
    (copy / MANIFEST).write_bytes(data)
    with pytest.raises(ArtefactError) as caught:
        Pool.load(copy)
    assert "\n" not in str(caught.value)


def test_a_manifest_written_otherwise_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ArtefactError, match="one way that format 1 has"):
        Pool.load(copy)
    path.write_text(path.read_text().strip()[:-1] + ', "format": 1}\n')
    with pytest.raises(ArtefactError):
        Pool.load(copy)


def test_a_manifest_is_not_waited_for(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    with pytest.raises(StoreError, match="is not a file"):
        Pool.load(copy)


def test_a_missing_or_shortened_file_is_told_at_once(copy: Path) -> None:
    row = Pool.load(copy).manifest.entries[1]
    path = place_of(copy, row)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtefactError, match=rf"{row.sha256}.safetensors has {len(data) - 1} bytes; .* {len(data)}"):
        Pool.load(copy)
    path.unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        Pool.load(copy)


def test_a_changed_byte_of_an_entry_or_of_the_anchor_is_noticed(copy: Path) -> None:
    pool = Pool.load(copy)
    path = place_of(copy, pool.manifest.entries[0])
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    pool = Pool.load(copy)  # as long as before
    for use in (lambda: pool.read("look-1"), lambda: pool.merge({"look-1": 1.0}), lambda: pool.select(look(1, 4))):
        with pytest.raises(DigestError, match=pool.manifest.entries[0].sha256):
            use()
    assert pool.read("look-2") and len(pool.verify()) == 1
    anchor = bytearray((copy / "learngene.safetensors").read_bytes())
    anchor[-3] ^= 1
    (copy / "learngene.safetensors").write_bytes(anchor)
    with pytest.raises(DigestError):
        Pool.load(copy)


def resealed(folder: Path, learngene: Learngene) -> None:
    """The first entry replaced by this learngene, and the manifest made to fit."""
    row = parse((folder / MANIFEST).read_bytes()).entries[0]
    path = learngene.save(folder / "entries" / f"{learngene.digest}.safetensors")
    size = (folder / "entries" / f"{path}.safetensors").stat().st_size
    edited(folder, lambda said: said["entries"][0].update(sha256=learngene.digest, bytes=size), seal=True)
    assert row.sha256 != learngene.digest


def test_files_that_are_no_increment_of_this_pool_are_refused_when_they_are_read(copy: Path) -> None:
    entry = Pool.load(copy).read("look-1")
    settings = dict(entry.settings)
    wrong = {
        "a learngene of net2net, not an increment": replace(anchor_of(), license="mit"),
        "on the anchor 000000000000": replace(entry, settings=settings | {"anchor": "0" * 64}),
        "with form blocks": replace(entry, settings=settings | {"entry": "blocks"}),
        "with key Space": replace(entry, settings=settings | {"key_seed": 9}),
        "with parts 1": replace(
            entry, tensors={name: t for name, t in entry.tensors.items() if not name.startswith("increment.2.")}
        ),
    }
    for message, learngene in wrong.items():
        resealed(copy, learngene)
        with pytest.raises(ArtefactError, match=message):
            Pool.load(copy).read("look-1")
    wrong_ones = Pool.load(copy).verify()  # the wrong one, and those that no manifest names any more
    assert len(wrong_ones) == 1 + len(wrong) and wrong_ones[-1].startswith("look-1: ")


def test_hostile_files_in_place_of_an_entry_are_refused(copy: Path) -> None:
    """Every one of the corpus that a learngene file is tried with, under a manifest that promises it."""
    row = parse((copy / MANIFEST).read_bytes()).entries[0]
    good = place_of(copy, row).read_bytes()
    tried = 0
    for number, (name, data) in enumerate(hostile.corpus(good)):
        if number % 7 or not 8 < len(data) < 10**6 or data == good:  # its changes of text fit another file
            continue
        digest = hashlib.sha256(data).hexdigest()
        (copy / "entries" / f"{digest}.safetensors").write_bytes(data)
        new = {"sha256": digest, "bytes": len(data)}
        edited(copy, lambda said, new=new: said["entries"][0].update(new), seal=True)
        with pytest.raises(LearngeneError) as caught:
            Pool.load(copy).read("look-1")
        assert "\n" not in str(caught.value), name
        tried += 1
    assert tried > 30


# Making and taking ----------------------------------------------------------------------------------------------------


def test_an_entry_of_another_copy_is_adopted_and_one_of_another_anchor_refused(made: Path, tmp_path: Path) -> None:
    pool, other = pool_of(tmp_path / "mine"), Pool.load(made)
    entry = other.read("look-1")
    pool = pool.adopt(entry, "theirs")
    assert pool.names == ("theirs",) and pool.manifest.key == other.manifest.key
    assert Pool.load(pool.folder).read("theirs").digest == entry.digest
    stranger = pool_of(tmp_path / "stranger", (1,), kind="ldr").read("look-1")
    with pytest.raises(ArtefactError, match="increments of two anchors cannot be summed"):
        pool.adopt(stranger, "stranger")
    with pytest.raises(ArtefactError, match="not an increment"):
        pool.adopt(anchor_of(), "anchor-itself")
    for name in ("theirs", "anchor", "a/b", ""):
        with pytest.raises(SettingsError, match="name"):
            pool.adopt(other.read("look-2"), name)
    with pytest.raises(SettingsError, match="sha256 .* is in the pool already"):
        pool.adopt(entry, "again")
    assert sorted(files_of(pool.folder)) == [
        "entries/" + pool.row("theirs").sha256 + ".safetensors",
        "learngene.safetensors",
    ]


def test_two_that_add_at_once_lose_nothing(made: Path, tmp_path: Path) -> None:
    entries = [Pool.load(made).read(name) for name in ("look-1", "look-2")]
    first = second = pool_of(tmp_path / "pool")
    first.adopt(entries[0], "one")
    assert second.adopt(entries[1], "two").names == ("one", "two")
    assert Pool.load(tmp_path / "pool").verify() == []


def test_pools_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="a learngene of front given as an anchor"):
        Pool.create(tmp_path / "a", factory.extract("front", torch_model(), {}, facts=FACTS))
    for wrong in ({"topology": "ring"}, {"entry": "rows"}, {"components": 9}, {"components": 0}, {"features": 0}):
        with pytest.raises(SettingsError):
            Pool.create(tmp_path / "b", anchor_of(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="multiple of patch"):
        Pool.create(tmp_path / "c", anchor_of(), image_size=15)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(StoreError, match="is there already"):
        Pool.create(tmp_path / "full", anchor_of())
    with pytest.raises(StoreError, match="is not a pool"):
        Pool.load(tmp_path / "full")
    assert not (tmp_path / "a").exists()


def torch_model() -> torch.nn.Module:
    from conftest import build_pico

    return build_pico(TINY)


def test_unknown_entries_are_told_with_the_known_ones(made: Path) -> None:
    with pytest.raises(RegistryError, match="no entry 'x' in .*; there are look-1, look-2"):
        Pool.load(made).read("x")


def test_images_that_do_not_fit_are_refused_before_any_training(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool")
    with pytest.raises(DataError, match="images of 3 x 20 x 20; this pool's are 3 x 16 x 16"):
        pool.add(noise_images(24, size=20))
    with pytest.raises(DataError, match="images of 1 x 16 x 16"):
        pool.add(noise_images(24, channels=1))
    with pytest.raises(DataError, match="19 images; at least 20"):
        pool.add(look(1, 19))
    with pytest.raises(SettingsError, match="name 'a b'"):
        pool.add(look(1), name="a b")
    assert len(Pool.load(pool.folder)) == 0


def test_a_manifest_refuses_what_it_cannot_hold() -> None:
    row = Row(name="anchor", sha256="0" * 64, bytes=100)
    many = tuple(Row(name=f"e{i}", sha256=f"{i:064x}", bytes=100) for i in range(1025))
    with pytest.raises(SettingsError, match="at most 1024"):
        Manifest(anchor=row, entries=many)
    assert parse(Manifest(anchor=row, entries=many[:1024]).encode()).entries == many[:1024]
    assert asdict(Manifest(anchor=row))["key"]["features"] == 1024


# Who else is at it ----------------------------------------------------------------------------------------------------


def test_two_first_entries_of_one_pool_share_its_scale(tmp_path: Path) -> None:
    """The second is added through an object that still knows an empty pool."""
    first = pool_of(tmp_path / "pool")
    pool = first.add(look(1), recipe=ONCE)
    again = first.add(look(2), recipe=ONCE)
    assert again.names == ("look-1", "look-2") and again.verify() == []
    scales = {method.key_scale for method in again.methods().values()}
    assert scales == {pool.manifest.key.scale} == {again.manifest.key.scale} and 0 not in scales
    straight = pool_of(tmp_path / "straight", (1, 2))
    assert files_of(again.folder) == files_of(straight.folder)  # no byte tells that it was keyed twice


def test_what_was_trained_under_a_name_that_was_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    pool, state = pool_of(tmp_path / "pool"), torch.get_rng_state()
    alone = pool_of(tmp_path / "alone", (1,)).read("look-1")

    def beaten(steps: Iterator[Step]) -> Iterator[Step]:
        yield from steps
        Pool.load(pool.folder).add(look(2), name="look-1", recipe=ONCE)

    with pytest.raises(NameTakenError, match="name look-1 was given to another entry .* kept in .*entries/") as told:
        pool.add(look(1), recipe=ONCE, watch=beaten)
    now = Pool.load(pool.folder)
    (kept,) = {path.name for path in (pool.folder / "entries").iterdir()} - {
        f"{now.manifest.entries[0].sha256}.safetensors"
    }
    assert kept in str(told.value) and now.names == ("look-1",) and f"{kept} is in entries" in now.verify()[0]
    found = now.adopt(Learngene.load(pool.folder / "entries" / kept), "other")
    assert found.names == ("look-1", "other") and found.verify() == []
    ours, theirs = found.read("other").group("increment"), alone.group("increment")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("called", "name"), [("my photos", "my-photos"), ("_x.y_", "x.y"), ("Ärger & Co", "rger-Co")])
def test_an_entry_is_named_after_its_images(tmp_path: Path, called: str, name: str) -> None:
    images = replace(look(1), name=called)
    assert pool_of(tmp_path / "pool").add(images, recipe=ONCE).names == (name,)


def test_images_that_nothing_can_be_named_after_need_a_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no entry can be named after '写真'"):
        pool_of(tmp_path / "pool").add(replace(look(1), name="写真"), recipe=ONCE)


def test_an_increment_keyed_meanwhile_at_another_scale_is_refused(tmp_path: Path) -> None:
    stale, other = pool_of(tmp_path / "pool"), pool_of(tmp_path / "other", (2,))
    now = stale.add(look(1), recipe=ONCE)
    with pytest.raises(ArtefactError, match="an increment with key .* this pool's is"):
        stale.adopt(other.read("look-2"), "look-2")
    assert Pool.load(tmp_path / "pool").manifest == now.manifest and now.verify() == []


ADOPT = """
import sys, pathlib
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool
folder, *files = sys.argv[1:]
for file in files:
    Pool.load(folder).adopt(Learngene.load(file), pathlib.Path(file).stem[:12])
"""


def test_processes_that_add_at_once_lose_no_entry(tmp_path: Path) -> None:
    whole = pool_of(tmp_path / "whole", range(1, 9))
    files = sorted((whole.folder / "entries").iterdir())
    pool_of(tmp_path / "pool").adopt(whole.read("look-1"), "look-1")
    rest = [str(file) for file in files if file.stem != whole.row("look-1").sha256]
    at_once = [
        subprocess.Popen([sys.executable, "-c", ADOPT, str(tmp_path / "pool"), *part]) for part in (rest[:3], rest[3:])
    ]
    assert [process.wait() for process in at_once] == [0, 0]
    pool = Pool.load(tmp_path / "pool")
    assert {row.sha256 for row in pool.manifest.entries} == {row.sha256 for row in whole.manifest.entries}
    assert pool.verify() == [] and not list(pool.folder.glob(".*"))


def test_a_copy_that_fails_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("learngene_hub.pool.shutil.copyfile", full)
        with pytest.raises(StoreError, match="cannot write the pool .*: No space left on device"):
            Pool.load(made).copy(tmp_path / "copy")
    assert not list(tmp_path.iterdir())
    assert Pool.load(made).copy(tmp_path / "copy").names == ("look-1", "look-2")


def test_a_star_takes_no_entry_that_stands_on_others(tmp_path: Path) -> None:
    chain, star = pool_of(tmp_path / "chain", (1, 2), topology="chain"), pool_of(tmp_path / "star")
    star = star.adopt(chain.read("look-1"), "look-1")
    with pytest.raises(ArtefactError, match="those of a star stand on the anchor alone"):
        star.adopt(chain.read("look-2"), "look-2")
    alone = pool_of(tmp_path / "alone", (3,))
    with pytest.raises(ArtefactError, match="key|does not stand on look-2, the last of this chain"):
        chain.adopt(alone.read("look-3"), "look-3")
    with pytest.raises(ArtefactError, match="does not stand on look-2, the last of this chain"):
        chain.adopt(replace(chain.read("look-1"), provenance={"another": 1}), "look-4")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -11, "a", None, True])
def test_weights_that_are_none_are_refused(made: Path, weight: Any) -> None:
    with pytest.raises(SettingsError, match="of look-1 given; a number from -10 to 10 would work"):
        Pool.load(made).merge({"look-1": weight})


def test_selections_that_are_none_are_refused(made: Path) -> None:
    pool = Pool.load(made)
    with pytest.raises(SettingsError, match="entry look-1 given twice"):
        pool.merge({"look-1": 1, pool.row("look-1").sha256: 1})
    for odd in ("look-1", ["look-1"]):
        with pytest.raises(SettingsError, match="a Selection, or {NAME: WEIGHT}, would work"):
            pool.merge(odd)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="Images would work"):
        pool.add("photos")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="Learngene.from_pretrained"):
        Pool.create(made / "other", "lsamd-base")  # type: ignore[arg-type]


def test_of_two_entries_of_the_same_images_the_newer_is_selected(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", (1, 2)).add(look(1), name="look-1-again", recipe=replace(ONCE, epochs=3))
    few = look(1, 12, seed=1)
    assert [chosen.name for chosen in pool.select(few, unlabelled=True, k=1).entries] == ["look-1-again"]
    assert [chosen.name for chosen in pool.select(few, rule="nearest").entries] == ["look-1-again"]

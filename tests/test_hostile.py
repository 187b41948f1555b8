"""Every hostile file and every odd place, opened in a process with 200 MB to spare, and what came of each."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import mutants
import pytest
import torch
from hostile import small

from learngene_hub import learngene as artefact
from learngene_hub._format import encode, read_head
from learngene_hub.errors import ArtefactError, DigestError, SettingsError, StoreError
from learngene_hub.hub import FolderStore
from learngene_hub.learngene import FILE_NAME, Learngene, read_facts
from learngene_hub.shape import ViTShape
from learngene_hub.transforms import expected_shapes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and limits of POSIX")

WATCHED = """
import contextlib, faulthandler, json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import hostile, mutants
from learngene_hub import hub
from learngene_hub.errors import LearngeneError
from learngene_hub.learngene import Learngene, read_facts

def tried(path, verb):
    wall, cpu, kind, message = time.perf_counter(), time.process_time(), "loaded", ""
    try:
        verb(path)
    except LearngeneError as error:
        kind, message = type(error).__name__, str(error)
    except BaseException as error:
        kind, message = "not ours: " + type(error).__name__, str(error)
    return kind, message, time.process_time() - cpu, time.perf_counter() - wall

faulthandler.dump_traceback_later(500, exit=True)
asked = json.load(open(sys.argv[2]))
with hostile.only_method_is_tiny():
    hub.pull(asked["tiny"][0])
Learngene.load(asked["true"][0])
if sys.platform == "linux":
    mutants.limit_memory(mutants.MOST_BYTES)
before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for half, context in (("tiny", hostile.only_method_is_tiny()), ("true", contextlib.nullcontext())):
    with context:
        for path in asked[half]:
            found[path] = [tried(path, verb) for verb in (hub.pull, Learngene.load, read_facts)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([found, peak * (1 if sys.platform == "darwin" else 1024)]))
"""


@dataclass(frozen=True)
class Came:
    """What came of one verb at one path."""

    kind: str  # "loaded", or the name of an error's class
    message: str
    cpu: float
    wall: float


@dataclass(frozen=True)
class Watched:
    """What came of every case in the process with limits: by ``pull``, ``load`` and ``read_facts``."""

    came: dict[str, tuple[Came, Came, Came]]
    peak: int  # bytes, beside what the process had before


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with hostile.only_method_is_tiny():
        return small().save_pretrained(tmp_path_factory.mktemp("good")).read_bytes()


@pytest.fixture(scope="module")
def places(good: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with odd_places(good, tmp_path_factory.mktemp("places")) as found:
        yield found


@pytest.fixture(scope="module")
def watched(good: bytes, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("cases")
    with hostile.only_method_is_tiny():
        tiny = {what: written(folder, data) for what, data in (("good", good), *hostile.corpus(good), *bombs(good))}
    true = {what: written(folder, data) for what, data in true_corpus()} | {"legal, of 1.6 GB": vast(folder)}
    paths = {**tiny, **places, **true}
    asked = {"tiny": [str(path) for path in (tiny | places).values()], "true": [str(path) for path in true.values()]}
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", WATCHED, str(Path(__file__).parent), str(folder / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found, peak = json.loads(done.stdout)
    return Watched({what: tuple(Came(*came) for came in found[str(path)]) for what, path in paths.items()}, peak)  # type: ignore[misc]


def written(folder: Path, data: bytes) -> Path:
    path = folder / f"{len(os.listdir(folder)):04}.safetensors"
    path.write_bytes(data)
    return path


# --- the cases that are not in ``hostile.corpus`` ---------------------------------------------------------------------


class Touch:
    """Pickled, a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/learngene-was-unpickled",)


def bombs(good: bytes) -> Iterator[tuple[str, bytes]]:
    """What grows when it is opened by something that we do not have."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch()))
        archive.writestr("archive/data/0", bytes(250_000_000))
    yield "a zip bomb", file.getvalue()
    yield "a gzip bomb", gzip.compress(bytes(20_000_000), compresslevel=1)
    for protocol in range(6):
        yield f"a pickle with a command, protocol {protocol}", pickle.dumps(Touch(), protocol=protocol)
    top, metadata, buffer = hostile.take_apart(good)
    data = hostile.put_together(top, {**metadata, "provenance": {"text": "x" * 50_000_000}}, buffer)
    yield "50 MB of metadata", data
    yield "50 MB of metadata, another length", (2**20).to_bytes(8, "little") + data[8:]


def true_corpus() -> Iterator[tuple[str, bytes]]:
    """A good learngene of a true method, and settings and shapes that this method does not have."""
    learngene = mutants.lsamd(mutants.SPECK, {})
    header, names = learngene._header()
    good = len(header).to_bytes(8, "little") + header + b"".join(mutants.raw(learngene.tensors[name]) for name in names)
    yield "good, of a true method", good
    top, metadata, buffer = hostile.take_apart(good)
    settings: dict[str, list[Any]] = {
        "epochs": [0, -1, True, 1.0, "1", None, [1], 1e999],
        "keep": [-1, 0.5, {}],
        "lr": [-1, "0.1", None, True, [], 10**400],
        "seed": [10**4000, -1, 2**64, False],
        "flip": ["no", 1, None],
        "allow_skip": [0, "", []],
        "freeze_base": ["x", 1.0],
        "clip": [0, -0.0, True],
        "alone": [1.5, -0.1, "0"],
        "search": ["nope", None, ["gumbel"], {"gumbel": 1}, "gumbel\0", "\uff47umbel"],
        "form": ["", 0, "../copy"],
        "precision": ["fp8", "FP32"],
        "distil_on": ["signs", 7, None, {"a": 1}, [1], [None]],
        "warmup_share": [0.9],
        "self": [1],
        "__class__": ["x"],
        "\ud800": [1],
        "lr ": [0.1],
    }
    for key, values in settings.items():
        for value in values:
            wrong = {**metadata, "settings": {**metadata["settings"], key: value}}
            yield f"settings: {key} {value!r:.40}", hostile.put_together(top, wrong, buffer)
    for change in (
        {"depth": 3},
        {"depth": 2**20},
        {"width": 16},
        {"image_size": 2**20},
        {"patch": 4},
        {"mlp_ratio": 2},
    ):
        wrong = {**metadata, "shape": {**metadata["shape"], **change}}
        yield f"shape: {change}", hostile.put_together(top, wrong, buffer)
    for method in ("lsamd ", "LSAMD", "ls\u0430md", "l" * 60_000, "learngene_hub.methods.lsamd"):
        facts = {**metadata, "method": method, "settings": {}, "provenance": {}}
        yield f"method: {method:.40}", hostile.put_together(top, facts, buffer)
    for old, new in (
        ("block.1.", "block.01."),
        ("block.1.", "block.2."),
        ("block.1.", "block.1_."),
        ("stem.", "block."),
    ):
        renamed = {name.replace(old, new): info for name, info in top.items()}
        yield f"{old} named {new}", hostile.put_together(renamed, metadata, buffer)


def vast(folder: Path) -> Path:
    """A legal learngene of zeros that takes no space on the disk, and more memory than most have to spare."""
    shape = ViTShape(depth=1, width=2**13, heads=2**7)
    shapes = expected_shapes(shape, {0})
    shapes |= {"search.alpha": (2, 1, 2), "search.paths": (2, 1), "search.frequency": (1,), "search.probability": (1,)}
    learngene = mutants.lsamd(mutants.SPECK, {})
    facts = {key: getattr(learngene, key) for key in artefact.KEYS} | {"shape": shape}
    header, _ = encode(artefact.canonical_metadata(facts), {name: ("BF16", size) for name, size in shapes.items()})
    path = written(folder, len(header).to_bytes(8, "little") + header)
    os.truncate(path, path.stat().st_size + 2 * sum(torch.Size(size).numel() for size in shapes.values()))
    return path


@dataclass
class odd_places:  # noqa: N801  # used as a function
    """Everything a path can lead to. The folders have it under the name that is looked for in them."""

    good: bytes
    root: Path

    def __enter__(self) -> dict[str, Path]:
        root, outside = self.root, self.root / "outside"
        outside.mkdir()
        (outside / "good").write_bytes(self.good)
        os.mkfifo(outside / "pipe")
        self.socket = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(outside)  # the path of a socket is at most some hundred bytes
        self.socket.bind("socket")
        os.chdir(here)
        (outside / "loop").symlink_to(outside / "pool")
        (outside / "pool").symlink_to(outside / "loop")
        for size in (0, 7, 2**40):
            with open(outside / f"sparse of {size}", "wb") as file:
                file.truncate(size)
        found = {f"the place {path.name}": path for path in outside.iterdir() if path.name != "good"}
        for device in ("zero", "null", "random", "tty", "stdin", "fd/0"):
            found[f"the device {device}"] = Path("/dev") / device
        for name in ("mem", "pagemap", "maps", "fd", "environ"):
            found[f"the kernel's {name}"] = Path("/proc/self") / name
        found["the kernel's messages"] = Path("/proc/kmsg")
        found["a name with a zero byte"] = Path("a\0b")
        found["a name that is too long"] = root / ("x" * 5000)
        found["a name with escapes"] = root / "\x1b[2J\u202e\nx"
        found["a name that is not Unicode"] = root / "\udcff.safetensors"
        found["a file as a folder"] = outside / "good" / FILE_NAME
        for number, (what, place) in enumerate(list(found.items())):
            folder = root / f"{number:02}"
            folder.mkdir()
            try:
                (folder / FILE_NAME).symlink_to(place)
            except (OSError, ValueError):
                continue  # no link can lead to such a name
            found[f"a folder with a link to {what}"] = folder
        (root / "itself").mkdir()
        (root / "itself" / FILE_NAME).symlink_to(FILE_NAME)
        (root / "a folder in its place" / FILE_NAME).mkdir(parents=True)
        (root / "linked").mkdir()
        (root / "linked" / FILE_NAME).symlink_to(outside / "good")
        found |= {name: root / name for name in ("itself", "a folder in its place", "linked")}
        found["a link to a good file"] = root / "linked" / FILE_NAME
        return found

    def __exit__(self, *_: object) -> None:
        self.socket.close()


# --- what must come of them -------------------------------------------------------------------------------------------

LOADED = {"good", "good, of a true method", "a link to a good file"}


def test_each_is_refused_in_a_second_and_200_mb(watched: Watched) -> None:
    assert len(watched.came) > 400
    wrong = []
    for what, (_, loaded, facts) in watched.came.items():
        if loaded.kind not in ({"loaded"} if what in LOADED else {"ArtefactError", "StoreError"}):
            wrong.append(f"{what}: {loaded.kind} {loaded.message}")
        if facts.kind not in ("loaded", "ArtefactError", "StoreError"):
            wrong.append(f"{what}: read_facts: {facts.kind} {facts.message}")
        wrong += [f"{what}: {came}" for came in watched.came[what] if came.cpu > mutants.MOST_SECONDS]
        wrong += [f"{what}: waited {came.wall} s" for came in watched.came[what] if came.wall > 60]
    assert not wrong, "\n".join(ascii(line) for line in wrong)
    assert watched.peak < mutants.MOST_BYTES


def test_each_message_is_one_clean_line(watched: Watched) -> None:
    messages = [came.message for each in watched.came.values() for came in each if came.kind != "loaded"]
    assert len(messages) > 1000
    for message in messages:
        assert message.isprintable() and 20 < len(message) < 6000, ascii(message)


def test_pull_refuses_what_load_refuses(watched: Watched) -> None:
    for what, (pulled, loaded, _) in watched.came.items():
        refused = {"ArtefactError", "StoreError", "RegistryError", "SettingsError"}
        assert pulled.kind in ({"loaded"} if what in {*LOADED, "linked"} else refused), (what, pulled, loaded)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("a zip bomb", "ArtefactError", "a zip archive, such as torch.save writes (a pickle)"),
        ("a pickle with a command, protocol 4", "ArtefactError", "it starts like a pickle"),
        ("50 MB of metadata", "ArtefactError", "its header would have 50000824 bytes"),
        ("legal, of 1.6 GB", "StoreError", "no memory left to read"),
        ("the place pipe", "StoreError", "is not a file; give the path of a learngene.safetensors"),
        ("the place loop", "StoreError", "Too many levels of symbolic links"),
        ("the device zero", "StoreError", "/dev/zero is not a file"),
        ("the kernel's messages", "ArtefactError", "empty; a learngene was expected"),
        ("a name with escapes", "StoreError", r"\x1b[2J\u202e\nx'"),
        ("a name that is not Unicode", "StoreError", r"\udcff.safetensors'"),
        ("a file as a folder", "StoreError", "Not a directory"),
        ("the place sparse of 1099511627776", "ArtefactError", "its header would have 0 bytes"),
        ("itself", "StoreError", "is not a file"),
        ("settings: epochs True", "ArtefactError", "epochs True asked"),
        ("settings: self 1", "ArtefactError", "has no setting 'self'"),
        ("method: ls\u0430md", "ArtefactError", "did you mean 'lsamd'?"),
        ("metadata text: 34 deep", "ArtefactError", "metadata nested more than 32 deep"),
        ("metadata text: half a surrogate pair", "ArtefactError", "surrogates not allowed"),
    ],
)
def test_some_messages(watched: Watched, what: str, kind: str, message: str) -> None:
    if what == "the kernel's messages" and not os.access("/proc/kmsg", os.R_OK):
        pytest.skip("only the superuser may open it")
    assert watched.came[what][1].kind == kind
    assert message in watched.came[what][1].message


def test_nothing_was_unpickled(watched: Watched) -> None:
    assert not Path("/tmp/learngene-was-unpickled").exists()


def test_a_folder_store_follows_links_and_no_other_way_out(places: dict[str, Path], good: bytes) -> None:
    store = FolderStore(root=places["linked"].parent)
    assert store.read("linked").read_bytes() == good  # whoever made the folder made the link
    for uri in ("../outside/good", "/etc/passwd", "linked/../../outside", ".."):
        with pytest.raises(StoreError):
            store.read(uri)


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_method() -> Iterator[None]:
    with hostile.only_method_is_tiny():
        yield


def test_a_file_exchanged_for_a_pipe_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    was = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda self: was)
    with pytest.raises(StoreError, match="is not a file"):
        Learngene.load(tmp_path / "pipe")


@pytest.mark.parametrize("change", ["cut", "longer"])
def test_a_file_that_changes_while_it_is_read(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_method: None
) -> None:
    shape = ViTShape(depth=1, width=4096, heads=1, patch=2, image_size=4, classes=0)  # more than is read ahead
    zeros = {name: torch.zeros(tensor.shape[:-1] + (4096,)) for name, tensor in small().tensors.items()}
    path = small(tensors=zeros, shape=shape).save_pretrained(tmp_path)
    was = path.read_bytes()
    now = {"cut": was[:-1], "longer": was + b"\0"}[change]

    def changed(file: Any, size: int) -> Any:
        read = read_head(file, size)
        path.write_bytes(now)
        return read

    monkeypatch.setattr(artefact, "read_head", changed)
    with pytest.raises(ArtefactError, match="changed while it was read; try again"):
        Learngene.load(path)


def test_as_deep_as_is_legal(tmp_path: Path, tiny_method: None) -> None:
    def nested(depth: int) -> dict[str, Any]:  # in ``depth`` lists, which stand in the provenance in the metadata
        value: list[Any] = []
        for _ in range(depth - 1):
            value = [value]
        return {"deep": value}

    digest = small(provenance=nested(30)).save(tmp_path / "x")
    assert Learngene.load(tmp_path / "x", sha256=digest).provenance == nested(30)
    with pytest.raises(ArtefactError, match="nested more than 32 deep"):
        small(provenance=nested(31)).save(tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udcff"])
def test_half_a_surrogate_pair_is_not_saved(text: str, tmp_path: Path, tiny_method: None) -> None:
    for provenance in ({"path": text}, {text: 1}, {"a": [{"b": [text]}]}):
        with pytest.raises(ArtefactError, match="surrogates not allowed"):
            small(provenance=provenance).save(tmp_path / "x")
    small(provenance={"path": "\U0001f600 \\ud800 \x1b\0"}).save(tmp_path / "x")
    assert Learngene.load(tmp_path / "x").provenance == {"path": "\U0001f600 \\ud800 \x1b\0"}


def test_keys_that_are_numbers_are_saved_as_text(tmp_path: Path, tiny_method: None) -> None:
    learngene = small(provenance={2: "b", 10: "a", "x": None})
    assert learngene.save(tmp_path / "x") == learngene.digest
    assert Learngene.load(tmp_path / "x", sha256=learngene.digest).provenance == {"10": "a", "2": "b", "x": None}
    with pytest.raises(ArtefactError, match="a key stands twice"):
        small(provenance={1: "a", "1": "b"}).save(tmp_path / "y")


def test_a_damaged_header_is_told_as_damage_where_a_digest_was_promised(
    good: bytes, tmp_path: Path, tiny_method: None
) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(good.replace(b'"stem.shift"', b'"stem,shift"'))
    with pytest.raises(DigestError, match=r"was promised; delete .* and fetch it again \(tensor name 'stem,shift'"):
        Learngene.load(path, sha256=small().digest)
    promised = artefact.hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ArtefactError, match="tensor name 'stem,shift'") as caught:
        Learngene.load(path, sha256=promised)
    assert not isinstance(caught.value, DigestError)


def test_a_promise_that_is_none(good: bytes, tmp_path: Path) -> None:
    for promised in ("", "0" * 63, "g" * 64, 7, b"0" * 64, "\uff10" * 64):
        with pytest.raises(SettingsError, match="64 hex digits"):
            Learngene.load(tmp_path / FILE_NAME, sha256=promised)  # type: ignore[arg-type]


def test_without_memory_for_the_tensors(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_method: None
) -> None:
    PanicException = type("PanicException", (BaseException,), {})  # noqa: N806  # as safetensors raises it

    def panics(data: bytes) -> None:
        raise PanicException("PyObject pointer is null")

    (tmp_path / FILE_NAME).write_bytes(good)
    monkeypatch.setattr("safetensors.torch.load", panics)
    with pytest.raises(StoreError, match="no memory left to read .*; twice its size is needed"):
        Learngene.load(tmp_path / FILE_NAME)


@pytest.mark.parametrize("tensor", [torch.zeros(4).to_sparse(), [0.0] * 4, None, torch.zeros(4).numpy()])
def test_what_is_no_dense_tensor_is_not_saved(tensor: Any, tmp_path: Path, tiny_method: None) -> None:
    with pytest.raises(ArtefactError, match="stem.shift is a .*; a dense torch tensor can be saved"):
        small(tensors={**small().tensors, "stem.shift": tensor}).save(tmp_path / "x")


def test_only_files_are_written_over(good: bytes, tmp_path: Path, tiny_method: None) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(StoreError, match="it is not a file; nothing was written"):
            small().save(tmp_path / name)
    with pytest.raises(StoreError, match="cannot make the folder"):
        small().save_pretrained(tmp_path / "a\0b")
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path: Path, tiny_method: None) -> None:
    small().save(tmp_path / "blob")
    (tmp_path / FILE_NAME).symlink_to("blob")
    small(license="MIT").save(tmp_path / FILE_NAME)
    assert Learngene.load(tmp_path / "blob").digest == small().digest
    assert Learngene.load(tmp_path / FILE_NAME).license == "MIT"


def test_a_path_of_any_name_is_told_on_one_line(tmp_path: Path, tiny_method: None) -> None:
    path = tmp_path / "\x1b[2J\nx"
    path.write_bytes(b"no learngene")
    for verb in (Learngene.load, read_facts):
        with pytest.raises(ArtefactError) as caught:
            verb(path)
        assert str(caught.value).isprintable() and r"\x1b[2J\nx'" in str(caught.value)
    with pytest.raises(StoreError) as unwritten:
        small().save(path / "x")
    assert str(unwritten.value).isprintable() and errno.errorcode[errno.ENOTDIR]

"""``learngene list`` and ``learngene verify``: what is printed in each format, the filters, the exit statuses."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import typer
from hostile import small
from test_registry import rows, write
from typer.testing import CliRunner

from learngene_hub import _shelf
from learngene_hub._command import verb
from learngene_hub.registry import ENVIRONMENT

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
app = typer.Typer(rich_markup_mode=None)
app.command("list")(verb(_shelf.list_))
app.command("verify")(verb(_shelf.verify))


class Result:
    """What a call left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def tiny_method() -> Iterator[None]:
    with hostile.only_method_is_tiny():
        yield


@pytest.fixture
def run() -> Call:
    """``run("list", "--json")``: the command in this process, not a terminal."""

    def call(*args: str | Path) -> Result:
        found = CliRunner().invoke(app, [str(arg) for arg in args])
        return Result(found.exit_code, found.stdout, found.stderr)

    return call


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in registry of one learngene, `base`, an empty cache of the client, and an empty working folder."""
    folder, here = tmp_path / "shelf", tmp_path / "here"
    here.mkdir()
    path = small().save_pretrained(folder / "model_cards" / "base")
    write(folder, rows(row("base", uri="model_cards/base", bytes=path.stat().st_size, description="The built-in one.")))
    monkeypatch.setattr("learngene_hub.registry.data_folder", lambda: folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.chdir(here)
    return folder


@pytest.fixture
def own(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry file of the user: `far`, on the Hub, and `near`, another learngene in a folder."""
    folder = tmp_path / "own"
    near = small(license="MIT", ancestor={"name": "vit", "sha256": "", "license": "MIT", "source": "made up"})
    size = near.save_pretrained(folder / "genes" / "near").stat().st_size
    far = row("far", uri=f"hf://org/tiny@{COMMIT}", bytes=9_000_000, method="lsamd", description="From far away.")
    mine = row("near", uri="genes/near", bytes=size, sha256=near.digest, license="MIT", description="My own.")
    path = write(folder, rows(far, mine))
    monkeypatch.setenv(ENVIRONMENT, str(path))
    return path


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "method": "tiny", "sha256": small().digest, **changes}


def keep(cache: Path, repo: str, commit: str, content: bytes, name: str | None = None) -> Path:
    """Puts a file into a cache as the client does: a blob under its sha256 (or ``name``), and a link to it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / (name or hashlib.sha256(content).hexdigest())
    link = folder / "snapshots" / commit / "learngene.safetensors"
    for parent in (blob.parent, link.parent):
        parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def damage(path: Path) -> str:
    """The new sha256 of a file in which one bit is turned."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- list -------------------------------------------------------------------------------------------------------------


def test_a_list_of_one_registry(run: Call, shelf: Path) -> None:
    size = (shelf / "model_cards/base/learngene.safetensors").stat().st_size
    shown = run("list")
    assert shown.out == (
        "name\tmethod\tancestor\treach\tbytes\tlicense\tdescription\n"
        f"base\ttiny\tpico\tdepth 1-2, width 4-8 step 4\t{size} B\tApache-2.0\tThe built-in one.\n"
    )
    assert (shown.code, shown.err) == (0, "")
    assert run("list", "-q").out == "base\n"
    assert run("list", "--json").json == [
        {
            "name": "base",
            "kind": "learngene",
            "method": "tiny",
            "ancestor": "pico",
            "reach": "depth 1-2, width 4-8 step 4",
            "bytes": size,
            "license": "Apache-2.0",
            "description": "The built-in one.",
            "uri": str(shelf / "model_cards" / "base"),
            "sha256": small().digest,
            "origin": "built-in",
        }
    ]


def test_a_second_registry_adds_the_column_of_origins(run: Call, own: Path) -> None:
    header, *lines = run("list").out.splitlines()
    assert header == "name\tmethod\tancestor\treach\tbytes\tlicense\torigin\tdescription"
    assert [line.split("\t")[0] for line in lines] == ["base", "far", "near"]
    assert [line.split("\t")[6] for line in lines] == ["built-in", str(own), str(own)]
    assert lines[1] == f"far\tlsamd\t-\t-\t9.0 MB\tApache-2.0\t{own}\tFrom far away."


def test_a_pool_is_told_from_a_learngene(run: Call, own: Path) -> None:
    (own.parent / "genes" / "near" / "pool.json").write_text("{}")  # nobody reads it here
    header, *lines = run("list").out.splitlines()
    assert header.split("\t")[:3] == ["name", "kind", "method"]
    assert [line.split("\t")[1] for line in lines] == ["learngene", "learngene", "pool"]
    assert {row["name"]: row["kind"] for row in run("list", "--json").json}["near"] == "pool"
    assert run("list", "--search", "base").out.splitlines()[0].split("\t")[1] == "method"


def test_every_uri_of_a_list_is_one_that_other_commands_take(run: Call, own: Path, monkeypatch: Any) -> None:
    from learngene_hub.hub import pull

    found = {row["name"]: row for row in run("list", "--json").json}
    assert found["far"]["uri"] == f"hf://org/tiny@{COMMIT}"
    monkeypatch.chdir(Path(__file__).parent)  # from anywhere
    for name in ("base", "near"):
        assert pull(found[name]["uri"]).digest == found[name]["sha256"]


def test_a_learngene_of_the_hub_tells_its_reach_once_it_is_in_the_cache(run: Call, own: Path, tmp_path: Path) -> None:
    keep(tmp_path / "cache", "org/tiny", COMMIT, small().save_pretrained(tmp_path / "x").read_bytes())
    found = {row["name"]: row for row in run("list", "--json").json}["far"]
    assert (found["ancestor"], found["reach"]) == ("pico", "depth 1-2, width 4-8 step 4")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", "base far near"),
        ("--search AR", "far near"),
        ("--search away", "far"),
        ("--search vit", "near"),
        ("--search nothing-like-it", ""),
        ("--method tiny", "base near"),
        ("--max-bytes 8MB", "base near"),
        ("--max-bytes 9MB", "base far near"),
        ("--max-bytes 8999999", "base near"),
        ("--max-bytes 9000kB --method lsamd", "far"),
        ("--sort name --limit 2", "base far"),
        ("--sort bytes --limit 3", "near base far"),
        ("--sort bytes --limit 1", "near"),
    ],
)
def test_filters_of_a_registry(run: Call, own: Path, options: str, names: str) -> None:
    shown = run("list", "-q", *options.split())
    assert (shown.out.split(), shown.code, shown.err) == (names.split(), 0, "")


def test_nothing_found_and_more_than_asked(run: Call, own: Path) -> None:
    nothing = ["list", "--search", "nothing-like-it"]
    assert run(*nothing).out == "No results found.\n" and run(*nothing, "--json").json == []
    assert run("list", "--limit", "2").err == "3 fit, 2 are shown; --limit 3 shows all\n"
    assert run("list", "--limit", "2", "--json").err == run("list", "--limit", "3").err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--author me", "add --remote"),
        ("--sort downloads", "name, bytes, or --remote"),
        ("--sort updated", "name, bytes, or --remote"),
        ("--sort size", "is not one of"),
        ("--limit 0", "--limit"),
        ("--max-bytes 16XB", "16MB, 500kB or 16000000 would work"),
        ("--max-bytes 0", "would work"),
        ("--max-bytes -1", "would work"),
        ("--max-bytes 0.1B", "would work"),
        ("--max-bytes MB", "would work"),
        ("--max-bytes 1e6", "would work"),
    ],
)
def test_wrong_usage_of_list(run: Call, own: Path, options: str, message: str) -> None:
    shown = run("list", *options.split())
    assert (shown.code, shown.out) == (2, "")
    assert message in " ".join(shown.err.split()), shown.err


@pytest.mark.parametrize(
    ("written", "count"),
    [("16MB", 16_000_000), ("500kB", 500_000), ("500 KB", 500_000), ("1.5gb", 1_500_000_000), ("7", 7), ("7B", 7)],
)
def test_sizes(written: str, count: int) -> None:
    assert _shelf.parse_bytes(written) == count
    assert (_shelf.parse_bytes("2KiB"), _shelf.parse_bytes("1MiB"), _shelf.parse_bytes("1gib")) == (2**11, 2**20, 2**30)


def test_one_missing_file_does_not_hide_the_others(run: Call, own: Path) -> None:
    (own.parent / "genes/near/learngene.safetensors").unlink()
    shown = run("list")
    assert shown.code == 0 and [line.split("\t")[0] for line in shown.out.splitlines()[1:]] == ["base", "far", "near"]
    assert "near: no learngene.safetensors" in shown.err and len(shown.err.splitlines()) == 1
    assert run("list", "-q").err == ""


def test_list_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, typer; from learngene_hub import _shelf; from learngene_hub._command import verb\n"
        "app = typer.Typer(); app.command()(verb(_shelf.list_)); app(['--json'], standalone_mode=False)\n"
        "print(*[m for m in ('torch', 'timm', 'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(2):
        began = _seconds()
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(_seconds() - began)
        assert shown.stderr.strip() == "" and "lsamd-base" in [row["name"] for row in json.loads(shown.stdout)]
    assert min(seconds) < 1


def _seconds() -> float:
    """Seconds of processor time that this process's children took: unlike the clock, not the fault of others."""
    used = os.times()
    return used.children_user + used.children_system


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_checks_everything_known(run: Call, own: Path, shelf: Path) -> None:
    shown = run("verify", "--json")
    by_name = {row["name"]: row for row in shown.json}
    assert (shown.code, shown.err, list(by_name)) == (0, "", ["base", "far", "near"])
    path = shelf / "model_cards" / "base" / "learngene.safetensors"
    assert by_name["base"] == {
        "name": "base",
        "ok": True,
        "bytes": path.stat().st_size,
        "sha256": small().digest,
        "promised": small().digest,
        "path": str(path),
        "problem": None,
    }
    assert by_name["near"]["ok"] is True
    assert (by_name["far"]["ok"], by_name["far"]["problem"]) == (None, "not on this machine")
    assert run("verify", "-q").out == ""


def test_what_is_not_on_this_machine_is_not_checked(run: Call, own: Path) -> None:
    shown = run("verify")
    assert shown.code == 0 and shown.out.splitlines()[2] == "far\t-\t-\t-\t-"
    assert shown.err == "1 of 3 not on this machine, so not checked; `learngene pull NAME` fetches one\n"
    strict = run("verify", "--fail-on-missing", "-q")
    assert (strict.code, strict.out) == (1, "far\n")
    assert strict.err == "Error: far: not on this machine (next: learngene pull far)\n"


def test_a_bundled_file_that_changed(run: Call, own: Path, shelf: Path) -> None:
    path = shelf / "model_cards" / "base" / "learngene.safetensors"
    digest = damage(path)
    shown = run("verify", "-q")
    assert (shown.code, shown.out) == (1, "base\n")
    assert shown.err == (
        f"Error: base: {path}: its sha256 is {digest}, {small().digest} was promised; install learngene-hub again "
        "(next: learngene list)\n"
    )
    found = {row["name"]: row for row in run("verify", "--json").json}["base"]
    assert (found["ok"], found["sha256"], found["promised"]) == (False, digest, small().digest)


def test_both_digests_are_told_where_the_file_is_no_longer_a_learngene(run: Call, shelf: Path) -> None:
    path = shelf / "model_cards" / "base" / "learngene.safetensors"
    path.write_bytes(b"\x80\x04 a pickle")
    shown = run("verify", "base", "--json")
    digest = hashlib.sha256(b"\x80\x04 a pickle").hexdigest()
    assert shown.code == 1 and shown.json[0]["sha256"] == digest
    assert f"{digest}, {small().digest} was promised" in shown.err and len(shown.err.splitlines()) == 1


def test_an_entry_goes_before_a_folder_of_its_name(run: Call, shelf: Path) -> None:
    """A name that is typed may be a path, which goes first; a sweep over the registry means its entries."""
    Path("base").mkdir()
    Path("base/learngene.safetensors").write_bytes(b"something else")
    assert run("verify").code == 0
    assert run("verify", "base").code == 1


def test_names_are_checked_whatever_the_others_are(run: Call, own: Path) -> None:
    small().save("mine.safetensors")
    shown = run("verify", "mine.safetensors", "baes", "base", "--json")
    assert [(row["name"], row["ok"]) for row in shown.json] == [
        ("mine.safetensors", True),
        ("baes", False),
        ("base", True),
    ]
    assert shown.code == 1 and "did you mean 'base'" in shown.err and len(shown.err.splitlines()) == 1
    assert (shown.json[0]["sha256"], shown.json[0]["promised"]) == (small().digest, None)


def test_a_registry_that_is_not_the_known_one(run: Call, shelf: Path, own: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv(ENVIRONMENT)
    for registry in (own, own.parent):
        assert [row["name"] for row in run("verify", "--registry", registry, "--json").json] == ["far", "near"]
    (own.parent / "genes/near/learngene.safetensors").unlink()
    gone = run("verify", "--registry", own, "-q")
    assert (gone.code, gone.out) == (1, "near\n") and "no learngene.safetensors in the folder" in gone.err
    for wrong in ("no-such.yaml", "."):
        refused = run("verify", "--registry", wrong)
        assert (refused.code, refused.out, len(refused.err.splitlines())) == (1, "", 1)
        assert "registry.yaml" in refused.err


@pytest.mark.parametrize("options", ["base --cached", "--cached --registry x.yaml", "base --registry x.yaml"])
def test_wrong_usage_of_verify(run: Call, shelf: Path, options: str) -> None:
    shown = run("verify", *options.split())
    assert (shown.code, shown.out) == (2, "") and "choose one" in " ".join(shown.err.split())


# --- verify --cached --------------------------------------------------------------------------------------------------


def test_the_whole_cache_is_checked(run: Call, shelf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run("verify", "--cached").out == "No results found.\n"
    good, other = (small(license=name).save_pretrained(tmp_path / name).read_bytes() for name in ("MIT", "ISC"))
    keep(cache, "org/tiny", COMMIT, good)
    bad = keep(cache, "org/tiny", OTHER, other)
    keep(cache, "org/pickled", COMMIT, b"\x80\x04 as the server has it")
    (cache / "models--org--not-a-learngene" / "snapshots" / COMMIT).mkdir(parents=True)
    keep(cache, "org/gone", COMMIT, good).resolve().unlink()  # a broken link is a file that is not here
    (cache / "version.txt").write_text("1")
    promised = hashlib.sha256(other).hexdigest()
    digest = damage(bad.resolve())
    shown = run("verify", "--cached")
    lines = shown.out.splitlines()
    assert [line.split("\t")[:2] for line in lines[1:]] == [
        [f"org/pickled@{COMMIT}", "no"],
        [f"org/tiny@{COMMIT}", "yes"],
        [f"org/tiny@{OTHER}", "no"],
    ]
    assert shown.code == 1
    pickled, changed = shown.err.splitlines()
    assert f"org/pickled@{COMMIT}: " in pickled and "starts like a pickle" in pickled
    name = f"org/tiny@{OTHER}"
    assert changed == (
        f"Error: {name}: {bad}: its sha256 is {digest}, {promised} was promised (next: learngene pull {name})"
    )
    assert run("verify", "--cached", "-q").out.split() == [f"org/pickled@{COMMIT}", name]


def test_the_registrys_digest_counts_for_a_file_in_the_cache(run: Call, own: Path, tmp_path: Path) -> None:
    """Pulled whole, but not what the registry promises: only the registry can tell."""
    keep(tmp_path / "cache", "org/tiny", COMMIT, small(license="MIT").save_pretrained(tmp_path / "x").read_bytes())
    assert run("verify", "--cached").code == 0
    shown = run("verify", "-q")
    assert (shown.code, shown.out) == (1, "far\n")
    served = small(license="MIT").digest
    assert f"its sha256 is {served}, {small().digest} was promised; the server itself gave it as {served}" in shown.err


def test_no_sweep_opens_a_socket(run: Call, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    keep(tmp_path / "cache", "org/kept", COMMIT, small().save_pretrained(tmp_path / "x").read_bytes())
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", blocked)
    monkeypatch.setattr("socket.getaddrinfo", blocked)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        known, of_file = (run("verify", *options, "--json") for options in ([], ["--registry", own]))
        assert [(row["name"], row["ok"]) for row in known.json] == [("base", True), ("far", None), ("near", True)]
        assert [(row["name"], row["ok"]) for row in of_file.json] == [("far", None), ("near", True)]
        kept = run("verify", "--cached", "--json")
        assert [(row["name"], row["ok"]) for row in kept.json] == [(f"org/kept@{COMMIT}", True)]
        assert (known.code, of_file.code, kept.code) == (0, 0, 0)
        assert [row["name"] for row in run("list", "--json").json] == ["base", "far", "near"]


OFFLINE = """
import socket, sys, typer
sys.path.insert(0, {tests!r})
def blocked(*_):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = blocked
import hostile
from typer.testing import CliRunner
from learngene_hub import _shelf
from learngene_hub._command import verb
app = typer.Typer()
app.command("list")(verb(_shelf.list_))
app.command("verify")(verb(_shelf.verify))
with hostile.only_method_is_tiny():
    for line in sys.stdin:
        done = CliRunner().invoke(app, line.split())
        print(repr((done.exit_code, done.stdout, done.stderr)))
"""


def test_offline_by_the_clients_own_environment(shelf: Path, tmp_path: Path) -> None:
    keep(tmp_path / "cache", "org/kept", COMMIT, small().save_pretrained(tmp_path / "x").read_bytes())
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    typed = f"verify --cached\nverify org/kept@{COMMIT} org/other -q\nlist --remote\n"
    command = [sys.executable, "-c", OFFLINE.format(tests=str(Path(__file__).parent))]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, env=env)
    kept, named, searched = (Result(*ast.literal_eval(line)) for line in done.stdout.splitlines())
    assert (kept.code, kept.err) == (0, "") and f"org/kept@{COMMIT}\tyes\t" in kept.out
    assert (named.code, named.out, len(named.err.splitlines())) == (1, "org/other\n", 1)
    assert "org/other is not in the cache and HF_HUB_OFFLINE is set" in named.err
    assert (searched.code, searched.out, len(searched.err.splitlines())) == (1, "", 1)
    assert "the Hub cannot be searched while HF_HUB_OFFLINE is set" in searched.err

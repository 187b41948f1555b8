"""Where a name leads, and the Hub over real HTTP with the real client against a server on this machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import small
from loopback import Hub, serve
from test_registry import rows, write
from typer.testing import CliRunner

from learngene_hub import _client, cli, hub
from learngene_hub.errors import ArtefactError, DigestError, RegistryError, SettingsError, StoreError
from learngene_hub.hub import FolderStore, HubStore, Repository, list_learngenes, locate, parse_repository, pull
from learngene_hub.registry import ENVIRONMENT


@pytest.fixture(autouse=True)
def tiny_method() -> Iterator[None]:
    with hostile.only_method_is_tiny():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in registry of one bundled learngene, `lsamd-base`."""
    folder = tmp_path / "shelf"
    path = small().save_pretrained(folder / "model_cards" / "lsamd-base")
    row = {"method": "tiny", "sha256": small().digest, "bytes": path.stat().st_size}
    write(folder, rows(row))
    monkeypatch.setattr("learngene_hub.registry.data_folder", lambda: folder)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one learngene, `org/tiny`; names that `pull` looks up on the Hub lead to it."""
    from huggingface_hub import constants

    path = small().save_pretrained(tmp_path / "upload")
    with serve() as running:
        running.repo("org/tiny").commit({"learngene.safetensors": path.read_bytes()})
        running.repo("org/empty").commit({"README.md": b"# nothing"})
        store = partial(HubStore, endpoint=running.url, cache=tmp_path / "cache")
        monkeypatch.setattr(hub, "HubStore", store)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running


# --- where a name leads -----------------------------------------------------------------------------------------------


def test_a_registry_name_leads_to_the_bundled_file(shelf: Path, here: Path) -> None:
    located = locate("lsamd-base")
    assert located.path == shelf / "model_cards" / "lsamd-base" / "learngene.safetensors"
    assert (located.sha256, located.entry) == (small().digest, list_learngenes()[0])
    assert pull("lsamd-base").digest == small().digest


def test_an_existing_path_goes_before_a_registry_name(shelf: Path, here: Path) -> None:
    small(license="MIT").save_pretrained(here / "lsamd-base")
    assert pull("lsamd-base").license == "MIT"
    assert pull(here / "lsamd-base" / "learngene.safetensors").license == "MIT"
    assert pull("./lsamd-base").license == "MIT"
    (here / "lsamd-base" / "learngene.safetensors").unlink()
    with pytest.raises(StoreError, match="no learngene.safetensors in the folder lsamd-base; .* goes before a name"):
        pull("lsamd-base")


def test_an_existing_path_goes_before_a_repository(server: Hub, here: Path) -> None:
    small(license="MIT").save_pretrained(here / "org" / "tiny")
    assert pull("org/tiny").license == "MIT"
    assert not server.requests
    assert pull("hf://org/tiny").license == "Apache-2.0"


def test_the_home_folder_is_known(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    small().save(here / "x.safetensors")
    assert pull("~/x.safetensors").digest == small().digest


def test_an_unknown_name_answers_with_the_nearest(shelf: Path, here: Path) -> None:
    with pytest.raises(RegistryError, match="unknown learngene 'lsamd-bsae'; did you mean 'lsamd-base'"):
        pull("lsamd-bsae")


@pytest.mark.parametrize(
    "name", ["./missing", "a/b/c", "missing.safetensors", "models/missing.safetensors", "/no/where"]
)
def test_a_path_that_is_not_there(name: str, shelf: Path, here: Path) -> None:
    with pytest.raises(StoreError, match="no file or folder"):
        pull(name)


@pytest.mark.parametrize(
    "name",
    ["https://example.com/x", "hf://org", "hf://org/repo/extra", "hf://", "hf:org/repo", "hf://org/repo@", "hf://../x"],
)
def test_what_only_looks_like_a_repository(name: str, shelf: Path, here: Path) -> None:
    with pytest.raises(StoreError, match="not a Hub repository; hf://org/repo"):
        pull(name)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "\n", "..x", "x" * 5000, "\ud800"])
def test_odd_names_are_unknown_names(name: str, shelf: Path, here: Path) -> None:
    with pytest.raises(RegistryError, match="unknown learngene"):
        pull(name)


def test_only_repositories_have_revisions(
    shelf: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small().save_pretrained(here / "folder")
    with pytest.raises(SettingsError, match="revision 'v1' asked of folder, .*only Hub repositories"):
        pull("folder", revision="v1")
    with pytest.raises(
        SettingsError, match="revision 'v1' asked of lsamd-base, which the registry keeps at model_cards"
    ):
        pull("lsamd-base", revision="v1")
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv(ENVIRONMENT, str(write(own, rows({"name": "remote", "uri": f"hf://org/tiny@{'0' * 40}"}))))
    with pytest.raises(SettingsError, match=r"pins to org/tiny@0{40}; org/tiny@v1 would work"):
        pull("remote", revision="v1")


def test_revisions_of_repositories() -> None:
    assert parse_repository("org/repo") == Repository("org/repo", None)
    assert parse_repository("hf://org/repo@refs/pr/1") == Repository("org/repo", "refs/pr/1")
    assert parse_repository("org/repo", "v1") == parse_repository("org/repo@v1", "v1") == Repository("org/repo", "v1")
    with pytest.raises(SettingsError, match="give one of them"):
        parse_repository("org/repo@v1", "v2")
    with pytest.raises(StoreError):
        parse_repository("repo")


def test_the_registrys_sha256_is_checked_at_every_load(shelf: Path, here: Path) -> None:
    path = shelf / "model_cards" / "lsamd-base" / "learngene.safetensors"
    pull("lsamd-base")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestError, match=f"{small().digest} was promised"):
        pull("lsamd-base")
    small(license="MIT").save(path)  # a good file, but another
    with pytest.raises(DigestError):
        pull("lsamd-base")


def test_a_folder_store_stays_in_its_folder(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "inside" / "gene")
    store = FolderStore(root=tmp_path / "inside")
    assert store.read("gene") == store.read("gene/learngene.safetensors")
    for uri in ("../inside/gene", str(tmp_path / "inside" / "gene"), "gene/../../inside/gene"):
        with pytest.raises(StoreError, match="a path below that folder"):
            store.read(uri)
    with pytest.raises(SettingsError, match="revision"):
        store.read("gene", "main")
    with pytest.raises(StoreError, match="no file or folder"):
        store.read("other")


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_repository_is_pulled_once_and_pinned_by_revision(server: Hub, shelf: Path, here: Path) -> None:
    first = server.repo("org/tiny").revisions["main"]
    assert pull("org/tiny").license == "Apache-2.0"
    assert [request.split()[0] for request in server.requests] == ["HEAD", "GET"]
    newer = Path("new.safetensors")
    small(license="MIT").save(newer)
    server.repo("org/tiny").commit({"learngene.safetensors": newer.read_bytes()})
    assert pull("org/tiny").license == "MIT"
    for name, revision in ((f"org/tiny@{first}", None), ("hf://org/tiny", first), (f"hf://org/tiny@{first}", first)):
        server.requests.clear()
        assert pull(name, revision=revision).license == "Apache-2.0"
        assert not server.requests  # a commit that is in the cache needs no server


def test_an_entry_on_the_hub(server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.repo("org/tiny").revisions["main"]
    row = {"name": "remote", "uri": f"hf://org/tiny@{commit}", "sha256": small().digest}
    monkeypatch.setenv(ENVIRONMENT, str(write(here, rows(row))))
    assert pull("remote").digest == small().digest
    write(here, rows({**row, "sha256": "0" * 64}))
    with pytest.raises(DigestError, match=f"{'0' * 64} was promised"):
        pull("remote")
    assert [entry.name for entry in list_learngenes()] == ["lsamd-base", "remote"]


def test_a_registry_on_the_hub(server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.repo("org/tiny").revisions["main"]
    text = rows({"name": "remote", "uri": f"hf://org/tiny@{commit}", "sha256": small().digest})
    server.repo("org/shelf").commit({"registry.yaml": text.encode()})
    monkeypatch.setenv(ENVIRONMENT, "hf://org/shelf")
    assert pull("remote").digest == small().digest
    origins = {entry.name: entry.origin for entry in list_learngenes()}
    assert origins == {
        "lsamd-base": "built-in",
        "remote": f"hf://org/shelf@{server.repo('org/shelf').revisions['main']}",
    }


def test_a_damaged_registry_is_fetched_again_or_refused(
    server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sha256s are what everything else is checked against."""
    commit = server.repo("org/tiny").revisions["main"]
    text = rows({"name": "remote", "uri": f"hf://org/tiny@{commit}", "sha256": small().digest})
    server.repo("org/shelf").commit({"registry.yaml": text.encode()})
    monkeypatch.setenv(ENVIRONMENT, "hf://org/shelf")
    server.fault, server.times = "corrupt", 1
    assert pull("remote").digest == small().digest
    assert server.times == 0
    server.repo("org/shelf").commit({"registry.yaml": text.encode() + b"# newer\n"})
    server.fault = "corrupt"
    with pytest.raises(StoreError, match="hf://org/shelf is not what http.* promises; delete ") as caught:
        pull("remote")
    assert "\n" not in str(caught.value)
    server.fault = ""
    assert pull("remote").digest == small().digest


def test_same_size_corruption_is_caught_and_mended(server: Hub, shelf: Path, here: Path) -> None:
    server.fault = "corrupt"
    with pytest.raises(DigestError, match="was promised"):
        pull("org/tiny")
    with pytest.raises(DigestError):
        pull("org/tiny")  # it stays in the cache
    server.fault = ""
    assert pull("org/tiny").digest == small().digest


def test_a_truncated_download_is_caught(server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.fault = "truncate"
    with pytest.raises((StoreError, ArtefactError)):
        pull("org/tiny")
    server.fault = ""
    assert pull("org/tiny").digest == small().digest


def test_hostile_files_from_the_hub_are_refused(server: Hub, shelf: Path, here: Path) -> None:
    good = here / "good.safetensors"
    small().save(good)
    corpus = dict(hostile.corpus(good.read_bytes()))
    for what in ("pickle, protocol 4", "torch.save, zip", "git-lfs pointer", "5,000 tensors", "NaN in stem.shift"):
        server.repo("org/bad").commit({"learngene.safetensors": corpus[what]})
        with pytest.raises(ArtefactError):
            pull("org/bad")


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("org/missing", "", "no repository org/missing on http://127.0.0.1:.*: check the name, or `hf auth login`"),
        ("org/tiny", "hidden", "no repository org/tiny on .* `hf auth login` if it is private"),
        ("org/tiny", "gated", "org/tiny is gated: accept its terms at http://127.0.0.1:.*/org/tiny"),
        ("org/tiny", "denied", "answered 403 for org/tiny: `hf auth login` with a token"),
        ("org/tiny", "broken", "answered 500 for org/tiny: try again later"),
        ("org/tiny@v9", "", "org/tiny has no revision 'v9'"),
        ("org/empty", "", "org/empty has no learngene.safetensors"),
        ("org/a--b", "", "a name that the Hub allows"),
    ],
)
def test_each_refusal_of_the_hub_says_what_would_work(
    name: str, fault: str, message: str, server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.fault = fault
    with pytest.raises(StoreError, match=message) as caught:
        pull(name)
    assert "\n" not in str(caught.value)


def test_a_command_that_waits_for_the_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    told = CliRunner().invoke(cli.app, ["show", "org/tiny"]).stderr.splitlines()
    assert told[0] == "http://127.0.0.1:9 is busy, or cannot be reached: it is asked again, for about half a minute"
    assert len(told) == 2 and told[1].startswith("Error: org/tiny could not be fetched")
    assert len(CliRunner().invoke(cli.app, ["show", "org/tiny", "--json"]).stderr.splitlines()) == 1


def test_a_hub_that_is_slow_is_waited_for_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_client, "SLOW", 0.01)
    caplog.set_level("INFO", "learngene_hub.hub")
    with _client.quiet_client("http://slow"):
        deadline = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["waiting for http://slow"]


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(StoreError, match="could not be fetched from http://127.0.0.1:9 .*: check the connection"):
        HubStore(endpoint="http://127.0.0.1:9", cache=tmp_path).read("org/tiny")


def test_a_hub_that_breaks_later_does_not_matter(server: Hub, shelf: Path, here: Path) -> None:
    pull("org/tiny")
    server.fault = "broken"
    assert pull("org/tiny").digest == small().digest


def test_no_space_left_for_a_download(server: Hub, shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(StoreError, match="no space left to fetch org/tiny: free some, or set HF_HOME"):
        pull("org/tiny")


OFFLINE = """
import socket, sys
sys.path.insert(0, {tests!r})
def blocked(*_):
    raise AssertionError("a socket was opened")
if {blocked}:
    socket.socket.connect = socket.getaddrinfo = blocked
import hostile
from learngene_hub.errors import StoreError
from learngene_hub.hub import pull
with hostile.only_method_is_tiny():
    print(pull("org/tiny").digest)
    try:
        pull("org/other")
    except StoreError as error:
        print(error)
"""


def test_offline_means_offline(server: Hub, here: Path) -> None:
    """With the client's own environment: pulled once, then read again with sockets blocked."""
    package = str(Path(hub.__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": package,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(here / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    results = []
    for offline in (False, True):
        code = OFFLINE.format(tests=str(Path(__file__).parent), blocked=offline)
        env["HF_HUB_OFFLINE"] = str(int(offline))
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
        assert result.returncode == 0, result.stderr
        results.append(result.stdout.splitlines())
        server.requests.clear()
    online, offline_lines = results
    assert online == [
        small().digest,
        f"no repository org/other on {server.url}: check the name, or `hf auth login` if it is private",
    ]
    assert offline_lines[0] == small().digest
    assert offline_lines[1] == "org/other is not in the cache and HF_HUB_OFFLINE is set: load it once online"

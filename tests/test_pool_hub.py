"""A pool on the Hub, over real HTTP with the real client: pushed whole, grown, pulled, checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from exchange import hub_of_this_process
from loopback import Hub
from pools import ONCE, files_of, look, noise_images, pool_of
from typer.testing import CliRunner

from learngene_hub import Descendant, Learngene, Pool, cli, hub
from learngene_hub.errors import ArtefactError, SettingsError, StoreError
from learngene_hub.registry import ENVIRONMENT

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
REPO = "author/pool"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with hub_of_this_process(tmp_path) as running:
        yield running


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return pool_of(tmp_path / "mine", (1, 2), count=30)


def tree(server: Hub, repo: str = REPO) -> dict[str, bytes]:
    files = server.repos[repo].files[server.repos[repo].find("main")]
    return {
        name: content for name, content in files.items() if name not in (".gitattributes", "README.md", "pool.json")
    }


def test_all_files_arrive_in_one_commit_and_come_back(server: Hub, pool: Pool, tmp_path: Path) -> None:
    pushed = hub.push_pool(pool, REPO)
    assert tree(server) == files_of(pool.folder) and pushed.sha256 == pool.anchor.digest
    assert len([line for line in server.requests if "/commit/" in line]) == 1
    card = server.repos[REPO].files[server.repos[REPO].find("main")]["README.md"].decode()
    assert f"| look-2 | 30 | 2 | {pool.row('look-2').bytes:,} | {pool.row('look-2').sha256[:12]} |" in card
    found = hub.pull_pool(REPO)
    assert (found.name, found.revision, found.names) == (REPO, pushed.revision, ("look-1", "look-2"))
    assert found.manifest == pool.manifest and found.verify() == []
    own = found.copy(tmp_path / "copy")
    assert files_of(own.folder) == files_of(pool.folder)
    assert own.add(look(3), recipe=ONCE).names[-1] == "look-3"
    with pytest.raises(StoreError, match="is in the cache of the Hub's client"):
        found.adopt(own.read("look-1"), "again")
    assert Learngene.from_pretrained(REPO).digest == pool.anchor.digest  # a learngene like any other


def test_a_pool_that_has_grown_is_pushed_again_and_another_is_refused(server: Hub, pool: Pool, tmp_path: Path) -> None:
    first = hub.push_pool(pool, REPO)
    before = tree(server)
    grown = pool.add(look(3, 30), recipe=ONCE)
    second = hub.push_pool(grown, REPO)
    assert second.replaced == ("pool.json", "README.md") and before.items() < tree(server).items()
    assert len(hub.pull_pool(REPO)) == 3 and len(hub.pull_pool(REPO, revision=first.revision)) == 2
    assert not hub.push_pool(grown, REPO).changed
    for dry in (True, False):  # it would lose an entry
        with pytest.raises(StoreError, match="has another pool.json, of this pool: entry look-3 would leave it; "):
            hub.push_pool(pool, REPO, dry_run=dry)
    with pytest.raises(StoreError, match="entries look-2, look-3 would leave it"):
        hub.push_pool(pool_of(tmp_path / "first", (1,), count=30), REPO)
    assert hub.push_pool(pool, REPO, create_pr=True).pull_request
    with pytest.raises(StoreError, match="has another learngene.safetensors"):
        hub.push_pool(pool_of(tmp_path / "other", (1,), kind="adaptive", license="mit"), REPO)


def test_a_spoilt_pool_or_one_without_licence_is_not_sent(server: Hub, pool: Pool, tmp_path: Path) -> None:
    path = pool.folder / "entries" / f"{pool.row('look-1').sha256}.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="look-1: .* nothing was sent"):
        hub.push_pool(pool, REPO)
    with pytest.raises(SettingsError, match="no licence for the anchor"):
        hub.push_pool(pool_of(tmp_path / "bare", kind="ldr"), REPO)
    assert not server.repos


def test_a_damaged_file_of_the_cache_is_fetched_again(server: Hub, pool: Pool) -> None:
    hub.push_pool(pool, REPO)
    found = hub.pull_pool(REPO)
    path = (found.folder / "entries" / f"{pool.row('look-1').sha256}.safetensors").resolve()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert found.verify() != []
    assert hub.pull_pool(REPO).verify() == []


def test_a_registry_may_name_a_pool(server: Hub, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = hub.push_pool(pool, REPO)
    row = {"name": "shared", "method": "net2net", "uri": pushed.uri, "sha256": pushed.sha256}
    row |= {
        "bytes": pool.manifest.anchor.bytes,
        "license": pushed.license,
        "card": pushed.url,
        "description": "A pool.",
    }
    (tmp_path / "registry.yaml").write_text(json.dumps([row]))  # JSON is YAML
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "registry.yaml"))
    assert hub.pull_pool("shared").manifest == pool.manifest
    task = look(1, 20, seed=9)
    found = hub.pull_pool("shared").select(task, unlabelled=True)
    assert found == pool.select(task, unlabelled=True) and not hub.pull_pool("shared").select(noise_images(20)).entries
    model = Descendant.from_learngene("shared", selection=found, depth=2, num_labels=2)
    assert model.config.learngene is not None and model.config.learngene["revision"] == pushed.revision


def test_the_command_line_pushes_and_pulls(server: Hub, pool: Pool, tmp_path: Path) -> None:
    def run(*args: object) -> dict[str, object]:
        found = CliRunner().invoke(cli.app, [*map(str, args), "--json"])
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)

    assert run("pool", "push", pool.folder, REPO, "--dry-run")["sent"] is False and not server.repos
    sent = run("pool", "push", pool.folder, REPO)
    assert sent["created"] and len(sent["files"]) == 5  # type: ignore[arg-type]
    assert run("pool", "pull", REPO, tmp_path / "theirs")["bytes"] == run("pool", "show", REPO)["bytes"]
    assert Pool.load(tmp_path / "theirs").manifest == pool.manifest
    assert run("pool", "verify", REPO)["ok"] is True
    again = run("pool", "push", pool.folder, REPO)
    assert (again["sent"], again["changed"]) == (False, False)
    shown = run("pool", "show", REPO)
    assert (shown["repository"], shown["revision"]) == (REPO, hub.pull_pool(REPO).revision)
    assert "repository" not in run("pool", "show", pool.folder)


def test_the_command_line_says_what_a_push_did_and_what_is_next(server: Hub, pool: Pool) -> None:
    def told(*args: object) -> str:
        return CliRunner().invoke(cli.app, [*map(str, args)]).stderr

    assert told("pool", "push", pool.folder, REPO, "--dry-run") == "Next: the same command without --dry-run\n"
    assert told("pool", "push", pool.folder, REPO) == f"Next: learngene pool pull {REPO} FOLDER\n"
    assert told("pool", "push", pool.folder, REPO) == f"{REPO} holds this very pool already; nothing was sent\n"
    assert "nothing would be sent" in told("pool", "push", pool.folder, REPO, "--dry-run")
    hub.pull_pool(REPO)
    assert f"{REPO} is a pool, and its anchor alone is used here" in told("show", REPO)
    entry = pool.folder / "entries" / f"{pool.row('look-1').sha256}.safetensors"
    entry.write_bytes(entry.read_bytes()[:-1])
    assert told("pool", "push", pool.folder, REPO).endswith(f"(next: learngene pool verify {pool.folder})\n")

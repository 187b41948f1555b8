"""Push over real HTTP with the real client: what arrives, what is refused, and that nothing is ever lost."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _loopback_api
import pytest
import torch
import yaml
from _loopback_store import Repo
from exchange import NAME, REPO, hub_of_this_process, one_line, pico, sent
from loopback import READ_ONLY, READER, REFUSALS, Hub
from test_registry import rows, write

from learngene_hub._store import PUBLIC
from learngene_hub.errors import ArtefactError, SettingsError, StoreError
from learngene_hub.hub import HubStore, push
from learngene_hub.hub import pull as pull_learngene
from learngene_hub.learngene import Learngene
from learngene_hub.registry import ENVIRONMENT

# of httpx, at what the client does with an open file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub; temporary files of ours must be gone at the end."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with hub_of_this_process(tmp_path) as running:
        yield running
    assert not list(temporary.glob("learngene-*"))


def tree(hub: Hub, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """What a repository holds, but for what every new one has."""
    files = hub.repos[repo].files[hub.repos[repo].find(revision)]
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def header(content: bytes) -> dict[str, Any]:
    """The facts in a learngene's file, read by hand."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["learngene"])


def commits(hub: Hub, repo: str = REPO) -> int:
    return len(hub.repos[repo].history)


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_artefact_and_card_arrive_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    pushed = push(pico(), REPO, description="A pico for tests.", message="First")
    path = tmp_path / "own.safetensors"
    pico().save(path)
    files = tree(hub)
    assert sorted(files) == ["README.md", NAME]
    assert files[NAME] == path.read_bytes()
    assert hashlib.sha256(files[NAME]).hexdigest() == pushed.sha256 == pico().digest
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n") and "A pico for tests." in card
    assert {"learngene", "lsamd"} <= set(yaml.safe_load(card.split("---")[1])["tags"])
    assert f'from_learngene("{REPO}"' in card
    head = hub.repos[REPO].revisions["main"]
    assert [line for line in hub.requests if "/commit/" in line] == [f"POST /api/models/{REPO}/commit/main"]
    assert commits(hub) == 2 and hub.repos[REPO].history[head].title == "First"  # the hub's own first one, and ours
    assert (pushed.revision, pushed.uri) == (head, f"hf://{REPO}@{head}")
    assert (pushed.nbytes, pushed.license, pushed.private) == (path.stat().st_size, "Apache-2.0", False)
    assert pushed.created and pushed.changed and pushed.replaced == () and pushed.files == (NAME, "README.md")


def test_the_entry_is_one_that_a_registry_takes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = push(pico(), "author/Some_Thing.X", description="Two\nlines")
    assert pushed.entry is not None and pushed.entry.name == "some_thing.x"
    assert pushed.entry.description == "Two lines"
    facts = {"name": pushed.entry.name, "method": "lsamd", "uri": pushed.entry.uri, "sha256": pushed.entry.sha256}
    monkeypatch.setenv(ENVIRONMENT, str(write(tmp_path, rows({**facts, "bytes": pushed.entry.bytes}))))
    assert pull_learngene("some_thing.x").digest == pico().digest


def test_a_server_without_xet_needs_no_environment_variable(hub: Hub) -> None:
    from huggingface_hub.utils._runtime import is_xet_available

    assert is_xet_available()  # the client would try
    push(pico(), REPO)
    assert not [line for line in hub.requests if "xet" in line]
    assert [line for line in hub.requests if line.startswith("PUT /lfs-storage/")]


def test_the_public_hub_is_given_a_path(hub: Hub, tmp_path: Path) -> None:
    """There the client may use Xet, which an open file would rule out."""
    from contextlib import ExitStack

    from learngene_hub._store import _operation

    path = tmp_path / "x"
    path.write_bytes(b"x")
    with ExitStack() as stack:
        assert _operation("x", path, PUBLIC[0], stack).path_or_fileobj == str(path)
        assert _operation("x", path, hub.url, stack).path_or_fileobj.name == str(path)  # type: ignore[union-attr]


def test_the_method_forwards(hub: Hub) -> None:
    pushed = pico().push_to_hub(REPO, private=True, message="By the method")
    assert pushed.private and hub.repos[REPO].private
    assert hub.repos[REPO].history[str(pushed.revision)].title == "By the method"


def test_the_same_push_again_changes_nothing(hub: Hub) -> None:
    first = push(pico(), REPO)
    again = push(pico(), REPO)
    assert (again.revision, again.changed, again.created) == (first.revision, False, False)
    assert commits(hub) == 2


def test_a_dry_run_only_asks(hub: Hub) -> None:
    new = push(pico(), REPO, dry_run=True)
    assert (new.created, new.changed, new.revision, new.entry) == (True, True, None, None)
    assert not sent(hub) and REPO not in hub.repos
    push(pico(), REPO)
    hub.requests.clear()
    other = push(pico(1), REPO, dry_run=True, overwrite=True)
    assert (other.created, other.replaced, other.sha256) == (False, (NAME, "README.md"), pico(1).digest)
    with pytest.raises(StoreError, match="has another learngene.safetensors"):
        push(pico(1), REPO, dry_run=True)
    assert not sent(hub) and commits(hub) == 2


# --- licences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("license", ["", " ", "unknown", "NONE", "NOASSERTION"])
def test_nothing_is_pushed_without_a_licence(license: str, hub: Hub) -> None:
    with pytest.raises(
        SettingsError, match="no licence for the learngene .its ancestor's is apache-2.0.; license="
    ) as e:
        push(pico(license=license), REPO)
    one_line(e.value)
    assert not hub.requests


def test_an_asked_licence_becomes_part_of_the_file(hub: Hub) -> None:
    bare = pico(license="")
    pushed = push(bare, REPO, license="CC-BY-4.0")
    content = tree(hub)[NAME]
    assert header(content)["license"] == "CC-BY-4.0"
    assert (
        pushed.sha256 == hashlib.sha256(content).hexdigest() == replace(bare, license="CC-BY-4.0").digest != bare.digest
    )
    assert bare.license == ""
    assert b"license: cc-by-4.0\n" in tree(hub)["README.md"]
    assert pull_learngene(pushed.uri).license == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("license", "hint"),
    [
        ("nonsense", "; an identifier"),
        ("apache-2", "did you mean 'apache-2.0'?"),
        ("MIT AND nonsense", "; an identifier"),
        ("MIT OR", "; an identifier"),
        ("MIT OR\nApache-2.0", "would work"),
        ("CC-BY-5.0", "did you mean 'cc-by-"),
        ("Apache 2.0", "did you mean 'apache-2.0'?"),
    ],
)
def test_what_is_no_licence_is_refused(license: str, hint: str, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="neither SPDX nor the Hub knows") as told:
        push(pico(license=""), REPO, license=license)
    assert repr(license) in str(told.value) and hint in str(told.value)
    one_line(told.value)
    assert not hub.requests


@pytest.mark.parametrize(
    "license",
    ["other", "mit", "llama2", "openrail++", "0BSD", "GPL-2.0-or-later", "LicenseRef-Ours", "MIT OR Apache-2.0"],
)
def test_licences_of_the_hub_and_of_spdx_pass(license: str, hub: Hub) -> None:
    assert push(pico(license=""), REPO, license=license).license == license


def test_licences_that_contradict_each_other_or_are_none(hub: Hub) -> None:
    with pytest.raises(SettingsError, match="license 'MIT' asked; the artefact says 'Apache-2.0'"):
        push(pico(), REPO, license="MIT")
    with pytest.raises(SettingsError, match="neither SPDX nor the Hub knows"):
        push(pico(license=""), REPO, license="my own: ask me\nplease")
    assert not hub.requests
    assert push(pico(), REPO, license="apache-2.0").sha256 == pico().digest  # the same one: the file stays as it is


def test_what_could_not_be_loaded_is_not_sent(hub: Hub) -> None:
    tensors = {**pico().tensors, "stem.pos_embed": pico().tensors["stem.pos_embed"] * float("nan")}
    with pytest.raises(ArtefactError, match="NaN or infinite"):
        push(replace(pico(), tensors=tensors), REPO)
    assert not hub.requests


# --- what is there already --------------------------------------------------------------------------------------------


def test_another_learngene_is_replaced_only_when_asked(hub: Hub) -> None:
    first = push(pico(), REPO)
    with pytest.raises(StoreError, match=f"another {NAME} .{pico().digest[:12]}. and README.md .*overwrite=True") as e:
        push(pico(1), REPO)
    one_line(e.value)
    assert tree(hub)[NAME] == tree(hub, revision=str(first.revision))[NAME] and commits(hub) == 2
    second = push(pico(1), REPO, overwrite=True)
    assert second.replaced == (NAME, "README.md")
    assert hashlib.sha256(tree(hub)[NAME]).hexdigest() == pico(1).digest
    assert pull_learngene(first.uri).digest == pico().digest  # the history keeps the old one


def test_a_card_written_by_hand_is_replaced_only_when_asked(hub: Hub) -> None:
    hub.repo(REPO).commit({"README.md": b"# by hand", "notes.txt": b"mine"})
    with pytest.raises(StoreError, match="has another README.md"):
        push(pico(), REPO)
    assert push(pico(), REPO, overwrite=True).replaced == ("README.md",)
    assert tree(hub)["notes.txt"] == b"mine"


def test_a_branch_and_a_pull_request_keep_what_is_there(hub: Hub) -> None:
    first = push(pico(), REPO)
    branched = push(pico(1), REPO, branch="next")
    proposed = push(pico(1), REPO, create_pr=True)
    repo = hub.repos[REPO]
    assert repo.revisions["main"] == first.revision and repo.revisions["next"] == branched.revision
    assert proposed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert repo.revisions["refs/pr/1"] == proposed.revision
    for pushed in (branched, proposed):
        assert pull_learngene(pushed.uri).digest == pico(1).digest
    assert pull_learngene(REPO).digest == pico().digest
    with pytest.raises(StoreError, match="author/pico@next has another"):
        push(pico(2), REPO, branch="next")


def test_a_pull_request_needs_a_repository(hub: Hub) -> None:
    with pytest.raises(StoreError, match="no repository author/pico to open a pull request in"):
        push(pico(), REPO, create_pr=True)
    assert not sent(hub)


@pytest.mark.parametrize("branch", [None, "main"])
def test_a_change_meanwhile_is_never_overwritten(branch: str | None, hub: Hub) -> None:
    push(pico(), REPO)
    hub.later = {"README.md": b"# somebody else was faster"}
    hub.fault = "moved"
    with pytest.raises(StoreError, match="has changed meanwhile: nothing was overwritten") as e:
        push(pico(1), REPO, branch=branch, overwrite=True)
    one_line(e.value)
    assert tree(hub)["README.md"] == b"# somebody else was faster"
    assert hashlib.sha256(tree(hub)[NAME]).hexdigest() == pico().digest
    with pytest.raises(StoreError, match="has another"):
        push(pico(1), REPO)


# --- private ----------------------------------------------------------------------------------------------------------


def test_private_is_private(hub: Hub, tmp_path: Path) -> None:
    pushed = push(pico(), REPO, private=True)
    assert pushed.private and hub.repos[REPO].private
    assert push(pico(), REPO).private  # and stays so
    for account in (READER, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("HF_TOKEN")
            with pytest.raises(StoreError, match="no repository author/pico on .* if it is private"):
                HubStore(token=account, cache=tmp_path / "another").read(pushed.uri)


def test_a_private_push_that_comes_out_public_sends_nothing_and_says_so(hub: Hub) -> None:
    hub.fault = "public"
    with pytest.raises(StoreError, match="author/pico IS PUBLIC .*no file was sent.*/settings, or delete it with") as e:
        push(pico(), REPO, private=True)
    assert f"{hub.url}/{REPO}/settings" in one_line(e.value) and f"hf repos delete {REPO}" in str(e.value)
    assert not tree(hub) and not [line for line in hub.requests if "lfs" in line or "commit" in line]


def test_a_private_push_to_a_public_repository_sends_nothing(hub: Hub) -> None:
    push(pico(), REPO)
    hub.requests.clear()
    with pytest.raises(StoreError, match="is there and PUBLIC, private was asked: nothing was sent"):
        push(pico(), REPO, private=True)
    assert not sent(hub)


def test_a_server_that_only_says_private_is_found_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the repository to somebody without a login."""
    guarded = _loopback_api.Request.repo

    def leaky(self: _loopback_api.Request) -> Repo:
        return self.hub.repos.get(self.parts["repo"]) or guarded(self)

    monkeypatch.setattr(_loopback_api.Request, "repo", leaky)
    with pytest.raises(StoreError, match="IS PUBLIC .*no file was sent"):
        push(pico(), REPO, private=True)
    assert hub.repos[REPO].private and not tree(hub)


def test_a_repository_that_becomes_public_meanwhile_is_told_loudly(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Repo.advance

    def opening(self: Repo, *args: Any, **kwargs: Any) -> str:
        if self.history:  # not the first commit
            self.private = False
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(Repo, "advance", opening)
    with pytest.raises(StoreError, match="IS PUBLIC .*THE FILES ARE UP.*delete it"):
        push(pico(), REPO, private=True)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("broken", "answered 500 for author/pico .*: try again later"),
        ("hidden", "does not know you .401 for author/pico.: `hf auth login`, or HF_TOKEN"),
        ("denied", "does not let you write to author/pico .403.: `hf auth login` with a token that may"),
        ("gated", "author/pico is gated: accept its terms at"),
        ("full", "does not let you write to author/pico .403."),
        ("dropped_upload", "author/pico could not be pushed to http://127.0.0.1:.*: check the connection"),
        ("portal", "author/pico"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_push_that_fails_leaves_what_was(there: bool, fault: str, message: str, hub: Hub) -> None:
    if there:
        push(pico(), REPO)
    before = tree(hub) if there else {}
    hub.fault = fault
    with pytest.raises(StoreError, match=message) as e:
        push(pico(1), REPO, overwrite=True)
    one_line(e.value)
    hub.fault = None
    assert (tree(hub) if REPO in hub.repos else {}) == before
    assert pull_learngene(push(pico(1), REPO, overwrite=True).uri).digest == pico(1).digest


@pytest.mark.parametrize("fault", ["flaky", "limited"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_push_outlasts_a_busy_server(fault: str, times: int, hub: Hub) -> None:
    hub.fault = fault
    hub.times = times
    pushed = push(pico(), REPO)
    assert hub.times == 0 and commits(hub) == 2
    assert hashlib.sha256(tree(hub)[NAME]).hexdigest() == pushed.sha256


def test_waiting_is_as_long_as_the_server_asks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    hub.fault = "limited"
    monkeypatch.setitem(REFUSALS["limited"].headers, "Retry-After", "9")
    push(pico(), REPO)
    assert waited == [9.0]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub) -> None:
    push(pico(), REPO)
    hub.fault = "lost_answer"
    hub.times = 1
    pushed = push(pico(1), REPO, overwrite=True)
    assert hub.times == 0 and commits(hub) == 3
    assert pushed.revision == hub.repos[REPO].revisions["main"]
    assert hashlib.sha256(tree(hub)[NAME]).hexdigest() == pico(1).digest


def test_a_server_that_does_not_keep_what_it_was_sent_is_found_out(hub: Hub) -> None:
    hub.fault = "corrupt"
    with pytest.raises(
        StoreError, match=f"does not hold what was sent: {NAME} of author/pico@.*keep your own copy"
    ) as e:
        push(pico(), REPO)
    one_line(e.value)


def test_listings_that_name_files_elsewhere_do_not_matter(hub: Hub) -> None:
    hub.fault = "names"
    assert pull_learngene(push(pico(), REPO).uri).digest == pico().digest


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READER, "does not let you write to author/pico .403."),
        (READ_ONLY, "does not let you write to author/pico .403."),
        ("hf_nobody", "does not know you .401 for author/pico.: `hf auth login`"),
    ],
)
def test_a_token_that_may_not(token: str, message: str, hub: Hub) -> None:
    with pytest.raises(StoreError, match=message) as e:
        push(pico(), REPO, token=token)
    assert token not in one_line(e.value)
    assert REPO not in hub.repos


def test_nobody_is_logged_in(tmp_path: Path) -> None:
    with hub_of_this_process(tmp_path, token=None) as hub:
        with pytest.raises(StoreError, match="does not know you"):
            push(pico(), REPO)
        assert not hub.repos


def test_offline_means_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set, so nothing can be pushed to author/pico: unset it"):
        push(pico(), REPO)
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo", "more", "message"),
    [
        ("pico", {}, "not a Hub repository to push to; org/name would work"),
        ("a/b/c", {}, "not a Hub repository"),
        ("../pico", {}, "not a Hub repository"),
        ("author/pico@v1", {}, "revision 'v1' asked of a push; branch='v1' would work"),
        (REPO, {"branch": "a b"}, "branch 'a b' asked"),
        (REPO, {"branch": "refs/pr/1"}, "branch 'refs/pr/1' asked"),
        (REPO, {"branch": "0" * 40}, "which is a commit"),
        (REPO, {"branch": "next", "create_pr": True}, "give one of them"),
        ("author/a--b", {}, "not a name that the Hub allows"),
    ],
)
def test_what_is_no_place_to_push_to(repo: str, more: dict[str, Any], message: str, hub: Hub) -> None:
    with pytest.raises((StoreError, SettingsError), match=message) as e:
        push(pico(), repo, **more)
    one_line(e.value)
    assert not sent(hub)


def test_a_file_changed_on_its_way_to_the_server_is_noticed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the upload the bytes are those of one file in a folder of our own."""
    save = Learngene.save_pretrained

    def damaged(self: Learngene, folder: Any) -> Path:
        path = save(self, folder)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return path

    monkeypatch.setattr(Learngene, "save_pretrained", damaged)
    with pytest.raises(ArtefactError, match="was promised"):
        push(pico(), REPO)
    assert not hub.requests


def test_torch_is_untouched(hub: Hub) -> None:
    before = {name: tensor.clone() for name, tensor in pico().tensors.items()}
    push(pico(), REPO)
    assert all(torch.equal(before[name], tensor) for name, tensor in pico().tensors.items())


def test_the_unmodified_command_of_the_client_fetches_what_was_pushed(hub: Hub, tmp_path: Path) -> None:
    pushed = push(pico(), REPO, private=True)
    command = [str(Path(sys.executable).with_name("hf")), "download", REPO, "--revision", str(pushed.revision)]
    done = subprocess.run(
        [*command, "--local-dir", str(tmp_path / "theirs")],
        capture_output=True, text=True, check=False, env=hub.environment(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((tmp_path / "theirs" / NAME).read_bytes()).hexdigest() == pico().digest
    assert (tmp_path / "theirs" / "README.md").read_bytes() == tree(hub)["README.md"]

"""The commands that exchange learngenes with the Hub: push and pull."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import NameArgument, YesOption, require_new, tell_pool
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.hub import Located, Pushed
    from learngene_hub.registry import Entry

CARD = "README.md"

DryOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen; nothing is sent or written.")]


def push(
    out: Output,
    name: Annotated[
        str, typer.Argument(metavar="PATH", help="A learngene's file or folder, a name, or a descendant's folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, and make sure that it is.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    branch: Annotated[str | None, typer.Option("--branch", help="Push to this branch; made where missing.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option("--license", metavar="SPDX", help="Where the file names none: Apache-2.0, ...")
    ] = None,
    description: Annotated[str, typer.Option("--description", help="One line for the card and the registry.")] = "",
    results: Annotated[
        Path | None, typer.Option("--results", help="A summary of benchmarks/transfer.py, for the card.")
    ] = None,
    dry_run: DryOption = False,
    yes: YesOption = False,
) -> None:
    """Put a learngene, or a descendant, on the Hub, with a card.

    The file is checked first, and needs a licence. File and card go up in one commit; then the server is asked what it
    has, and who can see it. Printed is the uri that pins exactly this, and the entry for a registry.

    \b
    learngene push my-learngene org/my-learngene --dry-run
    learngene push my-learngene org/my-learngene --private --license Apache-2.0
    learngene push trained org/my-classifier
    """
    if (Path(name) / "config.json").is_file() and not (Path(name) / "learngene.safetensors").is_file():
        if description or results:
            raise errors.SettingsError(f"--description or --results asked of {name}; they are for learngenes")
        _push_descendant(out, name, repo, private, create_pr, branch, message, license, dry_run, yes)
        return
    from learngene_hub import hub

    learngene = hub.pull(name)
    tell_pool(out, name, f"`learngene pool push {{name}} {repo}` sends all of it")
    measured = _read_json(results) if results else None

    def run(*, dry: bool, overwrite: bool) -> Pushed:
        return hub.push(
            learngene,
            repo,
            private=private,
            create_pr=create_pr,
            branch=branch,
            message=message,
            description=description,
            license=license,
            results=measured,
            dry_run=dry,
            overwrite=overwrite,
        )

    _send(out, run, repo, dry_run=dry_run, asking=not (yes or dry_run or create_pr), yes=yes)


def _push_descendant(
    out: Output,
    folder: str,
    repo: str,
    private: bool,
    create_pr: bool,
    branch: str | None,
    message: str | None,
    license: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    from learngene_hub.hub import push_descendant

    def run(*, dry: bool, overwrite: bool) -> Pushed:
        return push_descendant(
            folder,
            repo,
            private=private,
            create_pr=create_pr,
            branch=branch,
            message=message,
            license=license,
            dry_run=dry,
            overwrite=overwrite,
        )

    _send(out, run, repo, dry_run=dry_run, asking=not (yes or dry_run or create_pr), yes=yes)


def _send(out: Output, run: Callable[..., Pushed], repo: str, *, dry_run: bool, asking: bool, yes: bool) -> None:
    """Push; where something else is there and somebody can be asked, after a question."""
    if asking and out.interactive:
        plan = run(dry=True, overwrite=True)
        if plan.replaced:
            there = f"{repo} has another {' and '.join(plan.replaced)}. Replace (its history keeps the old)?"
            yes = typer.confirm(there, abort=True, err=True)
    _tell(out, run(dry=dry_run, overwrite=yes), dry_run)


def _tell(out: Output, pushed: Pushed, dry_run: bool) -> None:
    facts: dict[str, Any] = {
        "repo": pushed.repo,
        "uri": pushed.uri,
        "revision": pushed.revision,
        "url": pushed.url,
        "sha256": pushed.sha256,
        "bytes": pushed.nbytes,
        "license": pushed.license,
        "private": pushed.private,
        "created": pushed.created,
        "changed": pushed.changed,
        "files": list(pushed.files),
        "replaced": list(pushed.replaced),
        "pull_request": pushed.pull_request,
        "pushed": not dry_run,
        "entry": _row(pushed.entry) if pushed.entry else None,
    }
    if out.human:
        facts["entry"] = pushed.entry.name if pushed.entry else None
    out.facts(facts, key="uri")
    if dry_run:
        out.note("Next: the same command without --dry-run")
    elif pushed.entry:
        if out.human:  # to be copied, so not folded into one line; an Entry's values are printable
            typer.echo(_yaml(pushed.entry), err=True)
        out.note(f"Next: learngene pull {pushed.uri}")


def _row(entry: Entry) -> dict[str, Any]:
    from learngene_hub.registry import KEYS

    return {key: getattr(entry, key) for key in KEYS}


def _yaml(entry: Entry) -> str:
    """The entry as a registry.yaml has it."""
    from learngene_hub._registry_file import with_entry
    from learngene_hub.registry import FILE_NAME

    return with_entry(Path(FILE_NAME), "", entry).rstrip()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.SettingsError(f"--results {path} asked; {error.strerror}") from error
    except ValueError as error:
        raise errors.SettingsError(f"--results {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.SettingsError(f"--results {path} holds a {type(found).__name__}; an object would work")
    return found


def pull(
    out: Output,
    name: NameArgument,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a repository; main where left out.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Copy file and card into this folder.")
    ] = None,
    dry_run: DryOption = False,
    yes: YesOption = False,
) -> None:
    """Fetch a learngene, and check it.

    It stays in the cache of the Hub's client, from where it loads without network. --to writes a copy of your own.

    \b
    learngene pull lsamd-base --to lsamd-base
    learngene pull org/name --dry-run
    learngene pull org/name --revision v1.0 --json
    """
    from learngene_hub import hub

    if dry_run:
        uri, peek = hub.preview(name, revision=revision)
        seen = {"uri": uri, "revision": peek.revision or None, "bytes": peek.nbytes, "cached": peek.cached}
        out.facts({"name": name, **seen, "path": str(folder) if folder else None, "pulled": False}, key="uri")
        out.note("Next: the same command without --dry-run")
        return
    if folder:
        require_new(out, folder, yes=yes)
    learngene, located = hub.fetch(name, revision=revision)
    path = _copy(out, located, learngene.digest, folder) if folder else located.path
    facts = {
        "name": name,
        "path": str(path),
        "uri": located.uri,
        "revision": located.revision,
        "sha256": learngene.digest,
        "promised": located.sha256 is not None,  # that sha256, by the registry or the server
        "bytes": located.path.stat().st_size,
        "method": learngene.method,
        "license": learngene.license,
        "pulled": True,
    }
    out.facts(facts, key="path")
    out.note(f"Next: learngene show {path if folder or not located.uri else located.uri}")


def _copy(out: Output, located: Located, sha256: str, folder: Path) -> Path:
    """The file written into ``folder``; the card too, where there is one."""
    from learngene_hub.hub import FolderStore
    from learngene_hub.learngene import FILE_NAME, Learngene

    files: dict[str, Path | bytes] = {}
    try:
        files[CARD] = _card_path(located)
    except errors.StoreError as error:
        out.note(f"no card copied: {error}")
    files[FILE_NAME] = located.path  # last: who finds it finds the card
    folder = Path(os.path.abspath(folder))
    FolderStore(root=folder.parent).write(files, folder.name)
    Learngene.load(folder / FILE_NAME, sha256=sha256)  # what was written is what was checked
    return folder / FILE_NAME


def _card_path(located: Located) -> Path:
    """The card that belongs to a learngene's file.

    Raises:
        StoreError: there is none.
    """
    from learngene_hub.hub import HubStore

    if located.revision:
        return HubStore(file_name=CARD).read(located.uri)
    if not (located.path.parent / CARD).is_file():
        raise errors.StoreError(f"no {CARD} beside {located.path}; the learngene itself is whole")
    return located.path.parent / CARD

"""The commands of ``learngene registry``: rows of a registry.yaml are added, removed and checked."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from learngene_hub import errors
from learngene_hub._command import verb
from learngene_hub._output import Output

if TYPE_CHECKING:
    from learngene_hub.hub import Fetched, Located
    from learngene_hub.registry import Entry, Registry

CARD = "README.md"

RegistryOption = Annotated[
    Path | None, typer.Option("--registry", metavar="FILE", help="The registry.yaml; LEARNGENE_REGISTRY if left out.")
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen; nothing is written.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]

app = typer.Typer(
    name="registry",
    help="Edit and check a registry.yaml of your own.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def add(
    out: Output,
    source: Annotated[str, typer.Argument(metavar="NAME", help="A path, ORG/REPO[@REVISION], or a registry name.")],
    name: Annotated[str | None, typer.Option("--name", help="Of the row; that of the folder or repository.")] = None,
    description: Annotated[str, typer.Option("--description", help="One line; made from the file if left out.")] = "",
    registry: RegistryOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the row of this name.")] = False,
    dry_run: DryOption = False,
    yes: YesOption = False,
) -> None:
    """Check a learngene and add a row for it to your registry.

    The row pins its sha256, and a Hub repository to the commit that it is at. A path has to lie below the folder of
    the registry. The card, README.md, is made where a file on this machine has none. Comments and the order of the
    other rows stay, and another process may add at the same time.

    \b
    learngene registry add my-learngene --registry registry.yaml
    learngene registry add org/name@v1.0 --name name-v1 --dry-run
    learngene registry add org/name --replace --yes
    """
    from learngene_hub._registry_file import add_entry, current_text, with_entry
    from learngene_hub.hub import fetch, pool_at

    path = _editable(registry)
    fetched = fetch(source)
    entry, card = _entry(path, fetched, name, description)
    text = current_text(path)
    new = with_entry(path, text, entry, replace=replace)
    there = replace and _has(path, entry.name)
    if there and new != text and not dry_run and not yes and out.interactive:
        typer.confirm(f"{path} has an entry {entry.name!r}. Replace it?", abort=True, err=True)
    if not dry_run:
        if card is not None and not card.exists():
            _write_card(out, card, fetched, entry)
        add_entry(path, entry, replace=replace)
    out.facts(_row(entry) | {"registry": str(path), "written": not dry_run, "replaced": there}, key="name")
    if pool_at(fetched.located.path):
        out.note(f"{source} is a pool: the row pins its anchor; `learngene verify {entry.name}` looks at all of it")
    out.note(_next(path, entry.name) if not dry_run else "Next: the same command without --dry-run")


def _editable(asked: Path | None) -> Path:
    """The registry file to edit: never the built-in one, unless it is named.

    Raises:
        StoreError: none is known.
    """
    from learngene_hub.registry import ENVIRONMENT, own_path

    own = asked or own_path()
    if own is None:
        raise errors.StoreError(f"no registry to edit; --registry FILE names one, or {ENVIRONMENT} its path for good")
    return Path(os.path.expanduser(own))


def _has(path: Path, name: str) -> bool:
    from learngene_hub.registry import Registry

    return path.exists() and name in Registry.load(path).entries


def _entry(path: Path, fetched: Fetched, name: str | None, description: str) -> tuple[Entry, Path | None]:
    """The row for a learngene in the registry ``path``, and the path of its card where that is on this machine.

    Raises:
        SettingsError: it has no licence.
        RegistryError: a value that no row may have.
        StoreError: it is outside of the registry's folder, or its repository has no card.
    """
    from learngene_hub.registry import Entry

    learngene, located = fetched
    if not learngene.license.strip():
        raise errors.SettingsError(
            f"{located.path} states no licence, and a registry needs one; extract it again with --ancestor-license, "
            "or `learngene push --license` makes a copy that states it"
        )
    card_path = None
    if located.revision is None:
        uri, card_path = _places(path, located.path)
        card = _below(path, card_path)
    else:
        uri, card = located.uri, _remote_card(located)
    known = located.entry
    made = f"{learngene.method} learngene of {learngene.ancestor['name']}: {learngene.reach}."
    entry = Entry(
        name=name or (known.name if known else _name_of(located)),
        method=learngene.method,
        uri=uri,
        sha256=learngene.digest,
        bytes=located.path.stat().st_size,
        license=learngene.license,
        card=known.card if known and known.is_remote else card,
        description=description or (known.description if known else made),
        root=path.parent,
        origin=str(path),
    )
    return entry, card_path


def _name_of(located: Located) -> str:
    """The name that a row gets where none is asked: that of the repository, the folder, or the file."""
    from learngene_hub.hub import parse_repository
    from learngene_hub.learngene import FILE_NAME

    path = Path(os.path.abspath(located.path))
    given = path.parent.name if path.name == FILE_NAME else path.stem
    if located.revision is not None:
        given = parse_repository(located.uri).repo.split("/")[1]
    name = re.sub(r"[^a-z0-9._-]", "-", given.lower()).strip("._-")[:64].rstrip("._-")
    if not name:
        raise errors.SettingsError(f"no row can be named after {given!r}; --name would work")
    return name


def _places(path: Path, file: Path) -> tuple[str, Path]:
    """The uri of a file in the registry ``path``, and where its card is."""
    from learngene_hub.learngene import FILE_NAME

    if file.name != FILE_NAME:
        return _below(path, file), file.with_suffix(".md")
    folder = _below(path, file.parent)
    return folder if folder != "." else file.name, file.with_name(CARD)


def _below(path: Path, file: Path) -> str:
    """The path of a file as a row has it: from the folder of the registry.

    Raises:
        StoreError: it is outside.
    """
    for absolute in (os.path.abspath, os.path.realpath):  # a link may lead out of the folder, or the folder be one
        root = Path(absolute(path.parent))
        there = Path(absolute(file))
        if there.is_relative_to(root) and (path.parent / there.relative_to(root)).exists() == there.exists():
            return there.relative_to(root).as_posix()
    folder = os.path.abspath(path.parent)
    raise errors.StoreError(
        f"{file} is outside of {folder}, the folder of the registry; `learngene pull {file} --to "
        f"{os.path.join(folder, 'NAME')}` copies it there, and a registry above it or a Hub repository would work too"
    )


def _remote_card(located: Located) -> str:
    """The address of a repository's card, once it is known to be there."""
    from learngene_hub.hub import HubStore, parse_repository

    store, asked = HubStore(file_name=CARD), parse_repository(located.uri)
    store.read(located.uri)
    return f"{store.server}/{asked.repo}/blob/{asked.revision}/{CARD}"


def _write_card(out: Output, path: Path, fetched: Fetched, entry: Entry) -> None:
    from learngene_hub.card import card_text
    from learngene_hub.hub import FolderStore

    about = entry.description
    text = card_text(fetched.learngene, name=entry.name, source=entry.name, description=about, nbytes=entry.bytes)
    folder = Path(os.path.abspath(path.parent))
    FolderStore(root=folder.parent).write({path.name: text.encode()}, folder.name)
    out.note(f"Made its card, {path}")


def _row(entry: Entry) -> dict[str, Any]:
    from learngene_hub.registry import KEYS

    return {key: getattr(entry, key) for key in KEYS}


def _next(path: Path, name: str) -> str:
    from learngene_hub.registry import BUILT_IN, ENVIRONMENT, Registry

    own = os.environ.get(ENVIRONMENT)
    if not own or os.path.realpath(os.path.expanduser(own)) != os.path.realpath(path):
        return f"Next: export {ENVIRONMENT}={os.path.abspath(path)}"
    hides = f" ({name} now goes before the {BUILT_IN} one)" if name in Registry.built_in().entries else ""
    return f"Next: learngene show {name}{hides}"


def remove(
    out: Output,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the row.")],
    registry: RegistryOption = None,
    dry_run: DryOption = False,
    yes: YesOption = False,
) -> None:
    """Remove a row from your registry; the learngene's file stays.

    \b
    learngene registry remove my-learngene --yes
    learngene registry remove my-learngene --registry registry.yaml --dry-run
    """
    from learngene_hub._registry_file import remove_entry, without_entry
    from learngene_hub.registry import read_text

    path = _editable(registry)
    _, entry = without_entry(path, read_text(path), name)
    if not dry_run and not yes:
        if not out.interactive:
            raise errors.SettingsError(f"removing {name} from {path} needs a yes; --yes gives it, --dry-run only looks")
        typer.confirm(f"Remove {name} from {path}?", abort=True, err=True)
    if not dry_run:
        entry = remove_entry(path, name)
    out.facts(_row(entry) | {"registry": str(path), "removed": not dry_run}, key="name")
    kept = "" if entry.is_remote else f"; its files stay in {entry.root / entry.uri}"
    out.note("Next: the same command without --dry-run" if dry_run else f"Next: learngene list{kept}")


def check(
    out: Output,
    registry: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="A registry.yaml, or hf://ORG/REPO; your own, else the built-in one."),
    ] = None,
    fail_on_missing: Annotated[
        bool, typer.Option("--fail-on-missing", help="Exit status 1 also if something could not be reached.")
    ] = False,
) -> None:
    """Check that each row of a registry tells the truth; exit status 1 if one does not.

    That is: the file is there, or on the Hub at that commit, its sha256, bytes, method and licence are those of the
    row, and the card is there. What the Hub's client has in its cache needs no network. What could not be reached is
    not checked: a dash in the table, null in JSON, and exit status 0. `learngene verify` also looks at every number.
    With --quiet only the names that failed are printed.

    \b
    learngene registry check
    learngene registry check registry.yaml --json
    HF_HUB_OFFLINE=1 learngene registry check --fail-on-missing
    """
    entries = _asked(registry).entries.values()
    rows = [_verdict(out, entry) for entry in entries]
    failed = [row for row in rows if row["ok"] is False or (fail_on_missing and row["ok"] is None)]
    out.rows(failed if out.format == "quiet" else rows, key="name", columns=["name", "ok", "bytes", "uri", "path"])
    if failed:
        raise typer.Exit(1)


def _asked(registry: str | None) -> Registry:
    from learngene_hub.hub import HubStore
    from learngene_hub.registry import ENVIRONMENT, FILE_NAME, Registry

    asked = registry or os.environ.get(ENVIRONMENT)
    if not asked:
        return Registry.built_in()
    if asked.startswith("hf:"):
        return Registry.load(HubStore(file_name=FILE_NAME).read(asked), origin=asked)
    return Registry.load(os.path.expanduser(asked))


def _verdict(out: Output, entry: Entry) -> dict[str, Any]:
    """The row of one entry; what is wrong with it goes to stderr, a line each."""
    from learngene_hub._client import is_absent
    from learngene_hub.hub import FolderStore, HubStore, pool_problems

    row: dict[str, Any] = {"name": entry.name, "ok": True, "bytes": None, "uri": entry.uri, "path": None}
    problems: list[str] = []
    try:
        path = HubStore().read(entry.uri) if entry.is_remote else FolderStore(root=entry.root).read(entry.uri)
        row |= {"path": str(path), "bytes": path.stat().st_size}
        problems += _differences(entry, path)
        problems += [f"the pool that it is the anchor of: {problem}" for problem in pool_problems(path)]
        problems += _card_problems(entry)
    except (errors.StoreError, OSError) as error:
        if entry.is_remote and not (isinstance(error, errors.StoreError) and is_absent(error)):
            out.error(f"{entry.name}: not checked: {error} (next: learngene registry check, with a connection)")
            row["ok"] = None
        else:
            problems.append(str(error))
    for problem in problems:
        out.error(f"{entry.name}: {problem} (next: learngene registry add --replace, or remove)")
    return row | {"ok": False if problems else row["ok"], "problems": problems}


def _differences(entry: Entry, path: Path) -> Iterator[str]:
    """What a file has otherwise than its row says."""
    from learngene_hub.learngene import read_facts

    with path.open("rb") as file:
        found: dict[str, Any] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    found["bytes"] = path.stat().st_size
    try:
        facts = read_facts(path)
        found |= {"method": facts.method, "license": facts.license}
    except errors.ArtefactError as error:
        yield str(error)
    for key, there in found.items():
        if there != getattr(entry, key):
            yield f"{path}: {key} is {there!a}, the row has {getattr(entry, key)!a}"


def _card_problems(entry: Entry) -> Iterator[str]:
    """What is wrong with a row's card. The address of a strange server is not asked."""
    from learngene_hub.hub import HubStore, parse_repository
    from learngene_hub.registry import is_inside

    if entry.card.startswith(("https://", "http://", "hf://")):
        if entry.is_remote and f"/{parse_repository(entry.uri).repo}" in entry.card:
            HubStore(file_name=CARD).read(entry.uri)
    elif not is_inside(entry.card) or not (entry.root / entry.card).is_file():
        yield f"no card {entry.card!a} below {entry.root}"


def _grouped(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` under its name in full, which the hint after an error repeats."""

    @functools.wraps(run)
    def command(*args: Any, **given: Any) -> None:
        run(*args, **given)

    command.__name__ = f"registry {run.__name__}"
    return command


app.command("add")(verb(_grouped(add)))
app.command("remove")(verb(_grouped(remove)))
app.command("check")(verb(_grouped(check)))

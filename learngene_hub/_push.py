"""Push: a learngene, or a descendant, with a card made from it, to a repository of the Hub, in one commit.

Nothing is sent without a licence, which is never guessed. What else is promised stands in ``_send``.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learngene_hub._card_facts import HUB_LICENSES
from learngene_hub._client import Repository, is_repository, parse_repository
from learngene_hub._send import Order, Pushed, send
from learngene_hub._store import Files, HubStore, digests
from learngene_hub.errors import ArtefactError, RegistryError, SettingsError, StoreError
from learngene_hub.learngene import FILE_NAME, Learngene
from learngene_hub.registry import Entry

if TYPE_CHECKING:
    from learngene_hub.descendant import Descendant

CARD = "README.md"
_NO_LICENSE = ("none", "noassertion", "unknown", "null")


def push(
    learngene: Learngene,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    message: str | None = None,
    description: str = "",
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    results: Mapping[str, Any] | None = None,
) -> Pushed:
    """Puts a learngene and its card into a repository, which is made where it is missing.

    Args:
        repo: ``org/name``.
        private: make it private, and make sure that it is.
        create_pr: open a pull request instead of changing the branch.
        branch: main where left out; made where it is missing.
        message: of the commit.
        description: one line for the card and the registry.
        license: SPDX identifier, for an artefact that names none: it becomes part of the file, so the digest follows.
        token: the client's own login where left out.
        dry_run: only ask the server what is there.
        overwrite: replace a learngene, or a card, that is there and differs.
        results: for the card; what ``benchmarks/transfer.py --summarise`` writes.

    Raises:
        SettingsError: no licence or two different ones, or arguments that contradict each other.
        ArtefactError: a learngene that could not be loaded again.
        StoreError: not allowed, not reachable, public although private was asked, or something else is there.
    """
    message = message or f"Push a learngene of {learngene.method}"
    order = _order(repo, branch, private, create_pr, message, overwrite, dry_run)
    licensed = _licensed(learngene, license)
    about = description or f"{licensed.method} learngene of {licensed.ancestor['name']}: {licensed.reach}."
    from learngene_hub.card import card_text  # here: it imports torch

    with tempfile.TemporaryDirectory(prefix="learngene-push-") as folder:
        path = licensed.save_pretrained(folder)
        licensed = Learngene.load(path, sha256=licensed.digest)  # what is sent is what was read back
        name, nbytes = order.target.repo.split("/")[1], path.stat().st_size
        source = order.target.repo
        card = card_text(licensed, name=name, source=source, description=about, nbytes=nbytes, results=results)
        files: Files = {FILE_NAME: path, CARD: card.encode()}
        pushed = send(files, order, HubStore(token=token), sha256=licensed.digest, license=licensed.license)
    return replace(pushed, entry=_entry(pushed, licensed, about)) if pushed.revision else pushed


def push_descendant(
    descendant: Descendant | str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    message: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = True,
) -> Pushed:
    """Puts a descendant, or a folder that one was saved to, with a card into a repository, which is made where missing.

    Plain transformers and plain timm load it from there. An earlier model of the repository is replaced, as the
    client's other models are; its history keeps it.

    Args:
        license: SPDX identifier; that of the learngene it was grown from where left out. Others as for ``push``.
        overwrite: replace another model that is there; the history of the repository keeps it.

    Raises:
        SettingsError: no licence, or arguments that contradict each other.
        ArtefactError: weights that are not finite.
        StoreError: as ``push``; or the repository holds a learngene.
    """
    order = _order(repo, branch, private, create_pr, message or "Push a descendant", overwrite, dry_run)
    from learngene_hub.card import descendant_card
    from learngene_hub.descendant import Descendant

    model = descendant if isinstance(descendant, Descendant) else Descendant.from_pretrained(os.fspath(descendant))
    if bad := [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]:
        raise ArtefactError(f"{bad[0]} has values that are NaN or infinite; train it again with a lower rate")
    with tempfile.TemporaryDirectory(prefix="learngene-push-") as folder:
        model.save_pretrained(folder)
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        facts = json.loads(config.read_text())
        grown = facts.get("learngene") or {}
        named = _license(license or grown.get("license") or "", "the descendant")
        params = sum(parameter.numel() for parameter in model.parameters())
        ancestor = (grown.get("ancestor") or {}).get("source")
        card = descendant_card(facts, repo=order.target.repo, license=named, params=params, ancestor=ancestor)
        files: Files = {"config.json": config.read_bytes(), "model.safetensors": weights, CARD: card.encode()}
        return send(files, order, HubStore(token=token), sha256=digests(weights)[0], license=named)


def _order(
    repo: str, branch: str | None, private: bool, create_pr: bool, message: str, overwrite: bool, dry_run: bool
) -> Order:
    if not is_repository(repo):
        raise StoreError(f"{repo!r} is not a Hub repository to push to; org/name would work")
    target = parse_repository(repo)
    if target.revision:
        raise SettingsError(f"revision {target.revision!r} asked of a push; branch={target.revision!r} would work")
    if branch and (not re.fullmatch(r"\w[\w./-]{0,254}", branch, re.ASCII) or branch.startswith("refs/")):
        raise SettingsError(f"branch {branch!r} asked; letters, digits, '.', '_', '/' and '-' would work")
    if branch and re.fullmatch(r"[0-9a-f]{40}", branch):
        raise SettingsError(f"branch {branch} asked, which is a commit; the name of a branch would work")
    if branch and branch != "main" and create_pr:
        raise SettingsError(f"a pull request and the branch {branch!r} asked; give one of them")
    return Order(
        target=Repository(target.repo, branch), private=private, create_pr=create_pr, message=message,
        overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip


def _licensed(learngene: Learngene, license: str | None) -> Learngene:
    """The learngene under a licence: its own, or the asked one where it has none."""
    own, asked = learngene.license.strip(), (license or "").strip()
    if own and asked and own.lower() != asked.lower():
        raise SettingsError(f"license {asked!r} asked; the artefact says {own!r}: leave it out, or extract it again")
    theirs = learngene.ancestor["license"]
    name = _license(own or asked, f"the learngene (its ancestor's is {theirs})" if theirs else "the learngene")
    return learngene if name == learngene.license else replace(learngene, license=name)


def _license(name: str, of: str) -> str:
    """The name of a licence, once it is known to be one."""
    if not name or name.lower() in _NO_LICENSE:
        raise SettingsError(f"no licence for {of}; license='Apache-2.0' (--license), or what holds, would work")
    if name.lower() != "other" and not _is_known(name):
        near = difflib.get_close_matches(name.lower(), HUB_LICENSES, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise SettingsError(
            f"license {ascii(name):.80} asked, which neither SPDX nor the Hub knows{hint} an identifier such as "
            "Apache-2.0, LicenseRef-NAME for terms of your own, or 'other' would work"
        )
    return name


def _is_known(name: str) -> bool:
    """Whether it is a licence of the Hub's list, or an expression of SPDX identifiers and references."""
    if name.lower() in HUB_LICENSES:
        return True
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression  # here: only for a push

    try:
        return name.isprintable() and bool(canonicalize_license_expression(name))
    except InvalidLicenseExpression:
        return False


def _entry(pushed: Pushed, learngene: Learngene, description: str) -> Entry | None:
    """The row for a registry; None for names that no registry takes."""
    name = re.sub(r"[^a-z0-9._-]", "-", pushed.repo.split("/")[1].lower()).strip("._-")[:64]
    try:
        return Entry(
            name=name, method=learngene.method, uri=pushed.uri, sha256=pushed.sha256, bytes=pushed.nbytes,
            license=pushed.license, card=f"{pushed.url.replace('/tree/', '/blob/')}/{CARD}",
            description=" ".join(description.split()),
        )  # fmt: skip
    except RegistryError:
        return None

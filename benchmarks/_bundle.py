"""Put a learngene among the bundled ones: model_cards/NAME, its row of registry.yaml, its card."""

from __future__ import annotations

from pathlib import Path

import yaml

from learngene_hub.card import card_text
from learngene_hub.learngene import Learngene
from learngene_hub.registry import Registry

ROOT = Path(__file__).resolve().parent.parent


def bundle(learngene: Learngene, name: str, description: str) -> None:
    """Write the artefact, the only row of this name, and the card (without results: ``make numbers`` adds them)."""
    folder = ROOT / "model_cards" / name
    file = learngene.save_pretrained(folder)
    path = ROOT / "registry.yaml"
    rows = yaml.safe_load(path.read_text()) or [] if path.exists() else []
    row = {
        "name": name,
        "method": learngene.method,
        "uri": f"model_cards/{name}",
        "sha256": learngene.digest,
        "bytes": file.stat().st_size,
        "license": learngene.license,
        "card": f"model_cards/{name}/README.md",
        "description": description,
    }
    places = [i for i, other in enumerate(rows) if other["name"] == name]
    kept = [other for other in rows if other["name"] != name]
    kept.insert(places[0] if places else len(kept), row)
    path.write_text(yaml.safe_dump(kept, sort_keys=False, width=120))
    entry = Registry.load(path).entries[name]
    card = card_text(learngene, name=name, source=name, description=entry.description, nbytes=entry.bytes)
    (folder / "README.md").write_text(card, encoding="utf-8")

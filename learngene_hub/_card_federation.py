"""What the card of a federation's learngene says: what the run measured, and what it was told.

All of it is the fact ``federation`` of the provenance, which ``federated/artefact.py`` writes; anyone else may have
written another there, so every part is left out where it is not of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learngene_hub._card_facts import amount, mapping, numbers, settings_block, table

ROWS = (  # key of the fact, how a number is written, what it is
    ("rounds", ",", "rounds of training and averaging"),
    ("clients", ",", "clients of this cluster"),
    ("clusters", ",", "clusters of the run"),
    ("run_clients", ",", "clients of the run"),
    ("images", ",", "images that the last average is of, as the clients tell"),
    ("accuracy", ".1f", "accuracy of this cluster's clients after training in the last round, per cent"),
    ("accuracy_before", ".1f", "the same before that training, per cent"),
)
WAYS = (
    ("up", "bytes from all clients of the run, in rounds"),
    ("down", "bytes to all clients of the run, in rounds"),
    ("start_up", "bytes of the start-up, both ways"),
)


def federation_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The federation that a learngene comes from; empty where it comes from none."""
    return mapping(facts.get("federation"))


def measured_section(federation: Mapping[str, Any]) -> str:
    """A table of what was measured at the end of the run; empty where nothing was."""
    sent = mapping(federation.get("traffic_bytes"))
    told = [(what, amount(federation.get(key), form)) for key, form, what in ROWS]
    told += [(what, amount(sent.get(way))) for way, what in WAYS]
    rows = [[what, number] for what, number in told if number is not None]
    if not rows:
        return ""
    how = (
        "Accuracy is the mean over clients, each on images that it held out of its own. A client's network also has "
        "private parts, which are not in this file: what grows from it begins lower. Bytes are those of the records as "
        "Flower counts them."
    )
    return f"{table(['at the end of the federated run', ''], rows)}\n\n{how}"


def made_lines(federation: Mapping[str, Any]) -> list[str]:
    """What is told beside method and ancestor: the layers and the cluster."""
    lines = []
    if layers := numbers(federation.get("layers")):
        lines.append(f"- **Layers in the file, counted from 0:** {', '.join(f'{layer:g}' for layer in layers)}.")
    if (cluster := amount(federation.get("cluster"))) is not None:
        lines.append(f"- **Cluster:** number {cluster} of the run, counted from 0.")
    return lines


def settings_section(federation: Mapping[str, Any]) -> str:
    """The settings of the run, folded away; empty without any."""
    settings = mapping(federation.get("settings"))
    if not settings:
        return ""
    block = settings_block(settings)
    return f"<details><summary>All settings of the federated run</summary>\n\n{block}\n\n</details>"


def limit_lines(facts: Mapping[str, Any]) -> list[str]:
    """A warning where a cluster is one client; none elsewhere."""
    if federation_of(facts).get("clients") != 1:
        return []
    return ["- This cluster has 1 client: its layers are that client's own, no average of several."]

"""Small federations for the tests: tiny networks, few images, Flower's own classes, no network and no Ray.

``MemoryGrid`` is a faithful stand-in for Flower's runtime (messages go through Flower's serialisation, errors become
error replies); test_federated_engine.py holds it against the real one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from learngene_hub.federated.client import make_client_app
from learngene_hub.federated.memory import MemoryGrid, as_server
from learngene_hub.federated.server import Outcome, conduct
from learngene_hub.federated.settings import Federation

logging.getLogger("flwr").setLevel(logging.CRITICAL)

TINY: Mapping[str, Any] = {
    "rounds": 2, "depth": 4, "width": 32, "heads": 1, "patch": 16, "limit": 96, "fisher_images": 2, "epochs": 1,
    "min_per_class": 4, "vectors": 1, "blocks": 1, "batch_size": 16, "alpha": 5.0, "classes": 10,
}  # fmt: skip


def tiny(**changes: Any) -> Federation:
    """Four blocks of 32, signdigits at 32 px in 4 patches."""
    return Federation(**{**TINY, **changes})


def grid_of(settings: Federation, clients: int, **more: Any) -> MemoryGrid:
    """Clients of this process that divide the data, everything that passes kept."""
    as_server()
    torch.set_num_threads(1)
    return MemoryGrid.of(make_client_app(settings), clients, record=True, **more)


def run(clients: int = 3, **changes: Any) -> tuple[Outcome, MemoryGrid]:
    """A whole run, and the grid it went through."""
    settings = tiny(**changes)
    grid = grid_of(settings, clients)
    return conduct(grid, settings), grid


def names_on_the_wire(grid: MemoryGrid, ways: Sequence[str] = ("received", "answered")) -> set[str]:
    """The names of all arrays that went either way."""
    return {
        name
        for node in grid.nodes.values()
        for way in ways
        for content in getattr(node, way)
        for record in content.array_records.values()
        for name in record
    }

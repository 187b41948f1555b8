"""What one client has: its images, its network, and the private part that it keeps between rounds.

Private are all tensors but those of the layers that the server chose; they are in Flower's ``context.state``, which
never leaves the client, and with ``client_state`` in a file of the client's own, to outlive a run.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from torch import Tensor

from learngene_hub.data import Images, load_column, load_images, seed_of
from learngene_hub.errors import DataError, StoreError
from learngene_hub.federated.models import client_shape, native_shape
from learngene_hub.federated.partition import partition
from learngene_hub.federated.settings import Federation

AFTER, BEFORE = "private", "private-before"  # records of context.state: the network after a round, and before it
CLIENT_FILE = "client-{}.npz"  # in `client_state`, by the client's number
XI = {AFTER: "xi", BEFORE: "xi-before"}


@lru_cache(maxsize=2)
def whole_data(data: str, split: str, size: int, limit: int, seed: int) -> Images:
    """The data set that clients divide, or that one client has for itself; one copy per process."""
    return load_images(data, split=split, size=size, limit=limit or None, seed=seed)


@lru_cache(maxsize=4)
def _shares(
    data: str,
    split: str,
    size: int,
    limit: int,
    seed: int,
    kind: str,
    clients: int,
    alpha: float,
    labels: int,
    domain: str,
) -> tuple[Tensor, ...]:
    images = whole_data(data, split, size, limit, seed)
    domains = None
    if kind == "domain":
        domains = load_column(data, domain, split=split, limit=limit or None, seed=seed)
    return tuple(
        partition(kind, images.labels, clients, seed=seed, alpha=alpha, labels_per_client=labels, domains=domains)
    )


def share_of(settings: Federation, client: int, clients: int) -> Images:
    """The images of one of ``clients`` that divide the data set of the settings.

    Raises:
        DataError: as ``load_images`` and ``partition``, or there is no such client.
    """
    if not 0 <= client < clients:
        raise DataError(f"partition-id {client} asked; there are {clients} partitions, from 0")
    s = settings
    shares = _shares(
        s.data, s.split, s.image_size, s.limit, s.seed, s.partition, clients, s.alpha, s.labels_per_client,
        s.domain_column,
    )  # fmt: skip
    return whole_data(s.data, s.split, s.image_size, s.limit, s.seed).subset(shares[client])


@dataclass(frozen=True, kw_only=True)
class Site:
    """One client of a run."""

    settings: Federation
    client: int  # partition-id
    train: Images
    test: Images
    native: Any  # the shape that learngenes are native to
    shape: Any  # of the client's own network

    @classmethod
    def of(cls, settings: Federation, node: Mapping[str, Any]) -> Site:
        """The client that a node with this node_config is: ``partition-id`` of ``num-partitions``, or ``data``, its own
        images.

        Raises:
            DataError: no images there, or too few, or more classes than the run has.
            SettingsError: ``held_out`` leaves none to train on.
        """
        client = int(node.get("partition-id", 0))
        if "data" in node:
            images = whole_data(str(node["data"]), settings.split, settings.image_size, settings.limit, settings.seed)
        else:
            images = share_of(settings, client, int(node.get("num-partitions", 1)))
        draw = torch.Generator().manual_seed(seed_of("held out", settings.seed, client))
        train, test = images.split(settings.held_out, draw)
        classes = settings.classes or len(images.classes)
        if (there := len(images.classes)) > classes:
            raise DataError(
                f"classes {classes} asked; {images.name} has {there}: classes={there}, or 0 where the server has the "
                "data too, would work"
            )
        native = native_shape(settings, classes)
        shape = client_shape(settings, native, client)
        return cls(settings=settings, client=client, train=train, test=test, native=native, shape=shape)

    def kept(self, context: Context, round: int) -> tuple[dict[str, Tensor] | None, list[float] | None]:
        """(state dict, xi) that this client had before ``round``; None where it takes part for the first time.

        A round that is repeated (the server was killed before it was saved) begins where it began the first time.
        """
        self._read(context)
        state = context.state
        if AFTER not in state:
            return None, None
        done = int(state.config_records["round"]["round"])  # type: ignore[arg-type]
        name = AFTER if round > done else BEFORE
        found = state.array_records.get(name)
        if found is None or not len(found):
            return None, None
        return dict(found.to_torch_state_dict()), list(state.metric_records[XI[name]]["xi"])  # type: ignore[arg-type]

    def keep(self, context: Context, round: int, model_state: Mapping[str, Tensor], xi: list[float]) -> None:
        """Keep the client's network as it is after ``round``, and as it was before it."""
        state = context.state
        done = int(state.config_records["round"]["round"]) if "round" in state else 0  # type: ignore[arg-type]
        if round > done:
            state[BEFORE] = state.array_records.get(AFTER, ArrayRecord())
            state[XI[BEFORE]] = state.metric_records.get(XI[AFTER], MetricRecord({"xi": [0.0]}))
        state[AFTER] = ArrayRecord({name: tensor.detach().clone() for name, tensor in model_state.items()})
        state[XI[AFTER]] = MetricRecord({"xi": xi})
        state["round"] = ConfigRecord({"round": round})
        self._write(context)

    def require_place(self) -> None:
        """Nothing, where the private part can be kept as the settings ask.

        Raises:
            StoreError: ``client_state`` cannot be written.
        """
        if self.settings.client_state:
            require_writable(Path(self.settings.client_state), "client_state")

    def _path(self) -> Path | None:
        folder = self.settings.client_state
        return Path(folder) / CLIENT_FILE.format(self.client) if folder else None

    def _write(self, context: Context) -> None:
        path, state = self._path(), context.state
        if path is None:
            return
        arrays = {
            f"{record}/{name}": array.numpy()
            for record in (AFTER, BEFORE)
            for name, array in state.array_records[record].items()
        }
        arrays |= {XI[record]: np.asarray(state.metric_records[XI[record]]["xi"]) for record in (AFTER, BEFORE)}
        arrays["round"] = np.asarray(state.config_records["round"]["round"])
        write_arrays(path, arrays)

    def _read(self, context: Context) -> None:
        path, state = self._path(), context.state
        if path is None or AFTER in state or not path.exists():
            return
        arrays = read_arrays(path)
        for record in (AFTER, BEFORE):
            own = {n.split("/", 1)[1]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith(f"{record}/")}
            state[record] = ArrayRecord(own) if own else ArrayRecord()
            state[XI[record]] = MetricRecord({"xi": [float(x) for x in arrays[XI[record]]]})
        state["round"] = ConfigRecord({"round": int(arrays["round"])})


def require_writable(folder: Path, setting: str) -> None:
    """Makes the folder, where it is missing, and sure that files can be written into it, by one that is gone at once.

    Raises:
        StoreError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise StoreError(
            f"{setting} {folder} asked; it cannot be written ({error.strerror}): a folder of your own would work"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file, whole or not at all: a temporary name in the same folder, flushed, renamed.

    Raises:
        StoreError: it cannot be written.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; another folder would work") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing that is pickled is ever read.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read ({' '.join(str(error).split())[:120]}); remove it to begin anew"
        ) from error
    except Exception as error:  # zipfile.BadZipFile and what else a damaged archive raises
        raise StoreError(f"{path} is damaged ({type(error).__name__}); remove it to begin anew") from error

"""The state of an interrupted run on disk: whole or not at all, read without running code, and refused to another run.

Private to `training.py`, whose names `StateDir`, `Stateful`, `images_digest` and `state_digest` are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from learngene_hub.data import Images
from learngene_hub.errors import OtherRunError, StoreError

STATE_FILE = "training.pt"
SAVE_SECONDS = 60.0  # between two writes of a timed state
SAVING_SHARE = 0.01  # of the time that writing a timed state may take
SHOWN = 3  # differences that a refusal names


class Stateful(Protocol):
    """What a run holds outside of its model and optimiser. The values are tensors, numbers, text, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class StateDir:
    """Where a run keeps its state, what the run is, and when it writes.

    ``identity`` is what a continued run must have in common with the one that wrote the state, beside the recipe: of
    plain values (numbers, text, lists), each under a name that a person understands, for the line that refuses another
    run.
    """

    path: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False  # written about once a minute, and less often where writing is slow; else at each epoch's end

    @classmethod
    def of(cls, place: str | Path | StateDir | None) -> StateDir | None:
        """A folder as a StateDir."""
        return place if isinstance(place, StateDir) or place is None else cls(Path(place))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives (tensors, numbers, text, lists, dicts): made in the first run, read in a continued one.

        Raises:
            StoreError: it cannot be read or written.
            OtherRunError: it is of another run.
        """
        path = self.path / f"{name}.pt"
        if path.exists():
            state = read_state(path, ("facts", "value"))
            require_same(path, state["facts"], self.identity)
            return state["value"]
        value = make()
        write_state(path, {"facts": dict(self.identity), "value": value}, what=name)
        return value


def wait_seconds(cost: float) -> float:
    """Seconds from one write of a timed state to the next, after a write that took ``cost`` seconds."""
    return max(SAVE_SECONDS, cost / SAVING_SHARE) if SAVE_SECONDS else 0.0


def write_state(path: Path, state: Mapping[str, Any], *, what: str) -> None:
    """Writes under a temporary name, then renames: the file is the old state or the new one.

    Raises:
        StoreError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise StoreError(
            f"cannot write the state of {what} to {path}: {error}; the previous state is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The state in a file, which has at least these keys; tensors are on the CPU.

    What a killed process left half-written beside it is removed.

    Raises:
        StoreError: the file cannot be read, or is no state.
    """
    try:
        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink(missing_ok=True)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in keys} | state | {"facts": dict(state["facts"])}
    except Exception as error:  # unpickling raises nearly anything on damaged bytes
        raise StoreError(f"{path} is not a readable training state; remove it to start afresh") from error


def require_same(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Nothing, where the state in a file is of the run that is asked.

    Raises:
        OtherRunError: it is of another one.
    """
    names = [*asked, *(name for name in there if name not in asked)]
    wrong = [
        f"{name} {there.get(name)!r} there, {asked.get(name)!r} asked"
        for name in names
        if there.get(name) != asked.get(name)
    ]
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        told = "; ".join([*wrong[:SHOWN], *more])
        raise OtherRunError(
            f"{path} holds a run with other settings: {told}; use another folder, or the settings that are there"
        )


def images_digest(images: Images, chunk: int = 4096) -> str:
    """The sha256 of a data set: shape, names of the classes, labels and pixels."""
    digest = hashlib.sha256(repr((tuple(images.pixels.shape), images.classes)).encode())
    digest.update(images.labels.cpu().contiguous().numpy().tobytes())
    for part in images.pixels.split(chunk):
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """The sha256 of a model's parameters, in the order of their names: name, shape and float32 bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""How well a selection from few images finds where they come from.

The tasks are drawn from images that growing did not see, so that the truth is known:

``one``        images of one corpus: is its entry the first?
``two``        as many images of each of two corpora: are both entries in the selection, and how much of it is theirs?
``noise``      pixels drawn uniformly: nothing should be selected
``other``      images of data sets that are like no corpus

Labels are not looked at: they change amounts, not which entries are on the shortlist. A trial may not abstain, so that
its shortlist is known; it would have, where its residual is above the threshold.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from _arms import machine
from _continual_arms import SURE
from _continual_data import Sources, corpus, drawn, images_of, noise
from _continual_growth import pool_of
from torch import Tensor

PAIR = "+"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A task that is drawn."""

    kind: str
    what: str  # a corpus, two with "+" between them, a data set, or "uniform"
    count: int  # images
    draw: int  # its number, and its seed


@dataclass(frozen=True, kw_only=True)
class Tried(Trial):
    """What was selected for it; a line of the CSV."""

    top: str  # the entry of the largest share
    shares: str  # JSON: entry -> share
    residual: float
    threshold: float
    seconds: float
    pool: str  # digest of the manifest
    machine: str

    @property
    def job(self) -> Trial:
        """The task."""
        return Trial(kind=self.kind, what=self.what, count=self.count, draw=self.draw)

    @property
    def abstained(self) -> bool:
        """Whether nothing would have been selected."""
        return self.residual > self.threshold

    @property
    def hit(self) -> bool:
        """Whether the first entry is a true source; of noise and of other data there is none."""
        return self.top in self.what.split(PAIR)

    @property
    def true_share(self) -> float:
        """How much of the selection the true sources have."""
        return sum(share for name, share in json.loads(self.shares).items() if name in self.what.split(PAIR))

    @property
    def complete(self) -> bool:
        """Whether all true sources are in the selection."""
        return set(self.what.split(PAIR)) <= set(json.loads(self.shares))


def trials(config: dict[str, Any]) -> list[Trial]:
    """Every task of the settings."""
    stage, names = config["selection"], list(config["corpora"])
    pairs = [PAIR.join(pair) for pair in combinations(names, 2)]
    kinds = {"one": names, "two": pairs, "noise": ["uniform"], "other": stage["others"]}
    return [
        Trial(kind=kind, what=what, count=count, draw=draw)
        for kind, whats in kinds.items()
        for count in stage["counts"]
        for what in whats
        for draw in range(stage["draws"][kind])
        if not (kind == "two" and count < 2)
    ]


def pixels_of(trial: Trial, sources: Sources) -> Tensor:
    """The images of a task: uint8 (count, 3, S, S)."""
    config = sources.read()
    size, seed = config["image_size"], trial.draw
    if trial.kind == "noise":
        return noise(trial.count, size, seed)
    if trial.kind == "other":
        limit = config["selection"]["limit"]
        return drawn(images_of(sources.data / trial.what, "train", size, limit), trial.count, seed)
    names = trial.what.split(PAIR)
    sizes = [(trial.count + place) // len(names) for place in range(len(names))]
    return torch.cat([drawn(corpus(sources, n, "test"), k, seed) for n, k in zip(names, sizes, strict=True)])


def attempt(trial: Trial, sources: Sources) -> Tried:
    """What the whole pool makes of a task."""
    pool = pool_of(sources, len(sources.read()["corpora"]))
    found = pool.select(pixels_of(trial, sources), unlabelled=True, tolerance=SURE)
    return Tried(
        **asdict(trial),
        top=found.entries[0].name,
        shares=json.dumps({one.name: one.share for one in found.entries}),
        residual=found.residual,
        threshold=found.threshold,
        seconds=found.seconds,
        pool=pool.manifest.digest,
        machine=machine("cpu"),
    )


def told(trial: Trial, row: Tried) -> str:
    """A line on stdout."""
    return f"{trial.kind} {trial.what} {trial.count}: {row.shares}{' abstains' if row.abstained else ''}"

"""One run of a comparison: the job, and the row that it becomes. Private to ``comparison.py``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of a comparison."""

    start: str
    shape: str  # DEPTHxWIDTH; "native" of a start that has one shape
    data: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run gave; a line of the CSV."""

    kind: str  # learngene, method, or the baseline
    depth: int  # of what was trained
    width: int
    classes: int
    images: int  # to train on
    tested: int  # to test on
    epochs: str  # after which it was tested, "0 1 2 3": 0 is before training
    accuracies: str  # after each of them, per cent
    accuracy: float  # after the last
    params: int
    flops: int  # of one image's forward
    images_seen: int  # in training; the head's own look counts as a third
    train_flops: float  # three times the forward's of each image seen
    stored_bytes: int  # of what it was grown from; 0 of a random start
    extraction_images: float  # nan: not known
    extraction_flops: float  # of the training of what it was grown from, backward passes too; nan: not known
    extraction_seconds: float
    seconds: float  # of training alone
    wall_seconds: float  # of growing, training and testing
    digest: str  # sha256 of what it was grown from
    begun: str  # digest of the weights that it began with, before its head was fitted
    same_as: str  # the start whose run this is too: it began with the same weights; "" of a run of its own
    recipe: str  # identity of the recipe, the head and the data's size
    precision: str
    versions: str
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Job)})

    @property
    def key(self) -> tuple[Job, str, str]:
        """What a run is known by: its cell, its recipe, and what it grew from."""
        return self.job, self.recipe, self.digest

    def reached(self) -> dict[int, float]:
        """Epoch -> accuracy after it, per cent."""
        return dict(zip(map(int, self.epochs.split()), map(float, self.accuracies.split()), strict=True))

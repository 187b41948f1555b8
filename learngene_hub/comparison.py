"""compare: any learngenes, methods and baselines at any shapes on any data, with one recipe; one row of a CSV per run.

    plan = Plan.of({"starts": ["lsamd-base", "net2net", "random"], "shapes": ["6x192"], "data": ["signdigits"],
                    "ancestor": "deit_tiny_patch16_224"})
    for done in compare(plan, "compared.csv", workers=2):
        ...
    print(as_text(summarise(read_rows("compared.csv"))))

A run is one start at one shape on one data set with one seed: the descendant is grown (or drawn), gets its head, is
trained and tested. What a start is stands in ``_compare_plan.py``, one run in ``_compare_run.py``, a row in
``_compare_row.py``, and what the rows say in ``_compare_summary.py``.

Runs that are in the file already are not made again, where they were made from the same bytes with the same recipe.
Jobs go seed by seed, so that what is there of an interrupted comparison is balanced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from learngene_hub import _jobs
from learngene_hub._compare_make import make, required
from learngene_hub._compare_plan import BASELINES as BASELINES
from learngene_hub._compare_plan import Plan as Plan
from learngene_hub._compare_plan import Start as Start
from learngene_hub._compare_row import Job as Job
from learngene_hub._compare_row import Row as Row
from learngene_hub._compare_run import key_of, measure, require_data
from learngene_hub._compare_summary import as_text as as_text
from learngene_hub._compare_summary import summarise as summarise
from learngene_hub._jobs import JobT
from learngene_hub.errors import ShapeError, StoreError

POLL = 1.0  # seconds between two looks for what another process makes
PATIENCE = 6 * 3600.0  # seconds for one learngene that another process makes


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a job."""

    job: Job
    count: int  # of those that are done
    of: int  # that were to do
    row: Row | None = None
    error: BaseException | None = None
    out_of_reach: bool = False  # the start has no descendant of that shape; no row is written


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a comparison's file, in its order; none where there is no file.

    Raises:
        StoreError: it is another kind of file.
    """
    return _jobs.read_rows(path, Row)


def process() -> tuple[int, int]:
    """(rank, number of processes) of the launcher, (0, 1) without one."""
    return _jobs.share()[:2]


def compare(plan: Plan, out: str | Path, *, workers: int = 1, devices: tuple[str, ...] = ("cpu",)) -> Iterator[Done]:
    """Run what is missing of ``plan`` in ``out``; yields what became of each job.

    Learngenes that a start is made from are made first, and kept in ``plan.work``. Under `accelerate launch` each
    process runs its share of the jobs.

    Args:
        workers: processes, of one thread each where they compute on a CPU; 1: this process, with its threads.
        devices: jobs are dealt out to them in turn.

    Raises:
        SettingsError, RegistryError, StoreError, DataError: a start, what it is made from, or a split of the data is
            not there; nothing was run. What fails later is a ``Done`` with its error.
    """
    rank, world, local = _jobs.share()
    mine = (devices[local % len(devices)],) if world > 1 else devices
    makings, asked = required(plan), {job.data for job in _missing(plan, out)}
    require_data([data for data in plan.data if data.name in asked])
    alone = workers == 1 and world == 1  # else in new processes, which no launcher's variables bind together
    for _, _, error in _run(makings[rank::world], partial(make, plan=plan, device=mine[0]), workers, alone):
        if error is not None:
            raise error
    _wait_for([making.path(plan) for making in makings])
    share = set(list(plan.jobs())[rank::world])
    todo = [job for job in _missing(plan, out) if job in share]
    dealt = [(job, mine[count % len(mine)]) for count, job in enumerate(todo)]
    work = partial(measure, plan=plan, out=Path(out))
    for count, ((job, _), row, error) in enumerate(_run(dealt, work, workers, alone), start=1):
        if row is not None:
            _jobs.append_row(out, row)
        unreachable = isinstance(error, ShapeError)
        yield Done(job=job, count=count, of=len(todo), row=row, error=error, out_of_reach=unreachable)


def _missing(plan: Plan, out: str | Path) -> list[Job]:
    """The runs of the plan that are not in the file."""
    known = {row.key for row in read_rows(out)}
    return [job for job in plan.jobs() if key_of(plan, job) not in known]


def _run(
    todo: Sequence[JobT], work: Callable[[JobT], Any], workers: int, alone: bool
) -> Iterator[tuple[JobT, Any, BaseException | None]]:
    return _jobs.run_here(todo, work) if alone else _jobs.run_all(todo, work, workers)


def _wait_for(paths: list[Path]) -> None:
    """Waits until other processes of the launcher have made theirs."""
    began = time.monotonic()
    for path in paths:
        while not path.exists():
            if time.monotonic() - began > PATIENCE:
                raise StoreError(f"{path} was not made by another process within {PATIENCE / 3600:.0f} hours")
            time.sleep(POLL)

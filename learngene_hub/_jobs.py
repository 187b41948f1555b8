"""Runs that become the rows of a CSV file: read, append under a lock, run what is missing in processes of one thread.

A row is a frozen dataclass whose fields, int, float or str, are the columns.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from learngene_hub._lock import locked
from learngene_hub.errors import SettingsError, StoreError

RowT = TypeVar("RowT")
JobT = TypeVar("JobT")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WATCHED = 2.0  # seconds between two looks of a worker at whether its parent is there
_READERS: dict[str, Callable[[str], Any]] = {"int": int, "float": lambda text: float(text or "nan"), "str": str}


def read_rows(path: str | Path, row: type[RowT]) -> list[RowT]:
    """The rows of the CSV, in its order; none where there is no file. An empty cell of a float is nan.

    Raises:
        StoreError: the file is no such CSV.
    """
    path = Path(path)
    if not path.exists():
        return []
    columns = {field.name: _READERS[str(field.type)] for field in dataclasses.fields(row)}  # type: ignore[arg-type]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            missing = [name for name in columns if name not in (lines.fieldnames or columns)]
            if missing:
                raise StoreError(f"{path} has no column {missing[0]}: its rows are of another kind; another file works")
            return [row(**{name: read(line[name]) for name, read in columns.items()}) for line in lines]
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise StoreError(f"{path} cannot be read as rows of runs ({error})") from error


def append_row(path: str | Path, row: Any) -> None:
    """Add one row (and the header to a new file) in a single write, under a lock."""
    path = Path(path)
    names = [field.name for field in dataclasses.fields(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path), path.open("ab") as file:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(names)
        writer.writerow([getattr(row, name) for name in names])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def share() -> tuple[int, int, int]:
    """(rank, processes, rank on this machine) of `accelerate launch` or `torchrun`; (0, 1, 0) without a launcher."""
    return tuple(int(os.environ.get(name, other)) for name, other in zip(LAUNCHER, "010", strict=False))  # type: ignore[return-value]


def run_here(todo: Sequence[JobT], work: Callable[[JobT], Any]) -> Iterator[tuple[JobT, Any, BaseException | None]]:
    """As ``run_all``, one after the other in this process, with all its threads."""
    for job in todo:
        try:
            yield job, work(job), None
        except Exception as error:
            yield job, None, error


def run_all(
    todo: Sequence[JobT], work: Callable[[JobT], Any], workers: int
) -> Iterator[tuple[JobT, Any, BaseException | None]]:
    """(job, result, error) of every job as it is done, in ``workers`` processes of one thread each.

    The processes are new ones, without the variables of a launcher, so each job trains by itself; they end when their
    parent does, however that ends.

    Raises:
        SettingsError: less than one worker is asked.
    """
    if workers < 1:
        raise SettingsError(f"{workers} workers asked; 1 is the least that works")
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        futures = {pool.submit(work, job): job for job in todo}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], None if error else future.result(), error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in (pool._processes or {}).values():  # what runs is lost either way; do not wait for it
                process.terminate()
            raise


def _begin(parent: int) -> None:
    """What a worker does first."""
    import torch

    for name in LAUNCHER:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    threading.Thread(target=partial(_end_with, parent), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when it has lost its parent."""
    while os.getppid() == parent:
        time.sleep(WATCHED)
    os._exit(1)

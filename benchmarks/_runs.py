"""Runs that become the rows of a CSV file: read, append under a lock, run what is missing in processes of one thread.

A row is a frozen dataclass whose fields are the columns; ``label`` says in words which run it was.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from learngene_hub._fit import has_bf16

RowT = TypeVar("RowT")
_READERS = {"int": int, "float": float, "str": str}


def read_rows(path: Path, row: type[RowT]) -> list[RowT]:
    """The rows of the CSV, in its order; none where there is no file. An empty cell of a float is nan."""
    if not path.exists():
        return []
    columns = {field.name: _READERS[str(field.type)] for field in dataclasses.fields(row)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [row(**{name: kind(line[name] or "nan") if kind is float else kind(line[name])
                       for name, kind in columns.items()}) for line in csv.DictReader(file)]  # fmt: skip


def append_row(path: Path, row: Any) -> None:
    """Add one row (and the header to a new file) in a single write, under a lock."""
    names = [field.name for field in dataclasses.fields(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if os.fstat(file.fileno()).st_size == 0:
            writer.writerow(names)
        writer.writerow([getattr(row, name) for name in names])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def run(
    todo: Sequence[Any], work: Callable[[Any], Any], told: Callable[[Any, Any], str], workers: int, out: Path | None
) -> int:
    """``work`` of every job in ``workers`` processes of one thread each; returns how many failed.

    What it gives is a row of ``out`` (None: it is no row), and ``told(job, result)`` a line on stdout.
    """
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, job): job for job in todo}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                job = futures[future]
                if (error := future.exception()) is not None:
                    failed += 1
                    print(f"{count}/{len(todo)} {job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                if out is not None:
                    append_row(out, future.result())
                print(f"{count}/{len(todo)} {told(job, future.result())}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def precision_here(asked: str) -> str:
    """fp32 in place of bf16 on a CPU without instructions for it, where bf16 takes tens of times as long."""
    return "fp32" if asked == "bf16" and not has_bf16() else asked

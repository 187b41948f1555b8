"""Runs that become the rows of a CSV file, and lines on stdout: ``learngene_hub/_jobs.py`` does the work.

A row is a frozen dataclass whose fields are the columns; ``told`` says in words which run it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learngene_hub._fit import has_bf16
from learngene_hub._jobs import append_row as append_row
from learngene_hub._jobs import read_rows as read_rows
from learngene_hub._jobs import run_all


def run(
    todo: Sequence[Any], work: Callable[[Any], Any], told: Callable[[Any, Any], str], workers: int, out: Path | None
) -> int:
    """``work`` of every job in ``workers`` processes of one thread each; returns how many failed.

    What it gives is a row of ``out`` (None: it is no row), and ``told(job, result)`` a line on stdout.
    """
    failed = 0
    for count, (job, result, error) in enumerate(run_all(todo, work, workers), start=1):
        if error is not None:
            failed += 1
            print(f"{count}/{len(todo)} {job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        if out is not None:
            append_row(out, result)
        print(f"{count}/{len(todo)} {told(job, result)}", flush=True)
    return failed


def precision_here(asked: str) -> str:
    """fp32 in place of bf16 on a CPU without instructions for it, where bf16 takes tens of times as long."""
    return "fp32" if asked == "bf16" and not has_bf16() else asked

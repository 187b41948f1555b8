"""How long the command line takes to answer: median of fresh processes, beside the goals and a bare interpreter.

    python benchmarks/startup.py [--runs 10]

Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "startup.json"
TASKS = {  # what -> (arguments of the interpreter, goal in seconds)
    "python -c pass": (["-c", "pass"], None),
    "import learngene_hub": (["-c", "import learngene_hub"], 0.3),
    "learngene --help": (["-m", "learngene_hub.cli", "--help"], 0.5),
    "learngene list": (["-m", "learngene_hub.cli", "list"], 1.0),
    "learngene show lsamd-base": (["-m", "learngene_hub.cli", "show", "lsamd-base"], None),
}


def seconds(arguments: list[str], runs: int) -> list[float]:
    """Wall-clock seconds of each run, after one that fills the caches."""
    found = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    rows = {}
    for name, (arguments, goal) in TASKS.items():
        times = seconds(arguments, runs)
        median = statistics.median(times)
        met = None if goal is None else median < goal
        rows[name] = {"median_s": round(median, 3), "min_s": round(min(times), 3), "goal_s": goal, "met": met}
        print(f"{name:<28} {median:6.3f} s   goal {goal or '-'}   {'' if met is None else 'met' if met else 'MISSED'}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "runs": runs, "rows": rows}, indent=2) + "\n")
    sys.exit(any(row["met"] is False for row in rows.values()))


if __name__ == "__main__":
    main()

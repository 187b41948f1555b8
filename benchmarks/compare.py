"""The comparisons of record, made by ``learngene compare`` from a plan beside this file.

    python benchmarks/compare.py --data DIR --ancestor deit_tiny_patch16_224.fp16.safetensors         # hours, resumable
    python benchmarks/compare.py --plan few --data DIR --ancestor FILE       # accuracy against examples per class
    python benchmarks/compare.py --plan speedups --data DIR --ancestor FILE  # what learning speed-ups are worth
    python benchmarks/compare.py --summarise                                 # JSON and plots of what there is

DIR has a folder for each data set with train.parquet and test.parquet. A plan is PLAN.yaml here (compare.yaml where
none is named); its rows are results/PLAN.csv. START... runs these of its starts alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from learngene_hub.data import SAMPLES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PLANS = ("compare", "few", "speedups", "epochs", "deep")


def with_paths(plan: dict[str, Any], folder: Path, ancestor: Path, work: Path) -> dict[str, Any]:
    """The plan with its data under ``folder``."""

    def found(source: Any) -> Any:
        if isinstance(source, dict):
            return {**source, "source": found(source["source"])}
        return source if source in SAMPLES and not (folder / source).is_dir() else str(folder / source)

    starts = {
        name: facts and (facts | {"data": {each: found(source) for each, source in facts["data"].items()}})
        if facts and "data" in facts
        else facts
        for name, facts in plan["starts"].items()
    }
    data = {name: found(source) for name, source in plan["data"].items()}
    return plan | {"starts": starts, "data": data, "ancestor_weights": str(ancestor), "work": str(work)}


def run(args: argparse.Namespace) -> int:
    """The command, on a plan with paths."""
    plan = with_paths(yaml.safe_load((HERE / f"{args.plan}.yaml").read_text()), args.data, args.ancestor, args.work)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(plan))
        asked = [sys.executable, "-m", "learngene_hub.cli", "compare", *args.starts, "--plan", str(file)]
        asked += ["--out", str(RESULTS / f"{args.plan}.csv"), "--workers", str(args.workers)]
        for name in ("seeds", "shapes", "devices"):
            asked += [f"--{name}", value] if (value := getattr(args, name)) else []
        return subprocess.call(asked)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starts", nargs="*", help="of those of the plan; default: all")
    parser.add_argument("--plan", choices=PLANS, default="compare")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--ancestor", type=Path, help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "compare", help="of learngenes made here")
    parser.add_argument("--seeds")
    parser.add_argument("--shapes")
    parser.add_argument("--devices")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--summarise", action="store_true")
    args = parser.parse_args(argv)
    if args.summarise:
        from _compare_plots import write_all

        print(write_all(RESULTS))
        return 0
    if args.data is None or args.ancestor is None:
        raise SystemExit("--data and --ancestor are missing: the folder of the data sets, and DeiT-Tiny's weights")
    return run(args)


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark of federations: its jobs, that rows of other settings do not count, what the summary says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fed
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _federated_summary  # noqa: E402
import federated  # noqa: E402
from federated import Job, Row  # noqa: E402

from learngene_hub.data import SAMPLES  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((federated.ROOT / "benchmarks" / "federated.yaml").read_text())


def row(arm: str, seed: int, accuracy: float, up: int, **more: Any) -> Row:
    job = Job(arm=arm, partition="cifar10-labels", start="pretrained", seed=seed)
    numbers: dict[str, Any] = {
        "accuracy_received": accuracy, "newcomer": accuracy - 1, "newcomer_received": 1.0, "rounds": 5, "up": up,
        "down": up, "start_up": 100, "newcomer_down": 7, "model_bytes": 1000, "clusters": 2, "layers": "1|2",
        "seconds": 1.0, "settings": federated.digest_of(CONFIG, job), "ancestor": "a", "machine": "m",
    }  # fmt: skip
    return Row(**vars(job), **{"accuracy": accuracy, **numbers, **more})


def test_every_strategy_partition_start_and_seed_is_a_job() -> None:
    found = federated.jobs(CONFIG, 0)
    full = [arm for arm, own in CONFIG["arms"].items() if not own.get("starts")]
    assert set(full) >= {"gene-fl", "early", "late", "local", "fedavg", "fedprox", "fedavg-bytes"}
    assert len(found) == len(full) * 4 + 1 and len(CONFIG["seeds"]) >= 3 and CONFIG["clients"] >= 12
    for job in found:
        settings = federated.settings_of(CONFIG, job, Path("data"), Path("deit.safetensors"))
        assert settings.seed == 0 and bool(settings.ancestor) == (job.start == "pretrained")


def test_rows_of_other_settings_do_not_count() -> None:
    own = row("gene-fl", 0, 60.0, 10)
    assert federated.current([own, replace(own, accuracy=61.0)], CONFIG) == [replace(own, accuracy=61.0)]
    assert federated.current([replace(own, settings="old")], CONFIG) == []
    changed = json.loads(json.dumps(CONFIG))
    changed["common"]["rounds"] += 1
    assert federated.current([own], changed) == []


def test_the_summary_tells_bytes_differences_and_where_ours_loses(tmp_path: Path) -> None:
    rows = [row("gene-fl", s, 60.0 + s, 1000) for s in range(3)] + [row("fedavg", s, 64.0, 4400) for s in range(3)]
    text = _federated_summary.write_summary(rows, tmp_path / "federated", CONFIG)
    found = json.loads((tmp_path / "federated.json").read_text())
    cell = found["tables"]["cifar10-labels, pretrained"]["gene-fl"]
    assert cell["accuracy"] == {"mean": 61.0, "sd": 1.0, "n": 3}
    assert cell["minus_fedavg"]["accuracy"] == {"mean": -3.0, "se": 0.58, "n": 3}
    assert cell["fedavg_bytes_over_its"] == pytest.approx((2 * 4400 + 100) / (2 * 1000 + 100), abs=0.01)
    assert found["loses"] == [
        "cifar10-labels, pretrained: accuracy 61.0 of gene-fl, 64.0 of fedavg",
        "cifar10-labels, pretrained: newcomer 60.0 of gene-fl, 63.0 of fedavg",
    ]
    assert "| gene-fl | 61.0 ± 1.0 |" in text and (tmp_path / "federated.png").stat().st_size > 5000


def test_a_job_measures_clients_newcomers_and_bytes() -> None:
    """With the packaged sample in place of cifar10, and a tiny network."""
    small = {name: value for name, value in fed.TINY.items() if name != "classes"}
    config = CONFIG | {
        "clients": 2, "newcomers": 1, "newcomer_epochs": 1, "common": small, "starts": {"random": {}},
        "partitions": {"signs": {"data": SAMPLES[0], "partition": "dirichlet", "clusters": 2}},
        "arms": {"gene-fl": {}, "fedavg": {}, "local": {}},
    }  # fmt: skip
    found = {}
    for arm in config["arms"]:
        job = Job(arm=arm, partition="signs", start="random", seed=0)
        found[arm] = federated.measure(job, config, Path(), None)
    gene, average, local = (found[arm] for arm in ("gene-fl", "fedavg", "local"))
    assert average.newcomer_down > average.model_bytes > 3 * gene.newcomer_down > 3 * local.newcomer_down
    assert average.up > 3 * gene.up and gene.start_up > 0 == average.start_up
    assert gene.layers.count("|") == 1 and average.layers == ""
    assert all(0 <= each.newcomer <= 100 for each in found.values())

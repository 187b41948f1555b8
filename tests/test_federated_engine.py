"""The real Flower runtime: its simulation on Ray, and a SuperLink with SuperNodes on this machine.

Slow: Ray's and Flower's processes each import torch. ``MemoryGrid`` must give the same numbers as both.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fed import grid_of, tiny

from learngene_hub.errors import SettingsError, StoreError
from learngene_hub.federated._saved import FILE
from learngene_hub.federated.apps import simulate, write_app
from learngene_hub.federated.server import conduct
from learngene_hub.federated.settings import Federation
from learngene_hub.learngene import Learngene

BIN = Path(sys.executable).parent
ENGINE = """
import sys
from learngene_hub.federated.apps import simulate
from learngene_hub.federated.settings import Federation
import json
settings = Federation(**json.loads(sys.argv[1]))
simulate(settings, 2, engine="flower")
"""


def same_learngenes(one: Path, two: Path) -> None:
    """Both runs left learngenes of the same tensors, to the last bit."""
    names = sorted(path.name for path in one.glob("cluster-*"))
    assert names and names == sorted(path.name for path in two.glob("cluster-*"))
    for name in names:
        a, b = (Learngene.load(folder / name / "learngene.safetensors").tensors for folder in (one, two))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            np.testing.assert_array_equal(tensor.numpy(), b[key].numpy(), err_msg=key)


def sizes(folder: Path) -> list[tuple[object, ...]]:
    """What every message took, without the nodes' numbers, which Flower draws."""
    lines = [json.loads(line) for line in (folder / "traffic.jsonl").read_text().splitlines()]
    return sorted((line["round"], line["kind"], line["down"], line["up"]) for line in lines)


def environment(home: Path) -> dict[str, str]:
    """No telemetry, no update check, a home of its own, this interpreter's commands first."""
    return {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


@pytest.mark.slow
def test_flowers_simulation_gives_the_numbers_of_the_memory_grid(tmp_path: Path) -> None:
    settings = tiny(rounds=2, timeout=240.0, out=str(tmp_path / "ray"))
    told = json.dumps({**vars(settings)})
    ran = subprocess.run(
        [sys.executable, "-c", ENGINE, told], env=environment(tmp_path), capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    mine = tiny(rounds=2, timeout=240.0, out=str(tmp_path / "memory"))
    conduct(grid_of(mine, 2), mine)
    same_learngenes(tmp_path / "ray", tmp_path / "memory")
    assert sizes(tmp_path / "ray") == sizes(tmp_path / "memory")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are ended with their children, each in a group of its own."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in reversed(started):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def until(holds, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.3)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Deployment:
    """A SuperLink and SuperNodes on this machine, and the app that they run; logs lie in ``folder``."""

    def __init__(self, folder: Path, processes: list[subprocess.Popen[bytes]], clients: int) -> None:
        self.folder, self.processes, self.env = folder, processes, environment(folder / "home")
        link, *ports = (free_port() for _ in range(clients + 1))
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        )
        self.start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        until(lambda: listening(link), 120, "the SuperLink")
        self.nodes = [
            self.start(
                "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port),
                "--node-config", f"partition-id={number} num-partitions={clients}",
            )
            for number, port in enumerate(ports)
        ]  # fmt: skip

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{len(self.processes)}.txt").open("wb") as log:
            started = subprocess.Popen(
                [BIN / command[0], *command[1:]], env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(started)
        return started

    def run(self, settings: Federation) -> None:
        write_app(self.folder / "app", settings, 2)
        ran = subprocess.run(
            [BIN / "flwr", "run", str(self.folder / "app"), "here"],
            env=self.env, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def wait(self, path: Path, seconds: float, what: str) -> None:
        try:
            until(path.exists, seconds, what)
        except AssertionError as error:
            logs = [file.read_text(errors="replace")[-1500:] for file in sorted(self.folder.glob("log-*.txt"))]
            raise AssertionError("\n".join([str(error), *logs])) from error


@pytest.mark.slow
def test_a_superlink_and_supernodes_on_loopback_run_the_app_that_is_written(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    there = Deployment(tmp_path, processes, 2)
    there.run(tiny(rounds=2, timeout=240.0, out=str(tmp_path / "real")))
    there.wait(tmp_path / "real" / "rounds.jsonl", 240, "the run")
    time.sleep(1)
    mine = tiny(rounds=2, timeout=240.0, out=str(tmp_path / "memory"))
    conduct(grid_of(mine, 2), mine)
    same_learngenes(tmp_path / "real", tmp_path / "memory")
    assert sizes(tmp_path / "real") == sizes(tmp_path / "memory")


@pytest.mark.slow
def test_a_supernode_that_is_killed_in_a_round_is_left_out_and_the_run_goes_on(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """The real thing: SIGKILL while the second of three rounds is on its way."""
    there = Deployment(tmp_path, processes, 3)
    out = tmp_path / "real"
    there.run(tiny(rounds=3, epochs=6, timeout=60.0, out=str(out)))
    there.wait(out / FILE, 240, "the first round")
    os.killpg(there.nodes[2].pid, signal.SIGKILL)
    there.wait(out / "rounds.jsonl", 400, "the run")
    time.sleep(1)
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [told["round"] for told in rounds] == [1, 2, 3]
    assert rounds[0]["used"] == 3 and rounds[-1]["used"] == 2
    for path in out.glob("cluster-*/learngene.safetensors"):
        assert all(tensor.isfinite().all() for tensor in Learngene.load(path).tensors.values())


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_after_its_last_round_to_the_same_result(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """SIGKILL of `learngene federate`, server and clients together; the private parts in out/clients outlive it."""
    settings = {"limit": 96, "depth": 4, "width": 32, "heads": 1, "patch": 16, "epochs": 3, "blocks": 1, "alpha": 5.0,
                "fisher_images": 2, "min_per_class": 4, "vectors": 1, "batch_size": 16}  # fmt: skip

    def command(name: str) -> list[str]:
        asked = [f"--set={key}={value}" for key, value in settings.items()]
        said = ["federate", "--data", "signdigits", "--clients", "3", "--rounds", "4", "--out", str(tmp_path / name)]
        return [str(BIN / "learngene"), *said, *asked]

    env = environment(tmp_path / "home")
    straight = subprocess.run(command("straight"), env=env, capture_output=True, text=True, timeout=300)
    assert straight.returncode == 0, straight.stderr
    processes.append(subprocess.Popen(command("killed"), env=env, start_new_session=True))
    until((tmp_path / "killed" / FILE).exists, 200, "the first round")
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].wait(10)
    assert not (tmp_path / "killed" / "rounds.jsonl").exists()
    again = subprocess.run(command("killed"), env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    same_learngenes(tmp_path / "straight", tmp_path / "killed")
    for name in ("straight", "killed"):
        rounds = [json.loads(line)["round"] for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
        assert rounds == [1, 2, 3, 4]


def test_the_written_app_is_one_that_flower_takes(tmp_path: Path) -> None:
    from flwr.cli.config_utils import load_and_validate

    settings = tiny(data="photos", depths="4,6")
    write_app(tmp_path, settings, 3)
    config, warnings = load_and_validate(tmp_path / "pyproject.toml")
    assert Federation.from_run_config(config["tool"]["flwr"]["app"]["config"]) == settings, warnings
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["name"] == "gene-fl"
    with pytest.raises(StoreError, match="there already"):
        write_app(tmp_path, settings, 3)


def test_an_unknown_engine_is_told() -> None:
    with pytest.raises(SettingsError, match="there are process, flower"):
        simulate(tiny(), 2, engine="ray")

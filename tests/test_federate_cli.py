"""``learngene federate``: a run, the folder for ``flwr run``, the settings; errors are one line, and name the extra."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fed import TINY
from typer.testing import CliRunner

from learngene_hub._federate import _next
from learngene_hub.cli import app
from learngene_hub.federated import apps
from learngene_hub.learngene import Learngene

SMALL = [part for name, value in TINY.items() if name != "rounds" for part in ("--set", f"{name}={value}")]


def call(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["federate", *args])
    return result.exit_code, result.stdout, result.stderr


def test_a_run_tells_its_facts_and_leaves_learngenes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = call("--clients", "2", "--rounds", "1", "--out", str(folder), *SMALL, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["rounds"] == 1 and facts["learngenes"] == 2 and facts["up_bytes"] > 0 and facts["start_up_bytes"] > 0
    assert Learngene.load(folder / "cluster-1" / "learngene.safetensors").method == "gene-fl"
    again = call("--clients", "2", "--rounds", "1", "--out", str(folder), *SMALL, "--json")
    assert again[0] == 0 and json.loads(again[1]) | {"seconds": 0} == facts | {"seconds": 0}  # nothing is repeated
    assert "Starting GeneFL" in (folder / "flower.log").read_text() and "\x1b" not in err and "INFO" not in err
    _, _, err = call("--clients", "2", "--rounds", "1", "--out", str(folder), *SMALL)
    assert f"Next: learngene finetune {folder}/cluster-0/learngene.safetensors" in err and "; likewise cluster-1" in err
    assert "This run was finished: nothing was trained or written; --rounds above 1 goes on" in err


def test_who_was_left_out_is_told_and_that_nothing_was_written() -> None:
    """At most the lower of two updates is usual; the other client's is left out."""
    asked = ["--clients", "2", "--rounds", "1", *SMALL, "--set", "clusters=1", "--set", "max_drift=1.0"]
    code, _, err = call(*asked, "--format", "human")
    assert code == 0 and "round 1 of 1: 1 client, 1 left out, accuracy " in err
    assert "1 of 2 clients left out of the last round: its update has norm" in err, err
    assert err.startswith("out is empty: nothing is kept")


def test_clients_of_few_images_are_told_before_the_first_round() -> None:
    """Of seed 0 three clients train on 27, 22 and 23 images of ten classes."""
    asked = ["--clients", "3", "--rounds", "1", *SMALL, "--set", "min_per_class=25", "--set", "alpha=0.5"]
    code, _, err = call(*asked)
    assert code == 0, err
    said = [line.split(" (min_per_class): ") for line in err.splitlines() if line.startswith("warning")]
    assert [line[0] for line in said] == [
        f"warning: client {n} has {images} images and no class of 25" for n, images in enumerate((27, 22, 23))
    ]
    assert [line[1].split()[:3] for line in said] == [["its", "subspace", "is"], *[["it", "tells", "no"]] * 2]
    assert err.index("warning: client 2") < err.index("round 1 of 1: 3 clients")


def test_next_names_the_clusters_up_to_some() -> None:
    assert _next(Path("a b"), 1, 32).endswith(
        "'a b/cluster-0/learngene.safetensors' --data SOURCE --image-size 32 --out DIR"
    )
    assert _next(Path("f"), 3, 32).endswith("; likewise cluster-1, cluster-2")
    assert _next(Path("f"), 12, 32).endswith("cluster-7, cluster-8, and 3 more")


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apps, "simulate", interrupted)
    code, _, err = call("--out", str(tmp_path / "run"), *SMALL)
    kept = f"the rounds that were finished are in {tmp_path}/run (next: the same command goes on after them)"
    assert code == 130 and err.splitlines() == [f"Error: interrupted; {kept}"]
    code, _, err = call(*SMALL)
    assert code == 130 and err.startswith("Error: interrupted; without --out nothing was kept (next: ")


def test_images_of_another_size_than_the_ancestors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apps, "simulate", interrupted)
    said = "Images of 32 px; the ancestor's are 224 px. --set image_size=N takes others"
    assert said in call("--ancestor", "lsamd-base")[2]
    assert "the ancestor's are" not in call("--ancestor", "lsamd-base", "--set", "image_size=224")[2]
    assert "the ancestor's are" not in call()[2]


def test_a_flower_app_is_written_and_nothing_run(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    code, out, err = call("--write-app", str(folder), "--rounds", "7", "--json")
    assert code == 0 and json.loads(out)["files"] == 5 and json.loads(out)["clients"] == 12 and not err
    text = (folder / "pyproject.toml").read_text()
    assert "rounds = 7" in text and "`learngene federate --list-settings` says" in text and "--help" not in text
    code, _, err = call("--write-app", str(folder))
    assert code == 1 and "there already" in err and len(err.strip().splitlines()) == 1


def test_the_app_says_how_it_is_run_with_the_clients_that_were_asked(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    folder = tmp_path / "app"
    code, _, err = call("--write-app", str(folder), "--clients", "5", "--strategy", "fedavg")
    assert code == 0 and f"Next: flwr run {folder} --federation-config num-supernodes=5; " in err
    assert "The setting out is empty: the app will keep nothing" in err
    readme = (folder / "README.md").read_text()
    (asked,) = [line for line in readme.splitlines() if line.startswith("    flwr run")]
    assert parse_config_args([asked.split("'")[1]]) == {"num-supernodes": 5}
    assert "Nothing, for `out` is empty" in readme and "flower-supernode --insecure --superlink SERVER:8000" in readme
    code, _, err = call("--write-app", str(tmp_path / "kept"), "--out", "/srv/federated")
    assert code == 0 and "out is empty" not in err
    assert "In `/srv/federated` on the machine of the ServerApp" in (tmp_path / "kept" / "README.md").read_text()
    for wrong, told in ((["--clients", "1"], "1 client asked"), (["--engine", "flower"], "leave it out")):
        code, out, err = call("--write-app", str(tmp_path / "no"), *wrong)
        assert code == 1 and told in err and not out and not (tmp_path / "no").exists()


def test_the_settings_are_listed_with_what_they_mean() -> None:
    code, out, _ = call("--list-settings", "--json")
    rows = {row["setting"]: row for row in json.loads(out)}
    assert code == 0 and rows["mu"]["value"] == 0.01 and all(row["description"] for row in rows.values())
    lines = [part.split(": ")[0] for part in rows["strategy"]["description"].split(". ", 1)[1].split(" | ")]
    assert lines == ["gene-fl", "early", "late", "local", "fedavg", "fedprox", "fedavg-bytes"]
    for name, row in rows.items():  # what a zero means, where it is the value: no number, but off, or chosen
        assert (
            row["value"]
            or not isinstance(row["value"], int | float)
            or name in ("seed", "paper_mode")
            or ("0: " in row["description"])
        ), name
    assert "0: off" in rows["mu"]["description"] and "0: none" in rows["weight_decay"]["description"]
    told = rows["strategy"]["description"]
    assert told.count("leaves no learngene") == 4 and told.count("leaves a learngene per cluster") == 3
    assert "never before its first round" in told


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--set", "mo=1"], "no setting 'mo'"),
        (["--set", "rounds=x"], "it is an int"),
        (["--strategy", "fedsgd"], "there are gene-fl"),
        (["--clients", "0", *SMALL], "0 clients asked; 2 or more would work"),
        (
            ["--clients", "1", *SMALL],
            "1 client asked; a run waits for min_clients 2: 2 or more, or the setting min_clients=1, would work",
        ),
        (["--clients", "99", *SMALL], "96 images for 99 clients asked; each needs 8: 12 clients or fewer would work"),
        (["--clients", "3", *SMALL, "--set", "classes=5"], "classes 5 asked; signdigits has 10: classes=10, or 0"),
        (
            ["--clients", "3", *SMALL, "--set", "client_state=README.md/x"],
            "client_state README.md/x asked; it cannot be",
        ),
        (["--clients", "3", *SMALL, "--out", "README.md/x"], "out README.md/x asked; it cannot be written"),
        (["--data", "nowhere/at/all", "--set", "rounds=1"], "nowhere/at/all"),
        (["--ancestor", "no-such-model"], "no-such-model"),
        (["--engine", "ray", *SMALL], "there are process, flower"),
    ],
)
def test_bad_input_is_one_line(args: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first round, and without advice on the learning rate."""
    monkeypatch.chdir(Path(__file__).parents[1])
    code, out, err = call(*args)
    assert code == 1 and told in err and not out and len(err.strip().splitlines()) == 1, err
    assert "setting 'mo'" not in err or err.strip().endswith("(next: learngene federate --list-settings)")
    assert "round 1" not in err and "learning rate" not in err


def test_without_flower_one_line_names_the_extra() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'flwr' else find(name, *rest)\n"
        "from learngene_hub.cli import app\n"
        "sys.argv = ['learngene', 'federate']\n"
        "app()"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "pip install 'learngene-hub[federated]'" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1

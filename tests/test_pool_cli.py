"""`learngene pool` and `learngene select`: what they print and write, and the one line of each refusal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico
from planted import FACTS
from pools import TINY, files_of
from typer.testing import CliRunner

from learngene_hub import cli, factory
from learngene_hub.learngene import Learngene
from learngene_hub.pool import Pool

QUICK = ["--data", "signdigits", "--limit", "40", "--epochs", "1", "--batch-size", "20"]
SMALL = ["--image-size", "16"]


class Result:
    """What a call left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert (self.code, self.out, len(lines)) == (1, "", 1), (self.code, self.out, self.err)
        assert lines[0].startswith("Error: ") and "(next: " in lines[0] and "Traceback" not in self.err
        return lines[0]

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture
def run() -> Call:
    def call(*args: object) -> Result:
        found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
        return Result(found.exit_code, found.stdout, found.stderr)

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an anchor in ``anchor``."""
    factory.extract("net2net", build_pico(TINY), {}, facts=FACTS).save_pretrained(tmp_path / "anchor")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pool_from_beginning_to_end(here: Path, run: Call) -> None:
    made = run("pool", "create", "mine", "anchor", *SMALL, "--json").json()
    assert made["anchor"] == "net2net" and made["sha256"] == Learngene.load("mine/learngene.safetensors").digest
    added = run("pool", "add", "mine", *QUICK, "--json").json()
    assert (added["name"], added["entries"], added["steps"], added["images_seen"]) == ("signdigits", 1, 2, 40)
    before = files_of(here / "mine")
    entry = here / "mine" / "entries" / f"{added['sha256']}.safetensors"
    assert entry.stat().st_size == added["bytes"] > 0
    second = run("pool", "add", "mine", *QUICK, "--name", "again", "--seed", 4, "--dtype", "float16", "--json").json()
    assert second["bytes"] < 0.7 * added["bytes"] and before.items() <= files_of(here / "mine").items()
    shown = run("pool", "show", "mine", "--json").json()
    assert list(shown["entries"]) == ["signdigits", "again"]
    assert (shown["entries"]["again"]["images"], shown["entries"]["again"]["classes"]) == (40, 10)
    assert shown["bytes"] == sum(map(len, files_of(here / "mine").values()))
    checked = run("pool", "verify", "mine", "--json").json()
    assert checked["ok"] is True and checked["digest"] == Pool.load("mine").manifest.digest


def test_select_prints_entries_weights_residual_and_seconds(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    run("pool", "add", "mine", *QUICK)
    asked = ["select", "mine", "--data", "signdigits", "--limit", 20, "--unlabelled", "--split", "test"]
    said = run(*asked, "--json").json()
    assert [row["name"] for row in said["entries"]] == ["signdigits"] and not said["abstained"]
    assert said["entries"][0]["weight"] == 0.5 and said["entries"][0]["share"] == 1
    assert 0 < said["residual"] <= said["threshold"] and said["seconds"] > 0 and said["images"] == 20
    again = run(*asked, "--json").json()
    assert {**again, "seconds": 0} == {**said, "seconds": 0}
    assert run(*asked, "--quiet").out.split() == ["signdigits"]
    people = run(*asked)
    assert people.code == 0 and "entries.signdigits.weight\t0.5" in people.out
    labelled = run("select", "mine", "--data", "signdigits", "--limit", 20, "--json").json()
    assert labelled["labelled"] and labelled["scores"].keys() == {"0", "0.3", "0.5", "0.7", "1"}


def test_select_looks_at_a_folder_of_images_without_labels(here: Path, run: Call) -> None:
    from PIL import Image

    run("pool", "create", "mine", "anchor", *SMALL)
    run("pool", "add", "mine", *QUICK)
    (here / "few").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 90, 100)).save(here / "few" / f"{i}.png")
    said = run("select", "mine", "--data", "few", "--unlabelled", "--json").json()
    assert said["images"] == 3 and not said["labelled"]
    assert "holds no class folders" in run("select", "mine", "--data", "few").refused()


def test_the_mixture_is_written_and_grown_like_any_learngene(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    run("pool", "add", "mine", *QUICK)
    asked = ["select", "mine", "--data", "signdigits", "--limit", 20, "--unlabelled"]
    assert run(*asked, "--out", "mixed", "--json").json()["out"] == "mixed"
    mixed, pool = Learngene.load("mixed/learngene.safetensors"), Pool.load("mine")
    assert mixed.digest == pool.merge({"signdigits": 0.5}).digest
    assert run("show", "mixed", "--depth", 2, "--width", 32, "--num-labels", 3, "--json").code == 0
    assert "is there already" in run(*asked, "--out", "mixed").refused()
    assert run(*asked, "--out", "one.safetensors").code == 0 and Path("one.safetensors").is_file()


def test_an_ancestor_is_projected_or_refused(here: Path, run: Call) -> None:
    from learngene_hub.descendant import Descendant

    run("pool", "create", "mine", "anchor", *SMALL, "--components", 1)
    grown = Descendant.from_learngene("anchor", num_labels=10)
    grown.save_pretrained("same")
    added = run("pool", "add", "mine", *QUICK[:4], "--ancestor", "same", "--json").json()
    assert added["residual"] == 0 and "steps" not in added
    with torch.no_grad():
        for i, block in enumerate(grown.timm_model.blocks):
            block.mlp.fc1.weight.add_(0.1 * (-1) ** i)
    grown.save_pretrained("other")
    line = run("pool", "add", "mine", *QUICK[:4], "--name", "x", "--ancestor", "other").refused()
    assert "a residual of 0.943 asked, above the limit 0.6" in line  # of 1, -1, 1 the mean holds 1/3: sqrt(8/9) is left
    tuned = run("pool", "add", "mine", *QUICK, "--name", "x", "--ancestor", "other", "--json").json()
    assert tuned["residual"] == pytest.approx((8 / 9) ** 0.5, abs=1e-3) and tuned["steps"] == 2


def test_an_entry_of_a_copy_is_taken(here: Path, run: Call) -> None:
    for name in ("mine", "theirs"):
        run("pool", "create", name, "anchor", *SMALL)
    sha256 = run("pool", "add", "theirs", *QUICK, "--json").json()["sha256"]
    file = f"theirs/entries/{sha256}.safetensors"
    assert run("pool", "add", "mine", "--entry", file, "--name", "taken", "--json").json()["sha256"] == sha256
    factory.extract("net2net", build_pico(TINY, seed=1), {}, facts=FACTS).save_pretrained("other")
    run("pool", "create", "stranger", "other", *SMALL)
    assert "increments of two anchors cannot be summed" in run("pool", "add", "stranger", "--entry", file).refused()


def test_each_refusal_is_one_line(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    for command in (["pool", "show", "anchor"], ["pool", "list", "anchor"], ["pool", "add", "anchor", *QUICK]):
        line = run(*command).refused()
        assert "anchor is not a pool: it has no pool.json" in line
        assert line.endswith("(next: learngene pool create FOLDER anchor)")
    line = run("pool", "add", "nowhere", *QUICK).refused()
    assert "no folder nowhere; " in line and line.endswith("(next: learngene pool create FOLDER ANCHOR)")
    assert "'nowhere'" in run("select", "nowhere", "--data", "signdigits").refused()
    assert "the pool is empty" in run("select", "mine", "--data", "signdigits", "--limit", 20).refused()
    assert "is there already" in run("pool", "create", "mine", "anchor", *SMALL).refused()
    assert "topology 'ring'" in run("pool", "create", "x", "anchor", "--topology", "ring").refused()
    assert "neither --data nor --entry asked; give one of them" in run("pool", "add", "mine").refused()
    assert "19 images; at least 20" in run("pool", "add", "mine", *QUICK[:3], 19).refused()
    assert "asked without --ancestor" in run("pool", "add", "mine", *QUICK, "--ancestor-weights", "w").refused()
    run("pool", "add", "mine", *QUICK)
    few = run("select", "mine", "--data", "signdigits", "--limit", 3)
    assert "3 images of 10 classes" in few.refused()
    assert "k 0 asked" in run("select", "mine", "--data", "signdigits", "--limit", 20, "--k", 0).refused()
    manifest = here / "mine" / "pool.json"
    manifest.write_text(manifest.read_text().replace("signdigits", "sign-digits"))
    assert "edited by hand" in run("pool", "verify", "mine").refused()


BUNDLED = (
    "pool list", "pool show", "pool verify", "pool add --data signdigits", "pool pull --folder",
    "pool push --repo", "select --data signdigits",
)  # fmt: skip


@pytest.mark.parametrize("typed", BUNDLED)
def test_a_bundled_learngene_is_no_pool_and_may_become_one(here: Path, run: Call, typed: str) -> None:
    words = typed.replace("--folder", "mine").replace("--repo", "org/mine").split()
    verb = words[: 2 if words[0] == "pool" else 1]
    line = run(*verb, "lsamd-base", *words[len(verb) :]).refused()
    assert line.startswith("Error: lsamd-base is not a pool: it has no pool.json; ")  # no path of this machine
    assert line.endswith("(next: learngene pool create FOLDER lsamd-base)")


def test_verify_tells_each_wrong_file_and_fails(here: Path, run: Call) -> None:
    run("pool", "create", "mine", "anchor", *SMALL)
    sha256 = run("pool", "add", "mine", *QUICK, "--json").json()["sha256"]
    path = here / "mine" / "entries" / f"{sha256}.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    (path.parent / "stranger").write_bytes(b"x")
    found = run("pool", "verify", "mine")
    assert found.code == 1 and found.out == ""
    assert ["stranger is in entries" in line or "signdigits: " in line for line in found.err.splitlines()] == [
        True,
        True,
    ]


def test_help_is_instant_and_has_examples(run: Call) -> None:
    assert {"pool", "select"} <= set(run("--help").out.split())
    for command in ("create", "add", "list", "show", "verify", "push", "pull"):
        assert f"learngene pool {command} " in run("pool", command, "--help").out
    assert "learngene select mypool" in run("select", "--help").out
    assert "learngene_hub._pool_grow" in sys.modules  # of the tests before; the command line alone does not import it

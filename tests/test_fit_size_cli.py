"""``learngene fit-size``: what it shows, what it takes, and that what it says can be run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import Result
from test_sn_net import extracted, routes_of
from typer.testing import CliRunner

from learngene_hub import Descendant, _latency, cli, factory
from learngene_hub._command import parse_count
from learngene_hub._latency import Measured
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Shape, shape_of


def run(*args: str | Path) -> Result:
    found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    return Result(found.exit_code, found.stdout, found.stderr)


@pytest.fixture
def pico(pico_learngene: Learngene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A learngene of reach 2-6 x 32-128 step 32 in the working folder, and an empty cache."""
    monkeypatch.setenv("LEARNGENE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pico_learngene.save_pretrained(tmp_path / "pico")
    return "pico"


def test_the_frontier_and_the_line_for_the_one_that_is_taken(pico: str, pico_learngene: Learngene) -> None:
    shown = run("fit-size", pico, "--max-params", "420K", "--num-labels", "7")
    head, *rows = [line.split("\t") for line in shown.out.splitlines()]
    assert head == ["size", "params", "flops", "bytes", "taken"] and shown.code == 0
    chosen = factory.plan(pico_learngene, max_params=420_000, num_labels=7)
    assert [row[0] for row in rows if row[-1] == "yes"] == [str(chosen)]
    every = {(d, w): factory.plan(pico_learngene, depth=d, width=w, num_labels=7) for d in range(2, 7)
             for w in range(32, 129, 32)}  # fmt: skip
    fit = {size for size, shape in every.items() if shape.params() <= 420_000}
    edge = {(d, w) for d, w in fit if not any((e, v) != (d, w) and e >= d and v >= w for e, v in fit)}
    assert {row[0] for row in rows} == {f"{d}x{w}" for d, w in edge} | {str(chosen)}
    params = {f"{d}x{w}": f"{shape.params():,}" for (d, w), shape in every.items()}
    assert all(row[1] == params[row[0]] for row in rows)
    call = f'Descendant.from_learngene("pico", depth={chosen.depth}, width={chosen.width}, num_labels=7)'
    assert shown.err == f"{chosen} is taken (--prefer balanced). Next: {call}\n"
    assert shape_of(eval(call, {"Descendant": Descendant}).timm_model) == chosen


def test_json_is_one_document_and_quiet_is_for_expand(pico: str, pico_learngene: Learngene, tmp_path: Path) -> None:
    asked = ["fit-size", pico, "--max-flops", "0.02G", "--max-bytes", "2MB", "--image-size", "64", "--dtype", "float16"]
    found = json.loads(run(*asked, "--format", "json").out)
    assert found["budget"] == {"max_flops": 20_000_000, "max_bytes": 2_000_000} and found["name"] == "pico"
    taken = found["taken"]
    assert taken in found["sizes"] and sum(row["taken"] for row in found["sizes"]) == 1
    assert found["call"].endswith('image_size=64, dtype="float16")')
    quiet = run(*asked, "-q")
    assert quiet.out == found["options"] + "\n" and quiet.err == ""
    grown = run("expand", pico, "grown", *shlex.split(quiet.out))
    assert grown.code == 0, grown.err
    assert (tmp_path / "grown/model.safetensors").stat().st_size == taken["bytes"] <= 2_000_000
    shape = shape_of(Descendant.from_pretrained("grown").timm_model)
    assert (shape.depth, shape.width, shape.params(), shape.flops()) == tuple(
        taken[key] for key in ("depth", "width", "params", "flops")
    )


def test_a_size_that_is_given_is_held(pico: str) -> None:
    found = json.loads(run("fit-size", pico, "--max-params", "420K", "--depth", "5", "--json").out)
    assert {row["depth"] for row in found["sizes"]} == {5} and found["call"].startswith("Descendant.from_learngene(")
    deep, wide = (
        json.loads(run("fit-size", pico, "--max-params", "500K", "--prefer", prefer, "--json").out)["taken"]
        for prefer in ("depth", "width")
    )
    assert deep["depth"] == 6 and wide["width"] == 128


def test_latency_and_memory_are_measured_where_they_are_asked(pico: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Shape] = []

    def measure(shape: Shape, *_: Any) -> Measured:
        seen.append(shape)
        return Measured(ms=shape.depth * shape.width / 32, peak_bytes=1_500_000)

    monkeypatch.setattr(_latency, "measure", measure)
    assert "latency_ms" not in run("fit-size", pico, "--max-params", "420K").out and not seen
    table = run("fit-size", pico, "--max-latency-ms", "6").out.splitlines()
    assert table[0].split("\t")[4:] == ["latency_ms", "peak_bytes", "taken"]
    rows = [line.split("\t") for line in table[1:]]
    assert all(float(row[4]) <= 6 and row[5] == "1.5 MB" for row in rows)
    count = len(seen)
    both = json.loads(run("fit-size", pico, "--max-params", "420K", "--measure", "--json").out)
    assert all(row["latency_ms"] == row["depth"] * row["width"] / 32 for row in both["sizes"])
    assert len(seen) <= count + len(both["sizes"])
    seen.clear()
    run("fit-size", pico, "--max-latency-ms", "6")
    assert not seen  # all of it was kept
    run("fit-size", pico, "--max-latency-ms", "6", "--again")
    assert len(seen) == len(set(seen)) > 0


def test_a_pool_shows_what_none_is_better_and_smaller_than(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNGENE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    learngene = extracted()
    learngene.save_pretrained(tmp_path / "routes")
    every = {}
    for route in routes_of(learngene):
        told = json.loads(run("show", "routes", "--set", f"route={route}", "--json").out)
        every[route] = told["descendant"]["params"]
    limit = sorted(every.values())[len(every) // 2]
    found = json.loads(run("fit-size", "routes", "--max-params", str(limit), "--json").out)
    table = {row[0]: row[-1] for row in learngene.provenance["routes"]["rows"]}  # type: ignore[index]
    fit = [n for n in every if every[n] <= limit]
    best = max(fit, key=lambda n: (table[n], -every[n]))
    assert 1 < len(fit) < len(every)
    assert (table[int(found["options"].split("route=")[1])], found["taken"]["params"]) == (table[best], every[best])
    edge = {n for n in fit if not any(table[m] >= table[n] and every[m] < every[n] for m in fit)}
    edge = {n for n in edge if not any(table[m] > table[n] and every[m] <= every[n] for m in fit)}
    assert {row["params"] for row in found["sizes"]} == {every[n] for n in edge}
    call = eval(found["call"], {"Descendant": Descendant})
    assert call.num_parameters() == every[best]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "no budget asked; --max-params 5M, .*next: learngene fit-size --help"),
        (["--max-params", "1K"], "at most 1,000 parameters asked; the smallest in reach, 2x32, has 32,554 parameters"),
        (["--max-params", "1M", "--prefer", "tall"], "prefer 'tall' asked; there are balanced, depth, width"),
        (["--max-params", "1M", "--depth", "9"], "depth 9 asked; this learngene reaches"),
        (["--max-params", "1M", "--dtype", "int8"], "dtype 'int8' asked"),
        (["--max-latency-ms", "5", "--device", "xpu:9"], "device xpu:9 asked; it is not on this machine"),
        (["--max-latency-ms", "nan"], "max_latency_ms nan asked"),
        (["--max-params", "1M", "--set", "nonsense=1"], "nonsense"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(pico: str, asked: list[str], told: str) -> None:
    import re

    assert re.search(told, run("fit-size", pico, *asked).refused())


@pytest.mark.parametrize("written", ["5X", "M", "", "-5M", "0", "0.1", "5 M M", "1e6", "٥M", "5MB", "nan", "9" * 40])
def test_nonsense_is_wrong_usage(pico: str, written: str) -> None:
    found = run("fit-size", pico, f"--max-params={written}")
    assert (found.code, found.out) == (2, "") and "Traceback" not in found.err
    assert f"{written!r} is no number; 5M, 500K, 1.5G or 5000000 would work" in " ".join(found.err.split())
    with pytest.raises(typer.BadParameter):
        parse_count(written)


def test_suffixes() -> None:
    written = {"5M": 5_000_000, "5m": 5_000_000, "500K": 500_000, "1.5G": 1_500_000_000, "7": 7, "1.1 M": 1_100_000}
    assert {text: parse_count(text) for text in written} == written
    assert parse_count(12) == 12


def test_show_and_expand_choose_by_the_same_rule(pico: str, pico_learngene: Learngene) -> None:
    chosen = factory.plan(pico_learngene, max_params=420_000)
    told = json.loads(run("show", pico, "--max-params", "420K", "--json").out)["descendant"]
    assert (told["depth"], told["width"]) == (chosen.depth, chosen.width)
    assert run("expand", pico, "grown", "--max-params", "0.42M").code == 0
    assert shape_of(Descendant.from_pretrained("grown").timm_model) == chosen

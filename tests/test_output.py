"""What people see of numbers: one rule for every command, by the last word of a fact's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_pico
from planted import variant
from test_cli import Call
from test_cli import run as run  # the fixture
from timm.models._hub import save_for_hf

from learngene_hub._output import text

CASES: list[tuple[str, Any, str]] = [
    ("params", 5717416, "5,717,416"),
    ("trained_params", 5717416, "5,717,416"),
    ("flops", 2506710528, "2.507 G"),
    ("teacher_flops", 12345678901234, "12,345.679 G"),
    ("bytes", 999, "999 B"),
    ("bytes", 11169000, "11.2 MB"),
    ("accuracy", 94.4, "94.40 %"),
    ("seconds", 1234.5, "1,234.50 s"),
    ("steps", 12000, "12,000"),
    ("images_seen", 1651, "1,651"),
    ("loss", 0.123456, "0.1235"),
    ("heads", [3, 3, 6], "3, 3, 6"),
    ("ok", True, "yes"),
    ("license", "", "-"),
    ("default", 1000, "1000"),  # as it is typed
    ("default", 0.0446428, "0.04464"),
    ("default", (64, 1280), "64, 1280"),
]


@pytest.mark.parametrize(("name", "value", "shown"), CASES)
def test_a_number_is_shown_in_the_unit_of_its_name(name: str, value: Any, shown: str) -> None:
    assert text(name, value) == shown


def test_extraction_tells_its_cost_so_and_that_it_is_of_forward_passes(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_for_hf(build_pico(variant("token")), "vit", safe_serialization=True)
    quick = ["epochs=1", "batch_size=8", "crop_padding=2", "teacher_size=32"]
    asked = ["extract", "tleg", "vit", "--data", "signdigits", "--image-size", "32", "--limit", "16"]
    told = run(*asked, *(f"--set={pair}" for pair in quick), "--out", "gene")
    facts = dict(line.split("\t") for line in told.out.splitlines())
    for name in ("flops", "teacher_flops"):
        assert facts[name].endswith(" G"), facts
    assert "forward passes alone" in told.err
    quiet = run("extract", "net2net", "vit", "--out", "other")
    assert "forward passes" not in quiet.err  # nothing was trained
    shown = json.loads(run("show", "gene", "--json").out)
    assert isinstance(shown["params"], int)  # raw numbers for scripts

"""The rule by which a budget chooses a size is the one that the measured descendants give."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import size_rule  # noqa: E402
from size_rule import Run  # noqa: E402

from learngene_hub import Learngene, factory  # noqa: E402
from learngene_hub._sizing import SLOPES, predicted  # noqa: E402
from learngene_hub.shape import ViTShape  # noqa: E402

STORED = json.loads((ROOT / "benchmarks/results/size_rule.json").read_text())


def planted(arm: str, slopes: tuple[float, ...], sizes: list[tuple[int, int]], constant: float = 0.0) -> list[Run]:
    """Runs of two seeds whose accuracies are exactly what these slopes say."""
    runs = []
    for seed in range(2):
        for depth, width in sizes:
            d, w = math.log2(depth / 12), math.log2(width / 192)
            odds = constant + seed + slopes[0 if d < 0 else 1] * d + slopes[2 if w < 0 else 3] * w
            accuracy = 100 / (1 + math.exp(-odds))
            runs.append(Run(arm=arm, group=(arm, str(seed)), size=(depth, width), accuracy=accuracy))
    return runs


SIZES = [(6, 192), (24, 192), (12, 96), (12, 384), (12, 192), (3, 64), (16, 256)]


def test_planted_slopes_are_found() -> None:
    """Whatever the constants of the arms and seeds are."""
    runs = planted("a", (0.5, -0.25, 1.0, 0.125), SIZES, 0.3) + planted("b", (0.5, -0.25, 1.0, 0.125), SIZES, -2.0)
    assert size_rule.slopes(runs) == pytest.approx([0.5, -0.25, 1.0, 0.125])
    found = size_rule.analysis(runs)
    assert found["explained"] == 1.0 and set(found["standard_errors"].values()) == {0.0}


def test_standard_errors_are_those_of_leaving_out_an_arm() -> None:
    """Arms of slopes 1 and 3 in one term: each left out gives the other; sqrt(1/2 * (1 + 1)) = 1."""
    arms = [planted(name, (slope, 0.0, 0.0, 0.0), [(6, 192), (12, 192)]) for name, slope in (("a", 1.0), ("b", 3.0))]
    found = size_rule.analysis([run for runs in arms for run in runs])
    assert found["slopes"]["depth below"] == pytest.approx(2.0)
    assert found["standard_errors"]["depth below"] == pytest.approx(1.0)


def test_pairs_have_nearly_equal_parameters() -> None:
    """6x192 has 2,822,602 and 12x128 2,481,546: a factor 1.14. 12x192 has 5,491,786."""
    runs = [
        Run(arm="a", group=("a", "0"), size=size, accuracy=accuracy)
        for size, accuracy in (((6, 192), 30.0), ((12, 128), 20.0), ((12, 192), 50.0))
    ]
    assert size_rule.params((6, 192)) == 2_822_602 and size_rule.params((12, 128)) == 2_481_546
    assert size_rule.nearly_equal(runs) == [("a", ((6, 192), (12, 128)), (30.0, 20.0))]


def test_what_is_stored_is_what_the_results_give() -> None:
    found = json.loads(json.dumps(size_rule.analysis(size_rule.runs())))
    assert found.keys() == STORED.keys()
    for key in ("slopes", "standard_errors"):
        assert found[key] == pytest.approx(STORED[key], abs=2e-4)  # least squares in another order of adding
    for key in ("runs", "arms", "shapes", "shapes_behind", "budgets", "pairs"):
        assert found[key] == STORED[key]


def test_the_package_has_the_stored_numbers_and_so_have_the_texts() -> None:
    assert SLOPES == tuple(round(STORED["slopes"][term], 2) for term in size_rule.TERMS)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "learngene_hub/_sizing.py")]
    for text in texts:
        assert all(f"{abs(slope):.2f}" in text for slope in SLOPES) and f"{STORED['runs']} runs" in text
        assert all(f"{STORED['standard_errors'][term]:.2f}" in text for term in ("depth above", "width above"))
    score = STORED["budgets"]["rules"]["measured"]
    assert f"{score['right']} times of {STORED['budgets']['count']} and loses {score['points_lost']:.2f}" in texts[1]


def test_the_readme_names_the_size_that_is_taken() -> None:
    said = re.search(r"max_params=5e6, num_labels=10\) +# (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    learngene = Learngene.load(ROOT / "model_cards/lsamd-base/learngene.safetensors")
    assert said and said[1] == str(factory.plan(learngene, max_params=5e6, num_labels=10))


def test_the_prediction_is_that_of_the_slopes() -> None:
    """By hand: half the depth and twice the width of 12x192."""
    native, other = (ViTShape(depth=d, width=w, heads=w // 64) for d, w in ((12, 192), (6, 384)))
    assert predicted(native, other) == pytest.approx(-SLOPES[0] + SLOPES[3])
    assert predicted(native, native) == 0.0
    deep, narrow = (ViTShape(depth=d, width=w, heads=w // 64) for d, w in ((24, 192), (12, 64)))
    assert predicted(native, deep) == pytest.approx(SLOPES[1])
    assert predicted(native, narrow) == pytest.approx(-SLOPES[2] * math.log2(3))

"""Draws the curves by which heuristic learngene's layers are chosen, as a learngene holds them in its provenance.

    python benchmarks/calmness_plot.py LEARNGENE PICTURE.png

LEARNGENE is a file, a registry name or a Hub repository of method "heuristic" that was extracted with tasks above 0.
One panel shows rho, the share of a layer's gradients above the threshold, over the tasks, a line for each layer, thick
where it is kept. The other shows the same numbers as a map, as the paper's figure does, and beside each layer its
score.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from learngene_hub import Learngene, LearngeneError
from learngene_hub.errors import SettingsError


def curves(learngene: Learngene) -> Mapping[str, Any]:
    """What the learngene holds: ``rho`` (rows, layers), ``units``, ``score``, ``sigma``, ``row``.

    Raises:
        SettingsError: it holds none.
    """
    found = learngene.provenance.get("calmness")
    if not isinstance(found, Mapping):
        raise SettingsError(
            f"a learngene of {learngene.method} without curves given; extract heuristic with tasks=8, say"
        )
    return found


def draw(learngene: Learngene, path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, kept = curves(learngene), set(learngene.provenance.get("kept", ()))
    units, rho = list(found["units"]), [list(row) for row in found["rho"]]
    figure, (lines, chart) = pyplot.subplots(1, 2, figsize=(11, 4 + 0.08 * len(units)))
    shades = pyplot.get_cmap("viridis")
    for place, unit in enumerate(units):
        thick = 2.4 if unit in kept else 0.9
        colour = shades(place / max(len(units) - 1, 1))
        lines.plot([row[place] for row in rho], color=colour, lw=thick, label=unit if unit in kept else None)
    lines.set_xlabel(f"{found['row']}s, one after the other")
    lines.set_ylabel(f"rho: share of |gradient| > {found['sigma']:.2g}")
    lines.set_title("a line per layer, from the first (dark) to the last (bright)", loc="left", fontsize=10)
    lines.spines[["top", "right"]].set_visible(False)
    lines.legend(frameon=False, title="kept", alignment="left")
    image = chart.imshow(
        [list(column) for column in zip(*rho, strict=True)], aspect="auto", origin="lower", cmap="viridis"
    )
    chart.set_yticks(
        range(len(units)), [f"{unit}  {score:.2f}" for unit, score in zip(units, found["score"], strict=True)]
    )
    chart.set_xlabel(f"{found['row']}s, one after the other")
    chart.set_title("rho, and how far it has come down (score)", loc="left", fontsize=10)
    figure.colorbar(image, ax=chart, label="rho")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learngene")
    parser.add_argument("picture", type=Path)
    asked = parser.parse_args()
    try:
        draw(Learngene.from_pretrained(asked.learngene), asked.picture)
    except LearngeneError as error:
        Console(stderr=True).print(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()

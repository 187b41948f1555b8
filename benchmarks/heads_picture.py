"""How far each head of an ancestor looks, and which of them the method cluster takes for alike: a picture, and numbers.

    python benchmarks/heads_picture.py --ancestor FILE.safetensors --data DIR pacs

The ancestor is a safetensors file of timm's deit_tiny_patch16_224; DIR/NAME holds train.parquet or train/ of real
images, of which 64 are drawn and resized to 224 px, the ancestor's own size. Writes results/heads.png and
results/heads.json: the mean attention distance of every head of every layer, in pixels, the clusters of each layer with
their centroids in the order of priority, and the layers that would share one FFN.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _arms import file_digest, open_ancestor

from learngene_hub.data import load_images
from learngene_hub.methods._cluster_attention import attention_distances, seen_at
from learngene_hub.methods._cluster_groups import FfnGroup, cluster_heads, fixed_groups, measured_groups
from learngene_hub.methods._cluster_parts import stored_shapes
from learngene_hub.methods.cluster import Cluster
from learngene_hub.shape import IMAGENET, ViTShape

RESULTS = Path(__file__).parent / "results"
COLOURS = ("#0b6e4f", "#d08c1d", "#3b6ea8", "#8a6fae", "#c26e6e", "#5c8a8a")  # of the clusters, the largest first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ancestor", type=Path, required=True, help="safetensors file of deit_tiny_patch16_224")
    parser.add_argument("--data", nargs=2, required=True, metavar=("DIR", "NAME"), help="folder of data sets, and one")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--out", type=Path, default=RESULTS / "heads", help="path without its ending")
    args = parser.parse_args()
    folder, name = args.data
    ancestor = open_ancestor(str(args.ancestor))
    images = load_images(Path(folder) / name, size=args.size, limit=args.images)
    distances = attention_distances(seen_at(ancestor, args.size), images, IMAGENET).tolist()
    found = said(ViTShape.of(ancestor), distances, args.size)
    found = {"ancestor_sha256": file_digest(str(args.ancestor)), "data": name, "images": len(images), **found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out.with_suffix(".png"))
    print(f"{found['heads_kept']} of {found['heads']} heads stand for all; {found['stored_with_these_ffns']}")


def said(native: ViTShape, distances: Sequence[Sequence[float]], size: int) -> dict[str, Any]:
    """Everything that is told about these distances (layers, heads), JSON."""
    eps = Cluster().eps * size
    clusters = [cluster_heads(layer, eps) for layer in distances]
    rules = {
        "published": fixed_groups("auto", native) or [],
        "measured": measured_groups(distances, eps),
    }
    counts = [len(layer) for layer in clusters]
    return {
        "image_size": size,
        "eps": eps,  # pixels
        "heads": native.depth * native.heads,
        "heads_kept": sum(counts),
        "ffn_groups": {rule: shared(groups) for rule, groups in rules.items()},  # the kept layer first
        "ancestor_numbers": ViTShape(**{**native.to_dict(), "classes": 0}).params(),  # without its classifier
        "stored_with_these_ffns": {rule: stored(native, counts, groups) for rule, groups in rules.items() if groups},
        "layers": [
            {
                "distances": [round(value, 3) for value in layer],  # pixels
                "clusters": [{"centroid": each.centroid, "heads": list(each.members)} for each in found],
            }
            for layer, found in zip(distances, clusters, strict=True)
        ],
    }


def shared(groups: Sequence[FfnGroup]) -> list[list[int]]:
    """The groups of several layers."""
    return [group.to_list() for group in groups if len(group) > 1]


def stored(native: ViTShape, counts: Sequence[int], groups: Sequence[FfnGroup]) -> int:
    """Numbers in a learngene of so many centroids in the layers, without maps."""
    total = 0
    for shape in stored_shapes(native, counts, groups).values():
        size = 1
        for axis in shape:
            size *= axis
        total += size
    return total


def plot(found: dict[str, Any], path: Path) -> None:
    """Layers from left to right, in each a point for every head, coloured by its cluster; centroids are filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5))
    for group in found["ffn_groups"]["published"]:
        axis.axvspan(min(group) - 0.5, max(group) + 0.5, color="#f3f3f3", zorder=0)
        axis.text((min(group) + max(group)) / 2, 1.5, "one FFN", ha="center", fontsize=8, color="#777777")
    for place, layer in enumerate(found["layers"]):
        for rank, cluster in enumerate(layer["clusters"]):
            draw(axis, place, layer["distances"], cluster, COLOURS[rank % len(COLOURS)])
    axis.set_xticks(range(len(found["layers"])))
    axis.set_xticks([place + 0.5 for place in range(len(found["layers"]) - 1)], minor=True)
    axis.set_xlim(-0.5, len(found["layers"]) - 0.5)
    axis.set_ylim(0, 1.15 * max(value for layer in found["layers"] for value in layer["distances"]))
    axis.set_xlabel("layer, and in it the heads from left to right")
    axis.set_ylabel("mean attention distance, pixels")
    axis.grid(axis="y", color="#eeeeee")
    axis.grid(axis="x", which="minor", color="#e4e4e4")
    axis.tick_params(which="minor", length=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(handles=legend(), loc="upper left", frameon=False, fontsize=8, ncols=5)
    kept = f"DeiT-Tiny keeps {found['heads_kept']} of {found['heads']} heads: gaps of up to {found['eps']:.0f} px"
    seen = f"{found['images']} images of {found['data']} at {found['image_size']} px"
    axis.set_title(f"{kept} make one cluster ({seen})", loc="left", size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(axis: Any, place: int, distances: Sequence[float], cluster: dict[str, Any], colour: str) -> None:
    """One cluster of one layer: a numbered point for each of its heads, and a line that joins them."""
    step = 0.72 / len(distances)
    points = {head: (place + step * (head - (len(distances) - 1) / 2), distances[head]) for head in cluster["heads"]}
    axis.plot(*zip(*points.values(), strict=True), color=colour, lw=2, alpha=0.45, zorder=1)
    for head, (x, y) in points.items():
        chosen = head == cluster["centroid"]
        axis.plot(x, y, "o", ms=11, mec=colour, mew=1.6, mfc=colour if chosen else "white", zorder=2)
        shade = "white" if chosen else colour
        axis.text(x, y, str(head), ha="center", va="center_baseline", fontsize=8, zorder=3, color=shade)


def legend() -> list[Any]:
    from matplotlib.lines import Line2D

    names = ("cluster of first priority", "second", "third")
    dots = [Line2D([], [], marker="o", ls="none", color=c, label=n) for c, n in zip(COLOURS, names, strict=False)]
    grey: dict[str, Any] = {"marker": "o", "ls": "none", "color": "#555555"}
    kinds = [
        Line2D([], [], label="centroid, which is kept", **grey),
        Line2D([], [], mfc="white", label="head it stands for", **grey),
    ]
    return [*dots, *kinds]


if __name__ == "__main__":
    main()

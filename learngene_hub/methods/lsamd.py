"""LSAMD: the blocks that several data sets agree on, searched in a super ancestor.

Learngene = the base blocks G that the searched paths of T data sets choose most often, f_l = (1/T) sum_t [path_tl =
base], after they were trained on all T data sets; with the stem and the last norm. A descendant of depth L' takes the
L' best of them in depth order, or, beyond the number kept, for its block j the one of G nearest to j (L-1) / (L'-1).

Source: Shi, Zhou, Liu, Yang, Wang, Geng, "LSAMD", arXiv:2605.08209. Only the abstract could be read: a super ancestor
with dataset-specific blocks and dataset adapters, one searched path per data set, the base blocks chosen most often
across data sets initialise descendants of several depths. Everything more exact than that is our reading. The search
itself is in ``_lsamd_search.py``, the training in ``_lsamd_training.py``, its data in ``_lsamd_data.py``.

The paper varies depth alone; width comes from the shared width transform (``transforms.py``) and is our addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.data import Images
from learngene_hub.errors import SettingsError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._lsamd_search import ADAPTERS, rank_positions
from learngene_hub.methods._whole import require_same
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import StateDir, Step

_CHOICES = {
    "adapter": ADAPTERS,
    "search": ("gumbel", "spos_ea"),
    "select": ("frequency", "even"),
    "fill": ("nearest", "random"),
    "repeat": transforms.REPEATS,
    "form": transforms.FORMS,
    "precision": ("fp32", "bf16", "fp16"),
}
_SHARES = (
    "held_out", "warmup_share", "search_share", "specific_share", "alone", "shallow", "zoom", "average", "blend",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lsamd:
    """The settings of LSAMD; learning rates are those of the whole step, whatever its size."""

    name: ClassVar[str] = "lsamd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2605.08209"
    note: ClassVar[str] = (
        "Only the paper's abstract could be read: whatever is more exact than that is this project's reading. "
        "A depth beyond the stored blocks repeats them; the setting `repeat` says what the copies write."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "tail", "search", "width"})
    growth: ClassVar[frozenset[str]] = frozenset({"select", "fill", "repeat", "form"})

    # The super ancestor.
    adapter: str = "bottleneck"  # a data set's adapter: bottleneck, or linear
    adapter_rank: int = 0  # hidden units of a bottleneck; 0: 16 up to width 384, 64 above
    allow_skip: bool = False  # a third candidate per position: no block at all
    freeze_base: bool = False  # leave the ancestor's blocks as they are
    # The search.
    search: str = "gumbel"  # gumbel: bilevel straight-through; spos_ea: uniform sampling, then evolution per data set
    epochs: int = 50  # passes over the largest data set
    steps_per_epoch: int = 0  # updates; 0: as many as one pass over the largest data set takes
    batch_size: int = 512  # images per update, shared among the data sets as the square roots of their sizes
    base_lr: float = 5e-5  # peak, of the base blocks, stem and last norm
    lr: float = 5e-4  # peak, of specific blocks, adapters and heads
    weight_decay: float = 0.05  # of tensors of two and more dimensions
    clip: float = 1.0  # norm of the gradient
    alpha_lr: float = 3e-3  # Adam, of the path logits
    alpha_every: int = 1  # updates between two steps of the path logits
    held_out: float = 0.2  # share of each data set that only the path logits see
    warmup_share: float = 0.2  # phase A: uniform paths
    search_share: float = 0.6  # phase B: bilevel; the rest trains the found paths
    tau_start: float = 5.0  # temperature of the Gumbel softmax, falling exponentially
    tau_end: float = 0.1  # what it falls to
    specific_share: float = 0.35  # s*: the dual control steers the mean share of specific blocks to it
    control_rate: float = 0.05  # eta of the dual control, per epoch
    control_limit: float = 0.5  # bound of |lambda|
    entropy: float = 0.01  # bonus in the first half of phase B
    alpha_epochs: int = 10  # the paths are the argmax of alpha averaged over the last epochs of phase B
    # What keeps what the ancestor knew (0: off, as in the paper's abstract).
    distil: float = 0.0  # beta: weight of KL(ancestor || path), on images that the ancestor saw at ``distil_size``
    distil_on: tuple[str, ...] = ()  # the data sets that it is computed on
    distil_size: int = 224  # pixels at which the ancestor sees them
    distil_limit: int = 0  # images per data set that the ancestor sees; 0: all
    alone: float = (
        0.0  # share of the losses on the base blocks alone, without a path; then KL on these alone (addition)
    )
    shallow: float = 0.0  # share of those on a part of the base blocks, as a descendant of a random depth has
    zoom: float = 0.0  # share of those on images of twice the size
    average: float = 0.0  # decay per update of a running mean of the base's weights, stored instead of the last; 0: off
    blend: float = 1.0  # what is stored: ancestor + blend (trained - ancestor) (WiSE-FT, Wortsman et al., CVPR 2022)
    flip: bool = True  # mirror images at random
    crop_padding: int = 4  # pixels by which a random crop moves
    precision: str = "fp32"  # of the training: fp32, bf16, fp16
    seed: int = 0  # of every random draw
    # Extraction.
    keep: int = 0  # K blocks kept; 0: all that at least half of the data sets chose, and no fewer than 3
    # Growth.
    select: str = "frequency"  # which blocks a smaller depth takes: the most frequent, or evenly spaced ("base-even")
    fill: str = (
        "nearest"  # what a larger depth repeats: the nearest block, or fresh blocks between ("vanilla learngene")
    )
    repeat: str = "share"  # a block's copies: "share" its update, "copy" all of it; "identity": the first alone writes
    form: str = "copy"  # the width transform's form

    def __post_init__(self) -> None:
        names = self.distil_on
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise SettingsError(f"distil_on {names!r:.60} asked; it is a list of names")
        object.__setattr__(self, "distil_on", tuple(self.distil_on))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; there are {', '.join(known)}")
        for name in ("epochs", "batch_size", "alpha_every", "alpha_epochs", "distil_size"):
            _require(name, getattr(self, name), at_least=1, whole=True)
        for name in ("keep", "steps_per_epoch", "adapter_rank", "crop_padding", "distil_limit", "seed"):
            _require(name, getattr(self, name), at_least=0, whole=True)
        for name in ("base_lr", "lr", "alpha_lr", "weight_decay", "distil", "control_rate", "control_limit", "entropy"):
            _require(name, getattr(self, name), at_least=0)
        for name in _SHARES:
            _require(name, getattr(self, name), at_least=0, at_most=1)
        for name in ("tau_start", "tau_end", "clip"):
            _require(name, getattr(self, name), at_least=0)
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it must be above 0")
        if self.allow_skip and self.search == "spos_ea":
            raise SettingsError(
                "allow_skip asked with search 'spos_ea', which knows two candidates; 'gumbel' knows three"
            )
        if self.warmup_share + self.search_share > 1:
            raise SettingsError("warmup_share and search_share asked; together they are at most 1")

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
    ) -> Learngene:
        """The learngene of ``ancestor`` found on the data sets ``data``, all of one image size.

        Looks at activations and gradients itself only through the losses of ``fit``. The position embeddings are
        trained only when the images have the ancestor's own size: otherwise they are resampled for training and stored
        as they were, because a descendant may have any image size (our reading).

        Args:
            facts: ``name``, ``sha256``, ``license`` and ``source`` of the ancestor.
            watch: is handed the steps of ``fit`` and passes them on: a progress bar, a log.
            state_dir: where the training keeps its state and the ancestor's logits, and goes on if they are there.

        Raises:
            SettingsError: fewer than two data sets, or sets of different sizes.
            ShapeError: the ancestor is no plain ViT.
        """
        from learngene_hub.methods._lsamd_training import train

        native = ViTShape.of(ancestor)
        found = train(self, ancestor, native, data, preprocessing, watch, state_dir)
        ranked = rank_positions(found.frequency.tolist(), found.probability.tolist())
        count = self.keep or max(3, sum(f >= 0.5 for f in found.frequency.tolist()))
        count = min(count, native.depth)
        even = transforms.even_positions(native.depth, count)
        kept = sorted(ranked[:count]) if self.select == "frequency" else list(even)
        state = found.state
        tensors = {f"stem.{key}": state[key] for key in sorted(state) if key in transforms.STEM_KEYS}
        tensors |= {f"block.{i}.{key}": state[f"blocks.{i}.{key}"] for i in kept for key in transforms.BLOCK_KEYS}
        norm = "norm" if native.pool == "token" else "fc_norm"  # timm's name for it after average pooling
        tensors |= {f"tail.norm.{kind}": state[f"{norm}.{kind}"] for kind in ("weight", "bias")}
        tensors |= {
            "search.alpha": found.alpha,
            "search.frequency": found.frequency,
            "search.paths": found.paths.float(),
            "search.probability": found.probability,
        }
        return Learngene(
            tensors={name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            method=self.name,
            settings={key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()},
            shape=native,
            reach=_reach(native),
            ancestor=dict(facts),
            preprocessing=preprocessing,
            license=str(facts.get("license", "")),
            provenance=found.provenance,
        )

    def positions(self, learngene: Learngene, depth: int) -> tuple[int | None, ...]:
        """The ancestor's position of each block of a descendant; None for a fresh block (fill "random").

        Up to the number kept: with "frequency" the best ``depth`` of the kept, with "even" evenly spaced ones of them.
        """
        native = learngene.shape.depth
        kept = transforms.stored_positions(learngene.tensors)
        if depth <= len(kept):
            if self.select == "even":
                return tuple(kept[i] for i in transforms.even_positions(len(kept), depth))
            search = learngene.group("search")
            ranked = rank_positions(search["frequency"].tolist(), search["probability"].tolist())
            return tuple(sorted([i for i in ranked if i in kept][:depth]))
        if self.fill == "nearest":
            return transforms.nearest_positions(kept, native, depth)
        places: list[int | None] = [None] * depth
        for rank, place in enumerate(transforms.relative_positions(kept, native, depth)):
            places[place] = kept[rank]
        return tuple(places)

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head, and the blocks between with fill "random".

        Differentiable in the learngene's tensors. At the native width and a depth equal to the number kept, every
        tensor is the stored one.

        Raises:
            ShapeError: something other than depth, width, image size, input channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        resize = transforms.Resize.of(learngene.group("width"), native, shape, self.form)
        stem = resize.stem(learngene.group("stem"))
        state: dict[str, Tensor | None] = {
            key: transforms.adapt_channels(tensor, shape.in_chans) if key == "patch_embed.proj.weight" else tensor
            for key, tensor in stem.items()
        }
        side, prefix = shape.image_size // shape.patch, int(shape.class_token)
        state["pos_embed"] = transforms.resample_positions(stem["pos_embed"], side, prefix)
        blocks = {i: learngene.group(f"block.{i}") for i in transforms.stored_positions(learngene.tensors)}
        positions = self.positions(learngene, shape.depth)
        for place, position in enumerate(positions):
            part: Mapping[str, Tensor | None] = dict.fromkeys(transforms.BLOCK_KEYS)
            if position is not None:
                resized = resize.block(blocks[position], position)
                part = transforms.repeated(resized, positions, place, self.repeat)
            state |= {f"blocks.{place}.{key}": tensor for key, tensor in part.items()}
        norm = "norm" if shape.pool == "token" else "fc_norm"
        tail = resize.norm({k: learngene.tensors[f"tail.norm.{k}"] for k in ("weight", "bias")})
        state |= {f"{norm}.{key}": tensor for key, tensor in tail.items()}
        return state | (dict.fromkeys(transforms.HEAD_KEYS) if shape.classes else {})

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        transforms.check_parts(shapes, native, searched=True)


def _reach(native: ViTShape) -> Reach:
    """Twice the ancestor's depth, and the widths that whole heads allow up to four times its own."""
    step = native.head_dim
    return Reach(depths=(min(2, native.depth), 2 * native.depth), widths=(step, 4 * native.width, step))


def _require(name: str, value: float, *, at_least: float, at_most: float | None = None, whole: bool = False) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int if whole else (int, float))
        or not at_least <= value < math.inf
    ):
        raise SettingsError(f"{name} {value!r} asked; {at_least} is the least that works")
    if at_most is not None and value > at_most:
        raise SettingsError(f"{name} {value!r} asked; {at_most} is the most that works")

"""LeTs: a small ViT trained together with the linear maps that make it a large one; only the large one sees data.

Learngene = a ViT of L_g layers of width D_g (randomly initialised), width maps F and depth maps G. With E(F) = [I ; F]
(new units are linear combinations of old ones, which stay as they are) learngene layer j becomes

    q   E(F_q^j) W E(F_emb)^T        proj  E(F_emb) W E(F_v^j)^T       norms, stem  E(F_emb) w
    fc1 E(F_ffn^j) W E(F_emb)^T      fc2   E(F_emb) W E(F_ffn^j)^T     classifier   W E(F_cls)^T

(k, v as q; biases as their outputs), and layer i of the auxiliary of L_a layers, in group g = i div (2 L_a / L_g), is

    theta_i[m] = G[c(i), m, 0] theta~_2g[m] + G[c(i), m, 1] theta~_2g+1[m]

per module m (norm1, q, k, v, proj, norm2, fc1, fc2), weights and biases with coefficients of their own; two
neighbouring layers share a row c(i). The auxiliary learns from a teacher's predictions alone. Position embeddings are
learned at its full width. A descendant takes rows of F, the same along every axis that they belong to, and for each of
its layers a pair and a row of G; with the leading rows, its tensors are the leading parts of the auxiliary's.

Source: Xia, Zu, Yang, Geng, "Initializing Variable-sized Vision Transformers from Learngene with Learnable
Transformation", NeurIPS 2024: its abstract and captions, and its released code, github.com/eddiexia98/LeTs, which runs
one configuration (8 layers of 384 in 16 of 768, growth to 12 layers by the leading rows). Our reading: other depths,
what "step", "random" and "magnitude" (which the paper names) select, KL as a mean over the batch instead of over batch
and classes, a cosine that ends at 0. Our additions: the scheme "preserving", the depth scheme "alternate",
``start="ancestor"``, ``teacher="once"``. RandAugment, random resized crops, repeated augmentation and the running mean
of the weights, of which nothing is stored, are left out.

"preserving" starts as the shared width transform's copies (``transforms.py``): new unit i is old unit i mod n, and what
is read of a unit of c copies is divided by c, then and ever after. At integer multiples of the learngene's width the
auxiliary then begins with the function of its learngene at the same depth. Under it a narrower descendant is no leading
part, because its units have fewer copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int
from learngene_hub.data import Images
from learngene_hub.errors import ArtefactError, SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _lesson
from learngene_hub.methods._distillation import Distillation
from learngene_hub.methods._lets_blocks import grown_blocks
from learngene_hub.methods._lets_maps import Groups, Growth, narrow, tensor_shapes, without_autocast
from learngene_hub.methods._whole import assemble, require_choice, require_same
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import StateDir, Step

_CHOICES = {
    "scheme": ("rand", "sel", "sel_noisy", "preserving"),
    "depth_scheme": ("stackbert_noisy", "alternate"),
    "select": ("continuous", "step", "random", "magnitude"),
    "norm": ("l1", "l2"),
    "keep": ("top", "bottom"),
    "head": ("inherit", "fresh"),
}


@dataclass(frozen=True, kw_only=True)
class Lets(Distillation):
    """The settings of LeTs: the distillation's, with defaults of their own, the learngene's, and the maps'."""

    name: ClassVar[str] = "lets"
    paper: ClassVar[str] = "https://openreview.net/forum?id=7j6xgGj5lF"
    note: ClassVar[str] = (
        "Only abstract, captions and released code could be read. It never grows deeper or wider than its auxiliary."
    )
    groups: ClassVar[frozenset[str]] = frozenset({"stem", "block", "tail", "head", "map", "depth"})

    # The auxiliary; 0, or "ancestor": what the ancestor has, which is then a plain ViT.
    depth: int = 16
    width: int = 768
    head_dim: int = 64  # of the auxiliary, the learngene and every descendant
    mlp_ratio: float = 4.0
    patch: int = 16
    layout: str = "avg"  # the average of the patch tokens without a class token, as published
    # The learngene; its weights start random or, with ``start`` "ancestor", as blocks and leading units of a plain ViT.
    learngene_depth: int = 8
    learngene_width: int = 384
    # The maps' initial values.
    scheme: str = "rand"  # F: rows of positive noise with sum 1; one old unit each ("sel"), with noise ("sel_noisy")
    noise: float = 0.03  # largest entry of the noise, in F and in G
    depth_scheme: str = "stackbert_noisy"  # G: nearly the first of each pair; "alternate": rows in turn (addition)
    # Training, where it differs from the shared defaults; G does not decay.
    epochs: int = 300
    warmup: float = 5 / 300  # share of all updates
    drop_path: float = 0.1
    teacher: str = "live"  # "once" is our addition
    color: float = 0.4
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    # Growth.
    select: str = "continuous"  # the rows of F: the leading ones, step-wise, random, by magnitude
    first: int = 0  # "step": the row it starts from
    stride: int = 2  # "step": from one row to the next
    select_seed: int = 0  # "random"
    norm: str = "l1"  # "magnitude": of a row
    keep: str = "top"  # "magnitude": the largest rows, or those at the "bottom"
    layer_map: tuple[int, ...] = ()  # auxiliary layer whose pair each layer takes, for the depth of this length
    coefficients: tuple[int, ...] = ()  # and the first auxiliary layer of the row of G that it takes
    head: str = "inherit"  # the classifier, where there are as many classes as the teacher has; or "fresh"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_map", "coefficients"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(type(value) is int for value in values):
                raise SettingsError(f"{name} {values!r:.60} asked; it is a list of layers, such as [0, 1, 4]")
            object.__setattr__(self, name, tuple(values))
        if len(self.layer_map) != len(self.coefficients):
            raise SettingsError(
                f"layer_map of {len(self.layer_map)} and coefficients of {len(self.coefficients)} layers asked; "
                f"they have one entry per layer each"
            )
        for name, known in _CHOICES.items():
            require_choice(name, getattr(self, name), known)
        for name in ("learngene_depth", "learngene_width", "stride"):
            require_int(name, getattr(self, name), at_least=1, error=SettingsError)
        for name in ("depth", "first", "select_seed"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        if not (is_number(self.noise) and 0 <= self.noise <= 1):
            raise SettingsError(f"noise {self.noise!r} asked; it is a number from 0 to 1")

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Refuse an ancestor that lacks what is to be its own (ShapeError)."""
        _lesson.require_ancestor(self, ancestor, self.depth)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
        teacher: Teacher | None = None,
    ) -> Learngene:
        """The learngene that learns, inside its auxiliary, from what ``teacher`` (the ancestor) predicts on the images
        of ``data``.

        ``ancestor`` is any model with logits; a plain ViT only where the auxiliary's sizes or the initial weights are
        to be the ancestor's. The native shape of the learngene is the auxiliary's.

        Raises:
            SettingsError: no images, a teacher that gives no logits for them, or ``labels`` asked that are not its
                classes.
            DataError: images of different sizes, or of other channels than the teacher's.
            ShapeError: an auxiliary or a learngene that cannot be, or an ancestor that is no plain ViT where it must.
        """
        from learngene_hub.methods._lets_training import train

        found = train(self, ancestor, data, preprocessing, watch, state_dir, teacher)
        return Learngene(
            tensors=found.tensors,
            method=self.name,
            settings={key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()},
            shape=found.native,
            reach=_reach(found.native, found.small),
            ancestor=dict(facts),
            preprocessing=preprocessing,
            license=str(facts.get("license", "")),
            provenance=found.provenance,
        )

    def layers(self, native: ViTShape, small: ViTShape, depth: int) -> tuple[tuple[int, int], ...]:
        """(pair of learngene layers, row of G) of each layer of a descendant: ``layer_map`` and ``coefficients`` at the
        depth that they list, the general rule at any other.

        Raises:
            ShapeError: an entry of the lists that the auxiliary does not have.
        """
        groups = Groups.of(native.depth, small.depth)
        return (
            groups.listed(self.layer_map, self.coefficients) if depth == len(self.layer_map) else groups.places(depth)
        )

    def expand(self, learngene: Learngene, shape: ViTShape) -> dict[str, Tensor | None]:
        """Every parameter of a ViT of ``shape``; None: the head, where it is not inherited.

        Differentiable in the learngene's tensors, and never in a lower precision than float32. Neighbouring layers that
        share everything share their tensors.

        Raises:
            ShapeError: deeper or wider than the auxiliary, narrower than the learngene, fewer layers than pairs, or
                something other than depth, width, image size, input channels or classes differs.
        """
        native = learngene.shape
        require_same(native, shape, self.name)
        small = narrow(native, _depth(learngene.tensors), learngene.tensors["stem.patch_embed.proj.bias"].shape[0])
        _reach(native, small).check(shape)
        with without_autocast(learngene.tensors["depth.weight"].device):
            return self._expanded(learngene, small, shape)

    def _expanded(self, learngene: Learngene, small: ViTShape, shape: ViTShape) -> dict[str, Tensor | None]:
        native = learngene.shape
        growth = Growth(self, learngene.group("map"), native, small, shape)
        places = self.layers(native, small, shape.depth)
        blocks = grown_blocks(growth, learngene, list(dict.fromkeys(places)))
        stem, stream = learngene.group("stem"), growth.stream
        grown = {name: stream.make(stem[name]) for name in ("patch_embed.proj.weight", "patch_embed.proj.bias")}
        grown["pos_embed"] = growth.positions(stem["pos_embed"])
        if native.class_token:
            grown["cls_token"] = stream.make(stem["cls_token"].flatten()).reshape(1, 1, -1)
        norm = {kind: stream.make(learngene.tensors[f"tail.norm.{kind}"]) for kind in ("weight", "bias")}
        state = assemble(shape, grown, [blocks[place] for place in places], norm)
        if self.head == "inherit" and shape.classes == native.classes:
            state["head.weight"] = growth.classifier.read(learngene.tensors["head.weight"])
            state["head.bias"] = learngene.tensors["head.bias"]
        return state

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: ViTShape) -> None:
        """Refuse tensors that no learngene with an auxiliary of this native shape has.

        Raises:
            ArtefactError: a tensor is missing, unknown, or of another shape.
        """
        stem = shapes.get("stem.patch_embed.proj.bias", ())
        try:
            if not stem or native.classes < 1:
                raise ArtefactError("no stem.patch_embed.proj.bias, or no classes; a learngene of lets has both")
            want = tensor_shapes(native, narrow(native, _depth(shapes), stem[0]))
        except ShapeError as error:
            raise ArtefactError(f"no learngene of lets: {error}") from error
        if missing := sorted(want.keys() - shapes.keys()):
            raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unknown := sorted(shapes.keys() - want.keys()):
            raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
        for name, shape in shapes.items():
            if tuple(shape) != want[name]:
                raise ArtefactError(
                    f"tensor {name} is {list(shape)}; an auxiliary of {native} needs {list(want[name])}"
                )


def _depth(names: Mapping[str, Any]) -> int:
    """Layers of the learngene that has these tensors."""
    return len(transforms.stored_positions(names))


def _reach(native: ViTShape, small: ViTShape) -> Reach:
    """From one layer per pair to the auxiliary's depth, from the learngene's width to the auxiliary's."""
    pairs = Groups.of(native.depth, small.depth).count
    return Reach(depths=(pairs, native.depth), widths=(small.width, native.width, native.head_dim))

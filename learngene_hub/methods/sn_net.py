"""SN-Net: pre-trained ViTs of one family, stitched into networks that run some blocks of one, some of another.

Learngene = the pool: the anchors (pre-trained ViTs of rising width, whole), and linear layers between neighbours. Its
descendants are the anchors and every route from the blocks of one into those of the next (``_stitching.py``): 71 for
three anchors of 12 blocks. They are of fixed sizes and not trained further. The linear layers start from least squares
over the features of one batch; then the pool is trained, one route per update, with
    labels CE(y) + distil CE(class that the teacher names).

``direction`` "both" is version 2: two anchors, the larger r times as deep, routes in both directions and with two
switches: 134 for 12 and 24 blocks. Its layers there are frozen and corrected by low rank; here they are trained
themselves (our reading), and its sampling by cost is ``sampling`` "flops", with ``flops_gap``.

SN-Net needs several pre-trained anchors. ``stitch`` takes them as they are. ``extract`` is handed one ancestor (our
reading): it is the widest anchor, unchanged, and the narrower ones are cut out of it (the leading heads, channels and
hidden units; evenly spaced blocks where ``depths`` asks for fewer) and trained for ``first_epochs`` with the same loss,
before they are stitched. The published teacher is none of the anchors (RegNetY-16GF): give it as ``teacher``; without
one the ancestor teaches.

Sources: Pan, Cai, Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586; Pan, Liu, He,
Cai, Zhuang, "Stitched ViTs are Flexible Vision Backbones" (version 2), arXiv:2307.00154; and the released code of both.
Published for DeiT-Ti, -S and -B: 50 epochs at batch 1024, learning rate 1e-4, mixing, all parameters tuned. Only plain
ViTs are stitched here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import require_int
from learngene_hub.data import Images, seed_of
from learngene_hub.errors import SettingsError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._lesson import Log, Watch, teacher_facts
from learngene_hub.methods._stitch_growth import GROUPS
from learngene_hub.methods._stitch_net import StitchNet, resized
from learngene_hub.methods._stitch_settings import Stitching
from learngene_hub.methods._stitch_training import (
    Draws,
    Lesson,
    finish,
    make_lesson,
    pool_loss,
    run,
    start_stitches,
    train_pool,
)
from learngene_hub.methods._stitching import Route, both_ways, one_way
from learngene_hub.methods._whole import last_norm, require_choice
from learngene_hub.shape import IMAGENET, Preprocessing, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import StateDir, logits_of

ALIKE = ("head_dim", "patch", "image_size", "in_chans", "classes", "class_token", "pool")  # of the anchors of a pool


@dataclass(frozen=True, kw_only=True)
class SnNet(Stitching):
    """The settings of SN-Net."""

    name: ClassVar[str] = "sn-net"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.06586"
    note: ClassVar[str] = (
        "Descendants are of the fixed sizes of the pool's routes. Anchors cut out of one ancestor are an addition of "
        "this project; the paper stitches a family of pre-trained models."
    )
    groups: ClassVar[frozenset[str]] = GROUPS
    nearest: ClassVar[bool] = True

    batch_size: int = 1024
    soft: bool = False
    label_smoothing: float = 0.1
    widths: tuple[int, ...] = ()  # channels of the anchors, rising; none: a quarter, a half and all of the ancestor's
    depths: tuple[int, ...] = ()  # blocks of each; none: the ancestor's
    direction: str = "up"  # routes from narrow to wide; or "both" (version 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("direction", self.direction, ("up", "both"))
        if self.init == "transpose":
            raise SettingsError(
                "init 'transpose' asked; sn-net learns no maps to transpose: 'least-squares' would work"
            )
        for name in ("widths", "depths"):
            numbers = getattr(self, name)
            if not isinstance(numbers, (list, tuple)):
                raise SettingsError(f"{name} {numbers!r:.60} asked; it is a list of numbers, such as [192, 384, 768]")
            object.__setattr__(self, name, tuple(numbers))
            for number in numbers:
                require_int(name, number, at_least=1, error=SettingsError)
        if self.widths and (len(self.widths) < 2 or list(self.widths) != sorted(set(self.widths))):
            raise SettingsError(f"widths {list(self.widths)} asked; two or more that rise, such as [192, 384, 768]")
        if self.depths and self.widths and len(self.depths) != len(self.widths):
            raise SettingsError(
                f"{len(self.depths)} depths asked for {len(self.widths)} widths; one for each would work"
            )
        if self.direction == "both" and len(self.widths) not in (0, 2):
            raise SettingsError(f"direction 'both' asked with {len(self.widths)} widths; two anchors would work")

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Watch = iter,
        state_dir: StateDir | None = None,
        teacher: Teacher | None = None,
    ) -> Learngene:
        """The pool of ``ancestor`` and narrower anchors cut out of it, trained on all images of ``data``, of one size.

        The native shape is the widest anchor's, at the size of the images. ``watch`` is called once for each anchor
        that is trained first, and once for the pool.

        Raises:
            SettingsError: no data, settings that the ancestor does not allow, labels or a teacher of other classes.
            DataError: images of different sizes, of other channels than the ancestor's, or none.
            ShapeError: the ancestor is no plain ViT.
        """
        own = ViTShape.of(ancestor)
        shapes = self.anchors(own)
        self.routes([shape.depth for shape in shapes])
        told = {} if teacher is None or teacher.model is ancestor else teacher_facts(teacher)
        lesson = make_lesson(self, teacher or Teacher(ancestor), data, own, preprocessing, self.name, told)
        whole = resized(ancestor, lesson.size, drop_path=self.drop_path)
        anchors, logs, flops, asked = [], [], 0, lesson.teacher.flops if lesson.teacher else 0
        for number, shape in enumerate(shapes):
            if shape == own:
                anchors.append(whole)
                continue
            anchors.append(cut(whole, replace(shape, image_size=lesson.size), drop_path=self.drop_path))
            state = state_dir and replace(state_dir, path=state_dir.path / f"anchor-{number}")
            logs.append(self._train_anchor(anchors[-1], lesson, watch, state))
            flops += logs[-1].images * replace(shape, image_size=lesson.size).flops()
        taught = asked * sum(log.images for log in logs)
        return self.stitched(anchors, lesson, watch, state_dir, logs, (flops, taught), facts)

    def _train_anchor(self, anchor: nn.Module, lesson: Lesson, watch: Watch, state: StateDir | None) -> Log:
        recipe = self.recipe(first=True)

        def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return pool_loss(self, lesson, logits_of(model(batch[0])), *batch, recipe.label_smoothing)

        return run(anchor, loss, recipe, lesson, watch, state)

    def stitched(
        self,
        anchors: Sequence[nn.Module],
        lesson: Lesson,
        watch: Watch,
        state_dir: StateDir | None,
        logs: Sequence[Log],
        flops: tuple[int, int],
        facts: Mapping[str, Any],
    ) -> Learngene:
        """The pool of these anchors, which it trains in place; ``logs`` and ``flops`` are of what went before."""
        shapes = dict(enumerate(ViTShape.of(anchor) for anchor in anchors))
        routes = self.routes([shape.depth for shape in shapes.values()])
        net = StitchNet(dict(enumerate(anchors)), routes, seed=seed_of("stitches", self.seed))
        if self.init == "least-squares":
            start_stitches(self, net, lesson)
        draws = Draws.of(self, routes, shapes)
        state = state_dir and replace(state_dir, path=state_dir.path / "pool")
        log = train_pool(self, net, draws, lesson, watch, state)
        return finish(self, self.name, net, draws, lesson, {"first": logs, "pool": [log]}, flops, facts)

    def routes(self, depths: Sequence[int]) -> tuple[Route, ...]:
        """The routes through anchors of these depths.

        Raises:
            SettingsError: both directions through more than two anchors, or depths that no routes lead through.
        """
        if min(depths) < 2:
            raise SettingsError(f"depths {list(depths)} asked; 2 blocks are the least that can be stitched")
        try:
            if self.direction == "up":
                return one_way(dict(enumerate(depths)), nearest=True)
            if len(depths) == 2:
                return both_ways(depths[0], depths[1])
        except ShapeError as error:
            raise SettingsError(str(error)) from error
        raise SettingsError(f"direction 'both' asked with {len(depths)} anchors; two would work")

    def anchors(self, own: ViTShape) -> list[ViTShape]:
        """The shape of each anchor for an ancestor of shape ``own``.

        Raises:
            SettingsError: sizes that cannot be cut out of it.
        """
        if not own.classes:
            raise SettingsError(f"an ancestor without a classifier given; {self.name} stitches classifiers")
        parts = {max(1, own.heads // part) for part in ((4, 1) if self.direction == "both" else (4, 2, 1))}
        widths = self.widths or tuple(heads * own.head_dim for heads in sorted(parts))
        if len(widths) < 2:
            raise SettingsError(
                "an ancestor of one head given, which has no narrower anchor; `stitch` takes several ViTs"
            )
        depths = self.depths or (own.depth,) * len(widths)
        if len(depths) != len(widths):
            raise SettingsError(f"depths {list(depths)} asked for widths {list(widths)}; one for each would work")
        for name, numbers in (("width", widths), ("depth", depths)):
            for number in numbers:
                if number > getattr(own, name) or (name == "width" and number % own.head_dim):
                    near = f"up to {own.width} in steps of {own.head_dim}" if name == "width" else f"up to {own.depth}"
                    raise SettingsError(f"{name} {number} asked of an anchor; those that can be cut out are {near}")
        return [replace(own, depth=d, width=w, heads=w // own.head_dim) for d, w in zip(depths, widths, strict=True)]


def cut(ancestor: nn.Module, shape: ViTShape, *, drop_path: float = 0.0) -> Any:
    """The ViT of ``shape`` cut out of a plain timm ViT: evenly spaced blocks, the leading heads, channels and hidden
    units, and of its classifier what reads the leading channels."""
    own = ViTShape.of(ancestor)
    given = {name: tensor.detach().cpu().float().clone() for name, tensor in ancestor.state_dict().items()}
    resize = transforms.Resize.of({}, own, shape, "copy")
    state = resize.stem({key: given[key] for key in transforms.STEM_KEYS if key in given})
    for place, i in enumerate(transforms.even_positions(own.depth, shape.depth)):
        block = resize.block({key: given[f"blocks.{i}.{key}"] for key in transforms.BLOCK_KEYS}, i)
        state |= {f"blocks.{place}.{key}": tensor for key, tensor in block.items()}
    norm = last_norm(own)
    kept = resize.norm({kind: given[f"{norm}.{kind}"] for kind in ("weight", "bias")})
    state |= {f"{norm}.{kind}": tensor for kind, tensor in kept.items()}
    state |= {
        "head.weight": transforms.read_columns(given["head.weight"], resize.stream),
        "head.bias": given["head.bias"],
    }
    model = shape.build(drop_path_rate=drop_path)
    model.load_state_dict(state)
    return model.eval()


def stitch(
    anchors: Sequence[nn.Module],
    data: Mapping[str, Images],
    *,
    method: SnNet | None = None,
    teacher: Teacher | nn.Module | None = None,
    facts: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing = IMAGENET,
    watch: Watch = iter,
    state_dir: StateDir | str | Path | None = None,
) -> Learngene:
    """The pool of several pre-trained ``anchors``, as the paper has it; they are copied, and stay as they are.

    Args:
        anchors: plain timm ViTs of rising width with one head_dim, patch, pooling and number of classes, such as
            DeiT-Ti, -S and -B. Image sizes may differ from the data's: positions are resampled.
        data: name -> images, of one size.
        method: settings; ``widths``, ``depths`` and those of the first stage are of no account.
        teacher: images -> logits of as many classes; None: the widest anchor as it is given.
        facts: ``name``, ``sha256``, ``license`` and ``source`` of the anchors.
        watch, state_dir: as in ``factory.extract``.

    Raises:
        SettingsError: fewer than two anchors, or anchors, labels or a teacher that do not go together.
        DataError: images of different sizes, of other channels than the anchors', or none.
        ShapeError: an anchor is no plain ViT.
    """
    method = method or SnNet()
    if len(anchors) < 2:
        raise SettingsError(f"{len(anchors)} anchors given; two or more would work")
    shapes = [ViTShape.of(anchor) for anchor in anchors]
    widths = [shape.width for shape in shapes]
    if widths != sorted(set(widths)):
        raise SettingsError(f"anchors {', '.join(map(str, shapes))} given; their widths rise, each above the last")
    for name in (name for name in ALIKE if name != "image_size"):
        values = [getattr(shape, name) for shape in shapes]
        if len(set(values)) > 1 or (name == "classes" and not values[0]):
            raise SettingsError(f"anchors of {name} {values} given; all have one, and a classifier")
    method.routes([shape.depth for shape in shapes])
    chosen = teacher if isinstance(teacher, Teacher) else Teacher(anchors[-1] if teacher is None else teacher)
    told = {} if chosen.model is anchors[-1] else teacher_facts(chosen)
    lesson = make_lesson(method, chosen, data, shapes[-1], preprocessing, method.name, told)
    known = {"name": "", "sha256": "", "license": "", "source": ""} | dict(facts or {})
    copies = [resized(anchor, lesson.size, drop_path=method.drop_path) for anchor in anchors]
    return method.stitched(copies, lesson, watch, StateDir.of(state_dir), [], (0, 0), known)

"""The arms of the transfer comparison, and one run of one of them.

An arm is a way to initialise a ViT of a shape:

``rows``        the ancestor itself, without any training: evenly spaced blocks, units copied cyclically, what reads a
                unit that has c copies reads 1 / c of each; the leading units below the native width
``random``      timm's own initialisation
``lsamd-base``  the learngene as it is
``base-even``   the same learngene, but with evenly spaced blocks of it: the control for the search
``base-frequent``  the same with the blocks that the search found most often

``width.py`` compares ways to another width, all from the same learngene:

``base-balanced``, ``base-exact``  another form of the width transform (``learngene_hub/transforms.py``)
``base-stirred``                   ``exact``, whose silent new channels are written with small noise instead of zeros
``base-fast``, ``base-exact-fast`` the copies and ``exact`` at twice the learning rate
``base-tilted``                    the copies of a unit with uneven shares: the same function, but not one gradient
``base-norms``                     the copies, with norms learned for that width (``learngene_hub/widening.py``)
``base-leading``                   below the native width: the leading units of every axis
``base-spaced``                    evenly spaced units, as weight selection takes them (Xu et al., ICLR 2024)
``base-weights``                   the units with the largest weights
``base-scores``                    the units that mattered most on images
``base-rows``                      learned rows and norms at every width of 64 and 128

One run is 3 epochs on one data set at 64 px with the one recipe that stands here, and its accuracy after each. Whatever
the arm, the seed gives one order of the images, and one head where the arm inherits everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from learngene_hub._compare_run import machine as machine
from learngene_hub.data import Images, load_images
from learngene_hub.factory import evaluate, expand, finetune
from learngene_hub.learngene import Learngene
from learngene_hub.shape import IMAGENET, Reach, ViTShape
from learngene_hub.training import Recipe
from learngene_hub.transforms import BLOCK_KEYS, STEM_KEYS, stored_positions

ANCESTOR = "deit_tiny_patch16_224"  # the timm name of what --ancestor holds
HEAD_DIM = 64
SIZE = 64  # pixels
EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Where the weights come from, what is changed of that, and the peak learning rate."""

    source: str = "learngene"  # a field of Sources; "": none, random
    rate: float = 3e-4
    variant: str = ""  # NAME: the learngene NAME.safetensors among the variants, in place of the learngene
    change: Callable[[Learngene, int], Learngene] = lambda learngene, width: learngene
    tilt: float = 0.0  # uneven shares of the copies of a head or hidden unit: 1 - tilt to 1 + tilt, which average 1
    stir: float = 0.0  # noise on what is written to channels beyond the native ones, over the deviation of the others


def with_settings(**settings: str) -> Callable[[Learngene, int], Learngene]:
    """A change of the settings of growth."""
    return lambda learngene, width: dataclasses.replace(learngene, settings={**learngene.settings, **settings})


def recipe(arm: str, seed: int, precision: str = "fp32") -> Recipe:
    """The one recipe of every run: AdamW, one cycle, batches of 64, weight decay 0.05, no augmentation."""
    return Recipe(
        epochs=EPOCHS,
        lr=ARMS[arm].rate,
        batch_size=64,
        weight_decay=0.05,
        schedule="one-cycle",
        precision=precision,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of the comparison."""

    arm: str
    shape: str  # DEPTHxWIDTH
    set: str
    seed: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run of a job gave; a line of the CSV."""

    epoch_1: float  # test accuracy after each epoch, per cent
    epoch_2: float
    epoch_3: float
    params: int
    seconds: float  # of the whole run: growing, training, testing
    digest: str  # sha256 of what the weights came from: the learngene's, or the ancestor's file; empty for random
    numerics: str  # see ``numerics``
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Job)})


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: str  # folder with one folder per data set
    ancestor: str | None = None  # safetensors file of the timm model ANCESTOR
    learngene: str | None = None  # path, name of the registry, or Hub repository
    variants: str | None = None  # folder of learngenes that width.py made of it
    device: str = "cpu"
    limit: int | None = None  # training images of a data set, and half as many test images; None: all

    def digest(self, arm: str) -> str:
        """The sha256 of what ``arm`` inherits from."""
        if ARMS[arm].source == "ancestor":
            return file_digest(self.need("ancestor"))
        return open_learngene(self.origin(arm)).digest if ARMS[arm].source else ""

    def origin(self, arm: str) -> str:
        """The path or name of the learngene that ``arm`` is grown from."""
        if ARMS[arm].variant:
            return str(Path(self.need("variants")) / f"{ARMS[arm].variant}.safetensors")
        return self.need("learngene")

    def need(self, name: str) -> str:
        """The value of a field that an arm cannot do without."""
        value = getattr(self, name)
        if value is None:
            raise SystemExit(f"--{name} is missing: an arm that was asked for is grown from it")
        return value


def parse_shape(text: str) -> tuple[int, int]:
    """(depth, width) of "12x384"."""
    depth, _, width = text.partition("x")
    return int(depth), int(width)


@lru_cache(maxsize=4)
def file_digest(path: str) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def open_learngene(name: str) -> Learngene:
    """The learngene of this path or name, once per process."""
    return Learngene.from_pretrained(name)


@lru_cache(maxsize=2)
def open_ancestor(path: str) -> nn.Module:
    """The ancestor in float32, once per process."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(ANCESTOR, pretrained=False)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=True)
    return model.eval()


@lru_cache(maxsize=16)
def open_images(folder: str, split: str, limit: int | None = None) -> Images:
    """One split of a data set at SIZE pixels, decoded once per process."""
    return load_images(folder, split=split, size=SIZE, limit=limit)


def untrained(ancestor: nn.Module) -> Learngene:
    """The learngene that is ``ancestor`` itself, all its blocks equally good: nothing was trained or searched."""
    native = ViTShape.of(ancestor)
    state = {name: tensor.detach() for name, tensor in ancestor.state_dict().items()}
    tensors = {f"stem.{key}": state[key] for key in STEM_KEYS if key in state}
    tensors |= {f"block.{i}.{key}": state[f"blocks.{i}.{key}"] for i in range(native.depth) for key in BLOCK_KEYS}
    norm = "norm" if native.pool == "token" else "fc_norm"
    tensors |= {f"tail.norm.{kind}": state[f"{norm}.{kind}"] for kind in ("weight", "bias")}
    tensors |= {
        "search.alpha": torch.zeros(1, native.depth, 2),
        "search.frequency": torch.ones(native.depth),
        "search.paths": torch.zeros(1, native.depth),
        "search.probability": torch.ones(native.depth),
    }
    return Learngene(
        tensors=tensors,
        method="lsamd",
        settings={"select": "even", "fill": "nearest", "form": "copy"},
        shape=native,
        reach=Reach(depths=(1, 4 * native.depth), widths=(native.head_dim, 8 * native.width, native.head_dim)),
        ancestor={"name": ANCESTOR, "sha256": "", "license": "Apache-2.0", "source": ""},
        preprocessing=IMAGENET,
        license="Apache-2.0",
        provenance={},
    )


def leading(learngene: Learngene, width: int) -> Learngene:
    """Without anything that was measured or learned for other widths."""
    return _with_width(learngene, {})


def scored(learngene: Learngene, width: int) -> Learngene:
    """With the scores of its units alone."""
    return _with_width(learngene, {name: learngene.group("width")[name] for name in ("stream", "heads", "hidden")})


def spaced(learngene: Learngene, width: int) -> Learngene:
    """With scores that choose evenly spaced units of every axis at this width: unit floor(j n / n')."""
    native = learngene.shape

    def score(count: int) -> torch.Tensor:
        chosen = torch.zeros(count)
        part = count * width // native.width
        chosen[torch.arange(part) * count // part] = 1.0
        return chosen

    rows = {"heads": score(native.heads), "hidden": score(native.hidden)}
    return _with_width(
        learngene,
        {"stream": score(native.width), **{name: row.repeat(native.depth, 1) for name, row in rows.items()}},
    )


def heaviest(learngene: Learngene, width: int) -> Learngene:
    """With scores that are products of squared norms: of what makes a unit, and of what reads it. No images."""
    native, blocks = learngene.shape, learngene.group("block")
    scores = {
        "stream": torch.zeros(native.width),
        "heads": torch.zeros(native.depth, native.heads),
        "hidden": torch.zeros(native.depth, native.hidden),
    }
    for i in stored_positions(learngene.tensors):
        qkv, proj, fc1, fc2 = (
            blocks[f"{i}.{name}.weight"].float().square() for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        value = qkv[2 * native.width :].sum(1) * proj.sum(0)
        scores["heads"][i] = value.reshape(native.heads, -1).sum(1)
        scores["hidden"][i] = fc1.sum(1) * fc2.sum(0)
        scores["stream"] += (qkv.sum(0) + fc1.sum(0)) * (proj.sum(1) + fc2.sum(1))
    return _with_width(learngene, scores)


def _with_width(learngene: Learngene, width: dict[str, torch.Tensor]) -> Learngene:
    """The same learngene with these tensors in its group ``width``, and no others."""
    kept = {name: tensor for name, tensor in learngene.tensors.items() if not name.startswith("width.")}
    return dataclasses.replace(learngene, tensors=kept | {f"width.{name}": tensor for name, tensor in width.items()})


evenly = with_settings(select="even")

ARMS = {
    "rows": Arm(source="ancestor"),
    "random": Arm(source="", rate=1e-3),
    "lsamd-base": Arm(),
    "base-even": Arm(change=evenly),
    "base-frequent": Arm(change=with_settings(select="frequency")),
    "base-balanced": Arm(change=with_settings(form="balanced")),
    "base-exact": Arm(change=with_settings(form="exact")),
    "base-stirred": Arm(change=with_settings(form="exact"), stir=0.25),
    "base-fast": Arm(rate=6e-4),
    "base-exact-fast": Arm(change=with_settings(form="exact"), rate=6e-4),
    "base-tilted": Arm(tilt=0.25),
    "base-norms": Arm(variant="norms"),
    "base-leading": Arm(change=leading),
    "base-spaced": Arm(change=spaced),
    "base-weights": Arm(change=heaviest),
    "base-scores": Arm(change=scored),
    "base-rows": Arm(variant="rows"),
}
DEFAULT_ARMS = ("rows", "random", "lsamd-base", "base-even", "base-frequent")


def learngene_of(arm: str, sources: Sources, width: int) -> Learngene | None:
    """What the arm is grown from; None for random."""
    if not ARMS[arm].source:
        return None
    if ARMS[arm].source == "ancestor":
        learngene = untrained(open_ancestor(sources.need("ancestor")))
    else:
        learngene = open_learngene(sources.origin(arm))
    return ARMS[arm].change(learngene, width)


@torch.no_grad()
def tilt(model: nn.Module, native: ViTShape, width: int, by: float) -> None:
    """Multiply what each of the c copies of a head or hidden unit writes by factors from 1 - by to 1 + by."""
    count = width // native.head_dim
    for block in model.blocks:  # type: ignore[union-attr]  # timm's
        heads = shares(native.heads, count, by).repeat_interleave(native.head_dim)
        block.attn.proj.weight.mul_(heads)
        block.mlp.fc2.weight.mul_(shares(native.hidden, native.hidden * width // native.width, by))


def shares(native: int, count: int, by: float) -> torch.Tensor:
    """(count,) a factor per unit: 1 + by (2 r / (c - 1) - 1) for copy r of the c copies of its native unit."""
    unit, rank = torch.arange(count) % native, torch.arange(count) // native
    copies = torch.bincount(unit, minlength=native)[unit]
    return torch.where(copies > 1, 1 + by * (2 * rank / (copies - 1).clamp(min=1) - 1), 1.0)


@torch.no_grad()
def stir(model: nn.Module, native: int, share: float, seed: int) -> None:
    """Add noise to what is written to the channels from ``native`` on: ``share`` of the deviation of the others."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "patch_embed.proj.weight")):
            new, old = parameter[native:], parameter[:native]
        elif name in ("pos_embed", "cls_token"):
            new, old = parameter[..., native:], parameter[..., :native]
        else:
            continue
        new.add_(torch.randn(new.shape, generator=generator), alpha=share * float(old.std()))


def initialise(learngene: Learngene | None, depth: int, width: int, classes: int, seed: int) -> nn.Module:
    """The ViT of this shape for SIZE pixels: grown from ``learngene``, or from None drawn with ``seed``."""
    if learngene is not None:
        return expand(learngene, depth=depth, width=width, num_labels=classes, image_size=SIZE, seed=seed)
    shape = ViTShape(depth=depth, width=width, heads=width // HEAD_DIM, image_size=SIZE, classes=classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build()


def measure(job: Job, sources: Sources) -> Row:
    """One run of one job."""
    began = time.perf_counter()
    digest = sources.digest(job.arm)
    folder = str(Path(sources.data) / job.set)
    train = open_images(folder, "train", sources.limit)
    test = open_images(folder, "test", None if sources.limit is None else sources.limit // 2)
    depth, width = parse_shape(job.shape)
    learngene = learngene_of(job.arm, sources, width)
    model = initialise(learngene, depth, width, len(train.classes), job.seed)
    if learngene is not None and ARMS[job.arm].tilt:
        tilt(model, learngene.shape, width, ARMS[job.arm].tilt)
    if learngene is not None and ARMS[job.arm].stir:
        stir(model, learngene.shape.width, ARMS[job.arm].stir, job.seed)
    preprocessing = IMAGENET if learngene is None else learngene.preprocessing
    kept = {"preprocessing": preprocessing, "device": sources.device}
    accuracies = [
        evaluate(model, test, precision=job.precision, **kept).accuracy
        for step in finetune(model, train, recipe=recipe(job.arm, job.seed, job.precision), **kept)
        if step.epoch_done
    ]
    first, second, third = (round(accuracy, 4) for accuracy in accuracies)
    return Row(
        **asdict(job),
        epoch_1=first,
        epoch_2=second,
        epoch_3=third,
        params=sum(p.numel() for p in model.parameters()),
        seconds=round(time.perf_counter() - began, 2),
        digest=digest,
        numerics=numerics(job.precision, sources.device),
        machine=machine(sources.device),
    )


@lru_cache(maxsize=4)
def numerics(precision: str, device: str) -> str:
    """A fingerprint of how this machine and this code grow, train and test: of a tiny network after 6 updates on noise.

    It differs where as much as the rounding does, so rows with one fingerprint are sure to be comparable.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    noise = Images(pixels, torch.arange(128) % 2, ("even", "odd"), "noise")
    model = initialise(untrained(initialise(None, 3, 128, 2, seed=0)), 4, 192, 2, seed=0)
    for _ in finetune(model, noise, recipe=recipe("rows", 0, precision), device=device):
        pass
    found = hashlib.sha256(repr(evaluate(model, noise, device=device, precision=precision).loss).encode())
    for tensor in model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:12]

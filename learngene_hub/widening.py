"""The second stage of extraction: learn what the width transform adds to whole-unit copies.

Every width starts from ``transforms.Resize``: copies above the native width, the units with the highest scores below
it. On top of that this stage learns, by distillation from the learngene's own native model through ``expand`` itself:

- below the native width, rows A (N, D) of the residual stream, x' = A x, of which a narrower width takes the leading
  ones (LeTs' nested rows, arXiv NeurIPS 2024, read downwards), so that every narrower stream is a part of a wider one;
- for chosen widths, the gains and biases of every LayerNorm, the one place where a resized ViT is not the native one.

The loss is the mean squared error between the native model's last features and those of the resized one, brought back
to D channels (below: by A's pseudo-inverse; above: each copy is compared with its original), over random depths.

Source: our design, after LeTs (Xia et al., NeurIPS 2024) and LiGO (Wang et al., ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub._check import is_number, require_int, require_keys
from learngene_hub.data import Augment, Images, normalise, seed_of
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.factory import data_identity, expand
from learngene_hub.learngene import Learngene
from learngene_hub.methods import Method, get_method
from learngene_hub.shape import Preprocessing, Reach, ViTShape
from learngene_hub.training import Recipe, StateDir, Step, fit, learning


@dataclass(frozen=True, kw_only=True)
class Widening:
    """The settings of the width stage."""

    widths: tuple[int, ...] = ()  # the widths whose norms are learned
    rows: int = 0  # learned rows below the native width; 0: whole channels
    score_images: int = 512  # images on which scores are measured
    epochs: int = 1
    steps_per_epoch: int = 200  # updates; one width per update, in turn
    batch_size: int = 64
    lr: float = 1e-3  # of gains and biases
    rows_lr: float = 3e-3
    shallow: float = 0.5  # share of the updates at a random smaller depth
    flip: bool = True
    crop_padding: int = 4
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.widths, (list, tuple)):
            raise SettingsError(f"widths {self.widths!r} asked; it is a list, such as [64, 128]")
        object.__setattr__(self, "widths", tuple(self.widths))
        for width in self.widths:
            require_int("width", width, at_least=1, error=SettingsError)
        for name in ("score_images", "epochs", "steps_per_epoch", "batch_size"):
            require_int(name, getattr(self, name), at_least=1, error=SettingsError)
        for name in ("rows", "crop_padding", "seed"):
            require_int(name, getattr(self, name), at_least=0, error=SettingsError)
        for name in ("lr", "rows_lr"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it is a number above 0")
        if not (is_number(self.shallow) and 0 <= self.shallow <= 1):
            raise SettingsError(f"shallow {self.shallow!r} asked; it is a share, from 0 to 1")
        if self.precision not in ("fp32", "bf16"):
            raise SettingsError(f"precision {self.precision!r} asked; there are fp32, bf16")
        if self.rows and not self.widths:
            raise SettingsError(f"rows {self.rows} asked without widths; widths=[64] would learn them at 64")

    def require(self, native: ViTShape, reach: Reach | None = None) -> None:
        """Nothing, where a learngene of this native shape, and of this reach where it is known, can be widened so.

        Raises:
            SettingsError: no plain ViT; a width that is not a multiple of head_dim, the native one, which nothing may
                change, an integer multiple of it, where copies are exact, or one out of reach; or rows for the native
                width and above.
        """
        if not isinstance(native, ViTShape):
            raise SettingsError(f"a width stage asked; it is for plain ViTs, and {native} is none: leave it out")
        low, high, _ = reach.widths if reach else (native.head_dim, 64 * native.width, native.head_dim)
        for width in self.widths:
            if width % native.width == 0 or width % native.head_dim or not low <= width <= high:
                raise SettingsError(
                    f"width {width} asked; a learned width is a multiple of {native.head_dim} from {low} to {high}, "
                    f"and "
                    f"not of {native.width}, where copies are exact"
                )
        if self.rows >= native.width:
            raise SettingsError(f"rows {self.rows} asked; they are for widths below the native one, {native.width}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Widening:
        """Settings from plain values.

        Raises:
            SettingsError: a setting that there is not, or one out of its range.
        """
        require_keys(values, known=[f.name for f in fields(cls)], needed=[], error=SettingsError)
        return cls(**values)


@learning()
def widen(
    learngene: Learngene,
    data: Mapping[str, Images],
    settings: Widening,
    *,
    watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
    state_dir: str | Path | None = None,
) -> Learngene:
    """``learngene`` with the tensors of its width transform: scores measured on ``data``, rows and norms learned on it.

    Tensors of an earlier width stage are dropped first. In ``state_dir``, a folder of this stage alone, an interrupted
    one goes on: the state is written about once a minute. Remove the folder afterwards.

    Raises:
        SettingsError: settings that this learngene cannot be widened with (``Widening.require``), no data, or
            ``state_dir`` is of another stage.
        DataError: images of different sizes or channels, or none.
    """
    require_group(get_method(learngene.method, learngene.settings))
    settings.require(learngene.shape, learngene.reach)
    kept = {name: tensor for name, tensor in learngene.tensors.items() if not name.startswith("width.")}
    learngene = replace(learngene, tensors=kept)
    images = _pooled(data)
    scores = measure_scores(learngene, images, settings)
    scored = _with_width(learngene, scores)
    if not settings.widths:
        return scored
    stage = _Stage(scored, images, settings)
    recipe = Recipe(
        epochs=settings.epochs, lr=settings.lr, batch_size=settings.batch_size, weight_decay=0.0, schedule="cosine",
        warmup=0.05, precision=settings.precision, seed=settings.seed,
    )  # fmt: skip
    groups = [
        {"params": list(p), "lr": lr, "weight_decay": 0.0, "name": name}
        for name, p, lr in (
            ("rows", [v for k, v in stage.learned.items() if k == "rows"], settings.rows_lr),
            ("norms", [v for k, v in stage.learned.items() if k != "rows"], settings.lr),
        )
        if p
    ]
    holder, losses = nn.ParameterList(stage.learned.values()), _Losses()
    kept = None
    if state_dir is not None:
        identity = {"learngene": learngene.digest, **_plain(settings), **data_identity(data)}
        kept = StateDir(Path(state_dir), identity, timed=True)
    steps = fit(
        holder, stage.batches, stage.loss, recipe=recipe, steps_per_epoch=settings.steps_per_epoch, groups=groups,
        state_dir=kept, extra=losses,
    )  # fmt: skip
    for step in watch(steps):
        losses.told.append(step.loss)
    grown = _with_width(scored, {name: value.detach().cpu() for name, value in stage.learned.items()})
    record = {"settings": _plain(settings), "images": len(images), "loss": _by_width(losses.told, settings.widths)}
    return replace(grown, provenance={**grown.provenance, "width": record})


def require_group(method: Method) -> None:
    """Nothing, where learngenes of this method have tensors of a width stage.

    Raises:
        SettingsError: they have none.
    """
    if "width" not in method.groups:
        raise SettingsError(f"a width stage asked; learngenes of {method.name} have none: leave it out")


class _Losses:
    """The loss of every update so far."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.told = list(state["told"])


def _pooled(data: Mapping[str, Images]) -> Images:
    """All images of all data sets as one set without labels of its own."""
    if not data:
        raise SettingsError("no data sets asked; the width stage needs at least one")
    sizes = {name: tuple(images.pixels.shape[1:]) for name, images in data.items()}
    if len(set(sizes.values())) > 1 or next(iter(sizes.values()))[0] != 3:
        raise DataError(f"images of shapes {sizes} asked; the width stage needs one size and 3 channels")
    if empty := [name for name, images in data.items() if not len(images)]:
        raise DataError(f"{empty[0]} is empty; the width stage needs images")
    pixels = torch.cat([images.pixels for images in data.values()])
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("any",), "+".join(data))


def _plain(settings: Widening) -> dict[str, object]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(settings).items()}


def _by_width(losses: list[float], widths: tuple[int, ...]) -> dict[str, list[float]]:
    """First and last loss of each width, means over at most 20 updates."""
    shares = {width: losses[index :: len(widths)] for index, width in enumerate(widths)}
    return {
        str(width): [round(sum(part) / len(part), 5) for part in (own[:20], own[-20:])]
        for width, own in shares.items()
        if own
    }


def _with_width(learngene: Learngene, tensors: Mapping[str, Tensor]) -> Learngene:
    named = {f"width.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    return replace(learngene, tensors={**learngene.tensors, **named})


@torch.no_grad()
def measure_scores(learngene: Learngene, images: Images, settings: Widening) -> dict[str, Tensor]:
    """How much each unit matters on real images, higher is more.

    Returns ``stream`` (D,): the mean square of the last features of each channel, plus what every norm passes on;
    ``heads`` (L, H) and ``hidden`` (L, M): the mean square of what each head or hidden unit writes to the stream.
    Positions without a stored block get zeros.
    """
    native = learngene.shape
    positions = transforms.stored_positions(learngene.tensors)
    model = _native_model(learngene, len(positions), images.pixels.shape[-1])
    seen = _mean_squares(model, native, images, learngene.preprocessing, settings)
    heads, hidden = torch.zeros(native.depth, native.heads), torch.zeros(native.depth, native.hidden)
    stream = seen["last"] / seen["last"].sum()
    for place, position in enumerate(positions):
        block = model.blocks[place]
        heads[position] = seen[f"{place}.heads"]
        hidden[position] = seen[f"{place}.fc2"] * block.mlp.fc2.weight.square().sum(0)
        for part, reader in (("qkv", block.attn.qkv.weight), ("fc1", block.mlp.fc1.weight)):
            passed = seen[f"{place}.{part}"] * reader.square().sum(0)
            stream += passed / passed.sum()
    return {"stream": stream, "heads": heads, "hidden": hidden}


def _mean_squares(
    model: Any, native: ViTShape, images: Images, preprocessing: Preprocessing, settings: Widening, batch: int = 64
) -> dict[str, Tensor]:
    """Mean squares over images and tokens, per unit: of what qkv, fc1 and fc2 read, what each head writes, the last."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    chosen = order[: settings.score_images]
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + value

    def keep(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        return lambda _, args: add(name, args[0].square().flatten(0, 1).mean(0) * len(args[0]))

    def keep_heads(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(module: Any, args: tuple[Tensor]) -> None:
            parts = zip(args[0].split(native.head_dim, -1), module.weight.split(native.head_dim, 1), strict=True)
            add(name, torch.stack([(x @ w.T).square().mean() for x, w in parts]) * len(args[0]))

        return hook

    hooks = []
    for place, block in enumerate(model.blocks):
        hooks += [
            block.attn.qkv.register_forward_pre_hook(keep(f"{place}.qkv")),
            block.mlp.fc1.register_forward_pre_hook(keep(f"{place}.fc1")),
            block.mlp.fc2.register_forward_pre_hook(keep(f"{place}.fc2")),
            block.attn.proj.register_forward_pre_hook(keep_heads(f"{place}.heads")),
        ]
    for rows in chosen.split(batch):
        features = _last_features(model, normalise(images.pixels[rows], preprocessing))
        add("last", features.square().reshape(-1, native.width).mean(0) * len(rows))
    for hook in hooks:
        hook.remove()
    return {name: total / len(chosen) for name, total in sums.items()}


def _native_model(learngene: Learngene, depth: int, size: int) -> Any:
    """The model of the native width and this depth, for images of ``size`` pixels; its head is of no account."""
    return expand(learngene, depth=depth, num_labels=1, image_size=size)


class _Stage:
    """The resized model as a function of what is learned, and its distance to the native one."""

    def __init__(self, learngene: Learngene, images: Images, settings: Widening) -> None:
        self.learngene, self.images, self.settings = learngene.to(torch.float32), images, settings
        self.method: Method = get_method(learngene.method, learngene.settings)
        self.positions = transforms.stored_positions(learngene.tensors)
        self.teachers: dict[int, Any] = {}
        self.augment = Augment(flip=settings.flip, crop_padding=settings.crop_padding)
        self.models: dict[ViTShape, _Features] = {}  # built on the meta device; their weights are given at each call
        self.learned = self._start()

    def _start(self) -> dict[str, nn.Parameter]:
        """Rows that choose the best channels, and the norms as they are resized without learning."""
        native, learned = self.learngene.shape, {}
        if self.settings.rows:
            order = torch.sort(self.learngene.tensors["width.stream"], descending=True, stable=True).indices
            learned["rows"] = nn.Parameter(torch.eye(native.width)[order[: self.settings.rows]])
        started = _with_width(self.learngene, learned)
        for width in self.settings.widths:
            shape = replace(self._shape(width, len(self.positions)), classes=0)
            grown: dict[str, Any] = dict(self.method.expand(started, shape))
            for kind, key in (("gain", "weight"), ("bias", "bias")):
                table = torch.zeros(2 * native.depth + 1, width)
                for place, position in enumerate(self.positions):
                    table[2 * position] = grown[f"blocks.{place}.norm1.{key}"]
                    table[2 * position + 1] = grown[f"blocks.{place}.norm2.{key}"]
                table[-1] = grown[f"{'norm' if native.pool == 'token' else 'fc_norm'}.{key}"]
                learned[f"{kind}.{width}"] = nn.Parameter(table.detach())
        return learned

    def _shape(self, width: int, depth: int) -> ViTShape:
        native = self.learngene.shape
        heads, size = width // native.head_dim, self.images.pixels.shape[-1]
        return replace(native, depth=depth, width=width, heads=heads, image_size=size, classes=1)

    def batches(self, epoch: int) -> Iterator[tuple[int, int, Tensor]]:
        """(width, depth, images) of each update; widths in turn."""
        settings = self.settings
        for index in range(settings.steps_per_epoch):
            step = epoch * settings.steps_per_epoch + index
            generator = torch.Generator().manual_seed(seed_of("widen", settings.seed, step))
            rows = torch.randint(len(self.images), (settings.batch_size,), generator=generator)
            pixels = self.augment(self.images.pixels[rows].float() / 255, generator)
            shallow = float(torch.rand((), generator=generator)) < settings.shallow
            full = len(self.positions)
            depth = int(torch.randint(min(2, full), full + 1, (), generator=generator)) if shallow else full
            yield settings.widths[step % len(settings.widths)], depth, normalise(pixels, self.learngene.preprocessing)

    def loss(self, _: nn.Module, batch: tuple[int, int, Tensor]) -> Tensor:
        """Mean squared error of the last features, relative to the mean square of the native ones."""
        width, depth, x = batch
        self._move(x.device)
        wanted = self._wanted(depth, x)
        got = self._features(_with_width(self.learngene, self.learned), width, depth, x)
        with torch.autocast(x.device.type, enabled=False):
            error = self._error(got.float(), wanted.float(), width)
        return error.square().mean() / wanted.float().square().mean()

    def _error(self, got: Tensor, wanted: Tensor, width: int) -> Tensor:
        """The resized model's features less the native ones, each brought to what the other holds."""
        native = self.learngene.shape.width
        if width > native:
            if self.learngene.settings.get("form") == "exact":
                return got[..., :native] - wanted  # the other channels are silent
            return got - wanted[..., torch.arange(width, device=wanted.device) % native]
        if "rows" in self.learned and width <= len(self.learned["rows"]):
            return got @ transforms.left_inverse(self.learned["rows"][:width]).T - wanted
        index = transforms.map_units(native, width, self.learngene.tensors["width.stream"]).index
        return got - wanted[..., index.to(wanted.device)]

    def _move(self, device: torch.device) -> None:
        """Everything that is not learned to the device of the batch, once."""
        if next(iter(self.learngene.tensors.values())).device != device:
            moved = {name: tensor.to(device) for name, tensor in self.learngene.tensors.items()}
            self.learngene = replace(self.learngene, tensors=moved)

    @torch.no_grad()
    def _wanted(self, depth: int, x: Tensor) -> Tensor:
        """The last features of the native-width model of ``depth`` that the learngene grows."""
        if depth not in self.teachers:
            self.teachers[depth] = _native_model(self.learngene, depth, self.images.pixels.shape[-1]).to(x.device)
        return _last_features(self.teachers[depth], x)

    def _features(self, learngene: Learngene, width: int, depth: int, x: Tensor) -> Tensor:
        """The last features of the model that ``learngene`` grows."""
        shape = replace(self._shape(width, depth), classes=0)
        if shape not in self.models:
            self.models[shape] = _Features(shape.build(device="meta"))
        with torch.autocast(x.device.type, enabled=False):  # what is composed is composed in float32
            grown = self.method.expand(learngene, shape)
        state = {name: tensor for name, tensor in grown.items() if tensor is not None}
        return torch.func.functional_call(self.models[shape], {f"inner.{k}": v for k, v in state.items()}, (x,))


def _last_features(model: Any, x: Tensor) -> Tensor:
    """What comes out of the last norm: all tokens (B, N, D), or their average (B, D) where the norm follows pooling."""
    features = model.forward_features(x)
    return features if model.global_pool == "token" else model.forward_head(features, pre_logits=True)


class _Features(nn.Module):
    """A model whose forward is its last features."""

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return _last_features(self.inner, x)

"""What lets, tleg, sws and ldr share: an auxiliary ViT that is expanded anew at every update.

The auxiliary has no parameters of its own: they are the learngene's tensors, ``expand`` maps them to the state dict of
a timm model that was built without memory, and gradients flow back through that map. It is expanded once per update, in
float32 and outside of autocast. What it learns from stands in ``_lesson.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.errors import ArtefactError, ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.methods._distillation import Distillation
from learngene_hub.methods._whole import last_norm
from learngene_hub.shape import Preprocessing, Reach, ViTShape

Expand = Callable[[Learngene, ViTShape], Mapping[str, Tensor | None]]
FROZEN = "frozen"  # the group of tensors that only an auxiliary has: what the method computed once and does not train


def mix(
    parts: Sequence[Mapping[str, Tensor]], coefficients: Tensor, frozen: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Key of a block -> (L, numbers of that tensor), row l being sum_n coefficients[l, n] parts[n].

    ``coefficients`` (L, N) are rounded to the parts' dtype (at least float32). ``frozen``, of the same form, is added:
    the sum over parts that are not there.
    """
    mixed = {}
    for key in transforms.BLOCK_KEYS:
        rows = torch.stack([_full(part[key]).flatten() for part in parts])
        weights = coefficients.to(rows)
        mixed[key] = torch.addmm(frozen[key], weights, rows) if frozen else weights @ rows
    return mixed


def compose(
    parts: Sequence[Mapping[str, Tensor]], coefficients: Tensor, frozen: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """L blocks, the l-th of them sum_n coefficients[l, n] parts[n], every tensor of a block alike; see ``mix``."""
    blocks: list[dict[str, Tensor]] = [{} for _ in coefficients]
    for key, mixed in mix(parts, coefficients, frozen).items():
        for block, row in zip(blocks, mixed, strict=True):  # without gradients each block has memory of its own
            block[key] = (row if mixed.requires_grad else row.clone()).view(parts[0][key].shape)
    return blocks


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Auxiliary(nn.Module):
    """A ViT of ``shape`` whose parameters are the tensors of ``learngene``, under their names, and those of ``head``.

    Its forward (images -> logits) expands them first. Tensors of the group ``frozen`` are not trained. ``head`` is a
    classifier that the learngene does not hold; empty, where it does.
    """

    def __init__(
        self,
        learngene: Learngene,
        expand: Expand,
        shape: ViTShape,
        head: Mapping[str, Tensor],
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = shape.classes
        self._template, self._expand, self._shape = learngene, expand, shape
        self._beside = {f"head.{kind}" for kind in head}  # what is no tensor of the learngene
        # In a tuple, because a module without memory is no part of this one: it cannot be moved or saved.
        self._built = (shape.build(device="meta", drop_path_rate=drop_path),)
        for name, tensor in [*learngene.tensors.items(), *((f"head.{kind}", t) for kind, t in head.items())]:
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            value = _full(tensor.detach()).clone()
            if path[0] == FROZEN:
                place.register_buffer(last, value, persistent=False)
            else:
                place.register_parameter(last, nn.Parameter(value))

    def tensors(self) -> dict[str, Tensor]:
        """The learngene's tensors as they are now, connected to the parameters."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in named if name not in self._beside}

    def state(self) -> dict[str, Tensor]:
        """The whole state dict of the ViT, connected to the parameters."""
        head = {name: tensor for name, tensor in self.named_parameters() if name in self._beside}
        grown = self._expand(replace(self._template, tensors=self.tensors()), self._shape)
        return {name: tensor for name, tensor in grown.items() if tensor is not None} | head

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            state = self.state()
        (model,) = self._built
        if model.training != self.training:
            model.train(self.training)
        for block in model.blocks:  # on a CPU plain products are faster, see training.fit
            block.attn.fused_attn = x.device.type != "cpu"  # type: ignore[union-attr]
        return torch.func.functional_call(model, state, (x,))

    def found(self) -> dict[str, Tensor]:
        """The learngene's trained tensors: copies on the CPU."""
        named = [item for item in self.named_parameters() if item[0] not in self._beside]
        return {name: parameter.detach().cpu().clone().contiguous() for name, parameter in named}

    def heads(self) -> dict[str, Tensor]:
        """The classifier, by "weight" and "bias": copies on the CPU."""
        named = [item for item in self.named_parameters() if item[0] in self._beside]
        return {name.removeprefix("head."): parameter.detach().cpu().clone() for name, parameter in named}

    def learngene(self, provenance: Mapping[str, Any], *, head: bool) -> Learngene:
        """The learngene that this is now, with the classifier where ``head`` is asked."""
        kept = prefixed("head", self.heads()) if head else {}
        return replace(self._template, tensors=self.found() | kept, provenance=provenance)

    @torch.no_grad()
    def materialise(self) -> nn.Module:
        """The plain timm model that this is now, on the CPU, with parameters of its own."""
        model = self._shape.build(preprocessing=self._template.preprocessing)
        model.load_state_dict({name: tensor.cpu() for name, tensor in self.state().items()})
        return model.eval()


def random_parts(native: ViTShape, count: int, seed: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(stem, last norm and head under ``stem.``, ``tail.norm.``, ``head.``; ``count`` blocks), as timm starts them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = replace(native, depth=count).build()
    return _parts(model.state_dict(), native, range(count))


def ancestor_parts(
    ancestor: nn.Module | None, native: ViTShape, places: Sequence[float], seed: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The same of the ancestor: its blocks at these relative places (0: the first, 1: the last), its positions at the
    auxiliary's image size, its kernel at the auxiliary's channels. Where a teacher beside it has other classes, the
    head is random.

    Raises:
        ShapeError: the auxiliary is not of the ancestor's width, patch, head_dim, hidden units or layout.
    """
    if ancestor is None:
        raise ShapeError("start 'ancestor' asked without an ancestor; start 'random' would work")
    own = ViTShape.of(ancestor)
    for name in ("width", "patch", "head_dim", "hidden", "class_token", "pool"):
        have, asked = getattr(own, name), getattr(native, name)
        if have != asked:
            raise ShapeError(f"start 'ancestor' asked with {name} {asked}; the ancestor's is {have}, which would work")
    state = {name: tensor.detach().cpu().float().clone() for name, tensor in ancestor.state_dict().items()}
    side, last = native.image_size // native.patch, own.depth - 1
    state["pos_embed"] = transforms.resample_positions(state["pos_embed"], side, int(native.class_token))
    kernel = "patch_embed.proj.weight"
    state[kernel] = transforms.adapt_channels(state[kernel], native.in_chans)
    if own.classes != native.classes:
        random, _ = random_parts(native, 1, seed)
        state |= {key: random[key] for key in transforms.HEAD_KEYS}
    return _parts(state, native, [int(place * last + 0.5) for place in places])


def _parts(
    state: Mapping[str, Tensor], native: ViTShape, positions: Sequence[int]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    outer = {f"stem.{key}": state[key] for key in transforms.STEM_KEYS if key in state}
    outer |= {f"tail.norm.{kind}": state[f"{last_norm(native)}.{kind}"] for kind in ("weight", "bias")}
    outer |= {key: state[key] for key in transforms.HEAD_KEYS}
    return outer, [{key: state[f"blocks.{i}.{key}"] for key in transforms.BLOCK_KEYS} for i in positions]


def blank(
    name: str,
    settings: Distillation,
    tensors: Mapping[str, Tensor],
    native: ViTShape,
    facts: Mapping[str, Any],
    preprocessing: Preprocessing,
) -> Learngene:
    """A learngene of these tensors, not trained yet. Its reach: twice the auxiliary's depth, and the widths that whole
    heads allow up to four times its own."""
    step = native.head_dim
    return Learngene(
        tensors=tensors,
        method=name,
        settings={key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
        shape=native,
        reach=Reach(depths=(1, 2 * native.depth), widths=(step, 4 * native.width, step)),
        ancestor=dict(facts),
        preprocessing=preprocessing,
        license=str(facts.get("license", "")),
        provenance={},
    )


def prefixed(name: str, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block as a learngene names them."""
    return {f"{name}.{key}": tensor for key, tensor in block.items()}


def without_head(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a learngene holds, the classifier's "weight" and "bias")."""
    head = {key.removeprefix("head."): tensor for key, tensor in parts.items() if key in transforms.HEAD_KEYS}
    return {key: tensor for key, tensor in parts.items() if key not in transforms.HEAD_KEYS}, head


def inherited_head(learngene: Learngene, shape: ViTShape, resize: transforms.Resize, kind: str) -> dict[str, Tensor]:
    """The classifier of a descendant, where ``kind`` is "inherit", one is stored, and it has as many classes."""
    if kind != "inherit" or shape.classes != learngene.shape.classes or "head.weight" not in learngene.tensors:
        return {}
    weight = transforms.read_columns(_full(learngene.tensors["head.weight"]), resize.stream)
    return {"head.weight": weight, "head.bias": learngene.tensors["head.bias"]}


def numbers_of(names: Mapping[str, Any], group: str) -> list[int]:
    """The numbers n of the names ``group.n.rest``, ascending; what is no number is -1."""
    seconds = {name.split(".")[1] for name in names if name.startswith(f"{group}.")}
    return sorted({int(text) if text.isdecimal() and len(text) <= 4 else -1 for text in seconds})


def check_stored(
    shapes: Mapping[str, tuple[int, ...]], native: ViTShape, blocks: Sequence[str], snapshots: Sequence[str] = ()
) -> None:
    """Refuse tensors that are not a stem, a last norm, blocks of these names, these snapshots of stem and norm and, if
    there is one, a head.

    Raises:
        ArtefactError: a tensor is missing, unknown, or of another shape.
    """
    model = transforms.expected_shapes(native, {0})
    outer = {name: shape for name, shape in model.items() if not name.startswith("block.")}
    want = dict(outer)
    want |= {f"{block}.{key}": model[f"block.0.{key}"] for block in blocks for key in transforms.BLOCK_KEYS}
    want |= {f"{snapshot}.{name}": shape for snapshot in snapshots for name, shape in outer.items()}
    if any(name.startswith("head.") for name in shapes):
        want |= {"head.weight": (native.classes, native.width), "head.bias": (native.classes,)}
    if missing := sorted(want.keys() - shapes.keys()):
        raise ArtefactError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(shapes.keys() - want.keys()):
        raise ArtefactError(f"{len(unknown)} unknown tensors, the first is {unknown[0]}")
    for name, shape in shapes.items():
        if tuple(shape) != want[name]:
            raise ArtefactError(f"tensor {name} is {list(shape)}; the native shape {native} needs {list(want[name])}")

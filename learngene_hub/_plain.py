"""Reading the shape of a timm ViT, and refusing by name whatever a plain ViT does not have (``ViTShape.of``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from learngene_hub._check import shortest_ratio
from learngene_hub.errors import ShapeError
from learngene_hub.shape import POOLS, Shape, ViTShape


def read_shape(model: nn.Module) -> ViTShape:
    """See ``ViTShape.of``."""
    if type(model) is not VisionTransformer:
        inner = getattr(model, "timm_model", None)
        hint = ": its timm_model would work" if isinstance(inner, VisionTransformer) else ""
        extra = ", with a distillation token" if getattr(model, "dist_token", None) is not None else ""
        raise ShapeError(
            f"{type(model).__name__} given{extra}; only timm's plain VisionTransformer has a ViTShape{hint}"
        )
    odd = sorted({type(block).__name__ for block in model.blocks} - {"Block"})
    if odd or len(model.blocks) == 0:
        blocks = f"with blocks of type {', '.join(odd)}" if odd else "without blocks"
        raise ShapeError(f"a ViT {blocks} given; a ViTShape describes a plain ViT, with blocks of type Block")
    if type(model.patch_embed).__name__ != "PatchEmbed":
        stem = type(model.patch_embed).__name__
        raise ShapeError(f"a ViT whose stem is a {stem} given; a ViTShape describes a plain ViT, with a PatchEmbed")
    found = [feature for feature, there in features(model) if there]
    if found:
        raise ShapeError(f"a ViT with {', '.join(found)} given; a ViTShape describes a plain ViT, without")
    first: Any = model.blocks[0]  # a timm Block, checked above
    attn, grid = first.attn, model.patch_embed.grid_size
    shape = ViTShape(
        depth=len(model.blocks),
        width=model.embed_dim,
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        mlp_ratio=shortest_ratio(model.embed_dim, first.mlp.fc1.out_features),
        patch=model.patch_embed.patch_size[0],
        image_size=grid[0] * model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        classes=model.num_classes,
        class_token=model.cls_token is not None,
        pool=model.global_pool,
    )
    require_same_network(model, shape)
    heads = [block.attn.num_heads for block in model.blocks]  # type: ignore[union-attr]  # of one size, however many
    if len(set(heads)) > 1:
        raise ShapeError(f"a ViT whose blocks have {heads} heads given; in a plain ViT all have the same number")
    return shape


def features(model: VisionTransformer) -> Iterable[tuple[str, bool]]:
    """Pairs of a feature that a plain ViT lacks, and whether ``model`` has it."""
    stem, norms = model.patch_embed, [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    inside = {name for block in model.blocks for name, child in block.named_modules() if not _is_empty(child)}
    names = dict(model.named_parameters())
    yield "registers", model.reg_token is not None
    yield "pre-norm (a norm before the blocks)", not _is_empty(model.norm_pre)
    yield "layer scale", bool({"ls1", "ls2"} & inside)
    yield "qk_norm", bool({"attn.q_norm", "attn.k_norm"} & inside)
    yield "a norm inside attention or MLP", bool({"attn.norm", "mlp.norm"} & inside)
    yield "gated attention", "attn.gate" in inside
    yield "no qkv bias", not any(name.endswith("attn.qkv.bias") for name in names)
    yield "no projection bias", not any(name.endswith("attn.proj.bias") for name in names)
    yield "rotary or no position embeddings", model.pos_embed is None
    yield "a class token without position embedding", model.cls_token is not None and model.no_embed_class
    yield "SwiGLU or another gated MLP", any(type(block.mlp).__name__ != "Mlp" for block in model.blocks)
    yield "a norm in the stem", not _is_empty(stem.norm)
    yield "patches or images that are not square", len(set(stem.patch_size)) > 1 or len(set(stem.grid_size)) > 1
    yield f"pool {model.global_pool!r}", model.global_pool not in POOLS
    yield "no final norm", _is_empty(model.norm) and _is_empty(model.fc_norm)
    yield (
        "the final norm on the wrong side of the pool" if model.global_pool == "avg" else "a norm after the pool",
        _is_empty(model.fc_norm) is (model.global_pool == "avg"),
    )
    yield "class token in the average", model.global_pool == "avg" and bool(model.pool_include_prefix)
    yield "a norm whose eps is not 1e-6", any(norm.eps != 1e-6 for norm in norms)


def require_same_network(model: nn.Module, shape: Shape) -> None:
    """Compare with what ``shape`` builds: same parameters, same layer types, whatever the dropout.

    Raises:
        ShapeError: a layer or a parameter is another one.
    """
    built = shape.build(device="meta")
    layers, plain = _layers(model), _layers(built)
    if layers != plain:
        name = next(n for n in sorted(layers.keys() | plain.keys()) if layers.get(n) != plain.get(n))
        raise ShapeError(f"{name} is {layers.get(name)}; in a plain ViT it is {plain.get(name)}")
    asked = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if asked != there:
        name = min(name for name in asked.keys() | there.keys() if asked.get(name) != there.get(name))
        raise ShapeError(f"{name} is {there.get(name)}; in a plain ViT of its shape, {shape}, it is {asked.get(name)}")


def _layers(model: nn.Module) -> dict[str, str]:
    """Name -> type of every module that computes something when not training."""
    skipped = {"Identity", "Dropout", "DropPath", "PatchDropout"}
    return {name: kind for name, m in model.named_modules() if (kind := type(m).__name__) not in skipped}


def _is_empty(module: nn.Module | None) -> bool:
    return module is None or type(module).__name__ == "Identity"

"""The architectures of ours that timm builds by name, beside its own: importing this file registers them.

A descendant that is a plain ViT or a ResNet is one of timm's own architectures, and is loaded anywhere. One of these is
loaded by timm and transformers wherever this file, or ``learngene_hub.descendant``, was imported before; elsewhere timm
says that it does not know the model. The arguments are those that the shape's ``model_args`` gives. The network is
imported when it is first built.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

# What timm reads when it registers a model of this file: there are no weights to fetch.
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": {"url": ""} for name in ("learngene_heads_vit", "learngene_stitched_vit", "learngene_vgg")}
)


@register_model
def learngene_heads_vit(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **model_args: Any
) -> nn.Module:
    """A ViT whose blocks have their own numbers of heads; see ``HeadsShape``."""
    from learngene_hub._heads_vit import create

    return create(
        "learngene_heads_vit",
        pretrained=pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **model_args,
    )


@register_model
def learngene_stitched_vit(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **model_args: Any
) -> nn.Module:
    """A ViT whose blocks change their width on the way; see ``StitchedShape``."""
    from learngene_hub._stitched_vit import create

    return create(
        "learngene_stitched_vit",
        pretrained=pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **model_args,
    )


@register_model
def learngene_vgg(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **model_args: Any
) -> nn.Module:
    """A VGG with batch norm and any numbers of channels; see ``ConvShape``."""
    from learngene_hub._conv_models import vgg

    model_args.pop(
        "pretrained_model_args", None
    )  # the arguments once more, as timm hands them on when it loads a folder
    return vgg(pretrained, pretrained_cfg, pretrained_cfg_overlay, **model_args)

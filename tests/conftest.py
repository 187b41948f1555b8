"""Pico models and images for every test, and no way out to the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, at import; the command line sets it where nobody watches
os.environ.pop("HF_TOKEN", None)  # a contributor's own login stays at home
os.environ["HF_TOKEN_PATH"] = os.devnull
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pico models: more threads only wait for each other

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from learngene_hub.data import Images
    from learngene_hub.learngene import Learngene
    from learngene_hub.shape import ViTShape


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses every connection and name look-up that leaves this machine, but in tests marked ``network``."""
    if request.node.get_closest_marker("network") is None:
        monkeypatch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
        monkeypatch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
        monkeypatch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))
    yield


@pytest.fixture(autouse=True)
def fast_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is, no line says that the Hub is waited for."""
    from learngene_hub import _client

    monkeypatch.setattr(_client, "SLOW", 600.0)


def _is_local(host: object) -> bool:
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise OSError(f"the tests stay on this machine; a connection to {address} was asked")
        return connect(self, address)

    return guarded


def _guarded_lookup(lookup: Any) -> Any:
    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(f"the tests stay on this machine; the address of {host} was asked")
        return lookup(host, *args, **kwargs)

    return guarded


@pytest.fixture(scope="session")
def pico_shape() -> ViTShape:
    """3 blocks of 64 in 2 heads of 32, for 32 px images in patches of 8 (16 tokens and the class token), 10 classes."""
    from learngene_hub.shape import ViTShape

    return ViTShape(depth=3, width=64, heads=2, head_dim=32, patch=8, image_size=32, classes=10)


def build_pico(shape: ViTShape, seed: int = 0) -> VisionTransformer:
    """A model of ``shape`` in eval mode whose every parameter is random: no bias is 0 and no norm gain is 1, so that
    a test can't pass because two of them are equal by default. The global random state is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = shape.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


@pytest.fixture
def pico_ancestor(pico_shape: ViTShape) -> VisionTransformer:
    """A fresh copy per test of the same pico ancestor (see ``build_pico``)."""
    return build_pico(pico_shape)


@pytest.fixture(scope="session")
def sign_images() -> tuple[Images, Images]:
    """(train, test): 160 and 80 of the hand signs that ship with the package, 32 px, 10 classes. Do not change them."""
    from learngene_hub.data import load_images

    return (
        load_images("signdigits", split="train", size=32, limit=160),
        load_images("signdigits", split="test", size=32, limit=80),
    )


@pytest.fixture
def pico_learngene(pico_ancestor: VisionTransformer, pico_shape: ViTShape) -> Learngene:
    """An LSAMD learngene that holds every block of ``pico_ancestor``, as if two data sets had chosen each of them."""
    import torch

    from learngene_hub import transforms
    from learngene_hub.learngene import Learngene
    from learngene_hub.shape import IMAGENET, Reach

    state = {name: tensor.detach().clone() for name, tensor in pico_ancestor.state_dict().items()}
    depth = pico_shape.depth
    tensors = {f"stem.{key}": state[key] for key in transforms.STEM_KEYS if key in state}
    tensors |= {f"block.{i}.{key}": state[f"blocks.{i}.{key}"] for i in range(depth) for key in transforms.BLOCK_KEYS}
    tensors |= {f"tail.{key}": state[key] for key in ("norm.weight", "norm.bias")}
    tensors |= {
        "search.alpha": torch.zeros(2, depth, 2),
        "search.frequency": torch.ones(depth),
        "search.paths": torch.zeros(2, depth),
        "search.probability": torch.linspace(0.9, 0.5, depth),
    }
    return Learngene(
        tensors=tensors,
        method="lsamd",
        settings={},
        shape=pico_shape,
        reach=Reach(depths=(2, 6), widths=(32, 128, 32)),
        ancestor={"name": "pico", "sha256": "", "license": "Apache-2.0", "source": "the tests"},
        preprocessing=IMAGENET,
        license="Apache-2.0",
        provenance={"data": ["none"]},
    )

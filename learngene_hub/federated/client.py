"""The ClientApp: what a client does with each of the server's messages.

``query.subspace``  once, at the start or when a client joins: the basis of its data's subspace and the sensitivities of
                    the first model.
``train``           a round: place what came, train under the constraint, send back exactly the asked layers and xi.
``train.adopt``     a newcomer is measured: it takes one learngene, trains, tells its accuracy, sends no weights.

Flower's own FedAvg and FedProx talk to the same ``train``: a message without ``blocks`` means the whole model.
Names on the wire are those of the native network; a client of another depth translates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor, nn

from learngene_hub import transforms
from learngene_hub.data import seed_of
from learngene_hub.errors import TrainingError
from learngene_hub.factory import evaluate
from learngene_hub.federated import subspace as geometry
from learngene_hub.federated.local import constraint, recipe_of, sample, train
from learngene_hub.federated.models import features, initial_model, pixels_of, preprocessing_of, sent_names
from learngene_hub.federated.settings import FLOWERS, Federation
from learngene_hub.federated.site import Site
from learngene_hub.methods._gene_fl_layers import group_of, layer_entries
from learngene_hub.methods._gene_fl_sensitivity import sensitivities
from learngene_hub.methods.gene_fl import SCORE, GeneFl, assemble_learngene

NONE = "none"  # of blocks: no layer is sent; Flower cannot count an empty text
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def make_client_app(settings: Federation | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """Flower's ClientApp of a federation; ``settings`` None: those of the run_config of each run.

    ``mods``: Flower's own, such as those of differential privacy, around every round of training.
    """
    app = ClientApp()

    @app.query("subspace")
    def subspace(message: Message, context: Context) -> Message:
        return Message(tell_subspace(_site(settings, context)), reply_to=message)

    @app.train(mods=list(mods))
    def round(message: Message, context: Context) -> Message:
        return Message(take_part(_site(settings, context), message.content, context), reply_to=message)

    @app.train("adopt")
    def adopt(message: Message, context: Context) -> Message:
        return Message(try_out(_site(settings, context), message.content), reply_to=message)

    return app


def _site(settings: Federation | None, context: Context) -> Site:
    return Site.of(settings or Federation.from_run_config(context.run_config), context.node_config)


def tell_subspace(site: Site) -> RecordDict:
    """The reply to ``query.subspace``: "arrays" with the basis (D, m), "metrics" with n and xi of the first model.

    No basis is sent where clusters are not sought. Where they are, "shown" is the number of classes of
    ``min_per_class`` images; of 0 the basis is that of all images as one class, and of fewer than ``min_per_class`` in
    all there is none, for it could give single images away (our reading; the server knows a cluster for such a client).
    """
    s, preprocessing = site.settings, preprocessing_of(site.settings)
    site.require_place()  # before anything is trained
    model = initial_model(s, site.shape)
    batch = sample(site.train, s.fisher_images, preprocessing, seed_of("fisher", s.seed, site.client))
    xi = native_xi(sensitivities(model, layer_entries(site.shape), *batch), site)
    content = RecordDict({"metrics": MetricRecord({"num-examples": len(site.train), "client": site.client, "xi": xi})})
    if s.clusters == 1:
        return content
    content["metrics"]["shown"] = geometry.large_classes(site.train.labels, s.min_per_class)  # type: ignore[index]
    if len(site.train) >= s.min_per_class:
        encoder = model if site.shape == site.native else initial_model(s, site.native)
        seen = pixels_of(site.train, preprocessing) if s.subspace == "pixels" else features(
            encoder, site.train, preprocessing
        )  # fmt: skip
        basis = geometry.class_basis(seen, site.train.labels, vectors=s.vectors, min_per_class=s.min_per_class)
        draw = torch.Generator().manual_seed(seed_of("noise", s.seed, site.client))
        content["arrays"] = to_record({"subspace": geometry.noisy(basis, s.noise, draw)}, s.wire)
    return content


def take_part(site: Site, content: RecordDict, context: Context) -> RecordDict:
    """The reply to ``train``: "arrays", exactly what is asked for, and "metrics".

    Raises:
        TrainingError: what came does not fit, or training leaves the finite numbers.
    """
    s, config = site.settings, content.config_records.get("config", ConfigRecord())
    round = int(config.get("server-round", 1)) + int(config.get("round-offset", 0))  # type: ignore[arg-type]
    preprocessing, blocks = preprocessing_of(s), read_blocks(config)
    own, xi = site.kept(context, round)
    model, received = placed(site, content, blocks, own)
    before = evaluate(model, site.test, preprocessing=preprocessing).accuracy
    recipe = recipe_of(
        s, client=site.client, round=round, epochs=_whole(config, "epochs"), lr=_number(config, "lr")
    )  # fmt: skip
    batch = sample(site.train, s.fisher_images, preprocessing, seed_of("fisher", s.seed, site.client))
    weights = constraint(model, received, zetas(site, blocks, xi), batch, _held_by(s, config))
    loss = train(model, site.train, recipe, preprocessing, received, weights)
    after = evaluate(model, site.test, preprocessing=preprocessing).accuracy
    told: dict[str, Any] = {
        "num-examples": len(site.train), "accuracy-before": before, "accuracy": after, "loss": loss,
    }  # fmt: skip
    found: list[float] = []
    if s.strategy not in FLOWERS:
        own_xi = sensitivities(model, layer_entries(site.shape), *batch)
        found, told["xi"] = own_xi.tolist(), native_xi(own_xi, site)
        site.keep(context, round, model.state_dict(), found)
    state = model.state_dict()
    names = translated(site, blocks)
    arrays = to_record({theirs: state[mine] for theirs, mine in names.items()}, s.wire)
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(told)})


def try_out(site: Site, content: RecordDict) -> RecordDict:
    """The reply to ``train.adopt``: "metrics" alone. Nothing is kept, and no weight is sent."""
    s, config = site.settings, content.config_records["config"]
    preprocessing, blocks = preprocessing_of(s), read_blocks(config)
    model, received = placed(site, content, blocks, None)
    before = evaluate(model, site.test, preprocessing=preprocessing).accuracy
    recipe = recipe_of(s, client=site.client, round=0, epochs=_whole(config, "epochs"))
    train(model, site.train, recipe, preprocessing, received, {})
    after = evaluate(model, site.test, preprocessing=preprocessing).accuracy
    told = MetricRecord({"num-examples": len(site.train), "accuracy-before": before, "accuracy": after})
    return RecordDict({"metrics": told})


def read_blocks(config: ConfigRecord) -> tuple[int, ...] | None:
    """The layers that a message is about; None: the whole model."""
    written = config.get("blocks")
    if written is None:
        return None
    return () if written == NONE else tuple(int(part) for part in str(written).split(","))


def translated(site: Site, blocks: Sequence[int] | None) -> dict[str, str]:
    """Name on the wire -> name in the client's own network, of what is sent.

    Of another depth than the native one, block r of the learngene stands at its relative place.
    """
    theirs = sent_names(site.native, blocks)
    if blocks is None or site.shape == site.native:
        return dict(zip(theirs, theirs, strict=True))
    mine = transforms.relative_positions(tuple(blocks), site.native.depth, site.shape.depth)
    return dict(zip(theirs, sent_names(site.shape, mine), strict=True))


def placed(
    site: Site, content: RecordDict, blocks: Sequence[int] | None, own: Mapping[str, Tensor] | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """(the client's network with what came in its place, what came by the network's own names).

    A client that takes part for the first time inherits: at the native depth the layers go to their places, at another
    depth ``expand`` of gene-fl fills every block.

    Raises:
        TrainingError: a tensor is unknown, or of another shape.
    """
    model = initial_model(site.settings, site.shape)
    came = content.array_records.get("arrays", ArrayRecord())
    arrays = {name: torch.from_numpy(array.numpy()).float() for name, array in came.items()}
    names = translated(site, blocks)
    state = dict(model.state_dict()) if own is None else dict(own)
    if own is None and arrays and blocks and site.shape != site.native:
        state |= _expanded(site, arrays, blocks, content.config_records["config"])
    received = {}
    for name, tensor in arrays.items():
        mine = names.get(name)
        if mine is None or state[mine].shape != tensor.shape:
            raise TrainingError(f"{name} {list(tensor.shape)} came; this client's network has no such tensor")
        received[mine] = tensor
    model.load_state_dict(state | received, strict=True)
    return model, received


def _expanded(
    site: Site, arrays: Mapping[str, Tensor], blocks: Sequence[int], config: ConfigRecord
) -> dict[str, Tensor]:
    """What ``expand`` gives a client of another depth."""
    entries, group = layer_entries(site.native), group_of(site.native)
    tensors = {f"{group}.{i}.{rest}": arrays[name] for i in blocks for rest, name in entries[i].items()}
    xi = config.get("xi") or [1 / len(entries)] * len(entries)
    tensors[SCORE] = torch.tensor(xi, dtype=torch.float32)
    gene = assemble_learngene(
        tensors, site.native, {}, facts={}, preprocessing=preprocessing_of(site.settings), provenance={}
    )
    found = GeneFl(criterion=site.settings.criterion).expand(gene, site.shape)
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def native_xi(xi_L: Tensor, site: Site) -> list[float]:
    """The client's sensitivities by the native network's layers: each takes that of the block at its relative place,
    and the sum is 1 again."""
    depth, native = len(xi_L), len(layer_entries(site.native))
    if depth == native:
        return xi_L.tolist()
    taken = torch.stack([xi_L[transforms.relative_positions((i,), native, depth)[0]] for i in range(native)])
    return (taken / taken.sum()).tolist()


def zetas(site: Site, blocks: Sequence[int] | None, xi: Sequence[float] | None) -> dict[str, float]:
    """zeta_l = |S| xi_l by the names of the client's own network; empty (all 1) where there is no xi yet."""
    if xi is None or site.settings.strategy in FLOWERS:
        return {}
    entries = layer_entries(site.shape)
    chosen = range(len(entries)) if blocks is None else (
        blocks if site.shape == site.native
        else transforms.relative_positions(tuple(blocks), site.native.depth, site.shape.depth)
    )  # fmt: skip
    return {name: len(chosen) * xi[i] for i in chosen for name in entries[i].values()}


def _held_by(settings: Federation, config: ConfigRecord) -> Federation:
    """The settings of the constraint: those of FedProx where its mu came; none of FedAvg."""
    if settings.strategy not in FLOWERS:
        return settings
    return replace(settings, mu=float(config.get("proximal-mu", 0.0)), nu=0.0, paper_mode=False)  # type: ignore[arg-type]


def to_record(tensors: Mapping[str, Tensor], wire: str) -> ArrayRecord:
    """Tensors as a record, in the numbers of the wire; nothing but these names is in it."""
    kind = DTYPES[wire]
    return ArrayRecord({name: Array(tensor.detach().cpu().to(kind).numpy()) for name, tensor in tensors.items()})


def _whole(config: ConfigRecord, name: str) -> int | None:
    value = config.get(name)
    return int(value) if isinstance(value, int | float) else None


def _number(config: ConfigRecord, name: str) -> float | None:
    value = config.get(name)
    return float(value) if isinstance(value, int | float) else None

"""GENE-FL against Flower's own FedAvg, its bytes, what stays private, clusters, newcomers, what it leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fed import grid_of, names_on_the_wire, run, tiny
from flwr.app import ConfigRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg

from learngene_hub import factory
from learngene_hub.errors import DataError, SettingsError
from learngene_hub.federated._introduction import Introduction
from learngene_hub.federated._membership import joined, nearest
from learngene_hub.federated._saved import Progress
from learngene_hub.federated.apps import simulate
from learngene_hub.federated.client import make_client_app, to_record
from learngene_hub.federated.memory import MemoryGrid
from learngene_hub.federated.models import VGG11, count_of, initial_model, native_shape, sent_names, without_norms
from learngene_hub.federated.server import Outcome, bytes_of, conduct, rounds_of, welcome
from learngene_hub.federated.strategy import GeneFL
from learngene_hub.federated.subspace import principal_angles
from learngene_hub.federated.traffic import client_meter, totals
from learngene_hub.learngene import Learngene
from learngene_hub.methods._gene_fl_layers import layer_params, quarter
from learngene_hub.shape import ViTShape

FREE = {"mu": 0.0, "nu": 0.0, "clusters": 1, "share": "everything", "blocks": 4}


def test_all_blocks_one_cluster_and_no_constraint_are_flowers_fedavg() -> None:
    """One round, from the messages to the average: Flower's FedAvg and ours, with the same clients."""
    ours, _ = run(**FREE, rounds=1)
    theirs, _ = run(strategy="fedavg", rounds=1)
    assert ours.strategy is not None and theirs.arrays is not None
    gene = ours.strategy.progress.clusters[0].gene
    assert gene.keys() == theirs.arrays.keys()
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(gene[name], array.numpy(), atol=1e-6, rtol=0, err_msg=name)
    first = initial_model(tiny(), ours.strategy.native).state_dict()
    assert max(float((first[name] - torch.from_numpy(gene[name])).abs().max()) for name in gene) > 1e-3  # it did train
    assert ours.history[0]["accuracy"] == pytest.approx(theirs.history[0]["accuracy"])


def test_every_round_averages_the_same_replies_as_flowers_fedavg_does() -> None:
    """Over several rounds, on the very replies: two runs drift apart, as AdamW blows up last bits of gradients of 0."""
    settings = tiny(**FREE)
    grid = grid_of(settings, 3)
    strategy, flowers = GeneFL(settings, native_shape(settings, 10)), FedAvg(fraction_evaluate=0.0)
    for round in (1, 2, 3):
        replies = grid.send_and_receive(strategy.configure_train(round, strategy.merged(), ConfigRecord(), grid))
        strategy.aggregate_train(round, replies)
        theirs, _ = flowers.aggregate_train(round, replies)
        gene = strategy.progress.clusters[0].gene
        assert theirs is not None and gene.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_allclose(gene[name], array.numpy(), atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "blocks", "least"),
    [
        (ViTShape(depth=12, width=192, heads=3, classes=10), 3, 4.14),
        (ViTShape(depth=12, width=192, heads=3, patch=4, image_size=32, classes=10), 3, 4.01),
        (ViTShape(depth=6, width=192, heads=3, patch=4, image_size=32, classes=10), 1, 6.05),
        (ViTShape(depth=12, width=384, heads=6, classes=10), 3, 4.07),
    ],
)
def test_a_learngene_is_four_times_smaller_than_the_model_by_flowers_record_sizes(
    shape: ViTShape, blocks: int, least: float
) -> None:
    state = shape.build().state_dict()
    whole = to_record({name: state[name] for name in sent_names(shape, None)}, "float32").count_bytes()
    last = range(shape.depth - blocks, shape.depth)  # the longest names
    part = to_record({name: state[name] for name in sent_names(shape, last)}, "float32").count_bytes()
    assert quarter(shape) == blocks and whole / part >= least
    if shape == ViTShape(depth=12, width=192, heads=3, classes=10):
        assert (whole, part) == (22_128_110, 5_343_786)  # of the specification, measured there on Flower 1.30


def test_half_precision_halves_the_bytes_of_both() -> None:
    native = native_shape(tiny(), 10)
    for strategy, blocks in (("gene-fl", [0]), ("fedavg", None)):
        full = bytes_of(tiny(strategy=strategy), native, blocks)
        half = bytes_of(tiny(strategy=strategy, wire="float16"), native, blocks)
        assert 1.7 < full / half < 2.0  # names and headers stay
    outcome, grid = run(wire="float16", rounds=1)
    kinds = {
        a.dtype
        for n in grid.nodes.values()
        for c in n.received + n.answered
        for r in c.array_records.values()
        for a in r.values()
    }
    assert kinds == {"float16"} and len(outcome.learngenes) == 2


def test_vgg_11_explains_the_papers_nine_megabytes() -> None:
    shape = native_shape(tiny(family="vgg", blocks=0, image_size=32, depth=0), 10)
    assert shape.stages == VGG11 and without_norms(shape) == 9_225_610
    convs, layers = shape.convs(), layer_params(shape)
    first, last, head = convs[0], convs[-1], shape._head_params()
    plain = sum(conv.params() - 2 * conv.outputs for conv in (first, last)) + head
    assert plain * 4 / 2**20 == pytest.approx(9.03, abs=0.01)
    assert (layers[0] + layers[-1] + head) * 4 / 2**20 == pytest.approx(9.03, abs=0.01)  # with BatchNorm
    assert 35.19 / 9.04 == pytest.approx(without_norms(shape) / plain, abs=0.02)
    assert count_of(tiny(blocks=0), shape) == 1


def test_no_private_tensor_is_ever_on_the_wire() -> None:
    outcome, grid = run(rounds=3, freeze_round=9)
    names = names_on_the_wire(grid)
    assert outcome.strategy is not None
    chosen = {name for name in names if name.startswith("blocks.")}
    assert names - chosen == {"subspace"}  # no stem, no norm, no classifier
    for node in grid.nodes.values():
        for asked, given in zip(node.received[1:], node.answered[1:], strict=True):
            blocks = [int(part) for part in str(asked.config_records["config"]["blocks"]).split(",")]
            expected = set(sent_names(outcome.strategy.native, blocks))
            assert set(given.array_records["arrays"]) == expected  # what was asked for, exactly
            assert set(asked.array_records["arrays"]) <= expected
        private = set(node.context.state.array_records["private"])
        assert private == outcome.strategy.native.keys() and len(private - names) > 30


def test_two_clusters_of_different_layers_are_averaged_apart() -> None:
    """Flower's FedAvg refuses replies whose keys differ; here each cluster has its own."""
    settings = tiny(rounds=1, clusters=2)
    grid = grid_of(settings, 4)
    strategy = GeneFL(settings, native_shape(settings, 10))
    list(strategy.configure_train(1, strategy.merged(), ConfigRecord(), grid))
    other = replace(
        strategy.progress.clusters[1], blocks=(3,), gene={n: strategy.first[n] for n in strategy.names((3,))}
    )
    mine = replace(
        strategy.progress.clusters[0], blocks=(1,), gene={n: strategy.first[n] for n in strategy.names((1,))}
    )
    strategy.progress = replace(strategy.progress, clusters=(mine, other))
    messages = list(strategy.configure_train(1, strategy.merged(), ConfigRecord(), grid))
    replies = grid.send_and_receive(messages)
    before = strategy.progress.member
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None and metrics is not None and metrics["used"] == 4 and set(before.values()) == {0, 1}
    by_node = {reply.metadata.src_node_id: reply.content for reply in replies}
    for number, layer in ((0, 1), (1, 3)):
        own = [by_node[node] for node, cluster in before.items() if cluster == number]
        weights = [float(content["metrics"]["num-examples"]) for content in own]  # type: ignore[index]
        name = f"blocks.{layer}.mlp.fc1.weight"
        wanted = np.average([c["arrays"][name].numpy() for c in own], axis=0, weights=weights)  # type: ignore[index]
        reread = {reply.metadata.src_node_id for reply in replies}
        assert len(reread) == 4
        if f"k{number}/{name}" in arrays:  # it may have been replaced by a layer chosen for the next round
            np.testing.assert_allclose(arrays[f"k{number}/{name}"].numpy(), wanted, atol=1e-6)


def test_layers_are_chosen_until_the_freeze_and_then_stay() -> None:
    settings = tiny(rounds=5, freeze_round=2, smoothing=1.0)
    strategy = GeneFL(settings, native_shape(settings, 10))
    from learngene_hub.federated._round import Reply
    from learngene_hub.federated._saved import Cluster

    cluster = Cluster(blocks=(0,), xi=(0.25,) * 4, gene={n: strategy.first[n] for n in strategy.names((0,))})
    arrays = {name: value.astype(np.float64) for name, value in cluster.gene.items()}
    favour = Reply(node=1, images=5, arrays=arrays, xi=np.array([0.1, 0.2, 0.6, 0.1]), metrics={})
    early = strategy._next(cluster, [favour], 1)
    assert early.blocks == (2,) and early.gene == {}  # chosen anew: it has no average yet
    assert strategy._next(cluster, [favour], 2).blocks == (0,)
    assert GeneFL(replace(settings, criterion="stable"), strategy.native).choose([0.1, 0.2, 0.6, 0.05]) == (3,)
    assert strategy.choose([0.1, 0.2, 0.6, 0.1]) == (2,)


def test_a_newcomer_downloads_exactly_one_learngene() -> None:
    settings = tiny()
    grid = grid_of(settings, 3, partitions=4)
    outcome = conduct(grid, settings)
    late = grid_of(settings, 1, partitions=4, first=3)
    found = welcome(outcome, settings, late, [1004], epochs=1)
    (node,) = late.nodes.values()
    came = [content for content in node.received if content.array_records]
    assert len(came) == 1 and outcome.strategy is not None
    cluster = outcome.strategy.progress.clusters[outcome.strategy.progress.member[1004]]
    record = came[0].array_records["arrays"]
    assert set(record) == set(cluster.gene)
    for name, value in cluster.gene.items():
        np.testing.assert_array_equal(record[name].numpy(), value)
    assert record.count_bytes() <= found["download"] < record.count_bytes() + 120  # the config
    assert not [content for content in node.answered[1:] if content.array_records]  # and sends no weight
    assert 0 <= found["accuracy"] <= 100


def test_a_client_that_joins_later_takes_part_with_one_learngene() -> None:
    settings = tiny(rounds=3, blocks=2)
    grid = grid_of(settings, 3)
    late = grid.nodes[1003]
    late.online = False
    strategy = GeneFL(settings, native_shape(settings, 10))
    strategy.start(grid, strategy.merged(), num_rounds=1)
    late.online = True
    strategy.offset = 1
    strategy.start(grid, strategy.merged(), num_rounds=1)
    assert [row["used"] for row in strategy.progress.history] == [2, 3]
    assert len(late.received) == 2 and 1003 in strategy.progress.member


def test_the_global_gene_is_for_newcomers_that_no_cluster_is_near() -> None:
    outcome, _ = run(4, far=1.5, rounds=1)
    strategy = outcome.strategy
    assert strategy is not None
    e = torch.eye(32)
    tilted = [torch.stack([math.cos(t) * e[k] + math.sin(t) * e[9], e[k + 1]], 1) for k in (0, 2) for t in (0.0, 0.3)]
    bases, member = dict(zip(range(4), tilted, strict=True)), {0: 0, 1: 0, 2: 1, 3: 1}
    strategy.progress = replace(strategy.progress, bases=bases, member=member)
    assert [nearest(strategy.progress, basis, strategy.settings) for basis in tilted] == [0, 0, 1, 1]
    assert nearest(strategy.progress, e[6:8].T, strategy.settings) == -1
    both = strategy.cluster(-1)
    assert len(both.blocks) == 1 and set(both.gene) <= set(strategy.names(both.blocks))
    (name, value), clusters = next(iter(both.gene.items())), strategy.progress.clusters
    own = [(cluster.gene[name], cluster.images) for cluster in clusters if name in cluster.gene]
    wanted = sum(gene * images for gene, images in own) / sum(images for _, images in own)
    np.testing.assert_allclose(value, wanted, atol=1e-6)
    strategy.progress = replace(strategy.progress, member={**member, 7: -1})
    sent = strategy.message(7, -1, 2)
    assert set(sent.content.array_records["arrays"]) == set(both.gene)


def introduced(client: int, basis: torch.Tensor | None, shown: int = 1, xi: float = 0.5) -> Introduction:
    return Introduction(client=client, images=30, xi=(xi, 1 - xi), basis=basis, shown=shown)


def test_a_client_without_a_subspace_joins_the_cluster_of_most_clients() -> None:
    """Three planes of the same two directions, one of others: the larger cluster is known."""
    e, settings = torch.eye(8), tiny(clusters=2)
    bases = {11: e[:2].T, 12: e[4:6].T, 13: e[4:6].T, 14: None, 15: e[4:6].T}
    told = {node: introduced(node, basis, int(basis is not None)) for node, basis in bases.items()}
    found = joined(Progress(), told, settings, set(bases))
    assert found.member == {11: 0, 12: 1, 13: 1, 14: 1, 15: 1} and found.bases.keys() == {11, 12, 13, 15}
    later = joined(replace(found, clusters=(object(), object())), {16: introduced(16, None, 0)}, settings, {16, *bases})
    assert later.member[16] == 1
    assert joined(Progress(), {1: introduced(1, None, 0)}, settings, {1}).member == {1: 0}  # nobody has one


def test_a_client_that_comes_again_under_another_node_is_the_same_client() -> None:
    """As after the server was killed under Flower; another client of the same number is another one."""
    e, settings = torch.eye(8), tiny(clusters=2)
    first = joined(
        Progress(), {1: introduced(0, e[:2].T, xi=0.3), 2: introduced(1, e[4:6].T, xi=0.6)}, settings, {1, 2}
    )
    first = replace(first, clusters=(object(), object()))
    again = joined(first, {8: introduced(1, e[:2].T, xi=0.6), 9: introduced(0, e[:2].T, xi=0.9)}, settings, {8, 9})
    assert again.member == {1: 0, 8: 1, 9: 0}  # 2 is 8 now and keeps its cluster; 1 has other sensitivities than 9
    assert again.clients == {1: 0, 8: 1, 9: 0} and again.bases.keys() == again.xi.keys() == {1, 8, 9}
    there = joined(first, {9: introduced(0, e[4:6].T, xi=0.3)}, settings, {1, 2, 9})
    assert there.member == {1: 0, 2: 1, 9: 1}  # node 1 is still there


def test_clients_of_few_images_take_part_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of seed 22 clients train on 6, 31, 10 and 25 images, of one class at most 3, 7, 3 and 8."""
    settings = tiny(alpha=0.3, min_per_class=7, seed=22)
    grid = grid_of(settings, 4)
    with caplog.at_level("WARNING", "flwr.gene_fl"):
        outcome = conduct(grid, settings)
    assert [row["used"] for row in outcome.history] == [4, 4] and outcome.history[-1]["left_out"] == 0
    first, *others = grid.nodes.values()
    assert [len(node.answered) for node in grid.nodes.values()] == [3, 3, 3, 3]  # introduced once, two rounds
    assert not first.answered[0].array_records and first.answered[0].metric_records["metrics"]["num-examples"] == 6
    ranks = [node.answered[0].array_records["arrays"]["subspace"].shape[1] for node in others]
    assert ranks == [1, 1, 1]  # vectors 1, of one class or of all images
    progress = outcome.strategy.progress  # type: ignore[union-attr]
    assert set(progress.bases) == {1002, 1003, 1004} and set(progress.member) == set(grid.nodes)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "client 0 has 6 images and no class of 7 (min_per_class): it tells no subspace and joins the largest cluster",
        "client 2 has 10 images and no class of 7 (min_per_class): its subspace is that of all its images, whatever "
        "their class",
    ]


def test_clients_of_other_depths_inherit_by_expand_and_share_at_their_relative_places() -> None:
    outcome, grid = run(4, depths="4,6,3", blocks=2, rounds=2)
    assert outcome.history[-1]["used"] == 4
    depths = [
        1
        + max(
            int(name.split(".")[1])
            for name in node.context.state.array_records["private"]
            if name.startswith("blocks.")
        )
        for node in grid.nodes.values()
    ]
    assert depths == [4, 6, 3, 4]
    assert names_on_the_wire(grid) - {"subspace"} <= outcome.strategy.native.keys()  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match="one depth would work"):
        simulate(tiny(depths="4,6", strategy="fedavg"), 2)


def test_a_vgg_is_a_client_too(tmp_path: Path) -> None:
    from learngene_hub.federated import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "VGG11", ((8,), (8, 16), (16,)))
        outcome, grid = run(2, family="vgg", depth=0, rounds=2, clusters=1, blocks=1)
        learngene = outcome.learngenes[0]
    assert outcome.history[-1]["used"] == 2 and not any("num_batches" in n for n in names_on_the_wire(grid))
    digest = learngene.save(tmp_path / "g.safetensors")
    grown = factory.expand(Learngene.load(tmp_path / "g.safetensors", sha256=digest), num_labels=3)
    (kept,) = {name.split(".")[1] for name in learngene.tensors if name.startswith("conv.")}
    conv = learngene.shape.convs()[int(kept)]
    assert torch.equal(grown.state_dict()[f"{conv.name}.weight"], learngene.tensors[f"conv.{kept}.weight"])


@pytest.mark.parametrize("strategy", ["fedprox", "fedavg-bytes", "local", "early", "late"])
def test_every_baseline_runs_in_the_same_harness(strategy: str) -> None:
    outcome, grid = run(2, strategy=strategy, rounds=2, clusters=1)
    native = native_shape(tiny(), 10)
    sent = names_on_the_wire(grid)
    layers = {int(name.split(".")[1]) for name in sent if name.startswith("blocks.")}
    expected = {"local": set(), "early": {0}, "late": {3}}.get(strategy, {0, 1, 2, 3})
    assert layers == expected and len(outcome.history) == rounds_of(tiny(strategy=strategy), native)
    assert ("head.weight" in sent) == (strategy in ("fedprox", "fedavg-bytes"))
    if strategy == "local":
        assert totals(outcome.lines)["down"] < 400 and not outcome.learngenes


def test_fedavg_at_equal_bytes_sends_no_more_than_gene_fl() -> None:
    settings = tiny(strategy="fedavg-bytes", rounds=20)
    native = native_shape(settings, 10)
    whole, part = bytes_of(settings, native, None), bytes_of(settings, native, [0])
    assert whole * rounds_of(settings, native) <= 20 * part < whole * (rounds_of(settings, native) + 1)


def test_traffic_is_what_passed_by_client_and_round_start_up_included(tmp_path: Path) -> None:
    outcome, grid = run(out=str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "traffic.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start-up"] * 3 + ["round"] * 6
    for number, node in grid.nodes.items():
        own = [line for line in lines if line["node"] == str(number)]
        for way, contents in (("down", node.received), ("up", node.answered)):
            assert [line[way] for line in own] == [sum(r.count_bytes() for r in c.values()) for c in contents]
    assert (tmp_path / "run" / "traffic.png").stat().st_size > 5000
    assert [json.loads(line)["round"] for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]
    assert totals(outcome.lines)["start_up"] == sum(x["up"] + x["down"] for x in lines[:3])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, MemoryGrid]:
    """The folder of a run of four clients, its outcome, and the grid it went through."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(4, out=str(folder), blocks=2)


def test_a_run_leaves_a_learngene_per_cluster_with_its_card(kept: tuple[Path, Outcome, MemoryGrid]) -> None:
    run_folder, outcome, _ = kept
    assert outcome.strategy is not None and len(outcome.learngenes) == 2
    members = outcome.strategy.progress.member
    assert sorted(list(members.values()).count(number) for number in (0, 1)) == [1, 3]
    for number, learngene in enumerate(outcome.learngenes):
        folder = run_folder / f"cluster-{number}"
        assert Learngene.load(folder / "learngene.safetensors").digest == learngene.digest
        assert (
            "gene-fl" in (folder / "README.md").read_text()
            and str(run_folder) not in (folder / "README.md").read_text()
        )
        cluster = outcome.strategy.progress.clusters[number]
        grown = factory.expand(learngene).state_dict()
        for name, value in cluster.gene.items():  # at the native depth, the layers at their own places
            assert torch.equal(grown[name], torch.from_numpy(value))
        assert ViTShape.of(factory.expand(learngene, depth=7, num_labels=5)).depth == 7
        own = [basis for node, basis in outcome.strategy.progress.bases.items() if members[node] == number]
        assert ("subspace.basis" in learngene.tensors) == (len(own) > 1)
        for client in own if len(own) > 1 else []:
            basis = learngene.tensors["subspace.basis"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)
            assert float(principal_angles(basis, client)[0]) > 1  # degrees: not one direction is a client's own


def test_the_card_of_a_cluster_tells_what_the_run_measured(kept: tuple[Path, Outcome, MemoryGrid]) -> None:
    """Numbers of the clients' own replies and of what passed, each in its row; settings in full."""
    folder, outcome, grid = kept
    strategy = outcome.strategy
    assert strategy is not None
    sent = totals(outcome.lines)
    for number in (0, 1):
        own = [node for node, cluster in strategy.progress.member.items() if cluster == number]
        last = [grid.nodes[node].answered[-1].metric_records["metrics"] for node in own]
        text = (folder / f"cluster-{number}" / "README.md").read_text()
        cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.count("|") == 3]
        rows = {what: number for _, what, number, _ in cells}
        assert rows["rounds of training and averaging"] == "2" and rows["clients of the run"] == "4"
        assert rows["clients of this cluster"] == str(len(own))
        images = rows["images that the last average is of, as the clients tell"]
        assert int(images) == sum(int(told["num-examples"]) for told in last)  # type: ignore[arg-type]
        after = rows["accuracy of this cluster's clients after training in the last round, per cent"]
        assert float(after) == pytest.approx(np.mean([told["accuracy"] for told in last]), abs=0.06)  # type: ignore[arg-type]
        assert rows["bytes from all clients of the run, in rounds"] == f"{sent['up']:,}"
        assert rows["bytes to all clients of the run, in rounds"] == f"{sent['down']:,}"
        assert f'from_learngene("path/to/cluster-{number}", ' in text and "num_labels=10)" in text
        assert '\nstrategy: "gene-fl"\n' in text and "\nmax_drift: 10.0\n" in text and "…" not in text
        assert (f"The layers that {len(own)} clients of one cluster share." in text) == (len(own) > 1)
        assert ("This cluster has 1 client" in text) == ("The layers of 1 client." in text) == (len(own) == 1)


def test_a_run_from_an_ancestor_begins_with_its_weights(tmp_path: Path, pico_learngene: Learngene) -> None:
    path = pico_learngene.save_pretrained(tmp_path / "ancestor")
    settings = tiny(ancestor=str(path), depth=0, width=0, heads=0, patch=0, rounds=1, clusters=1)
    native = native_shape(settings, 10)
    assert (native.depth, native.width) == (3, 64)
    state = initial_model(settings, native).state_dict()
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], pico_learngene.tensors["block.1.mlp.fc1.weight"])
    outcome = conduct(grid_of(settings, 2), settings)
    assert outcome.learngenes[0].ancestor["name"] == "pico"


def test_flowers_local_differential_privacy_clips_and_blurs_what_is_sent() -> None:
    """It wants the tensors back that it saw come in, so the choice of layers must be frozen from the start."""
    settings = tiny(rounds=2, freeze_round=1, clusters=1, mu=0.0, nu=0.0)
    plain, _ = run(rounds=2, freeze_round=1, clusters=1, mu=0.0, nu=0.0)
    private = LocalDpMod(clipping_norm=0.02, sensitivity=1e-5, epsilon=1.0, delta=1e-5)
    grid = MemoryGrid.of(make_client_app(settings, mods=[private]), 3, record=True)
    outcome = conduct(grid, settings)
    assert [row["used"] for row in outcome.history] == [3, 3]
    assert outcome.strategy is not None and plain.strategy is not None
    first = outcome.strategy.first
    moved = [
        sum(float(((c.gene[n] - first[n]) ** 2).sum()) for n in c.gene) ** 0.5
        for c in (outcome.strategy.progress.clusters[0], plain.strategy.progress.clusters[0])
    ]
    assert moved[0] < 0.5 * moved[1]


def test_clients_can_write_down_what_they_send_and_it_agrees_with_the_server(tmp_path: Path) -> None:
    settings = tiny(clusters=1)
    grid = MemoryGrid.of(make_client_app(settings, mods=[client_meter(tmp_path / "mine.jsonl")]), 2)
    outcome = conduct(grid, settings)
    own = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    theirs = [line for line in outcome.lines if line.kind == "round"]
    assert [(x["round"], x["node"], x["up"], x["down"]) for x in own] == [
        (x.round, x.node, x.up, x.down) for x in theirs
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": "fedsgd"}, "there are gene-fl"),
        ({"held_out": 1.0}, "0.25 would work"),
        ({"blocks": 9}, "4 layers"),
        ({"depths": "4,x"}, "4,6"),
        ({"depths": "4,0"}, "4,6"),
        ({"limit": 4}, "4 images for 4 clients asked; each needs 8: 32 images or more would work"),
        ({"limit": 17}, "17 images for 4 clients asked; each needs 8: 2 clients or fewer would work"),
        ({"ancestor_weights": "x.safetensors"}, "without ancestor"),
    ],
)
def test_settings_that_cannot_work_are_told(changes: dict, told: str) -> None:
    with pytest.raises((SettingsError, DataError), match=told):
        settings = tiny(**{"blocks": 1, **changes})
        native_shape(settings, 10)
        from learngene_hub.federated.site import share_of

        share_of(settings, 0, 4)


def test_the_run_config_is_the_settings_with_hyphens() -> None:
    from learngene_hub.federated.settings import Federation, federation

    settings = tiny(mu=0.5, depths="4,6")
    assert Federation.from_run_config(settings.to_run_config()) == settings
    assert "labels-per-client" in settings.to_run_config()
    assert Federation.from_run_config({"mu": 1}).mu == 1.0
    for wrong, told in (
        ({"mo": 1}, "no setting 'mo'"),
        ({"rounds": "3"}, "it is an int"),
        ({"paper-mode": 1}, "it is true or false"),
        ({"min-clinets": 1}, "did you mean min_clients?"),
        ({"zzz": 1}, "; there are strategy, rounds"),
    ):
        with pytest.raises(SettingsError, match=told):
            Federation.from_run_config(wrong)
    assert federation({"depths": 6}).depth_list() == (6,)

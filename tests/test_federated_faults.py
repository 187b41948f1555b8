"""What goes wrong in a federation: the run goes on, or stops with a clear message; nothing poisons an average, and no
finished round is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fed import grid_of, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from learngene_hub.errors import SettingsError, StoreError, TrainingError
from learngene_hub.federated import artefact
from learngene_hub.federated._saved import FILE
from learngene_hub.federated.apps import simulate
from learngene_hub.federated.memory import NoReply
from learngene_hub.federated.models import native_shape
from learngene_hub.federated.server import Outcome, conduct
from learngene_hub.federated.strategy import GeneFL
from learngene_hub.federated.traffic import Sent, read_lines

Fault = Callable[[Message], Message]


def changed(change: Callable[[str, np.ndarray], np.ndarray | None]) -> Fault:
    """A reply whose tensors are what ``change`` makes of them; None leaves one out."""

    def fault(reply: Message) -> Message:
        record = reply.content.array_records["arrays"]
        made = {name: change(name, array.numpy()) for name, array in record.items()}
        reply.content["arrays"] = ArrayRecord({name: Array(value) for name, value in made.items() if value is not None})
        return reply

    return fault


def told(**metrics: object) -> Fault:
    """A reply with other metrics."""

    def fault(reply: Message) -> Message:
        reply.content["metrics"] = MetricRecord({**reply.content.metric_records["metrics"], **metrics})  # type: ignore[dict-item]
        return reply

    return fault


def killed(reply: Message) -> Message:
    raise NoReply


def crashed(reply: Message) -> Message:
    raise MemoryError("no memory left at the client")


def drawn_as_text(lines: object, accuracy: object, path: Path) -> None:
    path.write_text(repr((list(lines), accuracy)))  # type: ignore[call-overload]


@pytest.fixture(autouse=True)
def _plots_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be drawn is written as text: drawing takes longer than a round; test_federated.py tests it."""
    monkeypatch.setattr(artefact, "draw", drawn_as_text)


FAULTS: dict[str, tuple[Fault, str]] = {
    "killed in the middle of the round, or slower than the timeout": (killed, "no reply in time"),
    "crashed": (crashed, "no memory left at the client"),
    "NaN": (
        changed(lambda n, a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a).astype(a.dtype)),
        "not finite",
    ),
    "infinite": (changed(lambda n, a: np.full_like(a, np.inf)), "not finite"),
    "another shape": (changed(lambda n, a: a.reshape(-1)[:-1] if a.ndim == 2 else a), "was asked for"),
    "whole numbers": (changed(lambda n, a: a.astype(np.int64)), "was asked for"),
    "a tensor is missing": (changed(lambda n, a: None if n.endswith("fc1.bias") else a), "too many or too few"),
    "far outside the norm": (changed(lambda n, a: a + 1e4), "is usual"),
    "turned around and blown up": (changed(lambda n, a: -50 * a), "is usual"),
    "no images": (told(**{"num-examples": 0}), "num-examples"),
    "too many images to be true": (told(**{"num-examples": 10**12}), "num-examples"),
    "negative shares": (told(xi=[2.0, -1.0, 0.0, 0.0]), "xi is not"),
    "NaN shares": (told(xi=[float("nan")] * 4), "xi is not"),
}


def with_fault(fault: Fault, node: int, round: int, clients: int = 3, **changes: object):  # type: ignore[no-untyped-def]
    """A grid of which one node misbehaves in one round."""
    settings = tiny(clusters=1, **changes)
    grid = grid_of(settings, clients)
    app = grid.nodes[node].app

    def faulty(message: Message, context: Context) -> Message:
        reply = app(message, context)
        now = message.content.config_records["config"].get("server-round") == round
        return fault(reply) if now and message.metadata.message_type == "train" else reply

    grid.nodes[node].app = faulty
    return settings, grid


@pytest.fixture(scope="module")
def without() -> dict[str, np.ndarray]:
    """What the other two clients average to in a round of which the third is left out."""
    settings, grid = with_fault(killed, 1003, 1, rounds=1)
    outcome = conduct(grid, settings)
    return {name: array.copy() for name, array in outcome.strategy.progress.clusters[0].gene.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_reply_is_left_out_and_the_round_goes_on(name: str, without: dict[str, np.ndarray]) -> None:
    fault, why = FAULTS[name]
    settings, grid = with_fault(fault, 1003, 1, rounds=1)
    outcome = conduct(grid, settings)
    assert outcome.strategy is not None
    assert outcome.history[-1]["used"] == 2 and outcome.history[-1]["left_out"] == 1
    (left,) = outcome.strategy.left_out
    assert left.node == 1003 and why in left.why, left
    gene = outcome.strategy.progress.clusters[0].gene
    assert gene.keys() == without.keys()
    for tensor, value in without.items():  # not a bit of the bad reply is in the average
        np.testing.assert_array_equal(gene[tensor], value)


def test_the_bad_client_takes_part_again_in_the_next_round() -> None:
    settings, grid = with_fault(crashed, 1002, 1, rounds=2)
    assert [row["used"] for row in conduct(grid, settings).history] == [2, 3]


def test_a_round_without_a_usable_reply_stops_and_keeps_the_last_one(tmp_path: Path) -> None:
    settings = tiny(clusters=1, rounds=3, out=str(tmp_path / "run"), client_state=str(tmp_path / "clients"))
    grid = grid_of(settings, 2)
    apps = {number: node.app for number, node in grid.nodes.items()}

    def broken(message: Message, context: Context) -> Message:
        if message.content.config_records["config"].get("server-round") == 2:
            raise MemoryError("no memory left")
        return apps[context.node_id](message, context)

    for node in grid.nodes.values():
        node.app = broken
    with pytest.raises(
        TrainingError, match="round 2: none of 2 clients.*no memory left.*round 1 is the last"
    ) as caught:
        conduct(grid, settings)
    assert "\n" not in str(caught.value)
    for number, node in grid.nodes.items():
        node.app = apps[number]
    outcome = conduct(grid, settings)
    assert [row["round"] for row in outcome.history] == [1, 2, 3] and all(row["used"] == 2 for row in outcome.history)


def test_a_killed_server_goes_on_after_its_last_round_to_the_same_result(tmp_path: Path) -> None:
    """The server is killed after the clients have trained round 2, and before it has saved it."""
    through = tiny(rounds=3, blocks=2)
    whole = conduct(grid_of(through, 3), through)
    settings = tiny(rounds=3, blocks=2, out=str(tmp_path / "run"), client_state=str(tmp_path / "clients"))
    strategy = GeneFL(settings, native_shape(settings, 10), folder=tmp_path / "run")
    grid = grid_of(settings, 3)
    strategy.start(grid, strategy.merged(), num_rounds=1)
    strategy.offset = 1
    grid.send_and_receive(strategy.configure_train(1, strategy.merged(), ConfigRecord(), grid))
    del strategy, grid  # killed: clients have trained round 2, the server never saved it
    fresh = grid_of(settings, 3)
    again = conduct(fresh, settings)
    assert [row["round"] for row in again.history] == [1, 2, 3]
    assert whole.strategy is not None and again.strategy is not None
    for one, two in zip(whole.strategy.progress.clusters, again.strategy.progress.clusters, strict=True):
        assert one.blocks == two.blocks and one.xi == pytest.approx(two.xi)
        for name, value in one.gene.items():
            np.testing.assert_array_equal(two.gene[name], value, err_msg=name)
    assert conduct(fresh, settings).history == again.history  # finished: nothing more is done


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with a run of two rounds by one process, and its outcome."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "draw", drawn_as_text)
        return folder, simulate(tiny(rounds=2, out=str(folder)), 2)


def test_private_parts_outlive_a_run_in_its_folder_and_no_longer(tmp_path: Path, at_once: tuple[Path, Outcome]) -> None:
    """One round and then another end as two at once; a run that begins anew there does not take the old parts up."""
    simulate(tiny(rounds=1, out=str(tmp_path / "two")), 2)
    resumed = simulate(tiny(rounds=2, out=str(tmp_path / "two")), 2)
    assert sorted(path.name for path in (tmp_path / "two" / "clients").iterdir()) == ["client-0.npz", "client-1.npz"]
    (tmp_path / "two" / FILE).unlink()
    anew = simulate(tiny(rounds=2, out=str(tmp_path / "two")), 2)
    _, straight = at_once
    for other in (resumed, anew):
        assert other.history == straight.history
        for one, two in zip(straight.learngenes, other.learngenes, strict=True):
            assert one.tensors.keys() == two.tensors.keys()
            for name, tensor in one.tensors.items():
                np.testing.assert_array_equal(two.tensors[name].numpy(), tensor.numpy(), err_msg=name)
    simulate(tiny(strategy="fedavg", rounds=1, out=str(tmp_path / "average")), 2)
    assert not (tmp_path / "average" / "clients").exists()  # whole models: there are no private parts


def test_a_run_in_two_parts_tells_of_both_and_a_finished_one_writes_nothing(
    tmp_path: Path, at_once: tuple[Path, Outcome]
) -> None:
    """Traffic, card and artefact of two processes are to the byte those of one."""
    parts, (whole, straight) = tmp_path / "parts", at_once
    simulate(tiny(rounds=1, out=str(parts)), 2)
    with (parts / "traffic.jsonl").open("a") as file:
        file.write('{"round": 2, "kind": "rou')  # killed while it wrote
    simulate(tiny(rounds=2, out=str(parts)), 2)
    names = ["traffic.jsonl", "rounds.jsonl", "cluster-0/learngene.safetensors", "cluster-0/README.md", "traffic.png"]
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    told = straight.learngenes[0].provenance["federation"]["traffic_bytes"]
    kinds = [(line.round, line.kind) for line in straight.lines]
    assert kinds == [(1, "start-up")] * 2 + [(1, "round")] * 2 + [(2, "round")] * 2
    assert told["up"] == sum(line.up for line in straight.lines[2:]) and told["start_up"] > 0

    def state() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in parts.rglob("*") if path.is_file()}

    before = state()
    again = simulate(tiny(rounds=2, out=str(parts)), 2)
    assert state() == before and again.done_before == 2 and again.lines == straight.lines
    (parts / "cluster-0" / "README.md").unlink()
    simulate(tiny(rounds=2, out=str(parts)), 2)  # something is missing: it is written again
    assert {path: data for path, (_, data) in state().items()} == {path: data for path, (_, data) in before.items()}
    (parts / "server.npz").unlink()
    assert simulate(tiny(rounds=1, out=str(parts)), 2).lines == straight.lines[:4]  # anew: no traffic of the old run


def test_a_run_goes_on_with_as_many_clients_as_divided_its_data(tmp_path: Path) -> None:
    """Each client's images follow from their number."""
    simulate(tiny(rounds=1, out=str(tmp_path)), 2)
    with pytest.raises(SettingsError, match="3 clients asked; the run in .* divided its data among 2: 2, or another"):
        simulate(tiny(rounds=2, out=str(tmp_path)), 3)
    assert [row["round"] for row in simulate(tiny(rounds=2, out=str(tmp_path)), 2).history] == [1, 2]
    (tmp_path / "simulation.json").write_text("[]")
    with pytest.raises(StoreError, match="does not say among how many clients"):
        simulate(tiny(rounds=3, out=str(tmp_path)), 2)


def test_a_damaged_traffic_file_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    good = '{"round": 1, "kind": "round", "node": "7", "down": 3, "up": 4, "answered": true}\n'
    path.write_text(good + good.replace("3", '"3"'))
    with pytest.raises(StoreError, match="traffic.jsonl, line 2, is no line of traffic"):
        read_lines(path)
    path.write_text(good + "{}\n")
    with pytest.raises(StoreError, match="line 2"):
        read_lines(path)
    path.write_text(good)
    assert read_lines(path) == [Sent(round=1, kind="round", node="7", down=3, up=4, answered=True)]


def test_fedavg_goes_on_too(tmp_path: Path) -> None:
    settings = tiny(strategy="fedavg", rounds=1, out=str(tmp_path / "run"))
    conduct(grid_of(settings, 2), settings)
    more = tiny(strategy="fedavg", rounds=2, out=str(tmp_path / "run"))
    resumed, whole = (
        conduct(grid_of(more, 2), more),
        conduct(grid_of(tiny(strategy="fedavg"), 2), tiny(strategy="fedavg")),
    )
    assert [row["round"] for row in resumed.history] == [1, 2]
    for name, array in whole.arrays.items():  # type: ignore[union-attr]
        np.testing.assert_allclose(resumed.arrays[name].numpy(), array.numpy(), atol=1e-6)  # type: ignore[index]


def test_a_saved_run_of_other_settings_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = tiny(rounds=1, out=str(folder))
    conduct(grid_of(settings, 2), settings)
    other = tiny(rounds=1, out=str(folder), mu=0.5)
    with pytest.raises(SettingsError, match="mu 0.5 asked.*0.01"):
        conduct(grid_of(other, 2), other)
    data = (folder / "server.npz").read_bytes()
    for wrong in (data[: len(data) // 2], b"", b"PK" + data[2:200]):
        (folder / "server.npz").write_bytes(wrong)
        with pytest.raises(StoreError, match="server.npz.*remove it"):
            conduct(grid_of(settings, 2), settings)


def test_a_client_that_cannot_keep_its_private_part_says_so_before_it_trains(tmp_path: Path) -> None:
    """As on a SuperNode, where the server cannot look."""
    (tmp_path / "file").write_text("")
    settings = tiny(client_state=str(tmp_path / "file" / "x"))
    grid = grid_of(settings, 2)
    with pytest.raises(TrainingError, match="round 1: none of 2 clients.*client_state .*file/x asked; it cannot be"):
        conduct(grid, settings)
    assert [len(node.received) for node in grid.nodes.values()] == [1, 1]  # the question for its subspace alone


def test_too_few_clients_end_the_wait_with_a_message() -> None:
    settings = tiny(min_clients=3, wait=0.1)
    with pytest.raises(TrainingError, match="2 clients are there.*min_clients 3"):
        conduct(grid_of(settings, 2), settings)


@pytest.mark.parametrize("wrong", ["nan", "none", "one", "error"])
def test_a_subspace_that_cannot_be_used_leaves_its_client_out_of_the_clusters(wrong: str) -> None:
    settings = tiny(rounds=1)
    grid = grid_of(settings, 3)
    app = grid.nodes[1002].app

    def faulty(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "query.subspace":
            if wrong == "error":
                raise ValueError("no data here")
            content = RecordDict({"metrics": reply.content["metrics"]})
            if wrong != "none":
                basis = reply.content["arrays"]["subspace"].numpy()  # type: ignore[index]
                value = np.full_like(basis, np.nan) if wrong == "nan" else basis[0]
                content["arrays"] = ArrayRecord({"subspace": Array(value)})
            return Message(content, reply_to=message)
        return reply

    grid.nodes[1002].app = faulty
    outcome = conduct(grid, settings)
    assert outcome.history[-1]["used"] == 2 and 1002 not in outcome.strategy.progress.member  # type: ignore[union-attr]
    assert all(np.isfinite(v).all() for c in outcome.strategy.progress.clusters for v in c.gene.values())  # type: ignore[union-attr]

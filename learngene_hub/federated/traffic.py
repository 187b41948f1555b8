"""What a run sends: bytes of every message by Flower's own record sizes, per round and client, up and down.

``Metered`` is a Grid around a Grid: whatever strategy sends through it is counted, Flower's own FedAvg like ours. A
line of the JSONL is one message that a client got or gave in one round; kinds are "start-up" (subspaces), "round" and
"newcomer". Sizes are ``count_bytes`` of the records: .npy data with its header, and the names. Metadata, TLS and
retransmissions are not in them. A run that goes on reads its earlier lines back, so that totals are of all its rounds;
a round that had to be repeated was sent twice, and counts twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid

from learngene_hub.errors import StoreError

KINDS: Mapping[str, str] = {"query.subspace": "start-up", "train": "round", "train.adopt": "newcomer"}


def size_of(content: RecordDict) -> int:
    """Bytes of all records, as Flower counts them."""
    return sum(record.count_bytes() for record in content.values())


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One client in one round: bytes to it and from it."""

    round: int
    kind: str  # start-up, round, newcomer
    node: str  # Flower's number of the node
    down: int  # bytes to the client
    up: int  # bytes from it; 0 where no usable reply came
    answered: bool


class Metered(Grid):
    """A Grid that counts what passes through another one."""

    def __init__(self, grid: Grid, path: Path | None = None) -> None:
        """``path``: JSONL that lines are added to as rounds end; those that are there are the first of ``lines``.

        Raises:
            StoreError: as ``read_lines``.
        """
        self.inner, self.path = grid, path
        self.lines = read_lines(path) if path is not None else []

    def set_run(self, run) -> None:  # type: ignore[no-untyped-def]
        self.inner.set_run(run)

    @property
    def run(self):  # type: ignore[no-untyped-def]
        return self.inner.run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):  # type: ignore[no-untyped-def]
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As of the inner grid; each message and its reply become a line."""
        sent = list(messages)
        down = {message.metadata.dst_node_id: message for message in sent}
        sizes = {node: size_of(message.content) for node, message in down.items()}
        replies = list(self.inner.send_and_receive(sent, timeout=timeout)) if sent else []
        up = {r.metadata.src_node_id: size_of(r.content) for r in replies if r.has_content()}
        lines = [
            Sent(
                round=_round(message), kind=KINDS.get(message.metadata.message_type, message.metadata.message_type),
                node=str(node), down=sizes[node], up=up.get(node, 0), answered=node in up,
            )
            for node, message in down.items()
        ]  # fmt: skip
        self.lines.extend(lines)
        if self.path is not None and lines:
            append_lines(self.path, [asdict(line) for line in lines])
        return replies


def _round(message: Message) -> int:
    config = message.content.config_records.get("config")
    return int(config.get("server-round", 0)) if config is not None else 0  # type: ignore[arg-type]


def append_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows at the end of a JSONL file.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; another out folder would work") from error


def read_lines(path: Path) -> list[Sent]:
    """The lines of a JSONL file; none where there is no file. A last line that was cut off (the server was killed while
    it wrote) is removed from the file.

    Raises:
        StoreError: it cannot be read, or a line is none of ``Sent``.
    """
    try:
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            os.truncate(path, len(whole))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; another out folder would work") from error
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = Sent(**json.loads(line))
            if not all(type(getattr(row, name)) is int for name in ("round", "down", "up")):
                raise TypeError("a number is none")
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{path}, line {number}, is no line of traffic; without that file the run goes on, and its totals are "
                "of the rounds to come"
            ) from error
        found.append(row)
    return found


def totals(lines: Iterable[Sent]) -> dict[str, int]:
    """Bytes up and down in rounds, of the start-up (both ways) and of newcomers (both ways)."""
    found = {"up": 0, "down": 0, "start_up": 0, "newcomer": 0}
    for line in lines:
        if line.kind == "round":
            found["up"] += line.up
            found["down"] += line.down
        else:
            found["start_up" if line.kind == "start-up" else "newcomer"] += line.up + line.down
    return found


def client_meter(path: Path):  # type: ignore[no-untyped-def]
    """A Flower mod that adds what a client gets and gives to a JSONL file on its own machine, to compare."""

    def meter(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        down = size_of(message.content)
        reply = call_next(message, context)
        up = size_of(reply.content) if reply.has_content() else 0
        row = {"round": _round(message), "kind": KINDS.get(message.metadata.message_type, ""), "down": down, "up": up}
        append_lines(path, [row | {"node": str(context.node_id)}])
        return reply

    return meter


def draw(lines: Sequence[Sent], accuracy: Mapping[int, float], path: Path, title: str = "") -> None:
    """Bytes of all clients per round, up and down, and beside it the clients' mean accuracy; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rounds = sorted({line.round for line in lines if line.kind == "round"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for way, colour in (("down", "#3b6ea8"), ("up", "#d08c1d")):
        of = [sum(getattr(x, way) for x in lines if x.kind == "round" and x.round == r) / 1e6 for r in rounds]
        left.plot(rounds, of, "o-", color=colour, markersize=3, label=way)
    start = totals(lines)["start_up"] / 1e6
    left.set(xlabel="round", ylabel="MB of all clients", ylim=(0, None), title=f"start-up: {start:.2f} MB")
    left.legend(frameon=False)
    right.plot(list(accuracy), list(accuracy.values()), "o-", color="#0b6e4f", markersize=3)
    right.set(xlabel="round", ylabel="accuracy on clients' own images, %", title=title)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""A Flower Grid in this process: messages, errors and lost replies as the real runtime has them, without Ray or ports.

Every message and reply is written to bytes and read back by Flower's own serialisation, so that nothing is shared by
accident and a record that cannot travel fails here too. A ClientApp that raises answers with Flower's error reply; one
that raises ``NoReply`` was killed or is too late, and no reply comes. Context, and with it the private state, belongs
to a node as in a SuperNode. What it is not: there is no concurrency, no authentication, no time to live; clients work
one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = 2  # Flower's code of an exception in a ClientApp


class NoReply(Exception):
    """A client that never answers: killed in the middle of a round, or slower than the timeout."""


@dataclass
class Node:
    """One client: what handles its messages, and its context."""

    app: Callable[[Message, Context], Message]
    context: Context
    online: bool = True
    received: list[RecordDict] = field(default_factory=list)  # every message's content, as it came
    answered: list[RecordDict] = field(default_factory=list)


def over_the_wire(content: RecordDict) -> RecordDict:
    """The same records, from their bytes."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


class MemoryGrid(Grid):
    """The nodes of one run, by number; ``record``: keep what each got and gave."""

    def __init__(self, nodes: Mapping[int, Node], *, record: bool = False) -> None:
        self.nodes, self.record = dict(nodes), record

    @classmethod
    def of(
        cls,
        app: Callable[[Message, Context], Message],
        clients: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        partitions: int | None = None,
        first: int = 0,
        record: bool = False,
    ) -> MemoryGrid:
        """``clients`` nodes, 1001 + partition-id and so on, of one app; ``partitions`` (None: as many as clients)
        divide the data, and the nodes are those from partition ``first`` on."""
        nodes = {}
        for client in range(first, first + clients):
            place = {"partition-id": client, "num-partitions": partitions or first + clients}
            context = Context(
                run_id=1, node_id=1001 + client, node_config=dict(place), state=RecordDict(),
                run_config=dict(run_config or {}),
            )  # fmt: skip
            nodes[1001 + client] = Node(app, context)
        return cls(nodes, record=record)

    def set_run(self, run) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError("a MemoryGrid is one run")

    @property
    def run(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError("a MemoryGrid knows nothing of its run")

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):  # type: ignore[no-untyped-def]
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.online]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("send_and_receive is what strategies use")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("send_and_receive is what strategies use")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies of the nodes that answer, in the order of the messages; NoReply stands for ``timeout``."""
        return [reply for message in messages if (reply := self._deliver(message)) is not None]

    def _deliver(self, message: Message) -> Message | None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None or not node.online:
            return None
        came = Message(
            over_the_wire(message.content), message.metadata.dst_node_id, message.metadata.message_type,
            group_id=message.metadata.group_id,
        )  # fmt: skip
        if self.record:
            node.received.append(over_the_wire(message.content))
        try:
            reply = node.app(came, node.context)
        except NoReply:
            return None
        except Exception as error:  # as Flower's runtime: whatever a ClientApp raises is an error reply
            return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        content = over_the_wire(reply.content)
        if self.record:
            node.answered.append(content)
        return Message(content, reply_to=message)


def as_server() -> None:
    """Say who this process is, which Flower's messages need; the real runtime does it before a ServerApp starts."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

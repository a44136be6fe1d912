"""Every message of this client, as it goes and comes: counted, here and in the ledger, each time that it is sent."""

from __future__ import annotations

from google.protobuf.message import Message

from fedpeft.rpc.chunk_messages import WrittenChunk
from fedpeft.v1 import access_service_pb2 as access_pb
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state.contact import Contact
from fedpeft_client.uplink.channel import Channel

BOOKED = (
    pb.RegisterRequest,
    pb.AnswerOfferRequest,
    pb.PushUpdateRequest,
    pb.WithdrawRequest,
    pb.PushEvaluationRequest,
    access_pb.LeaveRequest,
)
"""Messages that their senders book, with their content; any other message is a question."""


class Traffic:
    """Looks at the messages of a channel.

    Args:
        channel: The channel.
        egress_log: Log in which each message is counted before it leaves.
        metrics: Metrics in which all of it is counted.
        contact: Told that the server answered.
    """

    def __init__(
        self, channel: Channel, egress_log: EgressLog, metrics: Metrics, contact: Contact | None = None
    ) -> None:
        self._egress_log = egress_log
        self._metrics = metrics
        self._contact = contact
        channel.sent, channel.received = self._sent, self._received

    def _sent(self, message: Message | WrittenChunk) -> None:
        if isinstance(message, WrittenChunk):
            self._egress_log.sending(len(message.message))
            self._metrics.wire_bytes.labels("up").inc(len(message.message))
            self._metrics.payload_bytes.labels("up").inc(message.data_bytes)
            return
        size = message.ByteSize()
        (self._egress_log.sending if isinstance(message, BOOKED) else self._egress_log.polling)(size)
        self._metrics.wire_bytes.labels("up").inc(size)

    def _received(self, message: Message) -> None:
        if self._contact:
            self._contact.note()
        self._metrics.wire_bytes.labels("down").inc(message.ByteSize())
        if isinstance(message, pb.PullAdapterResponse) and message.HasField("chunk"):
            self._metrics.payload_bytes.labels("down").inc(len(message.chunk.data))

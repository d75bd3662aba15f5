"""Floor 4. ZeroMQ between hub and clients: ROUTER at the hub, DEALER at each client, both ends by name here.

ZeroMQ promises nothing across a disconnect; spool, acknowledgements and Hello do. Every option and its
reason:

    LINGER 0             closing never waits: what is unacknowledged is on disk
    IMMEDIATE 1          no queue for a hub that is not there; sending waits instead
    HWM                  credit bounds the bytes on the way; the mark only bounds small messages
    MAXMSGSIZE           no frame is larger than the largest array; guard.py bounds frames without end
    HANDSHAKE_IVL 5 s    a stranger who connects and says nothing is dropped
    BACKLOG 4096         a crowd at the door leaves room for those who come back after a restart
    CONNECT_TIMEOUT 5 s  the kernel tries for two minutes, each time after twice as long
    RECONNECT_IVL        100 ms, doubling to 10 s: many clients return without a stampede
    ROUTER_MANDATORY 1   sending to a peer that is gone is an error, not silence
    CURVE                with keys, both ends prove themselves, and nobody reads along
    ZAP_DOMAIN           turns ZMTP 1 and 2 away, keys or not: as their peer leaves, libzmq may abort the hub
    ZAP_ENFORCE_DOMAIN   with keys, nobody comes in without an answer of the allow-list
    no ROUTER_HANDOVER   a stranger cannot take a name over; names are bound in Hello, and to their key
    no heartbeats        a busy peer would be cut; pings of the protocol measure life
"""

from __future__ import annotations

from slipstream.transport.dealer import DealerChannel, SyncDealerChannel
from slipstream.transport.router import RouterServer, merge_acks
from slipstream.transport.sockets import (
    HIGH_WATER,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    receive_frames,
    send_frames,
)

__all__ = [  # noqa: RUF022 - plainly sorted
    "DealerChannel",
    "HIGH_WATER",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "RouterServer",
    "SyncDealerChannel",
    "merge_acks",
    "receive_frames",
    "send_frames",
]

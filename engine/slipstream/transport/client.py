"""Floor 4. The two clients of the hub, whatever carries their messages.

who          waits for                         released by
send         byte credit, room in the spool    Ack
receive      Grant, Weights, Stop              the hub, or DeadlineError after `silence_s` of silence
pull         a whole batch                     Batch
"""

from __future__ import annotations

from slipstream.transport.actor_client import UNASSIGNED, ActorClient
from slipstream.transport.learner_client import LearnerClient
from slipstream.transport.learner_core import PulledBatch

__all__ = ["ActorClient", "LearnerClient", "PulledBatch", "UNASSIGNED"]  # noqa: RUF022 - plainly sorted

"""A learner that is asked to stop does not wait for a hub that is gone."""

from __future__ import annotations

import time

from slipstream.learner import _PartingChannel

NOBODY = "ipc:///tmp/slipstream-nobody-listens-here"


def test_who_parts_says_nothing_to_a_hub_that_is_gone() -> None:
    channel = _PartingChannel(NOBODY)
    try:
        assert not channel.send([b"x"], 0.3)
        asked = time.monotonic() + 0.5
        channel.parting = lambda: time.monotonic() > asked
        assert channel.send([b"x"], 1000.0)
    finally:
        channel.close()

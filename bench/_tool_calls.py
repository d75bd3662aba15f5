"""A part of the benchmark `tool_cache`: the episodes of one actor of a run, once more.

    python _tool_calls.py RUN ACTOR CACHE LATENCY LIVE

Begun in the order in which they began, at most LIVE at one time, as the actor did; what the policy said is
there already and takes no time. Prints "ready", waits for a line, then prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from slipstream.chat import Chat
from slipstream.episodes import EpisodeRunner
from slipstream.recorded import stored
from slipstream.redaction import Redactor
from slipstream.replay import played_again
from slipstream.run_folder import read_config
from slipstream.runners import configured_runner
from slipstream.tokenizer import load_tokenizer
from slipstream.types import Trajectory
from slipstream.wire import decode_trajectory


def main(folder: Path, actor: str, cache: str, latency_s: float, live: int) -> None:
    """Play the episodes and tell what their calls took."""
    config = read_config(folder)
    slow = {"tool_latency_s": latency_s, "tool_cache": cache}
    config = config.model_copy(update={"environment": config.environment.model_copy(update=slow)})
    chat = Chat(load_tokenizer(folder / "checkpoints" / "warmup"))
    runner = configured_runner(config, chat, Redactor(), folder=folder)
    assert isinstance(runner, EpisodeRunner)
    episodes = [decode_trajectory(one.record) for one in stored(folder) if one.identity.actor == actor]
    episodes.sort(key=lambda one: one.timings.started_s)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    sys.stdout.write(json.dumps(asyncio.run(played(runner, episodes, live))) + "\n")


async def played(runner: EpisodeRunner, episodes: list[Trajectory], live: int) -> dict[str, int]:
    """Play all episodes; an episode that is not as it was ends it."""
    places = asyncio.Semaphore(live)
    told = {"episodes": len(episodes), "calls": 0, "real": 0}

    async def one(recorded: Trajectory) -> None:
        async with places:
            got, differs = await played_again(runner, recorded)
        if differs:
            raise SystemExit(f"{recorded.identity}: {differs[0]}")
        for call in got.tool_calls:
            if call.name != "answer":
                told["calls"] += 1
                told["real"] += not call.cached

    async with asyncio.TaskGroup() as group:
        for recorded in episodes:
            group.create_task(one(recorded))
    await runner.close()
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))

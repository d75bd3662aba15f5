"""Floor 5. Evaluation of a policy folder on tasks it was not trained on, and episodes to read."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from slipstream import versions
from slipstream.call_formats import CALL_FORMATS
from slipstream.chat import Chat
from slipstream.config import RunConfig
from slipstream.demonstrations import demonstrations
from slipstream.environments import environment_factory
from slipstream.environments.factory import ORACLE
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError
from slipstream.inference.trial import held_trial
from slipstream.metrics import wilson_interval
from slipstream.model import choose_device, load_policy
from slipstream.policy_step import describe
from slipstream.redaction import Redactor
from slipstream.rewards import components, reward
from slipstream.run_folder import write_json
from slipstream.runners import configured_runner
from slipstream.selection import pass_at_k
from slipstream.tokenizer import load_tokenizer, train_tokenizer
from slipstream.types import Score, ScoreKind, Split, Trajectory

log = logging.getLogger(__name__)


def main(
    config: RunConfig,
    checkpoint: Path,
    *,
    split: Split,
    tasks: int,
    attempts: int,
    temperature: float,
    output: Path | None,
) -> int:
    """Evaluate the policy in `checkpoint` and print or write success with its 95 % interval.

    The interval is that of independent episodes; several attempts at one task are not, so that it is left out
    then and pass@k is told.
    """
    torch.set_num_threads(config.actor.threads)
    shown = tried(config, checkpoint, split=split, tasks=tasks, attempts=attempts, temperature=temperature)
    successes = sum(t.success for t in shown)
    low, high = wilson_interval(successes, tasks)
    passes, categories = passes_of(shown, attempts), by_category(shown, config)
    result = {
        "checkpoint": str(checkpoint),
        "split": str(split),
        "tasks": tasks,
        "temperature": temperature,
        "top_p": config.evaluation.top_p,
        **({"success_ci95": [low, high]} if attempts == 1 else {"attempts": attempts, "pass_at": passes}),
        "by_category": categories,
        **describe(shown),
    }
    if output is None:
        sys.stdout.write(
            f"{checkpoint}: success {successes / len(shown):.3f}"
            + (f" [{low:.3f}, {high:.3f}]" if attempts == 1 else f" in {attempts} attempts each")
            + f" on {tasks} {split} tasks (temperature {temperature}, top-p {config.evaluation.top_p})\n"
            + "".join(f"  pass@{k} {share:.3f}\n" for k, share in passes.items() if attempts > 1)
            + "".join(
                f"  {name}: {found['success']:.3f} of {found['tasks']:.0f}\n"
                for name, found in categories.items()
            )
        )
    else:
        write_json(output, result)
    return 0


def passes_of(shown: Sequence[Trajectory], attempts: int) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4 .. attempts, the mean over the tasks, by k."""
    successes = [
        sum(t.success for t in shown[first : first + attempts]) for first in range(0, len(shown), attempts)
    ]
    ks = sorted({*(1 << n for n in range(attempts.bit_length())), attempts})
    return {str(k): float(np.mean([pass_at_k(attempts, right, k) for right in successes])) for k in ks}


def by_category(shown: Sequence[Trajectory], config: RunConfig) -> dict[str, dict[str, float]]:
    """Return success by the `category` that tasks state in their data; nothing where they state none."""
    factory = environment_factory(config.environment, config.rewards)
    found: dict[str, list[bool]] = {}
    for trajectory in shown:
        category = factory.tasks.task(trajectory.split, trajectory.attempt.task).data.get("category")
        if category is not None:
            found.setdefault(str(category), []).append(trajectory.success)
    factory.close()
    return {
        name: {"success": float(np.mean(right)), "tasks": float(len(right))}
        for name, right in sorted(found.items())
    }


def tried(
    config: RunConfig,
    checkpoint: Path,
    *,
    split: Split,
    tasks: int,
    temperature: float,
    attempts: int = 1,
) -> list[Trajectory]:
    """Return the trajectories of the policy in a folder, all attempts at a task together."""
    policy = load_policy(checkpoint, config=config.model, device=choose_device(config.device))
    runner = configured_runner(config, policy.chat, Redactor.of_process(config.environment.canaries))
    if isinstance(runner, EpisodeRunner):
        _compare_versions(checkpoint, runner.factory.versions)
    return held_trial(
        policy,
        runner,
        split=split,
        tasks=tasks,
        attempts=attempts,
        temperature=temperature,
        top_p=config.evaluation.top_p,
        config=config,
        close=True,
    )


def _compare_versions(checkpoint: Path, environment: Mapping[str, str]) -> None:
    """Warn of each version that is another one than that of the run in which a checkpoint lies."""
    recorded = versions.of_checkpoint(checkpoint)
    for difference in versions.differences(recorded, versions.present(environment)) if recorded else ():
        log.warning("%s: success may not be that of its run: %s", checkpoint, difference)


def rollout(config: RunConfig, n: int, checkpoint: Path | None) -> int:
    """Print `n` episodes to read: of the policy in `checkpoint`, or else demonstrations."""
    if checkpoint is not None:
        chat = load_policy(checkpoint, config=config.model, device=choose_device(config.device)).chat
        shown = tried(
            config, checkpoint, split=Split.HELDOUT, tasks=n, temperature=config.evaluation.temperature
        )
        source = f"sampled from {checkpoint}"
    else:
        factory = environment_factory(config.environment, config.rewards)
        if ORACLE not in factory.scripts:
            raise ConfigurationError(
                f"environment {config.environment.name} has no script called {ORACLE} whose episodes "
                "could be shown; give --checkpoint"
            )
        chat = _tokenizer_only(config, factory.corpus())
        runner = EpisodeRunner(
            factory=factory, chat=chat, environment=config.environment, rewards=config.rewards
        )
        shown = asyncio.run(demonstrations(runner, config, range(n), chat))
        source = "scripted demonstrations of the warm start"
    for number, trajectory in enumerate(shown, start=1):
        sys.stdout.write(_readable(trajectory, chat, f"episode {number} of {n}: {source}", config) + "\n")
    return 0


def _tokenizer_only(config: RunConfig, corpus: Iterable[str]) -> Chat:
    if config.model.path:
        tokenizer, calls = load_tokenizer(Path(config.model.path)), CALL_FORMATS[config.model.call_format]
        return Chat(tokenizer, explain_calls=True, calls=calls)
    return Chat(train_tokenizer(corpus, vocabulary=config.model.vocabulary))


def _readable(trajectory: Trajectory, chat: Chat, title: str, config: RunConfig) -> str:
    """Return an episode as text: what the policy sampled is marked, what it was shown is not."""
    lines = [f"── {title} " + "─" * max(3, 96 - len(title))]
    edges = np.flatnonzero(np.diff(trajectory.turns.astype(np.int64), prepend=-2, append=-2))
    for start, end in itertools.pairwise(edges):
        text = chat.text(trajectory.token_ids[start:end]).strip()
        mark = "policy │ " if trajectory.loss_mask[start] else "       │ "
        lines += [mark + line for line in text.splitlines()]
    parts = ", ".join(f"{name} {value:+.2f}" for name, value in components(trajectory.scores).items())
    worth = reward(trajectory.scores, config.rewards)
    told = "no reward" if worth is None else f"reward {worth:+.2f}"
    lines.append(
        f"         {trajectory.outcome}, {told} ({parts}), {len(trajectory.token_ids)} tokens, "
        f"{int(trajectory.loss_mask.sum())} sampled"
    )
    lines += [f"         {score.name}: {_beside(score)}" for score in trajectory.scores if _beside(score)]
    return "\n".join(lines)


def _beside(score: Score) -> str:
    """Return what a score tells beside the reward: a metric, why a monitor fired, why there is no verdict."""
    if score.value is None:
        return f"not judged ({score.invalid})"
    return f"{score.value:g}" if score.kind is ScoreKind.METRIC else score.invalid

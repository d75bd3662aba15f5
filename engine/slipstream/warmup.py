"""Floor 5. The warm start: supervised training on demonstrations of mixed quality, up to the learnable band.

Reinforcement learning needs something to select from: a policy that succeeds now and then, and fails in
ways it can mend. The demonstrators are scripted; only some of them retry errors and read on past near
misses. Beside or instead of them stand conversations of the user's own (chats.py). Messages of demonstrators
and assistants are trained, prompts and tool results are not.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream import metrics
from slipstream.chats import read_chats, rendered
from slipstream.config import RunConfig
from slipstream.config_curriculum import changed
from slipstream.demonstrations import demonstrations, play
from slipstream.environments import Script, environment_factory
from slipstream.environments.factory import GIVES_UP, ORACLE, EnvironmentFactory
from slipstream.episodes import EpisodeRunner
from slipstream.errors import ConfigurationError, WarmStartError
from slipstream.inference.trial import held_trial
from slipstream.model import Policy, first_policy, head, publish_policy
from slipstream.packing import PackedBatch, pack
from slipstream.redaction import Redactor
from slipstream.rewards import reward
from slipstream.run_folder import write_json
from slipstream.runners import configured_runner
from slipstream.tools.cache import in_folder
from slipstream.training import DeviceBatch, Optimizer, schedule, trained_hidden
from slipstream.types import Split, Trajectory
from slipstream_kernels import linear_logprob

FOLDER = "warmup"
WEAK = "weak-warmup"
"""Folder, in the run's, of a policy that is too weak to be trained on: minutes of work, not to be lost."""
ROW_EVERY = 10
"""Steps between rows of the loss alone."""

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path) -> int:
    """Warm-start the configured policy and publish it as RUN/checkpoints/warmup.

    Raises WarmStartError with advice when held-out success stays below `warmup.min_success`, and
    ConfigurationError when the environment is unfit for training, or without a script to learn from.
    """
    torch.set_num_threads(config.actor.threads + config.learner.threads)
    factory = environment_factory(in_folder(config.environment, folder), config.rewards)
    if factory.unfit:
        raise ConfigurationError(factory.unfit)
    shown = config.model_copy(
        update={"environment": changed(config.environment, config.warmup.environment, "warmup.environment")}
    )
    easier = bool(config.warmup.environment)
    # Some environments take seconds to make.
    showing = environment_factory(in_folder(shown.environment, folder), config.rewards) if easier else factory
    own = read_chats(config.warmup.chats) if config.warmup.chats else []
    said = (text for conversation in own for text in conversation.texts())
    others = showing.corpus() if easier else ()
    policy = first_policy(config, itertools.chain(factory.corpus(), others, said))
    runner = _runner(factory, policy, config)
    chats = rendered(own, policy.chat, factory.make(), config.environment)
    if config.curriculum.enabled:
        # What is wrong with a stage is told before minutes of training.
        staged = configured_runner(config, policy.chat, Redactor.of_process(config.environment.canaries))
        asyncio.run(staged.close())
    scripted = baselines(runner, config)
    _check_solvable(scripted, config)
    write_json(folder / "baselines.json", scripted)
    success, step = WarmStart(policy, _runner(showing, policy, shown), shown, folder, chats).run()
    if easier:
        log.info("warm start: success %.3f on the tasks of warmup.environment", success)
        success = held_success(policy, runner, config)
        log.info("warm start: success %.3f on the task itself", success)
        metrics.append_row(folder / metrics.FILE, {"kind": "warmup", "step": step, "success": success})
    _warn_of_giving_up(scripted, success)
    notes: dict[str, object] = {"step": step, "success": success}
    try:
        _check_band(success, step, config)
    except WarmStartError as error:
        publish_policy(folder / WEAK, policy, notes)
        raise WarmStartError(f"{error}; model.path={folder / WEAK} goes on from what was learnt") from None
    publish_policy(folder / "checkpoints" / FOLDER, policy, notes)
    return 0


def _runner(factory: EnvironmentFactory, policy: Policy, config: RunConfig) -> EpisodeRunner:
    return EpisodeRunner(
        factory=factory, chat=policy.chat, environment=config.environment, rewards=config.rewards
    )


class WarmStart:
    """Supervised training that stops once held-out success reaches `warmup.target_success`."""

    def __init__(
        self,
        policy: Policy,
        runner: EpisodeRunner,
        config: RunConfig,
        folder: Path,
        chats: Sequence[Trajectory] = (),
    ) -> None:
        """Train `policy` on demonstrations of the environment's scripts, and on `chats`."""
        self._policy, self._runner, self._config, self._folder = policy, runner, config, folder
        self._chats = chats
        self._device = head(policy.model).device
        # Demonstrations are right whatever their gradient, and max_grad_norm bounds what one may do: five
        # in a row above the limit once ended a warm start that, without it, went on as well as before.
        optim = config.optim.model_copy(
            update={"learning_rate": config.warmup.learning_rate, "spike_factor": 0.0}
        )
        self._optim = optim
        self._optimizer = Optimizer(policy.model, optim)

    def run(self) -> tuple[float, int]:
        """Train; return the last held-out success and the steps taken."""
        warmup, began = self._config.warmup, time.monotonic()
        if not warmup.max_steps:
            return self._success(), 0
        success = 0.0
        for step in itertools.count(1):
            loss = self._step(step - 1)
            row = {"kind": "warmup", "step": step, "loss": loss}
            if step % warmup.check_every and step < warmup.max_steps:
                if step % ROW_EVERY == 0:
                    metrics.append_row(self._folder / metrics.FILE, row)
                continue
            success = self._success()
            metrics.append_row(self._folder / metrics.FILE, {**row, "success": success})
            seconds = time.monotonic() - began
            log.info("warm start step %d: loss %.4f, success %.3f, %.0f s", step, loss, success, seconds)
            enough = success >= warmup.target_success and step >= warmup.min_steps
            if enough or step >= warmup.max_steps:
                return success, step
        raise AssertionError("itertools.count does not end")

    def _step(self, step: int) -> float:
        """Take one step on fresh demonstrations; return the loss per trained token."""
        shown = self._shown(step)
        ones = np.ones(len(shown), dtype=np.float32)
        masks = [t.loss_mask.astype(np.float32) for t in shown]
        packed = pack(shown, ones, masks, token_budget=self._config.batch.token_budget)
        count = sum(float(batch.weight.sum()) for batch in packed)
        values: list[float] = []
        losses = [self._loss(batch, count, values) for batch in packed if batch.weight.any()]
        self._optimizer.step(
            losses, share=schedule(step, steps=self._config.warmup.max_steps, config=self._optim)
        )
        return sum(values)

    def _shown(self, step: int) -> list[Trajectory]:
        """Return the batch of a step: conversations, then demonstrations; each sort in order, and again."""
        warmup, chats = self._config.warmup, self._chats
        share = 0.0 if not chats else warmup.chats_share if ORACLE in self._runner.factory.scripts else 1.0
        own = round(share * warmup.batch)
        played = warmup.batch - own
        numbers = [(step * played + i) % warmup.demonstrations for i in range(played)]
        shown = []
        if numbers:
            shown = asyncio.run(demonstrations(self._runner, self._config, numbers, self._policy.chat))
        return [*(chats[(step * own + i) % len(chats)] for i in range(own)), *shown]

    def _loss(self, batch: PackedBatch, count: float, sink: list[float]) -> Callable[[], Tensor]:
        """Cross-entropy of the demonstrated tokens: minus the mean of their log-probabilities."""

        def loss() -> Tensor:
            rows = DeviceBatch.of(batch, self._device)
            logprob_N, _, _ = linear_logprob(
                trained_hidden(self._policy.model, rows), head(self._policy.model), rows.labels_N
            )
            value = -logprob_N.sum() / count
            sink.append(float(value.detach()))
            return value

        return loss

    def _success(self) -> float:
        return held_success(self._policy, self._runner, self._config)


def held_success(policy: Policy, runner: EpisodeRunner, config: RunConfig) -> float:
    """Return a policy's success on the held-out tasks of an environment, sampled as evaluations are."""
    shown = held_trial(
        policy,
        runner,
        split=Split.HELDOUT,
        tasks=config.evaluation.tasks,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        config=config,
    )
    return float(np.mean([t.success for t in shown]))


def baselines(runner: EpisodeRunner, config: RunConfig) -> dict[str, dict[str, float | str]]:
    """Return held-out success of the environment's scripts and of the configured baselines, with sources.

    Of scripts also the mean `reward`, and the `outcome` part of it, over the episodes that could be judged.
    """
    tasks = config.evaluation.final_tasks
    outcome_alone = config.rewards.model_copy(update={"shaping": 0.0, "penalty_cap": 0.0})

    async def results(script: Script) -> dict[str, float]:
        played = [await play(runner, config, Split.HELDOUT, index, script) for index in range(tasks)]
        found = {"success": float(np.mean([t.success for t in played]))}
        for name, rewards in (("reward", config.rewards), ("outcome", outcome_alone)):
            earned = [value for t in played if (value := reward(t.scores, rewards)) is not None]
            if earned:
                found[name] = float(np.mean(earned))
        return found

    found: dict[str, dict[str, float | str]] = {
        given.name: {"success": given.score, "source": given.source, "date": given.date}
        for given in config.evaluation.baselines
    }
    for name, script in runner.factory.scripts.items():
        source = f"scripted; {script.about}"
        found[name] = {**asyncio.run(results(script)), "source": source, "tasks": tasks}
    return found


def break_even(scripted: Mapping[str, Mapping[str, float | str]]) -> float:
    """Return the success p above which trying earns more than giving up at once.

    p (O - o) = C - c: outcome O and penalties C = O - reward of the oracle, who tries, o and c of the script
    that does nothing. Below, what a policy gains by success now and then is less than what its turns cost it.
    0 where one of the scripts is missing, or nothing is to be gained.
    """
    tries, gives_up = scripted.get(ORACLE, {}), scripted.get(GIVES_UP, {})
    if "outcome" not in tries or "outcome" not in gives_up:
        return 0.0
    gain = float(tries["outcome"]) - float(gives_up["outcome"])
    cost = gain - (float(tries["reward"]) - float(gives_up["reward"]))
    return max(0.0, cost / gain) if gain > 0.0 else 0.0


def _warn_of_giving_up(scripted: Mapping[str, Mapping[str, float | str]], success: float) -> None:
    least = break_even(scripted)
    if success < least:
        log.warning(
            "warm start: below a success of %.2f giving up at once earns more than trying, and held-out "
            "success is %.2f: training may teach to give up; lower rewards.step_penalty, or begin with "
            "curriculum.stages that succeed more often",
            least,
            success,
        )


def _check_solvable(scripted: Mapping[str, Mapping[str, float | str]], config: RunConfig) -> None:
    """Refuse a warm start without a demonstrator, and limits under which not even that one succeeds."""
    limits = config.environment
    if ORACLE not in scripted:
        if config.warmup.max_steps and not config.warmup.chats:
            raise ConfigurationError(
                f"environment {limits.name} has no script called {ORACLE} whose episodes a warm start "
                "could imitate; add one, give conversations (warmup.chats), or set warmup.max_steps=0 to "
                "begin with the model as it is"
            )
        return
    expert = float(scripted[ORACLE]["success"])
    if expert < config.warmup.min_success:
        raise ConfigurationError(
            f"environment.max_tokens = {limits.max_tokens} and environment.max_turns = {limits.max_turns} "
            f"let the script that knows the answers solve only {expert:.2f} of the tasks; raise them"
        )


def _check_band(success: float, step: int, config: RunConfig) -> None:
    warmup = config.warmup
    if success < warmup.min_success and config.curriculum.enabled:
        log.warning(
            "warm start: held-out success is %.2f, below warmup.min_success = %.2f; the curriculum begins "
            "with what can be learned from there",
            success,
            warmup.min_success,
        )
    elif success < warmup.min_success:
        raise WarmStartError(
            f"warm start: held-out success is {success:.2f} after {step} steps, expected at least "
            f"{warmup.min_success:.2f}; give more demonstrations (warmup.max_steps, warmup.careful_share), "
            "an easier stage (environment.options, environment.tool_failure_rate, or [curriculum], with "
            "which a run may begin from less) or a larger model (model.hidden_size, model.layers)"
        )
    if success > warmup.max_success:
        log.warning(
            "warm start: held-out success is %.2f, above the learnable band (%.2f); little is left to learn",
            success,
            warmup.max_success,
        )

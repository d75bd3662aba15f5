"""Loading: every mistake is one sentence that names source, key, expected and got."""

from pathlib import Path

import numpy as np
import pytest

from slipstream.config import RunConfig, dump, load_config, read, save, shipped_recipes
from slipstream.errors import ConfigurationError


def refusal(overrides: list[str], recipe: str | Path = "research") -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shipped_recipes_load() -> None:
    assert shipped_recipes() == ["research", "research-curriculum", "research-multihop", "smollm2"]
    assert load_config("research").environment.options == {}
    assert load_config("research-multihop").environment.options == {"hops": 2}
    assert load_config("smollm2").model.path == "models/smollm2"


def test_overrides_are_toml_values_with_strings_as_fallback() -> None:
    config = load_config(
        "research", ["seed=7", "optim.betas=[0.8, 0.99]", "model.path=/models/tiny", 'device="cpu"', "seed=8"]
    )
    assert (config.seed, config.optim.betas, config.model.path, config.device) == (
        8, (0.8, 0.99), "/models/tiny", "cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rat=1",
            "command line: unknown key optim.learning_rat; did you mean optim.learning_rate?",
        ),
        (
            "learning_rate=1",
            "command line: unknown key learning_rate; "
            "did you mean warmup.learning_rate or optim.learning_rate?",
        ),
        ("zzz=1", "command line: unknown key zzz"),
        ("seed.x=1", "command line: unknown key seed.x; did you mean seed?"),
        ("steps=many", 'command line: steps must be an integer, got "many"'),
        ("seed=true", "command line: seed must be an integer, got true"),
        ('steps="5"', 'command line: steps must be an integer, got "5"'),
        ("steps=0", "command line: steps must be greater than or equal to 1, got 0"),
        ("optim=3", "command line: optim must be a table, got 3"),
        ("optim.learning_rate=nan", "command line: optim.learning_rate must be a finite number, got NaN"),
        (
            "model.dtype=int8",
            "command line: model.dtype must be 'auto', 'float32' or 'bfloat16', got \"int8\"",
        ),
        ("seed", 'command line: expected key=value, got "seed"'),
        ("sampling.temperature=0", "command line: sampling.temperature must be greater than 0, got 0"),
        (
            "batch.group_size=1",
            "command line: batch.group_size must be at least 2 (a lone attempt has no baseline), got 1",
        ),
        (
            "optim.minibatches=3",
            "command line: optim.minibatches must be a divisor of batch.groups = 16, got 3",
        ),
        ("device=gpu", 'command line: device must be "auto", "cpu", "cuda" or "cuda:N", got "gpu"'),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(override: str, message: str) -> None:
    assert refusal([override]) == message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("actor.concurrency=3", "actor.concurrency"),
        ("sampling.max_tokens=256", "sampling.max_tokens"),
        ("batch.token_budget=128", "batch.token_budget"),
        ("warmup.target_success=0.9", "warmup.target_success"),
        ("model.heads=5", "model.hidden_size"),
        ("model.call_format=llama3", "model.call_format"),
        ("optim.betas=[0.9, 1.0]", "optim.betas"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("inference.host=10.0.0.1", "inference.host"),
        ("inference.host=0.0.0.0", "inference.host"),
    ],
)
def test_combinations_that_cannot_work(override: str, key: str) -> None:
    assert f": {key} must be " in refusal([override])


def test_servers_beyond_this_machine_are_a_choice_that_must_be_made() -> None:
    assert load_config("research", ["inference.host=10.0.0.1", "inference.insecure=true"])
    assert "actors reach" in refusal(["inference.host=0.0.0.0", "inference.insecure=true"])


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[optim]\nlearning_rat = 1\n")
    expected = "mine.toml: unknown key optim.learning_rat; did you mean optim.learning_rate?"
    assert refusal([], recipe) == expected
    recipe.write_text("steps = 'x'")
    assert refusal(["seed=2"], str(recipe)) == 'mine.toml: steps must be an integer, got "x"'
    recipe.write_text("steps = ")
    assert refusal([], recipe).startswith("mine.toml: not valid TOML: ")
    assert refusal([], tmp_path / "none.toml").endswith("none.toml cannot be read: No such file or directory")


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    message = refusal([], "reserch")
    assert 'unknown recipe "reserch"; did you mean research' in message
    assert "shipped are research, research-curriculum, research-multihop" in message


def test_dump_and_save_read_back_unchanged(tmp_path: Path) -> None:
    config = load_config("research-multihop", ["optim.betas=[0.7, 0.8]", "seed=5", "model.path=/a b"])
    save(config, tmp_path / "config.toml")
    assert read(tmp_path / "config.toml") == config
    assert (tmp_path / "config.toml").read_text() == dump(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_outcomes_must_dominate_rewards() -> None:
    message = refusal(["rewards.penalty_cap=1.5", "rewards.shaping=0.45"])
    assert "rewards.penalty_cap + rewards.shaping must be at most 1.9" in message
    assert message.endswith("got 1.95")
    load_config("research", ["rewards.penalty_cap=1.4", "rewards.shaping=0.45"])


def test_std_scaling_must_not_amplify_penalties_over_outcomes() -> None:
    message = refusal(["objective.advantage=std"])
    assert message.startswith('command line: with objective.advantage = "std" penalties alone could')
    assert message.endswith("objective.std_floor must be above 0.998, got 0.3")
    load_config("research", ["objective.advantage=std", "objective.std_floor=1.0"])
    load_config("research", ["objective.advantage=std", "rewards.penalty_cap=0.2"])
    refusal(["objective.advantage=std", "rewards.penalty_cap=0.2", "objective.std_floor=0.0"])
    message = refusal(["objective.advantage=std", "rewards.penalty_cap=1.2", "objective.std_floor=9"])
    assert message.endswith("rewards.penalty_cap + rewards.shaping must be below 1, got 1.2")


@pytest.mark.parametrize("cap", [0.2, 0.5, 0.8])
def test_the_std_floor_demanded_is_sufficient_in_the_worst_groups(cap: float) -> None:
    """The rule against brute force: no all-equal group may spread wider than the tightest mixed one."""
    size = 8

    def gap(rewards: list[float], high: int, low: int) -> float:
        return (rewards[high] - rewards[low]) / max(float(np.std(rewards, ddof=1)), floor)

    floor = next(
        f
        for f in np.arange(0.05, 2.0, 0.01)
        if not _refused(["objective.advantage=std", f"rewards.penalty_cap={cap}", f"objective.std_floor={f}"])
    )
    equal = max(gap([-1.0 - cap] * k + [-1.0] * (size - k), -1, 0) for k in range(1, size))
    # The closest pair (worst success, best failure) with the others as far apart as they can be.
    mixed = [
        gap([1.0 - cap, -1.0, *[1.0] * k, *[-1.0 - cap] * (size - 2 - k)], 0, 1) for k in range(size - 1)
    ]
    assert equal < min(mixed)


def _refused(overrides: list[str]) -> bool:
    try:
        load_config("research", overrides)
    except ConfigurationError:
        return True
    return False


def test_a_direct_constructor_refuses_too() -> None:
    with pytest.raises(ConfigurationError, match=r"optim\.minibatches"):
        RunConfig.model_validate({"optim": {"minibatches": 5}})

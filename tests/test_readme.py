"""The README is true where a machine can tell: commands parse, code runs, names exist."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import cli, errors, stop_signals, summary
from slipstream.config import RunConfig, load_config, shipped_recipes
from slipstream.environments import Script, environment_factory
from slipstream.tools.hermes import parse_call
from slipstream.types import Split, TaskAttempt, succeeded

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
LINES = [line.strip() for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("slipstream ")]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]
LINKS = re.findall(r"\]\(([^)#]+)\)", README)


def parsed(line: str) -> argparse.Namespace:
    """Return what the command line makes of a line; a line it refuses ends the test."""
    _, name, *arguments = shlex.split(line, comments=True)
    parser = argparse.ArgumentParser(prog=line, allow_abbrev=False)
    cli._commands()[name].declare(parser)
    return parser.parse_intermixed_args(cli._separated(name, arguments))


def test_the_two_commands_come_first_and_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [line.split()[:2] for line in LINES[:2]] == [["make", "train"], ["make", "test"]]
    for target in re.findall(r"\bmake ([a-z][\w-]*)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_parses_and_its_settings_are_valid(line: str) -> None:
    chosen = parsed(line)
    overrides = getattr(chosen, "overrides", [])
    recipe = getattr(chosen, "recipe", None) or "research"
    if "=" in recipe:  # a fork has the recipe of its run
        recipe, overrides = "research", [recipe, *overrides]
    if not recipe.endswith(".toml"):
        assert recipe in shipped_recipes()
        load_config(recipe, overrides)


def test_every_command_but_the_roles_is_shown() -> None:
    shown = {line.split()[1] for line in COMMANDS}
    assert set(cli._commands()) - {"warmup", "hub", "learner", "version"} == shown


def test_benchmarks_exist() -> None:
    named = [line.split()[2] for line in COMMANDS if line.split()[1] == "bench"]
    files = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem[0] != "_")
    assert sorted(named) == files


@pytest.mark.parametrize("code", SNIPPETS)
def test_code_runs(code: str) -> None:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **path}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_a_linked_file_exists(link: str) -> None:
    assert (ROOT / link.replace("\\_", "_")).exists()


def test_the_keys_of_the_summary_are_those_it_has(tmp_path: Path) -> None:
    table = README.split("`summary.json` holds:")[1].split("\n## ")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}
    assert named == set(summary.summarise(RunConfig(), tmp_path))


def test_exit_codes_are_those_of_the_program() -> None:
    section = README.partition("### Exit codes")[2].partition("\n## ")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", section, flags=re.MULTILINE)}
    failures = {kind.exit_code for kind in (errors.SlipstreamError, errors.UserError, errors.NumericsError)}
    assert codes == {0, *failures, stop_signals.STOPPED, cli.INTERRUPTED}


def test_the_task_of_ones_own_is_learnable(tmp_path: Path) -> None:
    """Its oracle solves it, the hasty script only now and then, and its command names it."""
    section = README.partition("## Bring your own task\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line]) <= 24
    path = tmp_path / "my_task.py"
    path.write_text(code)
    (command,) = re.findall(r"^slipstream train .*$", section, flags=re.MULTILINE)
    overrides = [text.replace("my_task.py", str(path)) for text in parsed(command).overrides]
    config = load_config("research", overrides)
    factory = environment_factory(config.environment, config.rewards)

    async def success(script: Script) -> float:
        solved = 0
        for index in range(64):
            task = factory.tasks.task(Split.HELDOUT, index)
            made, play = factory.make(), script.play(task)
            await made.reset(task, TaskAttempt(task=index, seed=1, group=index, attempt=0))
            message = next(play)
            while not (moved := await made.step(parse_call(message, made.tools))).done:
                message = play.send(moved.observation)
            solved += succeeded(await made.score())
        return solved / 64

    assert factory.careless is not None
    assert asyncio.run(success(factory.scripts["oracle"])) == 1.0
    assert 0.02 < asyncio.run(success(factory.careless)) < 0.3

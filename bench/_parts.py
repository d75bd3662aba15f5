"""Parts of a benchmark in processes of their own, which talk over their pipes."""

from __future__ import annotations

import subprocess
import sys
import time


def spawn(file: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a part of a benchmark's file."""
    command = [sys.executable, file, "--part", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def race(senders: list[subprocess.Popen[str]]) -> float:
    """Start all senders together and return the seconds until the last has finished."""
    for sender in senders:
        assert line_of(sender) == "ready"
    started = time.perf_counter()
    for sender in senders:
        tell(sender)
    for sender in senders:
        assert line_of(sender) == "done"
    seconds = time.perf_counter() - started
    for sender in senders:
        sender.communicate(timeout=10)
    return seconds


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line a part prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Let a part go on."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def stop(process: subprocess.Popen[str]) -> None:
    """End a part and release its pipes."""
    process.terminate()
    process.communicate(timeout=10)


def say(word: str) -> None:
    """Print one line at once."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()

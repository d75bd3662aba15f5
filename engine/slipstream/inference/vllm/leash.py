"""Floor 4. Holds a foreign server's process group: it ends when the process that wanted it has ended.

    python -m slipstream.inference.vllm.leash PARENT PROGRAM [ARGUMENT ...]

Started as leader of a session of its own. It ends with its program's exit code, hands SIGTERM on to it, and
ends the whole group once the process PARENT, which started it, is gone: whatever the program has started
would otherwise keep memory and ports for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

POLL_S: Final = 0.5
GRACE_S: Final = 10.0
"""From SIGTERM to SIGKILL once nobody wants the program any more."""


def main(arguments: Sequence[str]) -> int:
    """Run a program for as long as its parent lives; return its exit code, 128 + n after signal n."""
    parent, command = int(arguments[0]), arguments[1:]
    program = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    while True:
        try:
            code = program.wait(timeout=POLL_S)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                _end_group(program)


def _end_group(program: subprocess.Popen[bytes]) -> None:
    """End the program and all of its group, this process included."""
    program.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(timeout=GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

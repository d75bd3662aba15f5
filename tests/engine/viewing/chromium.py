"""A real browser for tests: Chromium without a window, driven over its debugging pipe, no library between.

Messages of the Chrome DevTools Protocol are JSON texts with a zero byte behind each, at descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_S = 60.0


def browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page.

    Example: ``with Chromium(tmp_path) as page: page.open("file:///a.html"); page.value("document.title")``.
    """

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 860, dark: bool = False) -> None:
        path = browser()
        assert path is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser expects its ends at 3 and 4.
        command = (
            f"exec 3<&{to_read} 4>&{to_write}; exec {path} --headless --no-sandbox --remote-debugging-pipe "
            f"--disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
            f"--window-size={width},{height} --user-data-dir={folder / 'profile'} about:blank"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_read, to_write), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """What the browser told unasked."""
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.ask("Browser.close")
            self._process.wait(timeout=10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)
            self._process.wait(timeout=10)
        os.close(self._read)
        os.close(self._write)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; raises RuntimeError for an error, TimeoutError."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str) -> None:
        """Go to an address and wait for its scripts to have run once."""
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Return what an expression of the page comes to."""
        got = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true; raises TimeoutError."""
        deadline = time.monotonic() + ANSWER_S
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{expression} did not become true: {self.value('document.body.innerText')[:800]}"
                )

    def key(self, key: str) -> None:
        """Press a key."""
        text = key if len(key) == 1 else {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "",
                     windowsVirtualKeyCode=13 if key == "Enter" else 0)  # fmt: skip

    def point(self, selector: str, number: int = 0) -> None:
        """Move the pointer onto an element."""
        element = f"document.querySelectorAll({selector!r})[{number}].getBoundingClientRect()"
        box = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({element})")
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Return errors of scripts, refusals of the page's policy, and whatever else went to the console."""
        self.value("1")
        told = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                told.append(json.dumps(parameters["exceptionDetails"])[:400])
            elif method == "Log.entryAdded":
                told.append(parameters["entry"]["text"])
            elif method == "Runtime.consoleAPICalled":
                told.append(json.dumps(parameters["args"])[:400])
        return told

    def requests(self) -> list[str]:
        """Return every address that was asked for."""
        return [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{method}: the browser does not answer")
            more = os.read(self._read, 1 << 20)
            if not more:
                raise TimeoutError(f"{method}: the browser has ended")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

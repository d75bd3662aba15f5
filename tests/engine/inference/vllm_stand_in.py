"""A small HTTP server with the routes of vLLM that the engine uses; its answers and faults are planned."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

VOCABULARY = {f"token-{n}": n for n in range(64)}


@dataclass
class StandIn:
    """What the server answers, and what it was asked."""

    url: str = ""
    version: str = "default"
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """By path, used up in order: a status, bytes to answer, "hang", "cut", or None for a sound answer."""
    calls: list[str] = field(default_factory=list)
    bodies: dict[str, list[Any]] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=lambda: {"serial": -1, "checksum64": "0" * 16})
    taken: dict[str, Any] = field(default_factory=dict)
    results: dict[str, list[Any]] = field(default_factory=dict)
    """What all workers answer, by method, in place of what one of them would."""
    vocabulary: str = ""
    aborts_after: list[int] = field(default_factory=list)
    """Tokens after which the next answers are cut off."""
    ended: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, body: Any) -> Any:
        """Return a sound answer as JSON."""
        match path:
            case "/inference/v1/generate":
                return self.generate(body)
            case "/v1/models":
                return {"data": [{"id": "tiny", "root": "/models/tiny", "max_model_len": 128}]}
            case "/get_world_size":
                return {"world_size": 1}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/update_weights":
                self.taken = body["update_info"]["info"]
            case "/finish_weight_update":
                self.version = body["weight_version"]
                self.held = {key: self.taken[key] for key in ("serial", "checksum64")}
            case "/collective_rpc":
                method = body["method"]
                return {"results": self.results.get(method, [self.called(method)])}
        return {"message": "done"}

    def called(self, method: str) -> Any:
        """Return what a worker answers."""
        if method == "slipstream_proof":
            return self.held
        if method == "slipstream_identity":
            return {
                "vocabulary": self.vocabulary,
                "rows": 64,
                "block_tokens": 16,
                "logprobs_mode": "processed_logprobs",
            }
        return None

    def generate(self, body: Any) -> Any:
        """Sample the numbers that follow the prompt's last token, each with log-probability -1."""
        parameters, prompt = body["sampling_params"], body["token_ids"]
        wanted, reason = parameters["max_tokens"], "length"
        if self.aborts_after and "stop_token_ids" in parameters:
            wanted, reason = self.aborts_after.pop(0), "abort"
        tokens = [(prompt[-1] + 1 + n) % 64 for n in range(wanted)]
        choice = {
            "index": 0,
            "finish_reason": reason,
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": t, "logprob": -1.0} for t in tokens]},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}] if tokens else [],
        }
        scores = [None, *({str(t): {"logprob": -1.0, "rank": 1}} for t in prompt[1:])]
        return {"choices": [choice], "prompt_logprobs": scores if "prompt_logprobs" in parameters else None}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve on a free port until the end of the block."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply()

        def do_POST(self) -> None:
            self.reply()

        def reply(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            path, body = urlsplit(self.path).path, json.loads(raw) if raw else None
            state.calls.append(self.path)
            state.bodies.setdefault(path, []).append(body)
            fault = state.faults.get(path, [None]).pop(0) if state.faults.get(path) else None
            if fault == "hang":
                state.ended.wait(30)
            if fault in ("hang", "cut"):
                self.close_connection = True
                return
            status = fault if isinstance(fault, int) else 200
            content = fault if isinstance(fault, bytes) else json.dumps(state.answer(path, body)).encode()
            if status != 200:
                content = b'{"error": {"message": "planted"}}'
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)

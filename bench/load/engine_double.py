"""An engine without a model, for measuring the front end: every running request gets one token each step.

`python -m bench.load.engine_double FD STEP_MS [TRACE]`, started in the engine's place by `bench.load.double_server`.
With a trace all tokens are one letter, and the file says when each step's tokens were sent.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatserve.engine.wire import ChannelClosed, SyncChannel

INFO = {
    "model": "bundled", "max_context": 32_768, "vocab_size": 1_536, "capacity_tokens": 1 << 20, "page_bytes": 65_536,
    "token_bytes": 1_024, "device": "cpu", "dtype": "float32", "attention": "none", "max_running": 4_096,
}  # fmt: skip
FIRST_TOKEN = 300
NUM_TOKENS = 1_000
LETTER = 67  # "a"


def main() -> None:
    """Step until the front end closes its socket."""
    channel = SyncChannel(socket.socket(fileno=int(sys.argv[1])))
    double = Double(channel, float(sys.argv[2]) / 1000, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    channel.receive(None)
    channel.send([["ready", INFO]])
    try:
        while True:
            double.step()
    except ChannelClosed:
        return
    finally:
        double.write_trace()


@dataclass(slots=True)
class Double:
    """Its running requests are [tokens to make, tokens made]."""

    channel: SyncChannel
    step_s: float
    trace: Path | None = None
    running: dict[str, list[int]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    first_step: dict[str, int] = field(default_factory=dict)
    next_s: float = 0.0

    def step(self) -> None:
        """A token for everybody, at the pace set; late steps do not make the next ones come sooner."""
        events: list[Any] = []
        for command in (command for frame in self.channel.receive(0 if self.running else None) for command in frame):
            self._carry_out(command, events)
        for request_id, state in list(self.running.items()):
            events.append(["tokens", request_id, [self._token(state[1])]])
            state[1] += 1
            if state[1] >= state[0]:
                del self.running[request_id]
                events.append(["finished", request_id, "max_output_tokens", 1.0])
        self.steps.append(time.perf_counter())
        self.channel.send(events)
        self._wait()

    def write_trace(self) -> None:
        """When each step was, and with which each request began."""
        if self.trace is not None:
            begun = [{"response_id": name, "first_step": step} for name, step in self.first_step.items()]
            self.trace.write_text("\n".join(json.dumps(line) for line in [*begun, {"steps": self.steps}]))

    def _wait(self) -> None:
        now_s = time.perf_counter()
        self.next_s = max(self.next_s + self.step_s, now_s)
        time.sleep(self.next_s - now_s)

    def _token(self, number: int) -> int:
        return FIRST_TOKEN + number % NUM_TOKENS if self.trace is None else LETTER

    def _carry_out(self, command: dict[str, Any], events: list[Any]) -> None:
        verb = command["verb"]
        if verb == "submit":
            self._submit(command, events)
        elif verb == "cancel" and self.running.pop(command["request_id"], None):
            events.append(["finished", command["request_id"], "cancelled", 1.0])
        elif verb == "query":
            events.append(["reply", command["query_id"], {"device": 0}])

    def _submit(self, command: dict[str, Any], events: list[Any]) -> None:
        request_id = command["request_id"]
        self.running[request_id] = [command["max_output_tokens"], 0]
        self.first_step[request_id] = len(self.steps)
        cached = {"device": command["num_history"]}
        events.append(["started", request_id, cached, 0.1, 0.0, 1.0, None])


if __name__ == "__main__":
    main()

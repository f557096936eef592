"""An engine without a model, for measuring the front end: every running request gets one token each step.

`python -m bench.load.engine_double FD STEP_MS`, started in the engine's place by `bench.load.double_server`.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

from chatserve.engine.wire import ChannelClosed, SyncChannel

INFO = {
    "model": "bundled", "max_context": 32_768, "vocab_size": 1_536, "capacity_tokens": 1 << 20, "page_bytes": 65_536,
    "token_bytes": 1_024, "device": "cpu", "dtype": "float32", "attention": "none",
}  # fmt: skip
FIRST_TOKEN = 300
NUM_TOKENS = 1_000


def main() -> None:
    """Step until the front end closes its socket."""
    channel = SyncChannel(socket.socket(fileno=int(sys.argv[1])))
    step_s = float(sys.argv[2]) / 1000
    channel.receive(None)
    channel.send([["ready", INFO]])
    running: dict[str, list[int]] = {}
    try:
        while True:
            _step(channel, running, step_s)
    except ChannelClosed:
        return


def _step(channel: SyncChannel, running: dict[str, list[int]], step_s: float) -> None:
    began_s = time.perf_counter()
    events: list[Any] = []
    for command in (command for frame in channel.receive(0 if running else None) for command in frame):
        _carry_out(command, running, events)
    for request_id, state in list(running.items()):
        events.append(["tokens", request_id, [FIRST_TOKEN + state[1] % NUM_TOKENS]])
        state[1] += 1
        if state[1] >= state[0]:
            del running[request_id]
            events.append(["finished", request_id, "max_output_tokens", 1.0])
    channel.send(events)
    time.sleep(max(0.0, began_s + step_s - time.perf_counter()))


def _carry_out(command: dict[str, Any], running: dict[str, list[int]], events: list[Any]) -> None:
    verb = command["verb"]
    if verb == "submit":
        running[command["request_id"]] = [command["max_output_tokens"], 0]
        cached = {"device": command["num_history"]}
        events.append(["started", command["request_id"], cached, 0.1, 0.0, 1.0, None])
    elif verb == "cancel" and running.pop(command["request_id"], None):
        events.append(["finished", command["request_id"], "cancelled", 1.0])
    elif verb == "query":
        events.append(["reply", command["query_id"], {"device": 0}])


if __name__ == "__main__":
    main()

"""What the engine holds of a GPU's memory: idle, and under load beside the history that is live.

Live is every row of a running session once, however many sessions show it. The engine runs in this process, on random
weights in the shape of `--model` (see `make_model.py`); nothing else may use the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import gc

import torch
from profile_steps import Load

from chatserve.engine.build import build
from chatserve.engine.config import EngineConfig
from chatserve.engine.core import EngineCore

GIB = 2**30
SESSIONS, SYSTEM, TURNS, TOKENS = 64, 1024, 6, 128


def main() -> None:
    """Measure, and print a line for each moment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with config.json and a tokenizer")
    model = parser.parse_args().model
    free_before, total = torch.cuda.mem_get_info()
    core, info = build(EngineConfig(model=model, device="cuda", load_format="dummy"))
    core.store.shrink()
    held = total - torch.cuda.mem_get_info()[0]
    print(
        f"no session: {held / GIB:.2f} GiB held, {(total - free_before) / GIB:.2f} of them before the engine was built"
    )
    print(f"{'turn':>5} {'live GiB':>9} {'held GiB':>9} {'ratio':>6}")
    load = Load(core, info.vocab_size)
    system = load.ids(SYSTEM)
    paths = [[*system, *load.ids(TOKENS)] for _ in range(SESSIONS)]
    for turn in range(TURNS):
        run_turn(load, paths)
        for path in paths:
            path.pop()  # the last token has no row yet
        live = (SYSTEM + sum(len(path) - SYSTEM for path in paths)) * info.token_bytes
        kv_held = core.store.stats().physical_bytes
        print(f"{turn + 1:>5} {live / GIB:>9.2f} {kv_held / GIB:>9.2f} {kv_held / live:>6.3f}")
        for path in paths:
            path += load.ids(TOKENS)
    give_up_all(core)
    held = total - torch.cuda.mem_get_info()[0]
    print(f"all sessions dropped and idle: {held / GIB:.2f} GiB held")


def run_turn(load: Load, paths: list[list[int]]) -> None:
    """One turn of every session; the reply is put behind what was said."""
    for number, path in enumerate(paths):
        load.submit(f"m{number}", path, TOKENS)
    first = load._count - len(paths) + 1
    while not load.core.idle:
        load.core.step()
        for event in load.core.take_events():
            if event[0] == "tokens":
                paths[int(event[1][1:]) - first] += event[2]


def give_up_all(core: EngineCore) -> None:
    """Drop every session, evict what the index keeps, and let the pool shrink."""
    for session_id in core.store.sessions():
        core.store.drop_session(session_id)
    core.store._residency.evict(core.store.stats().pages.idle)
    gc.collect()
    core.store.shrink()
    core.store.settle()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""The real server on a GPU: conversation, the engine's death in mid-answer, memory held, and the doctor."""

from __future__ import annotations

import subprocess
import sys

from chatserve.client import ChatClient
from tests.e2e.talking import engine_of, new_session, reply_to

LONG = "Count from 1 to 60."
ENDS = ("response.completed", "response.incomplete", "response.cancelled", "response.failed")


async def test_conversation_remembers(start_server):
    """The bundled model in bf16 on FlashInfer's kernels answers from its history, and the history is resident."""
    server = start_server("--device=cuda")
    async with ChatClient(server.url) as client:
        session_id = await new_session(client)
        await reply_to(client, session_id, "My name is Zorvin.")
        reply = await reply_to(client, session_id, "What is my name?")
    assert "Zorvin" in reply["text"]
    assert reply["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert "FlashInfer" in server.log.read_text()


async def test_killed_engine_continues(start_server):
    """kill -9 of the engine in mid-answer: the answer goes on behind what was shown, and the session stays usable."""
    server = start_server("--device=cuda")
    async with ChatClient(server.url) as client:
        session_id = await new_session(client)
        engine = engine_of(server)
        await client.send(session_id, LONG, temperature=0)
        text, kinds, killed = "", [], False
        async for event in client.events():
            kinds.append(event["type"])
            if event["type"] == "response.output_text.delta":
                assert event["offset"] == len(text)
                text += event["delta"]
                if not killed:
                    engine.kill()
                    killed = True
            if event["type"] in ENDS:
                break
        assert "response.resumed" in kinds
        assert event["type"] == "response.completed"
        assert text == event["response"]["text"]
        assert "60" in text
        assert "Zorvin" in (await reply_to(client, session_id, "My name is Zorvin."))["text"]


def test_doctor_finds_everything_well():
    """`chatserve doctor` on this GPU: every line is ok, and FlashInfer is in use."""
    done = subprocess.run(
        [sys.executable, "-m", "chatserve", "doctor", "--device=cuda"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FlashInfer" in done.stdout
    assert "BAD" not in done.stdout

"""Writes docs/protocol.md, the reference of all messages, from the code. A test says when that is due."""

from __future__ import annotations

from pathlib import Path

from chatserve.protocol.reference import reference

TARGET = Path(__file__).parent.parent / "docs" / "protocol.md"

if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}")

"""`chatserve doctor` on a machine without a GPU: what it finds, what it tries, and what its status says."""

from __future__ import annotations

import pytest

from chatserve.cli import doctor
from chatserve.engine import doctor as examination
from chatserve.engine.build import has_cuda
from chatserve.engine.doctor import Finding
from chatserve.errors import StartupError


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Packages, device and attention are named, pages are shared in the self-test, and the status is 0."""
    assert doctor.main(["--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for what in ("torch", "transformers", "redis", "Device", "Attention", "Shared pages", "Self-test", "All is well."):
        assert what in shown
    assert "BAD" not in shown


def test_a_machine_without_a_gpu_is_told_so() -> None:
    """Asked for a GPU that is not there, it says what to install or to choose instead."""
    if has_cuda():
        pytest.skip("there is a GPU here")
    with pytest.raises(StartupError, match="--device cuda"):
        doctor.main(["--device", "cuda"])


def test_one_bad_finding_is_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A finding that would keep a server from working is marked and gives status 1."""
    findings = [Finding("Device", "CPU"), Finding("Logits", "relative error 3.0", ok=False)]
    monkeypatch.setattr(examination, "examine", lambda _: iter(findings))
    assert doctor.main([]) == 1
    assert "BAD  Logits" in capsys.readouterr().out

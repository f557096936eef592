"""What one turn was like for its client."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Turn:
    """Times in seconds on the machine's monotonic clock. `arrivals`: (time, tokens) of each message with tokens.

    `num_restored` of the cached tokens came back from host memory or disk, in `restore_ms`, where the server says so.
    """

    session: int
    number: int
    began_s: float
    ended_s: float = 0.0
    num_input: int = 0
    num_cached: int = 0
    num_restored: int = 0
    restore_ms: float = 0.0
    num_output: int = 0
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        """From sending the request to its first token."""
        return (self.arrivals[0][0] - self.began_s) * 1000

    def gaps_ms(self) -> list[tuple[float, float]]:
        """(milliseconds a token, tokens) of each message after the first."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [((later[0] - sooner[0]) * 1000 / later[1], later[1]) for sooner, later in pairs if later[1]]

"""How long something takes, learned from how long it took: a base and a price a unit, fitted as it goes.

Recent observations count most, so that the estimate follows a machine whose load changes.
"""

from __future__ import annotations

DECAY = 0.97  # of an observation's weight with each that follows


class LinearCost:
    """Seconds for a number of units, by least squares over decaying observations."""

    def __init__(self) -> None:
        self._weight = self._units = self._seconds = self._units_squared = self._product = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything was observed."""
        return self._weight > 0

    def observe(self, units: float, seconds: float) -> None:
        """This many units took so long."""
        self._weight = self._weight * DECAY + 1
        self._units = self._units * DECAY + units
        self._seconds = self._seconds * DECAY + seconds
        self._units_squared = self._units_squared * DECAY + units * units
        self._product = self._product * DECAY + units * seconds

    def estimate(self, units: float) -> float:
        """Seconds that so many units will take; 0 before anything is known. Never falls with the units."""
        if not self.is_known:
            return 0.0
        spread = self._weight * self._units_squared - self._units**2
        mean_units, mean_seconds = self._units / self._weight, self._seconds / self._weight
        if spread <= 1e-9 * self._units_squared * self._weight:  # one size only: all of it is price
            return mean_seconds * units / mean_units if mean_units else mean_seconds
        price = max(0.0, (self._weight * self._product - self._units * self._seconds) / spread)
        base = max(0.0, mean_seconds - price * mean_units)
        return base + price * units

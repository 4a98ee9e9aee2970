"""How much energy the processors of this machine take, by the counters that Linux shows (powercap, RAPL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = "package-"


@dataclass(frozen=True)
class _Zone:
    """One processor's counter, in microjoules, which begins anew beyond `most`."""

    file: Path
    most: int


class EnergyMeter:
    """The energy of all processors together. It counts what everything on the machine takes, not one process alone.

    Args:
        zones: by processor, its counter.
    """

    def __init__(self, zones: list[_Zone]) -> None:
        self._zones = zones
        self._joules = 0.0
        self._last = [int(zone.file.read_text()) for zone in zones]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyMeter | None:
        """That of this machine; None where it shows none, or not to this user."""
        zones: list[_Zone] = []
        try:
            for zone in sorted(root.glob("*")):
                if (zone / "name").is_file() and (zone / "name").read_text().startswith(_PACKAGE):
                    zones.append(_Zone(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            return cls(zones) if zones else None
        except OSError:
            return None

    def joules(self) -> float:
        """What was taken since the meter was found. To be asked more often than a counter goes round, a few minutes."""
        for index, zone in enumerate(self._zones):
            now = int(zone.file.read_text())
            passed = now - self._last[index]
            self._joules += (passed if passed >= 0 else passed + zone.most) / 1e6
            self._last[index] = now
        return self._joules

"""Floor 2. How old a token is, and how many trajectories may be on the way: pure arithmetic.

Each incarnation n of the learner forks from the line of n - 1 at step f_n. Two weights on that tree, at
step a of incarnation
n and step b of incarnation m <= n, share their past up to c = min(a, b, f_{m+1}, .., f_n), and

    slip = (a - c) + (b - c).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from slipstream.errors import ProtocolError
from slipstream.types import Int32Array, Version


def capacity(accepted: int, running: int, version: int, max_slip: int, batch: int) -> int:
    """Return how many more may be started: (max_slip + version + 1) * batch - accepted - running.

    Source: the admission rule of AReaL, Fu et al. 2025, arXiv:2505.24298, section 5.1.
    """
    return (max_slip + version + 1) * batch - accepted - running


class VersionTable:
    """Knows what each serial stands for and how far two of them are apart.

    Example: ``VersionTable([v0, v1]).slip(1, np.array([0, 1, -1]))`` is ``[1, 0, 0]``.
    """

    def __init__(self, versions: Iterable[Version] = (), forks: Mapping[int, int] | None = None) -> None:
        """Fill the table; `forks` gives steps at which incarnations without a version here started."""
        self._versions: dict[int, Version] = {}
        self._forks: dict[int, int] = dict(forks or {})
        for version in versions:
            self.add(version)

    def add(self, version: Version) -> None:
        """Add one version; raises ProtocolError when its serial or incarnation means something else."""
        known = self._versions.setdefault(version.serial, version)
        if known != version:
            raise ProtocolError(
                f"serial {version.serial}: expected {known}, got {version}; serials are never reused"
            )
        self.fork(version.incarnation, version.fork_step)

    def fork(self, incarnation: int, fork_step: int) -> None:
        """Note the step an incarnation started from."""
        known = self._forks.setdefault(incarnation, fork_step)
        if known != fork_step:
            raise ProtocolError(f"incarnation {incarnation}: expected fork step {known}, got {fork_step}")

    @property
    def forks(self) -> Mapping[int, int]:
        """The step each incarnation started from."""
        return self._forks

    def forks_after(self, incarnation: int) -> dict[int, int]:
        """Return the step that each later incarnation started from: what slip from this one on hangs on."""
        return {number: step for number, step in self._forks.items() if number > incarnation}

    def keep(self, serials: Collection[int]) -> None:
        """Forget all serials but these."""
        self._versions = {serial: known for serial, known in self._versions.items() if serial in serials}

    def __iter__(self) -> Iterator[Version]:
        """Yield every version by serial."""
        return iter([self._versions[serial] for serial in sorted(self._versions)])

    def __contains__(self, serial: int) -> bool:
        """Return whether a serial is known."""
        return serial in self._versions

    def __getitem__(self, serial: int) -> Version:
        """Return the version of a serial; raises ProtocolError when it is unknown."""
        if serial not in self._versions:
            raise ProtocolError(f"serial {serial}: expected a published serial, got one never announced")
        return self._versions[serial]

    def slip(self, current_serial: int, sampled_serials: Sequence[int] | Int32Array) -> Int32Array:
        """Return the [T] slip of tokens sampled under [T] serials, consumed at `current_serial`; 0 for -1."""
        current = self[current_serial]
        return self.slip_at(current.step, current.incarnation, sampled_serials)

    def is_given_up(self, incarnation: int, serial: int) -> bool:
        """Return whether a later incarnation, up to this one, started from a step before this serial's."""
        sampled = self[serial]
        later = range(sampled.incarnation + 1, incarnation + 1)
        return any(self._forks[n] < sampled.step for n in later if n in self._forks)

    def slip_at(self, step: int, incarnation: int, sampled_serials: Sequence[int] | Int32Array) -> Int32Array:
        """Return the [T] slip at a step of an incarnation that has perhaps not published it yet."""
        serials, inverse = np.unique(np.asarray(sampled_serials, np.int32), return_inverse=True)
        slips = [self._distance(step, incarnation, int(serial)) for serial in serials]
        return np.asarray(slips, np.int32)[inverse]

    def _distance(self, step: int, incarnation: int, serial: int) -> int:
        if serial < 0:
            return 0
        sampled = self[serial]
        low, high = sorted((incarnation, sampled.incarnation))
        forks = [self._forks[n] for n in range(low + 1, high + 1) if n in self._forks]
        common = min([step, sampled.step, *forks])
        return step + sampled.step - 2 * common

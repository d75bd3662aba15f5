"""Faults on real processes, at every system call and of the power: nothing lost, doubled or hanging.

The smoke tests are for every change; campaign.py has the hour's worth. Each report holds its seed, and
`--torture-seed` sets it.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import Any

import pytest
import quick
import shim

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session", autouse=True)
def _without_torch() -> None:
    """Say at once when the rig's processes cannot start."""
    roles = "import roles, scenarios, sys; assert 'torch' not in sys.modules"
    environment = {
        **quick.os.environ,
        "PYTHONPATH": quick.os.pathsep.join([str(quick.HERE), *quick._packages()]),
    }
    subprocess.run([quick.sys.executable, "-c", roles], check=True, env=environment, timeout=200)


def together(*tests: tuple[str, int, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Run quick tests beside one another, and return what they found when nothing is wrong."""
    started = [(name, quick.start(name, seed=seed, options=options)) for name, seed, options in tests]
    found = [(name, quick.finish(process)) for name, process in started]
    wrong = [f"{name}: {line}" for name, result in found for line in result["wrong"]]
    assert not wrong, "\n".join(wrong)
    return [result for _, result in found]


def test_smoke_a_storm_of_kills_and_network_faults(torture_seed: int) -> None:
    found = together(
        ("storm", torture_seed, ("--seconds", "15", "--faults", "550")),
        ("storm", torture_seed + 1, ("--seconds", "15", "--faults", "550", "--durability", "power")),
    )
    faults = Counter[str]()
    for result in found:
        faults.update(result["faults"])
        assert result["books"]["trained"] > 0
        assert result["hangs"] == 0
    print(f"seed {torture_seed}: {sum(faults.values())} faults {dict(faults)}")


def test_smoke_every_system_call_of_spool_and_log(torture_seed: int) -> None:
    _points(torture_seed, "spool", "log")


def test_smoke_every_system_call_of_the_checkpoint(torture_seed: int) -> None:
    _points(torture_seed, "checkpoint")


def test_smoke_what_a_disk_holds_after_the_power_failed(torture_seed: int) -> None:
    _needs_shim()
    options = ("--states", "6000")
    together(*((f"power_of_the_{name}", torture_seed, options) for name in ("spool", "log")))
    together(("power_of_the_checkpoint", torture_seed, options))


def test_smoke_clones_and_a_hub_that_stands_still(torture_seed: int) -> None:
    clones, silence = together(("clones", torture_seed, ()), ("silence", torture_seed, ()))
    assert clones["exits"]["clone 11"] == clones["faults"]["races"]
    assert silence["hangs"] == 0


def test_smoke_a_full_disk(torture_seed: int) -> None:
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    allowed = subprocess.run(mount, check=False, timeout=200, capture_output=True)
    if allowed.returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    (found,) = together(("disk_full", torture_seed, ()))
    assert found["faults"]["disk_full"] > 0


def _points(seed: int, *names: str) -> None:
    _needs_shim()
    for kind in ("points", "failures"):
        for found in together(*((f"{kind}_of_the_{name}", seed, ()) for name in names)):
            assert found["calls"] > 20
            assert sum(found["counts"].values()) >= found["calls"]


def _needs_shim() -> None:
    try:
        shim.prepare()
    except shim.MissingShimError as error:
        pytest.skip(str(error))

"""The rig's modules are imported by their names, as its programs import them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the knobs of the rig."""
    parser.addoption(
        "--torture-seed", type=int, default=None, help="first seed of the rig; drawn anew without"
    )


@pytest.fixture(scope="session")
def torture_seed(pytestconfig: pytest.Config) -> int:
    """The first seed of this test run, in every report."""
    given = pytestconfig.getoption("--torture-seed")
    return int(given) if given is not None else __import__("secrets").randbelow(1 << 30)

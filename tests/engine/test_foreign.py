"""Code that is not ours: its errors are kept, cancellation and what is meant to pass goes on."""

from __future__ import annotations

import asyncio

import pytest

from slipstream.foreign import Contained, settled


def test_an_error_is_kept_and_goes_no_further() -> None:
    with Contained(OSError) as ran:
        raise KeyError("x")
    assert isinstance(ran.error, KeyError)  # type: ignore[unreachable]


@pytest.mark.parametrize("error", [FileNotFoundError("x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_what_is_meant_to_pass_passes(error: BaseException) -> None:
    ran = Contained(OSError)
    with pytest.raises(type(error)), ran:
        raise error
    assert ran.error is None


def test_what_can_be_awaited_is() -> None:
    async def later() -> int:
        await asyncio.sleep(0)
        return 7

    assert asyncio.run(settled(later())) == asyncio.run(settled(7)) == 7

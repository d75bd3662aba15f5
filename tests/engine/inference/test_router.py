"""Which server a request goes to, and how many may go: exact numbers."""

from __future__ import annotations

import pytest

from slipstream.inference.vllm.router import DECREASE, FIRST_LIMIT, INCREASE, Router
from slipstream.retries import Backoff


def router(*names: str, most: int = 100) -> Router:
    made = Router(most=most, backoff=Backoff(first_s=1.0, longest_s=8.0, uniform=lambda low, high: high))
    made.keep(set(names))
    return made


def test_a_rollout_stays_where_its_prefix_is() -> None:
    routes = router("a", "b")
    first = routes.place(7, 0.0)
    assert first is not None
    other = routes.place(8, 0.0)
    assert {first, other} == {"a", "b"}  # the second goes to the one that has none
    for _ in range(5):
        assert routes.place(7, 0.0) == first


def test_a_forgotten_rollout_goes_to_the_least_loaded() -> None:
    routes = router("a", "b")
    first = routes.place(7, 0.0)
    for rollout in range(10, 14):
        routes.place(rollout, 0.0)
    for _ in range(2):
        routes.place(7, 0.0)
    routes.release(7)
    assert routes.place(7, 0.0) != first


def test_nobody_gets_more_than_its_limit() -> None:
    routes = router("a", most=3)
    assert [routes.place(n, 0.0) for n in range(5)] == ["a", "a", "a", None, None]
    routes.done("a")
    assert routes.place(9, 0.0) == "a"
    routes.given_up("a")
    assert routes.place(10, 0.0) == "a"


def test_a_server_that_fails_rests_twice_as_long_each_time_and_rollouts_go_elsewhere() -> None:
    routes = router("a", "b")
    name = routes.place(1, 0.0)
    assert name is not None
    other = "b" if name == "a" else "a"
    routes.failed(name, 0.0)  # rests 1 + 1 s
    assert routes.place(1, 1.9) == other
    routes.release(1)
    for _ in range(3):  # the other one has more to do
        routes.place(2, 1.9)
    assert routes.place(3, 2.0) == name
    routes.failed(name, 2.0)  # rests 1 + 2 s
    assert routes.place(4, 4.9) == other
    routes.release(4)
    assert routes.place(5, 5.0) == name
    routes.done(name)
    routes.place(5, 5.0)
    routes.failed(name, 5.0)  # an answer between: as after the first failure
    assert routes.place(5, 7.0) in {name, other}
    routes.keep({name})
    assert routes.place(6, 7.0) == name


def test_requests_that_fail_together_are_one_failure() -> None:
    routes = router("a")
    for rollout in range(8):
        assert routes.place(rollout, 0.0) == "a"
    for _ in range(8):
        routes.failed("a", 0.5)
    assert routes.place(0, 2.4) is None
    assert routes.place(0, 2.5) == "a"


def test_limits_grow_by_addition_while_they_are_used_and_shrink_by_multiplication() -> None:
    routes = router("a", most=40)
    assert routes.limit("a") == FIRST_LIMIT
    routes.observe("a", kv_cache=0.1, waiting=0)
    assert routes.limit("a") == FIRST_LIMIT  # not used: says nothing
    for rollout in range(24):
        routes.place(rollout, 0.0)
    routes.observe("a", kv_cache=0.1, waiting=0)
    assert routes.limit("a") == FIRST_LIMIT + INCREASE
    routes.observe("a", kv_cache=0.1, waiting=0)
    assert routes.limit("a") == FIRST_LIMIT + INCREASE  # 24 of 36 are not nearly all
    routes.observe("a", kv_cache=0.95, waiting=0)
    assert routes.limit("a") == pytest.approx((FIRST_LIMIT + INCREASE) * DECREASE)
    routes.observe("a", kv_cache=0.5, waiting=3)
    assert routes.limit("a") == pytest.approx((FIRST_LIMIT + INCREASE) * DECREASE**2)
    for _ in range(50):
        routes.observe("a", kv_cache=1.0, waiting=9)
    assert routes.limit("a") == 1.0
    for _ in range(50):
        routes.observe("a", kv_cache=0.0, waiting=0)
    assert routes.limit("a") == 33.0  # of which 24 are not nearly all


def test_a_server_that_is_gone_takes_nothing() -> None:
    routes = router("a", "b")
    routes.keep({"b"})
    assert routes.names == ("b",)
    assert [routes.place(n, 0.0) for n in range(3)] == ["b"] * 3
    routes.done("a")
    routes.failed("a", 0.0)
    routes.observe("a", kv_cache=1.0, waiting=1)
    assert routes.names == ("b",)

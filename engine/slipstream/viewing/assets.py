"""Floor 5. The page's files, and what a browser may do with them.

Episodes are text from strangers. Nothing of it becomes markup: the scripts set text, never HTML, and the
policy below admits the page's own files alone, so that what slipped through could neither run nor call home.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any, Final

from slipstream.viewing.run import to_json

HTML: Final = "view.html"
STYLES: Final = "view.css"
SCRIPTS: Final = ("dom.js", "source.js", "groups.js", "episode.js", "lanes.js", "main.js")
"""In the order in which they are run."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ESCAPED: Final = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
"""In JSON these signs occur in strings alone; escaped, no string can end the element that holds it."""


def asset(name: str) -> str:
    """Return the text of one of the page's files."""
    return resources.files("slipstream.viewing.page").joinpath(name).read_text(encoding="utf-8")


def served_page() -> str:
    """Return the page that loads its files from where it came from."""
    style = f'<link rel="stylesheet" href="/{STYLES}">'
    scripts = "\n".join(f'<script src="/{name}" defer></script>' for name in SCRIPTS)
    return _filled(head=style, body=scripts)


def single_page(data: Any) -> str:
    """Return the page as one file that holds its styles, its scripts and `data`, and admits these alone."""
    style, script = asset(STYLES), "\n".join(asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    inert = f'<script type="application/json" id="data">{inert_json(data)}</script>'
    return _filled(head=head, body=f"{inert}\n<script>{script}</script>")


def inert_json(data: Any) -> str:
    """Return plain data as JSON that no HTML parser takes for markup."""
    return to_json(data).decode().translate(_ESCAPED)


def _filled(*, head: str, body: str) -> str:
    """Return the page's frame with its head and the end of its body filled in."""
    before, found, rest = asset(HTML).partition("<!--head-->")
    between, found_too, behind = rest.partition("<!--body-->")
    assert found and found_too
    return f"{before}{head}{between}{body}{behind}"


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"

"""A server written with the real `mcp` package."""

from mcp.server.mcpserver import MCPServer

CAPITALS = {"Norway": "Oslo", "Italy": "Rome", "Japan": "Tokyo"}
server = MCPServer("atlas", version="7.1")


@server.tool()
def capital(country: str) -> str:
    """Return the capital of a country."""
    return CAPITALS[country]


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


server.run("stdio")

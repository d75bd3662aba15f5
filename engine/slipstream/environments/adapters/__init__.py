"""Floor 4. Environments of other frameworks, and MCP servers, each in a process of its own interpreter.

What pins conflict about stays there; between it and us go messages of JSON alone.

    foreign.py     what all stand on: a program, its messages, its end
    mcp.py         an MCP server's tools over tasks of one's own; protocol.py speaks with the server
    bridged.py     environments of skyrl-gym, openenv and verifiers; bridge.py holds their workers
    worker.py      runs in the foreign interpreter, with one of the files of_*.py
"""

"""Floor 4. Rows of metrics.jsonl mirrored to other places, by processes that nothing waits for.

run ─▶ metrics.jsonl ◀─ reads ─ mirror.py ─▶ bounded queue ─▶ one thread ─▶ sinks.py (W&B, TensorBoard)

Each place has a process of its own, which keeper.py starts and ends. It reads the file as anybody could: a
sink that fails, hangs or dies leaves rows out, which is counted and said once, and touches nothing else.
"""

"""Floor 4. A task of one's own in a few lines: tools, rewards and monitors from functions, tasks from data.

episode.py   what a tool may change and a reward reads
tools.py     @tool: a typed function as a tool
rewards.py   @reward, @metric, @monitor: functions of a finished episode, and what they add up to
tasks.py     tasks from JSONL, or from a function; folders.py from a Hugging Face dataset on disk
play.py      one such episode; environment.py the call that puts all of it together
"""

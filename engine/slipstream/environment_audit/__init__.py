"""Floor 5. Can this environment be trained on? What `slipstream env audit` plays, judges and reports.

supervision.py    starts the worker, ends it in time, writes the report (page.py)
worker.py         makes the environment and runs one check after another
stage.py          plays episodes in the loop of training; episode.py notes what the environment does in them
"""

"""Floor 5. Reading a run: `slipstream view` and what it shows.

log.py        the hub's log, event by event, while it is still written
index.py      one row of numbers for each episode
filters.py    which episodes are wanted, in which order
episode.py    one episode as the page shows it
tokens.py     tokens as text
gap.py        log-probabilities of a checkpoint beside those of sampling
run.py        all of it together: the answers of the page's addresses
server.py     these addresses over HTTP, on the loopback
export.py     page and answers in one file
page/         HTML, CSS and JavaScript
"""

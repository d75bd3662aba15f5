"""Python imports this at its start where this folder is on PYTHONPATH: in all processes of a test."""

import no_pickle

no_pickle.install()

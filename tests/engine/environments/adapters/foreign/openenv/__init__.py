"""A stand-in for OpenEnv: environments need nothing of it but that it can be imported."""

__version__ = "0.0.2"

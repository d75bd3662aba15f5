"""Floor 4. The keys that belong to one environment: `environment.options`, checked by its own model."""

from __future__ import annotations

import json
from typing import Final, TypeVar

from pydantic import ValidationError

from slipstream.config import EnvironmentConfig, Part
from slipstream.config_sentences import hint, sentence
from slipstream.errors import ConfigurationError

P = TypeVar("P", bound=Part)
KEY: Final = "environment.options"


def read_options(kind: type[P], config: EnvironmentConfig) -> P:
    """Return the options of the configured environment as its model `kind`; raises ConfigurationError.

    Example: ``read_options(ResearchOptions, config).hops``.
    """
    unknown = [key for key in config.options if key not in kind.model_fields]
    if unknown:
        known = list(kind.model_fields)
        offered = (
            hint(unknown[0], known) or f"; there {'are' if known else 'is'} {', '.join(known) or 'none'}"
        )
        raise ConfigurationError(f"{KEY}: environment {config.name} has no option {unknown[0]}{offered}")
    missing = [
        key for key, field in kind.model_fields.items() if field.is_required() and key not in config.options
    ]
    if missing:
        raise ConfigurationError(f"{KEY}: environment {config.name} needs the option {missing[0]}")
    try:
        return kind.model_validate_json(json.dumps(config.options, default=str))
    except ValidationError as error:
        raise ConfigurationError(sentence(error.errors()[0], KEY, ())) from None

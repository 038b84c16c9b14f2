"""Compose, check and instantiate a config."""

from cnntrain.config.checks import adapt_types, check
from cnntrain.config.composition import (
    build,
    compose,
    compose_all,
    compose_valid,
    config_folders,
    config_problems,
)
from cnntrain.config.cross_checks import cross_check
from cnntrain.config.errors import (
    ConfigError,
    as_config_error,
    folder_problem,
    run_directory_problem,
)
from cnntrain.config.nodes import NODES, ROOTS, Root
from cnntrain.config.options import (
    CONF,
    config_hash,
    flat,
    incidental,
    options_hash,
    without_hydra,
)
from cnntrain.config.overrides import quoted

__all__ = [
    "CONF",
    "NODES",
    "ROOTS",
    "ConfigError",
    "Root",
    "adapt_types",
    "as_config_error",
    "build",
    "check",
    "compose",
    "compose_all",
    "compose_valid",
    "config_folders",
    "config_hash",
    "config_problems",
    "cross_check",
    "flat",
    "folder_problem",
    "incidental",
    "options_hash",
    "quoted",
    "run_directory_problem",
    "without_hydra",
]

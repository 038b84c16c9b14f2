"""Private names of Hydra: a failure here means that Hydra has changed them."""

from hydra.types import HydraContext
from omegaconf import OmegaConf

from cnntrain.config.hydra_compat import Callbacks, get_args_parser


def test_get_args_parser_knows_the_flags_that_are_read() -> None:
    arguments = get_args_parser().parse_intermixed_args(["a=1", "-m", "--config-dir", "x", "b=2"])
    assert arguments.overrides == ["a=1", "b=2"]
    assert (arguments.multirun, arguments.config_dir) == (True, "x")
    flags = "help hydra_help cfg info shell_completion resolve package run experimental_rerun"
    assert all(hasattr(arguments, flag) for flag in [*flags.split(), "config_path", "config_name"])


def test_callbacks_are_what_a_launcher_is_created_with() -> None:
    callbacks = Callbacks(OmegaConf.create({"hydra": {"callbacks": {}}}))
    HydraContext(config_loader=None, callbacks=callbacks)
    callbacks.on_multirun_start(config=OmegaConf.create(), config_name="train")
    callbacks.on_multirun_end(config=OmegaConf.create(), config_name="train")

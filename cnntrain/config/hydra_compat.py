"""Private names of Hydra that the package uses, each with the public API that is missing."""

# Callbacks: HydraContext, with which launchers are created, requires it, and nothing public creates
# one. Tested by the sweeps in tests/sweeps/.
# get_args_parser: hydra.main parses sys.argv by itself and exits, so that the command line could
# not be checked before it writes. Tested in tests/config/test_hydra_compat.py.
from hydra._internal.callbacks import Callbacks as Callbacks
from hydra._internal.utils import get_args_parser as get_args_parser

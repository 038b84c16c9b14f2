"""Private names of Hydra that the package uses, each with the public API that is missing."""

# hydra.main parses sys.argv by itself and exits: the command line cannot be checked before it
# writes. Tested in tests/config/test_hydra_compat.py.
from hydra._internal.utils import get_args_parser as get_args_parser

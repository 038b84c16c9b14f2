"""Many runs: started, resumed, collected, ranked. Imports no torch before it is needed."""

from cnntrain.sweeps.sweep import Sweep

__all__ = ["Sweep"]

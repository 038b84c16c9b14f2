"""Many runs: started, resumed, collected, ranked. Nothing here imports torch before it is needed."""

from cnntrain.sweeps.sweep import Sweep

__all__ = ["Sweep"]

"""Imported by the fork server: a composition, which fills the caches of Hydra and its parser."""

from cnntrain.config import compose

compose(["data=fashion_mnist_mini"])

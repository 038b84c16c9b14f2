"""cnntrain: train convolutional networks from a config, the convolution itself chosen by it."""

__version__ = "0.1.0"

"""Lessons on convolutions: functions that take the options of `cnntrain lesson`."""

from cnntrain.lab.lessons.basics import activations, cost, patterns
from cnntrain.lab.lessons.im2col import window
from cnntrain.lab.lessons.lesson import Lesson

__all__ = ["Lesson", "activations", "cost", "patterns", "window"]

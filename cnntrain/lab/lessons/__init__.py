"""What a convolution is, in numbers and pictures: `cnntrain lesson`.

Each lesson is a function that takes the options of its command, and gives a `Lesson`.
"""

from cnntrain.lab.lessons.activations import activations
from cnntrain.lab.lessons.cost import cost
from cnntrain.lab.lessons.lesson import Lesson
from cnntrain.lab.lessons.patterns import patterns
from cnntrain.lab.lessons.window import window

__all__ = ["Lesson", "activations", "cost", "patterns", "window"]

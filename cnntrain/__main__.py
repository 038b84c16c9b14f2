"""`python -m cnntrain ...`, the same as `cnntrain ...`."""

from cnntrain.commands import main

main()

"""The ranked table on the terminal."""

from pathlib import Path

import pytest

from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.record import Member
from cnntrain.sweeps.tables import print_ranked


def test_a_failure_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    error = "OSError: no space left for " + "word " * 40
    member = Member("seed=0", Path("s/seed=0"), {"seed": 0}, "failed", error=error)
    collection = Collection("s", Path("s"), "val/acc", True, {"seed": [0]}, (member,))
    print_ranked(collection, Console(width=110))
    assert f"failed: seed=0: {error}".strip() in [
        line.strip() for line in capsys.readouterr().out.splitlines()
    ]


def test_a_group_is_one_line_of_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no room, metrics are left out, and said to be; options never."""
    from rich.console import Console

    values = {f"optimizer.option_{i}": 0.123456 + i for i in range(8)}
    metrics = {"val/acc": 0.5, "test/acc": 0.4, "val/loss": 1.25, "train/acc": 0.75}
    member = Member("a", Path("s/a"), values, "completed", metrics, seconds=9.5)
    over = {option: [value, 1.0] for option, value in values.items()}
    collection = Collection("s", Path("s"), "val/acc", True, over, (member,))
    numbers = ["0.1235", *(f"{i}.123" for i in range(1, 8)), "50.00"]
    printed = {}
    for width in (60, 140, 400):
        print_ranked(collection, Console(width=width))
        printed[width] = capsys.readouterr().out
    rows = {
        width: next(line.split() for line in text.splitlines() if line.startswith("1 "))
        for width, text in printed.items()
    }
    assert rows[60] == ["1", *numbers, "40.00", "1"]
    assert rows[140] == ["1", *numbers, "40.00", "1.2500", "9.5", "1"]
    assert rows[400] == ["1", *numbers, "40.00", "75.00", "1.2500", "9.5", "1"]
    left_out = "No room for {}: a wider terminal or the report shows them."
    assert left_out.format("train/acc, val/loss, seconds") in printed[60]
    assert left_out.format("train/acc") in printed[140]
    assert "No room" not in printed[400]

"""The ranked table on the terminal."""

from pathlib import Path

import pytest

from cnntrain.sweeps.records import Collection, Member
from cnntrain.sweeps.tables import print_ranked


def test_a_long_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = "OSError: no space left for " + "word " * 40
    member = Member("seed=0", Path("s/seed=0"), {"seed": 0}, "failed", error=error)
    collection = Collection("s", Path("s"), "val/acc", {"seed": [0]}, (member,))
    print_ranked(collection)
    assert f"failed: seed=0: {error}".strip() in [
        line.strip() for line in capsys.readouterr().out.splitlines()
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200, None])
def test_columns_are_left_out_of_a_narrow_terminal(
    width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics before options, in a fixed order; none in a file."""
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    values = {f"optimizer.option_{i}": 0.123456 + i for i in range(8)}
    metrics = {"val/acc": 0.5, "test/acc": 0.4, "val/loss": 1.25, "train/acc": 0.75}
    member = Member("a", Path("s/a"), values, "completed", metrics, seconds=9.5)
    over = {option: [value, 1.0] for option, value in values.items()}
    print_ranked(Collection("s", Path("s"), "val/acc", over, (member,)))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= (width or 200)
    numbers = ["0.1235", *(f"{i}.123" for i in range(1, 8))]
    row = next(line.split() for line in text.splitlines() if line.startswith("1 "))
    line = " ".join(text.split()).partition("No room for ")[2].partition(": a wider")[0]
    left_out = line.split(", ") if line else []
    metrics_first = ["train/acc", "val/loss", "seconds", "test/acc", "n", "− best", "verdict"]
    options_last = [f"option_{i}" for i in range(7, 0, -1)]
    wanted = {40: 12, 60: 10, 80: 8, 110: 4, 200: 0, None: 0}[width]
    assert left_out == [*metrics_first, *options_last][:wanted]
    kept = [n for i, n in enumerate(numbers) if f"option_{i}" not in left_out]
    shown = [("40.00", "test/acc"), ("75.00", "train/acc"), ("1.2500", "val/loss")]
    shown += [("9.5", "seconds"), ("1", "n"), ("best", "verdict")]
    assert row == ["1", *kept, "50.00", *(n for n, name in shown if name not in left_out)]

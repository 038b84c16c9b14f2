"""Checkpoint files: damage is detected, and no code is loaded."""

import logging
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.training import checkpoint_file
from cnntrain.training.checkpoint_file import CheckpointError, DamagedError, newest, read, write

CONTENT = {
    "state_dict": {"weight": torch.arange(300.0).reshape(3, 100)},
    "position": {"epoch": 3, "batch": 7},
    "rows": [{"loss": 0.1, "name": "a"}, {"loss": float("inf"), "name": None}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "last.ckpt", CONTENT)
    return tmp_path / "last.ckpt"


def test_read_is_what_was_written(path: Path) -> None:
    content = read(path)
    assert torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])  # type: ignore[index]
    assert content["position"] == CONTENT["position"]
    assert content["rows"] == CONTENT["rows"]
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_torch_load_and_zip_read_it(path: Path) -> None:
    """As a file of torch.save, and as the zip archive that this is."""
    assert torch.load(path, weights_only=True)["position"] == CONTENT["position"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"cnntrain sha256 ")


def test_every_alteration_is_detected(path: Path) -> None:
    """Of any byte, the checksum's own included, and any length."""
    data = path.read_bytes()
    draw = random.Random(0)
    places = [*range(len(data) - 120, len(data)), *range(40), *draw.sample(range(len(data)), 200)]
    for place in places:
        altered = bytearray(data)
        altered[place] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(DamagedError, match=r"last\.ckpt: "):
            read(path)
    for length in [0, 1, 79, 80, 81, 102, len(data) - 1, *draw.sample(range(len(data)), 50)]:
        path.write_bytes(data[:length])
        with pytest.raises(DamagedError, match=r"last\.ckpt: "):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DamagedError):
        read(path)


class Code:
    """Code in a pickle, which creates a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_is_not_run(tmp_path: Path) -> None:
    hidden = {**CONTENT, "more": Code(tmp_path / "made")}
    write(tmp_path / "sealed.ckpt", hidden)
    with pytest.raises(CheckpointError, match=r"sealed\.ckpt: holds Python objects") as caught:
        read(tmp_path / "sealed.ckpt")
    assert not isinstance(caught.value, DamagedError)  # the previous checkpoint is not used instead
    assert "\n" not in str(caught.value)
    torch.save(hidden, tmp_path / "unknown.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Code(tmp_path / "made")))
    for name in ("unknown", "plain"):
        with pytest.raises(CheckpointError, match="was not written by cnntrain"):
            read(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "made").exists()


def test_newer_format_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "FORMAT", 9)
    monkeypatch.setattr("cnntrain.__version__", "12.3")
    write(tmp_path / "a.ckpt", CONTENT)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"written by cnntrain 12\.3; use that or a newer one"
    ):
        read(tmp_path / "a.ckpt")


def test_previous_checkpoint_is_used(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write(path, {"position": 2}, keep=tmp_path / "previous.ckpt")
    assert read(tmp_path / "previous.ckpt")["position"] == CONTENT["position"]
    found = newest(tmp_path)
    assert found is not None
    assert (found[0], found[1]["position"]) == (path, 2)
    assert not caplog.messages

    path.write_bytes(path.read_bytes()[:-7])
    found = newest(tmp_path)
    assert found is not None
    assert found[0] == tmp_path / "previous.ckpt"
    (message,) = caplog.messages
    assert f"{path}: is cut off" in message
    assert f"the one before it is used, {tmp_path / 'previous.ckpt'}" in message

    # The damaged file never replaces the intact one.
    write(path, {"position": 3}, keep=tmp_path / "previous.ckpt")
    assert read(tmp_path / "previous.ckpt")["position"] == CONTENT["position"]


def test_no_intact_checkpoint_is_reported(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(tmp_path / "empty") is None
    assert not caplog.messages
    path.write_bytes(b"")
    assert newest(tmp_path) is None
    assert "starting from the beginning" in caplog.messages[-1]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_failed_write_keeps_the_previous_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target = os if moment == "fsync" else Path
    monkeypatch.setattr(target, moment, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*last\.ckpt'"):
        write(path, {"position": 2})
    monkeypatch.undo()
    assert read(path)["position"] == CONTENT["position"]
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]

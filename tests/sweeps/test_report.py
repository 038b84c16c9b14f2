"""`cnntrain report`: the command, its errors, and the HTML page."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote

import pytest
from omegaconf import OmegaConf
from run_folders import write_run, write_sweep

from cnntrain.commands.report import main
from cnntrain.config import config_hash
from cnntrain.config.resume import add_checksum
from cnntrain.sweeps.ranking import rank
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.report import effect_panels, html, write_report

VOID = {"meta", "br", "link", "img", "hr", "input"}
NAUGHTY = '<script>alert("x")</script> & $x_1$ \\frac'


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`cnntrain report`, in this process."""
    argv = ["cnntrain report", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", argv):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


class Page(HTMLParser):
    """A parsed page, in which every element that is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.drawn: list[str] = []  # in figures
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open[-1:] == ["text"]:
            self.drawn.append(data)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [v for t, name, v in self.attributes if (t, name) == (tag, attribute)]


def example_sweep(folder: Path, **given: object) -> None:
    """Two backends by two models by two seeds; one failed, one interrupted, one pending."""
    members = {
        f"backend={b},model={m},seed={s}": {"backend": b, "model": m, "seed": s}
        for b in ("native", "im2col")
        for m in ("shallow", "lenet5")
        for s in (0, 1)
    }
    over = {"backend": ["native", "im2col"], "model": ["shallow", "lenet5"], "seed": [0, 1]}
    write_sweep(folder, over, members, **given)  # type: ignore[arg-type]
    for i, (name, values) in enumerate(members.items()):
        overrides = [f"backend={values['backend']}", f"model={values['model']}"]
        seed, accuracy = int(str(values["seed"])), 0.8 + 0.01 * i
        if i == 5:
            write_run(folder / name, overrides, seed=seed, status="failed", error=NAUGHTY)
        elif i == 6:
            write_run(folder / name, overrides, seed=seed, status="interrupted", val=[0.3])
        elif i != 7:
            write_run(folder / name, overrides, seed=seed, val=[0.5, accuracy], seconds=5.0 + i)


def test_page_is_self_contained(tmp_path: Path) -> None:
    example_sweep(tmp_path)
    done = report(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "report/report.html").read_text()
    found = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert not {"link", "img", "iframe", "object"} & found.tags.keys()
    assert found.values("script", "src") == []
    assert len(found.ids) == len(set(found.ids))
    links = found.values("a", "href")
    assert len(links) == 7 + 1  # every directory that is there, the failed one's twice
    for link in links:
        assert (tmp_path / "report" / unquote(link) / "result.json").exists()
    shown = "".join(found.text)
    for member in collect(tmp_path).members:
        assert member.name in shown
    assert NAUGHTY in shown  # as text: the parser has seen no such element
    assert found.tags["script"] == 1
    assert "5 completed" in shown
    assert "1 pending" in shown
    pictures = [v for v in found.values("svg", "aria-label") if v]
    assert len(pictures) == text.count('role="img"') == 2 + 2
    assert found.tags["figcaption"] == len(pictures)
    inner = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert inner
    assert inner <= set(found.ids)


def test_values_are_escaped(tmp_path: Path) -> None:
    values = [f"{i}{NAUGHTY}" for i in range(3)]
    short = ["$x_0$", "$x_1$", "\\q$<i>"]
    members = {f"run{i}": {"model.name": v, "b": v, "c": short[i]} for i, v in enumerate(values)}
    over = {"model.name": values, "b": values, "c": short}
    write_sweep(tmp_path / "<b>sweep", over, members)
    for i in range(3):
        write_run(tmp_path / f"<b>sweep/run{i}", val=[0.5 + 0.1 * i])
    write_report(collect(tmp_path / "<b>sweep"), tmp_path / "out")
    found = Page((tmp_path / "out/report.html").read_text())
    assert found.tags["b"] == 0
    assert found.tags["script"] == 1
    assert "0<script>alert(" in "".join(found.text)
    # In the figures, too: a $ or a backslash is no formula.
    for value in short:
        assert found.drawn.count(value) >= 1
    assert found.tags["i"] == 0
    lines = [x for x in (tmp_path / "out/report.md").read_text().splitlines() if x[:1] == "|"]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<script" not in "".join(lines)


def test_metric_and_folder(tmp_path: Path) -> None:
    example_sweep(tmp_path)
    done = report(tmp_path, "metric=val/loss", f"out={tmp_path / 'else where'}")
    assert done.returncode == 0, done.stderr
    assert "best by val/loss is im2col, shallow, 0.2600" in done.stdout
    assert not (tmp_path / "report").exists()
    with (tmp_path / "else where/report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", ""]
    # Of native and lenet5 the third and fourth: accuracies 0.82 and 0.83, losses 1.1 less that.
    assert float(rows[1]["val/loss mean"]) == pytest.approx(0.275)
    assert float(rows[1]["val/loss std"]) == pytest.approx(0.01 / math.sqrt(2))
    assert float(rows[1]["seconds"]) == pytest.approx(7.5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "nowhere: is not a folder"),
        (["FOLDER", "metric=val/los"], "metric=val/los: is no metric; there is val/acc"),
        (
            ["FOLDER", "metric=test/loss"],
            "metric=test/loss: no run has it; there is val/acc, val/lo",
        ),
        (["FOLDER", "metrc=val/acc"], "metrc=val/acc: report has no option 'metrc'; did you mean"),
        (["FOLDER", "--metric=val/acc"], "report has no option '--metric'; did you mean 'metric'?"),
        (["FOLDER", "out="], "out=: must name a folder"),
        (["FOLDER", "FOLDER"], "give one folder"),
        (["metric=val/acc"], "no folder: give one folder"),
        (["FOLDER/empty"], "holds no run, nor sweep.json"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], error: str) -> None:
    write_run(tmp_path / "run", val=[0.5])
    result = tmp_path / "run/result.json"  # as of a run that was not tested
    content = {k: v for k, v in json.loads(result.read_text()).items() if k != "sha256"}
    content["metrics"] = {k: v for k, v in content["metrics"].items() if "test" not in k}
    result.write_text(json.dumps(add_checksum(content)))
    (tmp_path / "empty").mkdir()
    done = report(*(text.replace("FOLDER", str(tmp_path)) for text in arguments))
    assert done.returncode == 2
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "report").exists()


def test_help() -> None:
    done = report("--help")
    assert done.returncode == 0
    assert "metric: for the ranking" in done.stdout
    assert report().returncode == 2


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    """The table is printed, with an error that names the option."""
    write_run(tmp_path / "run")
    (tmp_path / "report").touch()
    done = report(tmp_path)
    assert done.returncode == 1
    assert "val/acc, 90.00 %" in done.stdout
    assert str(tmp_path / "report") in done.stderr
    assert "out=<folder> writes elsewhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_search(tmp_path: Path) -> None:
    """A conditional option, pruned and failed trials, a scale that is declared."""
    members, statuses = {}, ["completed"] * 6 + ["pruned", "failed"]
    for i in range(8):
        values = {"optimizer": "sgd" if i % 2 else "adam", "optimizer.lr": 10.0 ** (-1 - i / 4)}
        members[f"trial={i}"] = values | ({"optimizer.momentum": 0.1 * i} if i % 2 else {})
    over: dict[str, list[object]] = {"optimizer": ["adam", "sgd"], "optimizer.lr": []}
    space = {"optimizer.lr": {"low": 1e-3, "high": 0.1, "log": True}}
    search = {"space": space, "trials": 8}
    write_sweep(tmp_path, over | {"optimizer.momentum": []}, members, search=search)
    for i, (name, status) in enumerate(zip(members, statuses, strict=True)):
        write_run(tmp_path / name, status=status, val=[0.5, 0.6 + 0.03 * (i % 4)])
    collection = collect(tmp_path)
    assert collection.options == ["optimizer", "optimizer.lr", "optimizer.momentum"]
    text = html(collection, tmp_path / "report")
    shown = "".join(Page(text).text)
    assert "A search over" in shown
    assert shown.count("val/acc of 6 members against optimizer") == 2
    assert "best by val/acc is sgd, lr=0.01778, momentum=0.3, 69.00 %" in shown


@pytest.mark.parametrize("members", [1, 15])
def test_folders_of_any_size(tmp_path: Path, members: int) -> None:
    """Of fifteen groups six are in colour and the others in grey."""
    for i in range(members):
        write_run(tmp_path / f"{i}", ["model=shallow"], val=[0.5 + i / 40])
        file = tmp_path / f"{i}/.hydra/config.yaml"
        cfg = OmegaConf.load(file)
        cfg.optimizer.lr = 0.001 * (1 + i)
        OmegaConf.save(cfg, file)
        result = json.loads((tmp_path / f"{i}/result.json").read_text())
        del result["sha256"]
        result["config_hash"] = config_hash(cfg)  # type: ignore[arg-type]
        (tmp_path / f"{i}/result.json").write_text(json.dumps(add_checksum(result)))
    collection = collect(tmp_path)
    found = Page(html(collection, tmp_path / "report"))
    shown = "".join(found.text)
    assert f"{members} completed" in shown
    assert len(set(found.values("a", "href"))) == members
    assert ("In colour the best 6, grey the other 9" in shown) == (members == 15)
    assert len(effect_panels(rank(collection))) == (members == 15)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf(tmp_path: Path, value: float) -> None:
    write_run(tmp_path / "a", val=[0.5, value])
    write_run(tmp_path / "b", ["backend=naive"], val=[0.5, 0.6])
    write_report(collect(tmp_path), tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/report.csv").read_text().splitlines()))
    assert [(row["backend"], row["n"]) for row in rows] == [("naive", "1"), ("native", "0")]


def test_pending_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"seed": [0, 1]}, {"seed=0": {"seed": 0}, "seed=1": {"seed": 1}})
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no completed member has val/acc yet (2 pending)" in done.stdout
    Page((tmp_path / "report/report.html").read_text())

"""A sweep's plan and its folder: names, what extends it, what it refuses; nothing is trained."""

import csv
import json
import re
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from run_folders import write_run

from cnntrain.commands.plan import plan
from cnntrain.config import ConfigError
from cnntrain.config.resume import seal
from cnntrain.sweeps.members import Planned, directory_name, name, planned, shown
from cnntrain.sweeps.progress import Progress, formatted
from cnntrain.sweeps.sweep import Outcome, Sweep, Sweeping

COMPARE = ["model=shallow,lenet5", "seed=0,1"]


def asked(*typed: str) -> Any:
    """What a command line with -m asks for."""
    return plan(get_args_parser().parse_intermixed_args(["-m", *typed]), "train")


def sweeping(folder: Path, *typed: str, **options: Any) -> Sweeping:
    found = asked(*typed)
    return Sweeping(folder, Sweep(**options), found.cfgs, found.varied)


class Launcher:
    """In a real one's place: each job is a record that says how it ended, or does nothing."""

    def __init__(self, of: Sweeping, *, failing: tuple[str, ...] = (), silent: bool = False):
        self.members = {member.name: member for member in of.pending}
        self.of, self.failing, self.silent, self.launched = of, failing, silent, list[str]()

    def __call__(self, jobs: list[list[str]], task: Any) -> None:
        for *_, directory in jobs:
            called = re.fullmatch(r"hydra\.sweep\.subdir='?([^']+)'?", directory)
            assert called is not None
            self.launched.append(called[1])
            if not self.silent:
                self.record(self.members[called[1]])

    def record(self, member: Planned) -> None:
        directory = self.of.folder.directory(member.name)
        failed = member.name in self.failing
        typed = [text for text in member.overrides if not text.startswith("seed=")]
        write_run(
            directory,
            typed,
            seed=member.config.seed,
            status="failed" if failed else "completed",
            error="OSError: no room" if failed else None,
        )
        content = json.loads((directory / "result.json").read_text())
        assert content["config_hash"] == member.config_hash


def run(folder: Path, *typed: str, **how: Any) -> tuple[Outcome, Launcher, list[str]]:
    """The sweep on a launcher of records; with what it said."""
    under_way = sweeping(folder, *typed)
    launcher, said = Launcher(under_way, **how), list[str]()
    return under_way.run(launcher, said.append), launcher, said


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sheet(folder: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(folder / "sweep.yaml"))


def names(typed: list[str]) -> list[str]:
    found = asked(*typed)
    return [member.name for member in planned(found.cfgs, found.varied)]


def test_names_whatever_the_order() -> None:
    typed = ["seed=1,0", "model=shallow,lenet5", "optimizer.lr=0.01"]
    found = {frozenset(names([*order])) for order in permutations(typed)}
    assert found == {
        frozenset(
            f"model={model},seed={seed}" for model in ("shallow", "lenet5") for seed in (0, 1)
        )
    }


def test_names_of_values() -> None:
    """As they are typed; one that means the same is the same member."""
    assert names(["optimizer.lr=1e-2,0.1"]) == ["optimizer.lr=0.01", "optimizer.lr=0.1"]
    assert names(["model.norm=true,false,True"]) == ["model.norm=true", "model.norm=false"]
    assert names(["trainer.gradient_clip_val=null,1.0"]) == [
        "trainer.gradient_clip_val=null",
        "trainer.gradient_clip_val=1.0",
    ]
    assert names(["model.channels=[6,16,120],[4,8,9]"])[0] == "model.channels=[6,16,120]"
    assert names(["optimizer.betas=[0.9,0.99],[0.8,0.9]"])[1] == "optimizer.betas=[0.8,0.9]"
    assert names(["seed=3"]) == ["seed=3"]
    assert names([]) == ["defaults"]
    assert shown({"a": [True, None], "b": "x"}) == "{a:[true,null],b:x}"


@pytest.mark.parametrize("value", ["a/b", "../up", "a b", "ä", "x" * 300, "a:b", "$HOME", "a'b\n"])
def test_odd_and_long_names_get_a_hash(value: str) -> None:
    called, other = directory_name(f"data.root={value}"), directory_name(f"data.root={value}_")
    assert re.fullmatch(r"data\.root=[A-Za-z0-9_.=-]*-[0-9a-f]{8}", called)
    assert len(called) <= 120
    assert called != other
    assert called == directory_name(f"data.root={value}")  # the same tomorrow
    assert name({"data.root": value, "seed": 0}) == name({"seed": 0, "data.root": value})


def test_members_that_are_the_same_run_are_one() -> None:
    assert names(["optimizer.lr=0.005,0.005,5e-3"]) == ["optimizer.lr=0.005"]
    asked_for = ["trainer.checkpoint_every_n_steps=5,7"]  # numbers no different, and yet both
    assert len(names(asked_for)) == 2


def test_the_sheet(tmp_path: Path) -> None:
    """sweep.yaml says what is compared before the first member starts."""
    under_way = sweeping(tmp_path / "s", *COMPARE, metric="test/loss")
    assert list(tmp_path.iterdir()) == []  # nothing before it runs
    seen: list[Any] = []
    under_way.run(lambda *_: seen.append(sheet(tmp_path / "s")), lambda _: None)
    (content,) = seen
    assert (content["name"], content["metric"], content["mode"]) == ("s", "test/loss", "min")
    assert content["over"] == {"model": ["shallow", "lenet5"], "seed": [0, 1]}
    members = content["members"]
    assert members["model=lenet5,seed=1"]["values"] == {"model": "lenet5", "seed": 1}
    assert len({member["config_hash"] for member in members.values()}) == 4
    assert [row["status"] for row in rows(tmp_path / "s")] == ["pending"] * 4


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    first, second = "model=shallow,seed=0", "model=shallow,seed=1"
    outcome, launcher, _ = run(tmp_path / "s", *COMPARE, failing=(second,))
    assert len(launcher.launched) == 4
    assert outcome.failed == {second: "OSError: no room"}
    assert [(r["directory"], r["status"], r["error"]) for r in rows(tmp_path / "s")][:2] == [
        (first, "completed", ""),
        (second, "failed", "OSError: no room"),
    ]
    again = sweeping(tmp_path / "s", *reversed(COMPARE))  # the other way round
    assert [member.name for member in again.pending] == [second]
    # A result that was edited is none; nor is one of another config.
    result = tmp_path / "s" / first / "result.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "epochs": 9}))
    assert {m.name for m in sweeping(tmp_path / "s", *COMPARE).pending} == {first, second}
    content.pop("sha256")
    result.write_text(json.dumps(seal({**content, "config_hash": "0" * 16})))
    assert {m.name for m in sweeping(tmp_path / "s", *COMPARE).pending} == {first, second}


def test_nothing_left_starts_no_launcher(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    (tmp_path / "s/sweep.csv").unlink()
    outcome, launcher, said = run(tmp_path / "s", *COMPARE)
    assert (launcher.launched, said, outcome.failed, outcome.unfinished) == ([], [], {}, [])
    assert [row["status"] for row in rows(tmp_path / "s")] == ["completed"] * 4


def test_more_values_extend_it(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    _, launcher, said = run(tmp_path / "s", "model=shallow,lenet5", "seed=2,1,0")
    assert launcher.launched == ["model=shallow,seed=2", "model=lenet5,seed=2"]
    assert [line[:6] for line in said] == ["[5/6] ", "[6/6] "]
    assert sheet(tmp_path / "s")["over"] == {"model": ["shallow", "lenet5"], "seed": [0, 1, 2]}
    # Fewer values are a part of it: the others stay in the record.
    _, launcher, _ = run(tmp_path / "s", "model=shallow", "seed=3,0")
    assert launcher.launched == ["model=shallow,seed=3"]
    assert len(rows(tmp_path / "s")) == 7


def test_another_axis_extends_it(tmp_path: Path) -> None:
    """Those that are completed keep their directories, and get the value that all had."""
    run(tmp_path / "s", *COMPARE)
    run(tmp_path / "s", "model=shallow", "seed=0", "backend=native,im2col")
    assert [row["backend"] for row in rows(tmp_path / "s")] == [*["native"] * 4, "im2col"]
    more = [*COMPARE, "backend=native,im2col", "optimizer.lr=0.005,0.02"]
    _, launcher, _ = run(tmp_path / "s", *more)
    assert len(launcher.launched) == 11
    found = rows(tmp_path / "s")
    assert list(found[0])[:5] == ["status", "model", "seed", "backend", "optimizer.lr"]
    assert len({tuple(row.values())[1:5] for row in found}) == 16
    assert found[0]["directory"] == "model=shallow,seed=0"
    assert (found[0]["backend"], found[0]["optimizer.lr"]) == ("native", "0.005")
    assert "backend=im2col,model=shallow,optimizer.lr=0.02,seed=1" in {
        row["directory"] for row in found
    }
    _, launcher, _ = run(tmp_path / "s", *more)
    assert launcher.launched == []


def test_another_base_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE, "data.crop=1")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", *COMPARE, "seed=5,6", "optimizer=sgd", "trainer.max_epochs=3")
    said = [problem.partition("; ")[0] for problem in caught.value.problems]
    assert "data.crop=0: the sweep 's' was begun with 1" in said
    assert "trainer.max_epochs=3: the sweep 's' was begun with 10" in said
    assert any(line.startswith("optimizer._target_=torch.optim.SGD: ") for line in said)
    assert all("sweep=<name>" in problem for problem in caught.value.problems)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_belongs_to_a_choice_is_another_member(tmp_path: Path) -> None:
    run(tmp_path / "s", "backend=native,im2col")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", "backend=im2col", "+backend.max_column_mib=2")
    said = "backend=im2col: was begun with backend.max_column_mib=null, and now it is 2;"
    assert caught.value.problems[0].startswith(said)


@pytest.mark.parametrize("option", ["+trainer.limit_train_batches=3", "+optimizer.amsgrad=true"])
def test_an_option_that_came_or_went_is_another_base(tmp_path: Path, option: str) -> None:
    """Also where no member is one of before."""
    run(tmp_path / "without", *COMPARE)
    key, value = option.strip("+").split("=")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "without", "model=shallow,lenet5", "seed=7", option)
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key}={value}: the sweep 'without' was begun without it"
    ]
    run(tmp_path / "with", *COMPARE, option)
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "with", "model=shallow,lenet5", "seed=7")
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key} (left out): the sweep 'with' was begun with {value}"
    ]


def test_what_varies_with_a_choice_is_no_base(tmp_path: Path) -> None:
    """A choice brings options of its own, an experiment those of anything."""
    for called, epochs in {"short": 2, "long": 20, "augmented": 20}.items():
        recipe = f"# @package _global_\ntrainer:\n  max_epochs: {epochs}\n"
        recipe += "data:\n  crop: 2\n" if called == "augmented" else ""
        recipe += "  limit_train_batches: 3\n" if called == "short" else ""
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / f"experiment/{called}.yaml").write_text(recipe)
    mine = ["--config-dir", str(tmp_path)]

    def pending(*typed: str) -> int:
        under_way = sweeping(tmp_path / "s", *mine, *typed)
        under_way.folder.write(**under_way.options.facts)
        return len(under_way.pending)

    assert pending("experiment=short", "optimizer=adam,sgd") == 2
    assert pending("experiment=short,long", "optimizer=sgd", "seed=0,1") == 4
    assert pending("experiment=long", "optimizer=adamw", "seed=0") == 1
    assert pending("experiment=short", "optimizer=adamw", "seed=3") == 1
    assert pending("experiment=augmented", "optimizer=sgd", "seed=0") == 1
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=0\.1: the sweep 's' was begun"):
        pending("experiment=short", "optimizer=adamw", "loss.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"data\.crop=1: the sweep 's' was begun without it"):
        pending("experiment=short", "optimizer=adamw", "seed=4", "data.crop=1")


def test_where_experiments_vary_what_was_typed_is_the_base(tmp_path: Path) -> None:
    """What a new one of them sets is its own, whatever those before it left as it was."""
    for called, crop in {"plain": 0, "light": 1, "heavy": 2}.items():
        (tmp_path / "experiment").mkdir(exist_ok=True)
        recipe = f"# @package _global_\ndata:\n  crop: {crop}\n"
        (tmp_path / f"experiment/{called}.yaml").write_text(recipe)
    mine = ["--config-dir", str(tmp_path), "data=fashion_mnist_mini", "loss.label_smoothing=0.1"]
    run(tmp_path / "s", *mine, "experiment=plain", "seed=0,1")
    for called in ("plain,light", "heavy"):
        _, launcher, _ = run(tmp_path / "s", *mine, f"experiment={called}", "seed=0")
        assert len(launcher.launched) == 1
    assert [row["experiment"] for row in rows(tmp_path / "s")] == ["plain"] * 2 + ["light", "heavy"]
    folder, another, typed = mine[:2], ["experiment=light", "seed=7"], mine[2:]
    for changed, said in {
        ("data=fashion_mnist", typed[1]): "data=fashion_mnist: {} with fashion_mnist_mini",
        (typed[0], "loss.label_smoothing=0.2"): "loss.label_smoothing=0.2: {} with 0.1",
        (typed[0],): "loss.label_smoothing=0.0: {} with 0.1",
        (*typed, "data.crop=2"): "data.crop=2: {} without it",
    }.items():
        with pytest.raises(ConfigError) as caught:
            sweeping(tmp_path / "s", *folder, *another, *changed)
        (problem,) = caught.value.problems
        assert problem.startswith(said.format("the sweep 's' was begun") + "; ")
    assert len(sweeping(tmp_path / "s", *mine, *another, "optimizer=adam").pending) == 1


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    _, launcher, _ = run(tmp_path / "s", *COMPARE, "trainer.checkpoint_every_n_steps=5")
    assert launcher.launched == []


def test_a_launcher_that_breaks(tmp_path: Path) -> None:
    """What has begun and said nothing is recorded; what has not begun is unfinished."""
    under_way = sweeping(tmp_path / "s", *COMPARE)
    begun = tmp_path / "s/model=shallow,seed=0"

    def launch(jobs: Any, task: Any) -> None:
        begun.mkdir()
        raise RuntimeError("the cluster\nis gone")

    said: list[str] = []
    outcome = under_way.run(launch, said.append)
    reason = "RuntimeError: the cluster is gone"
    assert said[0] == f"the launcher failed: {reason}"
    assert outcome.failed == {begun.name: reason}
    assert len(outcome.unfinished) == 3
    assert [row["status"] for row in rows(tmp_path / "s")] == ["failed", *["pending"] * 3]


def test_a_line_for_each_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, 40.0, 50.0, 60.0])
    progress = Progress(
        tmp_path, "val/loss", 12, 3, said.append, ended=lambda *_: None, while_waiting=lambda: None
    )
    progress.started = next(clock)
    monkeypatch.setattr("cnntrain.sweeps.progress.time.monotonic", lambda: next(clock))
    progress.waiting |= dict.fromkeys("abcd")
    for called, status in {"a": "completed", "b": "failed", "c": "interrupted"}.items():
        write_run(tmp_path / called, status=status, error="OSError: no room", seconds=7.4)
        progress.look()
        progress.look()  # once each
    assert said[0] == "[ 4/12] a: val/loss 0.2000, 7 s; 0:05:20 left"
    assert re.fullmatch(
        r"\[ 5/12\] b: failed: OSError: no room \(.*b/train\.log\); 0:02:55 left", said[1]
    )
    assert said[2:] == ["[ 5/12] c: interrupted after 3 epochs"]
    assert list(progress.waiting) == ["c", "d"]
    shutil.rmtree(tmp_path / "c")
    write_run(tmp_path / "c", seconds=7.4)  # started again, as by a cluster that had preempted it
    progress.look()
    assert said[3] == "[ 6/12] c: val/loss 0.2000, 7 s; 0:02:00 left"
    assert list(progress.waiting) == ["d"]
    assert formatted("val/acc", 0.912) == "91.20%"

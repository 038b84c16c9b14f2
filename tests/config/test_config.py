"""Mistakes in a config: found all at once, named, with a way out, before anything is written."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cnntrain.config import CONF, NODES, ConfigError, compose, config_hash
from cnntrain.config.overrides import combinations, quoted

MISTAKES = [
    (["model.dropuot=0.1"], ["model.dropuot=0.1: model has no option 'dropuot'", "'dropout'"]),
    (["+optimizer.learning_rate=1"], ["learning_rate", "torch.optim.Adam has no option", "lr"]),
    (["data.batch_size=-1"], ["data.batch_size=-1: input should be greater than 0"]),
    (["data.batch_size=many"], ["data.batch_size=many: input should be a valid integer"]),
    (["data.batch_size=1.5"], ["data.batch_size=1.5: input should be a valid integer"]),
    (["backend=im2coll"], ["backend=im2coll", "did you mean 'im2col'", "im2col, naive, native"]),
    (["bakend=im2col"], ["bakend=im2col", "did you mean 'backend'"]),
    (["optimiser.lr=1"], ["optimiser.lr=1", "did you mean 'optimizer.lr'"]),
    (["model=shallow", "model.dropout=0.1"], ["model.dropout=0.1: model has no option 'dropout'"]),
    (["optimizer.amsgrad=true"], ["torch.optim.Adam are added with +optimizer.amsgrad=true"]),
    (["model.activation=rel"], ["model.activation=rel: input should be 'relu', 'leaky_relu'"]),
    (["model.channels=[6,16]"], ["model.channels=[6, 16]: has too few values"]),
    (["model.dropout=1"], ["model.dropout=1: input should be less than 1"]),
    (["optimizer.lr=fast"], ["optimizer.lr=fast: input should be a valid number"]),
    (["loss.label_smoothing=2"], ["loss.label_smoothing=2: input should be less than or equal"]),
    (["data.hflip=1.5"], ["data.hflip=1.5: input should be less than or equal to 1"]),
    (["trainer.max_epochs=0"], ["trainer.max_epochs=0: input should be greater than 0"]),
    (["trainer.precision=8"], ["trainer.precision=8: input should be 32,"]),
    (["trainer.monitor=val/f1"], ["trainer.monitor=val/f1: input should be 'val/acc'"]),
    (["trainer=cpu", "trainer.precision=16-mixed"], ["float16 trains only on a GPU", "bf16-mixed"]),
    (
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1"],
        ["trainer.gradient_clip_val=1", "optimizer.fused=false"],
    ),
    (["seed=-1"], ["seed=-1: must be a whole number from 0"]),
    (["seed=true"], ["seed=true: must be a whole number"]),
    (["optimizer._target_=os.system"], ["os.system: must be a class derived from torch.optim"]),
    (["backend._target_=torch.nn.Linear"], ["must be a class derived from torch.nn.Conv2d"]),
    (["backend._target_=nowhere.Conv"], ["nowhere.Conv: cannot be imported"]),
    (["backend._target_=torch.nn.Conv9d"], ["torch.nn.Conv9d: cannot be imported"]),
    (["+model.conv.x._target_=os.system"], ["a _target_ may stand only in backend, model"]),
    (["+model.num_classes=7"], ["model.num_classes=7: is decided by the program"]),
    (["backend._partial_=false"], ["backend._partial_=False: must be true"]),
    (["model.hidden="], ["model.hidden"]),
    (["scheduler=null"], ["scheduler=null: must name a choice of scheduler"]),
    (["backend=3"], ["backend=3: must name a choice of backend"]),
    (["+backend=naive"], ["+backend=naive: has a choice already; write backend=naive"]),
    (["~seed"], ["seed=null: must be a whole number"]),
    (["seed=0,1"], ["seed=0,1: a sweep needs -m"]),
    (["hydra.rum.dir=x"], ["hydra.rum.dir=x: Hydra rejects it"]),
    (["+backend.kernel_size=3"], ["backend.kernel_size=3: is decided by the program"]),
    (["+trainer.max_steps=3"], ["trainer.max_steps=3: is decided by the program"]),
    (["+trainer.limit_val_batches=0"], ["trainer.limit_val_batches=0: a run has to validate"]),
    (["model.hidden=[1"], ["model.hidden=[1: cannot be read"]),
    (["experiment=strokes", "data.batch_size=0"], ["data.batch_size=0: input should be greater"]),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=lambda value: " ".join(value))
def test_mistake_is_named_with_a_way_out(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert len(caught.value.problems) == 1
    assert all(part in caught.value.problems[0] for part in said), caught.value.problems
    assert "\n" not in caught.value.problems[0]


def test_all_mistakes_at_once() -> None:
    overrides = [
        "backend=im2coll",
        "model.dropuot=0.1",
        "bakend=naive",
    ]
    types = ["+optimizer.learning_rate=1", "data.batch_size=-1", "seed=-3"]
    for given, found in ([*overrides, *types], overrides), (types, types):
        with pytest.raises(ConfigError) as caught:
            compose(given)
        named = [problem.split(":")[0] for problem in caught.value.problems]
        assert sorted(named) == sorted(o.lstrip("+") for o in found)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("model/lenet5.yaml", "dropout:", "dropuot:", "model.dropuot=0.3: cnntrain.models.LeNet5"),
        ("data/fashion_mnist_mini.yaml", "\nbatch_size: ", "\nbatch_size: x", "data.batch_size=x"),
        ("train.yaml", "seed:", "sede:", "sede: there is no option 'sede'; did you mean 'seed'"),
        ("model/lenet5.yaml", "hidden: 84", "hidden: [84", "lenet5.yaml"),
    ],
)
def test_mistake_in_a_file(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    for path in CONF.rglob("*.yaml"):
        copy = tmp_path / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        if path == CONF / file:
            assert old in text
            text = text.replace(old, new)
        copy.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["data=fashion_mnist_mini"], folder=tmp_path)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_no_mistake_in_what_ships() -> None:
    nodes = [n for n in NODES if n.partition(".")[0] not in ("search", "sweep")]  # tested elsewhere
    groups = {group: [f.stem for f in (CONF / group).glob("*.yaml")] for group in nodes}
    groups["experiment"] = [f.stem for f in (CONF / "experiment").glob("*.yaml")]
    groups.pop("loss")
    assert all(groups.values())
    for group, choices in groups.items():
        for choice in choices:
            if (group, choice) != ("trainer", "gpu"):
                assert compose([f"{group}={choice}"]).seed == 0


def test_options_reach_the_config() -> None:
    cfg = compose(["seed=0", "model.channels=[4,8,16]", "+trainer.limit_train_batches=0.5"])
    assert (cfg.seed, list(cfg.model.channels), cfg.trainer.limit_train_batches) == (
        0,
        [4, 8, 16],
        0.5,
    )


def test_hash_is_of_the_content() -> None:
    same = compose(["seed=1", "model.dropout=0.1"]), compose(["model.dropout=0.1", "seed=1"])
    assert config_hash(same[0]) == config_hash(same[1])
    assert config_hash(same[0]) != config_hash(compose(["seed=2", "model.dropout=0.1"]))


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["model.dropuot=0.1"]])
def test_answers_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch imported:', 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (2 if "model.dropuot=0.1" in arguments else 0), done.stderr
    assert "torch imported: False" in done.stdout
    assert ("im2col" in done.stdout) or ("_target_" in done.stdout) or ("dropout" in done.stderr)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_command_line_refuses_with_exit_code_2(cnntrain: Run, tmp_path: Path) -> None:
    done = cnntrain("backend=im2coll", "model.dropuot=0.1")
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "cnntrain: invalid configuration"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "backend=im2coll",
        "model.dropuot=0.1",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_model_has_to_take_what_the_program_gives(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/line.yaml").write_text("_target_: torch.nn.Linear\nbias: true\n")
    with pytest.raises(ConfigError, match=r"must take the parameters conv, in_shape, num_classes$"):
        compose(["model=line"], extra=tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/odd.yaml").write_bytes(b"_target_: \xff\n")
    with pytest.raises(ConfigError, match=r"^model=odd: "):
        compose(["model=odd"], extra=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-dir", "nowhere"], "--config-dir=nowhere: is not a folder"),
        (["--resolve"], "--resolve: requires --cfg"),
        (["hydra.run.dir="], "hydra.run.dir=: must name a folder"),
        (["hydra.run.dir=a file/run"], "a file is not a writable folder"),
    ],
)
def test_hydra_s_own_arguments(
    cnntrain: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "a file").write_text("")
    done = cnntrain(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_combinations_of_a_sweep() -> None:
    overrides = [
        "backend=glob(n*)",
        "seed=range(0,3)",
        "model.dropout=0.1",
        "model.channels=[1,2,3]",
    ]
    found = combinations(overrides, CONF)
    assert len(found) == 2 * 3
    assert found[0] == ["backend=naive", "seed=0", "model.dropout=0.1", "model.channels=[1,2,3]"]
    assert found[-1][:2] == ["backend=native", "seed=2"]


def test_sweep_is_checked_before_it_starts(cnntrain: Run, tmp_path: Path) -> None:
    done = cnntrain("backend=native,im2coll", "-m", "model.dropout=0.1,2")
    assert done.returncode == 2
    assert "backend=im2coll" in done.stderr
    assert "model.dropout=2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_quoted_is_read_as_it_was() -> None:
    parser = OverridesParser.create()
    for parts in itertools.product(["", "a", "\\", "'", "${", '"'], repeat=4):
        text = "".join(parts) + "}"
        read = parser.parse_override(f"run={quoted(text)}").value()
        assert OmegaConf.create({"run": read}).run == text

"""Invalid configs: all problems are reported at once, before anything is written."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Reject
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
    (["seed=-1"], ["seed=-1: input should be greater than or equal to 0"]),
    (["seed=true"], ["seed=true: input should be a valid integer"]),
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
    (["~seed"], ["seed: missing"]),
    (["seed=0,1"], ["seed=0,1: a sweep needs -m"]),
    (["hydra.rum.dir=x"], ["hydra.rum.dir=x: Hydra rejects it"]),
    (["+backend.kernel_size=3"], ["backend.kernel_size=3: is decided by the program"]),
    (["+trainer.max_steps=3"], ["trainer.max_steps=3: is decided by the program"]),
    (["+trainer.limit_val_batches=0"], ["trainer.limit_val_batches=0: every run has a val pass"]),
    (["model.hidden=[1"], ["model.hidden=[1: cannot be read"]),
    (["experiment=strokes", "data.batch_size=0"], ["data.batch_size=0: input should be greater"]),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=lambda value: " ".join(value))
def test_message_names_option_and_alternative(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert len(caught.value.problems) == 1
    assert all(part in caught.value.problems[0] for part in expected), caught.value.problems
    assert "\n" not in caught.value.problems[0]


def test_all_problems_at_once() -> None:
    overrides = [
        "backend=im2coll",
        "model.dropuot=0.1",
        "bakend=naive",
    ]
    types = ["+optimizer.learning_rate=1", "data.batch_size=-1", "seed=-3"]
    for given, found in ([*overrides, *types], overrides), (types, types):
        with pytest.raises(ConfigError) as caught:
            compose(given)
        options = [problem.split(":")[0] for problem in caught.value.problems]
        assert sorted(options) == sorted(o.lstrip("+") for o in found)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("model/lenet5.yaml", "dropout:", "dropuot:", "model.dropuot=0.3: cnntrain.models.LeNet5"),
        ("data/fashion_mnist_mini.yaml", "\nbatch_size: ", "\nbatch_size: x", "data.batch_size=x"),
        ("train.yaml", "seed:", "sede:", "sede: there is no option 'sede'; did you mean 'seed'"),
        ("model/lenet5.yaml", "hidden: 84", "hidden: [84", "lenet5.yaml"),
    ],
)
def test_problem_in_a_file(tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
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
    assert expected in caught.value.problems[0]


def test_shipped_choices_are_valid() -> None:
    nodes = [
        n for n in NODES if n.partition(".")[0] not in ("search", "sweep")
    ]  # tested in tests/sweeps
    groups = {group: [f.stem for f in (CONF / group).glob("*.yaml")] for group in nodes}
    groups["experiment"] = [f.stem for f in (CONF / "experiment").glob("*.yaml")]
    groups.pop("loss")
    assert all(groups.values())
    given = {"arrays": ["data.root=a.npz"], "torchvision": ["data.name=MNIST"]}
    given["image_folder"] = ["data.root=photos"]
    for group, choices in groups.items():
        for choice in choices:
            if (group, choice) != ("trainer", "gpu"):
                required = given.get(choice, []) if group == "data" else []
                assert compose([f"{group}={choice}", *required]).seed == 0


def test_option_that_has_to_be_given() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["data=image_folder"])
    assert caught.value.problems == ["data: data.root has to be given, data.root=..."]


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


def test_no_torch_is_imported(tmp_path: Path) -> None:
    """By --help, by --cfg and for unknown options."""
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "for arguments in (['--help'], ['--cfg', 'job'], ['model.dropuot=0.1']):\n"
        "    sys.argv = ['train.py', *arguments]\n"
        "    try:\n"
        f"        runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "    finally:\n"
        "        print('torch imported:', 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("torch imported: False") == 3
    assert "im2col, naive, native" in done.stdout
    assert "_target_: cnntrain.models.LeNet5" in done.stdout
    assert "did you mean 'dropout'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_command_line_with_two_problems(reject: Reject) -> None:
    options = [line.split(":")[0].strip() for line in reject("backend=im2coll", "model.dropuot=0")]
    assert options == ["backend=im2coll", "model.dropuot=0"]


def test_model_without_required_parameters(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/line.yaml").write_text("_target_: torch.nn.Linear\nbias: true\n")
    with pytest.raises(ConfigError, match=r"must take the parameters conv, in_shape, num_classes$"):
        compose(["model=line"], extra=tmp_path)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/odd.yaml").write_bytes(b"_target_: \xff\n")
    with pytest.raises(ConfigError, match=r"^model=odd: "):
        compose(["model=odd"], extra=tmp_path)


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


def test_sweep_is_checked_before_it_starts(reject: Reject) -> None:
    problems = "\n".join(reject("backend=native,im2coll", "-m", "model.dropout=0.1,2"))
    assert "backend=im2coll" in problems
    assert "model.dropout=2" in problems


def test_quoted_text_is_parsed_unchanged() -> None:
    parser = OverridesParser.create()
    for parts in itertools.product(["", "a", "\\", "'", "${", '"'], repeat=4):
        text = "".join(parts) + "}"
        read = parser.parse_override(f"run={quoted(text)}").value()
        assert OmegaConf.create({"run": read}).run == text

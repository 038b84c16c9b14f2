"""Sweeps for tests as processes, in their own process group, and their records."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT
from forked import Command
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import backend_context, get_experiment, list_session_groups
from tensorboard.plugins.hparams.api_pb2 import (
    GetExperimentRequest,
    ListSessionGroupsRequest,
    Status,
)

from cnntrain.config.resume import read_result


def start(folder: Path, *typed: str, **environment: str) -> subprocess.Popen[str]:
    """`python train.py -m ...` in a folder."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *typed],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would what the tests start in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def end(process: subprocess.Popen[str] | Command, code: int = 0) -> list[str]:
    """Wait for the end, with this exit code and no traceback; returns the printed lines but the
    first."""
    try:
        printed, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, printed + errors
    assert "Traceback" not in printed + errors
    first, *lines = printed.splitlines()
    assert first == "sweep: checking the config of every run"
    return lines


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """sweep.csv by the members' directories."""
    with (folder / "sweep.csv").open(newline="") as file:
        return {row["directory"]: row for row in csv.DictReader(file)}


def numbers(folder: Path) -> dict[str, dict[str, str]]:
    """sweep.csv without the seconds."""
    return {name: {**row, "seconds": ""} for name, row in rows(folder).items()}


def completed(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the result.json of each completed member."""
    return {
        file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in folder.glob("*/result.json")
        if (read_result(file.parent) or {}).get("status") == "completed"
    }


def hparams(folder: Path) -> tuple[dict[str, int], list[str], dict[str, dict[str, Any]]]:
    """TensorBoard's HParams tab: the columns' types, metrics, and the values of each member."""
    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    asked = RequestContext()
    experiment = get_experiment.Handler(asked, context, "", GetExperimentRequest()).run()
    metrics = [info.name.tag for info in experiment.metric_infos]
    request = ListSessionGroupsRequest(
        slice_size=100, include_metrics=True, allowed_statuses=[Status.Value("STATUS_SUCCESS")]
    )
    for info in experiment.hparam_infos:  # each column filtered as the tab does by itself
        column = request.col_params.add()
        column.hparam = info.name
        if info.HasField("domain_discrete"):
            column.filter_discrete.CopyFrom(info.domain_discrete)
        elif info.HasField("domain_interval"):
            column.filter_interval.CopyFrom(info.domain_interval)
    for tag in metrics:
        request.col_params.add().metric.tag = tag
    groups = list_session_groups.Handler(asked, context, "", request).run().session_groups
    members = {}
    for group in groups:
        values = {info.name: group.hparams[info.name] for info in experiment.hparam_infos}
        (session,) = group.sessions
        members[session.name] = {
            **{key: getattr(v, v.WhichOneof("kind")) for key, v in values.items()},
            **{metric.name.tag: metric.value for metric in group.metric_values},
        }
    return {info.name: info.type for info in experiment.hparam_infos}, metrics, members

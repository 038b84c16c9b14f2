"""A search under way: rounds of trials, each a member of the sweep's folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config.resume import read_result, result_with_status
from cnntrain.sweeps.findings import summary
from cnntrain.sweeps.folder import SweepFolder
from cnntrain.sweeps.hparams import write_schema
from cnntrain.sweeps.members import Planned, Run, directory_name
from cnntrain.sweeps.study import Study, replaced
from cnntrain.sweeps.sweep import Launch, Outcome, Say, Sweep

Compose = Callable[[Sequence[str]], DictConfig]


class Searching:
    """The trials of a search in the sweep's folder.

    `node` is the config's node `search`, checked; `base` are the overrides that all trials share,
    `command` writes the command line of a run with given overrides,
    and `compose` makes the checked config, with `hydra` in it, of further ones. Making one writes
    nothing. Raises ConfigError if the folder is damaged or no search's.
    """

    def __init__(
        self,
        folder: Path,
        options: Sweep,
        node: DictConfig,
        *,
        seed: int,
        base: Sequence[str],
        command: Callable[[Sequence[str]], str],
        compose: Compose,
        at_once: int,
    ):
        self.folder, self.options, self.node = SweepFolder(folder, search=True), options, node
        self.seed, self.base, self.compose, self.at_once = seed, base, compose, at_once
        self.command = command

    def run(self, launch: Launch, say: Say) -> tuple[Outcome, list[str]]:
        """Run trials until there are as many as wanted; how it ended, and lines on what was found.

        Raises ConfigError if another process runs the same search or it was begun as another one,
        and Interrupted when a signal has asked to stop and the trials at work have saved.
        """
        with self.folder.locked():
            study = Study(self.folder.path, self.node, seed=self.seed)
            space = study.search.space
            columns = {d.option: d.corners for d in space.dimensions}
            write_schema(self.folder.path, columns)
            known = study.study.get_trials(deepcopy=False)
            done = sum(trial.state.is_finished() for trial in known)
            total = max(study.search.trials, len(known) - len(replaced(known)))
            outcome = Outcome(self.folder, self.options, columns, total, done, say)
            settings: Any = OmegaConf.to_container(self.node, resolve=True)
            while asked := study.ask(self.at_once):
                trials = [
                    Planned(
                        directory_name(trial.name),
                        Run.of(self.compose([*self.base, *trial.overrides])),
                        trial.values,
                        trial.number,
                    )
                    for trial in asked
                ]
                members = self.folder.extend(trials, list(columns))
                self.folder.write(**self.options.facts, search=settings)
                outcome.add(members)
                outcome.run([m for m in members if not self._ended(m)], launch)
                results = {m.trial: read_result(self.folder.directory(m.name)) for m in members}
                study.tell({number: r for number, r in results.items() if number is not None})
                if self.options.fail_fast and outcome.failed:
                    break
            outcome.write()
            return outcome, summary(study, lambda own: self.command([*self.base, *own]))

    def _ended(self, member: Planned) -> bool:
        directory = self.folder.directory(member.name)
        return (
            result_with_status(directory, member.config_hash, ("completed", "pruned")) is not None
        )

"""What a search has found."""

from collections.abc import Callable, Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from cnntrain.sweeps.journal import quietly
from cnntrain.sweeps.study import Study, replaced

ENOUGH = 20  # completed trials to tell from them which options matter


def summary(search: Study, command: Callable[[Sequence[str]], str]) -> list[str]:
    """Lines for the end of a search: counts, the best trial, the command for it, what mattered.

    `command` writes the command line of a trial with its own overrides.
    """
    trials = search.study.get_trials(deepcopy=False)
    trials = [trial for trial in trials if trial.number not in replaced(trials)]
    states = [trial.state for trial in trials]
    names = {
        "completed": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    counts = ", ".join(f"{states.count(state)} {name}" for name, state in names.items())
    asked = search.search.trials
    size = f"{len(trials)} of {asked} trials"
    if len(trials) > asked:
        size = f"{len(trials)} trials, more than search.trials={asked}"
    lines = [f"search       {size}: {counts}"]
    if TrialState.COMPLETE not in states:
        return lines
    best, metric = search.study.best_trial, search.search.metric
    trial = search.asked_for(best)
    shown = f"{best.value:.2%}" if metric.endswith("acc") else f"{best.value:.4f}"
    lines.append(f"best trial   {trial.name.partition(',')[0]}, {metric} {shown}")
    lines.append(f"             {command(trial.overrides)}")
    if states.count(TrialState.COMPLETE) >= ENOUGH and len(best.params) > 1:
        shares = importances(search.study)
        lines.append("importance   " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return lines


def importances(study: optuna.Study) -> dict[str, float]:
    """Each option's share in what sets the best quarter apart (PED-ANOVA, arXiv:2304.10255).

    Of the options that every completed trial has, the most important first.
    """
    with quietly():
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        common = [o for o in completed[0].params if all(o in t.params for t in completed)]
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=common)

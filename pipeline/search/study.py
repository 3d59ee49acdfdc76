"""Choice of the next trial, and of the trials to stop early. Optuna does both, in memory.

Each choice depends on the trials so far and on the number of the trial only, so a search that was killed goes on as it
would have. Nothing of Optuna is stored.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from pipeline.config import SearchedConfig
from pipeline.search.trials import TrialRecord

_ATTEMPTS = 50
_RATE = "learning_rate"
_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Trials by the tree-structured Parzen estimator, stopped by asynchronous successive halving.

    Sources: Bergstra et al. 2011 (TPE), Li et al. 2020 (successive halving). After 1, 2, 4 … epochs, a trial goes on if
    it is in the better half of the trials that got there. The first trial is never stopped.
    """

    def __init__(
        self, config: SearchedConfig, known: Sequence[TrialRecord], key_of: Callable[[float, dict[str, Any]], str]
    ) -> None:
        """Start a study with what is known.

        Args:
            config: What is searched.
            known: Trials of an earlier, interrupted search, from number 0 on.
            key_of: Key of the training with a learning rate and other values.
        """
        self._config, self._key_of = config, key_of
        low, high = config.rates
        own = config.train.learning_rate
        self._rates = FloatDistribution(min(low, own), max(high, own), log=True)
        self._choices = {name: tuple(map(json.dumps, values)) for name, values in config.choices.items()}
        self._study = optuna.create_study(
            direction="maximize", pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        )
        self._running: dict[int, optuna.Trial] = {}
        self._keys: set[str] = set()
        self._next = 0
        self._lock = threading.Lock()
        for trial in known:
            self._add(trial)

    def ask(self) -> TrialRecord | None:
        """Next trial. None if every combination of the values has been tried."""
        with self._lock:
            number = self._next
            for attempt in range(_ATTEMPTS):
                self._study.sampler = optuna.samplers.TPESampler(
                    seed=(self._config.train.seed * 1_000_003 + number * 101 + attempt) % 2**32,
                    n_startup_trials=max(4, self._config.search.trials // 3),
                )
                if number == 0:
                    own = self._config.own_values
                    self._study.enqueue_trial(
                        {_RATE: self._config.train.learning_rate}
                        | {name: json.dumps(own[name]) for name in self._choices}
                    )
                asked = self._study.ask()
                rate, values = self._suggest(asked)
                key = self._key_of(rate, values)
                if key not in self._keys:
                    self._keys.add(key)
                    self._running[number] = asked
                    self._next += 1
                    return TrialRecord(number=number, key=key, learning_rate=rate, values=values)
                self._study.tell(asked, state=TrialState.FAIL)
            return None

    def should_stop(self, trial: TrialRecord) -> bool:
        """Whether other trials were better after as many epochs."""
        with self._lock:
            asked = self._running[trial.number]
            known = len(self._study.trials[asked.number].intermediate_values)
            for epoch, score in list(enumerate(trial.scores, start=1))[known:]:
                asked.report(score, epoch)
            return trial.number > 0 and asked.should_prune()

    def tell(self, trial: TrialRecord) -> None:
        """End a trial."""
        with self._lock:
            state = _STATES[trial.state]
            self._study.tell(
                self._running.pop(trial.number), trial.score if state == TrialState.COMPLETE else None, state
            )

    def _add(self, trial: TrialRecord) -> None:
        """Take over a trial of an earlier search. One that was interrupted is running again."""
        rate = min(max(trial.learning_rate, self._rates.low), self._rates.high)
        params = {_RATE: rate} | {name: json.dumps(value) for name, value in trial.values.items()}
        self._keys.add(trial.key)
        self._next = trial.number + 1
        self._study.enqueue_trial(params)
        asked = self._study.ask()
        self._suggest(asked)
        self._running[trial.number] = asked
        # Replayed, because the pruner remembers what it was asked.
        for epoch in range(len(trial.scores) - (trial.state == "finished")):
            self.should_stop(trial.changed(scores=trial.scores[: epoch + 1]))
        if trial.state != "running":
            self.tell(trial)

    def _suggest(self, asked: optuna.Trial) -> tuple[float, dict[str, Any]]:
        """Learning rate and other values of a trial."""
        rate = float(f"{asked.suggest_float(_RATE, self._rates.low, self._rates.high, log=True):.3g}")
        values = {
            name: json.loads(str(asked.suggest_categorical(name, choices))) for name, choices in self._choices.items()
        }
        return min(max(rate, self._rates.low), self._rates.high), values

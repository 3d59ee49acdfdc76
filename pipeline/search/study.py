"""Choice of the next trial, and of the trials to stop early. Optuna does both, in memory.

Each choice depends on the trials so far and on the number of the trial only, so a search that was killed goes on as it
would have. Nothing of Optuna is stored.
"""

from __future__ import annotations

import itertools
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
        self._rates = FloatDistribution(*config.rates, log=True)
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
            for attempt in range(_ATTEMPTS):
                asked = self._draw(attempt)
                trial = self._record(asked)
                if trial.key not in self._keys:
                    self._keys.add(trial.key)
                    self._running[trial.number] = asked
                    self._next += 1
                    return trial
                self._study.tell(asked, state=TrialState.FAIL)
            return None

    def _draw(self, attempt: int) -> optuna.Trial:
        """The suggestion for the next trial. Later attempts draw at random, the last one what is not tried yet."""
        seed = (self._config.train.seed * 1_000_003 + self._next * 101 + attempt) % 2**32
        if attempt < _ATTEMPTS // 5:
            startup = max(4, self._config.search.trials // 3)
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        else:
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        own = self._config.own_values
        if self._next == 0:
            self._enqueue(self._config.train.learning_rate, {name: own[name] for name in self._choices})
        elif attempt == _ATTEMPTS - 1 and self._rates.single():
            rate = self._config.train.learning_rate
            for texts in itertools.product(*self._choices.values()):
                values = {name: json.loads(text) for name, text in zip(self._choices, texts, strict=True)}
                if self._key_of(rate, values) not in self._keys:
                    self._enqueue(rate, values)
                    break
        return self._study.ask()

    def _enqueue(self, rate: float, values: dict[str, Any]) -> None:
        params = {_RATE: rate} | {name: json.dumps(value) for name, value in values.items()}
        self._study.enqueue_trial(params)

    def _record(self, asked: optuna.Trial) -> TrialRecord:
        """The trial that Optuna suggests. Only the configured learning rate is not rounded."""
        drawn = asked.suggest_float(_RATE, self._rates.low, self._rates.high, log=True)
        rate = min(max(float(f"{drawn:.3g}"), self._rates.low), self._rates.high)
        own = self._config.train.learning_rate
        values = {
            name: json.loads(str(asked.suggest_categorical(name, choices))) for name, choices in self._choices.items()
        }
        rate = own if drawn == own else rate
        return TrialRecord(
            number=self._next, key=self._key_of(rate, values), learning_rate=rate, drawn_rate=drawn, values=values
        )

    def should_stop(self, trial: TrialRecord) -> bool:
        """Whether other trials were better after as many epochs. To be asked after every epoch, also after the last."""
        with self._lock:
            asked = self._running[trial.number]
            known = len(self._study.trials[asked.number].intermediate_values)
            behind = False
            for epoch, score in list(enumerate(trial.scores, start=1))[known:]:
                asked.report(score, epoch)
                behind = asked.should_prune()  # which also remembers the score, for later trials
            return behind and trial.number > 0

    def tell(self, trial: TrialRecord) -> None:
        """End a trial."""
        with self._lock:
            state = _STATES[trial.state]
            self._study.tell(
                self._running.pop(trial.number), trial.score if state == TrialState.COMPLETE else None, state
            )

    def _add(self, trial: TrialRecord) -> None:
        """Take over a trial of an earlier search. One that was interrupted is running again."""
        self._enqueue(trial.drawn_rate, trial.values)
        asked = self._study.ask()
        self._record(asked)
        self._keys.add(trial.key)
        self._running[trial.number] = asked
        self._next = trial.number + 1
        self.should_stop(trial)
        if trial.state != "running":
            self.tell(trial)

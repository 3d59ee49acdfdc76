"""Data of a task of any family, read and checked."""

from __future__ import annotations

import numpy as np

from pipeline.config import TrainConfig
from pipeline.data.dataset import TaskData, load_data
from pipeline.data.families import check_training
from pipeline.errors import DataError
from pipeline.pairs.data import PairData
from pipeline.pairs.loading import load_pairs
from pipeline.pairs.tables import decide_by_columns
from pipeline.records import MtebTask


def read_task(task: MtebTask, *, config: TrainConfig, offline: bool) -> TaskData | PairData:
    """Read the data of a task: texts with labels for classification and separation, pairs for the other families.

    Args:
        task: The planned task. What it leaves undecided, the columns of its data decide.
        config: Settings of the validation slice and of the batches.
        offline: Read data sets of the Hub from the local cache only.
    Raises:
        ConfigError: the batches are too small for the loss.
        DataError: the data is missing or damaged, or cannot be learnt.
        LorafleetError: the Hub cannot be reached.
    """
    task = decide_by_columns(task, offline=offline)
    if task.objective in ("text-matching", "retrieval"):
        return load_pairs(task, config=config, offline=offline)
    check_training(task, config)
    data = load_data(task, config=config, offline=offline)
    if task.objective == "separation" and np.bincount(data.train_labels).max() < 2:
        raise DataError(
            f"{task.name}: each label of train has a single text; separation pairs the texts of one label, so expected "
            "at least two texts of some label"
        )
    if task.objective == "separation" and len(np.unique(data.validation_labels)) == 1:
        label = data.label_names[data.validation_labels[0]]
        raise DataError(
            f"{task.name}: validation has the single label {label!r}, so it cannot "
            "tell one epoch from another; give it texts of at least two labels, or raise train.validation_fraction"
        )
    return data

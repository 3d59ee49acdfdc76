"""Base class of all records, and the types their fields share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel

SelectedOn = Literal["validation", "test", "last_epoch"]
"""Split that chose the epoch. ``test`` makes the score optimistic, so every row records it."""

Column = Literal["majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head"]
"""One way to classify a data set. Together they are the columns of the score table, from left to right."""

ValueColumn = Literal[
    "majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head", "frozen", "adapted"
]
"""Column of a row of ``values.parquet``. ``frozen`` and ``adapted`` measure vectors, without and with the adapter."""

Family = Literal["classification", "text-matching", "retrieval", "separation"]
"""Task family: the kind of data that an adapter learns from, and the numbers by which it is measured."""

Loss = Literal["cross-entropy", "cosent", "cosine", "infonce", "triplet"]
"""Loss of a training."""

Side = Literal["query", "passage"]
"""Side of a pair of texts: the first text, or the second and all negatives."""

SIDES: tuple[Side, Side] = ("query", "passage")
"""Both sides, in the order of the columns."""

OWN_SLICES = ("pair_in_train", "text_in_train")
"""Slices of a test set that lorafleet reports by itself. Their value is ``no``."""

FewShotColumn = Literal["frozen_few_shot", "adapted_few_shot"]
"""A column measured with mteb's few-shot protocol."""

SIGNIFICANCE = 0.05
"""A p-value below this is called significant, in verdicts and at the gate."""

MainMetric = Literal["accuracy", "macro_f1"]
"""Metric that compares the head with the full-data probe. Names a field of ``ScoreRow``."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A fraction or a score, 0..1."""

# The following strings become part of a path, an address or a git reference, so other characters are refused.

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
"""Name of an MTEB task: also a folder of the run, and part of a column's name."""

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
"""Name of a run folder: also part of a tag and of a branch."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""

EncoderRevision = Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]+$", max_length=71)]
"""Commit on the Hub, or ``sha256:…`` of an encoder's files."""

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]
"""First digits of a SHA-256 in hexadecimal, used as a file name under the run store."""

DataRevision = Annotated[str, Field(pattern=r"^[\w.:+! -]+$", max_length=100)]
"""A commit, a package version, or ``sha256:…`` of files. A phrase in words until the data have been read."""

LONGEST_PUBLIC_NAME = 200
"""Maximum length of a ``PublicName`` in characters."""

PublicName = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$", max_length=LONGEST_PUBLIC_NAME)]
"""``OWNER/NAME`` on the Hub, or the name of a package or folder."""

FilePath = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$", max_length=1000)]
"""Path of a file inside its folder, with slashes. No part begins with a dot."""

ModulePath = Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=300)]
"""Path of a module in an encoder."""

LONGEST_LABEL = 10_000
"""Maximum length of a label in characters."""

LONGEST_PREFIX = 2_000
"""Maximum length of a text that is put before each text of a side, in characters."""

MOST_LABEL_BYTES = 2 * 1024**2
"""Maximum size of all label names of a data set, as JSON. Must be well below ``files.LARGEST_RECORD_BYTES``."""

LabelName = Annotated[str, Field(min_length=1, max_length=LONGEST_LABEL)]
"""Name of a class, exactly as in the data."""


class Record(BaseModel):
    """A frozen record. Unknown fields are errors, and the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def changed(self, **changes: Any) -> Self:
        """Copy the record with other values of some fields.

        Raises: pydantic.ValidationError: a value does not fit its field.
        """
        return type(self).model_validate(self.model_dump() | changes)


class JsonObject(RootModel[dict[str, Any]]):
    """Any JSON object that another library wrote."""

    model_config = ConfigDict(frozen=True)

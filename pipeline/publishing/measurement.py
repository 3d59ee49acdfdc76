"""The comparison of a newly trained adapter with the published one, as the gate sees it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.evaluation.metrics import title_of
from pipeline.evaluation.scores import Interval
from pipeline.reports.formatting import percent, points


@dataclass(frozen=True)
class GateMeasurement:
    """Comparison of two adapters on the same test texts."""

    published_accuracy: float
    """Value of ``metric`` for the published adapter."""
    candidate_accuracy: float
    """Value of ``metric`` for the newly trained adapter."""
    interval: Interval
    """Confidence interval of the difference."""
    p_value: float
    num_texts: int
    """Number of texts, pairs or queries that were measured."""
    metric: str = "accuracy"
    """Metric by which the two are compared: the main metric of an embedding adapter, accuracy of a classifier."""

    @property
    def difference(self) -> float:
        """Candidate minus published. For accuracy rounded to a whole number of texts, to remove float error."""
        difference = self.candidate_accuracy - self.published_accuracy
        return round(difference * self.num_texts) / self.num_texts if self.metric == "accuracy" else difference

    @property
    def in_words(self) -> str:
        """The numbers behind a decision."""
        what, unit = ("", "texts") if self.metric == "accuracy" else (f"{title_of(self.metric)} ", "examples")
        return (
            f"{what}{percent(self.candidate_accuracy)} against {percent(self.published_accuracy)} "
            f"on the same {self.num_texts:,} {unit}, {points(self.difference)} points "
            f"({points(self.interval.low)} to {points(self.interval.high)}, p {self.p_value:.3g})"
        )

"""Collect the results of evaluations out of distribution, with the ranks of methods."""

from __future__ import annotations

import pandas as pd

from benchmarks.glue_ood.definition import OOD_RANK
from benchmarks.glue_ood.ranks import ranks_by_seed
from benchmarks.harness.report.common import join_claim_numbers
from benchmarks.text.outcomes import SELECTION, TextOutcomes


class EvaluationOutcomes(TextOutcomes):
    """The results of finished evaluations, whose claim numbers include ranks out of domain."""

    def claim_numbers(self) -> pd.DataFrame:
        """Return the numbers that claims may compare: those of every text benchmark, and ranks.

        A rank is that of :func:`.ranks_by_seed`.
        """
        ranks = ranks_by_seed(self).assign(domain=OOD_RANK, metric=OOD_RANK)
        return join_claim_numbers(super().claim_numbers(), ranks.rename(columns=SELECTION))

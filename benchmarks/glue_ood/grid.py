"""Plan runs that evaluate the chosen runs of another benchmark.

There is a run for each model, task, protocol, method and seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.glue_ood.definition import (
    OOD_RANK,
    EvaluationDefinition,
    EvaluationFile,
    EvaluationPart,
    EvaluationSpec,
)
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import (
    Domain,
    Part,
    benchmark_names,
    load_benchmark,
)
from benchmarks.harness.config.methods import ABLATION, Method
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.yaml import Location, check_names, parse
from benchmarks.text.definition import CLEAN, PUBLISHED
from benchmarks.text.grid import DOMAINS, TextBenchmark, TextSets, check_ablations, transformed_rows

_RANKS = Domain((OOD_RANK,), selections=(CLEAN, PUBLISHED))


class _Cell(NamedTuple):
    """A group of runs of the evaluated benchmark, by the names that they share.

    The runs of a cell differ in learning rate, variant and seed. For each seed, one of them is
    chosen and evaluated.
    """

    model: str
    task: str
    protocol: str
    method: str


class _Row(NamedTuple):
    """One row of the tables, which shows the evaluations of chosen runs of one cell.

    The chosen models may be converted to another method before the evaluation. Then they take the
    configuration of the chosen runs of this other method.

    Attributes:
        name: The name of the method, or of the row with converted models.
        trained: The method of the evaluated runs.
        used_as: The method to convert to; None without a conversion.
        first_run: One of the runs that may be evaluated. All have its model, task and protocol.
        candidates: The runs among which the evaluated run is chosen. With a conversion, also the
            runs among which the configuration is chosen.
        seeds: The seeds, for each of which there is an evaluation.
    """

    name: str
    trained: str
    used_as: str | None
    first_run: Run
    candidates: Sequence[Run]
    seeds: Sequence[int]


class EvaluationBenchmark(TextSets[EvaluationDefinition, EvaluationPart]):
    """A benchmark that evaluates the chosen runs of another on the OOD sets of their tasks."""

    package = "benchmarks.glue_ood"
    spec_model = EvaluationSpec
    definition_model = EvaluationFile
    part_model = EvaluationPart
    recorded = ("scores", "data", "chosen", "routing", "usage")

    @classmethod
    def load(cls, name: str, content: object, file: Path) -> Self:
        evaluation_file = parse(content, EvaluationFile, str(file))
        check_names(Location(file, "evaluates"), [evaluation_file.evaluates], benchmark_names())
        other = load_benchmark(evaluation_file.evaluates)
        if not isinstance(other, TextBenchmark):
            raise DefinitionError(
                f"{file}: 'evaluates' is '{other.name}', which trains no text classifiers"
            )
        # the rows are the other benchmark's methods, and its trained models as another method
        other_definition = other.definition
        definition = EvaluationDefinition(
            **evaluation_file.given(),
            baseline=other_definition.baseline,
            method_defaults=other_definition.method_defaults,
            methods={
                **_main_rows(other),
                **transformed_rows(evaluation_file.transformed, other_definition, file),
            },
        )
        benchmark = cls(name, definition, other.tasks, {**DOMAINS, OOD_RANK: _RANKS})
        # only the other rows are ranked, because transformed rows are shown only in ablations
        main_rows = [row for row in definition.methods if row not in definition.transformed]
        check_names(Location(file, "ranked"), definition.ranked, main_rows)
        check_ablations(benchmark)
        return benchmark

    def specs(
        self, part: Part[EvaluationPart], exclude: Collection[str], others: Sequence[Run]
    ) -> Iterator[dict[str, Any]]:
        # The runs of the other benchmark may be unfinished when this plan is made. Then their best
        # learning rate and variant are unknown. So a spec names all candidate runs, of all seeds.
        # The evaluation itself chooses one of them by their dev scores.
        settings = self.settings("evaluation", part).model_dump()
        cells = self._candidates(part, others)
        for row in _rows(self.definition, cells):
            first_run = row.first_run
            task = self.tasks[first_run.task]
            ood_sets = [self.tasks[name].spec() for name in task.ood if name not in exclude]
            if not ood_sets:
                continue
            # without a conversion, a spec does not have the key
            conversion = {}
            if row.used_as is not None:
                conversion = {"used_as": row.used_as}
            for seed in row.seeds:
                yield self.spec(
                    "",  # no variant, because it is not chosen yet
                    protocol=first_run.protocol,
                    model=first_run.model_spec,
                    task=first_run.task_spec,
                    ood=ood_sets,
                    evaluation=settings,
                    candidates=[run.folder for run in row.candidates],
                    trained=row.trained,
                    # the configuration, like the learning rate, is that of the chosen run
                    method={"name": row.name, "variant": "", "config": None},
                    learning_rate=0.0,
                    seed=seed,
                    **conversion,
                )

    def _candidates(
        self, part: Part[EvaluationPart], others: Sequence[Run]
    ) -> dict[_Cell, list[Run]]:
        """Group the other benchmark's runs by cell. Its ablations are left out.

        Raises:
            DefinitionError: A run does not keep its weights.
        """
        cells: dict[_Cell, list[Run]] = {}
        for run in others:
            if not run.keeps_weights:
                raise DefinitionError(
                    f"{self.file}: 'evaluates' is '{self.evaluated_benchmark}', whose runs in the "
                    f"suite '{part.suite}' do not keep their weights; set training.keep_weights: "
                    "true there"
                )
            # rows of the other benchmark's ablations are not evaluated
            if run.method not in self.definition.methods:
                continue
            cell = _Cell(run.model, run.task, run.protocol, run.method)
            runs = cells.setdefault(cell, [])
            runs.append(run)
        return cells


def _main_rows(benchmark: TextBenchmark) -> dict[str, Method]:
    """Return the methods of a benchmark as its ``benchmark.yaml`` gives them, without ablations."""
    roles = {name: method.role for name, method in benchmark.methods().items()}
    given = benchmark.definition.methods
    return {name: method for name, method in given.items() if roles[name] != ABLATION}


def _rows(definition: EvaluationDefinition, cells: Mapping[_Cell, list[Run]]) -> Iterator[_Row]:
    """Yield a row for each cell, then the rows with models that are converted before evaluation.

    ``definition.transformed`` has such rows. Their models are trained as one method (``trained``)
    and evaluated as another (``used_as``). A row needs runs of both methods with the same model,
    task and protocol. Without them, the row is left out.
    """
    for cell, runs in cells.items():
        yield _Row(
            name=cell.method,
            trained=cell.method,
            used_as=None,
            first_run=runs[0],
            candidates=runs,
            seeds=_seeds(runs),
        )
    for name, transformed in definition.transformed.items():
        for cell, runs in cells.items():
            if cell.method != transformed.trained:
                continue
            # the runs of the method to convert to, with the same model, task and protocol
            cell_of_target = cell._replace(method=transformed.used_as)
            target_runs = cells.get(cell_of_target)
            if target_runs is None:
                continue
            # each evaluation takes a run of both methods with its seed
            seeds_of_target = _seeds(target_runs)
            seeds_of_both = [seed for seed in _seeds(runs) if seed in seeds_of_target]
            yield _Row(
                name=name,
                trained=cell.method,
                used_as=transformed.used_as,
                first_run=runs[0],
                candidates=[*runs, *target_runs],
                seeds=seeds_of_both,
            )


def _seeds(runs: Sequence[Run]) -> list[int]:
    """List the seeds of runs, each once, in the order of the runs."""
    return list(dict.fromkeys(run.seed for run in runs))

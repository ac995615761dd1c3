"""The content of a ``metrics.json``, for runs of all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from benchmarks.harness.config.yaml import refusal


class Recorded(BaseModel):
    """The base of all sections of a ``metrics.json``. An optional key must not be null."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, content: Any) -> Any:
        """Return the content unchanged, or raise if an optional key is null."""
        # if it is not a dictionary, pydantic refuses it after this validator
        if not isinstance(content, dict):
            return content
        for key, field in cls.model_fields.items():
            if key not in content or content[key] is not None:
                continue
            # The key is null. If the field's default is None, its type allows None, but only for a
            # missing key. Pydantic would accept null, so it is refused here. For any other field,
            # pydantic refuses null unless the type allows it.
            none_means_missing = not field.is_required() and field.default is None
            if none_means_missing:
                raise refusal(f"'{key}' is null")
        return content


def _check_number(text: str) -> str:
    """Return the text if it is a number, else raise."""
    try:
        float(text)
    except ValueError:
        raise refusal(f"'{text:.50}' is not a number") from None
    return text


def _check_same_lengths(rows: Sequence[Sized]) -> Any:
    """Return the lists if all have the same length, else raise."""
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise refusal("its lists have different lengths")
    return rows


Count = Annotated[int, Field(ge=0, lt=2**63)]  # may be 0, unlike `Count` of config/yaml.py
Loss = float | None  # null if the model diverged
NumberText = Annotated[str, AfterValidator(_check_number)]  # a number with all its digits
Digits = Annotated[str, Field(pattern="^[0-9]+$")]
Layer = Digits  # the number of a layer
Loads = Annotated[list[Count], Field(min_length=1)]  # how often each expert was chosen
Shares = Annotated[list[float], Field(min_length=1)]  # the share of the choices of each expert
LoadRows = Annotated[list[Loads], Field(min_length=1), AfterValidator(_check_same_lengths)]
ByMetric = Annotated[dict[str, Loss], Field(min_length=1)]
Scores = dict[str, dict[str, ByMetric]]  # by part (such as test or ood), data set and metric


class Cost(Recorded):
    """The time and memory of a run. Runs that train also have the times of their training."""

    job_seconds: float
    """The whole job, from the start of its process."""
    startup_seconds: float
    """The time before the first row is read."""
    peak_memory_mb: float
    precision: str | None = None
    steps: Count | None = None
    """Optimizer steps."""
    step_seconds: float | None = None
    train_seconds: float | None = None
    evaluation_seconds: float | None = None
    prefix_seconds: float | None = None
    """Time in frozen layers whose outputs are kept."""


class Environment(Recorded):
    """The machine, the packages and the commit of a run."""

    packages: dict[str, str]
    """Versions by package."""
    python: str
    platform: str
    git_commit: str | None
    """Null outside a checkout, as is `git_dirty`."""
    git_dirty: bool | None
    code: str | None = None
    """Digest of the code that numbers depend on. Null if an older version recorded the run."""
    processor: str
    cores: Count | None
    """Null if the system does not say."""
    threads: Annotated[int, Field(ge=1)]
    memory_gb: float
    gpus: list[str]
    fingerprint: dict[str, str]
    """Packages and hardware. If all are equal, numbers are equal to the last digit."""


class Logits(Recorded):
    """A summary of logits."""

    deviation: float
    """Standard deviation."""
    mean: float
    projection: float
    """Product with a fixed random direction."""
    rms: float
    """Root of the mean square."""


class Probe(Recorded):
    """The first training losses, and the logits and expert loads of a fixed batch.

    They barely differ between machines.
    """

    losses: list[NumberText]
    loads: dict[Layer, Loads]
    """Expert choices of a fixed batch by layer and expert; empty for a dense model."""
    logits: Logits | None = None
    """Logits of the same batch. Sharded models record none."""


class ConvertedLayer(Recorded):
    """A layer whose FFN was converted, see :class:`emoe.convert.LayerReport`."""

    index: Count
    name: str
    neurons: Count
    experts: Count
    expert_size: Count
    top_k: Count
    explained: float | None
    """Share of the keys' variance that the partition explains; null for GMoE."""
    seconds: float | None


class TrainedGroup(Recorded):
    """The trained parameters of a group, such as adapters."""

    parameters: Count
    names: str
    """Digest of their names."""


class Source(Recorded):
    """The origin of the pre-trained weights."""

    origin: str = Field(alias="from")
    weights: str
    """Digest of the weights; empty if they were quantised."""


class ModelNumbers(Recorded):
    """The source and the sizes of a run's model.

    Runs that train nothing may record only the source and the conversion.
    """

    source: Source
    conversion: list[ConvertedLayer]
    """Empty for a dense model."""
    trained: dict[str, TrainedGroup] = {}
    """By group; empty if all parameters were trained."""
    parameters: Count | None = None
    dense_parameters: Count | None = None
    trainable_parameters: Count | None = None
    active_parameters: Count | None = None
    flops_per_token: Count | None = None
    active_neurons: float | None = None


# the keys that only the summary of a set of instructions has
_INSTRUCTION_KEYS = (
    "template",
    "broken_rows",
    "tokens",
    "learned_tokens",
    "longest",
    "truncated_responses",
    "truncated_tokens",
)


class DataSummary(Recorded):
    """A summary of the rows in one split of a data set.

    Texts and images have labels or scores, and instructions have tokens.
    """

    source: str
    rows: Count
    digest: str | None = None
    """Digest of the rows, for texts."""
    dropped: Count | None = None
    """Rows without a clear label or text."""
    labels: dict[str, Count] = {}
    """Rows by class."""
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """The lowest and highest score of a regression."""
    template: str | None = None
    """Template of the instructions. Only instructions have this and the following keys."""
    broken_rows: Count | None = None
    tokens: Count | None = None
    learned_tokens: Count | None = None
    longest: Count | None = None
    truncated_responses: Count | None = None
    truncated_tokens: Count | None = None

    @property
    def content(self) -> str:
        """Return the counts, labels and digest in one text, which ``check`` compares."""
        texts = []
        # iterating over a pydantic model yields a (name, value) tuple for each field
        for name, value in sorted(self):
            if isinstance(value, int):  # all counts, and no other field
                texts.append(f"{name} {value}")
        for label, num_rows in self.labels.items():
            texts.append(f"{label}: {num_rows}")
        if self.digest is not None:
            texts.append(self.digest)
        return ", ".join(texts)

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if a key is missing that this kind of data must have."""
        given_keys = [key for key in _INSTRUCTION_KEYS if getattr(self, key) is not None]
        if given_keys:  # instructions
            self._check_given(_INSTRUCTION_KEYS)
            return
        # texts and images: classes have labels, and scores of a regression have a range
        self._check_given(["dropped"])
        if not self.labels and self.range is None:
            raise refusal("'labels' is missing")

    def _check_given(self, keys: Sequence[str]) -> None:
        """Raise if one of the keys is missing."""
        for key in keys:
            if getattr(self, key) is None:
                raise refusal(f"'{key}' is missing")


class Windows(Recorded):
    """Expert loads during the training. A window is a number of consecutive steps."""

    ends: list[Count]
    """The last step of each window."""
    loads: dict[Layer, LoadRows]
    """By layer, window and expert."""

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if a layer has more or fewer windows than ``ends``."""
        for layer, rows in self.loads.items():
            if len(rows) != len(self.ends):
                raise refusal(
                    f"'loads.{layer}' has {len(rows)} windows, but 'ends' has {len(self.ends)}"
                )


class Chance(Recorded):
    """The mutual information of experts and labels after shuffling the labels, in bits.

    Each list has the mean and the 95 % quantile over the shuffles. Labels are the ``class`` or the
    ``environment`` of an image.
    """

    by_class: Annotated[list[float], Field(min_length=2, max_length=2, alias="class")]
    environment: Annotated[list[float], Field(min_length=2, max_length=2)]


class Routing(Recorded):
    """A summary of how evaluated tokens were routed to experts; empty for a dense model.

    Single numbers are means over the layers. ``<label>_information`` is the mutual information of
    experts and labels; benchmarks differ in the labels that they measure.
    """

    active_neurons: float | None = None
    drop_rate: float | None = None
    experts_per_token: float | None = None
    load_entropy: float | None = None
    load_max_over_mean: float | None = None
    class_information: float | None = None
    class_information_chance: float | None = None
    class_information_chance_95: float | None = None
    task_information: float | None = None
    task_information_chance: float | None = None
    task_information_chance_95: float | None = None
    environment_information: float | None = None
    environment_information_chance: float | None = None
    environment_information_chance_95: float | None = None
    shares: dict[Layer, Shares] = {}
    """Shares of the choices by layer and expert."""
    windows: Windows | None = None
    """Loads during the training, for text benchmarks."""
    loads: dict[
        Layer, Annotated[list[LoadRows], Field(min_length=1), AfterValidator(_check_same_lengths)]
    ] = {}
    """Loads for images, by layer, environment, class and expert."""
    chance: dict[Layer, Chance] = {}
    """Information by chance for images, by layer."""

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if ``loads`` and ``chance`` have different layers."""
        if self.loads.keys() != self.chance.keys():
            raise refusal("'loads' and 'chance' have different layers")


class SetUsage(Recorded):
    """The use of experts by the rows of one data set."""

    shares: Shares
    """Share of the choices, by expert."""
    marks: list[Annotated[int, Field(ge=-1, le=1)]]
    """By expert: 1 if it is used more than by chance, -1 if less, else 0."""
    classes: dict[Digits, Shares]
    """Shares by class; empty for a regression."""

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if the lists have different numbers of experts."""
        _check_same_lengths([self.shares, self.marks, *self.classes.values()])


class Usage(Recorded):
    """The use of experts by data set; empty for dense models and for runs on one data set."""

    tasks: dict[str, SetUsage] = {}
    """By data set."""
    shared: list[Count] = []
    """Experts that get more than 1/N of the choices of every data set, where N is the number of
    experts. Their mark is 0 in all data sets."""
    specialised: list[Count] = []
    """Experts that some data set uses more than by chance."""

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if the keys do not fit together.

        Either all keys are given or none. All data sets have the same number of experts. The lists
        ``shared`` and ``specialised`` name only experts that exist.
        """
        given = self.model_fields_set
        # dense models and runs on one data set give none of the keys
        if given:
            for key in type(self).model_fields:
                if key not in given:
                    raise refusal(f"'{key}' is missing")

        # for each data set, a list with the share of each expert
        shares_of_data_sets = [usage.shares for usage in self.tasks.values()]
        _check_same_lengths(shares_of_data_sets)
        num_experts = 0
        if shares_of_data_sets:
            num_experts = len(shares_of_data_sets[0])
        for expert in (*self.shared, *self.specialised):
            if expert >= num_experts:
                raise refusal(
                    f"'shared' or 'specialised' names an expert beyond the {num_experts} of 'tasks'"
                )


class Matrix(Recorded):
    """The active neurons of some tokens.

    ``tokens``, ``places`` and ``values`` have one entry per active neuron: the number of its token,
    its place among the neurons in the order of the experts, and its value.
    """

    neurons: Annotated[int, Field(ge=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    """The data set of each token."""
    tokens: list[Count]
    places: list[Count]
    values: list[float]

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if ``tokens``, ``places`` and ``values`` have different lengths."""
        _check_same_lengths([self.tokens, self.places, self.values])


class QuestionResult(Recorded):
    """The result of a task of lm-eval."""

    scores: Annotated[dict[str, Loss], Field(min_length=1)]
    metric: str
    questions: Count
    categories: dict[str, dict[str, float]]
    """Main metric and number of questions, by subgroup of subjects."""
    subjects: dict[str, dict[str, float]]
    """All metrics and number of questions, by subject."""
    correct: dict[str, Annotated[str, Field(pattern="^[01]*$")]]
    """By subject, one digit for each question: 1 if it was answered correctly, else 0. Empty if the
    task has no binary accuracy."""
    nats_per_byte: dict[str, list[Loss]] = {}
    """By subject, one number for each right answer. Empty if questions do not have several
    answers."""
    source: list[str] = []
    """Origin of the questions."""


class Answer(Recorded):
    """A generated answer."""

    instruction: str
    input: str
    reference: str
    answer: str


class Chosen(Recorded):
    """The trained run that an evaluation run chose among its candidates."""

    run: str
    """Folder below results/runs."""
    learning_rate: float
    variant: str


class Transformed(Recorded):
    """The scores of a trained model after its conversion to another method."""

    scores: Scores


class Epoch(Recorded):
    """An epoch of text training.

    It has its loss and scores under the names of metrics or data sets.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Loss]  # all keys besides the fields
    epoch: float

    def numbers(self) -> Mapping[str, Loss]:
        """Return the loss and the scores by name."""
        return self.__pydantic_extra__


class HeldOutLoss(Recorded):
    """The loss on held-out instructions after a step of the training."""

    step: Count
    loss: Loss


class StepRecord(Recorded):
    """An evaluation during the training of a DomainBed run.

    It has accuracies under names such as ``env0_in_acc``.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]  # all keys besides the fields
    step: Count
    epoch: float
    loss: Loss

    def numbers(self) -> Mapping[str, float]:
        """Return the accuracies by name."""
        return self.__pydantic_extra__


def _check_same_numbers(records: list[StepRecord]) -> list[StepRecord]:
    """Return the records if all have accuracies under the same names, else raise."""
    names = {frozenset(record.numbers()) for record in records}
    if len(names) > 1:
        raise refusal("its records have different accuracies")
    return records


class Metrics(Recorded):
    """The content of a ``metrics.json``.

    ``Benchmark.recorded`` lists the sections that a benchmark must record. A new kind of benchmark
    may record further sections.
    """

    model_config = ConfigDict(extra="allow")

    run_id: str
    cost: Cost
    environment: Environment
    scores: Scores | None = None
    measured: (
        Annotated[dict[str, Annotated[dict[str, float], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = None
    """Numbers of a measurement by candidate and metric. A candidate is something that it compares,
    such as an implementation."""
    transformed: dict[str, Transformed] = {}
    """Scores after a conversion, by the method that the trained model was converted to."""
    data: dict[str, DataSummary] | None = None
    """The data that the run read, by a name such as ``train``, ``ood:imdb`` or ``A in``."""
    model: ModelNumbers | None = None
    probe: Probe | None = None
    routing: Routing | None = None
    usage: Usage | None = None
    matrix: Matrix | None = None
    tasks: dict[str, QuestionResult] | None = None
    """Results by the title of the evaluated task."""
    answers: list[Answer] | None = None
    chosen: Chosen | None = None
    epochs: list[Epoch] = []
    kept_epoch: float | None = None
    dev_curve: list[Epoch] = []
    held_out_curve: list[HeldOutLoss] = []
    records: (
        Annotated[list[StepRecord], Field(min_length=1), AfterValidator(_check_same_numbers)] | None
    ) = None
    curve: list[Loss] = []
    """Training losses by step."""
    confusion: dict[str, list[list[Count]]] | None = None
    """Images by environment, true and predicted class."""
    classes: list[str] | None = None

    @property
    def weights(self) -> str:
        """Return the digest of the pre-trained weights."""
        if self.model is None:
            raise ValueError("the run recorded no model")
        return self.model.source.weights


def rerun_advice(path: Path) -> str:
    """Return the advice of error messages on how to remake a damaged ``metrics.json``."""
    return f"delete it and run `snakemake --cores all {path} --config suite=NAME`"

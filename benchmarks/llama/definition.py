"""Define the files of an instruction-tuning benchmark: fine-tuning methods, suites and sets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.benchmark import (
    Entry,
    MethodsDefinition,
    Resources,
    Training,
    TrainingPart,
)
from benchmarks.harness.config.methods import TUNINGS, Layers, LoRA, VariantAxes, tuning_spec
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import (
    Count,
    ExplicitNulls,
    Key,
    Names,
    NotNegative,
    Positive,
    Positives,
    Rate,
    Strict,
    Whole,
    Wholes,
    optional,
    optional_zero,
    refusal,
    registered,
)

# domains of claims
HELD_OUT = "held_out"
QUESTIONS = "questions"
# metric of the right answer, for tasks whose choices are answers instead of letters
NATS = "nats_per_byte"
# names of templates that are not in templates.yaml
CHAT = "chat"
RANDOM = "random"


class Finetuning(Entry):
    """A fine-tuning method: which parameters are trained."""

    train: Annotated[str, registered(TUNINGS, beside=("all", "adapters", "nothing"))]
    """Trained parameters: all; adapters; nothing (evaluation only); or a registered tuning, such as
    `blocks` (the transformer blocks of `layers`)."""
    layers: Layers | None = None
    """Numbers of layers, written like a method's `layers`. With `train: blocks` these blocks are
    trained; a method has to convert the same layers. With `quantize` the FFNs of these layers stay
    unquantised; a method can convert only these."""
    lora: LoRA | None = None
    """The adapters."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the untrained weights; trained weights are float32. A CPU computes in float32."""
    quantize: Literal["nf4", "fp4"] | None = None
    """Load in 4 bits with bitsandbytes, except the head and the FFNs of `layers`."""

    def model_post_init(self, _context: Any, /) -> None:
        trains_adapters = self.train == "adapters"
        has_adapters = self.lora is not None
        if trains_adapters != has_adapters:
            raise refusal("'lora' and 'train: adapters' need each other; set both or none")
        if self.quantize and not has_adapters:
            raise refusal("weights in 4 bits cannot be trained; 'quantize' needs 'train: adapters'")
        needs_layers = self.train == "blocks" or self.quantize is not None
        has_layers = self.layers is not None
        if needs_layers != has_layers:
            raise refusal(
                "'layers' is required with 'train: blocks' or 'quantize', and not allowed otherwise"
            )

    def tune_spec(self) -> dict[str, Any] | None:
        """Return the section ``tune`` of a run's method.

        It names what is trained in addition to adapters and routers. None stands for full
        fine-tuning.
        """
        if self.train == "all":
            return None
        # `adapters` and `nothing` are values of `train`, but not registered tunings
        tuning = self.train if self.train in TUNINGS else None
        # a language model's head is pre-trained, so it is not trained like a new classifier head
        return {**tuning_spec(tuning, self.layers), "head": False}

    def model_spec(self) -> dict[str, Any]:
        """Return the model settings for weights that are not float32; empty if all are."""
        spec: dict[str, Any] = {}
        if self.weights != "fp32":
            spec["weights"] = self.weights
        if self.quantize:
            spec["quantize"] = self.quantize
            # the layers whose FFNs are not quantised
            spec["whole"] = self.layers
        return spec


class Data(Strict):
    """Settings of the instruction data; a suite may change them."""

    template: str
    """Prompt template: a name in templates.yaml, `chat` for the model's own, or `random` for one of
    templates.yaml, drawn with the seed."""
    max_length: Annotated[int, Field(ge=2)]
    """Maximum tokens of prompt and response; longer responses are cut and counted."""
    train_rows: Count | None
    """Number of training rows, drawn with the run's seed. Null: all rows that are not held out."""
    held_out_rows: Count
    """Number of rows for the held-out loss. Runs with the same set, template, tokenizer and lengths
    hold out the same rows."""
    broken_rows: Literal["refuse", "skip"]
    """Refuse a set with unusable rows, or skip and count them."""


class InstructionTraining(Training):
    """Training settings, except the adapters (see ``finetuning``)."""

    epochs: Positive
    """Passes over the rows."""
    steps: Count | None
    """Steps, which override `epochs`; null to use `epochs`."""
    batch_size: Count
    """Rows per step, over all processes. Rows of an incomplete step are omitted."""
    per_device_train_batch_size: Count
    """Rows per micro-batch of a process; gradients accumulate over micro-batches."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"]
    """Schedule of the learning rate."""
    warmup: Rate
    """Share of the steps over which the learning rate rises."""
    weight_decay: NotNegative
    """AdamW's weight decay."""
    max_grad_norm: NotNegative
    """Gradient clipping norm; 0 for no clipping."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, which the
    metrics record."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass instead of keeping them."""
    packing: bool
    """Concatenate the rows of a micro-batch, without attention between rows, instead of padding."""
    save_steps: Count
    """Steps between checkpoints."""
    eval_every: Count | None = optional()
    """Steps between held-out losses during training. The first loss precedes the first step. By
    default none are computed."""
    keep_weights: bool
    """Keep the trained weights, so that the run can be exported."""
    frozen_layers: Whole | None = optional_zero()
    """Number of first layers that are frozen with the embeddings, without dropout and stochastic
    depth. Their output for a row is computed once and kept (`resources/prefixes/`). Only later
    layers have adapters, and no method converts or trains a frozen layer. 0 or omitted: none."""


class EvaluationTask(Strict):
    """One task of lm-eval."""

    task: str
    """Name of a task or group. `mmlu` and `mmlu_continuation` have MMLU's test questions, from
    `mmlu/test.jsonl` and `mmlu/dev.jsonl` below data_root if that folder exists, else from the hub.
    `mmlu_dev` has MMLU's few-shot questions, which lm-eval ships."""
    num_fewshot: Whole
    """Few-shot examples per question."""
    limit: Count | None = None
    """Number of first questions per task; null for all."""
    draw: Count | None = optional()
    """Number of questions that are drawn at random, the same for all runs. Each task of a group has
    a number in proportion to its size, at least one. By default all questions are asked. Cannot be
    combined with `limit`."""

    def model_post_init(self, _context: Any, /) -> None:
        """Raise if both numbers of questions are given."""
        if self.limit is not None and self.draw is not None:
            raise refusal("'limit' and 'draw' exclude each other; set one")

    @property
    def title(self) -> str:
        """Return the name in records.

        Examples are ``mmlu (5-shot)``, ``mmlu (5-shot, 2,000 drawn)`` and
        ``mmlu_dev (0-shot, first 3)``.
        """
        settings = f"{self.num_fewshot}-shot"
        if self.limit:
            settings = f"{settings}, first {self.limit}"
        if self.draw:
            settings = f"{settings}, {self.draw:,} drawn"
        return f"{self.task} ({settings})"


class Evaluation(Strict):
    """Settings of the evaluation; a suite may change them."""

    tasks: list[EvaluationTask]
    """Tasks of lm-eval."""
    batch_size: Count
    """Rows per batch."""
    generations: Whole
    """Held-out rows for which a greedy answer is generated and recorded."""
    new_tokens: Count
    """Maximum tokens of an answer."""


class ParallelResources(Resources):
    """Scheduler resources and processes of one run; they change numbers only by rounding."""

    processes: Count = 1
    """Processes that torchrun starts, one per GPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism: each process has the whole model (ddp) or a shard of it (fsdp: FSDP2)."""


class InstructionBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run.

    Method settings that a block varies are part of a run's name, such as ``N16``.
    """

    model: Names
    """Names in models.yaml."""
    task: Names
    """Names of sets."""
    finetuning: Names
    """Names of `finetuning`."""
    method: Names
    """Names of methods."""
    learning_rate: Positives | None = optional()
    """Peak learning rates; required unless nothing is trained."""
    seed: Wholes
    """Seeds of row order, adapters, dropout and random templates."""


class InstructionPart(TrainingPart):
    """What a suite sets for this benchmark: the grid of its runs, and the settings that differ."""

    data: Annotated[dict[str, Any], Changes(Data)] = Field({})
    """Settings of the data that differ in this suite."""
    training: Annotated[dict[str, Any], Changes(InstructionTraining)] = Field({})
    """Settings of the training that differ in this suite."""
    evaluation: Annotated[dict[str, Any], Changes(Evaluation)] = Field({})
    """Settings of the evaluation that differ in this suite."""
    finetuning: dict[str, dict[str, Any]] = Field({})
    """Settings of fine-tuning methods that differ in this suite, by name."""
    resources: ParallelResources = ParallelResources()
    """Scheduler resources and processes of one run."""
    grid: Annotated[list[InstructionBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class InstructionDefinition(MethodsDefinition):
    """The benchmark.yaml of a benchmark that tunes language models and evaluates with lm-eval."""

    sets: str
    """File with the sets of instructions, in the benchmark's folder."""
    finetuning: Annotated[dict[Key, Finetuning], Field(min_length=1)]
    """Fine-tuning methods, in the order of table rows."""
    data: Data
    """Settings of the instruction data; a suite may change them."""
    training: InstructionTraining
    """Settings of the training; a suite may change them."""
    evaluation: Evaluation
    """Settings of the evaluation; a suite may change them."""


def _check_once(placeholder: str, text: str) -> None:
    """Raise an error if a template's text does not have the placeholder exactly once."""
    count = text.count(placeholder)
    if count != 1:
        raise refusal(f"it needs {placeholder} exactly once, but has it {count} times")


def _check_with_input(text: str) -> str:
    """Return the text of a template unchanged, or raise an error if a placeholder is wrong."""
    _check_once("{instruction}", text)
    _check_once("{input}", text)
    return text


def _check_without_input(text: str) -> str:
    """Return the text of a template unchanged, or raise an error if a placeholder is wrong."""
    _check_once("{instruction}", text)
    if "{input}" in text:
        raise refusal("it has {input}, but its rows have no input")
    return text


class PromptTemplate(Strict):
    """The texts of a prompt, with placeholders for the instruction and its input."""

    with_input: Annotated[str, AfterValidator(_check_with_input)]
    """Prompt of rows with an input, with the placeholders {instruction} and {input}."""
    without_input: Annotated[str, AfterValidator(_check_without_input)]
    """Prompt of rows without an input, with the placeholder {instruction}."""


class TemplateFile(Strict):
    """The content of templates.yaml."""

    templates: Annotated[dict[Key, PromptTemplate], Field(min_length=1)]
    """The templates, by name."""


class InstructionSource(ExplicitNulls):
    """Source of the rows if there is no file `<name>.json` or `<name>.jsonl` below data_root."""

    hub: str | None = None
    """Repository on the hub."""
    revision: str | None = None
    """Commit on the hub; null for the newest."""
    package: str | None = None
    """File inside the package that ships the rows."""


class InstructionSet(Entry):
    """One data set in Alpaca's form: rows with an instruction, an optional input and an output."""

    source: InstructionSource
    """Source of the rows if there is no file `<name>.json` or `<name>.jsonl` below data_root."""
    rows: Count | None = optional()
    """Row count according to the makers."""
    download_instructions: str
    """Instructions to download the set."""

    def spec(self, name: str) -> dict[str, Any]:
        """Return what a run's spec records about the set: its ``name`` and its ``source``."""
        return {"name": name, **self.model_dump(include={"source"})}


class SetFile(Strict):
    """The content of the file that lists the sets of instructions."""

    sets: Annotated[dict[Key, InstructionSet], Field(min_length=1)]
    """The sets, by name."""


class RunInstructions(Strict):
    """The set of instructions that a run reads."""

    name: str
    """Name among the benchmark's sets."""
    source: InstructionSource
    """Source of its rows."""


class RunInstructionTraining(InstructionTraining):
    """The ``training`` section of a run's spec, with its adapters."""

    lora: LoRA | None
    """The adapters; null for none."""


class Untrained(Strict):
    """The ``training`` section of the spec of a run that trains nothing."""

    lora: None
    precision: Literal["fp32", "bf16"]
    """Arithmetic on accelerators."""
    keep_weights: Literal[False]


class InstructionSpec(RunSpec):
    """The settings that determine the numbers of a run that tunes or evaluates a language model."""

    task: RunInstructions
    """The set of instructions."""
    ood: Annotated[list[Any], Field(max_length=0)]
    """Always empty; evaluation uses tasks of lm-eval."""
    finetuning: str
    """Name of the fine-tuning method."""
    data: Data
    """Settings of the instruction data."""
    templates: dict[str, PromptTemplate]
    """Templates by name: only `data.template`; all for `random`; none for `chat`."""
    training: RunInstructionTraining | Untrained
    """Settings of the training."""
    evaluation: Evaluation
    """Settings of the evaluation."""


def accumulation(training: InstructionTraining, processes: int) -> int:
    """Return the number of micro-batches per step and process.

    Raises:
        DefinitionError: ``batch_size`` is not a multiple of the number of processes times the rows
            of a micro-batch.
    """
    rows_at_once = training.per_device_train_batch_size * processes
    if training.batch_size % rows_at_once:
        raise DefinitionError(
            f"training.batch_size {training.batch_size} is not a multiple of "
            "training.per_device_train_batch_size "
            f"{training.per_device_train_batch_size} times {processes} processes"
        )
    return training.batch_size // rows_at_once


def _check_text(text: str) -> str:
    """Return the text unchanged, or raise an error if it is blank."""
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def _none_as_empty(text: Any) -> Any:
    """Replace None by an empty text, because Alpaca's rows write a missing input as null."""
    return "" if text is None else text


Text = Annotated[str, AfterValidator(_check_text)]


class Instruction(BaseModel):
    """One row of a set of instructions.

    Attributes:
        instruction: The instruction.
        input: The text that the instruction applies to; may be empty.
        output: The reference response.
        position: The place of the row in its file, for messages, such as ``line 7``.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    instruction: Text
    input: Annotated[str, BeforeValidator(_none_as_empty)] = ""
    output: Text
    position: str = ""


class Question(BaseModel):
    """One question of MMLU, in the fields of the hub."""

    model_config = ConfigDict(frozen=True, strict=True)

    question: str
    subject: str
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]
    """Index of the right choice."""

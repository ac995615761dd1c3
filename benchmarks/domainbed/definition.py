"""Define the YAML files of domain generalisation (training, suites, image sets) and run specs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from benchmarks.harness.config.benchmark import (
    Entry,
    MethodsDefinition,
    Precision,
    Training,
    TrainingPart,
)
from benchmarks.harness.config.methods import LoRA, VariantAxes
from benchmarks.harness.config.overlay import Changes
from benchmarks.harness.config.runs import RunSpec
from benchmarks.harness.config.yaml import (
    UNIQUE,
    Count,
    ExplicitNulls,
    Key,
    Names,
    NotNegative,
    Positive,
    Rate,
    Strict,
    Whole,
    Wholes,
    optional,
    optional_zero,
)


class HParams(ExplicitNulls):
    """All hyper-parameters of a run, as DomainBed lists them.

    The hyper-parameters of ResNets have no effect on the models of this suite.
    """

    lr: Positive
    """Adam's learning rate."""
    weight_decay: NotNegative
    """Adam's L2 penalty."""
    batch_size: Count
    """Images of each training environment per step."""
    data_augmentation: bool
    """Augment the training environments."""
    class_balanced: Literal[False]
    """DomainBed's option to draw every class equally often. No sweep uses it."""
    vit_dropout: Rate | None = None
    """Dropout before the head. The EMoE authors' fork of DomainBed lacks it."""
    resnet18: bool
    """Size of a ResNet. No effect."""
    resnet_dropout: Rate
    """Dropout of a ResNet. No effect."""
    nonlinear_classifier: bool
    """DomainBed's option of a nonlinear head. No effect."""


class ImageTraining(Training):
    """The training settings. A suite may override them."""

    in_no_spec: ClassVar = {"by_model", "registry", "hparams"}

    steps: Count
    """Number of training steps."""
    eval_every: Count | None
    """Number of steps between evaluations; null for DomainBed's number for the set."""
    eval_batch_size: Count
    """Images per evaluation batch."""
    eval_rows: Count | None
    """Number of evaluated images per split; null for all. Splits are shuffled, and the first images
    are evaluated.
    """
    evaluate: Literal["all", "needed"]
    """Evaluated splits. `all`: every split, as in DomainBed. `needed`: only the splits that a
    selection or a table reads. These do not include the *in* splits of training environments.
    """
    image_size: Annotated[int, Field(ge=14)]
    """Pixels along each side."""
    val_augment: bool
    """Evaluate training environments on augmented images, as DomainBed and the EMoE authors do.
    Each evaluation has new random augmentation. False evaluates on unchanged images, which only
    this suite offers.
    """
    drop_path: Rate
    """Rate of stochastic depth."""
    truncated: Literal["refuse", "load"]
    """Treatment of an image file that ends early: refuse the set, or fill the missing part, as
    DomainBed does.
    """
    precision: Precision
    """Arithmetic on accelerators: float32 or mixed. A CPU always computes in float32, and
    ``metrics.json`` records that.
    """
    lora: LoRA | None
    """Adapters to train, with the head only; null trains everything."""
    frozen_layers: Whole | None = optional_zero()
    """Number of first layers that are frozen with the embeddings, without dropout and stochastic
    depth. Their output for a row is computed once and kept (`resources/prefixes/`). Only later
    layers have adapters, and no method converts or trains a frozen layer. 0 or omitted: none.
    Frozen layers need images that are not augmented.
    """
    registry: Literal["domainbed", "emoe"] | None = optional()
    """Source of default and random hyper-parameters: DomainBed (default), or the EMoE authors'
    fork of DomainBed. Not part of a run's spec.
    """
    hparams: Annotated[dict[str, Any], Changes(HParams)] | None = optional()
    """Hyper-parameters that override default and random ones. A run's spec has all hyper-parameters
    in `hparams`.
    """


class ImageBlock(VariantAxes):
    """One block of a grid: every combination of its lists is a run."""

    task: Names
    """Names of image sets."""
    test_envs: (
        Literal["single", "all"]
        | Annotated[
            list[Annotated[list[str], Field(min_length=1, max_length=2), UNIQUE]],
            Field(min_length=1),
        ]
    )
    """Held-out environments: lists of names; `single` for every environment alone; `all` for every
    environment and every pair, as leave-one-domain-out selection needs.
    """
    hparams_seed: Wholes
    """DomainBed's hparams_seed: 0 for the defaults, other numbers for random hyper-parameters."""
    seed: Wholes
    """DomainBed's trial_seed, which determines splits and random draws."""


class ImagePart(TrainingPart):
    """The section of a suite's file for a domain generalisation benchmark."""

    training: Annotated[dict[str, Any], Changes(ImageTraining)] = Field({})
    """Settings that differ in this suite."""
    grid: Annotated[list[ImageBlock], Field(min_length=1)]
    """Blocks of runs. Every combination of a block's lists is a run."""


class ImageDefinition(MethodsDefinition):
    """A benchmark that trains on some environments of an image set and evaluates on the held-out
    ones, with DomainBed's protocol.
    """

    sets: str
    """File in the benchmark's folder that defines the image sets."""
    set_tables: list[str]
    """The tables of each set."""
    set_figures: list[str]
    """The figures of each set."""
    training: ImageTraining
    """The training settings of every run. A suite may override them."""


class ImageSource(ExplicitNulls):
    """The source of an image set."""

    exactly_one_of = ("folder", "mnist")
    key_requirements = (("mnist", "digits"), ("hub", "folder"))
    folder: str | None = None
    """Name of the set's folder below data_root. Its layout is DomainBed's:
    `<environment>/<class>/<image>`.
    """
    hub: str | None = None
    """Repository on the hub, with columns for image, domain and label."""
    revision: str | None = None
    """Commit on the hub; null for the newest."""
    mnist: Literal["rotated", "colored"] | None = None
    """MNIST digits, rotated or coloured as in DomainBed."""
    digits: Literal["all", "package"] | None = None
    """Digits: all 70,000 (`MNIST/raw` below data_root), or the 5,000 that a package contains."""


class ImageTask(Strict):
    """The settings of an image set that determine the results of a run."""

    domainbed: str
    """DomainBed's name of the set, which determines seeds and random hyper-parameters. If DomainBed
    lacks the set, any name is valid.
    """
    source: ImageSource
    """Source of the images."""


class RunImageSet(ImageTask):
    """The image set in a run's spec."""

    name: str
    """Name in sets.yaml."""
    environments: list[Annotated[tuple[str, str | int | float], Field(strict=False)]]
    """Pairs of short name and name on disk, in DomainBed's order (JSON objects have no order)."""


class SetEntry(ImageTask, Entry):
    """One image set of ``sets.yaml``."""

    environments: Annotated[dict[str, str | int | float], Field(min_length=3)]
    """Names on disk by short name, in DomainBed's order. MNIST's variants have angles (rotated) or
    probabilities (coloured) instead.
    """
    unit: str = ""
    """Unit of the environments if their names are numbers. Tables print it after the number."""
    eval_every: Count
    """Steps between evaluations in DomainBed."""
    images: Count | None = optional()
    """Number of images according to the set's makers."""
    download_instructions: str
    """Instructions to download the set."""

    def spec(self, name: str) -> dict[str, Any]:
        """Return the content of :class:`RunImageSet`, for the spec of a run on this set."""
        settings = self.model_dump(include=set(ImageTask.model_fields))
        # pairs keep the order of the environments; a JSON object would lose it
        environments = [list(pair) for pair in self.environments.items()]
        return {"name": name, **settings, "environments": environments}


class SetFile(Strict):
    """The content of ``sets.yaml``: image sets of several environments."""

    sets: Annotated[dict[Key, SetEntry], Field(min_length=1)]
    """The sets, by name."""


class ImageSpec(RunSpec):
    """All settings that determine the results of a run on an image set."""

    task: RunImageSet
    """The image set."""
    ood: list[RunImageSet]
    """Always empty. Held-out environments belong to the image set itself."""
    test_envs: list[Whole]
    """Numbers of the held-out environments, from 0 in the order of the image set."""
    hparams_seed: Whole
    """DomainBed's hparams_seed: 0 for the defaults, another number for random hyper-parameters."""
    hparams: HParams
    """All hyper-parameters."""
    sweep: str
    """Digest of the settings that all runs of a method share. It is part of the algorithm's name in
    ``results.jsonl``.
    """
    training: ImageTraining
    """The training settings."""
    data_seed: int
    """DomainBed's ``seed``. It determines the order of digits and the random flips of MNIST's
    variants.
    """

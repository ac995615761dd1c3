"""The one training loop: transformers' Trainer, with what routed models add to it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

import emoe
from benchmarks.harness.classifier import Classifier, load_trained_, trained_state
from benchmarks.harness.files import write_json
from emoe.errors import EMoEError

_WEIGHTS = "trained.safetensors"
_CHECKPOINT_FILES = (_WEIGHTS, "optimizer.pt", "scheduler.pt", TRAINER_STATE_NAME)


class TrainedSetError(EMoEError):
    """What the optimiser trains is not what the run's method says."""


class Stopwatch(TrainerCallback):
    """Time spent in steps, without evaluation and checkpoints, and in evaluation; kept beside every checkpoint."""

    _FILE = "stopwatch.json"

    def __init__(self) -> None:
        self.seconds, self.steps, self.evaluation, self._start = 0.0, 0, 0.0, 0.0

    @property
    def step_seconds(self) -> float:
        """Mean over the steps."""
        return self.seconds / max(self.steps, 1)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's count."""
        if (checkpoint / self._FILE).exists():
            saved = json.loads((checkpoint / self._FILE).read_text())
            self.seconds, self.steps, self.evaluation = saved["seconds"], saved["steps"], saved["evaluation"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        content = {"seconds": self.seconds, "steps": self.steps, "evaluation": self.evaluation}
        write_json(folder / self._FILE, content)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # several sets are evaluated one after the other, each with a time of its own
        self.evaluation += sum(value for name, value in (metrics or {}).items() if name.endswith("_runtime"))

    on_predict = on_evaluate

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


def precision_here(asked: str) -> str:
    """The arithmetic that this machine computes in: mixed only on an accelerator."""
    return asked if torch.cuda.is_available() else "fp32"


def quiet_arguments(folder: Path, precision: str, **options: Any) -> TrainingArguments:
    """Trainer's arguments for one quiet run on one device."""
    found = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        **options,
    )
    if found.n_gpu > 1:
        found._n_gpu = 1  # Trainer's DataParallel would multiply the batch size; one run takes one GPU
    return found


class RoutedTrainer(Trainer):
    """Trainer for routed and adapted models.

    Adds the balance loss to the task's, orders the rows by seed and epoch, gives some parameters a share of the learning
    rate, trains what it shall and nothing else, and keeps that in its checkpoints.
    """

    # every loss here is the mean of a batch, so that the Trainer divides by the number of batches of a step
    loss_is_scaled_for_ga = False

    def __init__(
        self, *, order: Sampler[Any], classifier: Classifier, lora: Mapping[str, Any] | None, **kwargs: Any
    ) -> None:
        super().__init__(model=classifier.model, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._order, self._classifier = order, classifier
        self._slow_share: float = lora["rest_rate"] if lora else 1.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        names = {id(parameter): name for name, parameter in self._trained.named_parameters()}
        taken = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
        if taken != self._classifier.trained:
            odd = sorted(taken ^ self._classifier.trained)
            raise TrainedSetError(
                f"{len(odd)} parameters are trained that shall not be, or the other way round, among them '{odd[0]}'"
            )
        slow = {place for place, name in names.items() if name in self._classifier.slow}
        for group in list(optimizer.param_groups) if slow else []:
            members = group["params"]
            group["params"] = [parameter for parameter in members if id(parameter) not in slow]
            theirs = [parameter for parameter in members if id(parameter) in slow]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": group["lr"] * self._slow_share})
        return optimizer

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        extra = emoe.aux_loss(model) if model.training else 0.0
        if not isinstance(extra, Tensor):
            return result
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    @property
    def _trained(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self._trained), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_(self._trained, Path(resume_from_checkpoint) / _WEIGHTS)

    def _load_best_model(self) -> None:
        load_trained_(self._trained, Path(str(self.state.best_model_checkpoint)) / _WEIGHTS)


class RetieGates(TrainerCallback):
    """Lets running gates follow the keys after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            emoe.retie_gates_(model)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_complete(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes its state last
    if not all((checkpoint / name).exists() for name in _CHECKPOINT_FILES):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except json.JSONDecodeError:
        return False
    return True


def plain_logits(predictions: Any) -> NDArray[Any]:
    """The logits of what a model gave back."""
    return cast(NDArray[Any], predictions[0] if isinstance(predictions, tuple) else predictions)


def finite(loss: float) -> float | None:
    """A loss, or None for that of a model that diverged: JSON knows no other numbers, and means shall not."""
    return loss if math.isfinite(loss) else None

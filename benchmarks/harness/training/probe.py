"""What a run says of itself that barely moves between machines and shows a swapped method at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import emoe
from benchmarks.harness.base.files import write_json
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.training.processes import is_sharded, world_size
from benchmarks.harness.training.undisturbed import undisturbed
from emoe.layer import routed_layers

FIRST_STEPS = 8
_FIXED_ROWS = 4


def fixed_rows(rows: Any) -> list[Any]:
    """The first rows of a set, for :meth:`Probe.look`."""
    return [rows[place] for place in range(min(len(rows), _FIXED_ROWS))]


@dataclass(frozen=True)
class LogitsSummary:
    """A checksum of logits that tolerates another order of summation.

    Attributes:
        mean: of all logits.
        deviation: their standard deviation.
        rms: root of their mean square.
        projection: on a fixed random direction, by which an exchange of two logits is seen.
    """

    mean: float
    deviation: float
    rms: float
    projection: float

    @classmethod
    def of(cls, logits: Tensor) -> LogitsSummary:
        """Summarise logits of any shape."""
        flat = logits.detach().double().flatten().cpu()
        source = torch.Generator().manual_seed(derive_seed("probe", len(flat)))
        # integers are drawn alike by every processor, normal numbers are not
        direction = torch.randint(-1000, 1001, (len(flat),), generator=source).double() / 577  # of variance 1
        return cls(
            float(flat.mean()),
            float(flat.std(correction=0)),
            float(flat.square().mean().sqrt()),
            float(flat @ direction / max(len(flat), 1) ** 0.5),
        )


class Probe(TrainerCallback):
    """Collects the loss of the first batches, and what a fixed batch gives before training; kept beside every checkpoint."""

    FILE = "probe.json"

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._logits: LogitsSummary | None = None
        self._loads: dict[str, list[int]] = {}

    @torch.no_grad()
    def look(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Summarise the logits of a batch and count which experts it uses; of a model that is spread over processes nothing.

        Neither the weights nor any random state are changed.

        Args:
            model: converted, not yet trained.
            batch: what the model is called with; labels are left out.
        """
        if is_sharded():
            return
        if torch.cuda.is_available() and world_size() == 1 and not getattr(model, "is_quantized", False):
            model.to("cuda")  # where it is trained
        given = {name: value for name, value in batch.items() if name != "labels"}
        inputs = send_to_device(given, next(model.parameters()).device)
        with undisturbed(model):
            model.eval()
            if routed_layers(model):
                with emoe.record_routing(model) as record:
                    logits = model(**inputs)["logits"]
                self._loads = {str(layer): found.loads.tolist() for layer, found in record.layers.items()}
            else:
                logits = model(**inputs)["logits"]
        self._logits = LogitsSummary.of(logits)

    def note(self, loss: Tensor) -> None:
        """Take the loss of a training batch."""
        if len(self._losses) < FIRST_STEPS:
            self._losses.append(float(loss))

    def resume(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint keeps."""
        self._losses = [float(loss) for loss in json.loads((checkpoint / self.FILE).read_text())]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # as text: the loss of a model that diverged is no number that JSON knows
            write_json(
                Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / self.FILE, self._written_losses()
            )

    def _written_losses(self) -> list[str]:
        return [repr(loss) for loss in self._losses]

    def summary(self) -> dict[str, Any]:
        """The ``probe`` part of ``metrics.json``: ``losses`` as text with all digits, ``logits`` and ``loads`` by layer."""
        found: dict[str, Any] = {"losses": self._written_losses(), "loads": self._loads}
        return found | ({"logits": asdict(self._logits)} if self._logits else {})

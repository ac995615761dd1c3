"""Register the kinds of benchmarks under the values of ``kind`` in benchmark.yaml."""

from benchmarks.domainbed.grid import DomainBenchmark
from benchmarks.glue_ood.grid import EvaluationBenchmark
from benchmarks.harness.config.benchmark import KINDS
from benchmarks.llama.grid import InstructionBenchmark
from benchmarks.modularity.grid import ModularityBenchmark
from benchmarks.multitask.grid import MultitaskBenchmark
from benchmarks.speed.grid import MeasurementBenchmark
from benchmarks.text.grid import TextBenchmark

KINDS.update(
    text=TextBenchmark,
    glue_ood=EvaluationBenchmark,
    multitask=MultitaskBenchmark,
    modularity=ModularityBenchmark,
    domainbed=DomainBenchmark,
    llama=InstructionBenchmark,
    speed=MeasurementBenchmark,
)

"""Where things are, below the working directory, and the environment variables that say otherwise."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "benchmarks"
SCHEMAS = BENCHMARKS / "schemas"
CONFIG = ROOT / "config"
REFERENCE = ROOT / "results" / "reference"

# outputs, relative to the working directory
RESULTS = Path("results")
RUNS = RESULTS / "runs"
LOCK, LOG, WEIGHTS = ".lock", "log.txt", "model/trained.safetensors"  # in a run's folder
PARTITIONS = Path("resources/partitions")
PACKAGES = Path("resources/packages")
MODELS = Path("resources/models")
IMAGES = Path("resources/images")
TOKENS = Path("resources/tokens")
PREFIXES = Path("resources/prefixes")
QUESTIONS = Path("resources/questions")

# set from the configuration by the workflow, or by hand
DATA_ROOT = "EMOE_DATA_ROOT"
MODEL_ROOT = "EMOE_MODEL_ROOT"
PLAN = "EMOE_PLAN"
OVERRIDES = "EMOE_OVERRIDES"
TRACKING_URI = "MLFLOW_TRACKING_URI"

"""`python -m benchmarks scaling`: plans full fine-tuning of models from 2B to 72B on 1 to 64 GPUs, see `liger_jax.plan`."""

import dataclasses
import json
from pathlib import Path

from benchmarks.environment import RESULTS
from benchmarks.model import model_name
from liger_jax.files import atomic_write
from liger_jax.options import PlanOptions
from liger_jax.plan import as_record, make_plans, read_config

MODELS = ("qwen2_vl_2b", "qwen3_vl_4b", "qwen2_vl_7b", "qwen2_5_vl_32b", "qwen2_vl_72b")
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Plans training of each model on each number of GPUs, 4 sequences per GPU. Needs no GPU. Writes scaling.json."""

    models: tuple[str, ...] = MODELS
    """Presets of `QwenVLConfig`."""
    gpus: tuple[int, ...] = GPUS
    """Numbers of GPUs."""
    gpu: str = "H100"
    """Kind of GPU, see `liger-jax plan --help`."""
    results: Path = RESULTS
    """Folder of the result file."""

    def run(self) -> Path:
        records = []
        for model in self.models:
            for count in self.gpus:
                options = PlanOptions(gpus=count, gpu=self.gpu)
                plan = make_plans(read_config(model), options)[0]
                records.append({"model": model_name(model), "gpus": count, "gpu": self.gpu, **as_record(plan)})
                print(records[-1], flush=True)
        file = self.results / "scaling.json"
        atomic_write(file, json.dumps(records, indent=1) + "\n")
        return file

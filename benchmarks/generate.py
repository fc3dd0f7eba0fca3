"""`python -m benchmarks generate`: generation with a model of real size, compared with transformers.

The time per token is the difference between the times for 128 tokens and for one, divided by 127.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import work
from benchmarks.environment import RESULTS
from benchmarks.model import ModelCase, Size, device_peak, place_batch
from liger_jax import QwenVL, generate, prepare
from liger_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generate:
    """Measures 128 new tokens after a prompt of 2048 tokens with an image of 64 x 64 patches, bfloat16.

    Writes model.json.
    """

    size: Size = "2b"
    """The model: 2b and 7b are Qwen2-VL. Its weights are random."""
    rows: tuple[int, ...] = (1, 16)
    """Batch sizes. Each is one measurement."""
    peers: bool = True
    """Also measure transformers with a dynamic and a static cache on the same weights and prompts, if torch is installed.
    Ignored with --length."""
    length: int | None = None
    """Tokens of prompt and answer together, at most the model's number of positions (32768 for Qwen2-VL); by default, the
    prompt has 2048 tokens."""
    mesh: tuple[str, ...] = ()
    """Axes of a mesh of several GPUs, such as tensor=2, without peers. The rows are those of all GPUs together."""
    checkpoints: Path | None = None
    """Folder that keeps the checkpoint with random weights for other measurements of the same size."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        shortest = work.IMAGE_TOKENS + work.TEXT_TOKENS + work.NEW_TOKENS
        if self.length is not None and self.length < shortest:
            raise UserError(f"length is {self.length}; expected at least {shortest}, for the image and the new tokens")
        labels = {} if self.length is None else {"prompt_tokens": self.prompt_tokens}
        peers = self.peers and self.length is None
        case = ModelCase(
            "generate",
            self.size,
            self.rows,
            self.results,
            labels,
            peers=peers,
            mesh=self.mesh,
            checkpoints=self.checkpoints,
        )
        return case.run(self._measure)

    @property
    def prompt_tokens(self) -> int:
        return work.LENGTH if self.length is None else self.length - work.NEW_TOKENS

    def _measure(self, model: QwenVL, batch_size: int) -> dict:
        return time_generation(model, work.sequences(model.config, batch_size, self.prompt_tokens))


def time_generation(model: QwenVL, arrays: dict) -> dict:
    """Times prefill and new tokens on prompts in Hugging Face's layout."""
    arrays = {name: value for name, value in arrays.items() if name != "labels"}
    batch = place_batch(model, prepare(model.config, **arrays))

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        tokens = generate(model, batch, max_new_tokens=new_tokens, eos_token_id=())
        jax.block_until_ready(tokens)
        return time.perf_counter() - start

    first = {count: seconds(count) for count in (1, work.NEW_TOKENS)}
    again = {count: float(np.median([seconds(count) for _ in range(5)])) for count in first}
    return {
        "prefill_ms": again[1] * 1e3,
        "ms_per_token": (again[work.NEW_TOKENS] - again[1]) / (work.NEW_TOKENS - 1) * 1e3,
        "tokens_per_s": len(arrays["input_ids"]) * work.NEW_TOKENS / again[work.NEW_TOKENS],
        "compile_s": sum(first.values()) - sum(again.values()),
        "peak_gib": device_peak(),
        "new_tokens": work.NEW_TOKENS,
    }

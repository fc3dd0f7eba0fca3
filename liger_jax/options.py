"""Options of a training run: plain values, defined once for the library, the command line and a run's record.

The functions that take these options check their values. `liger-jax --help` imports this module, which is therefore light,
and shows the docstring of each field, which therefore fits on one line.
"""

import dataclasses
from pathlib import Path
from typing import Literal

Part = Literal["vision", "merger", "text"]
Unroll = Literal["auto", "none", "vision", "all"]
Remat = Literal["auto", "none", "dots", "narrow", "attention", "full"]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How conversations become batches."""

    batch_size: int = 8
    """Conversations per training step; with --pack, sequences per step."""
    accumulate: int = 1
    """Compute each batch in this many parts, one after the other, and sum their gradients: saves memory, same result."""
    pack_length: int | None = None
    """Pack conversations into sequences of this many tokens."""
    group_by_length: bool = False
    """Batch conversations of similar size together, which reduces padding."""
    length: int | None = None
    """Tokens per sequence; by default, each batch uses its own bucket."""
    patches: int | None = None
    """Image patches per sequence, a multiple of 4, or 64 for Qwen2.5-VL; by default, each batch uses its own bucket."""
    skip_broken: bool = False
    """Skip broken and oversized conversations with a warning instead of stopping."""
    workers: int | None = None
    """Number of processes that load images; 0 uses a thread. By default up to 4, leaving half of the cores free."""
    seed: int = 0
    """Seed for the order of the data, the initial weights of LoRA and stochastic rounding."""


@dataclasses.dataclass(frozen=True)
class LayerExecution:
    """How the layers of the vision tower and the language model run."""

    remat: Remat = "none"
    """Activations to recompute in the backward pass, from none (most memory) to full; auto: the fastest choice that fits."""
    unroll: Unroll = "none"
    """Layers to unroll, not scan, for faster steps and longer compilation; auto: vision or all, or none with remat full."""

    def resolve(self, remat: Remat, *, long_run: bool = False) -> "LayerExecution":
        """Returns the execution with a remat policy, and with `unroll` chosen if it is "auto".

        With remat "full", a scan is as fast, and needs 2 GiB less for 16 rows of the 2B. In a long run, the faster steps of
        unrolled layers make up for their compilation.
        """
        chosen: Unroll = "none" if remat == "full" else "all" if long_run else "vision"
        return LayerExecution(remat, chosen if self.unroll == "auto" else self.unroll)

    @property
    def unrolled(self) -> Unroll:
        """Which layers are unrolled."""
        return self.resolve(self.remat).unroll

    def unrolls(self, tower: Literal["vision", "text"]) -> bool:
        """Returns whether the layers of a tower are unrolled."""
        return self.unrolled == "all" or self.unrolled == tower


DEFAULT_EXECUTION = LayerExecution()


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The optimizer: AdamW with linear warmup and cosine decay."""

    learning_rate: float = 1e-5
    """Peak learning rate, reached after warmup and followed by a cosine decay to 0."""
    vision_learning_rate: float | None = None
    """Peak learning rate of the vision tower; by default, equal to learning_rate."""
    merger_learning_rate: float | None = None
    """Peak learning rate of the merger between vision tower and language model; by default, equal to learning_rate."""
    freeze: tuple[Part, ...] = ()
    """Parts of the model that are not trained."""
    weight_decay: float = 0.0
    """Weight decay of matrices and embeddings; norms and biases never decay."""
    warmup: float = 0.03
    """Fraction of the steps over which the learning rate rises."""
    master_weights: bool = False
    """Keep float32 copies of the weights and float32 moments, and compute in bfloat16."""
    stochastic_rounding: bool = True
    """Round bfloat16 weights at random to keep small updates; no effect on float32 weights or with --master-weights."""
    max_skipped_updates: int = 3
    """Stop after this many steps in a row whose loss or gradient norm is not finite; their updates are left out."""


@dataclasses.dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and which are kept."""

    save_every: int = 500
    """Steps between checkpoints."""
    max_to_keep: int | None = 3
    """Number of latest checkpoints to keep; None keeps all."""
    asynchronous: bool = True
    """Write checkpoints while training continues, which needs host memory for the whole state."""
    generation_config: Path | None = None
    """The model's generation_config.json, copied next to the checkpoints if the file exists."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the model is evaluated on held-out conversations, at each checkpoint."""

    eval_generate: int = 0
    """Number of held-out conversations to answer as well; answers.jsonl compares generated and expected answers."""
    max_new_tokens: int = 64
    """Maximum length of these answers, in tokens."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The training run to plan, and the GPUs for it."""

    gpus: int = 8
    """Number of GPUs."""
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"
    """Kind of GPU."""
    memory: float | None = None
    """Memory per GPU in GiB, of which 95 % can be used; by default that of the kind of GPU."""
    batch_size: int | None = None
    """Sequences per training step, over all GPUs; by default 4 per GPU."""
    length: int = 2048
    """Tokens per sequence, including those of its image."""
    patches: int = 4096
    """Image patches per sequence; a token of an image is 4 patches."""
    remat: Remat = "auto"
    """Activations to recompute; auto: the fastest choice that fits."""
    data: int | None = None
    """GPUs that each hold all weights; without any of these four flags, several meshes are compared."""
    fsdp: int | None = None
    """GPUs that split the weights and the batch."""
    sequence: int | None = None
    """GPUs that split the positions of each sequence."""
    tensor: int | None = None
    """GPUs that split attention heads and MLPs."""
    lora: int | None = None
    """Train only LoRA matrices of this rank."""
    freeze: tuple[Part, ...] = ()
    """Parts of the model that are not trained."""
    master_weights: bool = False
    """Keep float32 copies of the weights and float32 moments."""
    gpus_per_host: int = 8
    """GPUs that NVLink connects."""
    nvlink: float = 310.0
    """Rate between GPUs of a host while a step runs, in GB/s per GPU."""
    network: float = 40.0
    """Rate between hosts, in GB/s per GPU."""

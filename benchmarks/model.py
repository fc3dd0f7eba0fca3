"""The common part of `python -m benchmarks train | generate`: a model of real size, its peers, and the file of results.

liger-jax and transformers get the same arrays and the same checkpoint, which transformers writes with random weights. Cases
without a peer (packed images of many sizes, LoRA, master weights, long prompts) use random weights made by liger-jax.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax

from benchmarks.environment import GIB, check_for_gpu, device_kind, first_line, versions_of
from benchmarks.record import OURS, record_result, summary
from convert import from_hf
from liger_jax import Batch, QwenVL, QwenVLConfig
from liger_jax.errors import UserError
from liger_jax.model.sharding import MESH_AXES, get_mesh, make_mesh, shard_batch
from pallas_kernels import _fa4, _pallas

Size = Literal["2b", "7b", "qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b"]
PACKAGES = ("jax", "flax", "optax")
LARGE_LOSS_DIFFERENCE = 1e-2
TORCH_ALONE = {"JAX_PLATFORMS": "cpu"}  # environment of a process in which torch has the GPU to itself
PEER_OPTIONS = {
    "train": (["--liger"], ["--liger", "--checkpointing"]),
    "generate": (["--cache", "dynamic"], ["--cache", "static"]),
}


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A benchmark of a model at several batch sizes, with or without peers."""

    benchmark: str
    """"train", "train mixed" or "generate"."""
    size: Size
    batch_sizes: Sequence[int]
    directory: Path
    """Folder of model.json."""
    labels: dict = dataclasses.field(default_factory=dict)
    """Fields that distinguish the case from others of the same benchmark."""
    peers: bool = False
    length: int | None = None
    """Tokens of a sequence, for the peers; None for `work.LENGTH`."""
    mesh: Sequence[str] = ()
    """Axes of the mesh and their sizes, such as ["fsdp=2"]; without any, one GPU. Meshes have no peers."""
    checkpoints: Path | None = None
    """Folder that keeps the checkpoint for other benchmarks; None: the checkpoint is deleted."""
    consumes_model: bool = False
    """Whether a measurement donates the model's arrays, so that the next one needs a new model."""

    def run(self, measure: Callable[[QwenVL, int], dict]) -> Path:
        """Measures the peers, then measure(model, batch size) in ascending order. Returns the file of results.

        Raises:
            UserError: A mesh that is not one of the model's, or that needs more GPUs than there are.
        """
        file = self.directory / "model.json"
        sizes = parse_mesh(self.mesh)
        common = {
            "package": OURS,
            "model": model_name(self.size),
            "devices": math.prod(sizes.values()),
            **({"mesh": " ".join(self.mesh)} if self.mesh else {}),
            "versions": versions_of(PACKAGES),
            **({"attention": "fa4"} if fa4_is_used() else {}),
        }
        with peer_checkpoint(self.size, self.peers and not self.mesh, self.checkpoints) as checkpoint:
            # The peers run first, while JAX has not yet reserved the GPU's memory.
            losses = self._run_peers(checkpoint, file) if checkpoint else {}
            batch_sizes = sorted({*self.batch_sizes, *losses})
            common |= {"device": device_kind(), **memory_limit()}
            mesh = make_mesh(**sizes)
            model = None
            for batch_size in batch_sizes:  # peak memory is that of the process, so the largest comes last
                if model is None and checkpoint:
                    model, conversion = load(checkpoint, mesh)
                    if batch_size == batch_sizes[0]:
                        without_attention = {name: value for name, value in common.items() if name != "attention"}
                        record_result(file, {**without_attention, "what": "convert", **conversion})
                elif model is None:
                    model = QwenVL.init(load_preset(self.size), mesh=mesh)
                case = {**common, "what": self.benchmark, **self.labels, "rows": batch_size}
                case |= {} if checkpoint else {"without_peers": True}
                earlier_peak = device_peak()
                try:
                    result = measure(model, batch_size)
                except Exception as error:
                    print(summary({**case, "error": first_line(error)}), flush=True)
                    break  # a larger batch would also fail
                if result.get("peak_gib", 0) <= earlier_peak:  # that of an earlier case, or not reported
                    result = {name: value for name, value in result.items() if name != "peak_gib"}
                record_result(file, {**case, **result})
                _compare_losses(result.get("losses", []), losses.get(batch_size, []))
                if self.consumes_model:
                    model = None
        return file

    def _run_peers(self, checkpoint: Path, file: Path) -> dict[int, list[float]]:
        """Measures transformers at each batch size, or at half of it, and so on, where it runs out of memory.

        Returns the losses by batch size, for every batch size that was tried.
        """
        losses: dict[int, list[float]] = {}
        remaining = list(self.batch_sizes)
        length = [] if self.length is None else ["--length", str(self.length)]
        while remaining:
            batch_size = remaining.pop(0)
            results = [
                result
                for options in PEER_OPTIONS[self.benchmark]
                for result in _run_peer(self.benchmark, checkpoint, batch_size, [*options, *length])
            ]
            for result in results:
                record_result(file, result)
            losses[batch_size] = next((result["losses"] for result in results if "losses" in result), [])
            half = batch_size // 2
            if half and results and all("error" in result for result in results) and half not in (*losses, *remaining):
                remaining.append(half)
        return losses


def parse_mesh(axes: Sequence[str]) -> dict[str, int]:
    """Returns the size of each axis of a mesh.

    Raises:
        UserError: An axis is not NAME=SIZE.

    Example:
        >>> parse_mesh(["fsdp=2", "tensor=4"])
        {'fsdp': 2, 'tensor': 4}
    """
    parts = [re.fullmatch(rf"({'|'.join(MESH_AXES)})=([1-9]\d*)", axis) for axis in axes]
    if None in parts:
        raise UserError(f"mesh is {list(axes)}; expected sizes of axes among {MESH_AXES}, such as fsdp=2")
    return {part[1]: int(part[2]) for part in parts if part}


def preset_name(size: str) -> str:
    """Returns the name of the preset of `QwenVLConfig`; a bare size is Qwen2-VL's.

    Example:
        >>> preset_name("2b"), preset_name("qwen3_vl_4b")
        ('qwen2_vl_2b', 'qwen3_vl_4b')
    """
    return size if "_" in size else f"qwen2_vl_{size}"


def load_preset(size: str) -> QwenVLConfig:
    return getattr(QwenVLConfig, preset_name(size))()


def model_name(size: str) -> str:
    """Returns the name of a model in the results.

    Example:
        >>> model_name("2b"), model_name("qwen2_5_vl_3b")
        ('qwen2-vl-2b', 'qwen2.5-vl-3b')
    """
    return preset_name(size).replace("2_5", "2.5").replace("_", "-")


def fa4_is_used() -> bool:
    """Returns whether `attention` picks FlashAttention-4 on this machine."""
    capability = _pallas.compute_capability()
    return capability is not None and capability >= 9.0 and _fa4.import_problem() is None


def _compare_losses(losses: Sequence[float], peer_losses: Sequence[float]) -> None:
    """Warns if the first loss differs from that of a peer.

    Later losses depend on how the optimizers round the weights: this one stochastically, torch's to the nearest.
    """
    for loss, peer_loss in zip(losses[:1], peer_losses[:1], strict=False):
        if abs(loss - peer_loss) > LARGE_LOSS_DIFFERENCE:
            print(f"  WARNING: the first losses differ: {loss}, {peer_loss}", flush=True)


# ---- measuring --------------------------------------------------------------------------------------------------------


class HostMemory:
    """Measures by how many bytes this process's resident memory rises while the block runs, in `above_start`."""

    def __enter__(self):
        self.start = self.peak = self.resident()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.01)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.above_start = max(self.peak, self.resident()) - self.start

    @staticmethod
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def device_peak() -> float:
    """Returns the largest device memory that this process has used so far, in GiB; 0 where the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB


def memory_limit() -> dict[str, float]:
    """Returns the device memory that JAX may use, in GiB, if XLA_PYTHON_CLIENT_MEM_FRACTION sets it: as on a smaller GPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ or "bytes_limit" not in stats:
        return {}
    return {"memory_limit_gib": round(stats["bytes_limit"] / GIB, 1)}


def load(checkpoint: Path, mesh) -> tuple[QwenVL, dict]:
    """Returns the converted checkpoint, and the time and host memory of the conversion."""
    # The first program sets up the device, which takes gigabytes of host memory that do not belong to the conversion.
    jax.block_until_ready(jax.jit(lambda: 0)())
    start = time.perf_counter()
    with HostMemory() as host:
        model = jax.block_until_ready(from_hf(checkpoint, mesh=mesh))
    return model, {"seconds": time.perf_counter() - start, "host_gib_above_start": host.above_start / GIB}


def place_batch(model: QwenVL, batch: Batch) -> Batch:
    """Returns the batch on the model's devices, so that its transfer is not timed."""
    return jax.device_put(shard_batch(batch, get_mesh(model)))


# ---- peers ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_checkpoint(size: str, peers: bool, kept: Path | None = None) -> Iterator[Path | None]:
    """Yields a folder with random weights written by transformers; None without peers or without torch.

    The folder is in `kept`, or deleted at the end.
    """
    if not peers or importlib.util.find_spec("torch") is None:
        yield None
        return
    check_for_gpu()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = (kept or Path(folder)) / model_name(size)
        if not checkpoint.exists():
            unfinished = checkpoint.with_name(checkpoint.name + ".unfinished")
            command = [sys.executable, "-m", "benchmarks.peer_model", "write", size, unfinished]
            subprocess.run(command, check=True, env=os.environ | TORCH_ALONE)
            unfinished.rename(checkpoint)
        yield checkpoint


def _run_peer(benchmark: str, checkpoint: Path, batch_size: int, options: Sequence[str]) -> list[dict]:
    """Measures transformers in a separate process, so that it has all GPU memory. Returns its result, if there is one."""
    command = [sys.executable, "-m", "benchmarks.peer_model", benchmark, checkpoint, str(batch_size), *options]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | TORCH_ALONE)
    # other lines are printed by other packages
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"package"')]

"""The folder of a training run: its layout, the record of its data and options, and the step to resume from.

run.json               data, tokenizer and options of the run
100/, 200/, ...        checkpoints
300.damaged/           a checkpoint that was damaged when the run resumed
config.json, ...       the model's configuration and processor, so that the folder can be loaded like any model
metrics.jsonl          a line per training step and per evaluation
tensorboard/           the same values as curves
answers.jsonl          generated answers to held-out questions
.lock                  names the process that trains

If several processes train together, process 0 alone reads and writes these files, except for the arrays of checkpoints: each
process writes those on its devices. All processes must see the same folder.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liger_jax import processes
from liger_jax.checkpoint import remove_unfinished, saved_steps
from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import (
    GENERATION_CONFIG,
    atomic_write,
    disk_errors,
    fingerprint,
    is_empty_folder,
    lock_folder,
    read_json_object,
)
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import QwenVL
from liger_jax.model.lora import lora_config
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, Saving
from liger_jax.train.metrics import truncate_after, was_evaluated

RECORD = "run.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ANSWERS = "answers.jsonl"

# Entries of run.json that may change when a run is resumed. All others determine its batches or its weights.
MAY_CHANGE = (
    *("steps", "optimization", "execution", "saving", "evaluation"),
    *("batching.accumulate", "batching.skip_broken", "batching.workers"),
)
# Options within these that decide which arrays the optimizer's state has.
MUST_STAY = ("optimization.freeze", "optimization.master_weights")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a run, as recorded in run.json. `optimization` is None for a user's own optimizer."""

    steps: int
    optimization: Optimization | None
    batching: Batching
    execution: LayerExecution
    saving: Saving
    evaluation: Evaluation


def make_record(
    options: RunOptions, model: QwenVL, processor: Processor, conversations: Sequence[Conversation]
) -> dict[str, Any]:
    """Returns the content of run.json."""
    vocabulary = processor.tokenizer.get_vocab()
    lora = lora_config(model)
    record = {
        "conversations": len(conversations),
        "data": fingerprint(conversations),
        "tokenizer": fingerprint([sorted(vocabulary, key=vocabulary.get), processor.tokenizer.chat_template]),
        "images": vars(processor.image),
        "videos": vars(processor.video),
        "lora": lora and dataclasses.asdict(lora),
        **dataclasses.asdict(options),
    }
    return json.loads(json.dumps(record, default=str))  # tuples become lists and paths strings, as in the file


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a new run, or of a run to resume. Returned by `open_run`.

    Attributes:
        folder: the folder, which may not exist yet.
        record: the content of its run.json.
        resumes: whether the folder has a checkpoint.
        start: step to resume from: that of the latest checkpoint, or of the one that was restored; 0 for a new run.
    """

    folder: Path
    record: Mapping[str, Any]
    resumes: bool
    start: int

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    @property
    def tensorboard(self) -> Path:
        return self.folder / TENSORBOARD

    @property
    def answers(self) -> Path:
        return self.folder / ANSWERS

    def needs_evaluation(self, options: RunOptions) -> bool:
        """Returns whether the checkpoint to resume from should have been evaluated, but was not.

        Either the run was interrupted during the evaluation, or it had no held-out data before.
        """
        due = self.start == options.steps or self.start % options.saving.save_every == 0
        return self.resumes and due and not processes.from_first(lambda: was_evaluated(self.metrics, self.start))

    def begin(self, processor: Processor, *, generation_config: Path | None, last_answers: int) -> None:
        """Writes the record, the processor and generation_config.json; drops the answers of steps after `last_answers`."""
        if not processes.is_first():
            return
        remove_unfinished(self.folder)
        write_record(self.folder, self.record)
        processor.save_pretrained(self.folder)
        target = self.folder / GENERATION_CONFIG
        if generation_config is not None and generation_config.is_file() and not target.exists():
            atomic_write(target, generation_config.read_bytes())
        truncate_after(self.answers, last_answers)


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Locks the folder of a run, see `lock_folder`. Processes that train together have one lock."""
    with contextlib.ExitStack() as stack:
        with processes.agree():
            stack.enter_context(lock_folder(folder) if processes.is_first() else disk_errors(folder))
        yield


def open_run(folder: Path, record: Mapping[str, Any]) -> Run:
    """Opens a folder for a new run, or to resume the run in it. Writes nothing.

    Processes that train together open it together, and compare their records.

    Args:
        folder: a missing or empty folder, or the folder of a run.
        record: as returned by `make_record`.

    Raises:
        AlreadyExistsError: the folder has files, but no run.
        UserError: the run in it has other data or options, or more steps; or another process has other data or options.
    """
    first, *records = processes.exchange(record)
    for process, own in enumerate(records, 1):
        if differences := _differences(first, own):
            listed = "; ".join(
                f"{name} is {value!r}, and {wanted!r} in process 0" for name, wanted, value in differences
            )
            raise UserError(f"process {process} has other settings: {listed}; expected those of process 0")
    start = processes.from_first(lambda: find_start(folder, record))
    return Run(folder, record, resumes=start is not None, start=start or 0)


def find_start(folder: Path, record: Mapping[str, Any]) -> int | None:
    """Returns the step of the latest checkpoint, or None for a new run. Raises as `open_run` does."""
    if not is_run(folder) and folder.exists() and not is_empty_folder(folder):
        raise AlreadyExistsError(
            f"{folder} has files and no training run; expected an empty folder, or a run to resume"
        )
    steps = saved_steps(folder)
    if not steps:
        return None
    check_record(folder, record)
    start = steps[-1]
    if start > record["steps"]:
        raise UserError(
            f"steps is {record['steps']}; expected at least {start}, the latest step of the run in {folder}"
        )
    return start


def is_run(folder: Path) -> bool:
    """Returns whether a run was started in a folder, even if it has no checkpoint yet."""
    return (folder / RECORD).is_file()


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / RECORD, json.dumps(record, indent=2) + "\n")


def check_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Compares a record with that of the run in a folder, except for the options that may change.

    Raises:
        UserError: the records differ, and the message names all differences; or the stored record is damaged.
    """
    differences = _differences(read_json_object(folder / RECORD), record)
    refused = [
        (name, before, after)
        for name, before, after in differences
        if not name.startswith(MAY_CHANGE) or (name in MUST_STAY and _changes_state(before, after))
    ]
    if listed := [f"{name} was {before!r} and is {after!r}" for name, before, after in refused]:
        raise UserError(
            f"The run in {folder} has other settings: {'; '.join(listed)}. "
            "Use the same settings to resume it, or another output folder"
        )


def _changes_state(before: Any, after: Any) -> bool:
    """Returns whether a new value of an option in MUST_STAY changes the optimizer's arrays. The order of parts does not."""
    if None in (before, after):  # a user's own optimizer, whose arrays may be the same
        return False
    return set(before) != set(after) if isinstance(before, list) else before != after


def _differences(stored: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the name and both values of each entry that differs between two records."""
    stored, record = _flatten(stored), _flatten(record)
    names = [*record, *(name for name in stored if name not in record)]
    pairs = [(name, stored.get(name), record.get(name)) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"batching.seed": 0} for {"batching": {"seed": 0}}."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

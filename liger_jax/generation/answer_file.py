"""Answers a file of questions and writes the answers as they are generated. An interrupted run can be resumed."""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.data.records import parse_record, read_records
from liger_jax.errors import UserError, warn_skipped
from liger_jax.files import atomic_write, disk_errors, fingerprint, make_folder
from liger_jax.generation.answer import answer_batch, prepare_prompt
from liger_jax.generation.options import GenerationOptions
from liger_jax.inputs.batch import Batch
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import QwenVL
from liger_jax.progress import progress_bar

MAX_WAITING = 8  # batches' worth of prompts that may wait for others of their shape


class Record(NamedTuple):
    """A record of a data file: its number, counted from 1, its name for error messages, and its parsed JSON value."""

    number: int
    name: str
    value: Any

    @property
    def label(self) -> dict[str, Any]:
        """The fields that identify the record in the output."""
        content = str(self.value) if isinstance(self.value, Exception) else self.value
        label = {"record": self.number, "content": fingerprint(content)}
        if isinstance(self.value, Mapping) and self.value.get("id") is not None:
            label["id"] = self.value["id"]
        return label


class Prompt(NamedTuple):
    """A record that is ready to be answered, as a batch of one row."""

    record: Record
    batch: Batch

    @property
    def shape(self) -> Hashable:
        """The shapes of the batch's arrays. Prompts of equal shape can share a batch."""
        leaves, structure = jax.tree.flatten(self.batch)
        return structure, tuple(leaf.shape for leaf in leaves)


def answer_file(
    model: QwenVL,
    processor: Processor,
    data: str | Path,
    output: str | Path,
    *,
    options: GenerationOptions,
    batch_size: int = 8,
    media: str | Path | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> int:
    """Answers every record of a file.

    A record is a conversation in one of the formats of `liger_jax.data.records`. If it ends with an answer, that answer is
    replaced by a generated one. The output has a line per record: `{"record": 3, "content": "9f..", "id": ..., "answer":
    "..."}` with the record's number in the file, counted from 1, a short hash of its content, and its id if it has one.
    Questions of similar size are answered together, so the lines are not in the order of the records.

    An interrupted run resumes when it is called with the same output, and retries the records that were skipped as broken.
    Answers do not depend on batch composition, so a resumed run with the same model and options gives the same answers.

    Args:
        model: the model.
        processor: the model's processor.
        data: a .json file with a list, or a file with one JSON record per line.
        output: file of answers, one per line; lines are added after each batch.
        options: generation options; each record samples with its own seed, `options.seed` plus its number.
        batch_size: questions answered together; smaller batches are padded, so that they do not recompile.
        media: base folder of relative image paths; by default the folder of the data.
        skip_broken: skip broken records with a warning and a line `{"record": 3, "error": "..."}` instead of stopping.
        progress: show a progress bar.

    Returns:
        The number of answers in `output` at the end.

    Raises:
        NotFoundError: `data` does not exist.
        UserError: an argument is out of range, `data` is empty, a record is broken, `output` belongs to other data or cannot
            be written, or the logits of an answer are NaN or infinite (which counts as a broken record).
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    first_seed = options.single_seed()
    options.check_single_text()
    options.check_against(model.config, prompts=1)
    data, output = Path(data), Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder; expected a file for the answers")
    records = [Record(number, *record) for number, record in enumerate(read_records(data), start=1)]
    if not records:
        raise UserError(f"{data} has 0 records; expected at least 1")
    answered = _read_answered(output, {record.number: record.label for record in records})
    remaining = [record for record in records if record.number not in answered]
    broken = _BrokenRecords(data, skip_broken)
    media = data.parent if media is None else Path(media)
    questions = list(_read_questions(remaining, media, broken))  # parses every record before any computation
    prompts = _prepare_prompts(questions, processor, model.config, options.max_new_tokens, broken)

    counts = {"total": len(records), "initial": len(answered)}
    with (
        disk_errors(make_folder(output.parent)),
        output.open("a", encoding="utf-8") as file,
        progress_bar(show=progress, unit="answer", **counts) as bar,
    ):

        def write(lines: Sequence[dict]) -> None:
            file.writelines(_to_json(line) + "\n" for line in lines)
            file.flush()
            bar.update(len(lines))

        for group in _group_by_shape(prompts, batch_size):
            batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(prompt.batch for prompt in group))
            seeds = [first_seed + prompt.record.number for prompt in group]
            answers = answer_batch(model, processor, batch, options, seeds=seeds, batch_size=batch_size)
            pairs = [(prompt.record, answer) for prompt, answer in zip(group, answers, strict=True)]
            write([record.label | {"answer": answer} for record, answer in pairs if isinstance(answer, str)])
            for record, answer in pairs:
                if isinstance(answer, UserError):
                    broken.add(record, answer)
        write(broken.lines)
    warn_skipped(f"{data}: skipped {len(broken.lines)} of {len(records)} records", broken.messages)
    return sum("answer" in json.loads(line) for line in output.read_bytes().splitlines())


class _BrokenRecords:
    """Collects broken records that are skipped, or raises an error that names the first one."""

    def __init__(self, data: Path, skip: bool):
        self._data, self._skip = data, skip
        self.messages: list[str] = []
        self.lines: list[dict[str, Any]] = []  # for the output

    def add(self, record: Record, error: UserError) -> None:
        if not self._skip:
            raise UserError(f"{self._data}, {record.name}: {error}") from error
        self.messages.append(f"{record.name}: {error}")
        self.lines.append(record.label | {"error": str(error)})


def _read_questions(
    records: Sequence[Record], folder: Path, broken: _BrokenRecords
) -> Iterator[tuple[Record, Conversation]]:
    """Yields each record's conversation without the answers at its end."""
    for record in records:
        try:
            question = _remove_answers(parse_record(record.value, folder, training=False))
        except UserError as error:
            broken.add(record, error)
        else:
            yield record, question


def _remove_answers(conversation: Conversation) -> Conversation:
    """Returns a conversation without the answers at its end. Raises UserError if it has no question."""
    while conversation and conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
    if not any(message["role"] == "user" for message in conversation):
        raise UserError("The conversation has no question; expected a user message")
    return conversation


def _prepare_prompts(
    questions: Sequence[tuple[Record, Conversation]],
    processor: Processor,
    config: QwenVLConfig,
    max_new_tokens: int,
    broken: _BrokenRecords,
) -> Iterator[Prompt]:
    """Yields each question as a prompt."""
    for record, question in questions:
        try:
            batch = prepare_prompt(processor, config, question, max_new_tokens)
        except UserError as error:
            broken.add(record, error)
        else:
            yield Prompt(record, batch)


def _group_by_shape(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yields groups of `size` prompts of equal shape; smaller groups at the end, or when too many prompts are waiting."""
    waiting: dict[Hashable, list[Prompt]] = {}
    for prompt in prompts:
        shape = prompt.shape
        waiting.setdefault(shape, []).append(prompt)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) > MAX_WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _to_json(line: dict) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # an id may hold half of a surrogate pair
        return json.dumps(line)
    return text


def _read_answered(output: Path, labels: dict[int, dict]) -> set[int]:
    """Returns the numbers of the records answered in `output`, and removes its error lines and an incomplete last line.

    Raises:
        UserError: a line is not an answer to one of the records.
    """
    if not output.exists():
        return set()
    content = output.read_bytes()
    complete_lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    answered, answer_lines = set(), []
    for number, text in enumerate(complete_lines, start=1):
        try:
            line = json.loads(text)
            label = labels[line["record"]]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{output}, line {number} is {text[:80]!r}; expected an answer to a record of this data"
            ) from error
        if not label.items() <= line.items() or not ({"answer", "error"} & line.keys()):
            raise UserError(f"{output}, line {number} is {text[:80]!r}; expected an answer to {label}")
        if "answer" in line:
            answered.add(line["record"])
            answer_lines.append(text)
    if (answers := b"".join(answer_lines)) != content:
        atomic_write(output, answers)
    return answered

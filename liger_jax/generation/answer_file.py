"""Answers to a file of questions: batched by size, written as they come, continued where they were stopped."""

import json
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from liger_jax.data.records import conversation_of, read_records
from liger_jax.files import atomic_write, fingerprint
from liger_jax.generation.generate import generate
from liger_jax.generation.loop import check_prompts
from liger_jax.generation.options import GenerationOptions
from liger_jax.inputs.batch import Batch, prepare
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import Qwen2VL

WAITING = 8  # batches' worth of questions that may wait for others of their size


class Record(NamedTuple):
    """A record of a file: its number, from 1, a name for messages, and what is in it."""

    number: int
    name: str
    value: Any

    @property
    def label(self) -> dict[str, Any]:
        """What its line in the output begins with."""
        known = isinstance(self.value, Mapping) and self.value.get("id") is not None
        content = str(self.value) if isinstance(self.value, Exception) else self.value
        return {"record": self.number, "content": fingerprint(content)} | ({"id": self.value["id"]} if known else {})


def answer_file(
    model: Qwen2VL,
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
    """Answers every record of a file; -> how many answers are in `output` in the end.

    A record is a conversation in one of the formats of `liger_jax.data.records`; an answer that it ends with is left out and asked
    for anew. An answer is a line `{"record": 3, "content": "9f..", "id": ..., "answer": "..."}`: the record's number in the
    file, from 1, a short hash of what is in it, its id if it has one. Questions of like size are answered together, so lines
    come in another order than records. Run again with the same output, it goes on where it was stopped, and tries again
    what was left out as broken; the same answers come out, if model and options are the same.

    Args:
        data: a .json file with a list, or a file with a JSON record a line.
        output: file of answers, a line each; written after each batch.
        options: of the answers; each record draws with its own seed, made of its number and `options.seed`.
        batch_size: questions answered together; the last ones are filled up, so that they compile nothing.
        media: folder that relative paths of pictures start from; None: that of the data.
        skip_broken: leave broken records out, with a warning and a line `{"record": 3, "error": "..."}`, and go on.
        progress: show a bar.

    Raises:
        FileNotFoundError: no such data.
        ValueError: an argument out of range, a broken record, or an output that is not this data's.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if options.num_return_sequences != 1 or options.logprobs is not None or np.ndim(options.seed):
        raise ValueError("A record has one answer, as text; expected num_return_sequences 1, no logprobs, one seed")
    options.check_tokens(model.config, prompts=1)
    data, output = Path(data), Path(output)
    folder = data.parent if media is None else Path(media)
    records = [Record(number, *record) for number, record in enumerate(read_records(data), start=1)]
    done = _answered_before(output, {record.number: record.label for record in records})
    left = [record for record in records if record.number not in done]

    broken: list[dict] = []

    def refuse(record: Record, error: Exception) -> None:
        if not skip_broken:
            raise ValueError(f"{data}, {record.name}: {error}") from error
        warnings.warn(f"{data}, {record.name}: left out: {error}", stacklevel=3)
        broken.append(record.label | {"error": str(error)})

    questions = []
    for record in left:  # all formats and paths, before anything is computed
        try:
            questions.append((record, _question(conversation_of(record.value, folder))))
        except (ValueError, OSError) as error:
            refuse(record, error)

    def batches() -> Iterator[tuple[Record, Batch]]:
        for record, question in questions:
            try:
                batch = prepare(model.config, **processor(question, add_generation_prompt=True))
                check_prompts(batch, options.max_new_tokens, model.config.text.max_position_embeddings)
            except (ValueError, FileNotFoundError) as error:
                refuse(record, error)
            else:
                yield record, batch

    output.parent.mkdir(parents=True, exist_ok=True)
    counts = {"total": len(records), "initial": len(done)}
    with output.open("a", encoding="utf-8") as file, tqdm(**counts, unit="answer", disable=not progress) as bar:

        def write(lines: Sequence[dict]) -> None:
            file.writelines(_as_json(line) + "\n" for line in lines)
            file.flush()
            bar.update(len(lines))

        for group in _grouped(batches(), batch_size):
            texts = _answers(model, processor, group, batch_size, options)
            write([record.label | {"answer": text} for (record, _), text in zip(group, texts, strict=True)])
        write(broken)
    return sum("answer" in json.loads(line) for line in output.read_bytes().splitlines())


def _grouped(ready: Iterator[tuple[Record, Batch]], size: int) -> Iterator[list[tuple[Record, Batch]]]:
    """Groups of one shape, `size` in each; smaller ones if too many wait, and at the end."""
    waiting: dict[Hashable, list[tuple[Record, Batch]]] = {}
    for record, batch in ready:
        shape = _shape(batch)
        waiting.setdefault(shape, []).append((record, batch))
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) > WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _question(conversation: Conversation) -> Conversation:
    """Without the answer at its end."""
    while conversation and conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
    if not any(message["role"] == "user" for message in conversation):
        raise ValueError("no question: expected a turn of the user")
    return conversation


def _as_json(line: dict) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, as an id may hold one
        return json.dumps(line)
    return text


def _shape(batch: Batch) -> Hashable:
    """Batches that can stand in one, and for which the same program is compiled, have the same."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(leaf.shape for leaf in leaves)


def _answers(
    model: Qwen2VL,
    processor: Processor,
    group: Sequence[tuple[Record, Batch]],
    batch_size: int,
    options: GenerationOptions,
) -> list[str]:
    rows = [*group, *[group[0]] * (batch_size - len(group))]  # one program for all, also where fewer are left
    batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(batch for _, batch in rows))
    seeds = [options.seed + record.number for record, _ in rows]
    tokens = generate(model, batch, tokenizer=processor, **vars(options) | {"seed": seeds})
    return processor.decode(tokens)[: len(group)]


def _answered_before(output: Path, labels: dict[int, dict]) -> set[int]:
    """The records that have their answer in `output`; lines of errors, to be tried again, and one cut short are taken away.

    Raises:
        ValueError: a line that is none of this file's answers.
    """
    if not output.exists():
        return set()
    written = output.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    done, kept = set(), []
    for number, text in enumerate(whole.splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
            expected = labels[line["record"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{output}, line {number} is no answer to a record of this data: {text[:80]}") from error
        if not expected.items() <= line.items() or not ({"answer", "error"} & line.keys()):
            raise ValueError(f"{output}, line {number} is {text[:80]}; expected an answer to {expected}")
        if "answer" in line:
            done.add(line["record"])
            kept.append(text)
    if (answers := b"".join(kept)) != written:
        atomic_write(output, answers)
    return done

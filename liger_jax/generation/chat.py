"""A conversation that goes on: what was said stays in the cache, and only what is new is read."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from liger_jax.generation.generate import check_one_answer, read_pieces
from liger_jax.generation.loop import Decoding, check_prompts, extend, first_token_logits, grow, init_cache, prefill
from liger_jax.generation.options import GenerationOptions
from liger_jax.inputs.batch import Batch, bucket, prepare
from liger_jax.inputs.messages import KINDS, Kind, as_list
from liger_jax.inputs.positions import positions_of, vision_items
from liger_jax.inputs.processor import Processor
from liger_jax.model import Qwen2VL
from liger_jax.model.sharding import get_mesh, mesh_context, shard_batch

SLOTS = 1024  # the cache grows by this at first, then by a fourth and more: few sizes, few compilations


class Chat:
    """A conversation with a model about texts, pictures and videos.

    Each question is rendered with all that came before, as if it were asked anew; of its tokens, those that the cache has
    from earlier turns are not read again, so a picture goes through the vision tower once. Answers are those of a fresh
    prompt. Pictures stay in host memory as patches, to be read again should the cache be lost (Ctrl-C while a turn is read).

    Args:
        model, processor: of the same checkpoint.
        system: the system message; None: that of the chat template.
        options: see `GenerationOptions`; `vars(GenerationOptions.from_hf(folder))` for the checkpoint's own.

    Attributes:
        messages: the conversation so far, with `{"type": "image"}` in a picture's place.

    Raises:
        ValueError: an option out of range, or one that a single answer has no use for.

    Example:
        >>> chat = Chat(model, processor, max_new_tokens=256)  # doctest: +SKIP
        >>> chat.ask("What is this?", images=["dog.jpg"])  # doctest: +SKIP
        'A Labrador.'
        >>> for piece in chat.stream("Which colour has it?"):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, model: Qwen2VL, processor: Processor, *, system: str | None = None, **options: Any):
        self.model, self.processor, self.system = model, processor, system
        self.options = GenerationOptions(**options)
        check_one_answer(self.options)
        self.options.check_tokens(model.config, prompts=1)
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        # of each kind, grid and patches: to be read again if the cache is lost, or a template changes what it wrote
        self._pictures: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind.name: [] for kind in KINDS}
        self._decoding: Decoding | None = None  # of the last answer; it has the cache
        self._prompt: list[int] = []  # the tokens in the cache: those of the last prompt,
        self._answer: list[int] = []  # then those of the answer but its last, which nothing was computed from

    def ask(self, question: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> str:
        """The answer, as a whole."""
        return "".join(self.stream(question, images=images, videos=videos))

    def stream(self, question: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Iterator[str]:
        """The answer in pieces, see `generation.stream`. If no more of them are taken, the answer ends there.

        Args:
            question: what the user says.
            images, videos: shown before it; what `Processor` takes as such.

        Raises:
            ValueError: a picture that cannot be read, or a conversation longer than the model's positions; it is as it was
                before then. FileNotFoundError: no such picture.
        """
        media = {"image": as_list(images), "video": as_list(videos)}
        shown = [(kind.name, source) for kind in KINDS for source in media[kind.name]]
        said = {"type": "text", "text": question}
        turn = self.processor([_user([*({"type": kind, kind: source} for kind, source in shown), said])])
        messages = [*self.messages, _user([*({"type": kind} for kind, _ in shown), said])]
        pictures = {kind.name: [*self._pictures[kind.name], *_pictures_of(turn, kind)] for kind in KINDS}

        ids, batch, known = self._new_tokens(messages, pictures)
        check_prompts(batch, self.options.max_new_tokens, self.model.config.text.max_position_embeddings)
        decoding = self._read(ids, batch, known)
        self.messages = [*messages, {"role": "assistant", "content": ""}]
        self._pictures, self._decoding, self._prompt, self._answer = pictures, decoding, ids.tolist(), []
        return self._told(self.messages[-1], decoding, self._answer)

    def _told(self, message: dict, decoding: Decoding, tokens: list[int]) -> Iterator[str]:
        if decoding is not self._decoding:  # nobody began to read before the next question
            return
        for piece in read_pieces(decoding, self.processor, self.options.all_stop_strings, tokens):
            message["content"] += piece
            yield piece
            if decoding is not self._decoding:  # a newer question has taken the cache over
                return

    def _new_tokens(self, messages: list[dict], pictures: dict[str, list]) -> tuple[np.ndarray, Batch, int]:
        """-> all tokens of the prompt, the batch of those that are not in the cache, and how many are."""
        config, grids = self.model.config, {name: [grid for grid, _ in of] for name, of in pictures.items()}
        ids = self.processor.prompt_ids(messages, grids)
        given = (np.array(grids[kind.name]) if grids[kind.name] else None for kind in KINDS)
        everywhere = np.ones((1, len(ids)), np.int64)
        items = vision_items(config, ids[None], everywhere, *given)
        positions = positions_of(config, everywhere, items, "max")

        cached = np.array(self._prompt + self._answer[:-1], np.int64)[: len(ids) - 1]  # a token at least is read
        differs = np.flatnonzero(cached != ids[: len(cached)])
        known = int(differs[0]) if len(differs) else len(cached)
        for item in items[0]:  # a picture is read as a whole
            if item.columns[0] < known <= item.columns[-1]:
                known = int(item.columns[0])
        new = {}
        for kind in KINDS:
            count = sum(KINDS[item.is_video] is kind and item.columns[0] >= known for item in items[0])
            if count:
                grid, patches = zip(*pictures[kind.name][-count:], strict=True)
                new |= dict(zip(kind.arrays, (np.concatenate(patches), np.array(grid)), strict=True))
        return ids, prepare(config, input_ids=ids[None, known:], position_ids=positions[:, :, known:], **new), known

    def _read(self, ids: np.ndarray, batch: Batch, known: int) -> Decoding:
        """Reads the batch behind the `known` first tokens of the cache."""
        columns, mesh = batch.shape[1], get_mesh(self.model)
        slots = bucket(max(known + columns, len(ids) + self.options.max_new_tokens), SLOTS)
        batch = shard_batch(batch, mesh)
        with mesh_context(mesh):
            if not known:
                hidden, written = prefill(self.model, batch)
                cache = init_cache(*written, batch.segment_ids, room=slots - columns)
            else:
                cache, self._prompt, self._answer = self._decoding.cache, [], []  # it is given away
                missing = slots - cache.valid.shape[1]
                cache = grow(cache, room=missing) if missing > 0 else cache
                hidden, cache = extend(self.model, cache, batch, np.int32(known))
            start = first_token_logits(self.model, hidden, batch.position_ids, batch.segment_ids, np.int32(known))
        return Decoding(self.model, cache, start, self.options, ids[None], np.ones((1, len(ids)), np.int64))


def _pictures_of(turn: dict[str, np.ndarray], kind: Kind) -> list[tuple[np.ndarray, np.ndarray]]:
    """Grid and patches of each picture of a kind in what the processor made."""
    if kind.arrays[0] not in turn:
        return []
    patches, grids = (turn[name] for name in kind.arrays)
    return list(zip(grids, np.split(patches, np.cumsum(np.prod(grids, axis=1))[:-1]), strict=True))


def _user(parts: list[dict]) -> dict:
    return {"role": "user", "content": parts}

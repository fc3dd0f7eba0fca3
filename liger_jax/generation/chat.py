"""Multi-turn conversations. The KV cache holds the earlier turns, so only new tokens are prefilled."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from liger_jax.errors import UserError
from liger_jax.generation.generate import stream_text
from liger_jax.generation.loop import extend, first_token_logits, grow, init_cache, prefill
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.session import DecodeSession, NonFiniteLogitsError, check_prompts
from liger_jax.inputs.batch import Batch, bucket, prepare
from liger_jax.inputs.messages import KINDS, ProcessedMedia, as_list
from liger_jax.inputs.positions import VisionItem, rope_positions, vision_items
from liger_jax.inputs.processor import Processor
from liger_jax.inputs.video import DEFAULT_FPS
from liger_jax.model import QwenVL
from liger_jax.model.decode_layout import choose_layout
from liger_jax.model.sharding import get_mesh, is_inside_trace, mesh_context, shard_batch, with_auto_axes

SLOTS = 1024  # the cache grows by this at first, later by a quarter or more: few sizes mean few compilations


class Chat:
    """A conversation with a model about text, images and videos.

    Each question is rendered with the whole conversation before it. Tokens that are in the cache from earlier turns are not
    prefilled again, so an image runs through the vision tower once. Answers equal those to a prompt with the whole
    conversation. Image patches stay in host memory, to be prefilled again if the cache is lost (Ctrl-C during a prefill).

    Args:
        model: the model.
        processor: the processor of the same checkpoint.
        system: the system message; None uses the chat template's.
        options: the fields of `GenerationOptions`; `vars(GenerationOptions.from_hf(folder))` has the checkpoint's.

    Attributes:
        messages: the conversation so far, with `{"type": "image"}` in place of each image. Between questions, texts may be
            edited and messages without images removed; `reset` removes images.

    Raises:
        UserError: an option is out of range, or requests more than one text per question.

    Example:
        >>> chat = Chat(model, processor, max_new_tokens=256)  # doctest: +SKIP
        >>> chat.ask("What is this?", images=["dog.jpg"])  # doctest: +SKIP
        'A Labrador.'
        >>> for piece in chat.stream("What color is it?"):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, model: QwenVL, processor: Processor, *, system: str | None = None, **options: Any):
        if is_inside_trace(model):
            raise UserError(
                "Chat is created inside a function that JAX traces; expected it outside, or generate inside"
            )
        self.model, self.processor, self.system = with_auto_axes(model), processor, system
        self.options = GenerationOptions(**options)
        self.options.check_single_text()
        self.options.check_against(model.config, prompts=1)
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages: list[dict[str, Any]] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )
        # In order. Prefilled again if the cache is lost, or if the template renders an earlier turn differently.
        self._media: list[ProcessedMedia] = []
        self._session: DecodeSession | None = None  # of the last answer; holds the cache
        # The cache holds the last prompt and its answer so far, except the answer's last token.
        self._prompt: list[int] = []
        self._answer: list[int] = []

    def ask(
        self,
        question: str,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        fps: float | Sequence[float] = DEFAULT_FPS,
    ) -> str:
        """Returns the whole answer to a question; the arguments are those of `stream`."""
        return "".join(self.stream(question, images=images, videos=videos, fps=fps))

    def stream(
        self,
        question: str,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        fps: float | Sequence[float] = DEFAULT_FPS,
    ) -> Generator[str, None, None]:
        """Yields the answer to a question in pieces, see `liger_jax.stream`. If the caller stops reading, the answer ends.

        Args:
            question: the text of the question.
            images: images shown before the text, in any form that `Processor` accepts.
            videos: videos shown before the text.
            fps: the rate of the videos' frames, in frames per second: one for all, or one for each.

        Raises:
            NotFoundError: an image does not exist.
            UserError: an image cannot be read, or the conversation exceeds the model's positions. The conversation is
                then unchanged.
            NonFiniteLogitsError: raised while the answer is read: its logits are NaN or infinite. The conversation is then
                as before the question.
        """
        sources = {"image": as_list(images), "video": as_list(videos)}
        parts: list[dict[str, Any]] = [
            {"type": kind.name, kind.name: source} for kind in KINDS for source in sources[kind.name]
        ]
        text = {"type": "text", "text": question}
        media = [*self._media, *self.processor.load_media([{"role": "user", "content": [*parts, text]}], fps=fps)]
        placeholders = [{"type": part["type"]} for part in parts]
        messages = [*self.messages, {"role": "user", "content": [*placeholders, text]}]

        ids, batch, cached = self._prepare_turn(messages, media)
        check_prompts(self.model.config, batch, self.options.max_new_tokens)
        session = self._prefill_turn(ids, batch, cached)
        before = self.messages, self._media
        self.messages = [*messages, {"role": "assistant", "content": ""}]
        self._media, self._session, self._prompt, self._answer = media, session, ids.tolist(), []
        return self._stream_answer(self.messages[-1], session, self._answer, before)

    def _prepare_turn(self, messages: list[dict], media: list[ProcessedMedia]) -> tuple[np.ndarray, Batch, int]:
        """Returns the prompt's tokens [T], a batch of those to prefill, and the number of cached tokens before them."""
        config = self.model.config
        ids = self.processor.prompt_ids(messages, media)
        segment_ids = np.ones((1, len(ids)), np.int64)
        (items,) = vision_items(config, ids[None], segment_ids, **self.processor.media_arrays(media, pixels=False))
        position_ids = rope_positions(config, segment_ids, [items], "max")
        cached = self._count_cached(ids, items)
        new_media: list[ProcessedMedia] = []
        for kind in KINDS:
            indices = {item.index for item in items if KINDS[item.is_video] is kind and item.positions[0] >= cached}
            of_kind = [item for item in media if item.kind is kind]
            new_media += [item for index, item in enumerate(of_kind) if index in indices]
        arrays: dict[str, Any] = self.processor.media_arrays(new_media)
        batch = prepare(config, input_ids=ids[None, cached:], position_ids=position_ids[:, :, cached:], **arrays)
        return ids, batch, cached

    def _count_cached(self, ids: np.ndarray, items: list[VisionItem]) -> int:
        """Returns how many leading tokens are in the cache. At least one token remains to prefill; no media are split."""
        cache_ids = np.array(self._prompt + self._answer[:-1], np.int64)[: len(ids) - 1]
        mismatches = np.flatnonzero(cache_ids != ids[: len(cache_ids)])
        cached = int(mismatches[0]) if len(mismatches) else len(cache_ids)
        spans: dict[tuple[bool, int], tuple[int, int]] = {}  # first and last token of each image or video
        for item in items:
            first, _ = spans.get((item.is_video, item.index), (int(item.positions[0]), 0))
            spans[item.is_video, item.index] = first, int(item.positions[-1])
        return next((first for first, last in spans.values() if first < cached <= last), cached)

    def _prefill_turn(self, ids: np.ndarray, batch: Batch, cached: int) -> DecodeSession:
        """Prefills the batch after the first `cached` tokens of the cache. Returns the session that decodes the answer."""
        mesh = get_mesh(self.model)
        batch = shard_batch(batch, mesh)
        positions = batch.shape[1]  # on a mesh, with padding that splits them evenly: it needs slots, too
        slots = bucket(max(cached + positions, len(ids) + self.options.max_new_tokens), SLOTS)
        with mesh_context(mesh):
            if cached and self._session:
                cache, self._prompt, self._answer = self._session.cache, [], []  # the cache is donated
                missing = slots - cache.valid.shape[1]
                cache = grow(cache, room=missing) if missing > 0 else cache
                hidden, cache = extend(self.model, cache, batch, np.int32(cached))
            else:
                hidden, keys_values = prefill(self.model, batch)
                layout = choose_layout(self.model.language_model, self.model.head, (batch.shape[0], slots))
                cache = init_cache(*keys_values, batch.segment_ids, room=slots - positions, layout=layout)
            first_step = first_token_logits(self.model, hidden, batch.position_ids, batch.segment_ids, np.int32(cached))
        return DecodeSession(self.model, cache, first_step, self.options, ids[None], np.ones((1, len(ids)), np.int64))

    def _stream_answer(
        self, message: dict, session: DecodeSession, tokens: list[int], before: tuple
    ) -> Generator[str, None, None]:
        """Yields the answer in pieces until a newer question; adds the pieces to its message and its tokens to `tokens`.

        `before` holds the messages and the media before the question, which are restored if the logits are not finite.
        """
        if session is not self._session:  # a newer question took over the cache before this answer was read
            return
        try:
            for piece in stream_text(session, self.processor, self.options.all_stop_strings, tokens):
                message["content"] += piece
                yield piece
                if session is not self._session:
                    return
        except NonFiniteLogitsError:
            (self.messages, self._media), self._session = before, None  # the cache may hold NaN
            self._prompt, self._answer = [], []
            raise

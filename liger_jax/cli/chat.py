"""`liger-jax chat`: a chat in the terminal."""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from liger_jax.cli.app import ModelArgument
from liger_jax.cli.opening import open_for_answers
from liger_jax.errors import UserError
from liger_jax.generation.options import AnswerOptions

if TYPE_CHECKING:
    from liger_jax import Chat


def chat(
    model: ModelArgument,
    system: str | None = None,
    max_pixels: int | None = None,
    answers: AnswerOptions = AnswerOptions(),
) -> None:
    """Chat with a model about text and images, in the terminal.

    Type `/image PATH` to add an image to the next question, `/reset` to start a new chat, and `/quit` to end. Ctrl-C stops
    an answer.

    Args:
        model: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        system: System message.
        max_pixels: Maximum number of pixels per image; by default the model's limit.
    """
    from liger_jax import Chat

    weights, processor, options = open_for_answers(model, answers, max_pixels)
    session = Chat(weights, processor, system=system, **vars(options))
    images: list[Any] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        try:
            images = respond(session, line, images)
        except UserError as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print()


def respond(session: "Chat", line: str, images: list[Any]) -> list[Any]:
    """Runs a chat command or prints the answer to a question. Returns the images for the next question."""
    from liger_jax.inputs.images import load_image

    command, _, argument = line.partition(" ")
    if command == "/reset":
        session.reset()
        return []
    if command == "/image":
        return [*images, load_image(argument.strip().strip("'\""))]
    if command.startswith("/"):
        print("expected a question, /image PATH, /reset or /quit")
    elif line:
        pieces = session.stream(line, images=images)
        try:
            print_stream(pieces)
        except KeyboardInterrupt:  # the question and its images are in the chat already
            print()
        return []
    return images


def print_stream(pieces: Generator[str, None, None]) -> None:
    """Prints an answer piece by piece."""
    with contextlib.closing(pieces):  # frees the session's copy of the weights if Ctrl-C stops the answer
        for piece in pieces:
            print(piece, end="", flush=True)
    print()

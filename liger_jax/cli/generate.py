"""`liger-jax generate`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from liger_jax.cli.app import ModelArgument
from liger_jax.cli.chat import print_stream
from liger_jax.cli.opening import open_for_answers
from liger_jax.errors import NotFoundError, UserError
from liger_jax.generation.options import AnswerOptions


def generate(
    model: ModelArgument,
    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = None,
    images: tuple[Path, ...] = (),
    system: str | None = None,
    data: Path | None = None,
    output: Path | None = None,
    media: Path | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
    max_pixels: int | None = None,
    answers: AnswerOptions = AnswerOptions(),
) -> None:
    """Answer one question, with or without images, or all questions of a file.

    If a file of questions is interrupted, repeat the command to resume.

    Args:
        model: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        question: The question; its answer is streamed.
        images: Images to ask the question about.
        system: System message for the question.
        data: File of questions in LLaVA, ShareGPT or messages format: a JSON list, or JSON lines.
        output: File for the answers to --data, in JSON lines.
        media: Base folder of relative image paths in --data; by default the folder of the data.
        batch_size: Number of questions of --data to answer together; default 8.
        skip_broken: Skip broken records of --data with a warning instead of stopping.
        max_pixels: Maximum number of pixels per image; by default the model's limit.
    """
    if (question is None) == (data is None) or (data is None) != (output is None):
        raise UserError(
            "expected a question, or --data and --output" + (" (the question goes before --images)" if images else "")
        )
    unused: dict[str, Any]
    if data is None:
        unused = {"--media": media, "--batch-size": batch_size, "--skip-broken": skip_broken or None}
    else:
        unused = {"--images": images or None, "--system": system}
    if names := [name for name, value in unused.items() if value is not None]:
        other = "a single question" if data else "--data"
        raise UserError(f"{' and '.join(names)} set; expected only with {other}")
    if data is not None and not data.is_file():
        raise NotFoundError(f"{data} does not exist; expected a file of questions")
    if missing := [str(path) for path in images if not path.is_file()]:
        raise NotFoundError(f"--images has {missing}, which do not exist; expected image files")
    weights, processor, options = open_for_answers(model, answers, max_pixels)
    if question is not None:
        from liger_jax import Chat

        print_stream(Chat(weights, processor, system=system, **vars(options)).stream(question, images=images))
    elif data is not None and output is not None:
        from liger_jax.generation.answer_file import answer_file

        count = answer_file(
            weights,
            processor,
            data,
            output,
            options=options,
            batch_size=8 if batch_size is None else batch_size,
            media=media,
            skip_broken=skip_broken,
        )
        print(f"answers in {output}: {count}")

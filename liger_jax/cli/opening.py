"""Opens what the arguments of several commands name: a model, its processor, and the options of its answers."""

from typing import TYPE_CHECKING

from liger_jax import runtime
from liger_jax.generation.options import AnswerOptions

if TYPE_CHECKING:
    from liger_jax import GenerationOptions, Processor, QwenVL


def open_for_answers(
    model: str, answers: AnswerOptions, max_pixels: int | None
) -> tuple["QwenVL", "Processor", "GenerationOptions"]:
    """Returns the model, its processor, and the generation options of the flags and the checkpoint."""
    from convert import open_model
    from liger_jax.files import GENERATION_CONFIG, local_folder

    runtime.enable_compilation_cache()
    runtime.warn_if_gpu_is_unused()
    options = answers.resolve(local_folder(model, [GENERATION_CONFIG]))
    processor = open_processor(model, max_pixels)
    return open_model(model), processor, options


def open_processor(model: str, max_pixels: int | None) -> "Processor":
    """Returns the processor of a checkpoint, with a limit on the size of images.

    Raises UserError for models that are not supported, by name, before any file of theirs is read.
    """
    from liger_jax import Processor, QwenVLConfig
    from liger_jax.files import CONFIG, local_folder

    config_file = local_folder(model, [CONFIG]) / CONFIG
    if config_file.is_file():
        QwenVLConfig.from_hf(config_file)
    processor = Processor.from_pretrained(model)
    processor.image = processor.image.with_limits(None, max_pixels)
    return processor

"""How the processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ."""

import dataclasses
import functools
from importlib import resources
from typing import Literal

from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.video import ClipSettings


@dataclasses.dataclass(frozen=True)
class ProcessorFamily:
    """What a member of the family prescribes for its processor.

    The settings are transformers' for a checkpoint that has none. `video_time` is the field of `VisionConfig`.
    """

    processor_class: str
    video_processor_class: str
    video_time: Literal["frames", "seconds", "text"]
    image: VisionSettings
    video: VisionSettings
    chat_template: str = "chat_template.jinja"

    @functools.cached_property
    def default_chat_template(self) -> str:
        """The chat template of checkpoints without one.

        It renders the same text as the published one, but raises an error for tool calls and reasoning, and that of Qwen3-VL
        also for roles other than system, user and assistant.
        """
        template = resources.files("liger_jax").joinpath("assets", self.chat_template)
        return template.read_text(encoding="utf-8").strip()


_IMAGE = VisionSettings()
_VIDEO = VisionSettings(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
FAMILIES = {
    "qwen2_vl": ProcessorFamily("Qwen2VLProcessor", "Qwen2VLVideoProcessor", "frames", _IMAGE, _VIDEO),
    "qwen2_5_vl": ProcessorFamily("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", "seconds", _IMAGE, _VIDEO),
    "qwen3_vl": ProcessorFamily(
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        "text",
        VisionSettings(patch_size=16, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
        ClipSettings(),
        chat_template="chat_template_qwen3_vl.jinja",
    ),
}

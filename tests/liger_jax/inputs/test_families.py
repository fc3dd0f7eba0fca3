"""The processors of Qwen2.5-VL and Qwen3-VL give transformers' arrays; a checkpoint's files say which one it is."""

import dataclasses
import json
import types

import numpy as np
import pytest

from liger_jax import Processor, QwenVLConfig, prepare
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.errors import UserError
from liger_jax.inputs.families import FAMILIES
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.video import ClipSettings
from tests._support.parity import REFERENCES
from tests.references import make_family_inputs as reference

STORED = np.load(REFERENCES / "family_inputs.npz")
STORED_V4 = np.load(REFERENCES / "family_inputs_v4.npz")
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
FRAME = np.zeros((64, 64, 3), np.uint8)


def limits(size, **settings):
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], **settings}


@pytest.fixture(scope="module")
def processors():
    half = {"patch_size": 16, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    frames = VisionSettings(**limits(reference.FRAME_LIMITS))
    images3 = VisionSettings(**limits(reference.IMAGE_LIMITS, **half))
    clips = ClipSettings(**limits(reference.CLIP_LIMITS))
    tokenizers = {family: reference.make_tokenizer(family) for family in ("qwen2_5_vl", "qwen3_vl")}
    return {
        "qwen2_5_vl": Processor(tokenizers["qwen2_5_vl"], frames, frames, family="qwen2_5_vl"),
        "qwen3_vl": Processor(tokenizers["qwen3_vl"], images3, clips, family="qwen3_vl"),
    }


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def process(processor, name, **options):
    videos, sample, conversations = reference.CONVERSATIONS[name]
    frames = [STORED[f"video/{video}"] for video in videos]
    images = [reference.make_image()] if name == "batch" else None
    fps = [reference.RATES[video] for video in videos]
    options |= {"target_fps": 2.0} if sample else {}
    return processor(conversations, images, frames, fps=fps, add_generation_prompt=True, **options)


# ---- equality with transformers


@pytest.mark.parametrize("name", reference.CONVERSATIONS)
@pytest.mark.parametrize(("family", "version"), [("qwen2_5_vl", "hf5"), ("qwen3_vl", "hf5"), ("qwen3_vl", "4.57")])
def test_conversations_equal_transformers(processors, family, version, name):
    """Tokens (with text that merges with a timestamp), masks, types, grids and seconds, in both forms of prompts."""
    outputs = process(processors[family], name, video_prompt=version)
    stored, folder = STORED if version == "hf5" else STORED_V4, f"chat/{family}/{name}/"
    expected = {key.removeprefix(folder): stored[key] for key in stored if key.startswith(folder)}
    levels = expected.pop("levels", None)
    if version == "hf5":
        assert expected.keys() == outputs.keys() - {"pixel_values", "pixel_values_videos"}
    for key, value in expected.items():
        np.testing.assert_array_equal(outputs[key], value, err_msg=key)
    if levels is not None:
        # torchvision resizes within one grey level of PIL
        np.testing.assert_allclose(outputs["pixel_values_videos"], levels / 127.5 - 1, rtol=0, atol=1.01 / 127.5)


@pytest.mark.parametrize("name", reference.CONVERSATIONS)
@pytest.mark.parametrize("video_prompt", ["4.57", "hf5"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_prepare_takes_every_key(processors, family, video_prompt, name):
    """And measure counts the same tokens and grids."""
    outputs = process(processors[family], name, video_prompt=video_prompt)
    config = QwenVLConfig.tiny(len(processors[family].tokenizer), family=family)
    ids = processors[family].token_ids
    config = dataclasses.replace(config, image_token_id=ids["image"], video_token_id=ids["video"])
    batch = prepare(config, **outputs)
    merged = sum(outputs[key].prod(axis=1).sum() // 4 for key in outputs if key.endswith("grid_thw"))
    assert (batch.vision.token_positions < batch.shape[1]).sum() == merged
    assert (batch.vision.segment_ids > 0).sum() == 4 * merged


def test_video_prompts_differ_by_the_outer_pair_of_tokens(processors):
    """transformers 5 keeps the template's <|vision_start|> and <|vision_end|> around the frames of a video."""
    texts = {}
    for form in ("4.57", "hf5"):
        ids = process(processors["qwen3_vl"], "video", video_prompt=form)["input_ids"][0]
        ids = ids[ids != processors["qwen3_vl"].token_ids["video"]]
        texts[form] = processors["qwen3_vl"].decode(ids, skip_special_tokens=False)
    frames = "".join(f"<{time} seconds><|vision_start|><|vision_end|>" for time in (0.2, 1.2))
    assert texts["4.57"] == f"<|im_start|>user\nLook: {frames}What?<|im_end|>\n<|im_start|>assistant\n"
    assert texts["hf5"] == texts["4.57"].replace(frames, f"<|vision_start|>{frames}<|vision_end|>")


# ---- rates


def test_rates_of_videos(processors):
    """One rate for all, one for each, or a part's own; the default is 2 frames per second."""
    processor, video = processors["qwen2_5_vl"], [FRAME] * 4
    for options, expected in (({}, [1.0, 1.0]), ({"fps": 4}, [0.5, 0.5]), ({"fps": [1.0, 8.0]}, [2.0, 0.25])):
        outputs = processor([user(VIDEO, VIDEO)], videos=[video, video], **options)
        assert outputs["second_per_grid_ts"].tolist() == expected
    parts = [{"type": "video", "video": video, "sample_fps": 0.5}, {"type": "video", "video": video}]
    assert processor([user(*parts)], fps=4.0)["second_per_grid_ts"].tolist() == [4.0, 0.5]
    assert "second_per_grid_ts" not in processor([user("no video")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps is 0; expected a positive number of frames per second"),
        ({"fps": float("nan")}, "fps is nan; expected a positive number"),
        ({"fps": "2"}, "fps is '2'; expected a positive number"),
        ({"fps": [1.0, 2.0]}, "fps has length 2; expected 1, one rate for each video"),
        ({"fps": []}, "fps has length 0; expected 1, one rate for each video"),
        ({"target_fps": -1}, "target_fps is -1; expected a positive number"),
        ({"video_prompt": "5"}, r"video_prompt is '5'; expected one of \['4.57', 'hf5'\]"),
        ({"videos": [[FRAME]]}, "video has length 1; expected at least 2 frames"),
    ],
)
def test_bad_options_are_refused(processors, options, message):
    with pytest.raises(UserError, match=message):
        processors["qwen3_vl"]([user(VIDEO)], **{"videos": [[FRAME] * 2], **options})
    bad_part = {"type": "video", "video": [FRAME] * 2, "sample_fps": True}
    with pytest.raises(UserError, match="sample_fps is True"):
        processors["qwen3_vl"]([user(bad_part)])


# ---- prompts and labels


def test_timestamps_need_the_tokens_around_a_video():
    """A tokenizer of Qwen2-VL may lack them; Qwen3-VL's prompts have them around every frame."""
    vocabulary = {"<|image_pad|>": 0, "<|video_pad|>": 1}
    tokenizer = types.SimpleNamespace(get_vocab=lambda: vocabulary, pad_token_id=0, chat_template="")
    Processor(tokenizer)
    with pytest.raises(
        UserError, match=r"tokenizer has no <\|vision_start\|> and no <\|vision_end\|>; expected Qwen-VL's"
    ):
        Processor(tokenizer, family="qwen3_vl")


def test_labels_of_a_conversation_with_a_video(processors):
    """The frames move the answer; nothing but the answer is trained."""
    messages = [user(VIDEO, "?"), {"role": "assistant", "content": "Two <0.2 seconds> frames."}]
    for form in ("4.57", "hf5"):
        outputs = processors["qwen3_vl"](messages, videos=[[FRAME] * 5], labels=True, video_prompt=form)
        trained = outputs["labels"][0] != -100
        np.testing.assert_array_equal(outputs["labels"][0][trained], outputs["input_ids"][0][trained])
        text = processors["qwen3_vl"].decode(outputs["labels"][0], skip_special_tokens=False)
        assert text == "Two <0.2 seconds> frames.<|im_end|>"


@pytest.mark.parametrize(("form", "before"), [("4.57", "See:"), ("hf5", "See: ")])
def test_labels_exclude_a_video_in_an_answer(processors, form, before):
    """Also its times, and a space that is one token with a time; but not a time that the answer itself mentions."""
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    after = "Two <0.2 seconds> frames."
    for answer, expected in ((f"See: {video}{after}", before + after), (f"See: {video}", before)):
        messages = [
            user("?"),
            {"role": "assistant", "content": answer},
            user("!"),
            {"role": "assistant", "content": "b"},
        ]
        outputs = processors["qwen3_vl"](messages, videos=[[FRAME] * 5], labels=True, video_prompt=form)
        text = processors["qwen3_vl"].decode(outputs["labels"][0], skip_special_tokens=False)
        assert text == f"{expected}<|im_end|>b<|im_end|>"


def test_default_template_of_qwen3_vl_refuses_a_video_in_an_answer(processors):
    messages = [user("?"), {"role": "assistant", "content": [{"type": "video", "video": [FRAME] * 5}]}]
    with pytest.raises(UserError, match=r"chat template refuses .*in a message of the assistant"):
        processors["qwen3_vl"](messages, labels=True)


def test_a_written_placeholder_becomes_a_video(processors):
    """With or without the tokens around it; media are taken in the order of the text."""
    frames, image = [FRAME] * 4, np.zeros((320, 256, 3), np.uint8)
    written = "<|vision_start|><|video_pad|><|vision_end|>a<|image_pad|>b<|video_pad|>"
    outputs = processors["qwen3_vl"]([user(written)], images=[image], videos=[frames, [FRAME] * 6], fps=[2.0, 1.0])
    ids = outputs["input_ids"][0]
    text = processors["qwen3_vl"].decode(ids[outputs["mm_token_type_ids"][0] == 0], skip_special_tokens=False)
    frame = "<|vision_start|><|vision_end|>"
    first, second = ("".join(f"<{time} seconds>{frame}" for time in times) for times in ((0.2, 1.2), (0.5, 2.5, 4.5)))
    assert text == f"<|im_start|>user\n{first}ab{second}<|im_end|>\n"
    _, grids = processors["qwen3_vl"].measure(
        [
            user(
                {"type": "video", "video": frames},
                {"type": "image", "image": image},
                {"type": "video", "video": frames},
            )
        ]
    )
    assert [t for t, _, _ in grids] == [2, 1, 2] and grids[1] == (1, 20, 16)


def test_measured_tokens_are_those_of_the_arrays(processors):
    for processor in processors.values():
        video = {"type": "video", "video": [FRAME] * 5, "sample_fps": 1.0}
        messages = [
            user("Look: ", video, " and ", {"type": "image", "image": FRAME}),
            {"role": "assistant", "content": "."},
        ]
        outputs = processor(messages, labels=True)
        tokens, grids = processor.measure(messages)
        assert tokens == outputs["input_ids"].size
        stored = [*outputs["video_grid_thw"].tolist(), *outputs["image_grid_thw"].tolist()]
        assert [list(grid) for grid in grids] == stored


def test_a_prompt_of_processed_media_equals_the_whole_call(processors):
    for processor in processors.values():
        video = {"type": "video", "video": [FRAME] * 5}
        messages = [user("Look: ", video, {"type": "image", "image": FRAME}, "?")]
        expected = processor(messages, add_generation_prompt=True, fps=3.0)
        media = processor.load_media(messages, fps=3.0)
        np.testing.assert_array_equal(
            processor.prompt_ids([user("Look: ", VIDEO, IMAGE, "?")], media), expected["input_ids"][0]
        )
        arrays = processor.media_arrays(media)
        assert arrays.keys() == expected.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name])


def test_default_template_of_qwen3_vl(processors):
    """No default system message; a system message only at the start."""
    tokenizer = processors["qwen3_vl"].tokenizer
    messages = [
        {"role": "system", "content": "Be brief."},
        user(IMAGE, "Hi ", VIDEO),
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "user", "content": "Bye"},
    ]
    options = {"tokenize": False, "add_vision_id": True, "add_generation_prompt": True}
    expected = (
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>Hi "
        "Video 1: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(messages[1:], **options) == expected
    assert tokenizer.apply_chat_template(messages, **options) == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected
    with pytest.raises(UserError, match="the system message is not the first message"):
        processors["qwen3_vl"]([messages[3], messages[0]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_default_templates_refuse_what_they_do_not_render(family, key):
    """It was dropped, without an error."""
    processor, question = Processor(train_tokenizer([]), family=family), user("?")
    answer = {"role": "assistant", "content": "Calling."}
    processor([question, answer | {key: None}])
    with pytest.raises(
        UserError, match=r"template refuses .*tool_calls or reasoning_content, which this template does not"
    ):
        processor([question, answer | {key: [{"name": "f", "arguments": {}}]}])


def test_default_template_of_qwen3_vl_refuses_other_roles(processors):
    """The answer of a tool was a turn of its own; the published template renders it as one of the user."""
    with pytest.raises(UserError, match=r"template refuses .*the role tool, which this template does not render"):
        processors["qwen3_vl"]([user("?"), {"role": "tool", "content": "4"}])


def test_a_tokenizer_serves_several_members():
    tokenizer = train_tokenizer([])
    processors = {family: Processor(tokenizer, family=family) for family in FAMILIES}
    for family, processor in processors.items():
        assert processor.tokenizer.chat_template == FAMILIES[family].default_chat_template
    assert tokenizer.chat_template is None


# ---- files


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    processor = Processor(train_tokenizer([]), family=family)
    processor.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    assert (loaded.family, loaded.image, loaded.video) == (family, processor.image, processor.video)
    assert loaded.tokenizer.chat_template == FAMILIES[family].default_chat_template


HUB = {  # the files of the published checkpoints
    "qwen2_5_vl": {
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
    },
    "qwen3_vl": {
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([]).save_pretrained(folder)
    return folder


def write(folder, source, files):
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("family", HUB)
def test_published_files_are_read(family, tokenizer_folder, tmp_path):
    loaded = Processor.from_pretrained(write(tmp_path, tokenizer_folder, HUB[family]))
    assert loaded.family == family
    half = {"patch_size": 16, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    expected = {
        "qwen2_5_vl": (VisionSettings(3136, 12845056), VisionSettings(3136, 12845056)),
        "qwen3_vl": (VisionSettings(65536, 16777216, **half), ClipSettings(4096, 25165824)),
    }[family]
    assert (loaded.image, loaded.video) == expected


@pytest.mark.parametrize(
    ("files", "family"),
    [
        ({"preprocessor_config.json": {"patch_size": 14}}, "qwen2_vl"),
        ({"preprocessor_config.json": {"patch_size": 14}, "config.json": {"model_type": "qwen2_5_vl"}}, "qwen2_5_vl"),
        ({"preprocessor_config.json": {"patch_size": 16}, "config.json": {"model_type": "qwen3_vl"}}, "qwen3_vl"),
        ({"preprocessor_config.json": {"patch_size": 14}, "config.json": {"model_type": ["x"]}}, "qwen2_vl"),
        (HUB["qwen3_vl"] | {"config.json": {"model_type": "qwen3_5"}}, "qwen3_vl"),
        (HUB["qwen2_5_vl"] | {"processor_config.json": {"processor_class": "Qwen3VLProcessor"}}, "qwen3_vl"),
        ({"processor_config.json": {"image_processor": {"processor_class": "Qwen2_5_VLProcessor"}}}, "qwen2_5_vl"),
        (HUB["qwen2_5_vl"] | {"processor_config.json": {"processor_class": "MyProcessor"}}, "qwen2_5_vl"),
        (
            {
                "preprocessor_config.json": {"processor_class": "Qwen2VLProcessor"},
                "config.json": {"model_type": "qwen2_5_vl"},
            },
            "qwen2_5_vl",
        ),
        ({**HUB["qwen2_5_vl"], "config.json": {"model_type": "qwen2_vl"}}, "qwen2_5_vl"),
    ],
)
def test_the_family_is_that_of_the_processor_class_or_the_model_type(files, family, tokenizer_folder, tmp_path):
    assert Processor.from_pretrained(write(tmp_path, tokenizer_folder, files)).family == family


def test_capped_frames_are_refused(tokenizer_folder, tmp_path):
    files = HUB["qwen3_vl"]
    files = files | {
        "video_preprocessor_config.json": files["video_preprocessor_config.json"] | {"cap_pixels_per_frame": True}
    }
    with pytest.raises(UserError, match=r"cap_pixels_per_frame is True \(expected False\)"):
        Processor.from_pretrained(write(tmp_path, tokenizer_folder, files))


def test_unknown_families_and_tokenizers_are_refused():
    with pytest.raises(UserError, match=r"family is 'qwen4'; expected one of \['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'\]"):
        Processor(train_tokenizer([]), family="qwen4")

"""Processors are saved and loaded, with the template and tokenizer that transformers chooses; bad folders are refused."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from liger_jax import Processor
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.errors import UserError
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.processor import TOKENIZERS
from tests._support.processing import SETTINGS_FILES, SMALL_LIMITS, copy_with_changes, image_part, text, user


def same_outputs(a, b):
    messages = [user(image_part(300, 200), {"type": "video", "video": np.zeros((3, 120, 80, 3), np.uint8)}, text("x"))]
    a, b = a(messages), b(messages)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_save_and_load(folder, processor):
    loaded = Processor.from_pretrained(folder)
    assert loaded.image == VisionSettings(max_pixels=50_000)
    assert loaded.video == VisionSettings(**SMALL_LIMITS)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == processor.tokenizer.chat_template


@pytest.mark.parametrize("name", [*TOKENIZERS, "UnheardOfTokenizer", None])
def test_tokenizer_class_equals_auto_tokenizers_choice(folder, tmp_path, name):
    """A class that is looked up by name is the one that AutoTokenizer picks, and gives the same tokens."""
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    files = {"tokenizer_config.json": config, "config.json": {"model_type": "qwen2_vl"}}
    copy_with_changes(folder, tmp_path, files, ())
    tokenizer, expected = Processor.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(expected)
    text = "Which digit is it? 12<|im_end|> é<|image_pad|>"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.special_tokens_map == expected.special_tokens_map


def test_transformers_loads_a_saved_processor(folder):
    loaded = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert dict(loaded.size)["longest_edge"] == 50_000
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    expected = loaded(images=image, return_tensors="np")
    outputs = Processor.from_pretrained(folder)([user({"type": "image", "image": image})])
    np.testing.assert_array_equal(outputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja", None])
def test_template_of_the_checkpoint_is_used(folder, tmp_path, place):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    files = {}
    if place == "tokenizer_config.json":
        files = {place: json.loads((folder / place).read_text()) | {"chat_template": template}}
    elif place == "chat_template.json":
        files = {place: {"chat_template": template}}
    copy_with_changes(folder, tmp_path, files, ["chat_template.jinja"])
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    loaded = Processor.from_pretrained(tmp_path)
    outputs = loaded([{"role": "user", "content": "Hi"}])
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert loaded.decode(outputs["input_ids"][0], skip_special_tokens=False) == ("[user]Hi" if place else default)


PLACES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("last", range(4))
def test_template_of_the_tokenizer_replaced_the_processors(folder, tmp_path, first, last):
    """Of several templates, transformers' own processor decides which one is used."""
    copy_with_changes(folder, tmp_path, {}, ["chat_template.jinja"])
    for place in {PLACES[first], PLACES[last]}:
        if place.endswith("jinja"):
            (tmp_path / place).write_text(place)
            continue
        stored = json.loads((tmp_path / place).read_text()) if (tmp_path / place).exists() else {}
        (tmp_path / place).write_text(json.dumps(stored | {"chat_template": place}))
    expected = Qwen2VLProcessor.get_processor_dict(tmp_path)[0].get("chat_template")
    expected = expected or AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert expected == PLACES[min(first, last)]
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.tokenizer.chat_template == expected
    loaded.save_pretrained(tmp_path)  # an older chat_template.json must not replace the template just written
    assert Processor.from_pretrained(tmp_path).tokenizer.chat_template == expected


@pytest.mark.parametrize("form", [dict, list])
def test_the_default_of_several_templates_is_used(folder, tmp_path, form):
    templates = {"rag": "no", "default": "yes"}
    if form is list:
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    copy_with_changes(folder, tmp_path, {"chat_template.json": {"chat_template": templates}}, ())
    assert Processor.from_pretrained(tmp_path).tokenizer.chat_template == "yes"
    (tmp_path / "chat_template.json").write_text('{"chat_template": {"rag": "no"}}')
    with pytest.raises(UserError, match=f"{tmp_path}: chat_template is None; expected a text"):
        Processor.from_pretrained(tmp_path)


def test_error_inside_a_template_names_the_folder(folder, tmp_path):
    """A text-only template was a TypeError with a traceback."""
    text_only = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    copy_with_changes(folder, tmp_path, {"chat_template.json": {"chat_template": text_only}}, ())
    message = rf"{tmp_path}: the chat template refuses the conversation \(can only concatenate str"
    with pytest.raises(UserError, match=message):
        Processor.from_pretrained(tmp_path)([user(image_part())])


def test_bad_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none is neither a folder nor a hub id"):
        Processor.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no image settings"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is a PEFT adapter; expected its base model"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is malformed .*expected valid JSON"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"resample": 2, "rescale_factor": 1}))
    with pytest.raises(ValueError, match=r"resample is 2 \(expected 3\), rescale_factor is 1 \(expected 1/255\)"):
        Processor.from_pretrained(copy_with_changes(folder, tmp_path, {}, SETTINGS_FILES))


def test_damaged_tokenizers_and_templates_are_refused(folder, tmp_path):
    copy_with_changes(folder, tmp_path, {}, ())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{tmp_path}: the tokenizer cannot be loaded"):
        Processor.from_pretrained(tmp_path)
    tokenizer = train_tokenizer([])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"template refuses the conversation \(roles must alternate\)"):
        Processor(tokenizer)([user(text("Hi"))])

"""step_flops agrees with the compiler's own count, and with formulas for the published models."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, QwenVL, QwenVLConfig, prepare
from liger_jax.train.flops import peak_flops, step_flops

CONFIG = Qwen2VLConfig.qwen2_vl_2b()


def batch(config, tokens, side, rows=2, pad=0, labels=True):
    """Returns rows with one image of side x side patches each, and `pad` positions of padding."""
    placeholders = side * side // 4
    ids = np.full((rows, tokens + pad), 7)
    ids[:, 1 : 1 + placeholders] = config.image_token_id
    pixels = np.zeros((rows * side * side, config.vision.patch_values), np.float32)
    grid = np.array([[1, side, side]] * rows)
    mask = np.tile(np.arange(tokens + pad) < tokens, (rows, 1)).astype(int)
    trained = np.where(mask, 7, -100) if labels else np.full_like(ids, -100)
    return prepare(config, input_ids=ids, attention_mask=mask, labels=trained, pixel_values=pixels, image_grid_thw=grid)


def test_forward_pass_equals_the_compilers_count():
    """Without gradients, the counts agree up to norms, activations and the masked half of attention, which XLA computes.

    One layer in each tower, since XLA counts the body of a loop once.
    """
    tiny = Qwen2VLConfig.tiny()
    text = dataclasses.replace(
        tiny.text, num_hidden_layers=1, hidden_size=256, intermediate_size=768, head_dim=64, mrope_section=(8, 12, 12)
    )
    vision = dataclasses.replace(tiny.vision, depth=1, embed_dim=128, intermediate_size=512, hidden_size=256)
    config = dataclasses.replace(tiny, text=text, vision=vision)
    example = batch(config, 64, 8)
    model = Qwen2VL.abstract(config, dtype="float32")
    cost = jax.jit(lambda model, batch: model(batch)).lower(model, example).compile().cost_analysis()
    pairs = text.num_hidden_layers * text.num_attention_heads * text.head_dim * 2 * 64**2 / 2
    flops = step_flops(config, example, frozen=["vision", "merger", "text"]) + 4 * pairs
    assert flops == pytest.approx(cost["flops"], rel=0.05)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("qwen2_5_vl", {"depth": 2, "full_attention_layers": (1,)}), ("qwen3_vl", {"depth": 1, "deepstack_layers": (0,)})],
)
def test_forward_pass_of_newer_families_equals_the_compilers_count(family, layers):
    """Windows, SwiGLU and deepstack mergers are in both counts; the layers are the body of a loop that runs once."""
    tiny = QwenVLConfig.tiny(family=family)
    size = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 768}
    sections = (12, 10, 10) if family == "qwen3_vl" else (8, 12, 12)
    text = dataclasses.replace(tiny.text, num_hidden_layers=1, mrope_section=sections, **size)
    vision = dataclasses.replace(tiny.vision, embed_dim=128, intermediate_size=320, hidden_size=256, **layers)
    config = dataclasses.replace(tiny, text=text, vision=vision)
    example = batch(config, 64, 8)
    compiled = (
        jax.jit(lambda model, batch: model(batch)).lower(QwenVL.abstract(config, dtype="float32"), example).compile()
    )
    masked = 4 * text.num_attention_heads * text.head_dim * 2 * 64**2 / 2
    flops = step_flops(config, example, frozen=["vision", "merger", "text"]) + masked
    assert flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def test_windows_cost_less_than_whole_frames():
    """28 of 32 layers attend within windows of 64 patches, 4 within the frame of 1024."""
    config = QwenVLConfig.qwen2_5_vl_3b()
    windows = batch(config, 400, 32)
    unwindowed = dataclasses.replace(
        windows, vision=dataclasses.replace(windows.vision, window_ids=windows.vision.segment_ids)
    )
    saved = step_flops(config, unwindowed) - step_flops(config, windows)
    assert saved == pytest.approx(12 * 28 * 1280 * 2 * (1024**2 - 16 * 64**2))


def test_step_equals_three_forward_passes():
    """A step also equals the usual estimate: six operations per weight and token, plus attention."""
    text = prepare(CONFIG, input_ids=np.ones((1, 512), int), labels=np.ones((1, 512), int))
    flops = step_flops(CONFIG, text)
    assert flops == pytest.approx(3 * step_flops(CONFIG, text, frozen=["vision", "merger", "text"]))
    weights = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960) + 151936 * 1536
    assert flops == pytest.approx(6 * 512 * weights + 6 * 28 * 1536 * 512**2)


def test_unnecessary_operations_do_not_count():
    """Padding, logits of untrained tokens and gradients of frozen parts do not count."""
    whole = step_flops(CONFIG, batch(CONFIG, 400, 32))
    assert step_flops(CONFIG, batch(CONFIG, 400, 32, pad=300)) == whole
    untrained = step_flops(CONFIG, batch(CONFIG, 400, 32, labels=False))
    assert whole - untrained == pytest.approx(6 * 2 * 400 * 151936 * 1536)
    choices = ([], ["vision"], ["vision", "merger"], ["vision", "merger", "text"])
    counts = [step_flops(CONFIG, batch(CONFIG, 400, 32), frozen=frozen) for frozen in choices]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    text_frozen = step_flops(CONFIG, batch(CONFIG, 400, 32), frozen=["text"])  # its input still has a gradient
    text_alone = step_flops(CONFIG, prepare(CONFIG, input_ids=np.ones((2, 400), int)), frozen=["text"])
    assert text_alone == pytest.approx(
        2 / 3 * step_flops(CONFIG, prepare(CONFIG, input_ids=np.ones((2, 400), int))), rel=0.1
    )
    assert counts[2] < text_frozen < whole


def test_packed_rows_attend_within_themselves():
    ids = np.ones((1, 512), int)
    apart = prepare(CONFIG, input_ids=ids, labels=ids, segment_ids=np.repeat([[1, 2]], 256, axis=1))
    together = prepare(CONFIG, input_ids=ids, labels=ids)
    assert step_flops(CONFIG, together) - step_flops(CONFIG, apart) == pytest.approx(6 * 28 * 1536 * 2 * 256**2)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_lora_needs_the_gradients_of_inputs():
    """With all parts frozen and LoRA in both towers, a step omits the gradients of weights: a third of the operations."""
    example = batch(CONFIG, 64, 8, labels=True)
    unfrozen, frozen = step_flops(CONFIG, example), {"frozen": ("vision", "merger", "text")}
    forward, text_lora = (step_flops(CONFIG, example, **frozen, adapted=parts) for parts in ((), ("text",)))
    all_lora = step_flops(CONFIG, example, **frozen, adapted=("vision", "text"))
    assert forward < text_lora < all_lora < unfrozen and all_lora / unfrozen == pytest.approx(2 / 3, rel=0.02)

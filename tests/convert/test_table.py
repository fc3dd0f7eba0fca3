"""The table covers a handwritten list of tensors, and its two directions are inverses."""

import math

import numpy as np
import pytest

from convert.table import (
    SPELLING,
    current_name,
    hub_partition,
    hub_shape,
    hub_tensors,
    original_name,
    read_sizes,
    table_of,
    to_hub,
    to_parameter,
)
from liger_jax import Qwen2VLConfig, QwenVL, QwenVLConfig
from liger_jax.model import params
from liger_jax.model.params import param_paths
from tests._support import hub_layout as hub

TABLE = table_of("qwen2_vl")
LAYOUTS = sorted({row.layout for family in SPELLING for row in table_of(family)})
# preset -> parameters, those of the vision tower, its main merger and its deepstack mergers, tensors in the state dict
PUBLISHED = {
    "qwen2_vl_2b": (2_208_985_600, 665_271_296, 34_087_936, 0, 729),
    "qwen2_vl_7b": (8_291_375_616, 675_759_104, 44_575_744, 0, 730),
    "qwen2_vl_72b": (73_405_560_320, 699_356_672, 68_173_312, 0, 1354),
    "qwen2_5_vl_3b": (3_754_622_976, 668_684_288, 36_708_608, 0, 824),
    "qwen2_5_vl_7b": (8_292_166_656, 676_550_144, 44_574_464, 0, 729),
    "qwen2_5_vl_32b": (33_452_718_336, 688_841_984, 52_440_320, 0, 1161),
    "qwen2_5_vl_72b": (73_410_777_344, 704_573_696, 68_172_032, 0, 1353),
    "qwen3_vl_2b": (2_127_532_032, 406_957_056, 25_174_016, 75_540_480, 625),
    "qwen3_vl_4b": (4_437_815_808, 415_347_712, 27_271_680, 81_833_472, 713),
    "qwen3_vl_8b": (8_767_123_696, 576_388_336, 40_119_040, 120_377_856, 750),
    "qwen3_vl_32b": (33_357_390_064, 595_266_800, 44_838_656, 134_536_704, 1058),
}


def shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in param_paths(QwenVL.abstract(config)).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_every_tensor_and_every_parameter_once(tied):
    config = Qwen2VLConfig.from_hf(hub.CONFIG | {"tie_word_embeddings": tied})
    parameters = shapes(config)
    tensors = hub_tensors(parameters, read_sizes(parameters, (hub.C, hub.T, hub.P), TABLE), TABLE)
    expected = {name: shape for name, shape in hub.SHAPES.items() if not (tied and name == "lm_head.weight")}
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(tensors) == len(expected)


def test_tables_of_the_family_cover_every_parameter():
    """Each table has a parameter once; every parameter is in some table, and in that of each member that has it."""
    tables = {family: [row.path for row in table_of(family)] for family in SPELLING}
    assert set().union(*tables.values()) == {parameter.path for parameter in params.TABLE}
    for family, paths in tables.items():
        assert len(set(paths)) == len(paths)
        assert shapes(QwenVLConfig.tiny(family=family)).keys() <= set(paths)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_models_have_all_their_parameters(preset):
    """The numbers are those of transformers' models."""
    config = getattr(QwenVLConfig, preset)()
    vision, table = config.vision, table_of(config.family)
    parameters = shapes(config)
    tensors = hub_tensors(parameters, read_sizes(parameters, (3, 2, vision.patch_size), table), table)
    counts = [
        sum(math.prod(shape) for path, shape in parameters.items() if path.startswith(part))
        for part in ("", "visual", "visual/merger", "visual/deepstack")
    ]
    assert (*counts, len(tensors)) == PUBLISHED[preset]
    assert sum(math.prod(tensor.shape) for tensor in tensors) == counts[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_invertible(layout):
    sizes = {letter: 2 + i for i, letter in enumerate("VHNDKFEndICTPQMmR")} | {"3": 3}
    tensor = np.random.default_rng(0).normal(size=hub_shape(layout, sizes))
    np.testing.assert_array_equal(to_hub(layout, to_parameter(layout, tensor, sizes), sizes), tensor)


def test_heads_layout_by_index():
    sizes = {"N": 2, "D": 3, "H": 5}
    weight = np.arange(30).reshape(6, 5)
    kernel = to_parameter("(N D) H -> H N D", weight, sizes)
    assert kernel.shape == (5, 2, 3)
    assert kernel[4, 1, 2] == weight[1 * 3 + 2, 4]
    kernel = to_parameter("H (N D) -> N D H", weight.T, sizes)
    assert kernel[1, 2, 4] == weight.T[4, 1 * 3 + 2]


def test_names():
    for name in hub.SHAPES:
        assert original_name(name) == name
        assert original_name(hub.new_name(name)) == name
        assert current_name(name) == current_name(hub.new_name(name)) == hub.new_name(name)


def test_partition_follows_the_parameter():
    """A hub tensor is split where its parameter is, but only along the slowest axis of a dimension."""
    assert hub_partition("(N D) H -> H N D", ("fsdp", "tensor", None)) == ["tensor", "fsdp"]
    assert hub_partition("(3 n d) E -> E 3 n d", ("fsdp", None, "tensor", None)) == [None, "fsdp"]
    assert hub_partition("E C T P Q -> (C T P Q) E", ("tensor", "fsdp")) == ["fsdp", None, None, None, None]
    assert hub_partition("V H -> V H", ()) == [None, None]


def test_unknown_and_contradicting_parameters_are_refused():
    with pytest.raises(ValueError, match="lora_a"):
        read_sizes({"language_model/layers/lora_a": (2, 3)}, (3, 2, 14), TABLE)
    with pytest.raises(ValueError, match=r"norm/weight.*expected 8 where it has 9"):
        read_sizes(
            {"language_model/embed_tokens/weight": (5, 8), "language_model/norm/weight": (9,)}, (3, 2, 14), TABLE
        )
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        read_sizes({"language_model/layers/input_layernorm/weight": (9,)}, (3, 2, 14), TABLE)
    with pytest.raises(ValueError, match=r"patch_embed.*expected 1176 where it has 1000"):
        read_sizes({"visual/patch_embed/kernel": (1000, 8)}, (3, 2, 14), TABLE)

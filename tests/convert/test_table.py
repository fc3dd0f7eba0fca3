"""The table covers a handwritten list of tensors, and its two directions are inverses."""

import numpy as np
import pytest

from convert.table import (
    TABLE,
    hub_partition,
    hub_shape,
    hub_tensors,
    original_name,
    read_sizes,
    to_hub,
    to_parameter,
)
from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.model import params
from liger_jax.model.params import param_paths
from tests._support import hub_layout as hub


def shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in param_paths(Qwen2VL.abstract(config)).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_every_tensor_and_every_parameter_once(tied):
    config = Qwen2VLConfig.from_hf(hub.CONFIG | {"tie_word_embeddings": tied})
    parameters = shapes(config)
    tensors = hub_tensors(parameters, read_sizes(parameters, (hub.C, hub.T, hub.P)))
    expected = {name: shape for name, shape in hub.SHAPES.items() if not (tied and name == "lm_head.weight")}
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(tensors) == len(expected)
    assert {row.path for row in TABLE} - parameters.keys() == ({"lm_head/weight"} if tied else set())
    assert [row.path for row in TABLE] == [parameter.path for parameter in params.TABLE]


def test_published_models_have_all_their_tensors():
    """The state dicts of transformers have 729, 730 and 1354 tensors."""
    for config, count in (
        (Qwen2VLConfig.qwen2_vl_2b(), 729),
        (Qwen2VLConfig.qwen2_vl_7b(), 730),
        (Qwen2VLConfig.qwen2_vl_72b(), 1354),
    ):
        parameters = shapes(config)
        assert len(hub_tensors(parameters, read_sizes(parameters, (3, 2, 14)))) == count


@pytest.mark.parametrize("layout", sorted({row.layout for row in TABLE}))
def test_layouts_are_invertible(layout):
    sizes = {letter: 2 + i for i, letter in enumerate("VHNDKFEndICTPQMm")} | {"3": 3}
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


def test_partition_follows_the_parameter():
    """A hub tensor is split where its parameter is, but only along the slowest axis of a dimension."""
    assert hub_partition("(N D) H -> H N D", ("fsdp", "tensor", None)) == ["tensor", "fsdp"]
    assert hub_partition("(3 n d) E -> E 3 n d", ("fsdp", None, "tensor", None)) == [None, "fsdp"]
    assert hub_partition("E C T P Q -> (C T P Q) E", ("tensor", "fsdp")) == ["fsdp", None, None, None, None]
    assert hub_partition("V H -> V H", ()) == [None, None]


def test_unknown_and_contradicting_parameters_are_refused():
    with pytest.raises(ValueError, match="lora_a"):
        read_sizes({"language_model/layers/lora_a": (2, 3)}, (3, 2, 14))
    with pytest.raises(ValueError, match=r"norm/weight.*expected 8 where it has 9"):
        read_sizes({"language_model/embed_tokens/weight": (5, 8), "language_model/norm/weight": (9,)}, (3, 2, 14))
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        read_sizes({"language_model/layers/input_layernorm/weight": (9,)}, (3, 2, 14))
    with pytest.raises(ValueError, match=r"patch_embed.*expected 1176 where it has 1000"):
        read_sizes({"visual/patch_embed/kernel": (1000, 8)}, (3, 2, 14))

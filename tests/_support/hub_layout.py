"""Writes checkpoints in the hub's layout, from a handwritten list of names and shapes."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Sizes that could be mistaken for each other differ.
V, N, K, D, F, LAYERS = 50, 5, 1, 16, 40, 3  # text: vocabulary, heads, kv heads, head size, MLP, layers
H = N * D  # width
E, BLOCKS, C, T, P = 16, 2, 3, 2, 4  # vision: width, layers, channels, frames, patch side; 2 heads of 8
M = 4 * E

CONFIG = {  # the flat layout of the original checkpoints
    "model_type": "qwen2_vl",
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": D,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "image_token_id": 45,
    "video_token_id": 46,
    "vision_start_token_id": 47,
    "vision_end_token_id": 48,
    "vision_config": {
        "depth": BLOCKS,
        "embed_dim": E,
        "hidden_size": H,
        "mlp_ratio": 4,
        "num_heads": 2,
        "in_chans": C,
        "patch_size": P,
    },
}

_LAYER = {
    "input_layernorm.weight": (H,),
    "self_attn.q_proj.weight": (N * D, H),
    "self_attn.q_proj.bias": (N * D,),
    "self_attn.k_proj.weight": (K * D, H),
    "self_attn.k_proj.bias": (K * D,),
    "self_attn.v_proj.weight": (K * D, H),
    "self_attn.v_proj.bias": (K * D,),
    "self_attn.o_proj.weight": (H, N * D),
    "post_attention_layernorm.weight": (H,),
    "mlp.gate_proj.weight": (F, H),
    "mlp.up_proj.weight": (F, H),
    "mlp.down_proj.weight": (H, F),
}
_BLOCK = {
    "norm1.weight": (E,),
    "norm1.bias": (E,),
    "attn.qkv.weight": (3 * E, E),
    "attn.qkv.bias": (3 * E,),
    "attn.proj.weight": (E, E),
    "attn.proj.bias": (E,),
    "norm2.weight": (E,),
    "norm2.bias": (E,),
    "mlp.fc1.weight": (4 * E, E),
    "mlp.fc1.bias": (4 * E,),
    "mlp.fc2.weight": (E, 4 * E),
    "mlp.fc2.bias": (E,),
}
SHAPES = {
    "visual.patch_embed.proj.weight": (E, C, T, P, P),
    **{f"visual.blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in _BLOCK.items()},
    "visual.merger.ln_q.weight": (E,),
    "visual.merger.ln_q.bias": (E,),
    "visual.merger.mlp.0.weight": (M, M),
    "visual.merger.mlp.0.bias": (M,),
    "visual.merger.mlp.2.weight": (H, M),
    "visual.merger.mlp.2.bias": (H,),
    "model.embed_tokens.weight": (V, H),
    **{f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in _LAYER.items()},
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
}


def tensors(dtype="float32", *, tied: bool = False) -> dict[str, np.ndarray]:
    """Returns random weights under the original names."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    return {name: array for name, array in weights.items() if not (tied and name == "lm_head.weight")}


def new_name(name: str) -> str:
    """Returns the name of a tensor in transformers 4.52 and later."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def write(folder: Path, state: dict[str, np.ndarray], *, shards: int = 1, tied: bool = False, **config) -> Path:
    """Writes a checkpoint folder and returns it. Tensors are assigned to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied} | config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        save_file({n: a for n, a in state.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(a.nbytes for a in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def expected_parameters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters for these tensors, rearranged one by one without the table."""

    def text(name, change=lambda w: w):
        return np.stack([change(state[f"model.layers.{i}.{name}"]) for i in range(LAYERS)])

    def vision(name, change=lambda w: w):
        return np.stack([change(state[f"visual.blocks.{i}.{name}"]) for i in range(BLOCKS)])

    def heads(n, d):
        return lambda w: w.T.reshape(w.shape[1], n, d)

    parameters = {
        "language_model/embed_tokens/weight": state["model.embed_tokens.weight"],
        "language_model/norm/weight": state["model.norm.weight"],
        "language_model/layers/input_layernorm/weight": text("input_layernorm.weight"),
        "language_model/layers/post_attention_layernorm/weight": text("post_attention_layernorm.weight"),
        "language_model/layers/self_attn/q_proj/kernel": text("self_attn.q_proj.weight", heads(N, D)),
        "language_model/layers/self_attn/q_proj/bias": text("self_attn.q_proj.bias", lambda b: b.reshape(N, D)),
        "language_model/layers/self_attn/k_proj/kernel": text("self_attn.k_proj.weight", heads(K, D)),
        "language_model/layers/self_attn/k_proj/bias": text("self_attn.k_proj.bias", lambda b: b.reshape(K, D)),
        "language_model/layers/self_attn/v_proj/kernel": text("self_attn.v_proj.weight", heads(K, D)),
        "language_model/layers/self_attn/v_proj/bias": text("self_attn.v_proj.bias", lambda b: b.reshape(K, D)),
        "language_model/layers/self_attn/o_proj/kernel": text("self_attn.o_proj.weight", lambda w: w.T.reshape(N, D, H)),
        "language_model/layers/mlp/gate_proj/kernel": text("mlp.gate_proj.weight", np.transpose),
        "language_model/layers/mlp/up_proj/kernel": text("mlp.up_proj.weight", np.transpose),
        "language_model/layers/mlp/down_proj/kernel": text("mlp.down_proj.weight", np.transpose),
        "visual/patch_embed/kernel": state["visual.patch_embed.proj.weight"].reshape(E, -1).T,
        "visual/blocks/attn/qkv/kernel": vision("attn.qkv.weight", lambda w: w.T.reshape(E, 3, 2, 8)),
        "visual/blocks/attn/qkv/bias": vision("attn.qkv.bias", lambda b: b.reshape(3, 2, 8)),
        "visual/blocks/attn/proj/kernel": vision("attn.proj.weight", lambda w: w.T.reshape(2, 8, E)),
        "visual/blocks/attn/proj/bias": vision("attn.proj.bias"),
        "visual/blocks/mlp/fc1/kernel": vision("mlp.fc1.weight", np.transpose),
        "visual/blocks/mlp/fc1/bias": vision("mlp.fc1.bias"),
        "visual/blocks/mlp/fc2/kernel": vision("mlp.fc2.weight", np.transpose),
        "visual/blocks/mlp/fc2/bias": vision("mlp.fc2.bias"),
        **{
            f"visual/blocks/norm{k}/{part}": vision(f"norm{k}.{part}")
            for k in (1, 2)
            for part in ("weight", "bias")
        },
        "visual/merger/ln_q/weight": state["visual.merger.ln_q.weight"],
        "visual/merger/ln_q/bias": state["visual.merger.ln_q.bias"],
        "visual/merger/fc1/kernel": state["visual.merger.mlp.0.weight"].T,
        "visual/merger/fc1/bias": state["visual.merger.mlp.0.bias"],
        "visual/merger/fc2/kernel": state["visual.merger.mlp.2.weight"].T,
        "visual/merger/fc2/bias": state["visual.merger.mlp.2.bias"],
    }  # fmt: skip
    if "lm_head.weight" in state:
        parameters["lm_head/weight"] = state["lm_head.weight"]
    return parameters

#!/usr/bin/env python
"""Writes reference values for the generation options, computed by transformers.

    pip install torch==2.13.0 transformers==5.17.0        # the CPU builds suffice
    python tests/references/make_generation.py            # 20 s; writes next to this file

Files
  generation.npz   processors/history, logits: fixed inputs. processors/<option>=<value>: outputs of the logits processor.
                   <scenario>/<option>=<value>: greedy tokens of model_untied with the option. <scenario>/logprobs:
                   log-softmax of the model's own logits at each step.
  generation.json  stop_strings: token sequences, strings, and the number of tokens after which StopStringCriteria first
                   stops, or null. defaults: generation_config.json files, and the options that generate() reads from them.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import StopStringCriteria

from liger_jax.demo.tokenizer import train_tokenizer

HERE = Path(__file__).parent
SCENARIOS = ("text_batch_left", "batch_left")
NEW_TOKENS, PAD, END, IMAGE = 12, 150, 152, 158
BAD_WORDS = [[7], [3, 4], [5, 6, 7], [END]]  # transformers ignores an EOS token alone
OPTIONS = ("no_repeat_ngram_size=1", "no_repeat_ngram_size=2", "min_new_tokens=6", "bad_words_ids", "all")
TEXTS = ["Hello world, ünï😀cödé and stop there", "a\nb\n\nc", "<|im_start|>user<|im_end|>!"]
STRINGS = [
    ["wor"],
    ["o w"],
    ["stop", "😀"],
    ["ö"],
    ["\n\n"],
    ["there"],
    ["never"],
    ["<|im_end|>"],
    ["H", "nd s"],
    ["r<|im"],
]
DEFAULTS = [
    {},
    {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01, "eos_token_id": [151645, 151643]},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": None, "min_p": 0.1, "repetition_penalty": 1.05},
    {"top_k": 5, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "max_new_tokens": 99, "eos_token_id": 7},
]
NAMES = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
NAMES += ("min_new_tokens", "eos_token_id", "pad_token_id", "num_return_sequences")


def processors(rng) -> dict[str, np.ndarray]:
    logits = torch.from_numpy(rng.normal(size=(3, 40)).astype(np.float32) * 3)
    history = torch.from_numpy(rng.integers(0, 6, size=(3, 24)))
    history[0, -2:] = torch.tensor([5, 6])
    history[1, -1] = 3
    ends = torch.tensor([8, 9])
    p = logits_process
    chains = {f"no_repeat_ngram_size={n}": [p.NoRepeatNGramLogitsProcessor(n)] for n in (1, 2, 3, 4)}
    chains["bad_words_ids"] = [p.NoBadWordsLogitsProcessor([*BAD_WORDS[:3], [8]], ends)]
    for step in (3, 4):
        chains[f"min_new_tokens=4,step={step}"] = [
            p.MinNewTokensLengthLogitsProcessor(history.shape[1] - step, 4, ends)
        ]
    chains["all"] = [
        p.RepetitionPenaltyLogitsProcessor(1.3),
        p.NoRepeatNGramLogitsProcessor(2),
        *chains["bad_words_ids"],
        *chains["min_new_tokens=4,step=3"],
    ]
    arrays = {"processors/logits": logits.numpy(), "processors/history": history.numpy()}
    for name, chain in chains.items():
        processed = logits.clone()
        for processor in chain:
            processed = processor(history, processed)
        arrays[f"processors/{name}"] = processed.numpy()
    return arrays


def generations() -> dict[str, np.ndarray]:
    model = Qwen2VLForConditionalGeneration.from_pretrained(HERE / "model_untied", attn_implementation="eager").eval()
    arrays = {}
    with np.load(HERE / "scenarios.npz") as stored:
        scenarios = dict(stored)
    for scenario in SCENARIOS:
        folder = f"prompt/{scenario}/"
        prompt = {key.removeprefix(folder): value for key, value in scenarios.items() if key.startswith(folder)}
        if "image_grid_thw" in prompt:
            prompt["mm_token_type_ids"] = (prompt["input_ids"] == IMAGE).astype(np.int64)
            prompt["pixel_values"] = scenarios[f"{scenario}/pixel_values"].astype(np.float32)
        prompt = {key: torch.from_numpy(value) for key, value in prompt.items()}

        def run(eos=None, **options):
            settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
            with torch.no_grad():
                return model.generate(
                    **prompt,
                    **settings,
                    **options,
                    return_dict_in_generate=True,
                    output_logits=True,
                    output_scores=True,
                )

        prompt_length = prompt["input_ids"].shape[1]
        plain = run()
        tokens = plain.sequences[:, prompt_length:]
        arrays[f"{scenario}/logprobs"] = torch.stack(plain.logits, 1).log_softmax(-1).numpy()
        ends, words = [int(tokens[0, 2]), int(tokens[1, 4])], [[int(tokens[0, 1])], tokens[1, 2:4].tolist()]
        arrays |= {f"{scenario}/ends": np.array(ends), f"{scenario}/words": np.array(words[0] + words[1])}
        for name in OPTIONS:
            options = {
                "no_repeat_ngram_size=1": {"no_repeat_ngram_size": 1},
                "no_repeat_ngram_size=2": {"no_repeat_ngram_size": 2},
                "min_new_tokens=6": {"min_new_tokens": 6, "eos": ends},
                "bad_words_ids": {"bad_words_ids": words},
                "all": {
                    "no_repeat_ngram_size": 2,
                    "repetition_penalty": 1.2,
                    "bad_words_ids": words,
                    "min_new_tokens": 6,
                },
            }[name]
            options = options | {"eos": ends} if name == "all" else options
            output = run(**options)
            scores = torch.stack(output.scores, 1).topk(2, -1).values
            assert float((scores[..., 0] - scores[..., 1]).min()) > 1e-3, f"{scenario} {name}: too close a choice"
            sequences = output.sequences[:, prompt_length:].numpy()
            missing = NEW_TOKENS - sequences.shape[1]
            arrays[f"{scenario}/{name}"] = np.pad(sequences, [(0, 0), (0, missing)], constant_values=PAD)
    return arrays


def stop_strings() -> list[dict]:
    """Returns cases with tokens of whole words and of single bytes, for which StopStringCriteria supports only ASCII."""
    cases = []
    for learnt, text, strings in itertools.product((TEXTS[:1] * 4, []), TEXTS, STRINGS):
        if not learnt and not "".join(strings).isascii():
            continue
        tokenizer = train_tokenizer(learnt)
        tokens = tokenizer(text)["input_ids"]
        criteria = StopStringCriteria(tokenizer, strings)
        stops = [n for n in range(1, len(tokens) + 1) if bool(criteria(torch.tensor([tokens[:n]]), None)[0])]
        cases.append({"learnt": learnt, "tokens": tokens, "strings": strings, "stop": stops[0] if stops else None})
    return cases


def defaults() -> list[dict]:
    """Returns the options that generate() uses: those in the file, else transformers' defaults."""
    cases = []
    for stored in DEFAULTS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "generation_config.json").write_text(json.dumps(stored))
            config = GenerationConfig.from_pretrained(folder)
        values = {name: getattr(config, name) for name in NAMES}
        filled = GenerationConfig._get_default_generation_params()
        cases.append({"file": stored, "options": {k: filled.get(k) if v is None else v for k, v in values.items()}})
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    np.savez_compressed(out / "generation.npz", **processors(np.random.default_rng(3)), **generations())
    stored = {"stop_strings": stop_strings(), "defaults": defaults()}
    (out / "generation.json").write_text(json.dumps(stored, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

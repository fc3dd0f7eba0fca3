"""Generation as part of a program that the caller traces, such as a function under `jax.jit`."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax.generation.loop import (
    NEW_TOKENS,
    NON_FINITE,
    Generated,
    decode_loop,
    decode_weights,
    first_token_logits,
    init_cache,
    init_decode_state,
    prefill,
    repeat_rows,
)
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.sampling import History, Sampling
from liger_jax.generation.session import check_prompts, is_traced
from liger_jax.inputs.batch import Batch, bucket
from liger_jax.model import QwenVL
from liger_jax.model.decode_layout import choose_layout
from liger_jax.model.sharding import find_abstract_mesh, get_mesh, mesh_context, run_on_auto_axes


def generate_traced(model: QwenVL, batch: Batch, options: GenerationOptions, seed: Any = None) -> Generated:
    """Generates as a `DecodeSession` does, as part of a program that the caller traces, such as a function under `jax.jit`.

    A row whose logits are not finite ends with padding, since a program cannot raise an error.

    Args:
        model: the model; its arrays may be traced, as may those of the batch.
        batch: prompts, as `prepare` returns them.
        options: generation options.
        seed: a traced integer, or one per prompt, which replaces that of the options.

    Returns:
        The new tokens, with None for log-probabilities that were not requested.
    """
    prompts, samples = batch.shape[0], options.num_return_sequences
    check_prompts(model.config, batch, options.max_new_tokens)
    options.check_against(model.config, prompts)
    sampling = Sampling.from_options(options, model.config, prompts, prompts * samples, seed=seed)
    batch = _on_devices_of(model, dataclasses.replace(batch, labels=None))
    return _traced_program(model, batch, sampling, samples=samples, limit=options.max_new_tokens)


def _on_devices_of(model: QwenVL, batch: Batch) -> Batch:
    """Returns the batch, with a constraint that names the devices of a model that is a constant of the caller's program.

    JAX would not compile the program for the devices of its constants.
    """
    mesh, has_context = get_mesh(model), not jax.sharding.get_abstract_mesh().empty
    if is_traced(model) or has_context or mesh is None or AxisType.Explicit in mesh.axis_types:
        return batch
    if find_abstract_mesh(batch) is not None:  # then the program is compiled for the devices of the batch
        return batch
    anywhere = NamedSharding(mesh, P(P.UNCONSTRAINED, P.UNCONSTRAINED))
    return dataclasses.replace(batch, segment_ids=jax.lax.with_sharding_constraint(batch.segment_ids, anywhere))


@functools.partial(jax.jit, static_argnames=("samples", "limit"))
def _traced_program(model: QwenVL, batch: Batch, sampling: Sampling, *, samples: int, limit: int) -> Generated:
    run = functools.partial(_prefill_and_decode, samples=samples, limit=limit)
    return run_on_auto_axes(run, model, batch, sampling, rows_of=batch.input_ids)


def _prefill_and_decode(model: QwenVL, batch: Batch, sampling: Sampling, *, samples: int, limit: int) -> Generated:
    """Returns `limit` new tokens for each of `samples` rows per prompt. Runs the compiled functions in their order."""
    rows, room = batch.shape[0] * samples, bucket(limit, NEW_TOKENS)
    has_context = not jax.sharding.get_abstract_mesh().empty
    with mesh_context(None if has_context else find_abstract_mesh((model, batch))):
        # unwrapped: JAX allows compiler options only for whole programs, and `run_on_auto_axes` needs a new trace
        hidden, keys_values = inspect.unwrap(prefill)(model, batch)
        first_step = first_token_logits(model, hidden, batch.position_ids, batch.segment_ids, np.int32(0))
        layout = choose_layout(model.language_model, model.head, (batch.shape[0], batch.shape[1] + room))
        cache, history = init_cache(*keys_values, batch.segment_ids, room=room, layout=layout), None
        if samples > 1:
            cache, first_step = repeat_rows((cache, first_step), samples)
        if sampling.needs_history:
            ids, segments = (jnp.repeat(x, samples, axis=0) for x in (batch.input_ids, batch.segment_ids))
            history = History.from_prompts(ids, segments, cache.valid.shape[1])
        state, _ = init_decode_state(first_step, sampling, history, room=room, layout=layout)
        if limit > 1:
            arguments = decode_weights(model, layout), cache, state, sampling
            _, state, _ = inspect.unwrap(decode_loop)(*arguments, stopped=np.zeros(rows, bool), until=np.int32(limit))
    generated = Generated(*(array if array is None else array[:, :limit] for array in state.generated))
    tokens = jnp.where(generated.tokens == NON_FINITE, sampling.pad_token, generated.tokens)
    return generated._replace(tokens=tokens)

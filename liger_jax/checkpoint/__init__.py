"""Orbax checkpoints of a model (weights and configuration) and of a training run (the whole state).

A saved model is a self-contained folder:

    config.json, generation_config.json   as on the Hugging Face hub
    lora.json                             the options of `add_lora`, if the model has LoRA
    params/                               Orbax: one array per parameter, under the parameter's path

A training run is a folder of steps, 100/, 200/, ..., managed by Orbax's CheckpointManager, with the same JSON files next to
them. Orbax writes under a temporary name and renames at the end, so a folder named `params` or by a step is complete.
"""

from liger_jax.checkpoint.models import HUB_WEIGHTS as HUB_WEIGHTS
from liger_jax.checkpoint.models import LORA as LORA
from liger_jax.checkpoint.models import float_dtype as float_dtype
from liger_jax.checkpoint.models import is_model as is_model
from liger_jax.checkpoint.models import load_model as load_model
from liger_jax.checkpoint.models import save_model as save_model
from liger_jax.checkpoint.models import write_config as write_config
from liger_jax.checkpoint.runs import checkpoint_manager as checkpoint_manager
from liger_jax.checkpoint.runs import restore_intact_state as restore_intact_state
from liger_jax.checkpoint.runs import restore_state as restore_state
from liger_jax.checkpoint.runs import save_state as save_state
from liger_jax.checkpoint.steps import check_space as check_space
from liger_jax.checkpoint.steps import complete_steps as complete_steps
from liger_jax.checkpoint.steps import remove_unfinished as remove_unfinished
from liger_jax.checkpoint.steps import saved_steps as saved_steps

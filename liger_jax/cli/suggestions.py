"""Suggestions of the command line for words that it does not know: close commands, and flags of other trainers."""

from collections.abc import Sequence

# Flags of transformers' Trainer, LLaMA-Factory and ms-swift -> what does the same here.
FLAGS_OF_OTHERS = {
    "bf16": "--master-weights (or nothing: weights are bfloat16 by default)",
    "cutoff_len": "--pack LENGTH",
    "dataset": "the argument DATA",
    "dataset_dir": "the argument DATA",
    "data_path": "the argument DATA",
    "dataloader_num_workers": "--workers",
    "epochs": "--steps (records / batch size steps make an epoch)",
    "eval_dataset": "--held-out FILE",
    "eval_steps": "--save-every (each checkpoint is evaluated on --held-out)",
    "freeze_language_model": "--freeze text",
    "freeze_multi_modal_projector": "--freeze merger",
    "freeze_vision_tower": "--freeze vision",
    "freeze_vit": "--freeze vision",
    "gradient_accumulation_steps": "--accumulate",
    "gradient_checkpointing": "--remat full",
    "image_folder": "--media FOLDER",
    "image_max_pixels": "--max-pixels",
    "lora_r": "--lora RANK",
    "lora_rank": "--lora RANK",
    "lora_target": "--lora-targets",
    "lr": "--learning-rate",
    "max_length": "--pack LENGTH",
    "max_seq_length": "--pack LENGTH",
    "max_steps": "--steps",
    "media_dir": "--media FOLDER",
    "model": "the argument MODEL",
    "model_name_or_path": "the argument MODEL",
    "neat_packing": "--pack LENGTH",
    "num_epochs": "--steps (records / batch size steps make an epoch)",
    "num_train_epochs": "--steps (records / batch size steps make an epoch)",
    "output_dir": "--output FOLDER",
    "packing": "--pack LENGTH",
    "per_device_train_batch_size": "--batch-size (of all devices and accumulated parts together)",
    "resume_from_checkpoint": "the same command again, with the same --output",
    "save_steps": "--save-every",
    "save_total_limit": "--keep",
    "train_batch_size": "--batch-size",
    "val_dataset": "--held-out FILE",
    "vit_lr": "--vision-learning-rate",
    "warmup_ratio": "--warmup",
    "warmup_steps": "--warmup (a fraction of the steps)",
}


def flags_of_others(arguments: Sequence[str]) -> list[str]:
    """Returns a line for each argument that is a flag of another trainer and names what does the same here.

    Example:
        >>> flags_of_others(["finetune", "MODEL", "DATA", "--lora_rank=8", "--steps", "5"])
        ['--lora_rank is --lora RANK here']
    """
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in flags}
    return [f"{flag} is {FLAGS_OF_OTHERS[name]} here" for flag, name in names.items() if name in FLAGS_OF_OTHERS]

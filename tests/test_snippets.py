"""Runs the marked commands and snippets of README.md and docs/, and the examples, on tiny models under the hub's names.

A block below `<!-- runs: NAME -->` is run as it is printed. Runs are shortened by flags that follow those of the page.
Commands that cannot run here, since they need a GPU or a large model, are parsed.
"""

import functools
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from benchmarks.__main__ import COMMANDS as BENCHMARKS
from benchmarks.tables import pages
from convert import to_hf
from liger_jax import QwenVL, cli, save_model
from liger_jax.cli.program import COMMANDS
from liger_jax.config.families import FAMILIES
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from tests._support.snippets import BASH, MARKED, commands

ROOT = Path(__file__).parents[1]
FAMILY_OF = {member.name: family for family, member in FAMILIES.items()}
# The last value of a flag counts.
SHORTER = {
    "finetune": shlex.split("--steps 2 --save-every 2 --batch-size 2 --accumulate 1 --workers 0 --max-new-tokens 2"),
    "generate": ["--max-new-tokens", "2"],
    "chat": ["--max-new-tokens", "2"],
}
SHORTER_EXAMPLES = {
    "chat.py": ["--max-new-tokens", "2"],
    "custom_training_loop.py": ["--steps", "2"],
    "full_finetuning_on_a_mesh.py": ["--steps", "2", "--batch-size", "4", "--length", "128"],
    "lora.py": ["--steps", "2", "--batch-size", "2"],
    "merge_and_export.py": [],
}

WRITTEN = {  # page -> files that its blocks write, besides what they print
    "README.md": ["runs/first/metrics.jsonl"],
    "checkpoints.md": ["hub/model.safetensors", "folder/tokenizer.json", "adapter/adapter_config.json"],
    "fine-tuning.md": ["runs/first/answers.jsonl"],
    "generation.md": ["answers.jsonl"],
    "index.md": ["test.json", "runs/first/adapter/adapter_config.json", "exported/model.safetensors"],
    "migrating.md": ["runs/mine/adapter/adapter_model.safetensors"],
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Returns a function from a hub id to a folder with a tiny random model of its family."""
    folder = tmp_path_factory.mktemp("hub")

    @functools.cache
    def download(family: str) -> Path:
        processor = make_processor(load_digits()[0], family)
        to_hf(QwenVL.init(make_config(processor)), folder / family)
        processor.save_pretrained(folder / family)
        return folder / family

    def snapshot_download(repo_id: str, **_) -> str:
        owner, _, name = repo_id.partition("/")
        assert owner == "Qwen" and name.endswith("B-Instruct"), repo_id
        return str(download(FAMILY_OF[name.rsplit("-", 2)[0]]))

    return snapshot_download


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a folder with the files that the pages name: images, records, questions and the demo's checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    names = ["dog.jpg", "cat.jpg", "cat.png", "images/dog.jpg", "images/cat.jpg"]  # with and without --media images
    names += [f"photos/{animal}/{number}.jpg" for animal in ("cat", "dog") for number in range(12)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)).save(folder / name)
    question = {"role": "user", "content": "<image>What is this?"}
    records = [
        {"messages": [question, {"role": "assistant", "content": answer}], "images": [f"{answer}.jpg"]}
        for answer in ("dog", "cat")
    ] * 4
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "test.json").write_text(json.dumps(records[:2]))
    (folder / "questions.jsonl").write_text(json.dumps({"messages": [question], "images": ["dog.jpg"]}) + "\n")
    processor = make_processor(load_digits()[0])
    checkpoint = folder / "outputs" / "demo" / "checkpoint"
    save_model(QwenVL.init(make_config(processor), dtype="float32"), checkpoint)
    processor.save_pretrained(checkpoint)
    return folder


@pytest.fixture
def as_a_user(hub, files, tmp_path, monkeypatch):
    """Runs the test in a copy of these files, with this hub, and at the end of what a user types."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    return tmp_path


def run_command(program: str, arguments: list[str]) -> None:
    arguments = ["convert", *arguments] if program == "python -m convert" else arguments
    shorter = SHORTER.get(arguments[0], [])
    if "--pack" in arguments:
        shorter = [*shorter, "--pack", "128"]
    if "--eval-generate" in arguments:
        shorter = [*shorter, "--eval-generate", "1"]
    cli.main([*arguments, *shorter])


BLOCKS = [(page, MARKED.findall(page.read_text())) for page in pages(ROOT)]


@pytest.mark.parametrize(
    ("page", "blocks"),
    [(page, blocks) for page, blocks in BLOCKS if blocks],
    ids=lambda value: getattr(value, "name", ""),
)
def test_marked_blocks_of_a_page_run_one_after_the_other(page, blocks, as_a_user):
    for name, language, block in blocks:
        if language == "python":
            exec(compile(block, f"{page.name}: {name}", "exec"), {"__name__": "__main__"})
        else:
            assert commands(block), f"{page.name}: {name} has no command"
            for program, arguments in commands(block):
                run_command(program, arguments)
    assert [path for path in WRITTEN.get(page.name, []) if not (as_a_user / path).is_file()] == []


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_commands_on_a_page_have_valid_arguments(page, capsys):
    """Every command of a page is parsed as by the program, without being run."""
    for program, arguments in (found for block in BASH.findall(page.read_text()) for found in commands(block)):
        try:
            if program == "python -m benchmarks":
                tyro.cli(BENCHMARKS, args=arguments)
            else:
                name, *flags = ["convert", *arguments] if program == "python -m convert" else arguments
                command = COMMANDS[name]
                tyro.cli(
                    functools.wraps(command)(lambda *_, **__: None), args=flags, config=(tyro.conf.OmitArgPrefixes,)
                )
        except (SystemExit, KeyError) as error:
            pytest.fail(f"{page.name}: {program} {shlex.join(arguments)}: {error} {capsys.readouterr().err}")


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.name)
def test_example_runs_as_its_docstring_says(script, as_a_user, monkeypatch, hub):
    """The docstring's command runs, with fewer steps. The script is short."""
    text = script.read_text()
    assert len(text.splitlines()) < 60
    (command,) = re.findall(rf"^python examples/{script.name} (.*)$", text, flags=re.MULTILINE)
    if script.name == "merge_and_export.py":
        make_adapter(as_a_user / "runs" / "lora" / "adapter", hub)
    arguments = shlex.split(command) + SHORTER_EXAMPLES[script.name]
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    runpy.run_path(str(script), run_name="__main__")


def make_adapter(folder: Path, hub) -> None:
    from convert import from_hf, save_adapter
    from liger_jax import add_lora

    save_adapter(add_lora(from_hf(hub("Qwen/Qwen2.5-VL-3B-Instruct")), rank=4), folder)

"""`python -m benchmarks faults`: breaks training runs in every way listed here, and checks that nothing is lost.

Each trial runs the real command, `liger-jax finetune`, on a tiny model, and causes one fault. The run is then resumed to its
end. It passes if every checkpoint (weights and optimizer) and every logged step equal those of an uninterrupted run bit for
bit, no process hangs, and the fault printed one line. Needs Linux and a CPU.
"""

import dataclasses
import datetime
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.environment import RESULTS, versions_of

STEPS, SAVE_EVERY = 100, 5
KILLS = 5  # in a run
CONVERSATIONS = 64
TIMEOUT = 300  # seconds after which a process counts as hanging
PROGRESS = re.compile(
    r"(measuring: )?\d+% \d+/\d+ \[.*\]|compiled the training step for .*"
    r"|resuming from step \d+|compiling the training step|step \d+: held_out_.*|answering \d+ questions about unseen digits"
)
MEASURED = ("per_second", "utilisation", "peak_memory_gib")  # metrics that differ between equal runs
CHECKPOINT_FILES = ("default/_METADATA", "default/manifest.ocdbt", "default/ocdbt.process_0/d/*")


class TrialError(Exception):
    """Raised if a run does not behave as expected after a fault."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """Kills, starves and damages training runs, resumes them, and compares them with an uninterrupted run.

    Runs on a CPU and writes faults.json.
    """

    only: tuple[str, ...] = ()
    """Faults whose names contain one of these texts; by default all."""
    trials: int | None = None
    """Trials per fault; by default as many as in docs/reliability.md."""
    seed: int = 0
    """Seed for the moments and files."""
    results: Path = RESULTS
    """Folder of the result file."""

    def run(self) -> str:
        file = self.results / "faults.json"
        known = {row["fault"]: row for row in json.loads(file.read_text())} if file.exists() else {}
        with tempfile.TemporaryDirectory() as temporary:
            lab = Lab.create(Path(temporary))
            for fault, (count, trial) in FAULTS.items():
                if not self.only or any(text in fault for text in self.only):
                    known[fault] = run_trials(lab, fault, trial, self.trials or count, self.seed)
                    rows = [known[name] for name in FAULTS if name in known]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(rows, indent=1) + "\n")
        return str(file)


def run_trials(lab: "Lab", fault: str, trial: "Trial", count: int, seed: int) -> dict:
    """Runs the trials of a fault. Returns its row: how many passed, and the line that most of them printed."""
    printed: Counter[str] = Counter()
    passed = 0
    for number in range(count):
        rng = random.Random(f"{seed} {fault} {number}")
        try:
            printed[trial(lab, rng)] += 1
            passed += 1
        except Exception as error:  # an unexpected error fails this trial, not the other ones
            print(f"{fault}, trial {number}: {error!s:.2000}", flush=True)
    line = printed.most_common(1)[0][0] if printed else ""
    print(f"{fault}: {passed} of {count}: {line}", flush=True)
    row = {"fault": fault, "tried": count, "passed": passed, "printed": line}
    return row | {"date": datetime.date.today().isoformat(), "versions": versions_of(("jax", "orbax-checkpoint"))}


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lab:
    """A folder with a tiny model, its data, and an uninterrupted run with all its checkpoints."""

    folder: Path

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @classmethod
    def create(cls, folder: Path) -> "Lab":
        lab = cls(folder)
        write_model_and_data(folder)
        lab.finish(lab.start(lab.reference, "--keep", "1000"))
        return lab

    def command(self, output: str | Path, *options: str) -> list[str]:
        arguments = ["finetune", self.folder / "model", self.folder / "data.json", "--output", self.folder / output]
        fixed = f"--steps {STEPS} --save-every {SAVE_EVERY} --batch-size 2 --pack 96 --workers 0 --learning-rate 1e-3"
        return [*map(str, (sys.executable, "-m", "liger_jax.cli", *arguments)), *fixed.split(), *options]

    def start(self, output: str | Path, *options: str) -> subprocess.Popen:
        return self.popen(self.command(output, *options))

    def popen(self, command: list[str]) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(self, process: subprocess.Popen, *, succeeds: bool = True) -> list[str]:
        """Waits for a process. Returns the lines that it printed on stderr, without those about its progress."""
        try:
            _, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        lines = [line for line in errors.splitlines() if line and not PROGRESS.fullmatch(line)]
        if (process.returncode == 0) != succeeds:
            raise TrialError(f"exit status {process.returncode} and {lines[-12:]}")
        return [line.replace(f"{self.folder}/", "") for line in lines]

    def resume(self, output: Path) -> list[str]:
        """Resumes a run to its end and compares it with the reference. Returns the lines that were printed."""
        lines = self.finish(self.start(output))
        self.compare(output)
        return lines

    def compare(self, output: Path, last: int | None = None) -> None:
        """Raises TrialError unless checkpoints and logged steps up to `last` (default: all) equal those of the reference."""
        last = STEPS if last is None else last
        steps = sorted(int(path.name) for path in output.iterdir() if path.name.isdigit())
        if not steps or steps[-1] != last:
            raise TrialError(f"checkpoints of steps {steps}; expected {last} as the last one")
        for step in (step for step in steps if (self.reference / str(step)).exists()):
            if (arrays := read_arrays(output / str(step))) != read_arrays(self.reference / str(step)):
                raise TrialError(f"step {step} differs from the uninterrupted run, {len(arrays)} arrays")
        if read_log(output)[:last] != read_log(self.reference)[:last]:
            raise TrialError("the log differs from that of the uninterrupted run")


Trial = Callable[[Lab, random.Random], str]


def write_model_and_data(folder: Path) -> None:
    """Writes the demo's model with random weights, and conversations about images of digits."""
    from liger_jax import QwenVL
    from liger_jax.checkpoint import save_model
    from liger_jax.demo.data import conversations, load_digits
    from liger_jax.demo.run import make_config, make_processor

    digits, _ = load_digits()
    processor = make_processor(digits)
    save_model(QwenVL.init(make_config(processor)), folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    records = []
    for messages in itertools.islice(conversations(digits, np.random.default_rng(0)), CONVERSATIONS):
        for part in (part for message in messages for part in message["content"] if isinstance(part, dict)):
            if part["type"] == "image":
                name = f"images/{len(list((folder / 'images').iterdir()))}.png"
                part["image"].save(folder / name)
                part["image"] = name
        records.append({"messages": messages})
    (folder / "data.json").write_text(json.dumps(records))


def read_arrays(step: Path) -> dict[str, bytes]:
    """Returns the bytes of all arrays in a checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shardings, of which a CPU has one
        arrays, _ = jax.tree_util.tree_flatten_with_path(checkpointer.restore(step / "default"))
    return {jax.tree_util.keystr(path): np.asarray(array).tobytes() for path, array in arrays}


def read_log(output: Path) -> list[dict]:
    """Returns the lines of a run's log, without the metrics that depend on time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(MEASURED)} for line in lines]


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Waits for a condition, or for the end of a process."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise TrialError("waited too long")
        time.sleep(0.0005)


def logged_steps(output: Path, count: int) -> Callable[[], bool]:
    """Returns a function that returns whether a run has logged this many steps."""
    log = output / "metrics.jsonl"
    return lambda: log.exists() and log.read_bytes().count(b"\n") >= count


def only_line(lines: list[str]) -> str:
    if len(lines) != 1:
        raise TrialError(f"printed {lines}; expected one line")
    return lines[0]


def new_output(lab: Lab) -> Path:
    """Returns a path for the run of the next trial, and removes that of the previous one."""
    output = lab.folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    return output


def interrupted_output(lab: Lab, last: int) -> Path:
    """Returns a copy of the reference as it was after the checkpoint of a step."""
    output = new_output(lab)
    shutil.copytree(lab.reference, output)
    for path in output.iterdir():
        if path.name.isdigit() and int(path.name) > last:
            shutil.rmtree(path)
    return output


# ---- faults ----------------------------------------------------------------------------------------------------------


def kill(wait: Callable[[Path, random.Random, subprocess.Popen], None]) -> Trial:
    """Returns a trial that kills a run, and then each of the processes that resume it, except for the last one."""

    def trial(lab: Lab, rng: random.Random) -> str:
        output = new_output(lab)
        for _ in range(KILLS):
            opened = opened_log(output)
            process = lab.start(output)
            if wait is not while_starting:
                wait_until(opened, process)
            wait(output, rng, process)
            process.kill()
            process.communicate(timeout=TIMEOUT)
            if process.returncode != -signal.SIGKILL:
                raise TrialError(f"exit status {process.returncode} before the process was killed")
        return "".join(lab.resume(output))

    return trial


def opened_log(output: Path) -> Callable[[], bool]:
    """Returns a function that returns whether a run has opened its log since this call, which is when it starts to train."""
    log = output / "metrics.jsonl"

    def number() -> int:
        return log.stat().st_ino if log.exists() else 0

    before = number()
    return lambda: number() != before


def while_starting(output: Path, rng: random.Random, process: subprocess.Popen) -> None:
    """Waits until some moment of the imports, of reading the model or of compiling."""
    time.sleep(rng.uniform(0, 10))


def while_training(output: Path, rng: random.Random, process: subprocess.Popen) -> None:
    """Waits for a few steps, and until some moment of the next ones."""
    count = (output / "metrics.jsonl").read_bytes().count(b"\n")
    wait_until(logged_steps(output, count + rng.randrange(10)), process)
    time.sleep(rng.uniform(0, 0.05))


def while_saving(output: Path, rng: random.Random, process: subprocess.Popen) -> None:
    """Waits until a checkpoint is being written."""
    wait_until(lambda: any(output.glob("*.orbax-checkpoint-tmp*")), process)
    time.sleep(rng.uniform(0, 0.05))


def send(number: signal.Signals) -> Trial:
    """Returns a trial that sends a signal during training."""

    def trial(lab: Lab, rng: random.Random) -> str:
        output = new_output(lab)
        process = lab.start(output)
        wait_until(logged_steps(output, rng.randrange(1, STEPS // 2)), process)
        process.send_signal(number)
        lines = lab.finish(process, succeeds=False)
        lab.compare(output, last=len(read_log(output)))  # saved at the last step
        lab.resume(output)
        # Ctrl-C is acknowledged at once, and again at the end
        return only_line([line for line in lines if line != "liger-jax: interrupted"])

    return trial


def kill_worker(lab: Lab, rng: random.Random) -> str:
    output = new_output(lab)
    process = lab.start(output, "--workers", "2")
    wait_until(logged_steps(output, rng.randrange(1, STEPS // 2)), process)
    os.kill(rng.choice(list(workers_of(process.pid))), signal.SIGKILL)
    lines = lab.finish(process, succeeds=False)
    lab.compare(output, last=len(read_log(output)))
    lab.resume(output)
    return re.sub(r"(step )\d+", r"\1N", only_line(lines))


def workers_of(parent: int) -> Iterator[int]:
    """Yields the processes that load data for a run."""
    children = Path(f"/proc/{parent}/task").glob("*/children")
    for child in {int(number) for file in children for number in file.read_text().split()}:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield child


def damage(change: Callable[[Path], object]) -> Trial:
    """Returns a trial that damages a file of the newest checkpoint."""

    def trial(lab: Lab, rng: random.Random) -> str:
        last = SAVE_EVERY * rng.randrange(2, STEPS // SAVE_EVERY)
        output = interrupted_output(lab, last)
        files = (output / str(last)).glob(rng.choice(CHECKPOINT_FILES))
        change(max(files, key=lambda file: file.stat().st_size))
        line = only_line(lab.resume(output))
        if f"resumed from step {last - SAVE_EVERY}" not in line:
            raise TrialError(line)
        return re.sub(r"\(.*\)", "(...)", re.sub(r"\d+", "N", line))

    return trial


def break_images(lab: Lab, rng: random.Random) -> str:
    output, images = new_output(lab), lab.folder / "images"
    shutil.copytree(images, lab.folder / "intact", dirs_exist_ok=True)
    process = lab.start(output)
    wait_until(logged_steps(output, rng.randrange(1, 5)), process)
    for file in images.iterdir():
        file.write_bytes(file.read_bytes()[:60])  # the header is complete
    try:
        lines = lab.finish(process, succeeds=False)
    finally:
        shutil.copytree(lab.folder / "intact", images, dirs_exist_ok=True)
    lab.compare(output, last=len(read_log(output)))
    lab.resume(output)
    return re.sub(r"\d+", "N", only_line(lines))


def start_twice(lab: Lab, rng: random.Random) -> str:
    output = new_output(lab)
    process = lab.start(output)
    wait_until(logged_steps(output, 1), process)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the second process has started
    try:
        lines = lab.finish(lab.start(output), succeeds=False)
    finally:
        process.send_signal(signal.SIGCONT)
    lab.finish(process)
    lab.compare(output)
    line = only_line(lines)
    if f"process {process.pid} " not in line:
        raise TrialError(line)
    return re.sub(r"process \d+ on [\w.-]+", "process N on HOST", line)


def fill_disk(lab: Lab, rng: random.Random) -> str:
    """The run's folder is a file system that is full after a few checkpoints; then it grows."""
    size = rng.randrange(6000, 15000)
    return in_own_file_system(lab, f"size={size}k", "mount -o remount,size=1g {folder}")


def limit_files(lab: Lab, rng: random.Random) -> str:
    """Writing fails in the middle of a checkpoint, as it does over a quota."""
    output = new_output(lab)
    process = lab.start(output)
    wait_until(logged_steps(output, rng.randrange(STEPS // 2)), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    lines = lab.finish(process, succeeds=False)
    lab.resume(output)
    return only_line(lines)


def make_read_only(lab: Lab, rng: random.Random) -> str:
    """The run's folder is read-only when it starts; then it can be written to."""
    return in_own_file_system(lab, "size=1g", "mount -o remount,rw {folder}", before="mount -o remount,ro {folder};")


def in_own_file_system(lab: Lab, options: str, repair: str, before: str = "") -> str:
    """Runs a command in a new file system, repairs that, resumes the run, and copies it out."""
    output, copy = new_output(lab), lab.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    output.mkdir()
    run = " ".join(lab.command(output))
    script = (
        f"mount -t tmpfs -o {options} tmpfs {output} && {before} {run}; echo status $? >&2; {repair} && {run}; "
        f"echo status $? >&2; cp -r {output} {copy}"
    ).replace("{folder}", str(output))
    lines = lab.finish(lab.popen(["unshare", "--map-root-user", "--mount", "sh", "-c", script]))
    if lines[1:] != ["status 1", "status 0"]:
        raise TrialError(f"printed {lines}; expected one line, status 1, and status 0 after the repair")
    lab.compare(copy)
    return lines[0]


def overflow(lab: Lab, rng: random.Random) -> str:
    """The learning rate is far too high after a few checkpoints."""
    last = SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY - 1)
    output = interrupted_output(lab, last)
    *skipped, line = lab.finish(lab.start(output, "--learning-rate", "1e38"), succeeds=False)
    if not skipped or not all(re.match(r"warning: Step \d+ has loss", warning) for warning in skipped):
        raise TrialError(f"printed {skipped}")
    for path in output.iterdir():
        if path.name.isdigit() and int(path.name) > last:
            shutil.rmtree(path)  # finite, but trained with another learning rate
    lab.resume(output)
    return re.sub(r"\d+", "N", line)


FAULTS: dict[str, tuple[int, Trial]] = {
    f"SIGKILL while the run starts, {KILLS} times in a row": (2, kill(while_starting)),
    f"SIGKILL during training, {KILLS} times in a run": (4, kill(while_training)),
    f"SIGKILL while a checkpoint is written, {KILLS} times in a run": (4, kill(while_saving)),
    "SIGTERM": (5, send(signal.SIGTERM)),
    "SIGINT (Ctrl-C)": (5, send(signal.SIGINT)),
    "data worker killed": (5, kill_worker),
    "disk full": (5, fill_disk),
    "writing a checkpoint fails": (5, limit_files),
    "read-only output": (2, make_read_only),
    "newest checkpoint truncated": (5, damage(lambda file: os.truncate(file, file.stat().st_size // 2))),
    "newest checkpoint emptied": (5, damage(lambda file: os.truncate(file, 0))),
    "newest checkpoint misses a file": (5, damage(Path.unlink)),
    "broken image": (3, break_images),
    "two processes on one output folder": (2, start_twice),
    "non-finite steps": (3, overflow),
}

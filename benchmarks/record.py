"""The file of results of the model benchmarks: a JSON list with one entry per case."""

import datetime
import json
from pathlib import Path

OURS = "liger-jax"
FAMILY_NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
# The fields that identify a case. A newer result replaces an older one with the same values.
CASE_FIELDS = (
    "package",
    "model",
    "what",
    "rows",
    "tokens",
    "prompt_tokens",
    "device",
    "devices",
    "mesh",
    "memory_limit_gib",
    "remat",
    "unroll",
    "attention",
    "lora",
    "master_weights",
    "cache",
    "weights",
    "programs",
)


def record_result(file: Path, result: dict) -> None:
    """Prints a result and adds it to a JSON list, in which it replaces an earlier result of the same case."""
    result = {"date": datetime.date.today().isoformat(), **result}
    print(summary(result), flush=True)
    known = json.loads(file.read_text()) if file.exists() else []
    same = [i for i, entry in enumerate(known) if case_key(entry) == case_key(result)]
    for i in same:
        known[i] = result
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known if same else [*known, result], indent=1) + "\n")


def summary(result: dict) -> str:
    """Returns a result as one line for the terminal."""
    fields = result | result.get("parts", {}) | result.get("first_token_parts", {})
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in fields.items() if isinstance(value, float))
    title = f"{result['what']} {result['model']} x {result['rows']}" if "rows" in result else result["what"]
    return f"{result['package']}: {title}: {result.get('error') or numbers}"


def case_key(result: dict) -> tuple:
    return tuple(result.get(name) for name in CASE_FIELDS)

"""`python -m benchmarks faults`: one trial, and the table of its results."""

import json
import sys

import pytest

from benchmarks import __main__ as benchmarks_cli
from benchmarks import faults, tables

FAULT = "SIGKILL while a checkpoint is written"


def run_faults(monkeypatch, results, *options):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "faults", "--results", str(results), *options])
    benchmarks_cli.main()
    return {row["fault"]: row for row in json.loads((results / "faults.json").read_text())}


def test_killed_run_equals_an_uninterrupted_one(monkeypatch, tmp_path, capsys):
    """With the real command, in processes of its own. Rows of faults that are not repeated are kept."""
    monkeypatch.setattr(faults, "KILLS", 1)
    monkeypatch.setattr(faults, "STEPS", 20)
    (tmp_path / "faults.json").write_text(json.dumps([{"fault": "disk full", "tried": 5, "passed": 5, "printed": "a"}]))
    rows = run_faults(monkeypatch, tmp_path, "--only", FAULT, "--trials", "1")
    (row,) = (row for name, row in rows.items() if FAULT in name)
    assert (row["tried"], row["passed"], row["printed"]) == (1, 1, "")
    assert list(rows) == [row["fault"], "disk full"]
    assert "1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("error", [faults.TrialError("step 3 differs"), FileNotFoundError("step 3 differs")])
def test_failed_trials_are_reported(capsys, error):
    """Regression: an unexpected error ended all trials."""

    def fail(lab, rng):
        raise error

    row = faults.run_trials(None, "a fault", fail, 2, seed=0)
    assert (row["tried"], row["passed"]) == (2, 0)
    assert "a fault, trial 1: step 3 differs" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [[], ["a", "b"]])
def test_one_line_is_required(lines):
    with pytest.raises(faults.TrialError, match="expected one line"):
        faults.only_line(lines)


def test_table(tmp_path):
    row = {"fault": "disk full", "tried": 5, "passed": 4, "printed": "run has 2 | 3", "date": "2026-01-01"}
    (tmp_path / "faults.json").write_text(json.dumps([row | {"versions": {"jax": "1.0"}}]))
    assert tables.TABLES["faults"](tmp_path).splitlines() == [
        "| fault | trials | passed | printed |",
        "|---|---|---|---|",
        "| disk full | 5 | 4 | `run has 2 \\| 3` |",
        "",
        "On a CPU, jax 1.0, 2026-01-01.",
    ]

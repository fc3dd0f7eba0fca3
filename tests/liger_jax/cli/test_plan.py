"""`liger-jax plan`."""

import re

import pytest

from liger_jax.cli import main


def test_plan_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("liger_jax.runtime.compile_without_gpus", lambda: None)  # JAX is imported already
    main(["plan", "qwen2_vl_2b", "--gpus", "2", "--gpu", "H200", "--remat", "dots", "--fsdp", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 x H200") and re.match(r"fsdp=2 +dots +\d\d\.\d +\d+ ms", lines[4])
    assert any(line.startswith("fsdp: 4.4") for line in lines)
    with pytest.raises(SystemExit, match="MODEL is 'qwen9'; expected one of"):
        main(["plan", "qwen9"])
    with pytest.raises(SystemExit, match=r"MODEL is 'qwen2-vl-7b'; expected one of .*; did you mean qwen2_vl_7b\?"):
        main(["plan", "qwen2-vl-7b"])
    with pytest.raises(SystemExit, match="MODEL is '7b'; expected one of"):  # without a request to the hub
        main(["plan", "7b"])

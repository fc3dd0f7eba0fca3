"""Checks the groups of kernels of `python -m benchmarks train --profile` on a small program and its trace."""

import gzip
import json
from collections import Counter

import pytest

from benchmarks import profile, tables
from benchmarks.hlo import Program

MATMUL = 'custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}'
# A loop of 3 trips and one whose trips only the trace tells, each with a matmul; a slice of a stack, an update in place,
# a fill, and a Pallas kernel.
HLO = """HloModule step

%fused_slice (p0: bf16[10,1000], p1: s32[]) -> f32[1000] {
  %p0 = bf16[10,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice.1 = bf16[1,1000]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,1000}
  %flat.1 = bf16[1000]{0} bitcast(%slice.1)
  ROOT %convert.1 = f32[1000]{0} convert(%flat.1)
}

%fused_update (p2: f32[10,1000], p3: f32[1000], p4: s32[]) -> (f32[10,1000], f32[1000]) {
  %p2 = f32[10,1000]{1,0} parameter(0)
  %p3 = f32[1000]{0} parameter(1)
  %p4 = s32[] parameter(2)
  %row.1 = f32[1,1000]{1,0} bitcast(%p3)
  %update.1 = f32[10,1000]{1,0} dynamic-update-slice(%p2, %row.1, %p4, %p4)
  %negate.1 = f32[1000]{0} negate(%p3)
  ROOT %both = (f32[10,1000]{1,0}, f32[1000]{0}) tuple(%update.1, %negate.1)
}

%fused_zeros () -> f32[4000] {
  %zero = f32[] constant(0)
  ROOT %broadcast.1 = f32[4000]{0} broadcast(%zero), dimensions={}
}

%body.1 (s.1: (f32[100,200], f32[200,300])) -> f32[100,300] {
  %s.1 = (f32[100,200]{1,0}, f32[200,300]{1,0}) parameter(0)
  %a.1 = f32[100,200]{1,0} get-tuple-element(%s.1), index=0
  %b.1 = f32[200,300]{1,0} get-tuple-element(%s.1), index=1
  %loop_slice_fusion.2 = f32[1000]{0} fusion(%w, %i), kind=kLoop, calls=%fused_slice, METADATA1
  ROOT %custom-call.1 = (f32[100,300]{1,0}, s8[8]{0}) custom-call(%a.1, %b.1), MATMUL
}

%body.2 (s.2: (f32[100,200], f32[200,300])) -> f32[100,300] {
  %s.2 = (f32[100,200]{1,0}, f32[200,300]{1,0}) parameter(0)
  %a.2 = f32[100,200]{1,0} get-tuple-element(%s.2), index=0
  %b.2 = f32[200,300]{1,0} get-tuple-element(%s.2), index=1
  %loop_update_fusion = (f32[10,1000]{1,0}, f32[1000]{0}) fusion(%x, %y, %i), kind=kLoop, calls=%fused_update, METADATA2
  ROOT %custom-call.2 = (f32[100,300]{1,0}, s8[8]{0}) custom-call(%a.2, %b.2), MATMUL
}

%condition (s.3: f32[]) -> pred[] {
  ROOT %s.3 = pred[] parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[500]{0} parameter(0)
  %loop_broadcast_fusion.9 = f32[4000]{0} fusion(), kind=kLoop, calls=%fused_zeros
  %while.1 = (f32[8]{0}) while(%x), condition=%condition, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (f32[8]{0}) while(%x), condition=%condition, body=%body.2
  %pallas_call.7 = f32[500]{0} custom-call(%x), metadata={op_name="jit(step)/jvp()/silu_forward/pallas_call"}
  ROOT %loop_select_fusion = f32[500]{0} fusion(%x), kind=kLoop, calls=%fused_zeros, metadata={op_name="jit(step)/select_n"}
}
"""
for mark, attributes in {
    "MATMUL": MATMUL,
    "METADATA1": 'metadata={op_name="jit(step)/jvp()/while/body/convert_element_type"}',
    "METADATA2": 'metadata={op_name="jit(step)/transpose(jvp())/while/body/rematted_computation/neg"}',
}.items():
    HLO = HLO.replace(mark, attributes)

KERNELS = [  # name, us, arguments
    ("loop_broadcast_fusion_9", 10, {}),
    ("Memset 0", 2, {"Memset_details": "kind:unknown num_bytes:1000 async:0"}),
    *[("loop_slice_fusion_2", 20, {}), ("nvjet_sm90_tst", 100, {})] * 3,
    *[("loop_update_fusion", 30, {}), ("nvjet_sm90_tss(float const*)", 50, {})] * 2,
    ("memcpy128", 10, {"kernel_details": "regs:16 grid:10,1,1 block:256,1,1"}),
    ("MemcpyD2D", 5, {"memcpy_details": "kind_src:device size:400 async:1"}),
    ("kernel_fa4_jax_fwd", 200, {}),
    ("layer_norm_forward", 10, {}),
    ("silu_forward", 40, {}),
    ("loop_select_fusion", 10, {}),
    ("tiny", 1, {}),
]
GAP = 3  # us between kernels


@pytest.fixture
def trace(tmp_path):
    """A folder with a trace of KERNELS on one GPU, and of the same kernels on another one."""
    events = []
    for pid, name in ((2, "/device:GPU:1"), (1, "/device:GPU:0"), (3, "/host:CPU")):
        events += [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}},
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": 4, "args": {"name": "Stream #4(Compute)"}},
        ]
        start = 1000
        for kernel, us, args in KERNELS:
            events.append({"ph": "X", "pid": pid, "tid": 4, "ts": start, "dur": us, "name": kernel, "args": args})
            start += us + GAP
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / "x.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return folder


def test_groups_have_times_bytes_flops_and_operations(trace):
    step = profile.profile_step(profile.gpu_events(trace), HLO)
    kernel_us = sum(us for _, us, _ in KERNELS)
    assert step["kernel_ms"] == pytest.approx(kernel_us / 1e3)
    assert step["idle_ms"] == pytest.approx(GAP * (len(KERNELS) - 1) / 1e3) and step["kernels"] == len(KERNELS)
    groups = {row.pop("group"): row for row in step["groups"]}
    expected = {  # us, calls, operation, bytes
        "matmuls": (400, 5, None, None),
        "attention": (200, 1, None, None),
        "loop_slice_fusion_2": (60, 3, "forward, convert_element_type, f32[1000]", 3 * (2000 + 4 + 4000)),
        # of the stack, only the row that is written; the row is read, and its negative is written
        "loop_update_fusion": (60, 2, "backward, recomputed, neg, f32[10,1000]", 2 * (3 * 4000 + 4)),
        "silu_forward": (40, 1, "forward, silu_forward, f32[500]", 4000),
        "copies": (15, 2, None, 2 * (10 * 256 * 16 + 400)),
        "zero fills": (12, 2, None, 16000 + 1000),
        "norms": (10, 1, None, None),
        "optimizer": (10, 1, None, 16000),
    }
    assert list(groups) == list(expected)
    for name, (us, calls, operation, size) in expected.items():
        row = groups[name]
        assert (row["ms"], row["calls"], row.get("operation")) == (pytest.approx(us / 1e3), calls, operation)
        if name != "matmuls":
            assert row.get("mb") == (size and pytest.approx(size / 1e6))
            assert row.get("floor_ms") == (size and pytest.approx(size / 4.3e9))
    flops = 5 * 2 * 100 * 200 * 300
    assert groups["matmuls"]["tflop"] == pytest.approx(flops / 1e12)
    assert groups["matmuls"]["floor_ms"] == pytest.approx(flops / 801e9)


def test_loops_of_unknown_length_run_as_often_as_their_kernels():
    program = Program(HLO, Counter({"loop_update_fusion": 7}))
    assert (program.executions["body.1"], program.executions["body.2"]) == (3, 7)
    assert Program(HLO, Counter()).executions["body.2"] == 0


def test_profile_is_written_as_a_table_and_a_record(trace, tmp_path):
    """One row per group with its note, the remaining kernels, the idle time; the page's table is built from the record."""
    profile.write_profile(tmp_path / "profile_2b_x4", trace, HLO, "Pretended GPU")
    text = (tmp_path / "profile_2b_x4.md").read_text()
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert rows["| matmuls"].startswith("| matmuls | 0.4 | 46.4% | 5 | 80.0 |") and "0.0 TFLOP" in rows["| matmuls"]
    assert rows["| `loop_slice_fusion_2`"].split(" | ")[3:7] == ["3", "20.0", "0.0", "0.0"]
    assert "it depends on the segments" in rows["| attention"] and rows["| every other kernel"].startswith(
        "| every other kernel | 0.0 |"
    )
    assert "the GPU is idle for 0.1 ms. Pretended GPU, jax " in text and "| ms | calls | us each | kernel |" in text
    page = tables.with_tables("<!-- table: profile -->\n<!-- end -->", tmp_path)
    assert page.splitlines()[1:-1] == text.splitlines()[: len(page.splitlines()) - 2]
    assert "not measured yet" in tables.with_tables("<!-- table: profile -->\n<!-- end -->", trace)

"""benchmarks/gpu.py in its tiny form: every section has rows, and a failure is a row."""

import json

import gpu
import gpu_sections
import pytest
from commands import ROOT, succeed

# A worker with sections that fail: as a whole, in one task, by death and by hanging.
PLANTED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_sections

def values(bench, subject, variant):
    yield "before", 1.0, "s"
    if variant == "fails":
        raise MemoryError("CUDA out of memory")
    if variant == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if variant == "hangs":
        signal.pause()
    yield "after", float("nan"), "s"

gpu_sections.SECTIONS["planted"] = (values, sys.argv[1].split("-"))
gpu_sections.main("planted", *sys.argv[2:])
"""


@pytest.mark.slow
def test_every_section_has_values_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    succeed("benchmarks/gpu.py", "--tiny", "--device", "cpu", "--output", output)
    report = json.loads(output.read_text())
    assert report.keys() == {"device", "date", "torch", "python", "system", "rows"}
    rows = report["rows"]
    assert {row["section"] for row in rows if "value" in row} == gpu.SHARES.keys()
    assert gpu.SHARES.keys() == gpu_sections.SECTIONS.keys()
    allowed = ("needs CUDA", "not installed")
    assert [row for row in rows if not row.get("error", allowed[0]).startswith(allowed)] == []
    values = {(row["section"], row["name"]): row.get("value") for row in rows}
    assert values["exactness", "DiT-Nano-4 fp32 gradient"] == 0
    assert values["commands", "train.py continued from step 2"] == 0
    assert {"steps", "sampling", "waits"} <= {section for section, _ in values}
    table = output.with_suffix(".md").read_text()
    assert all(f"| {row['section']} | {row['name']} |" in table for row in rows)


@pytest.mark.parametrize(
    ("variants", "seconds", "expected"),
    [
        (
            "fails-works",
            "60",
            [("DiT-Nano-4 fails before", 1.0), ("DiT-Nano-4 fails", "MemoryError: CUDA out of"),
             ("DiT-Nano-4 works before", 1.0), ("DiT-Nano-4 works after", "nan")],
        ),
        ("dies-works", "60", [("DiT-Nano-4 dies before", 1.0), ("dies-works", "-9")]),
        ("works", "0", [("DiT-Nano-4 works", "left out")]),
        ("hangs", "12", [("DiT-Nano-4 hangs before", 1.0), ("hangs", "stopped after 12")]),
    ],
)  # fmt: skip
def test_what_fails_is_a_row_and_the_rest_goes_on(
    variants, seconds, expected, tmp_path, monkeypatch
):
    worker = tmp_path / "planted.py"
    worker.write_text(PLANTED)
    monkeypatch.setattr(gpu, "WORKER", worker)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0 if variants == "hangs" else 60)
    rows = gpu.rows_of(variants, "cpu", True, float(seconds))
    assert [row["name"] for row in rows] == [name for name, _ in expected]
    for row, (_, value) in zip(rows, expected, strict=True):
        if isinstance(value, str):
            assert value in row.get("error", row.get("value"))
        else:
            assert row["value"] == value


def test_without_a_gpu_only_the_tiny_form_runs(tmp_path):
    with pytest.raises(gpu.UserError, match="--tiny"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []

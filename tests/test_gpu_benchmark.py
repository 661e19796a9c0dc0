"""benchmarks/gpu.py in its tiny form: every section has rows, and a failure is a row."""

import json

import gpu
import gpu_sections
import pytest
from commands import run_here


@pytest.fixture
def rows_here(capsys, monkeypatch):
    """`gpu.rows_of` with one process in all, since each takes seconds to load torch."""
    as_it_is = gpu_sections.call

    def call(script: str, *words: object) -> None:
        if script == "latent_dataset.py":
            as_it_is(script, *words)
        else:
            assert run_here(script, *words) == 0

    def rows_of(section: str, device: str, is_tiny: bool, seconds: float) -> list[gpu.Row]:
        gpu_sections.main(section, device, str(int(is_tiny)), str(seconds))
        lines = capsys.readouterr().out.splitlines()
        return [{"section": section, **json.loads(line)} for line in lines if line[0] == "{"]

    monkeypatch.setattr(gpu_sections, "call", call)
    return rows_of


@pytest.mark.slow
def test_every_section_has_values_on_a_cpu(rows_here, tmp_path, monkeypatch):
    rows_of, output = gpu.rows_of, tmp_path / "gpu.json"
    by_process = {"exactness": rows_of}  # one section as it runs in the end
    monkeypatch.setattr(
        gpu, "rows_of", lambda section, *how: by_process.get(section, rows_here)(section, *how)
    )
    gpu.main(["--tiny", "--device", "cpu", "--output", str(output)])
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


def test_what_fails_in_a_section_is_a_row_and_the_rest_goes_on(rows_here, monkeypatch):
    def values(bench, subject, variant):
        yield "before", 1.0, "s"
        if variant == "fails":
            raise MemoryError("CUDA out of memory")
        yield "after", float("nan"), "s"

    monkeypatch.setitem(gpu_sections.SECTIONS, "planted", (values, ("fails", "works")))
    first, failed, *others = rows_here("planted", "cpu", True, 60)
    assert (first["name"], first["value"]) == ("DiT-Nano-4 fails before", 1.0)
    assert failed["error"].startswith("MemoryError: CUDA out of memory")
    assert [row["value"] for row in others] == [1.0, "nan"]
    assert all("left out" in row["error"] for row in rows_here("planted", "cpu", True, 0))


@pytest.mark.parametrize(
    ("end", "seconds", "said"),
    [("os.kill(os.getpid(), 9)", 60, "-9"), ("signal.pause()", 1, "stopped after 1")],
)
def test_a_section_that_dies_or_hangs_ends_in_a_row(end, seconds, said, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    row = json.dumps({"name": "before", "value": 1.0, "unit": "s"})
    worker.write_text(f"import os, signal\nprint({row!r}, flush=True)\n{end}")
    monkeypatch.setattr(gpu, "WORKER", worker)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0)
    first, last = gpu.rows_of("planted", "cpu", True, seconds)
    assert first["name"] == "before" and said in last["error"]


def test_without_a_gpu_only_the_tiny_form_runs(tmp_path):
    with pytest.raises(gpu.UserError, match="--tiny"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []

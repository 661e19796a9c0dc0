"""The command for the first GPU in its tiny form: sections have rows, and failures stay rows."""

import json
import os
import signal

import gpu
import pytest
from commands import succeed
from gpu_sections import SECTIONS, Section
from gpu_sections.bench import Bench, Task, Value


def without_tasks(bench: Bench) -> list[Task]:
    raise ValueError("no tasks")


def with_bad_task(bench: Bench) -> list[Task]:
    def fail():
        yield Value("before", 1.0, "s")
        raise MemoryError("CUDA out of memory")

    return [Task("bad", fail), Task("good", lambda: [Value("after", 2.0, "s")])]


def that_dies(bench: Bench) -> list[Task]:
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    return [Task("deadly", die), Task("undone", die)]


PLANTED = {
    "no tasks": Section(without_tasks, 1),
    "bad task": Section(with_bad_task, 1),
    "deadly": Section(that_dies, 1),
}

# What plans for machines that are not at hand are made from: these names stay.
FOR_PLANNING = {
    ("step", "DiT-Nano-4 fp32", "s/image"),
    ("memory", "DiT-Nano-4 state", "bytes"),
    ("memory", "DiT-Nano-4 activations", "bytes/image"),
    ("memory", "DiT-Nano-4 activations checkpointed", "bytes/image"),
    ("sampling", "DiT-Nano-4 1 step", "images/s"),
    ("sampling", "DiT-Nano-4 2 steps", "images/s"),
}


# As the command does, in a process that has computed nothing: sections are forks, and a fork of one
# whose libraries have threads may wait for these for ever.
WITH_PLANTED = """
import sys
sys.path[:0] = ["tests", "benchmarks"]
import gpu, test_gpu_benchmark
gpu.SECTIONS = test_gpu_benchmark.PLANTED | gpu.SECTIONS
gpu.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_every_section_has_rows_without_errors_and_planted_failures_stop_nothing(tmp_path):
    output = tmp_path / "gpu.json"
    succeed("-c", WITH_PLANTED, "--tiny", "--device", "cpu", "--output", output)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report.keys() == {"device", "date", "torch", "python", "rows"}
    rows = report["rows"]

    planted = [row for row in rows if row["section"] in PLANTED]
    assert [(row["name"], row["value"]) for row in planted] == [
        ("no tasks", None),
        ("before", 1.0),
        ("bad", None),
        ("after", 2.0),
        ("deadly", None),
        ("undone", None),
    ]
    errors = [row["error"] for row in planted if "error" in row]
    assert errors[0].startswith("ValueError: no tasks (test_gpu_benchmark.py:")
    assert errors[1].startswith("MemoryError: CUDA out of memory (test_gpu_benchmark.py:")
    assert errors[2:] == ["the section's process has died", "left out: time"]

    own = [row for row in rows if row["section"] in SECTIONS]
    assert {row["section"] for row in own if row["value"] is not None} == SECTIONS.keys()
    expected = ("needs CUDA", "not installed")
    assert [row for row in own if not row.get("error", expected[0]).startswith(expected)] == []
    measured = {
        (row["section"], row["name"], row["unit"]) for row in own if row["value"] is not None
    }
    assert measured >= FOR_PLANNING
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {row['section']} | {row['name']} |" in table for row in rows)


def test_what_does_not_fit_the_time_is_said(tmp_path):
    gpu.main(["--tiny", "--device", "cpu", "--minutes", "0", "--output", str(tmp_path / "t.json")])
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {row["section"] for row in rows} == SECTIONS.keys()
    assert {row["error"] for row in rows} == {"left out: time"}


def test_what_hangs_is_stopped(monkeypatch):
    def hang():
        signal.pause()

    tasks = [Task("hanging", hang), Task("undone", hang)]
    monkeypatch.setattr(gpu, "SECTIONS", {"hanging": Section(lambda bench: tasks, 1)})
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    rows = list(gpu.rows_of_section("hanging", gpu.Asked("cpu", True), 0.3))
    assert [row.error for row in rows] == ["stopped after 0 s", "left out: time"]


def test_without_a_gpu_only_the_tiny_form_runs(tmp_path):
    with pytest.raises(gpu.UserError, match="no GPU; --tiny"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []

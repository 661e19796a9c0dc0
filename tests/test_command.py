"""A command's start and end: one line and a status, whatever a user does."""

import os
import re
import signal
import subprocess
import sys

import pytest
from commands import ROOT, run

from support.system import command
from support.system.command import run_command
from support.system.files import UserError

FIRST_PACKAGE = {
    "train.py": "tqdm",
    "inference.py": "torch",
    "latent_dataset.py": "numpy",
    "evaluator.py": "numpy",
}


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: (_ for _ in ()).throw(UserError("a.yaml: no")), 1, "error: a.yaml: no\n"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130, "interrupted\n"),
    ],
)
def test_command_ends_with_one_line_and_a_status(main, status, line, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--replay", ""], "--replay: "),
        (["--set", "a=1", "--replay="], "--replay: "),
        (["", "x.html"], None),
        (["--set", "init_from="], None),
        (["--labels=a=", "-"], None),
    ],
)
def test_an_option_that_is_given_nothing_is_refused(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        run_command(lambda: 0)
    assert end.value.code == (1 if said else 0)
    assert capsys.readouterr().err.startswith(f"error: {said}" if said else "")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_a_bug_in_one_of_several_processes_ends_it_at_once_with_its_traceback():
    """Although a thread, as those of connections, would keep the interpreter from its end."""
    script = (
        "import threading, time\n"
        "from support.system.command import run_command\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "run_command(lambda: 1 / 0)"
    )
    finished = run("-c", script, env={"WORLD_SIZE": "2", "RANK": "1"})
    assert finished.returncode == 1
    assert finished.stderr.startswith("process 1: Traceback")
    assert finished.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("work", ["print('many lines')", "sys.exit(print('help'))"])
def test_a_command_that_nobody_reads_ends_without_a_word(work):
    reading, writing = os.pipe()
    os.close(reading)
    script = (
        f"import sys; from support.system.command import run_command; run_command(lambda: {work})"
    )
    with open(writing, "w") as closed:
        finished = subprocess.run(
            [sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert (finished.returncode, finished.stderr) == (141, b"")


def test_a_broken_pipe_of_another_kind_is_a_bug():
    with pytest.raises(BrokenPipeError):
        run_command(lambda: (_ for _ in ()).throw(BrokenPipeError))


@pytest.mark.parametrize("script", FIRST_PACKAGE)
def test_ctrl_c_ends_a_start_at_once_whatever_a_package_catches(script, tmp_path):
    package = tmp_path / f"{FIRST_PACKAGE[script]}.py"
    package.write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    print('caught', flush=True)\n"
    )
    finished = run(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert finished.returncode == -signal.SIGINT  # 130 to a shell
    assert (finished.stdout, finished.stderr) == ("", "")


def test_a_commands_module_leaves_ctrl_c_and_errors_to_the_program_that_imports_it():
    script = (
        "import signal, sys, support.system.command; print(signal.getsignal(2), sys.excepthook)"
    )
    said = run("-c", script).stdout
    assert "default_int_handler" in said
    assert "built-in function excepthook" in said


@pytest.mark.parametrize("script", FIRST_PACKAGE)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(script):
    finished = run("-S", script, "--help")  # without site-packages
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    needed = "_eval" if script == "evaluator.py" else ""
    expected = rf"error: {FIRST_PACKAGE[script]} .* requirements_soflow{needed}\.txt\n"
    assert re.fullmatch(expected, finished.stderr)


def test_a_package_missing_beside_an_environment_is_answered_with_its_activation(
    tmp_path, monkeypatch
):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "requirements_soflow.txt").write_text("PyYAML==6\n")
    (tmp_path / "requirements_soflow_demo.txt").write_text("gradio==6\n")
    (tmp_path / "requirements_soflow_eval.txt").write_text("tensorflow==2\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    said = command._describe_missing("PyYAML")
    assert said.startswith(f"PyYAML is missing in {sys.executable}; ")
    assert ". .venv/bin/activate; " in said and said.endswith(" requirements_soflow.txt")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))  # it is active
    for package, kind in (("tensorflow", "_eval"), ("gradio", "_demo")):
        said = command._describe_missing(package)
        assert "activate" not in said and said.endswith(f" requirements_soflow{kind}.txt")


def test_a_missing_module_of_our_own_is_a_bug(capsys):
    error = ModuleNotFoundError("no models", name="models")
    command._explain(type(error), error, None)
    assert capsys.readouterr().err == "ModuleNotFoundError: no models\n"

"""Every command explains itself, and fails in one line."""

import pytest
from commands import run, succeed

COMMANDS = ["train.py", "inference.py", "quickstart/check_digits.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_commands_that_work_and_names_every_option(command):
    said = succeed(command, "--help")
    assert said.startswith("usage:")
    assert f"python {command}" in said
    if command != COMMANDS[2]:
        assert "--config" in said
        assert "--set" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_ends_in_one_line_and_a_status(command, tmp_path):
    arguments = ["nowhere.npz"]
    if command != COMMANDS[2]:
        arguments = ["--config=nowhere.yaml"]
    if command == "inference.py":
        arguments.append("--ckpt-steps=1")
    finished = run(command, *arguments)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: nowhere.")

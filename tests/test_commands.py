"""Every command explains itself, and fails in one line."""

import importlib

import pytest
from commands import run, run_here, succeed

MISTAKES = {
    "train.py": ["--config=nowhere.yaml"],
    "inference.py": ["--config=nowhere.yaml", "--ckpt-steps=1"],
    "latent_dataset.py": ["--data-path=nowhere", "--save-path=s", "--image-size=256"],
    "export.py": ["nowhere", "exported"],
    "posthoc_ema.py": ["nowhere", "exported", "--std", "0.1"],
    "evaluator.py": ["--ref_batch=nowhere.npz", "--sample_batch_dir=nowhere"],
    "report.py": ["nowhere"],
    "page.py": ["nowhere", "page.html"],
    "demo.py": ["nowhere"],
    "quickstart/score.py": ["nowhere.npz"],
}


@pytest.mark.parametrize("command", MISTAKES)
def test_help_begins_with_commands_that_work_and_names_every_option(command, capsys):
    assert run_here(command, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage:")
    assert f"python {command}" in said
    for mistake in MISTAKES[command]:
        option, equals, _ = mistake.partition("=")
        assert not equals or option in said


@pytest.mark.slow
@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_in_one_line_and_a_status(command):
    finished = run(command, *MISTAKES[command])
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ")
    assert "nowhere" in finished.stderr


@pytest.mark.slow
def test_our_modules_load_after_tensorflow_and_bring_in_no_package_that_few_need():
    """Loaded after TensorFlow, triton crashes the process."""
    modules = ", ".join(name.removesuffix(".py") for name in MISTAKES if "/" not in name)
    rare = {"triton", "torchvision", "diffusers", "onnx", "sklearn", "torch._dynamo"}
    script = f"import tensorflow, sys; before = {{*sys.modules}}; import sampling, {modules}; "
    script += f"print(sorted({rare} & {{*sys.modules}} - before))"
    assert succeed("-c", script) == "[]\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inference", "--ckpt=~/f --output=~/f --grid=~/f"),
        ("export", "~/f ~/f"),
        ("latent_dataset", "--data-path=~/f --save-path=~/f --image-size=256"),
        ("evaluator", "--ref_batch=~/f --sample_batch_dir=~/f --inception=~/f"),
        ("evaluator", "--write_ref=~/f --images=~/f"),
    ],
)
def test_home_is_understood_where_the_shell_leaves_it(command, words, monkeypatch):
    """Bash does, after an equals sign."""
    monkeypatch.setenv("HOME", "/home/me")
    arguments = vars(importlib.import_module(command).parse_arguments(words.split()))
    named = [value for value in arguments.values() if isinstance(value, str) and "/" in value]
    assert set(named) - {"stabilityai/sd-vae-ft-mse"} == {"/home/me/f"}

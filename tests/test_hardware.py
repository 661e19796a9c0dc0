"""What this machine has is found, and said where it cannot be used."""

import pytest
import torch

from support.system import hardware
from support.system.files import UserError
from support.system.hardware import let_segments_expand
from support.system.processes import choose_device

NOTE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with an NVIDIA GPU and an old driver, of which torch finds nothing."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(NOTE)
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setattr(hardware, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("built_for", "said"), [("12.8", "the driver is too old"), (None, "CUDA")])
def test_a_gpu_that_torch_cannot_use_is_named_with_what_it_needs(
    gpu, monkeypatch, name, built_for, said
):
    def fail():
        raise RuntimeError("the driver is too old\nwith more lines")

    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "init", fail)
    named = rf"^device: .*{gpu}/nvidia0.*535\.104\.05.*{said}.*`device: cpu`"
    with pytest.raises(UserError, match=named):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_a_gpu_that_nvidia_smi_alone_shows_is_found(gpu, monkeypatch):
    (gpu / "nvidia0").unlink()
    (gpu / "version").unlink()
    command = gpu / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 470.82.01\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(gpu))
    with pytest.raises(UserError, match=r"nvidia-smi.*470\.82\.01"):
        choose_device("auto")
    command.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert choose_device("auto").type != "cuda"


def test_gpus_that_are_hidden_on_purpose_are_left_alone(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto").type != "cuda"
    with pytest.raises(UserError, match=r"^device: 'cuda'"):
        choose_device("cuda")


def test_segments_expand_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    let_segments_expand()
    assert hardware.os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setattr("os.environ", {name: "max_split_size_mb:64"})
        let_segments_expand()
        assert hardware.os.environ == {name: "max_split_size_mb:64"}

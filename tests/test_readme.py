"""The commands of README.md and docs/ are run as written, in the order in which one reads them."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, forked, run_here
from documents import DOCUMENTS, SMALL, Command, blocks, commands_of, copy_project
from packed_pictures import tar_of_tars
from released import LATENT_KEYS, UNET_KEYS, release
from standins import crops, photographs, write_cifar10, write_image_folder
from tiny_vae import make_tiny_vae
from torch.distributed.run import get_args_parser as torchrun_parser
from toy_graph import write_toy_graph

import dit
import inference
import train
from models import build_model

sys.path.append(str(ROOT / "docs"))
import make_config

BENCHMARKS = ("benchmarks/gpu.py", "benchmarks/bench_step.py")

# Commands that cannot run here, by their first words. Their files and options are checked.
NOT_RUN = {
    "make": "installs packages, or runs these tests, or takes minutes",
    "uv": "needs a package index",
    "pip install": "needs a package index",
    "hf download": "needs a network; stand-ins of the downloads are made beforehand",
    "hf upload": "needs a network",
    "torchrun --nnodes=4": "needs four machines",
    "sbatch": "needs SLURM",
    "python arena/": "trains for half an hour, or reads the results",
    "python benchmarks/": "measures for minutes",
    "python report.py --watch": "runs until it is interrupted",
    "python page.py": "needs npm's registry",
    "python demo.py": "runs until it is interrupted",
    "python export.py exported/digits --push": "needs a token of the hub",
    "python train.py --config configs/digits.yaml --set method": "needs an example of extending.md",
    "python train.py --config configs/digits.yaml --set dataset_type": "likewise",
    "python inference.py --ckpt runs/mine": "likewise",
    "python report.py --band": "needs three finished runs",
    "python train.py --config configs/imagenet_xl2.yaml --set working_dir=runs/from-sit": "needs "
    "SiT's weights",
    "python evaluator.py --verify": "needs a network",
}

# What makes each command small. Runs of the documents end after step 2 here.
NUMBERS = {
    r"\b(1000|100000)(?=_|\b)": "2",
    r"\b10000\b": "10",
    "-node=8": "-node=2",
    "snapshot_steps=50": "snapshot_steps=1",
}
ADDED = {
    "train.py": f"{SMALL} --set vae=vae",
    "inference.py": "--num-samples 6 --set vae=vae",
    "latent_dataset.py": "--vae vae --num-workers 0",
}


def runs_here(command: Command) -> bool:
    return not any(" ".join(command.words).startswith(start) for start in NOT_RUN)


def on_stand_ins(command: Command) -> list[str]:
    """The words to run here."""
    line = shlex.join(command.words)
    for shown, small in NUMBERS.items():
        line = re.sub(shown, small, line)
    if "--dry-run" in line:
        return shlex.split(line + (" --set batch_size=4" if "--time" in line else ""))
    added = [more for script, more in ADDED.items() if f" {script}" in line]
    if "train.py" in line and "digits.yaml" not in line:
        added.append("--set model_type=DiT-Nano-8")
    return shlex.split(" ".join([line, *added]))


def help_of(script: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_here(script, "--help") == 0
    return said.getvalue()


def options_in(text: str) -> set[str]:
    """The long options that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def run_on_stand_ins(command: Command) -> None:
    """Run a command in the current folder."""
    words = on_stand_ins(command)
    match words[0]:
        case ".":
            assert words[1:] == [".venv/bin/activate"]
        case "python":
            assert run_here(*words[1:]) == 0
        case "torchrun":
            asked = torchrun_parser().parse_args(words[1:])
            command = asked.training_script, *asked.training_script_args
            done = forked(*command, ranks=int(asked.nproc_per_node), folder=Path.cwd())
            assert done.returncode == 0, done.stdout + done.stderr
        case _:
            raise AssertionError("add it to NOT_RUN, or say how to run it")


def check_what_cannot_run(command: Command) -> None:
    """Check that the target, the files and the options of a command exist."""
    words = command.words
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    if words[0] == "torchrun":
        asked = torchrun_parser().parse_args(words[1:])
        words = ["python", asked.training_script, *asked.training_script_args]
    for word in words:
        assert not re.fullmatch(r"[a-z_/]+\.(py|sh|txt|yaml)", word) or (ROOT / word).is_file()
    if words[0] == "python" and (options := options_in(" ".join(words[2:]))):
        assert options <= options_in(help_of(words[1]))


# Stand-ins for what a reader has


def leave_what_quickstart_leaves() -> None:
    """A run like that of `make quickstart`, of two steps, and its samples."""
    train.main(["--config", "configs/digits.yaml", *SMALL.split()])
    labels = ["--labels", "0,1,2,3,4,5,6,7,8,9", "--num-samples", "1000"]
    inference.main(["--ckpt", "runs/digits/ckpts/2.pt", "--eval-NFE", "1,2", *labels])


def write_released_folder() -> None:
    """SoFlow/ as it is downloaded: two small models, and both references."""
    latent = build_model("DiT-Nano-4", 4, 32, 1000, 0.1)
    optimizer = torch.optim.AdamW(latent.parameters())
    release(Path(), "XL-2-cond", LATENT_KEYS, 1_200_000, latent, optimizer)
    pixels = build_model("DiT-Nano-8", 3, 32, 10, 0.0)
    optimizer = torch.optim.RAdam(pixels.parameters())
    keys = UNET_KEYS.replace("UNet", "DiT-Nano-8")
    release(Path(), "UNet-uncond", keys, 800_000, pixels, optimizer)
    Path("SoFlow/Ref").mkdir()
    for name, size in (("VIRTUAL_imagenet256_labeled", 256), ("cifar10", 32)):
        np.savez(f"SoFlow/Ref/{name}.npz", arr_0=crops(photographs()["cat"], 6, size))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The current folder: a copy of the project, and what the documents expect a reader to have."""
    copy_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Smaller checkpoints, 50 MB in all instead of 440: in this process, and in the copy.
    small, copied = dit.Size(width=32, depth=2, heads=2), Path("dit.py")
    monkeypatch.setitem(dit.SIZES, "Nano", small)
    copied.write_text(f"{copied.read_text()}\nSIZES['Nano'] = {small!r}\n")
    leave_what_quickstart_leaves()
    write_image_folder(Path("my-images"), size=280)
    Path("my-images/cup").rename("my-images/dog")
    write_image_folder(Path("imagenet/train"), size=256)
    tar_of_tars(Path("imagenet/train"), Path()).rename("ILSVRC2012_img_train.tar")
    write_cifar10(Path("data/cifar10"), monkeypatch)
    make_tiny_vae(Path("vae"))
    write_toy_graph(Path("classify_image_graph_def.pb"), stride=64)
    write_released_folder()


# The tests


@pytest.mark.slow
def test_every_command_works_as_written(checkout):
    failures = []
    for command in (command for path in DOCUMENTS for command in commands_of(path)):
        try:
            (run_on_stand_ins if runs_here(command) else check_what_cannot_run)(command)
        except Exception as error:
            failures.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not failures, "\n".join(["", *failures])
    for path in (ROOT / "README.md", ROOT / "docs" / "sampling.md"):
        for block in blocks(path, "python"):
            exec(block, {})


@pytest.mark.slow
def test_options_named_in_sentences_exist():
    scripts = [path for path in ROOT.glob("*.py") if "def main(" in path.read_text()]
    scripts += [ROOT / name for name in ("arena/run.py", *BENCHMARKS)]
    known = set().union(*(options_in(help_of(str(p.relative_to(ROOT)))) for p in scripts))
    known |= options_in(torchrun_parser().format_help())
    known |= {"--include", "--local-dir", "--gpus-per-task", "--signal", "--group", "--parts"}
    for path in DOCUMENTS:
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text()):
            assert options_in(span) <= known, f"{path.name}: {span}"


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            name, _, heading = target.partition("#")
            if name.startswith("https://"):
                continue
            file = path.parent / name if name else path
            assert file.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M) if heading else []
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert not heading or heading in slugs, f"{path.name}: {target}"


def test_the_readme_names_every_document_and_its_tree_only_what_exists():
    text = (ROOT / "README.md").read_text()
    assert {f"docs/{path.name}" for path in DOCUMENTS[1:]} <= set(re.findall(r"docs/\w+\.md", text))
    tree = text.partition("## Files")[2].partition("```text\n")[2].partition("```")[0]
    names = [re.match(r"\s*(\S.*?)(  |$)", line)[1].split() for line in tree.splitlines()]
    for name in [name for words in names for name in words]:
        assert (ROOT / name).exists() or (ROOT / "support" / name).exists(), name


def test_table_of_keys_is_what_its_script_makes():
    assert (ROOT / "docs" / "config.md").read_text() == make_config.page()

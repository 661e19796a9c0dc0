"""Every command of README.md and docs/ is run as written, in the order in which one reads them."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from commands import ROOT, succeed
from PIL import Image
from standins import crops, photographs, write_cifar10
from test_released import LATENT_KEYS, UNET_KEYS, release
from tiny_vae import make_tiny_vae
from torch.distributed.run import get_args_parser as torchrun_parser
from toy_graph import write_toy_graph

import inference
import train
from models import BACKBONES, METHODS, build_model
from schedules import GAP_SCHEDULES
from support.data.datasets import DATASETS

sys.path.append(str(Path(train.__file__).with_name("docs")))
import make_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("several processes")]

README = ROOT / "README.md"
LIMIT_SECONDS = 300  # of a command: one that trains for hours has to be named below
SHELLS = ("sh", "bash", "shell", "console")  # how a block of commands may be called
OUR_SCRIPTS = (
    *("train.py", "inference.py", "latent_dataset.py", "evaluator.py", "report.py", "export.py"),
    *("posthoc_ema.py", "arena/run.py", "arena/tables.py"),
    *("page.py", "demo.py"),
)

# What cannot run here, by its first words; its options are checked all the same.
NOT_RUN = {
    "make": "installs from a package index, or runs these tests, or takes minutes",
    "pip install": "needs a package index",
    "hf download": "needs a network; the stand-ins of what it fetches are made beforehand",
    "hf upload": "needs a network",
    "torchrun --nnodes=4": "needs four machines",
    "sbatch": "needs SLURM",
    "python arena/": "trains for half an hour, or reads what that has left",
    "python benchmarks/": "measures for minutes",
    "python report.py --watch": "goes on until it is interrupted",
    "python page.py": "needs npm's registry",
    "python demo.py": "goes on until it is interrupted",
    "python export.py exported/digits --push": "needs a token of the hub",
    "python report.py --band": "needs three finished runs",
}

# What is changed of a command that has all words of the key: words added at the end, or replaced.
SMALL = (
    "--set total_steps=1 --set batch_size=4 --set num_workers=0 --set prefetch_factor=null "
    "--set eval_demo_steps=0 --set eval_steps=1 --set eval_num_samples=6"
)
ADDED = {
    "train.py configs/digits.yaml seed=1": SMALL,
    "train.py working_dir=runs/averages": SMALL + " --set total_steps=9 --set ema_snapshot_steps=3",
    "train.py working_dir=runs/tuned": SMALL,
    "inference.py runs/averages/ckpts/9.pt": "--num-samples 6",
    "inference.py exported/average-0.15": "--num-samples 6",
    "train.py configs/cifar.yaml": f"{SMALL} --set model_type=DiT-Nano-8",
    "train.py configs/small_folder.yaml": f"{SMALL} --set model_type=DiT-Nano-8",
    "train.py configs/image_folder.yaml": f"{SMALL} --set model_type=DiT-Nano-8",
    "train.py configs/image_latents.yaml": f"{SMALL} --set model_type=DiT-Nano-4 --set vae=vae",
    "train.py configs/imagenet.yaml": f"{SMALL} --set model_type=DiT-Nano-4 --set vae=vae",
    "inference.py runs/image-latents/ckpts/1.pt": "--set vae=vae",
    "inference.py SoFlow/XL-2-cond/config.yaml": "--num-samples 6 --set vae=vae",
    "inference.py SoFlow/UNet-uncond/config.yaml": "--num-samples 6",
    "latent_dataset.py": "--vae vae --num-workers 0",
}
REPLACED = {
    "--nproc-per-node=8": "--nproc-per-node=2",
    "runs/image-latents/ckpts/100000.pt": "runs/image-latents/ckpts/1.pt",
    "runs/averages/ckpts/1000.pt": "runs/averages/ckpts/9.pt",
    "10000": "10",  # pictures that a reference keeps
}
# These need no stand-in: they end before any work.
AS_WRITTEN = {"--dry-run"}


class Command(NamedTuple):
    """A command of a document, as the shell takes it apart."""

    place: str
    words: list[str]
    comment: str

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"

    @property
    def reason_not_to_run(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        line = " ".join(self.words)
        return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)

    def on_stand_ins(self) -> list[str]:
        """The words to run it with here."""
        if AS_WRITTEN.intersection(self.words):
            return self.words
        words = [REPLACED.get(word, word) for word in self.words]
        added = [more for key, more in ADDED.items() if set(key.split()) <= set(words)]
        return words + " ".join(added).split()


# Reading the documents


def documents() -> list[Path]:
    """The README, and the others in the order in which it lists them."""
    _, _, listed = README.read_text().partition("## Documents")
    names = re.findall(r"\]\((docs/\w+\.md)\)", listed.partition("\n## ")[0])
    return [README, *(ROOT / name for name in names if (ROOT / name).exists())]


def commands_of(path: Path) -> Iterator[Command]:
    """The commands in a document's code, fenced by ```sh or not.

    Every line of a shell's block is a command; other code is one where it starts like one.
    """
    programs = {start.split()[0] for start in NOT_RUN} | {"python", "."}
    fence = None
    lines = enumerate(path.read_text().split("\n"), start=1)
    for number, line in lines:
        if line.lstrip().startswith("```"):
            fence = line.strip().strip("`") if fence is None else None
            continue
        while line.endswith("\\"):
            line = line[:-1] + next(lines)[1]
        is_code = fence is not None or line.startswith("    ")
        first = (line.split() or [""])[0]
        if (fence in SHELLS and first) or (is_code and first in programs):
            command, _, comment = line.partition(" #")
            place = f"{path.relative_to(ROOT)}, line {number}"
            yield Command(place, shlex.split(command), comment.strip())


def all_commands() -> list[Command]:
    """Those of all documents."""
    return [command for path in documents() for command in commands_of(path)]


# Running the commands


def main_of(script: str) -> Callable[[], int | None]:
    """The script's `main`, imported from where python would find it."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem).main


def run_script(script: str, words: list[str]) -> int:
    """The status of `python SCRIPT WORDS`, in this process."""
    main, before = main_of(script), sys.argv
    sys.argv = [script, *words]
    try:
        return main() or 0
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before


def help_of(script: str) -> str:
    """What `--help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_script(script, ["--help"]) == 0
    return said.getvalue()


def options_in(text: str) -> set[str]:
    """The long options that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def run_on_stand_ins(command: Command) -> None:
    """Run a command in the current folder; what is not known how to run is an error."""
    words = command.on_stand_ins()
    match words[0]:
        case ".":
            assert words[1:] == [".venv/bin/activate"]
            assert "-m venv .venv\n" in (ROOT / "Makefile").read_text()
        case "python":
            assert run_script(words[1], words[2:]) == 0
        case "torchrun":
            asked = torchrun_parser().parse_args(words[1:])
            if asked.training_script == "train.py":
                succeed("-m", "torch.distributed.run", *words[1:], folder=Path.cwd())
            else:  # of what two processes do there are tests; here the options are of interest
                assert run_script(asked.training_script, asked.training_script_args) == 0
        case _:
            raise AssertionError("is not known how to run: see NOT_RUN")


def check_what_cannot_run(command: Command) -> None:
    """Look whether the files, targets and options exist that a command names."""
    match command.words:
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["pip", "install", "-r", file] | ["sbatch", file, *_]:
            assert (ROOT / file).is_file()
        case ["hf", action, *words]:
            known = subprocess.run(
                [Path(sys.executable).with_name("hf"), action, "--help"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert options_in(" ".join(words)) <= options_in(known.stdout)
        case ["torchrun", *words]:
            asked = torchrun_parser().parse_args(words)
            check_options(asked.training_script, asked.training_script_args)
        case ["python", script, *words]:
            check_options(script, words)
        case _:
            raise AssertionError("is not known how to check")


def check_options(script: str, words: list[str]) -> None:
    """Look whether the script knows the options; one that is given none need not have any."""
    assert (ROOT / script).is_file()
    asked = options_in(" ".join(words))
    assert not asked or asked <= options_in(help_of(script))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """A block that ends by a TimeoutError when it takes longer than any command here may."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {LIMIT_SECONDS} s: it needs a stand-in")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Stand-ins for what a reader has


def leave_what_quickstart_leaves() -> None:
    """The run of `make quickstart`, one step passing for all, and the samples it asks for."""
    train.main(["--config", "configs/digits.yaml", "--set=total_steps=1"])
    folder = Path("runs/digits")
    content = torch.load(folder / "ckpts" / "1.pt", weights_only=True)
    content["finished_steps"] = content["config"]["total_steps"] = 1000
    (folder / "ckpts" / "1.pt").unlink()
    torch.save(content, folder / "ckpts" / "1000.pt")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("total_steps: 1\n", "total_steps: 1000\n"))

    recipe = subprocess.run(
        ["make", "-n", "quickstart"], capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    (sampling,) = re.findall(r"inference\.py (.*?) \|\|", recipe)
    for jumps in ("1", "2"):
        inference.main(shlex.split(re.sub(r"\$(nfe|\{nfe\})", jumps, sampling)))


def write_pictures(folder: Path, classes: list[str], size: int) -> None:
    """Six pictures a class."""
    for name, photograph in zip(classes, photographs().values(), strict=False):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(crops(photograph, 6, size)):
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def write_released_folder() -> None:
    """SoFlow/, as fetched: two models, small ones, and a reference."""
    latent = build_model("DiT-Nano-4", 4, 32, 1000, 0.1)
    optimizer = torch.optim.AdamW(latent.parameters())
    release(Path(), "XL-2-cond", LATENT_KEYS, 1_200_000, latent, optimizer)
    pixels = build_model("DiT-Nano-8", 3, 32, 10, 0.0)
    optimizer = torch.optim.RAdam(pixels.parameters())
    keys = UNET_KEYS.replace("UNet", "DiT-Nano-8")
    release(Path(), "UNet-uncond", keys, 800_000, pixels, optimizer)
    Path("SoFlow/Ref").mkdir()
    np.savez("SoFlow/Ref/REFERENCE.npz", arr_0=crops(photographs()["cat"], 6, 256))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The current folder: a copy of the checkout, and all that the documents ask a reader for."""
    for pattern in ("*.py", "*.txt", "Makefile"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    for name in ("configs", "support", "quickstart", "examples", "benchmarks", "arena"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    monkeypatch.chdir(tmp_path)
    leave_what_quickstart_leaves()
    write_pictures(Path("my-images"), ["cat", "dog"], 280)
    write_pictures(Path("imagenet/train"), ["n01440764", "n01443537"], 256)
    write_cifar10(Path("data/cifar10"), monkeypatch)
    make_tiny_vae(Path("vae"))
    write_toy_graph(Path("classify_image_graph_def.pb"), stride=64)
    write_released_folder()


# The tests


def test_every_command_works_as_written(checkout):
    failures = []
    for command in all_commands():
        try:
            with time_limit():
                if command.reason_not_to_run:
                    check_what_cannot_run(command)
                else:
                    run_on_stand_ins(command)
        except Exception as error:
            failures.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not failures, "\n".join(["", *failures])


def test_every_document_is_listed_in_the_readme():
    assert set(documents()) == {README, *(ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_environment_is_activated_before_it_is_needed(path):
    for command in commands_of(path):
        if command.words[0] == ".":
            return
        assert command.words[0] == "make", str(command)


def test_options_named_in_sentences_exist():
    known = set().union(*(options_in(help_of(script)) for script in OUR_SCRIPTS))
    for script in ("bench_step.py", "gpu.py"):
        known |= options_in(help_of(f"benchmarks/{script}"))
    known |= options_in(torchrun_parser().format_help())
    known |= {"--include", "--local-dir", "--gpus-per-task", "--signal"}  # of hf and srun
    for path in documents():
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text()):
            unknown = options_in(span) - known
            assert not unknown, f"{path.relative_to(ROOT)}: {span}"


def test_links_lead_somewhere():
    for path in documents():
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            name, _, heading = target.partition("#")
            if name.startswith("https://"):
                continue
            file = path.parent / name
            assert file.exists(), f"{path.relative_to(ROOT)}: {target}"
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert not heading or heading in slugs, f"{path.relative_to(ROOT)}: {target}"


def test_tree_of_files_names_every_module_on_top_and_every_folder_of_support():
    _, _, rest = README.read_text().partition("## Files")
    tree = rest.partition("\n## ")[0]
    modules = {path.name for path in ROOT.glob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", tree)) == modules
    folders = {path.parent.name + "/" for path in (ROOT / "support").glob("*/__init__.py")}
    named = re.findall(r"^  (\w+/)", tree, re.MULTILINE)
    assert sorted(named) == sorted(folders)


def examples_of_extending() -> Iterator[tuple[str, str]]:
    """The file and the code of each example in docs/extending.md and docs/objective.md."""
    text = (ROOT / "docs" / "extending.md").read_text()
    yield from re.findall(r"^In `(\S+)\.py`:\n\n```python\n(.*?)```", text, re.M | re.S)
    text = (ROOT / "docs" / "objective.md").read_text()
    yield "models", "\n".join(re.findall(r"^```python\n(.*?)```", text, re.M | re.S))


@pytest.fixture
def extended():
    """All examples of docs/extending.md, each as if it stood at the end of the file it names."""
    tables = (DATASETS, BACKBONES, GAP_SCHEDULES, METHODS)
    before = [dict(table) for table in tables]
    for file, code in examples_of_extending():
        exec(code, dict(vars(importlib.import_module(file.replace("/", ".")))))
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


EXTENDED = (
    "dataset_type=Greys cfg_drop_rate=0.1 cfg_scale=2",
    "dataset_type=Digits model_type=ConvNet cfg_drop_rate=0.1 cfg_scale=2",
    "dataset_type=Digits l_schedule=Root",
    "dataset_type=Digits method=MyFlowMatching velocity_loss_ratio=1.0",
    "dataset_type=Digits method=Watched",
)


@pytest.mark.parametrize("settings", EXTENDED)
def test_examples_of_extending_train(extended, tmp_path, settings):
    (tmp_path / "c.yaml").write_text("data_size: 8\nmodel_type: DiT-Nano-4\nlogging_steps: 1\n")
    small = f"{SMALL} {settings} working_dir={tmp_path / 'run'} eval_demo_shape=[1,2]"
    words = [w for w in small.split() if w != "--set"]
    train.main(["--config", str(tmp_path / "c.yaml"), *(f"--set={word}" for word in words)])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "finished: all 1 steps" in log
    assert (", Gap: 0." in log) == ("Watched" in settings)


def test_table_of_keys_is_what_its_script_makes():
    assert (ROOT / "docs" / "config.md").read_text() == make_config.page()


def test_readme_is_one_sitting():
    assert len(README.read_text().splitlines()) <= 200


def test_makefile_says_the_same_of_its_targets():
    said = dict(re.findall(r"^# make (\w+): +(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {c.words[1]: c.comment for c in all_commands() if c.words[0] == "make"}
    assert shown == said

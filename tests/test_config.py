"""What a config may say, and what it means; test_config_errors.py has the rest."""

import re

import pytest
import yaml
from commands import ROOT

from config import FIELDS, Config, config_from_dict, load_config, save_config
from models import METHODS
from support.system.files import UserError
from support.system.settings import may_change
from training.identity import refuse_another_experiment

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """A function that loads a config file with the given text."""

    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load_text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_explains_its_keys_in_the_words_of_config_py(path):
    assert load_config(path).working_dir
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            key, comment = re.fullmatch(r"(\w+): [^#]+?(?:  # (.+))?", line).groups()
            assert comment == FIELDS[key].description, f"{path.name}: {key}"


def test_a_config_of_the_reference_means_here_what_it_means_there(load):
    config = load("working_dir: runs/x")
    expected = {
        "noising_type": "Linear", "coefficient_type": "Euler", "model_type": "DiT-B-4",
        "dataset_type": "Imagenet", "data_size": 32, "velocity_loss_ratio": 0.75, "p": 1.0,
        "eps": 0.01, "time_mean": (-0.2, -1.0, 0.2), "time_std": (1.0, 0.8, 0.8),
        "cfg_scale": 1.0, "mix_ratio": 1.0, "cfg_drop_rate": 0.0, "cfg_decay_time": 1.0,
        "l_schedule": "Exponent", "l_init_ratio": 0.1, "l_end_ratio": 0.002,
        "total_steps": 400000, "ema_decay_rate": 0.9999, "learning_rate": 1e-4,
        "betas": (0.9, 0.99), "weight_decay": 0.0, "batch_size": 256, "num_workers": 12,
        "prefetch_factor": 6, "eval_steps": 25000, "eval_batch_size": 125, "eval_NFE": 1,
        "eval_demo_steps": 1000, "eval_demo_shape": (4, 8), "ckpt_saving_steps": 200000,
        "logging_steps": 100, "seed": 42, "eval_num_samples": 50000, "accumulation_steps": 1,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "optimizer", "every", "augmentation"),
    [
        ("dataset_type: Imagenet", "AdamW", 1, 0.0),
        ("{dataset_type: Digits, data_size: 8}", "AdamW", 1, 0.0),
        ("{dataset_type: CIFAR10, model_type: UNet}", "RAdam", 16, 0.12),
        ("{dataset_type: CIFAR10}", "RAdam", 16, 0.0),
        ("{dataset_type: ImageFolder, model_type: UNet}", "AdamW", 1, 0.0),
        ("{dataset_type: CIFAR10, optimizer: AdamW, ema_every_steps: 2}", "AdamW", 2, 0.0),
    ],
)
def test_recipe_of_the_data_set_fills_what_the_config_leaves_open(
    load, text, optimizer, every, augmentation
):
    config = load(text, "working_dir=x")
    found = (config.optimizer, config.ema_every_steps, config.augment_probability)
    assert found == (optimizer, every, augmentation)


def test_numbers_may_be_strings_whole_for_floats_and_are_read_as_they_are_written(load):
    config = load(
        "{working_dir: x, learning_rate: 1e-4, p: 1, total_steps: '1e5', betas: ['0.9', 0]}",
        "seed=010",
    )
    assert (config.learning_rate, config.total_steps, config.betas) == (1e-4, 100_000, (0.9, 0.0))
    assert isinstance(config.p, float)
    assert config.seed == 10
    with pytest.raises(UserError, match="seed: '1:30' "):
        load("working_dir: x", "seed=1:30")


def test_triangular_is_trig_and_null_switches_results_off(load):
    config = load(
        "{working_dir: x, noising_type: Triangular, coefficient_type: Triangular, "
        "eval_steps: null, eval_demo_steps: 0, ckpt_saving_steps: null}"
    )
    assert config.noising_type == config.coefficient_type == "Trig"
    assert not (config.eval_steps or config.eval_demo_steps or config.ckpt_saving_steps)


def test_saved_config_loads_to_the_same(load, tmp_path):
    config = load("{working_dir: x, dataset_type: CIFAR10, model_type: UNet, learning_rate: 3e-4}")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(config.to_dict(), "record") == config
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == set(FIELDS)


# Another experiment, or the same one run differently

BASE = "{working_dir: x, dataset_type: Digits, data_size: 8, model_type: DiT-Nano-2, batch_size: 8}"


def test_operational_keys_may_change_and_others_may_not(load):
    old = load(BASE)
    changed = load(BASE, "num_workers=0", "learning_rate=0.1", "eval_NFE=2")
    notes = refuse_another_experiment(old, changed, [], "record")
    assert [note.split(": ")[1] for note in notes] == ["0.0001 -> 0.1", "12 -> 0", "1 -> 2"]
    with pytest.raises(UserError, match=r"record .*seed 42 -> 1"):
        refuse_another_experiment(old, load(BASE, "seed=1"), [], "record")
    (note,) = refuse_another_experiment(old, load(BASE, "seed=1"), ["seed"], "record")
    assert "seed" in note and "42 -> 1" in note
    assert refuse_another_experiment(old, old, [], "record") == []


@pytest.mark.parametrize(
    "key",
    [
        "model_type", "noising_type", "coefficient_type", "dataset_type", "data_size", "p", "eps",
        "velocity_loss_ratio", "time_mean", "time_std", "cfg_scale", "mix_ratio", "cfg_drop_rate",
        "cfg_decay_time", "l_schedule", "l_init_ratio", "l_end_ratio", "total_steps", "seed",
        "batch_size", "optimizer", "ema_decay_rate", "ema_every_steps", "augment_probability",
        "unet_dropout", "held_out",
    ],
)  # fmt: skip
def test_what_makes_the_experiment_is_not_operational(key):
    assert not may_change(FIELDS[key])


def test_unknown_keys_of_a_file_are_named_in_one_line_where_they_may_be_passed_over(load, tmp_path):
    path, said = tmp_path / "config.yaml", []
    path.write_text("working_dir: runs/x\nuse_fp16: true\nnoising_typ: Trig\nseed: 7\n")
    assert load_config(path, ["batch_size=8"], said.append).seed == 7
    (line,) = said
    assert re.match(rf"{path}: .*use_fp16, noising_typ; .*noising_type\?$", line)
    for overrides, pass_over, named in (
        ([], None, "use_fp16: "),
        (["batchsize=8"], said.append, "--set batchsize: .*batch_size"),
        (["seed=seven"], said.append, "seed: 'seven' "),
    ):
        with pytest.raises(UserError, match=named):
            load_config(path, overrides, pass_over)


# What comes from the command line and the environment


def test_paths_take_variables_of_the_environment_and_refuse_those_that_are_not_set(
    load, monkeypatch
):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load("{working_dir: $SCRATCH/run, dataset_path: '${SCRATCH}/data'}")
    assert (config.working_dir, config.dataset_path) == ("/scratch/me/run", "/scratch/me/data")
    monkeypatch.delenv("SCRATCH")
    for key in ("working_dir", "dataset_path", "vae", "init_from"):
        with pytest.raises(UserError, match=rf"{key}: .*\$SCRATCH"):
            load("working_dir: x", f"{key}=$SCRATCH/run")


def test_a_method_in_a_file_is_taken_from_the_command_line_alone(load, tmp_path, monkeypatch):
    monkeypatch.delitem(METHODS, "mine.py:Mine", raising=False)
    mine = tmp_path / "mine.py"
    mine.write_text("from models import SoFlow\nclass Mine(SoFlow): pass\nnumber = 3\n")
    with pytest.raises(UserError, match=r"config\.yaml: method: .*mine\.py:Mine"):
        load("{working_dir: x, method: 'mine.py:Mine'}")
    assert load("working_dir: x", f"method={mine}:Mine").method == "mine.py:Mine"
    assert METHODS.pop("mine.py:Mine").__name__ == "Mine"
    for wrong in (f"{tmp_path}/no.py:Mine", f"{mine}:Other", f"{mine}:number"):
        with pytest.raises(UserError, match=r"--set method=.*(no|mine)\.py"):
            load("working_dir: x", f"method={wrong}")

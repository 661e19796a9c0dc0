"""What a config may say, and what it is told when it may not."""

import re

import pytest
import yaml
from commands import ROOT
from pydantic import ValidationError

from config import (
    FIELDS,
    Config,
    changed_keys,
    config_from_dict,
    load_config,
    refuse_another_experiment,
    save_config,
)
from support.system.files import UserError
from support.system.settings import may_change

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
def test_every_config_of_the_project_loads(path):
    assert load_config(path).working_dir


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_every_config_is_explained_in_the_words_of_config_py(path):
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
    assert config.optimizer == optimizer
    assert config.ema_every_steps == every
    assert config.augment_probability == augmentation


def test_numbers_may_be_strings_and_whole_where_floats_are_meant(load):
    config = load(
        "{working_dir: x, learning_rate: 1e-4, p: 1, total_steps: '1e5', betas: ['0.9', 0]}"
    )
    assert config.learning_rate == 1e-4
    assert isinstance(config.p, float)
    assert config.total_steps == 100_000
    assert config.betas == (0.9, 0.0)


def test_triangular_is_trig_in_both_keys(load):
    config = load("{working_dir: x, noising_type: Triangular, coefficient_type: Triangular}")
    assert config.noising_type == config.coefficient_type == "Trig"


def test_null_switches_results_off(load):
    config = load("{working_dir: x, eval_steps: null, eval_demo_steps: 0, ckpt_saving_steps: null}")
    assert not (config.eval_steps or config.eval_demo_steps or config.ckpt_saving_steps)


def test_saved_config_loads_to_the_same(load, tmp_path):
    config = load("{working_dir: x, dataset_type: CIFAR10, model_type: UNet, learning_rate: 3e-4}")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(config.to_dict(), "record") == config
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == set(FIELDS)


def test_digest_tells_configs_apart(load):
    one, other = load("working_dir: x"), load("working_dir: x", "seed=1")
    assert one.digest() == load("working_dir: x").digest() != other.digest()


BASE = "{working_dir: x, dataset_type: Digits, data_size: 8, model_type: DiT-Nano-2, batch_size: 8}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach_size=3", "--set bach_size: unknown key; did you mean batch_size?"),
        ("nonsense=3", "--set nonsense: unknown key"),
        ("batch_size=many", "--set batch_size: 'many' is not a whole number"),
        ("batch_size=true", "--set batch_size: true is not a whole number"),
        ("batch_size=1.5", "--set batch_size: 1.5 is not a whole number"),
        ("batch_size=null", "--set batch_size: null is not a whole number"),
        ("batch_size=0", "--set batch_size: 0 must be between 1 and 100,000,000"),
        ("p=.nan", "--set p: nan is not a number"),
        ("working_dir=3", "--set working_dir: 3 is not a text"),
        ("time_mean=[1, 2]", "--set time_mean: [1, 2] is not a list of 3 numbers"),
        ("betas=[0.9, 1.0]", "--set betas: [0.9, 1.0] must be at least 0 and below 1 each"),
        (
            "eval_demo_shape=[0, 8]",
            "--set eval_demo_shape: [0, 8] must be between 1 and 1,000 each",
        ),
        ("l_schedule=exponent", "is not one of Const, Linear, Cosine, Exponent; did you mean Expo"),
        ("coefficient_type=euler", "is not one of Euler, Trig; did you mean Euler?"),
        ("model_type=DiT-XXL-2", "with SIZE one of Nano, Ti, S, B, M, L, XL; did you mean DiT-XL"),
        ("model_type=Unet", "is neither UNet nor DiT-SIZE-PATCH"),
        ("model_type=DiT-B-3", "has a patch that does not divide data_size 8"),
        ("cfg_scale=2", "cfg_drop_rate (default): 0.0 leaves no null class"),
        ("cfg_drop_rate=0.1", "--set cfg_drop_rate: 0.1 must be 0 where cfg_scale is 1"),
        ("cfg_scale=0.5", "--set cfg_scale: 0.5 must be 1 or more"),
        ("data_size=16", "--set data_size: 16 must be 8 for Digits"),
        ("l_init_ratio=0", "--set l_init_ratio: 0.0 must be above 0 and at most 1"),
        ("augment_probability=0.1", "needs model_type UNet"),
        ("seed", "--set seed: not of the form KEY=VALUE"),
        ("seed=" + "9" * 400, "is not a whole number"),
        ("total_steps=1e30", "is not a whole number"),
        ("total_steps=1e12", "total_steps: 1000000000000 must be between 1 and 1,000,000,000"),
        ("eval_NFE=1000000", "eval_NFE: 1000000 must be between 1 and 1,000"),
        ("working_dir=" + "x" * 300, "cannot be a folder (File name too long)"),
        ('working_dir="a\\0b"', "'a\\x00b' has a character that no name can have"),
        ("a\nb=1", "--set a\\nb: unknown key"),
        ("seed=[", "--set seed=[, line 1: not valid YAML"),
    ],
)
def test_what_may_not_be_is_refused_in_one_line(load, override, message):
    with pytest.raises(UserError) as refusal:
        load(BASE, override)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a mapping of keys to values"),
        ("- a\n- b", "not a mapping of keys to values"),
        ("batch_size: 8", "working_dir (default): '' must name the folder"),
        ("working_dir: x\nseed: 1\nseed: 2", "line 3: not valid YAML (the key seed stands here"),
        ("a: &a [1]\nb: *a", "line 2: not valid YAML (aliases are not supported)"),
        ("working_dir: !!python/object/apply:os.getcwd []", "line 1: not valid YAML"),
        ("working_dir: {", "not valid YAML"),
        ("working_dir: x\nmodel_type: UNet\ncfg_scale: 2\ncfg_drop_rate: 0.1\n"
         "dataset_type: CIFAR10", "cfg_scale: 2.0 needs labels, and the UNet is unconditional"),
        ("working_dir: x\nmodel_type: UNet", "model_type: 'UNet' is for pixels"),
        ("working_dir: x\ndataset_type: CIFAR10\ndata_size: 64", "must be 32 for CIFAR10"),
    ],
)  # fmt: skip
def test_a_file_that_may_not_be_is_refused_with_its_name(load, tmp_path, text, message):
    with pytest.raises(UserError) as refusal:
        load(text)
    assert message in str(refusal.value)
    assert str(tmp_path / "config.yaml") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_not_text_or_not_there_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_config_is_frozen(load):
    with pytest.raises(ValidationError, match="frozen"):
        load("working_dir: x").seed = 1


# Another experiment, or the same one run otherwise


def test_operational_keys_may_change_and_others_may_not(load):
    old = load(BASE)
    changed = load(BASE, "num_workers=0", "learning_rate=0.1", "eval_NFE=2")
    assert refuse_another_experiment(old, changed, [], "record") == [
        "learning_rate changed: 0.0001 -> 0.1",
        "num_workers changed: 12 -> 0",
        "eval_NFE changed: 1 -> 2",
    ]
    with pytest.raises(UserError, match=r"record is of another experiment: seed 42 -> 1; "):
        refuse_another_experiment(old, load(BASE, "seed=1"), [], "record")
    assert refuse_another_experiment(old, load(BASE, "seed=1"), ["seed"], "record") == [
        "seed changed: 42 -> 1"
    ]
    assert changed_keys(old, old) == {}


@pytest.mark.parametrize(
    "key",
    [
        "model_type", "noising_type", "coefficient_type", "dataset_type", "data_size", "p", "eps",
        "velocity_loss_ratio", "time_mean", "time_std", "cfg_scale", "mix_ratio", "cfg_drop_rate",
        "cfg_decay_time", "l_schedule", "l_init_ratio", "l_end_ratio", "total_steps", "seed",
        "batch_size", "optimizer", "ema_decay_rate", "ema_every_steps", "augment_probability",
        "unet_dropout",
    ],
)  # fmt: skip
def test_what_makes_the_experiment_is_not_operational(key):
    assert not may_change(FIELDS[key])


def test_unknown_keys_of_a_file_are_passed_over_in_one_line_where_that_is_asked_for(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("working_dir: runs/x\nuse_fp16: true\nnoising_typ: Trig\nseed: 7\n")
    said = []
    assert load_config(path, ["batch_size=8"], said.append).seed == 7
    assert said == [
        f"{path}: passed over keys that are not known here: use_fp16, noising_typ; did you mean "
        "noising_type?"
    ]
    with pytest.raises(UserError, match="use_fp16: unknown key"):
        load_config(path)
    with pytest.raises(UserError, match="--set batchsize: unknown key; did you mean batch_size"):
        load_config(path, ["batchsize=8"], said.append)
    path.write_text("working_dir: runs/x\nuse_fp16: true\nseed: seven\n")
    with pytest.raises(UserError, match="seed: 'seven' is not a whole number"):
        load_config(path, pass_over=said.append)

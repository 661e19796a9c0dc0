"""A wrong config is refused in one line that names the file, the key and the value.

Wrong types follow from the keys' types, and every numeric key must have values out of its range
here: a new key fails until somebody has thought about them.
"""

import typing
from pathlib import Path

import pytest

from config import FIELDS, TYPES, config_from_dict, load_config
from dit import DiT
from models import BACKBONES
from support.system.files import UserError
from support.system.settings import choices_of

BASE = {
    "working_dir": "x", "dataset_type": "Digits", "data_size": 8, "model_type": "DiT-Nano-2",
    "batch_size": 8,
}  # fmt: skip
UNET = {"model_type": "UNet", "dataset_type": "CIFAR10", "data_size": 32}
GUIDED = {"cfg_scale": 2, "cfg_drop_rate": 0.1}
AS_SIT = {"init_from": "sit.pt", "init_from_as": "SiT"}


def line_of(**values) -> str:
    """The refusal of a config with these values; the file is called `c.yaml`."""
    with pytest.raises(UserError) as refusal:
        config_from_dict({**BASE, **values}, "c.yaml")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def assert_named(line: str, key: str, value: object) -> None:
    """The line names the place and the value, or the part of it that is wrong."""
    assert line.startswith((f"c.yaml: {key}: ", f"c.yaml: {key} (default): "))
    parts = value if isinstance(value, list) and value else [value]
    spelled = [repr(value), *map(repr, parts), *map(str, parts)]
    assert any(one in line for one in spelled) or value in (None, True, False)


def slips(key: str) -> set[str]:
    """Common misspellings of a key."""
    middle = len(key) // 2
    slips = {key.upper(), f"{key}{key[-1]}", key.replace("_", "-"), key.replace("_", "")}
    if middle > 1:
        slips |= {key[:middle] + key[middle + 1 :], f"{key[1]}{key[0]}{key[2:]}"}
    return slips - {key}


@pytest.mark.parametrize("key", FIELDS)
def test_a_misspelt_key_is_answered_with_the_right_one(key):
    for slip in slips(key):
        assert line_of(**{slip: 1}).startswith(f"c.yaml: {slip}: ")
        assert line_of(**{slip: 1}).endswith(f"did you mean {key}?")


def test_a_key_like_no_other_gets_no_suggestion():
    assert "did you mean" not in line_of(zzzzzz=1)


def wrong_types(key: str) -> list[object]:
    """Values of a wrong type for the type that the key has."""
    kind = TYPES[key]
    is_optional = type(None) in typing.get_args(kind)
    if is_optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if choices := choices_of(FIELDS[key]):
        values = [3, choices[0][1:]]
    elif typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis:
        values = ["much", [0.1, "a"]]
    elif typing.get_origin(kind) is tuple:
        values = [1, [1], "12", ["a"] * len(typing.get_args(kind))]
    else:
        values = {
            bool: [3, "maybe", []],
            int: ["many", 1.5, True, [1], 2**64],
            float: ["much", False, {}, float("nan"), float("inf")],
            str: [3, ["a"], False],
        }[kind]
    return values if is_optional else [*values, None]


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_the_wrong_type_is_refused(key):
    for value in wrong_types(key):
        assert_named(line_of(**{key: value}), key, value)


def test_a_misspelt_choice_is_answered_with_the_right_one():
    assert line_of(l_schedule="exponent").endswith("did you mean Exponent?")
    assert line_of(model_type="DiT-XXL-2").endswith("did you mean DiT-XL-2?")
    assert line_of(model_type="unet").endswith("did you mean UNet?")


# The last value below each range, and the first above it where it has two ends.
OUT_OF_RANGE = {
    "unet_dropout": [-0.1, 1.0], "data_size": [0, 8193], "augment_probability": [-0.1, 1.1],
    "vae_batch_size": [0], "velocity_loss_ratio": [-0.1, 1.1], "p": [-0.1, 10.1],
    "eps": [0.0, -0.1], "time_mean": [[0.0, 0.0, 101.0], [-101.0, 0.0, 0.0]],
    "time_std": [[0.0, -0.1, 0.0], [101.0, 0.0, 0.0]], "cfg_scale": [0.9], "mix_ratio": [-0.1, 1.1],
    "cfg_drop_rate": [-0.1, 1.0], "cfg_decay_time": [-0.1], "l_init_ratio": [0.0, 1.1],
    "l_end_ratio": [0.0, 1.1], "total_steps": [0, 10**9 + 1], "ema_decay_rate": [-0.1, 1.0],
    "ema_decay_rates": [[0.9, 1.0], -0.1], "ema_power": [[0.0], [0.1, 0.29]],
    "ema_snapshot_steps": [-1], "ema_every_steps": [0], "learning_rate": [-0.1],
    "betas": [[-0.1, 0.9], [0.9, 1.0]], "weight_decay": [-0.1], "keep_last": [0],
    "keep_every_steps": [0], "warmup_steps": [-1], "gradient_clip": [0.0, -1.0],
    "batch_size": [0, 10**8 + 1], "accumulation_steps": [0], "num_workers": [-1, 1001],
    "prefetch_factor": [0, 1001], "seed": [-1], "eval_steps": [-1],
    "eval_batch_size": [0, 10**8 + 1], "eval_NFE": [0, 1001], "eval_num_samples": [0, 10**8 + 1],
    "eval_demo_steps": [-1], "held_out": [-1], "held_out_steps": [-1],
    "eval_demo_shape": [[0, 8], [4, 1001]], "ckpt_saving_steps": [-1], "logging_steps": [-1],
    "timeout_minutes": [0.0, 100_001.0],
}  # fmt: skip


@pytest.mark.parametrize(
    "key", [key for key in FIELDS if {int, float} & {TYPES[key], *typing.get_args(TYPES[key])}]
)
def test_a_number_out_of_range_is_refused(key):
    for value in OUT_OF_RANGE[key]:
        assert_named(line_of(**{key: value}), key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_std", [0, 0, 0]), ("time_mean", [100, -100, 0]), ("p", 0), ("learning_rate", 0),
        ("num_workers", 1000), ("num_workers", 0), ("prefetch_factor", None), ("seed", 0),
        ("total_steps", 10**9), ("velocity_loss_ratio", 1), ("velocity_loss_ratio", 0),
        ("ema_decay_rate", 0), ("l_init_ratio", 1), ("l_end_ratio", 1), ("cfg_decay_time", 0),
        ("cfg_decay_time", 2), ("betas", [0, 0]), ("eval_NFE", 1000), ("unet_dropout", 0),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(key, value):
    config_from_dict({**BASE, key: value}, "c.yaml")


@pytest.mark.parametrize(
    ("values", "key", "named"),
    [
        ({"ema_decay_rates": [0.9, 0.9]}, "ema_decay_rates", ["0.9"]),
        ({"ema_decay_rates": 0.9999}, "ema_decay_rates", ["0.9999", "ema_decay_rate"]),
        ({"ema_snapshot_steps": 10}, "ema_snapshot_steps", ["10", "ema_power"]),
        ({"working_dir": " "}, "working_dir", []),
        ({"model_type": "DiT-B-3"}, "model_type", ["DiT-B-3", "data_size 8", "1, 2, 4, 8"]),
        ({"model_type": "DiT-B-16"}, "model_type", ["DiT-B-16", "data_size 8"]),
        ({"init_from_as": "SiT"}, "init_from_as", ["SiT", "init_from,"]),
        ({**UNET, **AS_SIT}, "init_from_as", ["SiT", "UNet"]),
        ({**AS_SIT, "noising_type": "Trig"}, "init_from_as", ["SiT", "noising_type"]),
        ({**AS_SIT, "coefficient_type": "Trig"}, "init_from_as", ["SiT", "coefficient_type"]),
        ({"augment_probability": 0.12}, "augment_probability", ["0.12", "model_type UNet"]),
        ({**UNET, **GUIDED}, "cfg_scale", ["2.0", "UNet", "DiT"]),
        ({**UNET, "dataset_type": "ImageFolder", "data_size": 30}, "data_size", ["30", "UNet"]),
        ({**UNET, "dataset_type": "Imagenet"}, "model_type", ["UNet", "Imagenet", "CIFAR10"]),
        ({"cfg_scale": 2}, "cfg_drop_rate (default)", ["0.0", "cfg_scale"]),
        ({"cfg_scale": 2, "cfg_drop_rate": 0}, "cfg_drop_rate", ["0.0", "cfg_scale"]),
        ({"cfg_drop_rate": 0.1}, "cfg_drop_rate", ["0.1", "cfg_scale"]),
        ({**GUIDED, "mix_ratio": 0}, "mix_ratio", ["0.0", "0.25"]),
        ({"batch_size": 1}, "velocity_loss_ratio (default)", ["0.75", "batch_size 1"]),
        ({"velocity_loss_ratio": 0.1}, "velocity_loss_ratio", ["0.1", "batch_size 8"]),
        ({"data_size": 16}, "data_size", ["16", "8", "Digits"]),
        ({"data_size": 64, "dataset_type": "CIFAR10"}, "data_size", ["64", "32", "CIFAR10"]),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused_by_name(values, key, named):
    line = line_of(**values)
    assert line.startswith(f"c.yaml: {key}: ")
    assert [word for word in named if word not in line] == []


def test_networks_are_called_as_in_their_table(monkeypatch):
    class Unlabelled(DiT):
        is_conditional = False
        recognises = classmethod(lambda cls, model_type: model_type == "Unlabelled")

    monkeypatch.setitem(BACKBONES, "Unlabelled", Unlabelled)
    monkeypatch.setattr(Unlabelled, "misfit", classmethod(lambda *_: None))
    assert "UNet or Unlabelled" in line_of(augment_probability=0.1)
    assert "Unlabelled" in line_of(model_type="Unlabelled", **GUIDED)


@pytest.mark.parametrize(
    "values",
    [
        # A key without effect is no contradiction: published configs have such.
        {"mix_ratio": 0.25, "cfg_decay_time": 0.8},
        {"num_workers": 0, "prefetch_factor": 6},
        {"l_schedule": "Const", "l_init_ratio": 1.0},
        {**UNET, "mix_ratio": 0.25, "cfg_decay_time": 0.8},
        # Rarely wanted, but meaningful.
        {"l_init_ratio": 0.002, "l_end_ratio": 0.1},
        {"velocity_loss_ratio": 1},
        {"batch_size": 1, "velocity_loss_ratio": 0},
        {"total_steps": 5, "eval_steps": 25_000, "ckpt_saving_steps": 200_000},
        # Sampling needs neither data nor a batch that suits the machine.
        {"dataset_type": "ImageFolder", "data_size": 64, "dataset_path": None},
        {"dataset_type": "Imagenet", "data_size": 32},
        {"model_type": "UNet"},
        {**UNET, "dataset_type": "ImageFolder", "data_size": 64},
    ],
)
def test_values_that_mean_something_in_the_reference_are_taken(values):
    config_from_dict({**BASE, **values}, "c.yaml")


# Files and the command line


def refusal(path: Path, *overrides: str) -> str:
    """The refusal of a config file with these overrides."""
    with pytest.raises(UserError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_line_names_the_file_or_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("working_dir: x\nbatch_size: 0\n")
    assert refusal(path).startswith(f"{path}: batch_size: 0 ")
    assert refusal(path, "batch_size=8", "seed=-1").startswith("--set seed: -1 ")


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("bach_size=3", "--set bach_size: "), ("l_schedule=exponent", "--set l_schedule: "),
        ("seed", "--set seed: "), ("seed=" + "9" * 400, "--set seed: "),
        ("seed=[", "--set seed=[, line 1: "), ("total_steps=1e30", "--set total_steps: "),
        ("total_steps=1e12", "--set total_steps: 1000000000000 "), ("p=.nan", "--set p: nan "),
        ('working_dir="a\\0b"', "--set working_dir: 'a\\x00b' "), ("a\nb=1", "--set a\\nb: "),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_in_one_line(tmp_path, override, place):
    (tmp_path / "c.yaml").write_text("working_dir: x")
    assert refusal(tmp_path / "c.yaml", override).startswith(place)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""), ("- a\n- b", ""), ("batch_size: 8", ": working_dir (default): "),
        ("working_dir: x\nseed: 1\nseed: 2", ", line 3: "), ("a: &a [1]\nb: *a", ", line 2: "),
        ("working_dir: !!python/object/apply:os.getcwd []", ", line 1: "), ("working_dir: {", ""),
        (b"\xff\xfe\x00", ""), (None, ""),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_refused_by_its_name(tmp_path, text, place):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(path).startswith(f"{path}{place}")

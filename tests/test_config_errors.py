"""Whatever is wrong in a config is one line that names the file, the key, the value and a way out.

Every table has a row for each key of `Config`: a new key fails here until somebody has thought
about its wrong values.
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
    "working_dir": "x",
    "dataset_type": "Digits",
    "data_size": 8,
    "model_type": "DiT-Nano-2",
    "batch_size": 8,
}
UNET = {"model_type": "UNet", "dataset_type": "CIFAR10", "data_size": 32}
GUIDED = {"cfg_scale": 2, "cfg_drop_rate": 0.1}
CHOICES = "; did you mean "


def line_of(**values) -> str:
    """What is said of a config with these values; the file is called `c.yaml`."""
    with pytest.raises(UserError) as refusal:
        config_from_dict({**BASE, **values}, "c.yaml")
    return str(refusal.value)


# Every key, misspelt


def slips(key: str) -> list[str]:
    """Ways in which fingers and habits change a key."""
    middle = len(key) // 2
    return [
        key.upper(),
        f"{key}{key[-1]}",
        *([key.replace("_", "-"), key.replace("_", "")] if "_" in key else []),
        *([key[:middle] + key[middle + 1 :], f"{key[1]}{key[0]}{key[2:]}"] if middle > 1 else []),
    ]


@pytest.mark.parametrize("key", FIELDS)
def test_a_misspelt_key_is_answered_with_the_right_one(key):
    for slip in set(slips(key)) - {key}:
        assert line_of(**{slip: 1}) == f"c.yaml: {slip}: unknown key; did you mean {key}?"


def test_a_key_like_no_other_gets_no_suggestion():
    assert line_of(zzzzzz=1) == "c.yaml: zzzzzz: unknown key"


# Every key, of the wrong type


def wrong_types(key: str) -> list[tuple[object, str]]:
    """Values of the wrong type with what is said of each, by the type that the key has."""
    kind = TYPES[key]
    is_optional = type(None) in typing.get_args(kind)
    if is_optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    or_null = " or null" if is_optional else ""
    if choices := choices_of(FIELDS[key]):
        slip = choices[0][1:]
        listed = f"is not one of {', '.join(choices)}"
        rows = [(3, f"3 {listed}"), (slip, f"{slip!r} {listed}{CHOICES}{choices[0]}?")]
    elif kind is bool:
        rows = [(3, "3 is not"), ("maybe", "'maybe' is not"), ([], "[] is not")]
    elif kind is int:
        wanted = f"is not a whole number{or_null}"
        rows = [("many", f"'many' {wanted}"), (1.5, f"1.5 {wanted}"), (True, f"true {wanted}"),
                ([1], f"[1] {wanted}"), (2**64, f"{2**64} {wanted}")]  # fmt: skip
    elif kind is float:
        wanted = f"is not a number{or_null}"
        rows = [("much", f"'much' {wanted}"), (False, f"false {wanted}"), ({}, f"{{}} {wanted}"),
                (float("nan"), f"nan {wanted}"), (float("inf"), f"inf {wanted}")]  # fmt: skip
    elif kind is str:
        wanted = f"is not a text{or_null}"
        rows = [(3, f"3 {wanted}"), (["a"], f"['a'] {wanted}"), (False, f"false {wanted}")]
    elif typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis:
        rows = [("much", "'much' is not a number"), ([0.1, "a"], "'a' is not a number")]
    elif typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        name = "numbers" if parts[0] is float else "whole numbers"
        wanted = f"is not a list of {len(parts)} {name}"
        rows = [(1, f"1 {wanted}"), ([1], f"[1] {wanted}"), ("12", f"'12' {wanted}"),
                (["a"] * len(parts), f"'a' is not a {name[:-1]}")]  # fmt: skip
    else:
        pytest.fail(f"add wrong values of the type {kind}, which the new key {key} has")
    return rows if is_optional else [*rows, (None, "null")]


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_it_should_have(key):
    for value, said in wrong_types(key):
        assert line_of(**{key: value}).startswith(f"c.yaml: {key}: {said}"), value


# Every key, out of its range

POSITIVE = "must be 1 or more"
EVERY = "must be 0 or more"
SHARE = "must be between 0 and 1"
BELOW_ONE = "must be at least 0 and below 1"
RATIO = "must be above 0 and at most 1"
COUNT = "must be between 1 and 100,000,000"
FEW = "must be between 1 and 1,000"
SPREAD = "must be between 0 and 100"

# The last value below a range and the first beyond it, where it has two ends; what is said is
# f"{value} {text}".
RANGES = {
    "unet_dropout": ([-0.1, 1.0], BELOW_ONE),
    "data_size": ([0, 8193], "must be between 1 and 8,192"),
    "augment_probability": ([-0.1, 1.1], SHARE),
    "vae_batch_size": ([0], POSITIVE),
    "velocity_loss_ratio": ([-0.1, 1.1], SHARE),
    "p": ([-0.1, 10.1], "must be between 0 and 10"),
    "eps": ([0.0, -0.1], "must be above 0"),
    "time_mean": ([[0.0, 0.0, 101.0], [-101.0, 0.0, 0.0]], "must be between -100 and 100 each"),
    "time_std": ([[0.0, -0.1, 0.0], [101.0, 0.0, 0.0]], f"{SPREAD} each"),
    "cfg_scale": ([0.9], POSITIVE),
    "mix_ratio": ([-0.1, 1.1], SHARE),
    "cfg_drop_rate": ([-0.1, 1.0], BELOW_ONE),
    "cfg_decay_time": ([-0.1], EVERY),
    "l_init_ratio": ([0.0, 1.1], RATIO),
    "l_end_ratio": ([0.0, 1.1], RATIO),
    "total_steps": ([0, 10**9 + 1], "must be between 1 and 1,000,000,000"),
    "ema_decay_rate": ([-0.1, 1.0], BELOW_ONE),
    "ema_decay_rates": ([[0.9, 1.0], -0.1], f"{BELOW_ONE} each"),
    "ema_power": ([[0.0], [0.1, 0.29]], "must be above 0 and at most 0.28 each"),
    "ema_snapshot_steps": ([-1], EVERY),
    "ema_every_steps": ([0], POSITIVE),
    "learning_rate": ([-0.1], EVERY),
    "betas": ([[-0.1, 0.9], [0.9, 1.0]], f"{BELOW_ONE} each"),
    "weight_decay": ([-0.1], EVERY),
    "keep_last": ([0], "must be 1 or more"),
    "keep_every_steps": ([0], "must be 1 or more"),
    "warmup_steps": ([-1], "must be 0 or more"),
    "gradient_clip": ([0.0, -1.0], "must be above 0"),
    "batch_size": ([0, 10**8 + 1], COUNT),
    "accumulation_steps": ([0], POSITIVE),
    "num_workers": ([-1, 1001], "must be between 0 and 1,000"),
    "prefetch_factor": ([0, 1001], "must be between 1 and 1,000, or null"),
    "seed": ([-1], EVERY),
    "eval_steps": ([-1], EVERY),
    "eval_batch_size": ([0, 10**8 + 1], COUNT),
    "eval_NFE": ([0, 1001], FEW),
    "eval_num_samples": ([0, 10**8 + 1], COUNT),
    "eval_demo_steps": ([-1], EVERY),
    "held_out": ([-1], EVERY),
    "held_out_steps": ([-1], EVERY),
    "eval_demo_shape": ([[0, 8], [4, 1001]], f"{FEW} each"),
    "ckpt_saving_steps": ([-1], EVERY),
    "logging_steps": ([-1], EVERY),
    "timeout_minutes": ([0.0, 100_001.0], "must be above 0 and at most 100,000"),
}


def is_numeric(key: str) -> bool:
    kinds = [TYPES[key], *typing.get_args(TYPES[key])]
    return int in kinds or float in kinds


@pytest.mark.parametrize("key", [key for key in FIELDS if is_numeric(key)])
def test_a_number_out_of_range_is_refused_with_the_range(key):
    assert key in RANGES, f"add a case for key {key}: every number has a range"
    values, said = RANGES[key]
    for value in values:
        assert line_of(**{key: value}) == f"c.yaml: {key}: {value} {said}"


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


# Keys that contradict each other

CONTRADICTIONS = [
    (
        {"ema_decay_rates": [0.9, 0.9]},
        "c.yaml: ema_decay_rates: [0.9, 0.9] names an average twice",
    ),
    (
        {"ema_decay_rates": 0.9999},
        "c.yaml: ema_decay_rates: [0.9999] names the one of ema_decay_rate 0.9999, which is kept "
        "anyhow",
    ),
    (
        {"ema_snapshot_steps": 10},
        "c.yaml: ema_snapshot_steps: 10 needs ema_power, whose averages are what it keeps",
    ),
    (
        {"working_dir": " "},
        "c.yaml: working_dir: ' ' must name the folder of the run",
    ),
    (
        {"model_type": "DiT-XXL-2"},
        "c.yaml: model_type: 'DiT-XXL-2' is neither UNet nor DiT-SIZE-PATCH with SIZE one of "
        "Nano, Ti, S, B, M, L, XL; did you mean DiT-XL-2?",
    ),
    (
        {"model_type": "unet"},
        "c.yaml: model_type: 'unet' is neither UNet nor DiT-SIZE-PATCH with SIZE one of "
        "Nano, Ti, S, B, M, L, XL; did you mean UNet?",
    ),
    (
        {"model_type": "DiT-B-3"},
        "c.yaml: model_type: 'DiT-B-3' has a patch that does not divide data_size 8; "
        "1, 2, 4, 8 would",
    ),
    (
        {"model_type": "DiT-B-16"},
        "c.yaml: model_type: 'DiT-B-16' has a patch that does not divide data_size 8; "
        "1, 2, 4, 8 would",
    ),
    (
        {"augment_probability": 0.12},
        "c.yaml: augment_probability: 0.12 needs model_type UNet: a DiT takes no augmentation",
    ),
    (
        {**UNET, **GUIDED},
        "c.yaml: cfg_scale: 2.0 needs labels, and the UNet is unconditional; use 1, or a DiT",
    ),
    (
        {**UNET, "dataset_type": "ImageFolder", "data_size": 30},
        "c.yaml: data_size: 30 must be a multiple of 4 for the UNet, which halves it twice",
    ),
    (
        {**UNET, "dataset_type": "Imagenet"},
        "c.yaml: model_type: 'UNet' is for pixels (CIFAR10, FashionMNIST, ImageFolder, Digits), "
        "not for Imagenet's latents",
    ),
    (
        {"cfg_scale": 2},
        "c.yaml: cfg_drop_rate (default): 0.0 leaves no null class, which cfg_scale > 1 needs; "
        "0.1 is usual",
    ),
    (
        {"cfg_scale": 2, "cfg_drop_rate": 0},
        "c.yaml: cfg_drop_rate: 0.0 leaves no null class, which cfg_scale > 1 needs; 0.1 is usual",
    ),
    (
        {"cfg_drop_rate": 0.1},
        "c.yaml: cfg_drop_rate: 0.1 must be 0 where cfg_scale is 1 (no guidance)",
    ),
    (
        {**UNET, "cfg_drop_rate": 0.1},
        "c.yaml: cfg_drop_rate: 0.1 must be 0 where cfg_scale is 1 (no guidance)",
    ),
    (
        {**GUIDED, "mix_ratio": 0},
        "c.yaml: mix_ratio: 0.0 leaves nothing of the data in the target of guidance; "
        "0.25 is usual",
    ),
    (
        {"batch_size": 1},
        "c.yaml: velocity_loss_ratio (default): 0.75 leaves flow matching not one sample of "
        "batch_size 1; use 0 for none, or a larger batch",
    ),
    (
        {"velocity_loss_ratio": 0.1},
        "c.yaml: velocity_loss_ratio: 0.1 leaves flow matching not one sample of batch_size 8; "
        "use 0 for none, or a larger batch",
    ),
    (
        {"accumulation_steps": 3},
        "c.yaml: accumulation_steps: 3 does not cut batch_size 8 into equal parts",
    ),
    (
        {"accumulation_steps": 16},
        "c.yaml: accumulation_steps: 16 does not cut batch_size 8 into equal parts",
    ),
    (
        {"data_size": 16},
        "c.yaml: data_size: 16 must be 8 for Digits",
    ),
    (
        {"data_size": 64, "dataset_type": "CIFAR10"},
        "c.yaml: data_size: 64 must be 32 for CIFAR10",
    ),
    (
        {"dataset_type": "Imagenet", "data_size": 32, "eval_demo_shape": [100, 200]},
        "c.yaml: eval_demo_shape: [100, 200] makes pictures of 51200 x 25600 pixels; "
        "500,000,000 pixels are the most",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "line"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused_with_the_whole_line(values, line):
    assert line_of(**values) == line


def test_networks_are_called_as_in_their_table(monkeypatch):
    class Unlabelled(DiT):
        is_conditional = False
        recognises = classmethod(lambda cls, model_type: model_type == "Unlabelled")

    monkeypatch.setitem(BACKBONES, "Unlabelled", Unlabelled)
    monkeypatch.setattr(Unlabelled, "misfit", classmethod(lambda *_: None))
    assert line_of(augment_probability=0.1) == (
        "c.yaml: augment_probability: 0.1 needs model_type UNet or Unlabelled: a DiT takes no "
        "augmentation"
    )
    assert line_of(model_type="Unlabelled", **GUIDED) == (
        "c.yaml: cfg_scale: 2.0 needs labels, and the Unlabelled is unconditional; use 1, or a DiT"
    )


@pytest.mark.parametrize(
    "values",
    [
        # What has no effect is no contradiction: published configs leave it standing.
        {"mix_ratio": 0.25, "cfg_decay_time": 0.8},
        {"num_workers": 0, "prefetch_factor": 6},
        {"l_schedule": "Const", "l_init_ratio": 1.0},
        {**UNET, "mix_ratio": 0.25, "cfg_decay_time": 0.8},
        # What means something, though seldom what is wanted.
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
def test_what_the_reference_gives_a_meaning_is_not_refused(values):
    config_from_dict({**BASE, **values}, "c.yaml")


# Files and the command line


def refusal(path: Path, *overrides: str) -> str:
    """What is said of a config file with what the command line adds to it."""
    with pytest.raises(UserError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_line_names_the_place_of_the_value_file_or_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("working_dir: x\nbatch_size: 0\n")
    assert refusal(path) == f"{path}: batch_size: 0 must be between 1 and 100,000,000"
    assert refusal(path, "batch_size=8", "seed=-1") == "--set seed: -1 must be 0 or more"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach_size=3", "--set bach_size: unknown key; did you mean batch_size?"),
        ("l_schedule=exponent", "Const, Linear, Cosine, Exponent; did you mean Exponent?"),
        ("seed", "--set seed: not of the form KEY=VALUE"),
        ("seed=" + "9" * 400, "is not a whole number"),
        ("seed=[", "--set seed=[, line 1: not valid YAML"),
        ("total_steps=1e30", "is not a whole number"),
        ("total_steps=1e12", "total_steps: 1000000000000 must be between 1 and 1,000,000,000"),
        ("p=.nan", "--set p: nan is not a number"),
        ("working_dir=" + "x" * 300, "cannot be a folder (File name too long)"),
        ('working_dir="a\\0b"', "'a\\x00b' has a character that no name can have"),
        ("a\nb=1", "--set a\\nb: unknown key"),
    ],
)
def test_what_the_command_line_gets_wrong_is_said_in_one_line(tmp_path, override, message):
    (tmp_path / "c.yaml").write_text("working_dir: x")
    assert message in refusal(tmp_path / "c.yaml", override)


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
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_may_not_be_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refusal(path)
    assert said.startswith(str(path))
    assert message in said

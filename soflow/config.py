"""What may be asked for: the frozen `Config`, loaded from YAML, checked, and resolved once.

The keys and their defaults are the reference's, so that released configs mean here what they mean
there; keys of our own have defaults that keep the reference's behaviour.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from soflow.files import UserError, atomic_write
from soflow.vae import PIXELS_PER_LATENT, VAE_NAME

LARGEST_NUMBER = 2**63
FILE_LIMIT_BYTES = 1 << 17  # of a config; the YAML parser takes a second for these
LARGEST_PICTURE_PIXELS = 500_000_000  # of a grid of samples
DIT_SIZES = ("Nano", "Ti", "S", "B", "M", "L", "XL")


def operational(default: Any) -> Any:
    """A field that may change when a run continues: it is still the same experiment."""
    return field(default=default, metadata={"operational": True})


@dataclass(frozen=True)
class Config:
    """One experiment; every field but `working_dir` has a default.

    Fields made by `operational` may change between the parts of a continued run. Fields that
    default to None for lack of a recipe are filled in by `resolve`.
    """

    working_dir: str = operational("")  # folder of the run, relative to the current directory
    # Model
    noising_type: Literal["Linear", "Trig"] = "Linear"
    coefficient_type: Literal["Euler", "Trig"] = "Euler"
    model_type: str = "DiT-B-4"  # DiT-SIZE-PATCH or UNet
    unet_dropout: float = 0.30  # probability; the DiT has none
    # Data
    dataset_type: Literal["Imagenet", "CIFAR10", "Digits", "ImageFolder"] = "Imagenet"
    data_size: int = 32  # side, in pixels or latents
    dataset_path: str | None = operational(None)  # folder; Digits needs none
    augment_probability: float | None = None  # recipe: 0.12 for a UNet on CIFAR10, else 0
    horizontal_flips: bool = False  # of half the pictures, by chance; ImageFolder only
    # Operational, since what it changes is known by the number of pictures that are left.
    skip_bad: bool = operational(False)  # leave out unreadable pictures; ImageFolder only
    # Operational, since one and the same VAE has a name here and a folder there; that it made the
    # latents is checked against their file.
    vae: str = operational(VAE_NAME)  # folder, or name on the Hugging Face Hub; Imagenet only
    vae_batch_size: int = operational(16)  # images decoded at a time; bounds memory, per process
    # Objective
    velocity_loss_ratio: float = 0.75  # share of the global batch for flow matching
    p: float = 1.0  # exponent of the loss weight
    eps: float = 0.01  # added to the squared error in the loss weight
    time_mean: tuple[float, float, float] = (-0.2, -1.0, 0.2)  # flow matching t, consistency s, t
    time_std: tuple[float, float, float] = (1.0, 0.8, 0.8)  # of the same three, before the sigmoid
    cfg_scale: float = 1.0  # guidance scale; 1 is no guidance
    mix_ratio: float = 1.0  # share of the guided velocity in the target
    cfg_drop_rate: float = 0.0  # probability that a label is dropped
    cfg_decay_time: float = 1.0  # time beyond which guidance fades
    l_schedule: Literal["Const", "Linear", "Cosine", "Exponent"] = "Exponent"
    l_init_ratio: float = 0.1  # gap fraction at the first step
    l_end_ratio: float = 0.002  # gap fraction at the last step
    # Training
    total_steps: int = 400_000
    ema_decay_rate: float = 0.9999  # per step
    ema_every_steps: int | None = None  # recipe: 16 on CIFAR10, else 1
    optimizer: Literal["AdamW", "RAdam"] | None = None  # recipe: RAdam on CIFAR10, else AdamW
    learning_rate: float = operational(1e-4)
    betas: tuple[float, float] = operational((0.9, 0.99))
    weight_decay: float = operational(0.0)
    warmup_steps: int | None = operational(None)  # the learning rate rises from 0; 0 or null: none
    gradient_clip: float | None = operational(None)  # bound on the gradient's norm; null: none
    batch_size: int = 256  # samples per step, over all processes
    accumulation_steps: int = operational(1)  # parts that each process cuts its share into
    num_workers: int = operational(12)  # loader processes; 0 loads in the training process
    prefetch_factor: int | None = operational(6)  # batches ahead, per worker
    seed: int = 42
    # Results, in steps; 0 or null switches one off
    eval_steps: int | None = operational(25_000)
    eval_batch_size: int = operational(125)  # images per process
    eval_NFE: int = operational(1)  # noqa: N815 - jumps per image; the reference's key
    eval_num_samples: int = operational(50_000)  # images
    eval_demo_steps: int | None = operational(1_000)
    eval_demo_shape: tuple[int, int] = operational((4, 8))  # rows, columns
    ckpt_saving_steps: int | None = operational(200_000)
    logging_steps: int | None = operational(100)
    # Of checkpoints and evals the last so many are kept, and all at multiples of so many steps;
    # null, as by default, keeps all.
    keep_last: int | None = operational(None)
    keep_every_steps: int | None = operational(None)
    # Machine; none of these changes results but by rounding
    device: Literal["auto", "cuda", "mps", "cpu"] = operational("auto")
    # On CUDA tf32 and bf16 use TF32. bf16 is for the flow matching and guidance passes alone.
    precision: Literal["tf32", "fp32", "bf16"] = operational("tf32")
    compile: bool = operational(False)  # the network, while training
    activation_checkpointing: bool = operational(False)  # compute activations twice, to store few
    channels_last: bool = operational(False)  # memory layout of a UNet; DiTs have no use for it
    timeout_minutes: float = operational(30.0)  # silence after which a process gives up on another

    @property
    def is_conditional(self) -> bool:
        """Whether the network is told the class: the UNet is unconditional."""
        return self.model_type != "UNet"

    @property
    def is_latent(self) -> bool:
        """Whether x_0 is a VAE's latent, to be decoded, rather than an image."""
        return self.dataset_type == "Imagenet"

    @property
    def flow_matching_count(self) -> int:
        """How many of the global batch's samples go to flow matching."""
        return int(self.velocity_loss_ratio * self.batch_size)

    def model_arguments(self, data_channels: int, num_classes: int) -> dict[str, Any]:
        """What `build_model` takes, for this config on data of so many channels and classes."""
        return {
            "model_type": self.model_type,
            "data_channels": data_channels,
            "data_size": self.data_size,
            "num_classes": num_classes,
            "cfg_drop_rate": self.cfg_drop_rate,
            "noising_type": self.noising_type,
            "coefficient_type": self.coefficient_type,
            "dropout": self.unet_dropout,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as YAML, JSON and `torch.load(weights_only=True)` know them."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def digest(self) -> str:
        """SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


# Those of the published code. Keys of ours are not among them: `soflow.published` says what it does
# about each.
PUBLISHED_KEYS = frozenset(
    {
        "working_dir", "noising_type", "coefficient_type", "model_type", "dataset_type",
        "data_size", "dataset_path", "velocity_loss_ratio", "p", "eps", "time_mean", "time_std",
        "cfg_scale", "mix_ratio", "cfg_drop_rate", "cfg_decay_time", "l_schedule", "l_init_ratio",
        "l_end_ratio", "total_steps", "ema_decay_rate", "learning_rate", "betas", "weight_decay",
        "batch_size", "num_workers", "prefetch_factor", "eval_steps", "eval_batch_size", "eval_NFE",
        "eval_demo_steps", "eval_demo_shape", "ckpt_saving_steps", "logging_steps", "seed",
    }
)  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


# Loading


def add_options(parser: argparse.ArgumentParser, needs_config: bool = True) -> None:
    """Give a command the options that `load_config` takes: --config and --set."""
    parser.add_argument(
        "--config", required=needs_config, metavar="FILE", help="YAML config of the run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the config (repeatable)",
    )


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The command line's options; one that is a key of the config is answered with --set."""
    arguments, unknown = parser.parse_known_args(argv)
    for word, following in zip(unknown, [*unknown[1:], "--"], strict=False):
        option, _, value = word.partition("=")
        key = option.lstrip("-").replace("-", "_")
        if option.startswith("-") and key in FIELDS:
            value = value or ("VALUE" if following.startswith("--") else following)
            raise UserError(f"{option}: a key of the config; say --set {key}={value}")
    if unknown:
        options = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
        suggestion = suggest(unknown[0].partition("=")[0], options)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    return arguments


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    pass_over: Callable[[str], None] | None = None,
) -> Config:
    """The resolved config of a YAML file with `KEY=VALUE` overrides; UserError names what is wrong.

    Numeric strings are numbers (YAML reads 1e-4 as a string), whole numbers are floats, and
    `Triangular` is read as `Trig`. Unknown keys of the file are refused, or left out and named in a
    line for `pass_over`.
    """
    return config_from_dict(_read_yaml(path), str(path), overrides, pass_over)


def config_from_dict(
    values: Mapping[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    pass_over: Callable[[str], None] | None = None,
) -> Config:
    """The resolved config of plain values, such as a checkpoint holds; as `load_config`."""
    unknown = [key for key in values if key not in FIELDS]
    if unknown and pass_over:
        named = ", ".join(map(_clip, unknown)) + "".join(suggest(key, FIELDS) for key in unknown)
        pass_over(f"{source}: passed over keys that are not known here: {named}")
        values = {key: value for key, value in values.items() if key in FIELDS}
    placed = {key: (value, f"{source}: {_clip(str(key))}") for key, value in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        place = _clip(repr(override)[1:-1])  # as typed, but in one line
        if not equals:
            raise UserError(f"--set {place}: not of the form KEY=VALUE")
        placed[key] = (_parse_yaml(text, f"--set {place}"), f"--set {place.partition('=')[0]}")
    return _build(placed, source)


def _build(values: Mapping[str, tuple[Any, str]], source: str) -> Config:
    """Check and resolve values that each come with the place they were written at."""
    converted = {}
    for key, (value, place) in values.items():
        if key not in FIELDS:
            raise UserError(f"{place}: unknown key{suggest(str(key), FIELDS)}")
        converted[key] = _convert(TYPES[key], value, place)
    places = {key: place for key, (_, place) in values.items()}
    for key in FIELDS:
        places.setdefault(key, f"{source}: {key} (default)")
    if "working_dir" in converted:
        place = places["working_dir"]
        converted["working_dir"] = _expand_folder(converted["working_dir"], place)
    config = resolve(Config(**converted))
    _check_ranges(config, places)
    _check_together(config, places)
    return config


def _expand_folder(name: str, place: str) -> str:
    """`name` with ~ written out; UserError where no file system could have such a folder."""
    try:
        folder = os.path.expanduser(name)
        os.path.lexists(folder)
        Path(folder).stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{place}: {shorten(name)} cannot be a folder ({reason})") from None
    return folder


def shorten(value: Any) -> str:
    """`value` as the user wrote it, in one line of bearable length."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # YAML's spelling too
    try:
        return _clip(repr(list(value) if isinstance(value, tuple) else value))
    except RecursionError:
        return "a list of lists of lists"


def _clip(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def resolve(config: Config) -> Config:
    """Fill the fields that the data set's recipe decides where the config is silent."""
    is_cifar = config.dataset_type == "CIFAR10"
    recipe = {
        "optimizer": "RAdam" if is_cifar else "AdamW",
        "ema_every_steps": 16 if is_cifar else 1,
        "augment_probability": 0.12 if is_cifar and not config.is_conditional else 0.0,
    }
    missing = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def is_due(finished_steps: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now; 0 and None are never."""
    return bool(every) and finished_steps > 0 and finished_steps % every == 0


def due_steps(total_steps: int, every: int | None) -> range:
    """The steps of a run after which `is_due` holds."""
    return range(every, total_steps + 1, every) if every else range(0)


def suggest(word: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
    """ "; did you mean ...?" or nothing."""
    close = [choice for choice in choices if choice.lower() == word.lower()]
    close += difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (they can explode) and without silently repeated keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands here twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}{line}: not valid YAML ({problem[:200]})") from None
    except (LookupError, AttributeError):  # of a value such as `!!int ""`
        raise UserError(f"{place}: not valid YAML (a value is not what its tag says)") from None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_LIMIT_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if len(content) > FILE_LIMIT_BYTES:
        raise UserError(f"{path}: larger than any config ({FILE_LIMIT_BYTES} bytes)")
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: not a mapping of keys to values, such as `batch_size: 256`")
    return values


# Types

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind`; UserError says what it should have been."""
    is_optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
    if is_optional:
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    match typing.get_origin(kind):
        case typing.Literal:
            return _convert_choice(typing.get_args(kind), value, place)
        case origin if origin is tuple:
            return _convert_list(typing.get_args(kind), value, place)
    number = _number(value) if kind in (int, float) else None
    if kind is float and number is not None:
        return float(number)
    if kind is int and number is not None and number == int(number):
        return int(number)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        if not _is_name(value):
            raise UserError(f"{place}: {shorten(value)} has a character that no name can have")
        return value
    wanted = f"{_NAMES[kind]} or null" if is_optional else _NAMES[kind]
    raise UserError(f"{place}: {shorten(value)} is not {wanted}")


def _is_name(text: str) -> bool:
    """Whether a file could be called that: what is asked for by text are files and names."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _convert_choice(choices: Sequence[str], value: Any, place: str) -> str:
    is_text = isinstance(value, str)
    if is_text and value == "Triangular" and "Trig" in choices:
        return "Trig"
    if is_text and value in choices:
        return value
    suggestion = suggest(value, choices) if is_text else ""
    raise UserError(f"{place}: {shorten(value)} is not one of {', '.join(choices)}{suggestion}")


def _convert_list(kinds: Sequence[type], value: Any, place: str) -> tuple:
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        names = "numbers" if kinds[0] is float else "whole numbers"
        raise UserError(f"{place}: {shorten(value)} is not a list of {len(kinds)} {names}")
    return tuple(_convert(kind, item, place) for kind, item in zip(kinds, value, strict=True))


def _number(value: Any) -> int | float | None:
    """`value` as a finite number, if it is one or spells one."""
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Beyond this neither torch nor a file system can count.
    return value if abs(value) < LARGEST_NUMBER else None


# Ranges

Check = tuple[Callable[[Any], bool], str]


def _each(check: Check) -> Check:
    holds, wanted = check
    return (lambda values: all(holds(value) for value in values)), f"{wanted} each"


_POSITIVE: Check = (lambda value: value is None or value > 0, "above 0")
_NOT_NEGATIVE: Check = (lambda value: value is None or value >= 0, "0 or more")
_AT_LEAST_ONE: Check = (lambda value: value is None or value >= 1, "1 or more")
_STEPS: Check = (lambda value: 1 <= value <= 10**9, "between 1 and 1,000,000,000")
_COUNT: Check = (lambda value: 1 <= value <= 10**8, "between 1 and 100,000,000")
_SIDE: Check = (lambda value: 1 <= value <= 8192, "between 1 and 8,192")
_WORKERS: Check = (lambda value: 0 <= value <= 1000, "between 0 and 1,000")
_AHEAD: Check = (lambda value: value is None or 1 <= value <= 1000, "between 1 and 1,000, or null")
_LOGIT: Check = (lambda value: -100 <= value <= 100, "between -100 and 100")
_SPREAD: Check = (lambda value: 0 <= value <= 100, "between 0 and 100")
_EXPONENT: Check = (lambda value: 0 <= value <= 10, "between 0 and 10")
_MINUTES: Check = (lambda value: 0 < value <= 100_000, "above 0 and at most 100,000")
_FEW: Check = (lambda value: 1 <= value <= 1000, "between 1 and 1,000")
_SHARE: Check = (lambda value: 0 <= value <= 1, "between 0 and 1")
_BELOW_ONE: Check = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_RATIO: Check = (lambda value: 0 < value <= 1, "above 0 and at most 1")

_RANGES: dict[str, Check] = {
    "unet_dropout": _BELOW_ONE,
    "data_size": _SIDE,
    "augment_probability": _SHARE,
    "vae_batch_size": _AT_LEAST_ONE,
    "velocity_loss_ratio": _SHARE,
    "p": _EXPONENT,
    "eps": _POSITIVE,
    "time_mean": _each(_LOGIT),
    "time_std": _each(_SPREAD),
    "cfg_scale": _AT_LEAST_ONE,
    "mix_ratio": _SHARE,
    "cfg_drop_rate": _BELOW_ONE,
    "cfg_decay_time": _NOT_NEGATIVE,
    "l_init_ratio": _RATIO,
    "l_end_ratio": _RATIO,
    "total_steps": _STEPS,
    "ema_decay_rate": _BELOW_ONE,
    "ema_every_steps": _AT_LEAST_ONE,
    "learning_rate": _NOT_NEGATIVE,
    "betas": _each(_BELOW_ONE),
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "gradient_clip": _POSITIVE,
    "batch_size": _COUNT,
    "accumulation_steps": _AT_LEAST_ONE,
    "num_workers": _WORKERS,
    "prefetch_factor": _AHEAD,
    "seed": _NOT_NEGATIVE,
    "eval_steps": _NOT_NEGATIVE,
    "eval_batch_size": _COUNT,
    "eval_NFE": _FEW,
    "eval_num_samples": _COUNT,
    "eval_demo_steps": _NOT_NEGATIVE,
    "eval_demo_shape": _each(_FEW),
    "ckpt_saving_steps": _NOT_NEGATIVE,
    "logging_steps": _NOT_NEGATIVE,
    "keep_last": _AT_LEAST_ONE,
    "keep_every_steps": _AT_LEAST_ONE,
    "timeout_minutes": _MINUTES,
}


def _check_ranges(config: Config, places: Mapping[str, str]) -> None:
    for key, (holds, wanted) in _RANGES.items():
        value = getattr(config, key)
        if not holds(value):
            raise UserError(f"{places[key]}: {shorten(value)} must be {wanted}")


def _check_together(config: Config, places: Mapping[str, str]) -> None:
    """Refuse values that are fine alone and contradict each other."""

    def refuse(key: str, reason: str) -> typing.NoReturn:
        raise UserError(f"{places[key]}: {shorten(getattr(config, key))} {reason}")

    if not config.working_dir.strip():
        refuse("working_dir", "must name the folder of the run")
    if config.is_conditional:
        match = re.fullmatch(r"DiT-([A-Za-z]+)-([1-9][0-9]{0,5})", config.model_type)
        if match is None or match[1] not in DIT_SIZES:
            choices = [f"DiT-{size}-2" for size in DIT_SIZES]
            refuse(
                "model_type",
                f"is neither UNet nor DiT-SIZE-PATCH with SIZE one of {', '.join(DIT_SIZES)}"
                f"{suggest(config.model_type, ['UNet', *choices])}",
            )
        if config.data_size % int(match[2]):
            fitting = [str(patch) for patch in range(1, 17) if config.data_size % patch == 0]
            refuse(
                "model_type",
                f"has a patch that does not divide data_size {config.data_size}; "
                f"{', '.join(fitting)} would",
            )
        if config.augment_probability > 0:
            refuse("augment_probability", "needs model_type UNet: a DiT takes no augmentation")
        if config.channels_last:
            refuse("channels_last", "needs model_type UNet: a DiT has no use for that layout")
    else:
        if config.cfg_scale > 1:
            refuse("cfg_scale", "needs labels, and the UNet is unconditional; use 1, or a DiT")
        if config.data_size % 4:
            refuse("data_size", "must be a multiple of 4 for the UNet, which halves it twice")
        if config.is_latent:
            refuse(
                "model_type",
                "is for pixels (CIFAR10, ImageFolder, Digits), not for Imagenet's latents",
            )
    for key in ("horizontal_flips", "skip_bad"):
        if getattr(config, key) and config.dataset_type != "ImageFolder":
            refuse(key, f"is for dataset_type ImageFolder, not for {config.dataset_type}")
    if config.horizontal_flips and config.augment_probability > 0:
        refuse("horizontal_flips", "must be false where augment_probability is above 0: it flips")
    if config.keep_every_steps and not config.keep_last:
        refuse("keep_every_steps", "has no meaning where keep_last is null: then all are kept")
    if config.cfg_scale > 1 and config.cfg_drop_rate == 0:
        refuse("cfg_drop_rate", "leaves no null class, which cfg_scale > 1 needs; 0.1 is usual")
    if config.cfg_scale == 1 and config.cfg_drop_rate > 0:
        refuse("cfg_drop_rate", "must be 0 where cfg_scale is 1 (no guidance)")
    if config.cfg_scale > 1 and config.mix_ratio == 0:
        refuse("mix_ratio", "leaves nothing of the data in the target of guidance; 0.25 is usual")
    if config.velocity_loss_ratio > 0 and config.flow_matching_count == 0:
        refuse(
            "velocity_loss_ratio",
            f"leaves flow matching not one sample of batch_size {config.batch_size}; "
            "use 0 for none, or a larger batch",
        )
    if config.batch_size % config.accumulation_steps:
        refuse(
            "accumulation_steps", f"does not cut batch_size {config.batch_size} into equal parts"
        )
    rows, columns = config.eval_demo_shape
    side = config.data_size * (PIXELS_PER_LATENT if config.is_latent else 1)
    if rows * columns * side**2 > LARGEST_PICTURE_PIXELS:
        refuse(
            "eval_demo_shape",
            f"makes pictures of {columns * side} x {rows * side} pixels; "
            f"{LARGEST_PICTURE_PIXELS:,} pixels are the most",
        )
    if config.dataset_type == "Digits" and config.data_size != 8:
        refuse("data_size", "must be 8 for Digits")
    if config.dataset_type == "CIFAR10" and config.data_size != 32:
        refuse("data_size", "must be 32 for CIFAR10")


# A run's recorded config


def as_yaml(config: Config) -> str:
    """The resolved config as the text of a config file."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, every key of it."""
    with atomic_write(path) as file:
        file.write(f"# The resolved config of this run.\n{as_yaml(config)}".encode())


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configs differ, with the old and the new value."""
    before, after = old.to_dict(), new.to_dict()
    return {key: (before[key], after[key]) for key in FIELDS if before[key] != after[key]}


def refuse_another_experiment(
    old: Config, new: Config, allowed: Sequence[str], source: str
) -> list[str]:
    """One line per key that changed; UserError where that makes it another experiment.

    `allowed` names the keys whose change the user has agreed to.
    """
    changes = changed_keys(old, new)
    refused = {
        key: change
        for key, change in changes.items()
        if not FIELDS[key].metadata.get("operational") and key not in allowed
    }
    if refused:
        listed = ", ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in refused.items())
        flags = " ".join(f"--allow-changed {key}" for key in refused)
        raise UserError(
            f"{source} is of another experiment: {listed}; "
            f"use another working_dir, or say {flags} to continue all the same"
        )
    return [f"{key} changed: {before!r} -> {now!r}" for key, (before, now) in changes.items()]

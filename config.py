"""What may be asked for: the frozen `Config`, loaded from YAML, checked, and resolved once.

The keys and their defaults are the reference's, so that released configs mean here what they mean
there; keys of our own have defaults that keep the reference's behaviour.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

from backbone import Backbone
from models import BACKBONES, METHODS, backbone_of
from schedules import GAP_SCHEDULES, PATHS, SOLUTION_FORMS
from support.data.vae import PIXELS_PER_LATENT, VAE_NAME
from support.system.files import UserError, atomic_write

LARGEST_NUMBER = 2**63  # beyond this neither torch nor a file system can count
FILE_LIMIT_BYTES = 1 << 17  # of a config; the YAML parser takes a second for these
LARGEST_PICTURE_PIXELS = 500_000_000  # of a grid of samples
OPTIMIZERS = ("AdamW", "RAdam")
DATASETS = ("Imagenet", "CIFAR10", "Digits", "ImageFolder")
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


# The types of values


def _number(value: Any) -> Any:
    """The number that `value` spells, if it does: YAML reads 1e-4 as a text."""
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            return value
    if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
        raise PydanticCustomError("uncountable", "too large to count with")
    return value


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if isinstance(number, float) and number == int(number) else number


def _decimal(value: Any) -> Any:
    number = _number(value)
    return float(number) if type(number) is int else number  # a bool is an int


def _name(value: Any) -> Any:
    """A text; what is asked for by texts are files and names."""
    try:
        if isinstance(value, str) and b"\0" not in os.fsencode(value):
            return value
    except UnicodeEncodeError:
        pass
    if isinstance(value, str):
        raise ValueError("has a character that no name can have")
    return value


def _tuple_of(count: int) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != count:
            raise PydanticCustomError("not_a_list", "another number of values")
        return tuple(value)

    return read


@dataclass(frozen=True)
class Choice:
    """A type of text: one of the names in a table. The table that implements is the list."""

    table: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def read(self, value: Any) -> str:
        """`value`, if it is in the table; `Triangular` is read as `Trig`."""
        if value == "Triangular" and "Trig" in self.table:
            return "Trig"
        if isinstance(value, str) and value in self.table:
            return value
        suggestion = suggest(value, list(self.table)) if isinstance(value, str) else ""
        raise ValueError(f"is not one of {', '.join(self.table)}{suggestion}")


Whole = Annotated[int, BeforeValidator(_whole)]
Decimal = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_decimal)]
Name = Annotated[str, BeforeValidator(_name)]
Logit = Annotated[Decimal, Field(ge=-100, le=100)]
Spread = Annotated[Decimal, Field(ge=0, le=100)]
Beta = Annotated[Decimal, Field(ge=0, lt=1)]
Cells = Annotated[Whole, Field(ge=1, le=1000)]
Three, Two = BeforeValidator(_tuple_of(3)), BeforeValidator(_tuple_of(2))


def key(default: Any, comment: str, operational: bool = False, **limits: Any) -> Any:
    """A key of the config: its default, what it means, and the range of its number.

    `operational`: it may change when a run continues, which stays the same experiment.
    """
    extra = {"operational": operational}
    return Field(default, description=comment, json_schema_extra=extra, **limits)


class Config(BaseModel):
    """One experiment; every field but `working_dir` has a default.

    Fields that default to None for lack of a recipe are filled in by `resolve`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    working_dir: Name = key(
        "", "folder of the run, relative to where the command is started", operational=True
    )
    # Model
    method: Annotated[str, Choice(METHODS)] = key("SoFlow", "what is trained: SoFlow")
    noising_type: Annotated[str, Choice(PATHS)] = key(
        "Linear", "how data and noise are mixed over time: Linear or Trig"
    )
    coefficient_type: Annotated[str, Choice(SOLUTION_FORMS)] = key(
        "Euler", "form of the solution f = a x + b F: Euler or Trig"
    )
    model_type: Name = key("DiT-B-4", "DiT-SIZE-PATCH (Nano, Ti, S, B, M, L, XL) or UNet")
    unet_dropout: Decimal = key(
        0.30, "probability of dropout in the UNet; the DiT has none", ge=0, lt=1
    )
    # Data
    dataset_type: Annotated[str, Choice(DATASETS)] = key(
        "Imagenet", "Imagenet (latents), CIFAR10, ImageFolder or Digits"
    )
    data_size: Whole = key(32, "side of the data, in pixels or latents", ge=1, le=8192)
    dataset_path: Name | None = key(None, "folder of the data set", operational=True)
    augment_probability: Decimal | None = key(
        None,
        "probability of each augmentation; null: 0.12 for a UNet on CIFAR10, else 0",
        ge=0,
        le=1,
    )
    horizontal_flips: bool = key(False, "half of the pictures, by chance, in a mirror; ImageFolder")
    # Operational, since what it changes is known by the number of pictures that are left.
    skip_bad: bool = key(
        False, "leave out pictures that cannot be read; ImageFolder", operational=True
    )
    # Operational, since one and the same VAE has a name here and a folder there; that it made the
    # latents is checked against their file.
    vae: Name = key(
        VAE_NAME,
        "VAE of the latents: a name on the Hugging Face Hub, or a folder",
        operational=True,
    )
    vae_batch_size: Whole = key(16, "images that it decodes at a time", operational=True, ge=1)
    # Objective
    velocity_loss_ratio: Decimal = key(
        0.75, "share of each batch for flow matching; the rest is for consistency", ge=0, le=1
    )
    p: Decimal = key(1.0, "exponent of the loss weight 1 / (squared error + eps)^p", ge=0, le=10)
    eps: Decimal = key(0.01, "keeps the loss weight finite", gt=0)
    time_mean: Annotated[tuple[Logit, Logit, Logit], Three] = key(
        (-0.2, -1.0, 0.2),
        "logit-normal means of: flow matching t, consistency s, consistency t",
    )
    time_std: Annotated[tuple[Spread, Spread, Spread], Three] = key(
        (1.0, 0.8, 0.8), "logit-normal standard deviations of the same three"
    )
    cfg_scale: Decimal = key(1.0, "guidance trained into the model; 1 is none", ge=1)
    mix_ratio: Decimal = key(
        1.0,
        "share of the guided velocity in the target; the rest is the model's own",
        ge=0,
        le=1,
    )
    cfg_drop_rate: Decimal = key(
        0.0, "probability that a label is replaced by the null class", ge=0, lt=1
    )
    cfg_decay_time: Decimal = key(
        1.0, "time beyond which guidance fades towards the noise; 1 is never", ge=0
    )
    l_schedule: Annotated[str, Choice(GAP_SCHEDULES)] = key(
        "Exponent", "how the gap fraction r falls: Const, Linear, Cosine or Exponent"
    )
    l_init_ratio: Decimal = key(
        0.1, "r at the first step: where l lies between t (0) and s (1)", gt=0, le=1
    )
    l_end_ratio: Decimal = key(0.002, "r at the last step", gt=0, le=1)
    # Training
    total_steps: Whole = key(
        400_000, "length of training; it also stretches the schedule of r", ge=1, le=10**9
    )
    ema_decay_rate: Decimal = key(
        0.9999,
        "decay per step of the averaged weights, from which images are made",
        ge=0,
        lt=1,
    )
    ema_every_steps: Whole | None = key(
        None, "the average moves after steps 1, 1 + this, ...; null: 16 on CIFAR10, else 1", ge=1
    )
    optimizer: Annotated[str, Choice(OPTIMIZERS)] | None = key(
        None, "AdamW or RAdam; null: RAdam on CIFAR10, else AdamW"
    )
    learning_rate: Decimal = key(
        1e-4, "constant from the first step to the last", operational=True, ge=0
    )
    betas: Annotated[tuple[Beta, Beta], Two] = key(
        (0.9, 0.99), "decay rates of the optimizer's two moments", operational=True
    )
    weight_decay: Decimal = key(0.0, "of the optimizer", operational=True, ge=0)
    warmup_steps: Whole | None = key(
        None, "steps in which the learning rate rises from 0; 0 is none", operational=True, ge=0
    )
    gradient_clip: Decimal | None = key(
        None, "bound on the gradient's norm; null is none", operational=True, gt=0
    )
    batch_size: Whole = key(
        256, "samples per step over all processes and accumulation steps", ge=1, le=10**8
    )
    accumulation_steps: Whole = key(
        1, "parts that each process cuts its share of the batch into", operational=True, ge=1
    )
    num_workers: Whole = key(
        12,
        "processes that load data; 0 loads in the training process",
        operational=True,
        ge=0,
        le=1000,
    )
    prefetch_factor: Whole | None = key(
        6, "batches that each of them prepares ahead", operational=True, ge=1, le=1000
    )
    seed: Whole = key(42, "of everything that is drawn", ge=0)
    # Results
    eval_steps: Whole | None = key(
        25_000, "images for scoring every so many steps; 0 is never", operational=True, ge=0
    )
    eval_batch_size: Whole = key(
        125, "images at a time and process", operational=True, ge=1, le=10**8
    )
    eval_NFE: Whole = key(  # noqa: N815 - the reference's key
        1, "jumps per image", operational=True, ge=1, le=1000
    )
    eval_num_samples: Whole = key(50_000, "images for scoring", operational=True, ge=1, le=10**8)
    eval_demo_steps: Whole | None = key(
        1_000, "a picture of samples every so many steps; 0 is never", operational=True, ge=0
    )
    eval_demo_shape: Annotated[tuple[Cells, Cells], Two] = key(
        (4, 8), "its rows and columns", operational=True
    )
    ckpt_saving_steps: Whole | None = key(
        200_000,
        "a checkpoint every so many steps, besides the first and the last",
        operational=True,
        ge=0,
    )
    logging_steps: Whole | None = key(
        100, "a line of metrics every so many steps", operational=True, ge=0
    )
    keep_last: Whole | None = key(
        None, "checkpoints and evals that are kept, the newest; null: all", operational=True, ge=1
    )
    keep_every_steps: Whole | None = key(
        None, "besides, those at multiples of so many steps are kept", operational=True, ge=1
    )
    # Machine; none of these changes results but by rounding
    device: Annotated[str, Choice(("auto", "cuda", "mps", "cpu"))] = key(
        "auto", "auto (the best there is), cuda, mps or cpu", operational=True
    )
    precision: Annotated[str, Choice(("tf32", "fp32", "bf16"))] = key(
        "tf32",
        "tf32, fp32 or bf16; bf16 is for the flow matching and guidance passes alone",
        operational=True,
    )
    compile: bool = key(False, "compile the network, while training", operational=True)
    activation_checkpointing: bool = key(
        False, "compute activations twice, to store few", operational=True
    )
    channels_last: bool = key(
        False, "memory layout of a UNet; DiTs have no use for it", operational=True
    )
    timeout_minutes: Decimal = key(
        30.0,
        "silence after which a process gives up on another",
        operational=True,
        gt=0,
        le=100_000,
    )

    @property
    def is_conditional(self) -> bool:
        """Whether the network is told the class: a UNet is not."""
        return backbone_of(self.model_type).is_conditional

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
            "method": self.method,
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
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}

    def digest(self) -> str:
        """SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


# Those of the published code. Keys of ours are not among them: `published` says what it does
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
FIELDS = Config.model_fields
TYPES = typing.get_type_hints(Config)


def may_change(name: str) -> bool:
    """Whether this key may change when a run continues."""
    extra = FIELDS[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra["operational"])


def choices_of(name: str) -> list[str] | None:
    """The values that this key may have, where they are listed."""
    for part in (*FIELDS[name].metadata, *_annotations(FIELDS[name].annotation)):
        if isinstance(part, Choice):
            return list(part.table)
    return None


def _annotations(kind: Any) -> list[Any]:
    """What a type and the types within it are annotated with."""
    found = []
    for part in getattr(kind, "__metadata__", ()):
        found += part.metadata if isinstance(part, FieldInfo) else [part]
    for part in typing.get_args(kind):
        found += _annotations(part)
    return found


def range_of(name: str) -> str | None:
    """The range of this key's number, or numbers, in words."""
    field = FIELDS[name]
    is_list = typing.get_origin(TYPES[name]) is tuple
    limits: dict[str, Any] = {}
    for part in (*field.metadata, *_annotations(field.annotation)):
        for bound in ("ge", "gt", "le", "lt"):
            if getattr(part, bound, None) is not None:
                limits[bound] = getattr(part, bound)
    ge, gt, le, lt = (limits.get(bound) for bound in ("ge", "gt", "le", "lt"))
    match (ge, gt, le, lt):
        case (None, None, None, None):
            return None
        case (_, None, None, None):
            words = f"{ge} or more"
        case (None, _, None, None):
            words = f"above {gt}"
        case (_, None, _, None):
            words = f"between {ge:,} and {le:,}"
        case (_, None, None, _):
            words = f"at least {ge} and below {lt}"
        case _:
            words = f"above {gt} and at most {le:,}"
    if name == "prefetch_factor":
        words += ", or null"  # which is what a user who is out of its range may have meant
    return f"{words} each" if is_list else words


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
    for name, (_, place) in values.items():
        if name not in FIELDS:
            raise UserError(f"{place}: unknown key{suggest(str(name), FIELDS)}")
    places = {name: place for name, (_, place) in values.items()}
    for name in FIELDS:
        places.setdefault(name, f"{source}: {name} (default)")
    given = {name: value for name, (value, _) in values.items()}
    try:
        config = Config(**given)
    except ValidationError as error:
        name, wrong = _what_is_wrong(error.errors()[0], given)
        raise UserError(f"{places[name]}: {wrong}") from None
    folder = _expand_folder(config.working_dir, places["working_dir"])
    config = resolve(config.model_copy(update={"working_dir": folder}))
    _check_together(config, places)
    return config


def _what_is_wrong(error: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, str]:
    """The key of a wrong value, and what is said of it."""
    name, *index = error["loc"]
    value = error["input"]
    if error["type"] == "value_error":
        return name, f"{shorten(value)} {error['ctx']['error']}"
    if error["type"].startswith(("greater_than", "less_than")):
        # Of a list all is shown.
        return name, f"{shorten(given[name] if index else value)} must be {range_of(name)}"
    return name, f"{shorten(value)} is not {_wanted(TYPES[name], bool(index))}"


def _wanted(kind: Any, is_element: bool) -> str:
    """What a value of this type is called; of a list's type, the list or one of its elements."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return f"{_wanted(parts[0], is_element)} or null"
    if typing.get_origin(kind) is not tuple:
        return KINDS[kind]
    if is_element:
        return KINDS[parts[0]]
    return f"a list of {len(parts)} {'numbers' if parts[0] is float else 'whole numbers'}"


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
    return config.model_copy(update=missing)


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


# Keys together


def _check_together(config: Config, places: Mapping[str, str]) -> None:
    """Refuse values that are fine alone and contradict each other."""

    def refuse(key: str, reason: str) -> NoReturn:
        raise UserError(f"{places[key]}: {shorten(getattr(config, key))} {reason}")

    if not config.working_dir.strip():
        refuse("working_dir", "must name the folder of the run")
    backbone = _backbone(config, refuse)
    if misfit := backbone.misfit(config.model_type, config.data_size):
        refuse(*misfit)
    if backbone.is_conditional:
        if config.augment_probability:
            refuse("augment_probability", "needs model_type UNet: a DiT takes no augmentation")
        if config.channels_last:
            refuse("channels_last", "needs model_type UNet: a DiT has no use for that layout")
    else:
        if config.cfg_scale > 1:
            refuse("cfg_scale", "needs labels, and the UNet is unconditional; use 1, or a DiT")
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


def _backbone(config: Config, refuse: Callable[[str, str], NoReturn]) -> type[Backbone]:
    try:
        return backbone_of(config.model_type)
    except ValueError as error:
        wrong = str(error).removeprefix(f"model_type {config.model_type!r} ")
        examples = [name for backbone in BACKBONES.values() for name in backbone.examples]
        refuse("model_type", f"{wrong}{suggest(config.model_type, examples)}")


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
        key: change for key, change in changes.items() if not may_change(key) and key not in allowed
    }
    if refused:
        listed = ", ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in refused.items())
        flags = " ".join(f"--allow-changed {key}" for key in refused)
        raise UserError(
            f"{source} is of another experiment: {listed}; "
            f"use another working_dir, or say {flags} to continue all the same"
        )
    return [f"{key} changed: {before!r} -> {now!r}" for key, (before, now) in changes.items()]

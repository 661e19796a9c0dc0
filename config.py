"""The frozen `Config`: loaded from YAML, checked, and resolved once.

The keys and their defaults are the reference's, so that released configs mean here what they mean
there; keys of our own have defaults that keep the reference's behaviour.
"""

import argparse
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dit import DiT
from models import BACKBONES, METHODS, add_method, backbone_of
from schedules import GAP_SCHEDULES, PATHS, SOLUTION_FORMS, TIME_SAMPLING, gap_fraction, warmed_up
from support.data.batches import BatchPlan
from support.data.datasets import DATASETS, DataRequest, find_latents
from support.data.vae import VAE_NAME
from support.runs.averages import LARGEST_STD, Exponential, PowerFunction, Rule
from support.runs.optimizers import OPTIMIZERS
from support.runs.results import ResultSchedule
from support.runs.trackers import TRACKERS
from support.system.files import UserError, atomic_write, shorten
from support.system.settings import (
    Choice,
    Decimal,
    Name,
    Whole,
    changeable,
    either,
    key,
    listed,
    parse_yaml,
    read_yaml,
    suggest,
    tuple_of,
    what_is_wrong,
)

KEYS_OF_DATA = {field.name for field in fields(DataRequest)}
QUOTES = "'\""


def _expanded(name: str) -> str:
    """`name` with ~ and $VARIABLES expanded; ValueError for a variable that is not set."""
    name = os.path.expanduser(os.path.expandvars(name))
    if unset := re.search(r"\$\{?(\w+)", name):
        raise ValueError(f"uses ${unset[1]}, which the environment does not set")
    return name


def _method(name: str) -> str:
    """`name`, if METHODS lists it; ValueError otherwise.

    Only the command line may name a file of code: a downloaded config could run anything.
    """
    if ".py:" in name and name not in METHODS:
        raise ValueError(
            f"is code in a file: allow it with --set method={name} on the command line"
        )
    return Choice(METHODS).read(name)


def _network(model_type: str) -> str:
    """`model_type`, if a backbone recognises it; ValueError otherwise."""
    try:
        backbone_of(model_type)
    except ValueError as error:
        wrong = str(error).removeprefix(f"model_type {model_type!r} ")
        examples = [name for backbone in BACKBONES.values() for name in backbone.examples]
        raise ValueError(f"{wrong}{suggest(model_type, examples)}") from None
    return model_type


Logit = Annotated[Decimal, Field(ge=-100, le=100)]
Spread = Annotated[Decimal, Field(ge=0, le=100)]
Beta = Annotated[Decimal, Field(ge=0, lt=1)]
RelativeStd = Annotated[Decimal, Field(gt=0, le=LARGEST_STD)]
Cells = Annotated[Whole, Field(ge=1, le=1000)]
Three, Two = BeforeValidator(tuple_of(3)), BeforeValidator(tuple_of(2))


Location = Annotated[Name, AfterValidator(_expanded)]


# What training/conventions.py folds. An exported Space has the config without training/.
CONVENTIONS = {"SiT": "-SiT(x, 1 - t)", "REPA": "REPA(x, t)"}  # F(x, t, t) by name


class Config(BaseModel):
    """One experiment; every field but `working_dir` has a default.

    Fields that default to None for lack of a recipe are filled in by `resolve`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    working_dir: Location = changeable("", "folder of the run, relative to the current directory")
    # Model
    method: Annotated[Name, AfterValidator(_method)] = key("SoFlow", "the training objective")
    noising_type: Annotated[str, Choice(PATHS)] = key(
        "Linear", "how data and noise are mixed over time"
    )
    coefficient_type: Annotated[str, Choice(SOLUTION_FORMS)] = key(
        "Euler", "form of the solution f = a x + b F"
    )
    model_type: Annotated[Name, AfterValidator(_network)] = key("DiT-B-4", "the network")
    unet_dropout: Decimal = key(
        0.30, "dropout probability of the UNet; the DiT has no dropout", ge=0, lt=1
    )
    init_from: Location | None = key(
        None, "start from the weights of this run, file, or model on the hub"
    )
    init_from_as: Annotated[str, Choice(CONVENTIONS)] | None = key(
        None, "the model that these weights are of, where their names do not tell"
    )
    # Data
    dataset_type: Annotated[str, Choice(DATASETS)] = key(
        "Imagenet", "the data set; Imagenet is a file of latents"
    )
    # Left out, it is that of the latent file, where there is one.
    data_size: Whole = key(32, "side of the data, in pixels or latents", ge=1, le=8192)
    dataset_path: Location | None = changeable(None, "folder of the data set")
    augment_probability: Decimal | None = key(
        None,
        "probability of each augmentation; null: 0.12 for the UNet on CIFAR10, else 0",
        ge=0,
        le=1,
    )
    horizontal_flips: bool = key(False, "mirror each picture with probability 1/2 (ImageFolder)")
    # May change: the number of pictures that are left tells the difference.
    skip_bad: bool = changeable(
        False, "skip unreadable pictures (ImageFolder); decodes all of them at the start"
    )
    # May change: the same VAE has a name on one machine and a folder on another. Training checks
    # against the latent file that this VAE made the latents.
    vae: Location = changeable(
        VAE_NAME, "VAE of the latents: a name on the Hugging Face Hub, or a folder"
    )
    vae_batch_size: Whole = changeable(16, "images per decoder call", ge=1)
    # Objective
    velocity_loss_ratio: Decimal = key(
        0.75, "share of the batch for flow matching; the rest is for consistency", ge=0, le=1
    )
    p: Decimal = key(
        1.0, "exponent of the adaptive loss weight 1 / (squared error + eps)^p", ge=0, le=10
    )
    eps: Decimal = key(0.01, "keeps the adaptive loss weight finite", gt=0)
    time_sampling: Annotated[str, Choice(TIME_SAMPLING)] = key(
        "LogitNormal", f"how t, s and l are drawn: {either(TIME_SAMPLING)}"
    )
    time_mean: Annotated[tuple[Logit, Logit, Logit], Three] = key(
        (-0.2, -1.0, 0.2), "logit-normal means of: flow matching t, consistency s, consistency t"
    )
    time_std: Annotated[tuple[Spread, Spread, Spread], Three] = key(
        (1.0, 0.8, 0.8), "logit-normal standard deviations of the same three"
    )
    cfg_scale: Decimal = key(
        1.0, "classifier-free guidance scale, trained into the model; 1 is none", ge=1
    )
    mix_ratio: Decimal = key(
        1.0, "share of the guided velocity in the target; the rest is the model's", ge=0, le=1
    )
    cfg_drop_rate: Decimal = key(
        0.0, "probability that the null label replaces a label", ge=0, lt=1
    )
    cfg_decay_time: Decimal = key(
        1.0, "guidance fades out from this time to t = 1; 1: it does not fade", ge=0
    )
    l_schedule: Annotated[str, Choice(GAP_SCHEDULES)] = key(
        "Exponent", "how the gap fraction r falls over training"
    )
    l_init_ratio: Decimal = key(
        0.1, "r at the first step; r is where l lies between t (0) and s (1)", gt=0, le=1
    )
    l_end_ratio: Decimal = key(0.002, "r at the last step", gt=0, le=1)
    # Training
    total_steps: Whole = key(
        400_000, "length of training, and of the schedule of r", ge=1, le=10**9
    )
    ema_decay_rate: Decimal = key(
        0.9999, "decay per step of the EMA of the weights; images are made from it", ge=0, lt=1
    )
    ema_decay_rates: Annotated[tuple[Beta, ...], BeforeValidator(listed)] = key(
        (), "decay rates of additional EMAs"
    )
    ema_power: Annotated[tuple[RelativeStd, ...], BeforeValidator(listed)] = key(
        (), "relative standard deviations of power function EMAs, kept as well"
    )
    ema_snapshot_steps: Whole | None = changeable(
        None, "save these to averages/ every so many steps, for posthoc_ema.py; 0: never", ge=0
    )
    ema_every_steps: Whole | None = key(
        None, "update the EMAs after steps 1, 1 + this, ...; null: 16 on CIFAR10, else 1", ge=1
    )
    optimizer: Annotated[str, Choice(OPTIMIZERS)] | None = key(
        None, "null: RAdam on CIFAR10, else AdamW"
    )
    learning_rate: Decimal = changeable(1e-4, "constant after the warm-up", ge=0)
    betas: Annotated[tuple[Beta, Beta], Two] = changeable(
        (0.9, 0.99), "the optimizer's two moment decay rates"
    )
    weight_decay: Decimal = changeable(0.0, "of the optimizer", ge=0)
    warmup_steps: Whole | None = changeable(
        None, "steps over which the learning rate rises from 0; 0: none", ge=0
    )
    gradient_clip: Decimal | None = changeable(
        None, "largest gradient norm; null: no clipping", gt=0
    )
    batch_size: Whole = key(
        256, "samples per step, over all processes and accumulation steps", ge=1, le=10**8
    )
    accumulation_steps: Whole = changeable(1, "microbatches per process and step", ge=1)
    num_workers: Whole = changeable(
        12, "data loading processes; 0 loads in the training process", ge=0, le=1000
    )
    prefetch_factor: Whole | None = changeable(
        6, "batches that each of them prepares ahead of time", or_else=", or null", ge=1, le=1000
    )
    seed: Whole = key(42, "seed of all random draws", ge=0)
    # Results
    eval_steps: Whole | None = changeable(
        25_000, "write images for scoring every so many steps; 0: never", ge=0
    )
    eval_batch_size: Whole = changeable(125, "images per batch and process", ge=1, le=10**8)
    eval_NFE: Whole = changeable(  # noqa: N815 - the reference's key
        1, "sampling steps per image", ge=1, le=1000
    )
    eval_num_samples: Whole = changeable(50_000, "number of images for scoring", ge=1, le=10**8)
    eval_score: bool = changeable(
        False, "score each eval in the running job, against eval_reference, by torch"
    )
    eval_reference: Location | None = changeable(
        None, "reference file for these scores, as evaluator.py takes it"
    )
    eval_graph: Location | None = changeable(
        None, "frozen graph for these scores; null: the Inception graph, downloaded if absent"
    )
    eval_demo_steps: Whole | None = changeable(
        1_000, "draw a grid of samples every so many steps; 0: never", ge=0
    )
    eval_demo_shape: Annotated[tuple[Cells, Cells], Two] = changeable(
        (4, 8), "rows and columns of that grid"
    )
    ckpt_saving_steps: Whole | None = changeable(
        200_000, "save a checkpoint every so many steps, and at the first and last step", ge=0
    )
    logging_steps: Whole | None = changeable(100, "log metrics every so many steps", ge=0)
    held_out: Whole = key(
        0, "images to measure a held-out loss on; from the test split, if there is one", ge=0
    )
    held_out_steps: Whole | None = changeable(
        1_000, "measure that loss every so many steps; 0: never", ge=0
    )
    log_to: Annotated[tuple[Annotated[str, Choice(TRACKERS)], ...], BeforeValidator(listed)] = (
        changeable((), "experiment trackers that get the metrics as well")
    )
    keep_last: Whole | None = changeable(
        None, "keep this many of the newest checkpoints and evals; null: all", ge=1
    )
    keep_every_steps: Whole | None = changeable(
        None, "also keep those at multiples of so many steps", ge=1
    )
    # Machine: these change results by rounding at most
    device: Annotated[str, Choice(("auto", "cuda", "mps", "cpu"))] = changeable(
        "auto", "auto takes the best device there is"
    )
    precision: Annotated[str, Choice(("tf32", "fp32", "bf16"))] = changeable(
        "tf32", "bf16 applies to the flow matching and guidance passes only"
    )
    compile: bool = changeable(False, "compile the network for training")
    activation_checkpointing: bool = changeable(
        False, "recompute activations in the backward pass, to save memory"
    )
    channels_last: bool = changeable(False, "memory layout of the UNet; no effect on a DiT")
    timeout_minutes: Decimal = changeable(
        30.0, "how long a process waits for another", gt=0, le=100_000
    )

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes labels."""
        return backbone_of(self.model_type).is_conditional

    @property
    def is_latent(self) -> bool:
        """Whether x_0 is a latent of a VAE rather than an image."""
        return DATASETS[self.dataset_type].is_latent

    @property
    def F_is_velocity(self) -> bool:  # noqa: N802 - the network's letter
        """Whether F(x, t, t) is the velocity of the linear path, x_1 - x_0."""
        return self.noising_type == "Linear" and self.coefficient_type == "Euler"

    @property
    def flow_matching_count(self) -> int:
        """The number of samples of the global batch for flow matching."""
        return int(self.velocity_loss_ratio * self.batch_size)

    def model_arguments(self, data_channels: int, num_classes: int) -> dict[str, Any]:
        """The arguments of `build_model` for data with so many channels and classes."""
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

    def gap_fraction_at(self, finished_steps: int) -> float:
        """The gap fraction r of the step that follows."""
        ends = (self.l_init_ratio, self.l_end_ratio)
        return gap_fraction(self.l_schedule, finished_steps, self.total_steps, *ends)

    def learning_rate_at(self, finished_steps: int) -> float:
        """The learning rate of the step that follows."""
        return warmed_up(self.learning_rate, self.warmup_steps, finished_steps)

    def further_averages(self) -> list[Rule]:
        """The rules of the averages besides `ema_decay_rate`'s."""
        return [*map(Exponential, self.ema_decay_rates), *map(PowerFunction, self.ema_power)]

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the batch is cut over the processes."""
        return BatchPlan(
            self.batch_size, self.flow_matching_count, world_size, self.accumulation_steps
        )

    def result_schedule(self) -> ResultSchedule:
        """When results are due."""
        return ResultSchedule(
            self.total_steps,
            self.ckpt_saving_steps,
            self.eval_demo_steps,
            self.eval_steps,
            self.ema_snapshot_steps,
        )

    def data_request(self) -> DataRequest:
        """The argument of `build_data`."""
        return DataRequest(**{name: value for name, value in self if name in KEYS_OF_DATA})

    def to_dict(self) -> dict[str, Any]:
        """The config in plain types, for YAML, JSON and `torch.load(weights_only=True)`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}


FIELDS = Config.model_fields
TYPES = typing.get_type_hints(Config)


# Loading


def add_options(parser: argparse.ArgumentParser, needs_config: bool = True) -> None:
    """Add --config and --set, the arguments of `load_config`."""
    add = parser.add_argument
    file_help, set_help = "YAML config of the run", "replace values of the config (repeatable)"
    add("--config", required=needs_config, type=os.path.expanduser, metavar="FILE", help=file_help)
    add("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=set_help)


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the command line; an option that is a key of the config is refused with --set."""
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
    path: str | Path, overrides: Sequence[str] = (), pass_over: Callable[[str], None] | None = None
) -> Config:
    """The resolved config of a YAML file with `KEY=VALUE` overrides; UserError names what is wrong.

    Numeric strings are numbers (YAML reads 1e-4 as a string), whole numbers are floats, and
    `Triangular` is read as `Trig`. Unknown keys of the file are refused, or skipped and reported to
    `pass_over` if that is given.
    """
    return config_from_dict(read_yaml(path), str(path), overrides, pass_over)


def override_by(option: str, key: str, text: str) -> str:
    """KEY=VALUE for an option that sets a key; UserError, in the option's name, if it is wrong."""
    override = f"{key}={text}"
    try:
        config_from_dict({"working_dir": "any"}, option, [override])
    except UserError as error:
        raise UserError(str(error).replace(f"--set {key}", option, 1)) from None
    return override


def config_from_dict(
    values: Mapping[str, Any],
    source: str,
    overrides: Sequence[str] = (),
    pass_over: Callable[[str], None] | None = None,
) -> Config:
    """The resolved config of plain values, as a checkpoint holds them; see `load_config`."""
    unknown = [key for key in values if key not in FIELDS]
    if unknown and pass_over:
        named = ", ".join(shorten(key).strip(QUOTES) for key in unknown) + "".join(
            suggest(key, FIELDS) for key in unknown
        )
        pass_over(f"{source}: passed over keys that are not known here: {named}")
        values = {key: value for key, value in values.items() if key in FIELDS}
    given = dict(values)
    places = {key: f"{source}: {shorten(key).strip(QUOTES)}" for key in values}
    for override in overrides:
        key, equals, text = override.partition("=")
        place = shorten(override).strip(QUOTES)  # as typed, but in one line
        if not equals:
            raise UserError(f"--set {place}: not of the form KEY=VALUE")
        if key == "method" and ".py:" in text:
            try:
                given[key] = add_method(text)
            except ValueError as error:
                raise UserError(f"--set {place}: {error}") from None
        else:
            given[key] = parse_yaml(text, f"--set {place}")
        places[key] = f"--set {place.partition('=')[0]}"
    for name, place in places.items():
        if name not in FIELDS:
            raise UserError(f"{place}: unknown key{suggest(str(name), FIELDS)}")
    places = {name: f"{source}: {name} (default)" for name in FIELDS} | places
    try:
        config = Config(**given)
    except ValidationError as error:
        name, wrong = what_is_wrong(Config, error.errors()[0], given)
        raise UserError(f"{places[name]}: {wrong}") from None
    config = resolve(config)
    for name, reason in _contradictions(config):
        raise UserError(f"{places[name]}: {shorten(getattr(config, name))} {reason}")
    return config


def resolve(config: Config) -> Config:
    """Fill in the fields that the data set decides, unless the config sets them."""
    dataset = DATASETS[config.dataset_type]
    recipe = {
        "optimizer": dataset.optimizer,
        "ema_every_steps": dataset.ema_every_steps,
        "augment_probability": 0.0 if config.is_conditional else dataset.unet_augment_probability,
    }
    missing = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    if "data_size" not in config.model_fields_set and (
        latents := find_latents(config.data_request())
    ):
        missing["data_size"] = latents.size
    return config.model_copy(update=missing)


# Contradictions between keys


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Keys of a resolved config with values that contradict others, and the reasons."""
    if not config.working_dir.strip():
        yield "working_dir", "must name the folder of the run"
    yield from _of_network(config)
    yield from _of_data(config)
    if config.held_out and not METHODS[config.method].error_names:
        yield "held_out", f"needs `squared_errors` of the method, which {config.method} has not"
    if config.keep_every_steps and not config.keep_last:
        yield "keep_every_steps", "has no meaning where keep_last is null: then all are kept"
    if config.cfg_scale > 1 and config.cfg_drop_rate == 0:
        yield "cfg_drop_rate", "leaves no null class, which cfg_scale > 1 needs; 0.1 is usual"
    if config.cfg_scale == 1 and config.cfg_drop_rate > 0:
        yield "cfg_drop_rate", "must be 0 where cfg_scale is 1 (no guidance)"
    if config.cfg_scale > 1 and config.mix_ratio == 0:
        yield "mix_ratio", "leaves nothing of the data in the guided target; 0.25 is usual"
    if config.eval_score and not config.eval_reference:
        yield "eval_score", "needs eval_reference, a file that evaluator.py --write_ref makes"
    if config.eval_score and not config.eval_steps:
        yield "eval_score", "needs eval_steps, which say when there is something to score"
    if config.velocity_loss_ratio > 0 and config.flow_matching_count == 0:
        reason = f"leaves flow matching no sample of batch_size {config.batch_size}; 0 turns it off"
        yield "velocity_loss_ratio", reason
    for name in ("ema_decay_rates", "ema_power"):
        if len(set(values := getattr(config, name))) < len(values):
            yield name, "names an average twice"
    if config.ema_decay_rate in config.ema_decay_rates:
        yield "ema_decay_rates", f"repeats ema_decay_rate {config.ema_decay_rate}"
    if config.ema_snapshot_steps and not config.ema_power:
        yield "ema_snapshot_steps", "needs ema_power: it saves these averages"


def _of_network(config: Config) -> Iterator[tuple[str, str]]:
    """Contradictions with the network."""
    backbone = backbone_of(config.model_type)
    name = next(name for name, kind in BACKBONES.items() if kind is backbone)
    others = either(
        name for name, kind in BACKBONES.items() if kind.is_conditional != backbone.is_conditional
    )
    if misfit := backbone.misfit(config.model_type, config.data_size):
        yield misfit
    if config.init_from_as and not config.init_from:
        yield "init_from_as", "needs init_from, the weights it speaks of"
    if config.init_from_as and not issubclass(backbone, DiT):
        yield "init_from_as", f"has a DiT's weights, which a {name} cannot take"
    if config.init_from_as and not config.F_is_velocity:
        yield "init_from_as", "needs noising_type Linear and coefficient_type Euler, its own path"
    if backbone.is_conditional and config.augment_probability:
        yield "augment_probability", f"needs model_type {others}: a {name} takes no augmentation"
    if backbone.is_conditional and config.channels_last:
        yield "channels_last", f"needs model_type {others}: a {name} has no use for that layout"
    if not backbone.is_conditional and config.cfg_scale > 1:
        yield "cfg_scale", f"needs labels, and the {name} is unconditional; use 1, or a {others}"
    if not backbone.is_conditional and config.is_latent:
        pixels = ", ".join(name for name, kind in DATASETS.items() if not kind.is_latent)
        yield "model_type", f"is for pixels ({pixels}), not for {config.dataset_type}'s latents"


def _of_data(config: Config) -> Iterator[tuple[str, str]]:
    """Contradictions with the data set."""
    dataset = DATASETS[config.dataset_type]
    for name in ("horizontal_flips", "skip_bad"):
        if getattr(config, name) and not dataset.has_files:
            fitting = " or ".join(name for name, kind in DATASETS.items() if kind.has_files)
            yield name, f"is for dataset_type {fitting}, not for {config.dataset_type}"
    if config.horizontal_flips and config.augment_probability:
        yield "horizontal_flips", "must be false where augment_probability is above 0: it flips"
    if dataset.size and config.data_size != dataset.size:
        yield "data_size", f"must be {dataset.size} for {config.dataset_type}"


# A run's recorded config


def as_yaml(config: Config) -> str:
    """The resolved config as the text of a config file."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, every key of it."""
    with atomic_write(path) as file:
        file.write(f"# The resolved config of this run.\n{as_yaml(config)}".encode())

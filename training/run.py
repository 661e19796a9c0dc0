"""A run: built fresh, continued from its folder's checkpoint, and opened for writing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config, config_from_dict, load_config, save_config
from models import Batch
from sampler import find_decoder
from support.data.batches import BatchPlan, DataOrder, build_loader
from support.data.build import build_data, compare_data
from support.data.datasets import RawBatch, TrainingData
from support.data.images import SKIPPED_FILE
from support.data.vae import decoder_notes
from support.runs.budget import count_parameters
from support.runs.logbook import Logbook, device_name
from support.runs.metrics import METRICS_FILE, Metrics
from support.runs.results import Results
from support.runs.resume import resume
from support.runs.trackers import check_installed
from support.system.files import atomic_write
from support.system.processes import Processes
from support.system.signals import Listener
from training.conventions import start_network
from training.draws import draw_batch
from training.held_out import draw_held_out
from training.identity import compare_plans, refuse_another_experiment, refuse_start
from training.learner import Learner, build_learner
from training.scoring import Scorer, find_scorer


@dataclass
class Run:
    """One process's view of a run: its config, data, training state and outputs."""

    config: Config
    processes: Processes
    data: TrainingData
    learner: Learner
    results: Results
    logbook: Logbook
    metrics: Metrics
    held_out: list[Batch]
    scorer: Scorer | None  # on rank 0, with eval_score
    notes: list[str]  # to log at the start
    is_fresh: bool = True  # whether it starts from no checkpoint
    listener: Listener = field(default_factory=Listener)

    @property
    def order(self) -> DataOrder:
        """The order in which the steps take the examples."""
        return DataOrder(len(self.data), self.config.batch_size, self.config.seed)


def build_run(config: Config, processes: Processes, check_data: bool = False) -> Run:
    """A fresh run with checked data and model; does not touch its folder."""
    refuse_start(config)
    plan = config.batch_plan(processes.world_size)
    decoder = find_decoder(config) if config.result_schedule().has_images else None
    check_installed(config.log_to)
    scorer = processes.on_rank0(lambda: find_scorer(config))
    data = build_data(config.data_request(), processes, check_data)
    if decoder:
        data.notes += decoder_notes(decoder, data.record(), data.spec.shape)
    return assemble_run(config, processes, plan, data, scorer)


def assemble_run(
    config: Config,
    processes: Processes,
    plan: BatchPlan,
    data: TrainingData,
    scorer: Scorer | None = None,
) -> Run:
    """A fresh run on the given data."""
    folder = Path(config.working_dir)
    learner, notes = build_learner(
        config, processes, plan, data.spec.channels, data.spec.num_classes
    )
    results = Results(
        folder,
        processes,
        config.result_schedule(),
        config.to_dict(),
        config.seed,
        config.keep_last,
        config.keep_every_steps,
    )
    logbook = Logbook(folder / "log.txt", processes.is_main)
    metrics = Metrics(folder, processes.is_main, logbook.line)
    held_out = draw_held_out(config, data.held_out, processes) if data.held_out else []
    notes = [*data.notes, *notes]
    return Run(
        *(config, processes, data, learner, results, logbook, metrics, held_out, scorer, notes)
    )


def continue_run(run: Run, allowed: Sequence[str]) -> None:
    """Load the newest checkpoint of the run's folder, if any; writes nothing."""
    folder, learner = run.results.folder, run.learner

    def compare(content: Mapping[str, Any], source: Path) -> list[str]:
        notes = []
        if "data" in content:
            is_allowed = "data" in allowed
            notes = compare_data(content["data"], run.data.record(), str(source), is_allowed)
        notes += compare_plans(learner.plan, content)
        if "config" in content:
            before = config_from_dict(content["config"], str(source))
        elif (source := folder / "config.yaml").exists() and (content or has_trained(folder)):
            before = load_config(source)
        else:
            return notes
        return notes + refuse_another_experiment(before, run.config, allowed, str(source))

    path, notes = resume(folder, learner.state, run.processes, compare)
    run.is_fresh = path is None
    started = f"fresh run in {folder}"
    if path is None and run.config.init_from:
        notes += start_from_another(run)
    if path:
        started = f"resumed at step {learner.state.finished_steps} from {path}"
    size = f"{run.config.model_type}, {count_parameters(learner.state.model)}"
    works_on = f"{size} on {device_name(run.processes.device)}; batch {learner.plan}"
    run.notes = [started, *run.notes, *notes, works_on]


def has_trained(folder: Path) -> bool:
    """Whether a run in this folder got as far as a line of metrics.

    If not, it has left nothing that its config.yaml describes: a full disk can end a run there.
    """
    metrics = folder / METRICS_FILE
    return metrics.exists() and metrics.stat().st_size > 0


def start_from_another(run: Run) -> list[str]:
    """Load the weights of `init_from`, as far as they fit; returns lines to log."""
    config, state = run.config, run.learner.state
    source, named = config.init_from, config.init_from_as
    assert source is not None
    network = state.model.network
    names = run.data.spec.class_names
    record, notes = run.processes.on_rank0(
        lambda: start_network(source, network, names, named, config.F_is_velocity)
    )
    run.processes.broadcast_(state.model.state_dict().values())
    state.restart_averages()
    state.started_from = record
    return notes


def open_folder(run: Run) -> None:
    """Create the run's folders, save its config, and log how it starts."""
    if not run.processes.is_main:
        return
    results = run.results
    results.open()
    if run.config.skip_bad:
        with atomic_write(results.folder / SKIPPED_FILE) as file:
            file.write("".join(f"{path}\n" for path in run.data.skipped).encode(errors="replace"))
    if run.is_fresh or not (results.folder / "config.yaml").exists():
        save_config(run.config, results.folder / "config.yaml")
    for note in run.notes:
        run.logbook.line(note)
    run.metrics.open(run.config.log_to, run.config.to_dict(), run.learner.state.finished_steps)
    # A run killed between a save and the deletions after it leaves superseded files.
    for kind in ("ckpts", "evals"):
        results.delete_superseded(kind, run.learner.state.finished_steps)


def open_loader(run: Run) -> Iterator[RawBatch]:
    """The stored microbatches of the steps that are left, in order."""
    config, state = run.config, run.learner.state
    return build_loader(
        run.data,
        run.learner.plan,
        run.processes.rank,
        range(state.finished_steps, config.total_steps),
        config.seed,
        config.num_workers,
        config.prefetch_factor,
        pin_memory=run.processes.device.type == "cuda",
    )


def draw_batches(run: Run, loader: Iterator[RawBatch]) -> Iterator[Batch]:
    """This process's microbatches of the next global batch, with all their draws."""
    plan, step = run.learner.plan, run.learner.state.finished_steps
    for microbatch in plan.microbatches_of(run.processes.rank):
        stored = next(loader)
        yield draw_batch(run.config, plan, run.data, stored, step, microbatch, run.processes.device)

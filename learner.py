"""One training step: how a global batch changes the model, its optimizer and its average."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import Config
from models import Batch, Method, build_model
from passes import Execution
from schedules import gap_fraction
from support.data.batches import BatchPlan
from support.runs.averages import is_ema_step, update_ema
from support.runs.checkpoint import TrainState
from support.system.files import UserError
from support.system.hardware import allow_tf32, obstacle_to_bf16, obstacle_to_compiling
from support.system.processes import Processes
from support.system.randomness import derive_seed

METRICS = ("Vel_MSE", "Vel_Weight", "Con_MSE", "Con_Weight", "Grad_Norm")


class Learner:
    """The training state of a run in one process, and the step that moves it."""

    def __init__(self, config: Config, processes: Processes, plan: BatchPlan, model: Method):
        """`model` is on the processes' device, with its options set; its weights are made equal."""
        self.config, self.processes, self.plan = config, processes, plan
        model.configure(config.to_dict())
        self.parallel_model: nn.Module = model
        if processes.world_size > 1:
            self.parallel_model = DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        # After DistributedDataParallel has made the weights equal, so that the average is of them.
        self.state = TrainState.fresh(model, build_optimizer(config, model))
        # On the CPU, where looking at a step's result waits for nothing.
        self.refuses_at_once = processes.device.type == "cpu"
        self._broken_at = torch.full((), -1, device=processes.device)
        self._broken_metrics = torch.zeros(len(METRICS), device=processes.device)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step on this process's parts of a global batch.

        Returns this process's share of METRICS, on the device. A step whose gradient is not finite
        is not applied: `refuse_non_finite` tells of it, on the CPU at once.
        """
        config, state = self.config, self.state
        metrics = self.accumulate_gradients(batches)
        self._hold_back_non_finite(metrics)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, state.finished_steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.finished_steps += 1
        if is_ema_step(state.finished_steps, config.ema_every_steps):
            update_ema(state.ema_model, state.model, config.ema_decay_rate, config.ema_every_steps)
        return metrics

    def accumulate_gradients(self, batches: Iterator[Batch]) -> Tensor:
        """Leave the whole batch's gradient, clipped, in the model; returns the share of METRICS.

        The gradients of this process's parts add up, and are exchanged once, with the last.
        """
        plan = self.plan
        metrics = torch.zeros(len(METRICS), device=self.processes.device)
        for index, batch in enumerate(batches, start=1):
            with self._exchanging_gradients(index == plan.accumulation_steps):
                terms = self.parallel_model(batch)
                part = torch.stack([*terms.metrics.values()])
                # DistributedDataParallel averages over the processes; the objective is a sum. What
                # is not finite in one process's part is to be seen by all, in the gradient.
                scale = plan.world_size * (1 + 0 * part.sum())
                (terms.loss * scale).backward()
            metrics[:4] += part
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        # The same on every process, and to be summed over them.
        metrics[4] = norm / plan.world_size
        return metrics

    def _exchanging_gradients(self, exchange: bool) -> contextlib.AbstractContextManager:
        """A block whose backward pass exchanges gradients between processes, or keeps them back."""
        if isinstance(self.parallel_model, DistributedDataParallel) and not exchange:
            return self.parallel_model.no_sync()
        return contextlib.nullcontext()

    def _hold_back_non_finite(self, metrics: Tensor) -> None:
        """Remember the first step whose gradient is not finite, and keep it from being applied.

        Without waiting for the device, where that takes time; where not, the run ends here.
        """
        is_broken = ~metrics[4].isfinite()  # of the gradient's norm, which all processes share
        is_first = is_broken & (self._broken_at < 0)
        self._broken_at = torch.where(is_first, self.state.finished_steps + 1, self._broken_at)
        self._broken_metrics = torch.where(is_first, metrics, self._broken_metrics)
        if self.refuses_at_once:
            self.refuse_non_finite()
            return
        for parameter in self.state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_broken, 0)

    def refuse_non_finite(self) -> None:
        """UserError where a step so far had a loss or gradient that was not finite.

        Waits for the device. To be asked before anything is saved.
        """
        step = int(self._broken_at)
        if step < 0:
            return
        values = self.processes.sum_over_ranks(self._broken_metrics).tolist()
        broken = [
            name for name, value in zip(METRICS, values, strict=True) if not math.isfinite(value)
        ]
        raise UserError(
            f"step {step}: {', '.join(broken)} not finite; the step was not applied and nothing of "
            f"it saved; a lower learning_rate, a gradient_clip or a larger eps may help"
        )


def build_learner(
    config: Config, processes: Processes, plan: BatchPlan, data_channels: int, num_classes: int
) -> tuple[Learner, list[str]]:
    """A fresh learner, and a line for each option that goes on without what it asks for."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    model = build_model(**config.model_arguments(data_channels, num_classes))
    model.to(processes.device)
    notes = set_options(model, config, processes.device)
    return Learner(config, processes, plan, model), notes


def set_options(model: Method, config: Config, device: torch.device) -> list[str]:
    """Let the model's passes run as the config asks; a line where the device cannot."""
    notes = []
    allow_tf32(device, config.precision != "fp32")
    coarse_dtype = None
    if config.precision == "bf16":
        if obstacle := obstacle_to_bf16(device):
            notes.append(f"precision: goes on without bf16 ({obstacle})")
        else:
            coarse_dtype = torch.bfloat16
    is_compiled = False
    if config.compile:
        if obstacle := obstacle_to_compiling(device):
            notes.append(f"compile: goes on without ({obstacle})")
        else:
            is_compiled = True
            # In place: the names in files stay what they are. One shape each, known beforehand.
            model.network.compile(dynamic=False)
            if config.cfg_scale > 1:
                notes.append("compile: guidance takes the whole batch, dropped labels too")
    model.execution = Execution(coarse_dtype, fixed_shapes=is_compiled)
    model.network.activation_checkpointing = config.activation_checkpointing
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return notes


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer: one group of all parameters, in the state dict's order."""
    # RAdam has no fused form.
    kind = {"AdamW": partial(torch.optim.AdamW, fused=True), "RAdam": torch.optim.RAdam}
    return kind[config.optimizer](
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def learning_rate_at(config: Config, finished_steps: int) -> float:
    """The learning rate of the step that follows: constant, after a linear rise if any."""
    if not config.warmup_steps:
        return config.learning_rate
    return config.learning_rate * min(1.0, (finished_steps + 1) / config.warmup_steps)


def gap_fraction_at(config: Config, finished_steps: int) -> float:
    """The gap fraction r of the step that follows."""
    return gap_fraction(
        config.l_schedule,
        finished_steps,
        config.total_steps,
        config.l_init_ratio,
        config.l_end_ratio,
    )

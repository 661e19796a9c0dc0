"""The training step: from a drawn batch to updated weights and averages."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import Config
from models import Batch, Method, build_model
from support.data.batches import BatchPlan
from support.runs.averages import Average, Exponential
from support.runs.checkpoint import TrainState
from support.runs.guard import NonFiniteGuard
from support.runs.optimizers import build_optimizer
from support.system.processes import Processes, exchanging_gradients
from support.system.randomness import derive_seed
from training.execution import set_options


class Learner:
    """The training state of one process, and the step that updates it."""

    def __init__(self, config: Config, processes: Processes, plan: BatchPlan, model: Method):
        """`model` is on the device, with its options set. Every process gets rank 0's weights."""
        self.config, self.processes, self.plan = config, processes, plan
        model.configure(config.to_dict())
        self.parallel_model: nn.Module = model
        if processes.world_size > 1:
            self.parallel_model = exchanging_gradients(model, gradient_as_bucket_view=True)
        optimizer = build_optimizer(
            config.optimizer or "AdamW",
            model,
            config.learning_rate,
            config.betas,
            config.weight_decay,
        )
        # The EMA copies the weights, so DistributedDataParallel must have made them equal before.
        rules = {rule.name: rule for rule in config.further_averages()}
        self.state = TrainState.fresh(model, optimizer, rules)
        every = config.ema_every_steps or 1
        self.averages = [
            Average(self.state.ema_model, model, Exponential(config.ema_decay_rate), every),
            *(Average(self.state.averages[name], model, rules[name], every) for name in rules),
        ]
        self.guard = NonFiniteGuard(processes)
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer step on this process's microbatches of a global batch.

        Returns this process's share of each metric, on the device. A step with a non-finite metric
        is not applied; `guard` raises for it, on the CPU at once.
        """
        config, state = self.config, self.state
        metrics = self.accumulate_gradients(batches)
        norm = metrics["Grad_Norm"]
        self.guard.hold_back(state.finished_steps + 1, norm, metrics, state.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(state.finished_steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.finished_steps += 1
        for average in self.averages:
            average.follow(state.finished_steps)
        return metrics

    def accumulate_gradients(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Compute the global batch's gradient, clipped; returns this process's share of metrics.

        The gradients of the microbatches add up, and are exchanged once, with the last one.
        """
        plan = self.plan
        metrics: dict[str, Tensor] = {}
        for index, batch in enumerate(batches, start=1):
            if isinstance(self.parallel_model, DistributedDataParallel):
                self.parallel_model.require_backward_grad_sync = index == plan.accumulation_steps
            terms = self.parallel_model(batch)
            # DistributedDataParallel averages over the processes; the objective is a sum.
            (terms.loss * plan.world_size).backward()
            for name, value in terms.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self.config.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(self._trained, self.config.gradient_clip, norm)
        # Every process has the same norm, and metrics are summed over processes.
        metrics["Grad_Norm"] = norm / plan.world_size
        return metrics


def build_learner(
    config: Config, processes: Processes, plan: BatchPlan, data_channels: int, num_classes: int
) -> tuple[Learner, list[str]]:
    """A fresh learner, and a note for each option that the device cannot take."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    model = build_model(**config.model_arguments(data_channels, num_classes))
    model.to(processes.device)
    options = (config.precision, config.compile, config.activation_checkpointing)
    model.execution, notes = set_options(model.network, processes.device, *options)
    if model.execution.fixed_shapes and config.cfg_scale > 1:
        notes.append("compile: guidance takes the whole batch, including dropped labels")
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return Learner(config, processes, plan, model), notes

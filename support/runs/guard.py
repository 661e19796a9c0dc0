"""The guard against non-finite steps: it keeps them from the weights and ends the run."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from support.system.files import UserError
from support.system.processes import Processes

NORMS_KEPT = 5


class NonFiniteStep(UserError):  # noqa: N818 - it names a step
    """A step that was not finite, and was not applied."""

    def __init__(self, step: int, broken: list[str]):
        self.step = step
        super().__init__(
            f"step {step}: {', '.join(broken)} not finite; the step was not applied and nothing of "
            f"it saved; a lower learning_rate, a gradient_clip or a larger eps may help"
        )


class NonFiniteGuard:
    """Remembers the first step whose gradient is not finite, and keeps it from being applied."""

    def __init__(self, processes: Processes):
        self.processes = processes
        # On the CPU, where reading a result does not wait.
        self.refuses_at_once = processes.device.type == "cpu"
        self._step = torch.full((), -1, device=processes.device)
        self._names: list[str] = []
        self._values: Tensor | None = None
        self._norms = torch.full((NORMS_KEPT,), -1.0, device=processes.device)

    def hold_back(
        self,
        step: int,
        norm: Tensor,
        metrics: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Keep `optimizer` from a step in which any process has a metric that is not finite.

        The gradient's norm is one of the metrics. On a GPU this does not wait for the device: it
        holds back all later steps too, until `refuse` is called. On the CPU the run ends here.
        """
        values = torch.stack([*metrics.values()])
        num_broken = self.processes.sum_over_ranks((~values.isfinite()).sum())
        is_first = (num_broken > 0) & (self._step < 0)
        self._step = torch.where(is_first, step, self._step)
        # Only the norms before the first non-finite step.
        newer = torch.cat([self._norms[1:], norm.reshape(1)])
        self._norms = torch.where(self._step < 0, newer, self._norms)
        self._names = list(metrics)
        self._values = torch.where(is_first, values, 0 if self._values is None else self._values)
        if self.refuses_at_once:
            self.refuse()
            return
        is_broken = self._step >= 0
        if optimizer.defaults.get("fused") and norm.device.type != "mps":  # which ignores it
            # Makes a fused step leave weights and state as they are, without a wait.
            optimizer.found_inf = is_broken.float()  # type: ignore[attr-defined]
            return
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_broken, 0)

    def refuse(self) -> None:
        """NonFiniteStep if a step was not finite. Call before saving; it waits for the device."""
        step = int(self._step)
        if step < 0 or self._values is None:
            return
        values = self.processes.sum_over_ranks(self._values).tolist()
        named = zip(self._names, values, strict=True)
        broken = [name for name, value in named if not math.isfinite(value)]
        raise NonFiniteStep(step, broken)

    def last_norms(self) -> list[float]:
        """The norms of the gradients before the first that is not finite, the newest last."""
        return self._norms[self._norms >= 0].tolist()

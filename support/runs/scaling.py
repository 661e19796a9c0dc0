"""What a run would take on GPUs that are not here: an estimate, by arithmetic.

    seconds of a step = max(arithmetic + update, launches) + what is seen of the exchange

Arithmetic is FLOPs over a share of the GPU's peak, or measured seconds. The update is the way of
the optimizer and the average through memory. Launches are the host's time for handing kernels to
the GPU, which is what small shares of a batch wait for. The exchange is a ring all-reduce of
gradients.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from support.data.batches import BatchPlan
from support.runs.budget import size
from support.runs.gpus import SHARE_OF_PEAK, Gpu, Measurements

# What is assumed.
SHARE_OF_LINK = 0.8  # what an all-reduce gets of a link's nominal speed
SHARE_OF_MEMORY = 0.9  # the rest is for CUDA itself, workspaces and gaps between tensors
SECONDS_A_LAUNCH = 8e-6  # of the host, Python and autograd included
# Tensors as large as the weights that an update reads or writes: 7 by AdamW (weight, gradient and
# two moments; all but the gradient are written too), 3 by the average, 1 by the gradient's norm.
PASSES_OF_UPDATE = 11
WRITE_BYTES_A_SECOND = 1e9  # of a file system that machines share
GPUS_A_MACHINE = 8
NETWORKS = {  # bytes a second, each way, of all cards of a machine together
    "8 x 400 Gb/s InfiniBand": 400e9,
    "400 Gb/s InfiniBand": 50e9,
    "200 Gb/s InfiniBand": 25e9,
    "100 Gb/s InfiniBand": 12.5e9,
    "25 Gb/s Ethernet": 3.125e9,
}
DAY_SECONDS = 86400


@dataclass(frozen=True)
class Workload:
    """What a run does, whatever it runs on."""

    plan: BatchPlan
    flops: Mapping[str, float]  # of an image, by precision
    backward_share: float  # of the FLOPs
    kernels: int  # of a microbatch
    image_bytes: Mapping[bool, float]  # kept for the backward pass, by activation_checkpointing
    is_checkpointing: bool
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float  # of weights, their average, gradients and two moments
    checkpoint_bytes: float
    saves: int
    total_steps: int

    @property
    def microbatch_images(self) -> int:
        return self.plan.batch_size // self.plan.num_microbatches

    def needed_bytes(self, images: int, is_checkpointing: bool) -> float:
        """Bytes that a GPU holds which takes so many images at a time."""
        return self.state_bytes + images * self.image_bytes[is_checkpointing]


@dataclass(frozen=True)
class Estimate:
    """A workload on GPUs of one kind."""

    work: Workload
    gpu: Gpu
    image_seconds: float  # of arithmetic, for one image
    update_seconds: float
    source: str  # where these seconds come from

    @classmethod
    def by_figures(cls, work: Workload, gpu: Gpu, reason: str = "") -> "Estimate":
        """Going by the maker's figures."""
        used = dict.fromkeys(gpu.precision_for(name) for name in work.flops)
        shares = " and ".join(f"{SHARE_OF_PEAK[name]:.0%} of the {name} peak" for name in used)
        update = PASSES_OF_UPDATE * work.gradient_bytes / gpu.bandwidth
        source = f"{reason}NVIDIA's published figures, {shares} assumed"
        return cls(work, gpu, gpu.arithmetic_seconds(work.flops), update, source)

    @property
    def alone_seconds(self) -> float:
        """A step without the exchange."""
        return max(self._busy_seconds, self._launch_seconds)

    @property
    def _busy_seconds(self) -> float:
        images = self.work.microbatch_images * self.work.plan.accumulation_steps
        return images * self.image_seconds + self.update_seconds

    @property
    def _launch_seconds(self) -> float:
        return self.work.plan.accumulation_steps * self.work.kernels * SECONDS_A_LAUNCH

    def lines(self) -> Iterator[str]:
        """All of it, for people."""
        work, plan = self.work, self.work.plan
        machines = math.ceil(plan.world_size / GPUS_A_MACHINE)
        yield (
            f"{plan.world_size} x NVIDIA {self.gpu.title}, {machines} "
            f"machine{'s' if machines > 1 else ''}; batch {plan}"
        )
        yield f"speed: {self.source}"
        yield self._memory()
        yield (
            f"arithmetic: {sum(work.flops.values()) / 1e9:,.0f} GFLOPs an image, "
            f"{work.kernels:,} kernels a microbatch"
        )
        yield (
            f"step: {self.alone_seconds:.3g} s without exchange, "
            f"{plan.batch_size / self.alone_seconds:,.0f} images/s; the GPU works for "
            f"{self._busy_seconds:.3g} s, and launching takes {self._launch_seconds:.3g} s"
        )
        yield from self._exchange()
        yield self._checkpoints()

    def _memory(self) -> str:
        """What a GPU holds, and what would make it fit."""
        work, images = self.work, self.work.microbatch_images
        needed, room = work.needed_bytes(images, work.is_checkpointing), self._room_bytes
        verdict = "fits" if needed <= room else f"does not fit; {self._ways_to_fit()}"
        return (
            f"memory of a GPU: weights {size(work.weight_bytes)}, their average "
            f"{size(work.weight_bytes)}, gradients {size(work.gradient_bytes)}, optimizer state "
            f"{size(2 * work.gradient_bytes)}, activations {images} x "
            f"{size(work.image_bytes[work.is_checkpointing])}, together {size(needed)} "
            f"of the {size(room)} that can be used: {verdict}"
        )

    @property
    def _room_bytes(self) -> float:
        return SHARE_OF_MEMORY * self.gpu.memory_bytes

    def _ways_to_fit(self) -> str:
        """The least accumulation_steps with which it fits, and with activation_checkpointing."""
        ways = []
        if steps := self._steps_to_fit(self.work.is_checkpointing):
            ways.append(f"accumulation_steps: {steps}")
        if not self.work.is_checkpointing and (steps := self._steps_to_fit(True)):
            more = f" with accumulation_steps: {steps}" if steps > 1 else ""
            ways.append(f"activation_checkpointing: true{more}")
        return f"{', or '.join(ways)} would" if ways else "a single image is too much"

    def _steps_to_fit(self, is_checkpointing: bool) -> int | None:
        images = self.work.plan.batch_size // self.work.plan.world_size
        for steps in range(1, images + 1):
            needed = self.work.needed_bytes(images // steps, is_checkpointing)
            if images % steps == 0 and needed <= self._room_bytes:
                return steps
        return None

    def _exchange(self) -> Iterator[str]:
        """The bytes that GPUs exchange, and what of a step that is on each link."""
        processes = self.work.plan.world_size
        if processes == 1:
            yield f"whole run: {self._days(0):.2g} days; nothing is exchanged"
            return
        yield (
            f"exchange: {size(exchanged_bytes(self.work.gradient_bytes, processes))} sent and "
            "received by each GPU a step, a ring all-reduce"
        )
        yield f"{'':<23} {'seconds':>8} {'share of a step':>16} {'days of the run':>18}"
        links = {f"{self.gpu.link} in a machine": self.gpu.link_bandwidth}
        if processes > GPUS_A_MACHINE:
            links.update(NETWORKS)
        for name, bandwidth in links.items():
            seconds = exchanged_bytes(self.work.gradient_bytes, processes) / (
                SHARE_OF_LINK * bandwidth
            )
            least = self._seen_at_least(seconds)
            shares = [seen / (self.alone_seconds + seen) for seen in (least, seconds)]
            share = f"{shares[0]:.0%} to {shares[1]:.0%}"
            days = f"{self._days(least):.2g} to {self._days(seconds):.2g}"
            yield f"{name:<23} {seconds:8.2g} {share:>16} {days:>18}"

    def _seen_at_least(self, exchange_seconds: float) -> float:
        """What is left of the exchange behind the last microbatch's backward pass."""
        seconds = self.alone_seconds / self.work.plan.accumulation_steps
        return max(0.0, exchange_seconds - self.work.backward_share * seconds)

    def _days(self, seen_seconds: float) -> float:
        return self.work.total_steps * (self.alone_seconds + seen_seconds) / DAY_SECONDS

    def _checkpoints(self) -> str:
        work = self.work
        seconds = work.checkpoint_bytes / WRITE_BYTES_A_SECOND
        share = work.saves * seconds / (work.total_steps * self.alone_seconds)
        return (
            f"checkpoints: {work.saves} of {size(work.checkpoint_bytes)}, {seconds:.2g} s each "
            f"at {size(WRITE_BYTES_A_SECOND)}/s; were training to wait for them, "
            f"{share:.2%} of the run"
        )


def exchanged_bytes(gradient_bytes: float, processes: int) -> float:
    """Bytes that each of so many processes sends, and receives, in a ring all-reduce."""
    return 2 * (processes - 1) / processes * gradient_bytes


def with_measured_memory(work: Workload, measured: Measurements, model_type: str) -> Workload:
    """The workload with the bytes that were measured in place of those that were counted."""
    values = {
        name: value for (section, name), value in measured.values.items() if section == "memory"
    }
    images = {
        False: values.get(f"{model_type} activations", work.image_bytes[False]),
        True: values.get(f"{model_type} activations checkpointed", work.image_bytes[True]),
    }
    state = values.get(f"{model_type} state", work.state_bytes)
    return replace(work, image_bytes=images, state_bytes=state)

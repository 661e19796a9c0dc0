"""What benchmarks/gpu.py measures: sections in order of worth, with their shares of the time."""

from collections.abc import Callable
from typing import NamedTuple

from gpu_sections import commands, exactness, images, memory, steps, waits
from gpu_sections.bench import Bench, Task


class Section(NamedTuple):
    """Tasks that share a name, a process and an allowance."""

    tasks: Callable[[Bench], list[Task]]
    share: float  # of the time, beside those of the others


SECTIONS: dict[str, Section] = {
    "step": Section(steps.step_tasks, 20),
    "memory": Section(memory.tasks, 11),
    "waits": Section(waits.tasks, 5),
    "exactness": Section(exactness.tasks, 4),
    "commands": Section(commands.tasks, 7),
    "sampling": Section(images.sampling_tasks, 4),
    "vae": Section(images.vae_tasks, 7),
    "pictures": Section(images.picture_tasks, 2),
    "profile": Section(steps.profile_tasks, 4),
    "shapes": Section(steps.shape_tasks, 3),
}

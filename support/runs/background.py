"""One job at a time in a thread beside training."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from support.system.files import UserError


class Background:
    """Runs a job; what it raises is raised again at the next call."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Start `job`, the one before having been waited for."""
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise what the last job raised, if it has ended by that."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job to end."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """A block whose jobs have all ended when it does, also where it ends by an error.

    Where both have one that a user can mend, one line has both.
    """
    with ThreadPoolExecutor(1, "background") as pool:
        jobs = Background(pool)
        try:
            yield jobs
        except UserError as error:
            try:
                jobs.wait()
            except UserError as another:
                raise UserError(f"{error}; and {another}") from error
            raise
        jobs.wait()

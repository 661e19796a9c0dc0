"""One job at a time in a thread beside training."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from support.system.files import UserError


class Background:
    """Runs a job; its exception is raised again by the next call."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Start `job`; call `wait` for the one before first."""
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise the last job's exception, if it has failed by now."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job to end."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """A block that ends after all its jobs, also if it fails.

    If the block and a job both raise a UserError, the error names both.
    """
    with ThreadPoolExecutor(1, "background") as pool:
        jobs = Background(pool)
        try:
            yield jobs
        except UserError as error:
            try:
                jobs.wait()
            except UserError as another:
                raise UserError(f"{error}; {another}") from error
            raise
        jobs.wait()

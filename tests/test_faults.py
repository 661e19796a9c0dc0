"""Nothing is lost by any fault: the harness in its quick form; `make faults` has the long one."""

import faults
import pytest

from support.runs.background import background
from support.system.files import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name in faults.FAULTS if name not in faults.SLOW])
def test_a_run_loses_nothing_by_this_fault_and_ends_as_an_unbroken_one(name):
    tally = faults.run_fault(name, is_quick=True)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.tries > 0
    assert not tally.failures


def test_run_that_fails_while_a_write_beside_it_does_tells_of_both():
    def fail():
        raise UserError("6.pt: not written")

    both = r"^log\.txt: not written; .*6\.pt: not written$"
    with pytest.raises(UserError, match=both), background() as jobs:
        jobs.start(fail)
        raise UserError("log.txt: not written")

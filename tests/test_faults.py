"""What no fault may cost: the harness in its quick form; `make faults` has the long one."""

import faults
import pytest

from support.runs.background import background
from support.system.files import UserError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("several processes")]


def assert_nothing_is_lost(fault) -> None:
    tally = faults.run_fault(fault, is_quick=True)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.tries > 0
    assert not tally.failures


def test_run_killed_at_any_moment_leaves_whole_files_and_ends_as_an_unbroken_one():
    assert_nothing_is_lost(faults.kills)


def test_process_whose_peer_is_killed_ends_without_saving_and_the_same_command_goes_on():
    assert_nothing_is_lost(faults.kills_of_two)


def test_run_whose_worker_is_killed_is_ended_by_torchruns_restart():
    assert_nothing_is_lost(faults.kills_under_torchrun)


def test_signal_stops_a_run_with_its_step_saved_at_any_moment():
    assert_nothing_is_lost(faults.signals)


def test_signal_to_one_of_two_processes_stops_both_after_the_same_step():
    assert_nothing_is_lost(faults.signals_to_one_of_two)


def test_request_to_save_changes_nothing_but_that_a_checkpoint_is_there():
    assert_nothing_is_lost(faults.requests_to_save)


def test_damaged_newest_checkpoint_is_named_and_passed_over_or_read_as_it_was():
    assert_nothing_is_lost(faults.damage)


def test_old_results_go_with_their_records_once_a_newer_one_is_whole_and_nothing_else_goes():
    assert_nothing_is_lost(faults.retention)


def test_numbers_that_are_none_stop_the_run_and_are_never_saved():
    assert_nothing_is_lost(faults.non_finite)


def test_failed_write_beside_training_is_told_of_at_the_next_step_or_at_the_end():
    assert_nothing_is_lost(faults.failed_writes)


def test_run_that_fails_while_a_write_beside_it_does_tells_of_both():
    def fail():
        raise UserError("6.pt: not written")

    both = r"^log\.txt: not written; and 6\.pt: not written$"
    with pytest.raises(UserError, match=both), background() as jobs:
        jobs.start(fail)
        raise UserError("log.txt: not written")


def test_full_disk_is_said_and_with_room_the_same_command_goes_on():
    assert_nothing_is_lost(faults.full_disk)


def test_read_only_working_dir_is_said_whenever_it_becomes_that():
    assert_nothing_is_lost(faults.read_only)


def test_vanished_working_dir_is_said_and_not_made_anew():
    assert_nothing_is_lost(faults.vanished)


def test_second_run_in_a_working_dir_is_refused_until_the_first_is_dead():
    assert_nothing_is_lost(faults.two_runs)


def test_process_that_hangs_is_given_up_after_the_time_out():
    assert_nothing_is_lost(faults.hangs)

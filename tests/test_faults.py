"""What no fault may cost: the harness in its quick form; `make faults` has the long one."""

import faults
import pytest


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

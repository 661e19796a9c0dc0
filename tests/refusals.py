"""Refusals: the one line that a user gets."""

import pytest

from support.system.files import UserError


def refusal(work, *arguments, **options) -> str:
    """The one line with which `work` refuses."""
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

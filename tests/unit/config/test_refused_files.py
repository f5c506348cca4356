"""What a YAML file says that cannot be honoured is refused in one sentence, with the key, its value and the way out."""

import pytest
from helpers.refused_files import CASES, check

from axolotl_layersel.training.ending import describe_error


def test_the_file_that_the_cases_change_is_in_order():
    check({})


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_honoured_is_refused_in_one_sentence(case):
    values, message = CASES[case]
    with pytest.raises(ValueError) as refused:
        check(values)
    told = describe_error(refused.value)
    assert message in told and len(told.splitlines()) == 1

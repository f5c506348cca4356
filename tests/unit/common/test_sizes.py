"""Numbers of bytes in words."""

import pytest

from axolotl_layersel.common.sizes import format_bytes


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3_932_160, "3.75 MiB"),
        (98 * 2**20, "98.0 MiB"),
        (1023 * 2**20, "1,023 MiB"),
        (11_200_000_000, "10.4 GiB"),
        (810 * 2**30, "810 GiB"),
    ],
)
def test_bytes_have_the_largest_unit_with_three_digits(count, words):
    assert format_bytes(count) == words

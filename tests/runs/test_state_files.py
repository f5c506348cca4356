"""Files of tensors have the same bytes in every process."""

import subprocess
import sys


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    code = (
        "import sys, torch; from axolotl_layersel.common.tensors import save_tensors;"
        "tensors = {'b': torch.ones(2, 3).bfloat16(), 'a': torch.tensor(True)};"
        "save_tensors(tensors, sys.argv[1], {'x': '\u00fc', 'c': '1', 'd': '2'})"
    )
    for name in ("1", "2", "3"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert len({(tmp_path / name).read_bytes() for name in ("1", "2", "3")}) == 1

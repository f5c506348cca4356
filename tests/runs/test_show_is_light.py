"""``axolotl-layersel show`` imports no torch."""

import subprocess
import sys

from helpers.records import RANKS

from axolotl_layersel.l1ra.records import RankHistory


def test_showing_ranks_imports_no_torch(tmp_path):
    RankHistory({0: RANKS}).write(tmp_path)
    code = f"""if True:
        import sys
        from typer.testing import CliRunner
        from axolotl_layersel.cli.main import app
        assert CliRunner().invoke(app, ["show", {str(tmp_path)!r}]).exit_code == 0
        assert not {{"torch", "axolotl", "matplotlib"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)

"""``axolotl-layersel doctor`` reads no weights, and leaves out packages that make imports slow."""

import subprocess
import sys

from helpers.examined import CONFIGS
from helpers.places import ROOT

from axolotl_layersel.cli.doctor.light_imports import HEAVY

# Imports take most of it; on two busy cores it took 25 to 90 seconds.
MOST_SECONDS = 300


def test_a_report_on_a_large_model_loads_no_package_that_it_does_not_need():
    config = ROOT / "example_configs" / "llama-3.1-70b-zero3-multinode.yml"
    code = f"""if True:
        import sys
        from typer.testing import CliRunner
        from axolotl_layersel.cli.main import app
        result = CliRunner().invoke(app, ["doctor", {str(config)!r}, "--model-config", sys.argv[1]])
        assert result.exit_code == 0 and "Plain LoRA trains 207,093,760 parameters." in result.output, result.output
        loaded = {{"axolotl", "trl", "datasets", *{HEAVY!r}}} & set(sys.modules)
        assert not loaded, loaded
    """
    arguments = [sys.executable, "-c", code, CONFIGS / "llama-3.1-70b.json"]
    subprocess.run(arguments, check=True, cwd=ROOT, timeout=MOST_SECONDS)

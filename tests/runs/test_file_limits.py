"""A file that exceeds a limit is not written at all."""

import os
import subprocess
import sys


def test_a_limit_on_the_size_of_files_is_said_in_bytes(tmp_path):
    # In a process of its own, because the limit cannot be lifted.
    code = f"""if True:
        import resource, signal
        from axolotl_layersel.common.files import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_atomically({str(tmp_path / "plan.json")!r}, b"x" * 2000)
    """
    # Without coverage, whose own file would exceed the limit too.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    last = done.stderr.strip().splitlines()[-1]
    assert "plan.json cannot be written (File too large): it takes 2,000 bytes, and " in last
    assert list(tmp_path.iterdir()) == []

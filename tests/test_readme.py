"""The README's generated parts are up to date."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.engine
def test_the_generated_parts_of_the_readme_are_up_to_date() -> None:
    script = ROOT / "scripts" / "readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run scripts/readme.py\n{done.stderr[-1000:]}"

"""tools/slurm.sh started by hand, outside of a Slurm job."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm.sh"


def test_outside_of_a_job_it_says_how_to_submit_it():
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT, "mine.yaml"], env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "not in a Slurm job: submit it with sbatch" in line

"""train.py with torch's deterministic algorithms: check.py asks which bits they hold.

    python tests/gpu/deterministic.py configs/demo.py --run=x

The command line, the folders and the exit code are train.py's own.
"""

import os
import sys
from pathlib import Path

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS makes its first handle
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402

import train  # noqa: E402
from nano360.config import SECTIONS, run  # noqa: E402

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # an operation that has no such form is an error
    sys.exit(run(train.main, train.__doc__, list(SECTIONS.values())))

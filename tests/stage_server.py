"""The stages of one checkout, called one after the other in a process that stays: for bench.py old.

    python tests/stage_server.py CHECKOUT

Reads lines of json from standard input, {"stage": "train", "argv": ["run.py"], "remove": [FOLDER]},
and answers each with a line, the seconds that the stage's main took. What was made before and would
be found again is removed first. What the stages print goes nowhere.
"""

import importlib
import json
import os
import shutil
import sys
import time


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    with os.fdopen(os.dup(1), "w") as answers, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        for line in sys.stdin:
            work = json.loads(line)
            stage = importlib.import_module(work["stage"])
            for folder in work["remove"]:
                shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            stage.main(work["argv"])
            print(time.perf_counter() - began, file=answers, flush=True)


if __name__ == "__main__":
    main()

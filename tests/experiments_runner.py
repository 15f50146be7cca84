"""Runs experiments one after another in one process, which imports JAX once and keeps what it has compiled.

Each line on stdin is a JSON list, the path of an experiment and its flags. The answer to each is a JSON text on stdout:
what went wrong, or nothing.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what experiments say goes where errors go

for line in sys.stdin:
    sys.argv = json.loads(line)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
    problem = ""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        problem = str(end.code or "")
    except BaseException:
        problem = traceback.format_exc()
    sys.path.pop(0)
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")
    answers.write(json.dumps(problem) + "\n")
    answers.flush()

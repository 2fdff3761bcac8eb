"""What does the default cost a newcomer? Start-up, time to the first token, peak memory, and the pacer's share of a round.

    python benchmarks/footprint.py --json OUT.json

Every figure comes from a fresh process of the command line or the library; the cache is warm unless `--cold`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paceline.study.environment import command, environment
from paceline.study.report import write_json

PROMPT = "Explain in a few sentences why the sky is blue, then say it again as a list."
CHILD = """
import json, resource, sys, time
started = float(sys.argv[1])
from paceline.config import SamplingParams
from paceline.engine import Engine
engine = Engine.from_pretrained()
loaded = time.time()
events = engine.chat_stream([{"role": "user", "content": sys.argv[2]}], SamplingParams(max_tokens=128))
first = next(events); first_token = time.time()
steps = [e.record for e in (first, *events)][1:]
share = sum(s.control_seconds for s in steps) / sum(s.round_seconds for s in steps)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
info = engine.runner.info
print(json.dumps({"load_seconds": loaded - started, "first_token_seconds": first_token - started, "peak_memory_gb": peak,
    "pacer_share": share, "precision": info.precision, "backend": info.backend, "weight_mb": info.weight_bytes / 1e6,
    "pacer_microseconds": 1e6 * sum(s.control_seconds for s in steps) / len(steps)}))
"""


def run_once(environ: dict[str, str]) -> dict[str, Any]:
    """One fresh process."""
    arguments = [sys.executable, "-c", CHILD, str(time.time()), PROMPT]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environ).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also measure the very first start, in an empty cache folder")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    environ = dict(os.environ)
    document: dict[str, Any] = {"environment": environment(), "command": command()}
    if options.cold:
        with tempfile.TemporaryDirectory() as folder:
            document["cold"] = run_once(environ | {"PACELINE_CACHE": folder})
    run_once(environ)
    runs = [run_once(environ) for _ in range(options.repeats)]
    document["runs"] = runs
    document["median"] = {
        key: statistics.median(r[key] for r in runs) if isinstance(runs[0][key], float) else runs[0][key] for key in runs[0]
    }
    write_json(options.json, document)
    print(json.dumps(document["median"], indent=1))


if __name__ == "__main__":
    main()

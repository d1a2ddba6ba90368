"""The lines of the table "What fits" in tpu_scripts/README.md, from files that `plan --json` wrote.

python tests/plan_table.py runs/plan/*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

PREFIXES = "prefill of prefixes"
SHOWN = ("update", "old log-probs", "publish", PREFIXES, "decode step")


def line(config: str, found: dict[str, Any]) -> str:
    """The line of a config. Of two prefills the larger one is shown."""
    by_name, e = {p["name"]: p for p in found["programs"]}, found["estimate"]
    by_name.setdefault(PREFIXES, by_name["prefill"])
    shown = [by_name[name] for name in SHOWN]
    memory = [f"{p['peak_bytes'] / 2**30:.1f} ({p['hbm_fraction']:.0%})" for p in shown]
    least = f"{e['rollout_s']:,.0f} + {e['training_s']:,.0f}", f"{e['expected_s']:,.0f}"
    rest = f"{e['live_share']:.0%}", f"{e['chip_hours']:,.0f}"
    fits = "yes" if found["fits"] else "NO"
    return f"| {' | '.join([f'`{config}`', found['topology'], *memory, fits, *least, *rest])} |"


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        print(line(file.stem, json.loads(file.read_text())))

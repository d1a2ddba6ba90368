"""Records a finished study: its metrics as tests/goldens/study.tar.gz, its tables in STUDY.md.

    python tests/record_study.py runs/study

Only what the tables need is kept, with six digits. test_study.py computes the tables from it again.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from dapo_jax.study import Study, load_study, main, read_runs
from dapo_jax.types import InputError

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "study_arithmetic_cpu.yaml"
RECORDS, PAGE = HERE / "goldens" / "study.tar.gz", HERE.parent / "STUDY.md"
BEGIN, END = "<!-- tables of `study --summary` -->\n\n", "\n<!-- end of tables -->"


def pack(study: Study, out: Path) -> bytes:
    """Archive of the complete runs: <row>/<seed>/metrics.jsonl with the keys of the tables."""
    keys = {"step", "rollout/tokens", "rollout/decode_steps"}
    keys |= {metric for row in study.rows for metric in row.watch}
    keys |= {f"eval/{name}/avg" for name in study.rows[0].config.eval.sets}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=9) as archive:
        for row, runs in zip(study.rows, read_runs(study, out), strict=True):
            for seed in runs:
                name = f"runs/{row.key}/{seed}/metrics.jsonl"
                records = map(json.loads, (out / name).read_text().splitlines())
                lines = [json.dumps({k: _short(r[k]) for k in r if k in keys}) for r in records]
                content = "".join(line + "\n" for line in lines).encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def tables(page: str) -> str:
    """The tables in STUDY.md."""
    return page.partition(BEGIN)[2].partition(END)[0] if BEGIN in page else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the study")
    out = parser.parse_args().out
    study = load_study(str(CONFIG))
    if not any(read_runs(study, out)):
        raise InputError(f"{out}: holds no complete run")
    records = pack(study, out)
    RECORDS.write_bytes(records)
    main(["--config", str(CONFIG), "--out", str(out), "--summary"])
    page = PAGE.read_text()
    text = page.replace(BEGIN + tables(page), BEGIN + (out / "table.md").read_text())
    PAGE.write_text(text)
    print(f"{RECORDS}: {len(records):,} bytes; tables written into {PAGE}")

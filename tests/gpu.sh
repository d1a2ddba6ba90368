#!/usr/bin/env bash
# What only a GPU can show, in at most 12 minutes on one of 80 GB. Result: not yet run
#
#   make real && .venv/bin/python -m pip install -e .[cuda]
#   tests/gpu.sh runs/gpu          # summary: runs/gpu/summary.txt
#
# One seed of naive GRPO for as many tokens as DAPO samples, and of DAPO; two identical runs compared bit for bit; a decode step
# and an update against their bounds; the tests that need one device.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
exec > >(tee "$out/summary.txt") 2>&1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.42 # two runs share the GPU
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
git rev-parse --short HEAD

# 50 steps of DAPO sample 3.4 times the tokens of 50 steps of naive GRPO: 170 steps of it.
"$python" - "$out" << 'PY'
import pathlib, sys, yaml
tree = yaml.safe_load(open("configs/study_smollm2_asdiv_gpu.yaml"))
tree["seeds"], tree["base"]["train"]["steps"], tree["base"]["eval"]["every"] = [0], 170, 10
naive, dapo = tree["ladder"]
dapo["set"] |= {"train": {"steps": 50}, "eval": {"every": 2}}
for name, rows in (("both", [naive, dapo]), ("naive", [naive])):
    pathlib.Path(sys.argv[1], f"{name}.yaml").write_text(yaml.safe_dump(tree | {"ladder": rows}))
PY
study=("$python" -m dapo_jax.study --out "$out/study")
timeout 280 "${study[@]}" --config "$out/naive.yaml" > "$out/naive.log" 2>&1 &
naive=$!

# Meanwhile: promise P1, the same command gives the same bits in all metrics but those of the clock.
for n in 1 2; do
  rm -rf "$out/same$n"
  timeout 120 "$python" -m dapo_jax.train --config configs/smollm2_135m_asdiv_cpu.yaml --run-dir "$out/same$n" --quiet \
    --set train.steps=2 model.compute_dtype=bfloat16 eval.every=0
done
"$python" - "$out" << 'PY'
import sys
from dapo_jax.runtime.metrics import VOLATILE, read_metrics
one, two = ([{k: v for k, v in r.items() if not k.startswith(VOLATILE)} for r in read_metrics(f"{sys.argv[1]}/same{n}")] for n in "12")
print("two identical runs:", "bit for bit" if one == two else {k: (a[k], b[k]) for a, b in zip(one, two) for k in a if a[k] != b.get(k)})
PY
wait "$naive"
timeout 240 "${study[@]}" --config "$out/both.yaml" # finds naive GRPO's run; at equal tokens both have evaluations

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
small=(--dtype bfloat16 --layers 30 --model-dim 576 --heads 9 --kv-heads 3 --head-dim 64 --ffn 1536 --vocab 49152 --family llama)
timeout 40 "$python" -m dapo_jax.benchmark rollout "${small[@]}" --slots 512 --requests 512 --prompt-len 160 --max-response-len 32
timeout 40 "$python" -m dapo_jax.benchmark update "${small[@]}" --remat dots --rows 16 --row-len 512 --responses 128 --prompt-len 160 --max-response-len 32

# The tests of what runs on the device, in a copy that does not ask for CPUs. Those of several devices fail on one.
rm -rf "$out/tests" && cp -r tests "$out/tests" && sed -i '/"jax_platforms"\|"jax_num_cpu_devices"/d' "$out/tests/conftest.py"
PYTHONPATH=.:"$out/tests" JAX_DEFAULT_MATMUL_PRECISION=highest timeout 120 "$python" -m pytest -q -p no:cacheprovider \
  "$out"/tests/test_{loss,logprobs,token_sampling,sampler,attention,decoder,engine,update}.py | tail -40

"""What the TPU compiler makes of training and decoding, where it is installed: no TPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dapo_jax

START = """
import pathlib, re, tempfile
from dapo_jax import plan
plan._compile_for_other_machines()
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from dapo_jax.config import MeshSection, ModelConfig
from dapo_jax.model import decoder
from dapo_jax.runtime.mesh import ROWS, make_mesh, params_sharding, rollout_sharding

def placed(shapes, sharding):
    struct = jax.ShapeDtypeStruct
    return jax.tree.map(lambda a, s: struct(a.shape, a.dtype, sharding=s), shapes, sharding)

def hlo(lowered):
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        found = pathlib.Path(folder).glob("*after_optimizations.txt")
        return max((path.read_text() for path in found), key=len)
"""


def run(code):
    """In a process of its own: libtpu stays out of this one. Returns what it printed."""
    path = os.pathsep.join([str(Path(dapo_jax.__file__).parent.parent), *sys.path])
    command, env = [sys.executable, "-c", START + code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.compiler
def test_no_layer_of_a_decode_step_copies_the_scales_of_all_layers():
    """Of an 8-bit cache; a loop of a decode step is a body without a loop."""
    code = """
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.sampler import Sampling, Until
sizes = dict(vocab_size=4096, model_dim=512, layers=6, heads=8, kv_heads=4, ffn_dim=1024)
sizes["head_dim"] = 128
model = ModelConfig(family="qwen2", compute_dtype="bfloat16", **sizes)
mesh = make_mesh(MeshSection(1, 2, 4), plan.load_pod("v5e:2x4").devices)
limits = Limits(22, 256, 3840, int8=True)
engine = Engine(model, Sampling(1.0, 1.0, 0), (0,), limits, mesh=mesh, fetch=None)
shapes = decoder.abstract_params(model)
shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "bfloat16"), shapes)
params = placed(shapes, rollout_sharding(shapes, mesh))
number = jax.ShapeDtypeStruct((), jnp.int32)
table = jax.ShapeDtypeStruct((2, 11, engine.table_len), jnp.int32)
inputs = params, jax.eval_shape(engine.programs.start), table, Until(number, number, number)
text = hlo(engine.programs.decode.lower(*inputs, width=11))
inner, copies = 0, 0
for part in re.split(r"\\n(?=\\S.*\\{\\n)", text):
    scales = re.findall(r"= f32\\[1,6,353,1,128\\]\\S* copy\\(", part)
    if not part.startswith("ENTRY") and " while(" not in part:
        copies += len(scales)
        inner += "f32[1,6,353,1,128]" in part
print(inner, copies)
"""
    inner, copies = map(int, run(code)[-1].split())
    assert inner > 0 and copies == 0


@pytest.mark.compiler
def test_no_product_with_a_layers_weights_is_split_into_windows():
    """Two layers of the 32B over fsdp 32; without `gather_layer` five products are windowed."""
    code = """
sizes = dict(vocab_size=1024, model_dim=5120, layers=2, heads=40, kv_heads=8, ffn_dim=27648)
model = ModelConfig(family="qwen2", compute_dtype="bfloat16", **sizes)
mesh = make_mesh(MeshSection(1, 32, 4), plan.load_pod("v5p:4x4x8").devices)
shapes = decoder.abstract_params(model)
params = placed(shapes, params_sharding(shapes, mesh))
tokens = jax.ShapeDtypeStruct((32, 4096), jnp.int32, sharding=NamedSharding(mesh, P(ROWS)))

def windows():
    hidden = jax.jit(lambda *inputs: decoder.hidden_states(*inputs, mesh=mesh)[0], static_argnums=1)
    return hlo(hidden.lower(params, model, tokens)).count("windowed_dot_general_body")

found = windows()
decoder.gather_layer = lambda layer, mesh, dtype: layer
print(found, windows())
"""
    found, without = map(int, run(code)[-1].split())
    assert found == 0 and without > 0


@pytest.mark.compiler
def test_no_layer_of_a_decode_step_copies_its_experts():
    """Of 32, eight on a device; whole and in 8 bits. Each layer has three grouped matmuls."""
    code = """
from dapo_jax.config import Experts
from dapo_jax.model.quantization import quantize_layer
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.sampler import Sampling, Until
sizes = dict(vocab_size=4096, model_dim=512, layers=6, heads=8, kv_heads=4, ffn_dim=256)
sizes |= dict(head_dim=128, experts=Experts(32, 4))
model = ModelConfig(family="qwen3_moe", compute_dtype="bfloat16", **sizes)
mesh = make_mesh(MeshSection(1, 2, 4), plan.load_pod("v6e:2x4").devices)
engine = Engine(model, Sampling(1.0, 1.0, 0), (0,), Limits(22, 256, 3840), mesh=mesh, fetch=None)
number = jax.ShapeDtypeStruct((), jnp.int32)
table = jax.ShapeDtypeStruct((2, 11, engine.table_len), jnp.int32)
state = jax.eval_shape(engine.programs.start)
half = decoder.abstract_params(model)
half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "bfloat16"), half)
for shapes in (half, half | {"layers": jax.eval_shape(quantize_layer, half["layers"])}):
    inputs = placed(shapes, rollout_sharding(shapes, mesh)), state, table
    text = hlo(engine.programs.decode.lower(*inputs, Until(number, number, number), width=11))
    calls = re.findall(r"%grouped_matmul\\S* = .*tpu_custom_call", text)
    print(len(calls), len(re.findall(r"= (?:bf16|s8)\\[(?:1,)?8,(?:512,256|256,512)\\]", text)))
"""
    assert run(code)[-2:] == ["3 0", "3 0"]

"""Eight virtual CPU devices, set before jax looks for devices; runs of the verbs use two."""

import contextlib
import fnmatch
import gc
import importlib.util
import json
import os
from types import SimpleNamespace

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from dapo_jax.data import files
from dapo_jax.runtime import files as runtime_files
from dapo_jax.runtime import sandbox
from dapo_jax.runtime.compile_cache import cache_folder, drop_oldest

# Looking for garbage among all that imports and jax's caches keep alive took a tenth of the suite's
# time: what collecting the tests leaves is set aside (`pytest_collection_finish`).
gc.disable()

# Most of the suite's time is compiling. Without LLVM's costly passes, and with kernels emitted as
# LLVM directly rather than through MLIR, it is a fourth; such small programs run no slower. What XLA
# itself does to a program, which some tests look at, stays.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if jax.__version_info__ < (0, 11):  # jax 0.12 has MLIR emitters alone, and ends at unknown flags
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
# What is compiled is kept for all processes of the suite, and for its next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("tests")))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Shapes and dtypes in signatures are checked at every call, in this process only.
install_import_hook(["dapo_jax.dapo", "dapo_jax.model", "dapo_jax.rollout"], "typechecker.check")
import in_process  # noqa: E402 - it imports the package
from pods import pod, template  # noqa: E402, F401 - fixtures
from runs import CONFIG, TESTS  # noqa: E402

in_process.install()

# Eight devices share few cores here: programs in flight together can take each other's threads and
# wait for ever in a collective.
jax.config.update("jax_cpu_enable_async_dispatch", False)
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None
)  # `--hypothesis-profile=default` looks for new counterexamples
hypothesis.settings.load_profile("repeatable")

_LONG = (  # the longest first
    "process_faults notebook processes readme benchmark pod_failures buckets train faults tpu_scripts "
    "lora engine hf_parity token_sampling logprobs pool run_verbs prompts bad_inputs layouts "
    "properties ragged_attention experts decoder weights checkpoint attention dynamic_sampling "
    "sampler schedule quantization loss study verify structure peers update"
).split()

# As gcsfs itself asks for bucket types by gRPC, which the fake does not speak; and no client looks
# for credentials.
_BUCKET_CLIENT = {
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_GCE_CHECK": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
}


class ProcessHere(contextlib.nullcontext):
    """`sandbox.Process` without its process."""

    def __init__(self, work, setup, **limits):
        super().__init__(self)
        module, _, name = work.partition(":")
        self._work = getattr(importlib.import_module(module), name)
        self._setup = json.loads(json.dumps(setup))

    def start(self):
        self._answer = self._work(*self._setup)

    def send(self, order):
        self._order = order

    def receive(self):
        result = self._answer(self._order)
        return json.loads(json.dumps(result, default=sandbox._plain))


@pytest.fixture
def config(tmp_path):
    """The file of a tiny run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def reward_module(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture
def table_process():
    """For tests of the process that reads tables."""


@pytest.fixture(autouse=True)
def tables_are_read_here(monkeypatch, request):
    """The process that reads a table takes seconds to start."""
    if "table_process" not in request.fixturenames:
        monkeypatch.setattr(files, "Process", ProcessHere)


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch:
        for key, value in _BUCKET_CLIENT.items():
            patch.setenv(key, value)
        pytest.importorskip("gcsfs", reason='gs:// needs gcsfs: pip install "etils[epath-gcs]"')
        import fake_gcs

        with fake_gcs.serve("bucket") as (bucket, address):
            patch.setenv("STORAGE_EMULATOR_HOST", address)  # of gcsfs and google-cloud-storage
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
            yield bucket


@pytest.fixture
def empty(bucket, monkeypatch):
    """The bucket with nothing in it, and clients that do not wait before they try again."""

    async def sleep(seconds):
        pass

    bucket.objects.clear()
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(runtime_files, "_ASK_S", 0.1)
    yield bucket
    bucket.failing, bucket.fails_at = 0, ""


@pytest.fixture
def eight_devices(monkeypatch):
    """For runs of the verbs whose subject is the layout."""
    monkeypatch.setattr(in_process, "DEVICES", 8)


@pytest.fixture
def curves():
    """For tests of the figure of a run."""


@pytest.fixture(autouse=True)
def no_curves_are_drawn(monkeypatch, request):
    """Drawing them takes as long as a tiny run."""
    if "curves" not in request.fixturenames:
        drawn = "dapo_jax.runtime.curves.plot_curves"
        monkeypatch.setattr(drawn, lambda run_dir: run_dir / "curves.png")


@pytest.fixture(autouse=True)
def flags_of_xla_stay_here(monkeypatch, request):
    """The TPU compiler of a child process ends at flags that it does not know."""
    if request.node.get_closest_marker("compiler"):
        monkeypatch.delenv("XLA_FLAGS")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 20, 20)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        drop_oldest(cache_folder("tests"), limit=2**30)


def pytest_collection_modifyitems(items):
    """Cases beside the default ones are slow. The longest files first: at the end one of them would
    keep one worker busy and the others idle.
    """
    for item in items:
        default = item.get_closest_marker("default")
        if default and not any(fnmatch.fnmatch(item.callspec.id, case) for case in default.args):
            item.add_marker(pytest.mark.slow)
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("compiler"):
                why = "needs the TPU compiler: pip install libtpu"
                item.add_marker(pytest.mark.skip(reason=why))
    place = {f"test_{name}": n for n, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))

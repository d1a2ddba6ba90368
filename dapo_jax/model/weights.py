"""Hugging Face model folders: safetensors into stacked float32 parameters, and back."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches numpy, and so safetensors, the name bfloat16)
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from safetensors import SafetensorError, safe_open

from dapo_jax.config import ModelConfig, flatten
from dapo_jax.config.checks import shown
from dapo_jax.model.families import (
    Tensor,
    base_params,
    in_file_layout,
    model_config_from_hf,
    model_config_to_hf,
    part_of_file,
    same_architecture,
    tensors,
)
from dapo_jax.runtime.files import ADAPTER, TOKENIZER_FILES, read_json
from dapo_jax.types import InputError, Params

_HEAD = "lm_head.weight"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("BF16", "F16", "F32")
_AGAIN = "download the model again"
_COMPLETE = "give a complete Hugging Face model folder"
_PLACE = "choose a writable place with enough space"
# Tensors that MLX, GPTQ, AWQ, bitsandbytes and compressed-tensors store with quantized weights.
_QUANTIZED = re.compile(
    r"\.(scales|biases|qweight|qzeros|g_idx|absmax|weight_scale\w*|weight_packed)$"
)

# The files with a model's weights. `*` is any text.
WEIGHT_FILES = (_SINGLE, _INDEX, "model*.safetensors")


@functools.cache
def file_digests(folder: str, patterns: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of each file of the folder that one of the patterns names, by name; computed once."""
    named = {path for pattern in patterns for path in Path(folder).glob(pattern)}
    paths = sorted(filter(Path.is_file, named))

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip((path.name for path in paths), pool.map(digest, paths), strict=True))


def load_model_config(folder: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face folder. InputError as `load_pretrained`."""
    folder = Path(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also says no where access is denied
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder")
    if not (folder / "config.json").exists():
        _refuse_adapter(folder)
    return model_config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def load_pretrained(folder: str | Path, target: Params | None = None) -> tuple[ModelConfig, Params]:
    """Reads a Hugging Face folder: config.json, and model.safetensors or the shards of its index.

    Weights may be bfloat16, float16 or float32. target: shapes with dtypes and shardings; the
    parameters are then jax arrays of these, and this process reads only its own shards.

    Returns: The architecture (compute_dtype and remat at their defaults), and its parameters,
    layers stacked; float32 numpy without a target.

    Raises InputError: anything in the folder is missing, corrupt, unsafe, or beyond what the
    decoder does exactly. With a target only the processes that read a non-finite value raise.
    """
    folder = Path(folder)
    config = load_model_config(folder)
    by_leaf: dict[str, list[Tensor]] = {}
    for t in tensors(config):
        by_leaf.setdefault(t.leaf, []).append(t)
    with _opened(folder, config) as stored:
        tied = config.tie_embeddings and _HEAD in stored

        def load(path: Any, like: Any) -> Any:
            parts = by_leaf[keystr(path, simple=True, separator=".")]

            def read(index: Any) -> np.ndarray:
                values = _read_leaf(stored, parts, like, index)
                if tied and parts[0].leaf == "embed.embedding":
                    head = _read_leaf(stored, [parts[0]._replace(name=_HEAD)], like, index)
                    if not np.array_equal(head, values):
                        fix = "set tie_word_embeddings to false in config.json"
                        raise _bad(folder, _HEAD, f"differs from the embedding; {fix}")
                return values

            if target is None:
                return read((slice(None),) * len(like.shape))
            return jax.make_array_from_callback(like.shape, like.sharding, read, dtype=like.dtype)

        shapes = base_params(config) if target is None else target
        return config, tree_map_with_path(load, shapes)


def _read_leaf(
    stored: Mapping[str, tuple[Path, Any]], parts: list[Tensor], like: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a leaf, of the shape and dtype of `like`; parts: its tensors."""
    lengths = [len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True)]
    values = np.empty(lengths, like.dtype)
    stacked = len(parts[0].at)
    shape, index_in_layer = like.shape[stacked:], index[stacked:]
    tensor_at = {t.at: t for t in parts}
    wanted = itertools.product(*(range(like.shape[n])[index[n]] for n in range(stacked)))
    for out, at in zip(values.reshape(-1, *values.shape[stacked:]), wanted, strict=True):
        t = tensor_at[at]
        path, opened = stored[t.name]
        part = opened.get_slice(t.name)[part_of_file(t, shape, index_in_layer)]
        part = part.astype(np.float32, copy=False)
        if not np.isfinite(part).all():
            fix = "use another copy of the model"
            raise _bad(path, t.name, f"holds NaN or infinite values; {fix}")
        out[...] = (part.T if t.transposed else part).reshape(out.shape)
    return values


def check_pretrained(folder: str | Path) -> None:
    """Raises InputError as `load_pretrained`, but reads no values and so finds no NaN."""
    folder = Path(folder)
    with _opened(folder, load_model_config(folder)):
        pass


@contextlib.contextmanager
def _opened(folder: Path, config: ModelConfig) -> Iterator[dict[str, tuple[Path, Any]]]:
    """Tensor name → its file and the open file, checked against the config's architecture."""
    with contextlib.ExitStack() as stack:
        stored: dict[str, tuple[Path, Any]] = {}
        for path in _weight_files(folder):
            try:
                opened: Any = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as e:
                reason = " ".join(str(e).split())[:100]
                raise InputError(f"{path}: truncated or corrupt ({reason}); {_AGAIN}") from None
            for name in opened.keys():
                if name in stored:
                    raise _bad(path, name, f"also in {stored[name][0].name}; {_AGAIN}")
                stored[name] = path, opened
        _check_stored(folder, config, stored)
        yield stored


def _bad(path: Path, tensor: str, message: str) -> InputError:
    return InputError(f"{path}: {shown(tensor)}: {message}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Like transformers, prefers a single file to an index."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        _refuse_adapter(folder)
        if any(folder.glob("*.bin")):
            pickled = "only pickled weights (.bin), which are never opened"
            raise InputError(f"{folder}: {pickled}; convert them to safetensors")
        raise InputError(f"{folder}: no {_SINGLE} and no {_INDEX}; {_COMPLETE}")
    shards = read_json(index).get("weight_map")
    where = f"{index}: weight_map"
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{where}: expected tensor names with their files; {_AGAIN}")
    for name, shard in shards.items():
        key = f"{where}.{shown(name)}"
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            expected = "the name of a .safetensors file in this folder"
            raise InputError(f"{key}: {repr(shard)[:100]} is not {expected}")
        if not (folder / shard).is_file():
            raise InputError(f"{key}: file {shard[:100]} is missing; {_AGAIN}")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder}: is a PEFT adapter, not a whole model; merge it into its base model first, "
            "where peft is installed: AutoPeftModelForCausalLM.from_pretrained(ADAPTER)"
            ".merge_and_unload().save_pretrained(FOLDER)"
        )


def _check_stored(
    folder: Path, config: ModelConfig, stored: Mapping[str, tuple[Path, Any]]
) -> None:
    """Raises InputError unless the files hold the config's tensors and nothing else of value."""
    if quantized := next(filter(_QUANTIZED.search, sorted(stored)), None):
        message = "quantized weights are not supported; use a bfloat16, float16 or float32 model"
        raise _bad(folder, quantized, message)
    expected = {t.name: t.shape for t in tensors(config)}
    if config.tie_embeddings and _HEAD in stored:
        expected[_HEAD] = (config.vocab_size, config.model_dim)
    for name, shape in expected.items():
        if name not in stored:
            message = f"tensor missing, expected with shape {shape} by config.json"
            raise _bad(folder, name, message)
        path, opened = stored[name]
        tensor = opened.get_slice(name)
        found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if found != shape:
            raise _bad(path, name, f"expected shape {shape} by config.json, got {found}")
        if dtype not in _DTYPES:
            message = f"dtype {dtype} is not supported; supported: {', '.join(_DTYPES)}"
            raise _bad(path, name, message)
    for name, (path, _) in stored.items():  # old files keep inv_freq, a constant
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            message = f"tensor has no place in the {config.family} architecture of config.json"
            raise _bad(path, name, message)


def save_pretrained(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    source_folder: str | Path | None = None,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a float32 Hugging Face folder, whole or not at all: it is filled in a hidden folder
    beside. Memory holds one tensor beyond `params`, numpy or (fully addressable) jax arrays.

    folder: new, or empty. source_folder: where the model came from; its config.json is kept but for
    the dtype, its generation_config.json and tokenizer files are copied. tokenizer: saved where
    there is no source folder. generation: content of generation_config.json where the source has
    none. max_shard_bytes: larger models are split into files of at most this size and an index.

    Raises InputError: the folder exists and is not empty, cannot be written, or the source is
    another architecture. ValueError: `params` are not those of `config`.
    """
    _check_params(config, params)
    source = None if source_folder is None else Path(source_folder)
    hf = _export_config(config, source, tokenizer)
    check_new(folder)
    target = Path(folder).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as hidden:
            partial = Path(hidden, target.name)
            partial.mkdir()
            _write_json(partial / "config.json", hf)
            if source is not None:
                for name in ("generation_config.json", *TOKENIZER_FILES):
                    if (source / name).is_file():
                        shutil.copyfile(source / name, partial / name)
            elif tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
            if generation and not (partial / "generation_config.json").exists():
                _write_json(partial / "generation_config.json", generation)
            _write_weights(partial, config, params, max_shard_bytes)
            partial.rename(target)
    except OSError as e:
        raise InputError(f"{folder}: cannot write ({e.strerror or e}); {_PLACE}") from e


def check_new(folder: str | Path) -> None:
    """Raises InputError unless `save_pretrained` may write there; call it before long work."""
    target = Path(folder).resolve()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{folder}: exists and is not an empty folder; give a new one")
        above = next(parent for parent in target.parents if parent.exists())
    except OSError as e:
        raise InputError(f"{folder}: cannot write ({e.strerror or e}); {_PLACE}") from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot write (below {above}); {_PLACE}")


def _check_params(config: ModelConfig, params: Params) -> None:
    found, expected = (
        {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}
        for tree in (params, base_params(config))
    )
    if found != expected:
        name, _ = min(found.items() ^ expected.items())
        shapes = f"found {found.get(name)}, expected {expected.get(name)}"
        raise ValueError(f"parameters do not match the architecture: {name}: {shapes}")


def _export_config(config: ModelConfig, source: Path | None, tokenizer: Any) -> dict[str, Any]:
    if source is None:
        # Without these keys transformers would use the family's defaults (Llama: 1 and 2).
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {key: getattr(tokenizer, key, None) for key in keys}
        return {**model_config_to_hf(config), **special, "torch_dtype": "float32"}
    where = source / "config.json"
    hf = read_json(where)
    if not same_architecture(model_config_from_hf(hf, str(where)), config):
        message = "describes another architecture than the parameters"
        raise InputError(f"{where}: {message}; give the folder that training started from")
    spelled = [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]
    return {**hf, **dict.fromkeys(spelled, "float32")}


def _write_weights(folder: Path, config: ModelConfig, params: Params, max_shard_bytes: int) -> None:
    # not at the top: takes a second
    from huggingface_hub import split_state_dict_into_shards_factory as split

    by_name = {t.name: t for t in tensors(config)}
    sizes: dict[str, Any] = {"get_storage_size": _nbytes, "max_shard_size": max_shard_bytes}
    shards = split(by_name, filename_pattern="model{suffix}.safetensors", **sizes)
    for name, held in shards.filename_to_tensors.items():
        _write_safetensors(folder / name, [by_name[tensor] for tensor in held], params)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / _INDEX, index)


def _nbytes(t: Tensor) -> int:
    return 4 * math.prod(t.shape)


def _write_safetensors(path: Path, shard: Iterable[Tensor], params: Params) -> None:
    """The safetensors format, tensor by tensor: the library's writer wants a whole file's arrays in
    memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in shard:
        start, end = end, end + _nbytes(t)
        header[t.name] = {"dtype": "F32", "shape": t.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    leaves = flatten(params)
    with path.open("xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in shard:
            f.write(np.ascontiguousarray(in_file_layout(leaves, t), dtype="<f4").data)
        f.flush()
        os.fsync(f.fileno())


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

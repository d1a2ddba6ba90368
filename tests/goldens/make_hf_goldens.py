"""Makes tiny random Hugging Face models with what they answer, for the parity tests.

Needs PyTorch and transformers 5.

    python tests/goldens/make_hf_goldens.py [output folder [names]]

Each sub-folder holds config.json and model.safetensors as `save_pretrained` writes them, and
    golden.npz: tokens [2,24], logits [2,24,V], logprobs [2,23] of tokens[:, 1:] padded_tokens
    [3,10], padded_mask [3,10] (left-padded), padded_logits [3,10,V] (meaningful where the mask is
    1) prompt_0 [5], continuation_0 [12], prompt_1 [8], continuation_1 [12]: greedy generation
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 96
SHARED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,  # no special tokens, so that generation never ends early
    eos_token_id=None,
    pad_token_id=None,
)
# With head_dim 16 and theta 1e4 the wavelengths are 2 pi 10^(j/2) = 6, 20, 63, 199, ...: the first
# is kept, the next two are interpolated (between 64 / 4 and 64 / 1), the others stretched.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LLAMA = (LlamaForCausalLM, LlamaConfig, dict(rms_norm_eps=1e-5))
QWEN2 = (
    Qwen2ForCausalLM,
    Qwen2Config,
    dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
)
QWEN3 = (
    Qwen3ForCausalLM,
    Qwen3Config,
    dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
)
# 6 experts, of which a token has 2 or 3
MIXTURE = (
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig,
    dict(
        moe_intermediate_size=24,
        num_experts=6,
        num_hidden_layers=2,
        head_dim=16,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
)
# A window of 5, much shorter than the sequences of 24; scores divided by something else than
# head_dim, as in Gemma 3 27B.
NEAR = dict(rope_type="default", rope_theta=1e2)
GEMMA3 = (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=5),
)


def gemma_layers(*kinds: str, **scaling: float | str) -> dict:
    ropes = dict(
        full_attention=dict(rope_type="default", rope_theta=1e4) | scaling, sliding_attention=NEAR
    )
    return dict(
        num_hidden_layers=len(kinds),
        layer_types=[f"{kind}_attention" for kind in kinds],
        rope_parameters=ropes,
    )


MODELS = {
    "llama_scaled_untied": (
        *LLAMA,
        dict(num_hidden_layers=2, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=False),
    ),
    "llama_tied": (*LLAMA, dict(num_hidden_layers=3, tie_word_embeddings=True)),
    "qwen2_tied": (*QWEN2, dict(num_hidden_layers=2, tie_word_embeddings=True)),
    "qwen2_untied": (*QWEN2, dict(num_hidden_layers=3, tie_word_embeddings=False)),
    "qwen3_tied": (*QWEN3, dict(num_hidden_layers=2, head_dim=16, tie_word_embeddings=True)),
    "qwen3_untied": (*QWEN3, dict(num_hidden_layers=3, head_dim=8, tie_word_embeddings=False)),
    "gemma3_tied": (*GEMMA3, gemma_layers("sliding", "full", "sliding")),
    "gemma3_scaled_untied": (
        *GEMMA3,
        gemma_layers("sliding", "sliding", "full", rope_type="linear", factor=8.0)
        | dict(tie_word_embeddings=False),
    ),
    "qwen3_moe_tied": (
        *MIXTURE,
        dict(num_experts_per_tok=2, norm_topk_prob=False, tie_word_embeddings=True),
    ),
    "qwen3_moe_untied": (
        *MIXTURE,
        dict(num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=False),
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that logits are far from uniform; norm scales and biases that cannot be
    mistaken for 1 and 0.
    """
    for name, p in model.named_parameters():
        noise = torch.randn_like(p)
        if "norm" in name:  # Gemma adds 1 itself
            p.data = (0 if isinstance(model, Gemma3ForCausalLM) else 1) + 0.3 * noise
        else:
            p.data = (0.5 if name.endswith("bias") else 0.2) * noise


def answers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's outputs, as described at the top."""
    tokens = torch.randint(VOCAB, (2, 24))
    logits = model(tokens).logits
    logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    mask = torch.tensor([[int(i >= 10 - n) for i in range(10)] for n in (10, 6, 3)])
    padded = torch.randint(VOCAB, (3, 10)) * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = {
        "tokens": tokens,
        "logits": logits,
        "logprobs": logprobs,
        "padded_tokens": padded,
        "padded_mask": mask,
        "padded_logits": model(padded, attention_mask=mask, position_ids=positions).logits,
    }
    for i, length in enumerate((5, 8)):
        prompt = torch.randint(VOCAB, (1, length))
        found[f"prompt_{i}"] = prompt[0]
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
        )
        found[f"continuation_{i}"] = whole[0, length:]
    return {
        k: v.numpy().astype(np.float32 if v.is_floating_point() else np.int32)
        for k, v in found.items()
    }


def main(out: Path, wanted: list[str]) -> None:
    for seed, (name, (model_class, config_class, family, own)) in enumerate(
        MODELS.items(), start=10
    ):
        if wanted and name not in wanted:
            continue
        torch.manual_seed(seed)
        model = model_class(config_class(**SHARED, **family, **own)).eval()
        randomize(model)
        with torch.no_grad():
            found = answers(model)
        model.save_pretrained(out / name)
        np.savez_compressed(out / name / "golden.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent, sys.argv[2:])

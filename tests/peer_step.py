"""A whole GRPO step of the same tiny model in dapo_jax, TRL and Tunix: CPU seconds and memory.

    python tests/peer_step.py ours | trl | tunix

Each in its own environment (`pip install trl==1.16.0 torch`, `pip install google-tunix==0.1.7`).
4 prompts of 64 tokens or fewer, 8 responses of 128 tokens each, one update of all 32, no KL, no
reference model; random weights with a vocabulary of 32,000, so that responses hardly end by
themselves. One JSON line: CPU seconds of all cores a step, sampling and the rest apart, means of
all steps but the first two, which compile; microseconds a response token; peak memory added.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, GROUP, PROMPT_LEN, LENGTH, STEPS = 4, 8, 64, 128, 5
V, D, F, LAYERS, HEADS, KV, WIDTH = 32000, 256, 1024, 4, 4, 2, 64
samplings: list[float] = []  # CPU seconds
ends: list[float] = []  # CPU time at the end of each sampling


def timed(function):
    def call(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        ends.append(time.process_time())
        samplings.append(ends[-1] - start)
        return result

    return call


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def prompts(step):
    return [
        " ".join(
            str(3 + (97 * (step * PROMPTS + n) + 31 * i) % 9000) for i in range(PROMPT_LEN - 1)
        )
        for n in range(PROMPTS)
    ]


def even(completions, **_):
    return [float(sum(map(ord, str(c))) % 2) for c in completions]


def ours():
    from dapo_jax.config import config_from_dict
    from dapo_jax.train import train
    from dapo_jax.training.dynamic_sampling import DynamicSampler

    shape = {"model_dim": D, "layers": LAYERS, "heads": HEADS, "kv_heads": KV, "head_dim": WIDTH}
    tree = {
        "model": {
            "architecture": {**shape, "vocab_size": V, "ffn_dim": F, "max_position": 256},
            **{"compute_dtype": "float32", "remat": "none"},
        },
        # about as long as the peers' prompts
        "data": {"template": "{prompt}=" + "." * 45, "max_prompt_len": PROMPT_LEN},
        "eval": {"every": 0},
        "rollout": {"max_response_len": LENGTH, "decode_slots": PROMPTS * GROUP},
        "reward": {"overlong_buffer_len": 16},
        "dapo": {
            **{"prompts_per_step": PROMPTS, "prompts_per_draw": PROMPTS},
            **{"responses_per_prompt": GROUP, "responses_per_update": PROMPTS * GROUP},
            **{"dynamic_sampling": False, "old_logprobs": "sampler"},
        },
        "optim": {"learning_rate": 1e-5, "warmup_steps": 0},
        "train": {"steps": STEPS, "rows_per_microbatch": PROMPTS * GROUP, "save_every": 1000},
    }
    DynamicSampler.draw = timed(DynamicSampler.draw)
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        train(config_from_dict(tree, "peer_step"), Path(folder, "run"), quiet=True)
        with open(f"{folder}/run/metrics.jsonl") as file:
            records = [json.loads(line) for line in file][1:]
    return before, [r["rollout/tokens"] for r in records]


def trl():
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    # Special tokens are cut out of a text before it is split into words: no digits.
    named = {str(i) if i > 2 else f"<{i}>": i for i in range(V)}
    words = Tokenizer(models.WordLevel(named, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<2>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=WIDTH,
        max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    before = resident()
    model = Qwen3ForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            logging_steps=1000, num_generations=GROUP, per_device_train_batch_size=PROMPTS * GROUP,
            max_completion_length=LENGTH, temperature=1.0, beta=0.0, loss_type="dapo",
            learning_rate=1e-5, max_steps=STEPS, gradient_checkpointing=False,
            generation_kwargs={"min_new_tokens": LENGTH},
        )  # fmt: skip
        texts = [text for step in range(STEPS) for text in prompts(step)]
        trainer = GRPOTrainer(
            model=model, reward_funcs=even, args=options, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}),
        )  # fmt: skip
        trainer._generate = timed(trainer._generate)
        trainer.train()
    return before, [PROMPTS * GROUP * LENGTH] * STEPS


def tunix():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    class Words:
        """Integers with spaces between."""

        encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(str(int(i)) for i in ids))
        bos_id = staticmethod(lambda: 1)
        eos_id = staticmethod(lambda: 2)
        pad_id = staticmethod(lambda: 0)

    before = resident()
    config = qwen3.ModelConfig(
        num_layers=LAYERS, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=HEADS,
        head_dim=WIDTH, num_kv_heads=KV, rope_theta=1_000_000, norm_eps=1e-6,
        use_tied_embedding=True, dtype=jnp.float32, param_dtype=jnp.float32,
        remat_config=qwen3.RematConfig.NONE,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        reference=None,
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5), eval_every_n_steps=10**9, max_steps=STEPS
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=LENGTH,
                max_prompt_length=PROMPT_LEN,
                temperature=1.0,
                top_p=1.0,
                kv_cache_size=PROMPT_LEN + LENGTH,
            ),  # fmt: skip
        ),
    )
    cluster.generate = timed(cluster.generate)
    options = GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0)
    learner = GRPOLearner(cluster, options, [lambda prompts, completions, **_: even(completions)])
    with mesh:
        learner.train([{"prompts": np.array(prompts(step))} for step in range(STEPS)])
    return before, [PROMPTS * GROUP * LENGTH] * STEPS


if __name__ == "__main__":
    name = sys.argv[1]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    before, tokens = {"ours": ours, "trl": trl, "tunix": tunix}[name]()
    # from the end of one sampling to the end of the next: an update, then a sampling
    whole = [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]
    sampling = samplings[2:]
    total, part = sum(whole) / len(whole), sum(sampling) / len(sampling)
    count = sum(tokens[2:]) / len(tokens[2:])
    found = {
        "cpu_s_sampling": round(part, 3),
        "cpu_s_rest": round(total - part, 3),
        "cpu_us_per_token": round(1e6 * total / count, 1),
        "tokens_a_step": count,
        "added_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before),
    }
    print(json.dumps({"peer": name, **found}))

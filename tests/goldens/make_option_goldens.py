"""Makes what verl computes of the options beside DAPO, for test_options.py: CISPO, Dr. GRPO's
normaliser, masks by the ratio of trainer to sampler.

In the environment of make_peer_goldens.py, with orjson beside it:

    peers/bin/python tests/goldens/make_option_goldens.py [output folder]

peers/options.npz, for B responses padded to T tokens: logprobs, old_logprobs, behavior_logprobs
[B,T], lengths, advantages, group_of [B] -> cispo_loss [C], cispo_d_logprobs [C,B,T] of `eps` [C,2];
norm_loss of seq-mean-token-sum-norm, which divides by T; token_kept [B,T] of token_bounds;
sequence_kept [B] of sequence_bounds. verl bounds sampler / trainer, so it gets the inverse bounds.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_peer_goldens import (
    ADVANTAGES,
    EPS,
    HERE,
    MASK,
    VERL_CASES,
    B,
    T,
    log_ratios,
    slope,
    verl_loss,
    write,
)
from verl.trainer.ppo.core_algos import compute_policy_loss_cispo
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask
from verl.workers.config import ActorConfig

TOKEN_BOUNDS, SEQUENCE_BOUNDS = (0.5, 2.0), (0.9, 1.1)


def kept(log_ratio: torch.Tensor, option: str, bounds: tuple[float, float]) -> np.ndarray:
    mask = torch.from_numpy(MASK.astype(np.float32))
    inverse = f"{1 / bounds[1]}_{1 / bounds[0]}"
    return compute_rollout_rejection_mask(log_ratio, mask, option, inverse)[0].numpy() > 0


def main(out: Path) -> None:
    rng = np.random.default_rng(4)
    logprobs = -rng.exponential(2.0, (B, T)) * MASK
    old = torch.from_numpy((logprobs - log_ratios(rng)).astype(np.float32))
    # Responses differ in their mean as well as from token to token.
    drift = rng.uniform(-0.2, 0.2, (B, 1)) + rng.normal(0, 0.5, (B, T))
    behavior = torch.from_numpy(((old.numpy() - drift) * MASK).astype(np.float32))
    logprobs = torch.from_numpy(logprobs.astype(np.float32))
    mask, advantages = torch.from_numpy(MASK.astype(np.float32)), ADVANTAGES[:, None] * MASK
    advantages = torch.from_numpy(advantages.astype(np.float32))
    losses, slopes = [], []
    for low, high in EPS:
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=low,
            clip_ratio_high=high,
        )
        inputs = (advantages, mask, "token-mean", config)
        loss, d = slope(lambda x, i=inputs: compute_policy_loss_cispo(old, x, *i)[0], logprobs)
        losses.append(loss)
        slopes.append(d)
    normed = verl_loss(VERL_CASES[0], logprobs, old, advantages, mask, "seq-mean-token-sum-norm")
    write(
        out / "options.npz",
        ["verl", "torch"],
        [],
        logprobs=logprobs,
        old_logprobs=old,
        behavior_logprobs=behavior,
        eps=EPS,
        cispo_loss=losses,
        cispo_d_logprobs=slopes,
        norm_loss=normed,
        token_bounds=TOKEN_BOUNDS,
        token_kept=kept(old - behavior, "token_k1", TOKEN_BOUNDS),
        sequence_bounds=SEQUENCE_BOUNDS,
        sequence_kept=kept(old - behavior, "seq_mean_k1", SEQUENCE_BOUNDS)[:, 0],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "peers")

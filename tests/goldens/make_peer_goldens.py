"""Makes what Liger, verl and TRL compute of one ragged batch: losses, gradients and advantages, for
test_peers.py.

    python -m venv peers peers/bin/pip install torch==2.13.0 --index-url
    https://download.pytorch.org/whl/cpu peers/bin/pip install transformers==5.23.0
    accelerate==1.15.0 datasets==5.2.0 tensordict==0.10.0 ray==2.60.0 \
        codetiming==1.4.0 hydra-core==1.3.8
    peers/bin/pip install --no-deps liger-kernel==0.8.5 verl==0.9.1 trl==1.16.0
    peers/bin/python tests/goldens/make_peer_goldens.py [output folder]

Nothing of a peer is copied or stubbed: the functions, and TRL's trainer, are imported and called.
Each file holds inputs and outputs; `cases` are JSON objects, one a row of the outputs, and
`versions` is what made them. B responses, padded to T tokens:
    liger.npz   hidden [B,T,D], head [D,V], targets [B,T] -> loss [C], d_hidden [C,B,T,D], d_head [C,D,V]
    verl.npz    logprobs [B,T] -> loss [C], d_logprobs [C,B,T], token_loss [C,B,T]; group_* of each group alone, in the first case;
                far_* of one token each, in the first case; rewards [Q,G] -> advantages_of_rewards
                [Q,G]
    trl.npz     prompts [B,P] (padded on the left), responses [B,T], through the model qwen2_tied -> loss [C],
                gradient_<case>.<tensor>; split_loss [2] of responses :split_at and split_at: as two updates, in the first case
All with lengths, advantages, group_of [B] and old_logprobs [B,T]. `filtered` cases leave response
FILTERED out of the mask.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig

HERE = Path(__file__).parent
EPS = [(0.2, 0.28), (0.2, 0.2), (0.1, 0.4)]
TEMPERATURE = 0.7
LENGTHS = np.array([16, 16, 6, 7, 1, 10, 11, 1, 16])
ADVANTAGES = np.float32([1.5, -1.0, 0.0, -0.4, 0.7, 0.0, -2.0, 1.0, -0.6])
GROUP_OF = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
FILTERED = 3
# A ratio in every interval that the bounds 0.8, 0.9, 1.2, 1.28, 1.4, 3 and 10 cut.
RATIOS = (0.03, 0.5, 0.75, 0.85, 0.95, 1.0, 1.05, 1.15, 1.24, 1.34, 1.6, 2.5, 4.0, 7.0, 13.0, 40.0)

B, T = len(LENGTHS), max(LENGTHS)
MASK = np.arange(T) < LENGTHS[:, None]


def log_ratios(rng: np.random.Generator) -> np.ndarray:
    """log r [B, T].

    Responses of 16 tokens have all of RATIOS, the others some; each moved a little.
    """
    dealt = np.stack([rng.permutation(np.log(RATIOS)) for _ in LENGTHS])
    return (dealt + rng.uniform(-0.01, 0.01, dealt.shape)) * MASK


def case(
    loss: str,
    normalizer: str,
    eps: tuple[float, float],
    dual_clip: float | None = None,
    filtered: bool = False,
) -> dict:
    return {
        "name": f"{loss}{'-filtered' if filtered else ''}-{eps[0]}-{eps[1]}{f'-dual{dual_clip:g}' if dual_clip else ''}",
        "loss": loss,
        "normalizer": normalizer,
        "clip_eps_low": eps[0],
        "clip_eps_high": eps[1],
        "dual_clip": dual_clip,
        "filtered": filtered,
    }


def mask_of(case: dict) -> torch.Tensor:
    kept = np.arange(B) != FILTERED if case["filtered"] else np.ones(B, bool)
    return torch.from_numpy((MASK & kept[:, None]).astype(np.float32))


# `delta` of Liger and TRL bounds the ratio from above. Above 1 + ε_high it is dual clip: it changes
# nothing where A > 0.
GRPO_CASES = [
    *(case("dapo", "token-mean", eps) for eps in EPS),
    *(case("dapo", "token-mean", EPS[0], dual_clip) for dual_clip in (3.0, 10.0)),
    case("bnpo", "token-mean", EPS[0]),
    case("grpo", "seq-mean-token-mean", EPS[0]),
    case("dapo", "token-mean", EPS[0], filtered=True),
    case("grpo", "seq-mean-token-mean", EPS[0], filtered=True),
]


def write(path: Path, packages: list[str], cases: list[dict], **arrays) -> None:
    """Stores arrays (float32 and int32), the cases and the versions of what made them."""
    small = {
        k: np.asarray(v).astype(np.float32 if np.asarray(v).dtype.kind == "f" else np.int32)
        for k, v in arrays.items()
    }
    shared = {
        "lengths": LENGTHS.astype(np.int32),
        "advantages": ADVANTAGES,
        "group_of": GROUP_OF.astype(np.int32),
    }
    versions = json.dumps({name: importlib.metadata.version(name) for name in packages})
    np.savez_compressed(
        path,
        **shared,
        **small,
        filtered=FILTERED,
        cases=[json.dumps(c) for c in cases],
        versions=versions,
    )


# --------------------------------------------------------------------------------------------------------------------
# Liger
# --------------------------------------------------------------------------------------------------------------------


def liger(path: Path) -> None:
    rng = np.random.default_rng(1)
    hidden, weight = (
        rng.normal(size=(B, T, 8)).astype(np.float32),
        rng.normal(size=(33, 8)).astype(np.float32),
    )  # D 8, V 33
    targets = torch.from_numpy(rng.integers(0, 33, (B, T)))
    logits = torch.from_numpy(hidden.astype(np.float64) @ weight.T.astype(np.float64)) / TEMPERATURE
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].numpy()
    old = ((logprobs - log_ratios(rng)) * MASK).astype(np.float32)
    found = []
    for c in GRPO_CASES:
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=False,
            use_ref_model=False,
            epsilon_low=c["clip_eps_low"],
            epsilon_high=c["clip_eps_high"],
            delta=c["dual_clip"],
            loss_type=c["loss"],
            temperature=TEMPERATURE,
        )
        h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(weight, requires_grad=True)
        value, _ = loss(
            h,
            w,
            targets,
            mask_of(c),
            torch.from_numpy(ADVANTAGES),
            old_per_token_logps=torch.from_numpy(old),
        )
        value.backward()
        found.append((value.item(), h.grad.numpy(), w.grad.numpy().T))
    losses, d_hidden, d_head = (np.stack(x) for x in zip(*found, strict=True))
    write(
        path,
        ["liger-kernel", "torch"],
        GRPO_CASES,
        hidden=hidden,
        head=weight.T,
        targets=targets.numpy(),
        old_logprobs=old,
        temperature=TEMPERATURE,
        loss=losses,
        d_hidden=d_hidden,
        d_head=d_head,
    )


# --------------------------------------------------------------------------------------------------------------------
# verl
# --------------------------------------------------------------------------------------------------------------------

NO_DUAL_CLIP = 1e12  # verl has no switch for it

VERL_CASES = [
    case("token-mean", "token-mean", eps, c) for eps in EPS for c in (None, 3.0, 10.0)
] + [
    case(mode, mode, EPS[0], 10.0, filtered)
    for mode in ("seq-mean-token-mean", "seq-mean-token-sum", "token-mean")
    for filtered in (False, True)
    if filtered or mode != "token-mean"
]


def verl_loss(c: dict, logprobs, old, advantages, mask, mode: str) -> torch.Tensor:
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=c["clip_eps_low"],
        clip_ratio_high=c["clip_eps_high"],
        clip_ratio_c=c["dual_clip"] or NO_DUAL_CLIP,
    )
    return compute_policy_loss_vanilla(old, logprobs, advantages, mask, mode, config)[0]


def slope(loss, logprobs: torch.Tensor) -> tuple[float, np.ndarray]:
    logprobs = logprobs.detach().requires_grad_()
    value = loss(logprobs)
    return value.item(), torch.autograd.grad(value, logprobs)[0].numpy()


def one_by_one(c: dict, logprobs, old, advantages) -> list[tuple[float, np.ndarray]]:
    """Loss and slope of each token of [n] as a batch of its own: verl returns no loss per token."""
    one = torch.ones(1, 1)

    def single(p, q, a):
        return slope(
            lambda x: verl_loss(c, x, q.reshape(1, 1), a.reshape(1, 1), one, "token-sum"),
            p.reshape(1, 1),
        )

    return [single(*token) for token in zip(logprobs, old, advantages, strict=True)]


def verl(path: Path) -> None:
    rng = np.random.default_rng(2)
    logprobs = -rng.exponential(2.0, (B, T)) * MASK
    old = torch.from_numpy((logprobs - log_ratios(rng)).astype(np.float32))
    logprobs = torch.from_numpy(logprobs.astype(np.float32))
    advantages = torch.from_numpy(ADVANTAGES[:, None] * MASK)
    found = []
    for c in VERL_CASES:
        value, d_logprobs = slope(
            lambda x, c=c: verl_loss(c, x, old, advantages, mask_of(c), c["loss"]), logprobs
        )
        token_loss = np.zeros((B, T))
        token_loss[MASK] = [
            loss for loss, _ in one_by_one(c, logprobs[MASK], old[MASK], advantages[MASK])
        ]
        found.append((value, d_logprobs, token_loss))
    losses, d_logprobs, token_loss = (np.stack(x) for x in zip(*found, strict=True))

    # Each group as a batch of its own.
    groups = torch.from_numpy(
        GROUP_OF[:, None] == np.unique(GROUP_OF)[:, None, None]
    ).float() * mask_of(VERL_CASES[0])
    by_group = [
        slope(
            lambda x, m=m: verl_loss(VERL_CASES[0], x, old, advantages, m, "token-mean"), logprobs
        )
        for m in groups
    ]
    group_loss, group_d_logprobs = (np.stack(x) for x in zip(*by_group, strict=True))

    # Ratios beyond e^20, where verl holds them.
    far = torch.tensor([[25.0, 1.0], [-25.0, 1.0], [25.0, -1.0], [-25.0, -1.0]])
    far_loss, far_slope = zip(
        *one_by_one(VERL_CASES[0], far[:, 0], torch.zeros(4), far[:, 1]), strict=True
    )

    rewards = np.float32(
        [
            [1, -1, -1, -1],
            [1, 0.5, -1, -2],
            [1, 1, 0.75, -1.25],
            [0.5, 0.5, 0.5, 0.5],
            [0.3, -0.9, 0.85, -1.7],
        ]
    )
    scores = np.zeros((rewards.size, T), np.float32)
    scores[np.arange(rewards.size), rng.integers(0, T, rewards.size)] = (
        rewards.ravel()
    )  # on the last token of a response
    shaped, _ = compute_grpo_outcome_advantage(
        torch.from_numpy(scores), torch.ones(rewards.size, 1), np.arange(rewards.size) // 4
    )
    write(
        path,
        ["verl", "torch"],
        VERL_CASES,
        logprobs=logprobs,
        old_logprobs=old,
        loss=losses,
        d_logprobs=d_logprobs,
        token_loss=token_loss,
        group_loss=group_loss,
        group_d_logprobs=group_d_logprobs,
        far_log_ratio=far[:, 0],
        far_advantages=far[:, 1],
        far_loss=far_loss,
        far_slope=np.ravel(far_slope),
        rewards=rewards,
        advantages_of_rewards=shaped.reshape(rewards.shape),
    )


# --------------------------------------------------------------------------------------------------------------------
# TRL
# --------------------------------------------------------------------------------------------------------------------

VOCAB, MODEL = 96, "qwen2_tied"
PROMPT_LENGTHS = np.array([2, 5, 1, 3, 4, 2, 5, 1, 3])
WITH_GRADIENT = (0, 6)  # dapo, grpo


def trainer(c: dict, folder: str, steps_per_generation: int = 1) -> GRPOTrainer:
    """TRL's trainer, ready for the first micro-batch of an update without accumulation."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=B,
        num_generations=3,
        steps_per_generation=steps_per_generation,
        max_completion_length=int(T),
        beta=0.0,
        temperature=TEMPERATURE,
        epsilon=c["clip_eps_low"],
        epsilon_high=c["clip_eps_high"],
        delta=c["dual_clip"],
        loss_type=c["loss"],
    )
    made = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(HERE / MODEL),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t1"] * B}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="t0", eos_token="t1"
        ),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # as its training loop sets it
    return made


def trl_batch(rng: np.random.Generator, folder: str) -> SimpleNamespace:
    """Prompts padded on the left, responses on the right, and old log-probs that make the ratios."""
    width = max(PROMPT_LENGTHS)
    prompt_mask = np.arange(width) >= width - PROMPT_LENGTHS[:, None]
    prompts, responses = (
        rng.integers(0, VOCAB, (B, width)) * prompt_mask,
        rng.integers(0, VOCAB, (B, T)) * MASK,
    )
    ids, mask = (
        torch.from_numpy(np.concatenate(x, axis=1).astype(np.int64))
        for x in ((prompts, responses), (prompt_mask, MASK))
    )
    made = trainer(GRPO_CASES[0], folder)
    with torch.no_grad():
        logprobs = made._get_per_token_logps_and_entropies(made.model, ids, mask, int(T))[0].numpy()
    old = ((logprobs - log_ratios(rng)) * MASK).astype(np.float32)
    return SimpleNamespace(
        prompts=prompts, prompt_mask=prompt_mask, responses=responses, old_logprobs=old
    )


def trl_loss(
    made: GRPOTrainer,
    batch: SimpleNamespace,
    mask: torch.Tensor,
    rows: slice,
    tokens_in_generation: torch.Tensor,
):
    inputs = {
        "prompt_ids": torch.from_numpy(batch.prompts)[rows],
        "prompt_mask": torch.from_numpy(batch.prompt_mask.astype(np.int64))[rows],
        "completion_ids": torch.from_numpy(batch.responses)[rows],
        "completion_mask": mask[rows].long(),
        "advantages": torch.from_numpy(ADVANTAGES)[rows],
        "old_per_token_logps": torch.from_numpy(batch.old_logprobs)[rows],
        "num_items_in_batch": tokens_in_generation,
    }
    return made._compute_loss(made.model, inputs)


def trl(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        batch = trl_batch(np.random.default_rng(3), folder)
        losses, gradients = [], {}
        for i, c in enumerate(GRPO_CASES):
            made = trainer(c, folder)
            value = trl_loss(made, batch, mask_of(c), slice(None), mask_of(c).sum())
            losses.append(value.item())
            if i in WITH_GRADIENT:
                value.backward()
                gradients |= {
                    f"gradient_{i}.{name}": p.grad.numpy()
                    for name, p in made.model.named_parameters()
                }

        # Two updates from one generation batch: group 0, then groups 1 and 2. No optimiser step in
        # between.
        whole = mask_of(GRPO_CASES[0])
        parts = (slice(0, 3), slice(3, 9))
        made = trainer(GRPO_CASES[0], folder, steps_per_generation=2)
        split = [trl_loss(made, batch, whole, rows, whole.sum()).item() for rows in parts]
    write(
        path,
        ["trl", "transformers", "torch"],
        GRPO_CASES,
        prompts=batch.prompts,
        prompt_lengths=PROMPT_LENGTHS,
        responses=batch.responses,
        old_logprobs=batch.old_logprobs,
        temperature=TEMPERATURE,
        loss=losses,
        split_loss=split,
        split_at=3,
        **gradients,
    )


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    liger(out / "liger.npz")
    verl(out / "verl.npz")
    trl(out / "trl.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "peers")

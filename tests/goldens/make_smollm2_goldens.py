"""Makes smollm2.json: the log-probs of a paragraph by transformers, with the model that
make_real_inputs.py writes. For test_real.py.

pip install torch==2.13.0 transformers==5.23.0
python tests/make_real_inputs.py --out real/
python tests/goldens/make_smollm2_goldens.py real/smollm2-135m [output file]

tokens [n] of the text · logprobs [n-1] of tokens[1:] · top [n], the most likely next token after
each prompt_tokens of the prompt · answer_token, the most likely next one, and its logprob
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The lighthouse keeper counted 47 steps on the way up, as she had done every evening for 12 years. At the top she trimmed the wick, "
    "wiped the salt from the glass and wrote the weather into a thick green book: wind from the north-west, 3 boats in sight, no fog. "
    "Then she sat down with her tea. “If the lamp burns for 9 hours and each hour takes half a litre of oil,” she thought, “how much is "
    "left of the 20 litres that I carried up on Monday?”"
)
PROMPT = "The capital of France is"


def main(folder: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_softmax(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    tokens, prompt_tokens = tokenizer(TEXT)["input_ids"], tokenizer(PROMPT)["input_ids"]
    found, after_prompt = log_softmax(tokens), log_softmax(prompt_tokens)[-1]
    logprobs = found[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    answer = int(after_prompt.argmax())
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "text": TEXT,
        "tokens": tokens,
        "logprobs": [round(x, 6) for x in logprobs.tolist()],
        "top": found.argmax(-1).tolist(),
        "prompt": PROMPT,
        "prompt_tokens": prompt_tokens,
        "answer": tokenizer.decode([answer]),
        "answer_token": answer,
        "answer_logprob": round(float(after_prompt[answer]), 6),
    }
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in golden.items()
    )
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "smollm2.json",
    )

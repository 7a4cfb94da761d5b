"""Scoring the N RecCoTs of one (context, item) with the prefix encoded once, against a padded batch of full prompts.

    python benchmarks/scoring.py                                  # SmolLM2-135M on this machine's CPU
    python benchmarks/scoring.py --model qwen2.5-7b --contexts 20 # random weights of that shape, bfloat16 on a GPU

"plain" is the usual way: N rows of prompt + RecCoT, padded, and the logits of every position. "shared" is the engine
with one context a batch too, "batched" the engine with its default batches. Each runs in a process of its own, so that
its peak memory is its own, over the same contexts; a first one is not timed.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from sdpo import DEVICE, GPU, QWEN, Group, build, largest, make_groups, peak_memory, reset_peak_memory, synchronize

from trackrec.config import EngineSettings
from trackrec.fetch import fetch
from trackrec.llm.models import load_tokenizer
from trackrec.llm.tokens import yes_no_ids
from trackrec.llm.transformers_engine import TransformersEngine

WAYS = ("plain", "shared", "batched")


@torch.inference_mode()
def plain_scores(model: Any, group: Group, answers: tuple[int, int]) -> np.ndarray:
    prefix, suffixes = group
    lengths = [len(prefix) + len(suffix) for suffix in suffixes]
    ids = torch.tensor([prefix + s + [0] * (max(lengths) - len(prefix) - len(s)) for s in suffixes])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = model(input_ids=ids.to(DEVICE), attention_mask=mask.long().to(DEVICE), use_cache=False).logits
    last = logits[range(len(suffixes)), [length - 1 for length in lengths]]
    return last[:, list(answers)].double().softmax(-1).cpu().numpy()


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    model = build(args.model, lora=False).eval()
    # Another model's tokenizer serves random weights: the answers are two ids.
    tokenizer = load_tokenizer(fetch("smollm2-135m-instruct"))
    groups = make_groups(args.contexts, args.samples, args.prompt, args.completion, model.config.vocab_size)
    if way == "plain":
        answers = yes_no_ids(tokenizer)

        def score(some: list[Group]) -> list[np.ndarray]:
            return [plain_scores(model, group, answers) for group in some]
    else:
        engine = TransformersEngine(tokenizer, model, 1 if way == "shared" else EngineSettings().batch_tokens)

        def score(some: list[Group]) -> list[np.ndarray]:
            found = dict(engine.score(some))
            return [found[i] for i in range(len(some))]

    score(groups[:1])
    reset_peak_memory()
    synchronize()
    started = time.perf_counter()
    scores = score(groups)
    synchronize()
    seconds = time.perf_counter() - started
    return {
        "recots_per_second": args.contexts * args.samples / seconds,
        "peak_gib": peak_memory() / 2**30,
        "p_yes": np.concatenate(scores)[:, 0].tolist(),
    }


def in_own_process(way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> None:
    results = {way: in_own_process(way) for way in WAYS}
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model} on {where}: {args.contexts} contexts, N={args.samples}, prompts of {args.prompt} tokens, ",
        end="",
    )
    print(f"RecCoTs of about {args.completion}")
    print(f"{'':8}{'RecCoTs/s':>12}{'ratio':>8}{'peak GiB':>10}{'difference of P(Yes)':>22}")
    for way, result in results.items():
        ratio = result["recots_per_second"] / results["plain"]["recots_per_second"]
        difference = largest(result["p_yes"], results["plain"]["p_yes"])
        print(f"{way:8}{result['recots_per_second']:12.2f}{ratio:8.2f}{result['peak_gib']:10.2f}{difference:22.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2-135m", *QWEN], default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=10, help="N, RecCoTs of a context")
    parser.add_argument("--prompt", type=int, default=400, help="tokens before the RecCoT")
    parser.add_argument("--completion", type=int, default=100, help="mean tokens from the RecCoT to the answer")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
    else:
        report(args)


if __name__ == "__main__":
    main()

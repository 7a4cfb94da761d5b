"""Sampling N RecCoTs of each context with the engine, against transformers' own generate with the same rows in a batch.

    python benchmarks/sampling.py                                  # SmolLM2-135M on this machine's CPU
    python benchmarks/sampling.py --model qwen2.5-7b --contexts 12 # random weights of that shape, bfloat16 on a GPU

All texts are `--tokens` long in both (no end of sequence), so that both write the same number of tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from sdpo import DEVICE, GPU, QWEN, build, make_groups, peak_memory, reset_peak_memory, synchronize

from trackrec.fetch import fetch
from trackrec.llm.models import load_tokenizer
from trackrec.llm.transformers_engine import TransformersEngine
from trackrec.seeds import derive

WAYS = ("generate", "engine")


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    model = build(args.model, lora=False).eval()
    prompts = [prefix for prefix, _ in make_groups(args.contexts, 1, args.prompt, 5, model.config.vocab_size)]
    if way == "generate":
        ids = torch.tensor(prompts, device=DEVICE)

        def sample(tokens: int) -> None:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_p=0.9,
                top_k=0,
                num_return_sequences=args.samples,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
    else:
        # The end of sequence is no token of the vocabulary: every text goes on to the limit.
        model.generation_config.eos_token_id = None
        tokenizer = load_tokenizer(fetch("smollm2-135m-instruct"))
        tokenizer.eos_token = None
        rows = args.contexts * args.samples
        engine = TransformersEngine(tokenizer, model, args.contexts * args.prompt + rows * args.tokens)
        seeds = [[derive(context, sample) for sample in range(args.samples)] for context in range(args.contexts)]

        def sample(tokens: int) -> None:
            for _, completions in engine.sample(prompts, seeds, temperature=1.0, top_p=0.9, max_tokens=tokens):
                assert all(completion.num_tokens == tokens for completion in completions)

    sample(2)
    reset_peak_memory()
    synchronize()
    started = time.perf_counter()
    sample(args.tokens)
    synchronize()
    seconds = time.perf_counter() - started
    written = args.contexts * args.samples * args.tokens
    return {"tokens_per_second": written / seconds, "peak_gib": peak_memory() / 2**30}


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
    print(f"{args.tokens} new ones")
    print(f"{'':10}{'new tokens/s':>14}{'ratio':>8}{'peak GiB':>10}")
    for way, result in results.items():
        ratio = result["tokens_per_second"] / results["generate"]["tokens_per_second"]
        print(f"{way:10}{result['tokens_per_second']:14.1f}{ratio:8.2f}{result['peak_gib']:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2-135m", *QWEN], default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=10, help="N, RecCoTs of a context")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each RecCoT")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
    else:
        report(args)


if __name__ == "__main__":
    main()

"""S-DPO steps with the prompt encoded once against one padded row per RecCoT, on the same numbers.

    python benchmarks/sdpo.py                                  # SmolLM2-135M on this machine's CPU
    python benchmarks/sdpo.py --model qwen2.5-7b --lora        # random weights of that shape, bfloat16 on a GPU

"plain" is the usual way: N rows of prompt + RecCoT, padded, and the logits of every position. Each way runs in a
process of its own, so that its peak memory is its own, over the same examples: a forward and a backward pass of
equation 4 each, the first one not timed. The last step's gradients are compared.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from trackrec.align.sdpo import SoftmaxDPOLoss
from trackrec.fetch import fetch
from trackrec.llm.logprobs import suffix_logprobs
from trackrec.llm.packing import enable, pack

Group = tuple[list[int], list[list[int]]]

# Qwen2.5's shapes: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied.
QWEN = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def build(name: str, lora: bool) -> Any:
    torch.manual_seed(0)
    if name == "smollm2-135m":
        model = AutoModelForCausalLM.from_pretrained(fetch("smollm2-135m-instruct"), dtype=torch.float32).to(DEVICE)
    else:
        hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = QWEN[name]
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
        with DEVICE:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then A's gradients are zero
                torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def make_groups(count: int, samples: int, prompt: int, completion: int, vocabulary: int) -> list[Group]:
    """Random tokens; RecCoTs of `completion` tokens, give or take a fifth."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(100, vocabulary, (length,), generator=generator).tolist()

    spread = completion // 5
    lengths = torch.randint(completion - spread, completion + spread + 1, (count, samples), generator=generator)
    return [(tokens(prompt), [tokens(length) for length in row]) for row in lengths.tolist()]


def packed_logprobs(model: Any, groups: list[Group]) -> Tensor:
    return suffix_logprobs(model, pack(groups, pad_id=0, device=DEVICE))


def plain_logprobs(model: Any, groups: list[Group]) -> Tensor:
    rows = [(prompt, recot) for prompt, recots in groups for recot in recots]
    lengths = torch.tensor([len(prompt) + len(recot) for prompt, recot in rows])
    longest = int(lengths.max())
    ids = torch.tensor([prompt + recot + [0] * (longest - len(prompt) - len(recot)) for prompt, recot in rows])
    places, prompts = torch.arange(longest), torch.tensor([len(prompt) for prompt, _ in rows])
    targets = ids.masked_fill((places < prompts[:, None]) | (places >= lengths[:, None]), -100).roll(-1, dims=1)
    logits = model(input_ids=ids.to(DEVICE), attention_mask=(places < lengths[:, None]).long().to(DEVICE)).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(DEVICE), reduction="none")
    return -losses.view(ids.shape).sum(1).view(len(groups), -1)


WAYS = {"packed": packed_logprobs, "plain": plain_logprobs}


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    model = build(args.model, args.lora)
    loss_function = SoftmaxDPOLoss(beta=0.1)
    count = (args.steps + 1) * args.batch
    every = make_groups(count, args.samples, args.prompt, args.completion, model.config.vocab_size)
    batches = [every[start : start + args.batch] for start in range(0, count, args.batch)]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    enable(model)
    with torch.no_grad():
        references = [packed_logprobs(model, batch) for batch in batches]
    # Not quite the policy, so that the N gradients differ in weight.
    noise = torch.linspace(-20, 20, args.samples, device=DEVICE)
    if way == "plain":
        model.set_attn_implementation("sdpa")
    reset_peak_memory()
    seconds, losses = [], []
    for batch, reference in zip(batches, references, strict=True):
        model.zero_grad(set_to_none=True)
        synchronize()
        started = time.perf_counter()
        policy = WAYS[way](model, batch)
        loss = loss_function(policy, reference + noise).sum()
        loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    gradients = {name: p.grad.float().cpu() for name, p in parameters.items() if p.grad is not None}
    safetensors.torch.save_file(gradients, args.gradients)
    return {
        "examples_per_second": args.batch / statistics.median(seconds[1:]),
        "tokens": sum(tokens_of(way, batch) for batch in batches[1:]) / (args.steps * args.batch),
        "peak_gib": peak_memory() / 2**30,
        "losses": losses,
        "logprobs": policy.flatten().tolist(),
    }


def tokens_of(way: str, groups: list[Group]) -> int:
    """Tokens of a batch through the model, the padding counted."""
    if way == "packed":
        return len(groups) * max(len(prompt) + sum(map(len, recots)) for prompt, recots in groups)
    longest = max(len(prompt) + len(recot) for prompt, recots in groups for recot in recots)
    return longest * sum(len(recots) for _, recots in groups)


def peak_memory() -> int:
    """Bytes: on a GPU what torch allocated there, else this process's resident memory."""
    return torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """On a CPU the peak is the process's whole life's; what goes before the steps needs less than they do."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def in_own_process(way: str, gradients: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--gradients", str(gradients)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / way for way in WAYS}
        results = {way: in_own_process(way, files[way]) for way in WAYS}
        found, expected = (safetensors.torch.load_file(files[way]) for way in ("packed", "plain"))
    difference = sum((found[name] - gradient).square().sum() for name, gradient in expected.items()) ** 0.5
    norm = sum(gradient.square().sum() for gradient in expected.values()) ** 0.5
    packed, plain = results["packed"], results["plain"]

    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    trained = "LoRA" if args.lora else "all weights"
    print(f"{args.model}, {trained}, on {where}")
    print(f"N={args.samples}, prompts of {args.prompt} tokens, RecCoTs of about {args.completion}, batch {args.batch}")
    print(f"{'':8}{'examples/s':>12}{'tokens/example':>16}{'peak GiB':>10}")
    for way, result in results.items():
        print(f"{way:8}{result['examples_per_second']:12.3f}{result['tokens']:16.0f}{result['peak_gib']:10.2f}")
    print(f"ratio   {packed['examples_per_second'] / plain['examples_per_second']:12.2f}")
    print(f"largest difference of a log-probability {largest(packed['logprobs'], plain['logprobs']):.1e}")
    print(f"largest difference of a loss            {largest(packed['losses'], plain['losses']):.1e}")
    print(f"relative difference of the gradients    {difference / norm:.1e}")


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2-135m", *QWEN], default="smollm2-135m")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter (r=16, all linear layers)")
    parser.add_argument("--samples", type=int, default=10, help="N, RecCoTs of an example")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=100, help="mean tokens of a RecCoT")
    parser.add_argument("--batch", type=int, default=1, help="examples of a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one more goes before")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
    else:
        report(args)


if __name__ == "__main__":
    main()

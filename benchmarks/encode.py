"""Encoding RecCoTs against sentence-transformers, with the same model on the same texts.

    python benchmarks/encode.py                       # all-MiniLM-L6-v2 on this machine

"plain" is `SentenceTransformer(...).encode(texts)` as its page shows it, 32 texts a batch. Both ways go over all texts
in turn, in one process, the first round not timed; the median of the other rounds counts. Neither includes loading.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from trackrec.config import EncodeSettings
from trackrec.fetch import fetch
from trackrec.llm.encoder import TextEncoder

# Each word is one token of BERT's vocabulary.
WORDS = """
the user likes films with a dark plot and strong characters because they often rate drama crime war and science fiction
highly while light comedy family or music movies get low marks over time so the next story should be serious
"""
SHORTEST, LONGEST = 20, 200


def make_texts(count: int) -> list[str]:
    """Texts of 20 to 200 words, always the same."""
    draw, words = np.random.default_rng(0), WORDS.split()
    lengths = draw.integers(SHORTEST, LONGEST, size=count, endpoint=True)
    return [" ".join(draw.choice(words, size=length)) for length in lengths]


def report(model: Path, settings: EncodeSettings, count: int, rounds: int) -> None:
    texts = make_texts(count)
    peer = SentenceTransformer(str(model))
    ours = TextEncoder(model, pooling="mean", dtype=settings.dtype, batch_tokens=settings.batch_tokens)
    tokens = list(map(len, ours.token_ids(texts)))
    # sentence-transformers cuts at its own limit, ours at the model's: neither cuts here.
    assert max(tokens) <= peer.max_seq_length <= ours.limit

    def plain() -> np.ndarray:
        return peer.encode(texts, show_progress_bar=False)

    def by_length() -> np.ndarray:
        found = dict(ours.encode(ours.token_ids(texts)))
        return np.stack([found[i] for i in range(len(texts))])

    ways: dict[str, Callable[[], np.ndarray]] = {"plain": plain, "ours": by_length}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    vectors = {}
    for _ in range(rounds + 1):
        for way, encode in ways.items():
            started = time.perf_counter()
            vectors[way] = encode()
            seconds[way].append(time.perf_counter() - started)
    # sentence-transformers scales this model's vectors to length 1; the direction is what both say.
    norms = {way: np.linalg.norm(found, axis=1) for way, found in vectors.items()}
    cosine = (vectors["plain"] * vectors["ours"]).sum(1) / (norms["plain"] * norms["ours"])
    assert cosine.min() > 0.999, cosine.min()

    rates = {way: count / statistics.median(times[1:]) for way, times in seconds.items()}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{model.name} on {where}: {count} texts of {min(tokens)} to {max(tokens)} tokens, mean {np.mean(tokens):.0f}"
    )
    print(f"{'':8}{'texts/s':>10}{'ratio':>8}")
    for way, rate in rates.items():
        print(f"{way:8}{rate:10.1f}{rate / rates['plain']:8.2f}")
    print(f"smallest cosine of a text's two vectors {cosine.min():.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an encoder's directory; all-MiniLM-L6-v2 by default")
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; one more goes before")
    parser.add_argument("--dtype", default=EncodeSettings().dtype, help="ours'; sentence-transformers keeps float32")
    parser.add_argument("--batch-tokens", type=int, default=EncodeSettings().batch_tokens, help="ours'")
    args = parser.parse_args()
    settings = EncodeSettings(dtype=args.dtype, batch_tokens=args.batch_tokens)
    report(args.model or fetch("all-minilm-l6-v2"), settings, args.texts, args.rounds)


if __name__ == "__main__":
    main()

"""Perplexity of the embedded GGUF in moesaic and in llama.cpp's own `llama-perplexity`, on the same text.

llama-perplexity cuts the text into chunks of 512 tokens and scores the second half of each; so does this. Tokenizers
are compared on the way, since llama.cpp splits the same text by its own code.

    python benchmarks/perplexity_gguf.py TEXT_FILE --llama-perplexity PATH [--chunks 40]
"""

import argparse
import math
import re
import subprocess
from pathlib import Path

import torch

import moesaic
from moesaic.data.tokenizer import Tokenizer
from moesaic.hub.embedded import embedded_gguf
from moesaic.hub.gguf import read_metadata

CONTEXT = 512


@torch.no_grad()
def our_perplexity(token_ids: list[int], chunks: int) -> float:
    model = moesaic.load(embedded_gguf())
    nats, count = 0.0, 0
    for start in range(0, chunks * CONTEXT, CONTEXT):
        ids = torch.tensor([token_ids[start : start + CONTEXT]])
        first = CONTEXT // 2
        logits = model(ids)[0, first:-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, first + 1 :], reduction="sum").item()
        count += logits.shape[0]
    return math.exp(nats / count)


def their_perplexity(program: Path, text: Path, chunks: int) -> float:
    # Without repacking: with it, llama.cpp b11434 crashes on processors with AMX.
    command = [program, "-m", embedded_gguf(), "-f", text, "-c", CONTEXT, "--chunks", chunks, "-t", 2, "--no-repack"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama-perplexity", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_gguf(read_metadata(embedded_gguf()))
    token_ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    chunks = min(args.chunks, len(token_ids) // CONTEXT)
    ours = our_perplexity(token_ids, chunks)
    theirs = their_perplexity(args.llama_perplexity, args.text, chunks)
    print(f"{chunks} chunks of {CONTEXT} tokens: moesaic {ours:.4f}, llama.cpp {theirs:.4f}: {ours / theirs - 1:+.3%}")


if __name__ == "__main__":
    main()

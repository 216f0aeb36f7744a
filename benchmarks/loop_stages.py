"""Generation over two stages beside one process: `python benchmarks/loop_stages.py`, 10 minutes.

The model of yuan_step.py in fp32, greedy, 16 sequences of 64 tokens after prompts of 16. Two stages are two groups of
eight sequences, each computed by one thread; the peers decode all 16 in one batch, with one thread and with two. Goals:
the same tokens, at least 1.3 times one thread and 0.85 of two. Prints one JSON line for each.
"""

import random
import sys
import time

import torch
import yuan_step
from pairs import compare_processes, make_at_least_line, make_line, print_lines, serve_measurements

from yuan import tokenizer as tokenizers
from yuan.generate.limits import Sampling
from yuan.generate.pipelined_decoder import make_decoder
from yuan.generate.sequence import DecodingSequence
from yuan.model.stages import make_stages
from yuan.model.transformer import Yuan
from yuan.plan.generation_stages import split_layers_by_bytes
from yuan.tokenizer import Tokenizer

NUM_SEQUENCES = 16
NUM_PROMPT_TOKENS = 16
NUM_NEW_TOKENS = 64
STAGED = ("2", "1")
MIN_RATIO_BY_PEER = {("1", "1"): 1.3, ("1", "2"): 0.85}


def make_model(num_stages: int) -> Yuan:
    torch.manual_seed(0)
    model, _ = yuan_step.make_our_model(torch.float32)
    assert isinstance(model, Yuan), "our own model"
    if num_stages > 1:
        layers = split_layers_by_bytes(model.config, num_stages)
        model.stages = make_stages(layers, [torch.device("cpu")] * num_stages)
    model.pack_for_generation()
    return model.eval()


def decode(model: Yuan, tokenizer: Tokenizer) -> list[list[int]]:
    """Decode all sequences to their end, and return their tokens."""
    numbers = random.Random(0)
    sequences = [
        DecodingSequence(
            [numbers.randrange(5, len(tokenizer)) for _ in range(NUM_PROMPT_TOKENS)],
            Sampling(max_tokens=NUM_NEW_TOKENS, stop_ids=()),
            tokenizer,
            model.config.seq_len,
        )
        for _ in range(NUM_SEQUENCES)
    ]
    decoder = make_decoder(model)
    for sequence in sequences:
        assert decoder.admit(sequence), "the cache has no limit"
    while decoder.running:
        failed = decoder.step()
        assert not failed, failed
    return [sequence.tokens for sequence in sequences]


def make_tokenizer() -> Tokenizer:
    return tokenizers.train(["abcdefghijklmnopqrstuvwxyz 0123456789"], vocab_size=512)


def run(num_stages: str, num_threads: str) -> None:
    """Serve the measurements of one side, in tokens/s."""
    torch.set_num_threads(int(num_threads))
    model, tokenizer = make_model(int(num_stages)), make_tokenizer()

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        num_tokens = sum(map(len, decode(model, tokenizer)))
        return {"tokens_per_s": num_tokens / (time.perf_counter() - began)}

    measure()
    serve_measurements(measure)


def compare_tokens() -> bool:
    tokenizer = make_tokenizer()
    pairs = zip(decode(make_model(1), tokenizer), decode(make_model(2), tokenizer), strict=True)
    num_different = sum(expected != tokens for expected, tokens in pairs)
    name = f"sequences of {NUM_SEQUENCES} whose tokens differ over two stages"
    return print_lines(make_line(name, num_different, "sequences", goal="0", ok=num_different == 0))


def main() -> int:
    ok = compare_tokens()
    for peer_arguments, min_ratio in MIN_RATIO_BY_PEER.items():
        ratios, speed = compare_processes(__file__, STAGED, peer_arguments, "tokens_per_s")
        line = make_at_least_line(
            "generation over two stages, one thread each",
            ratios,
            min_ratio,
            figure=round(speed),
            unit="tokens/s",
            peer=f"one process, {peer_arguments[1]} threads",
        )
        ok &= print_lines(line)
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        sys.exit(main())

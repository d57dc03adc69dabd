# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Let a model speak: a prompt goes in, its continuation comes out, token by token.

    python sample.py --prompt "ROMEO:"                      # the newest run in out/
    python sample.py out/mine --prompt "ROMEO:" --temperature 0 --max_new_tokens 50
    python sample.py out/mine --num_samples 3 --seed 7 > three.txt        # from the very beginning

DIR is anything that GPT.from_pretrained in gpt.py opens, with its tokenizer.json beside. Only the
text goes to standard output, so that it can be piped; speed and warnings go to standard error.

This is the one script besides bpe.py that sees text. The way of a prompt: text -> ids (bpe.py) ->
a probability for every token (gpt.py) -> one of them, drawn -> text; then the next token.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from bpe import Tokenizer
from gpt import DTYPES, GPT, pick_device, pick_dtype


def wrong_flag(message: str):
    """argparse would print its whole usage; one line is what a person reads."""
    raise ValueError(f"{message}; see --help")


def read_flags(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Let a model go on with a text.")
    parser.error = wrong_flag
    add = parser.add_argument
    add("model", nargs="?", metavar="DIR", help="the model; default: the run in out/ saved last")
    add("--prompt", default="", metavar="TEXT", help="what to go on from; nothing: a new document")
    add("--num_samples", type=int, default=1, help="how many continuations (%(default)s)")
    add("--max_new_tokens", type=int, default=200, help="length of each, at most (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; higher: more"
        " surprising, above about 1.5 nonsense (%(default)s)")
    add("--top_k", type=int, help="draw among the k likeliest tokens; lower is safer")
    add("--top_p", type=float, help="draw among the likeliest that together have this probability;"
        " lower is safer")
    add("--seed", type=int, help="the same seed gives the same text; default: a new one each time")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest one here")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="to compute in (%(default)s)")
    args = parser.parse_args(argv)
    for name, value, fine, rule in (
            ("num_samples", args.num_samples, args.num_samples >= 1, "at least 1"),
            ("max_new_tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
            ("temperature", args.temperature, args.temperature >= 0, "0 or more"),
            ("top_k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
            ("top_p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0, at most 1")):
        if not fine:
            raise ValueError(f"--{name} is {value}; it must be {rule}")
    return args


def newest_model(parent: Path) -> Path:
    """The directory in `parent` whose model was saved last. Raises ValueError if there is none."""
    models = sorted(parent.glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not models:
        raise ValueError(f"{parent} holds no model yet: train one with python train.py, or name a "
                         "directory")
    return models[-1].parent


def speak(argv=None):
    """Run it all. Raises ValueError or OSError, one line, for bad input."""
    args = read_flags(argv)
    directory = Path(args.model) if args.model else newest_model(Path("out"))
    device = pick_device(args.device)
    model = GPT.from_pretrained(directory, device, pick_dtype(device, args.dtype))
    if not (directory / "tokenizer.json").exists():
        raise ValueError(f"{directory} holds no tokenizer.json: its model knows only numbers")
    tokenizer = Tokenizer.load(directory)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only "
                         f"{model.config.vocab_size}; they don't belong together")
    end = tokenizer.special_tokens.get(tokenizer.divider)   # <|endoftext|> by most names

    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        if end is None:
            raise ValueError("this tokenizer has no token to begin a text with: give a --prompt")
        prompt = [end]      # in training, every document began after one
    if len(prompt) > model.config.block_size:
        print(f"the prompt has {len(prompt)} tokens; the model sees the last "
              f"{model.config.block_size}", file=sys.stderr)
    tokens = torch.tensor([prompt], device=device)
    # Not every terminal and pipe can write every character; that is no reason to stop.
    sys.stdout.reconfigure(errors="replace")

    count, start = 0, time.perf_counter()
    for i in range(args.num_samples):
        if i:
            print("\n" + "-" * 60)
        print(args.prompt, end="", flush=True)

        def new_ids():
            nonlocal count
            for step in model.generate(
                    tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                    stop=() if end is None else (end,),
                    seed=None if args.seed is None else args.seed + i):
                count += 1
                if step.item() == end:
                    return
                yield step.item()
        # A character can be several tokens; decode_stream holds it back until it is whole.
        for text in tokenizer.decode_stream(new_ids()):
            print(text, end="", flush=True)
    print()
    print(f"{count} tokens, {count / (time.perf_counter() - start):.0f} tokens/s", file=sys.stderr)


def main(argv=None) -> int:
    try:
        speak(argv)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

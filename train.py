# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Pretraining: from text to a language model, in one command.

    python train.py                                     # Shakespeare; minutes on two CPU cores
    python train.py --data book.txt --vocab_size 1024   # any text: .txt, .jsonl, folders
    python train.py --data tokens.npy --n_layer 12 --block_size 1024     # token ids made before
    python train.py --model DIR --data more.txt         # go on with a model that there is
    python train.py --resume                            # go on with the newest run, after any stop
    torchrun --nproc_per_node 8 train.py ...            # the same run on eight GPUs
    python train.py --help                              # every flag, its unit and its default

The loop is short: take a batch of token rows, ask the model for the loss of each next token, follow
the gradient a small step downhill. The rest of this file keeps that honest and unbreakable:

- A batch is a pure function of the text, the seed and the step. There is no "where we were" to
  save.
- The loss of a step is a sum over target tokens divided by their number in the whole batch, however
  the batch is cut into pieces to fit the memory, and divided among processes.
- A checkpoint is one file, OUT/trainer_state.safetensors, replaced in one step: killed at any
  moment, a run resumes and gives the losses it would have given (CPU, fp32: to the last bit).
- This script knows no text. bpe.py makes the token files; the commands are printed, so that you can
  run each alone.

OUT becomes a model directory that transformers opens (config.json, model.safetensors,
tokenizer.json, ...), with metrics.jsonl (one JSON object a line), loss.svg,
trainer_state.safetensors, and in OUT/best the model of the evaluation with the lowest loss.
Left out on purpose: anything but plain next-token prediction, and splitting a single matrix product
over devices.

Reading order: settings, data, then train(), the story from first line to last. Its loop, fit() at
the end of gpt.py, is also that of finetune.py.
Letters as in gpt.py: B rows in a batch, T tokens in a row.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gpt import (DTYPES, GPT, GPTConfig, accumulate_gradients, add_flags, add_up, clock,
                 exit_code, fit, join_processes, mix, nearby, open_for_training, out_folder,
                 pick_device, pick_dtype, process_count, read_flags, run, shard, shuffled)

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- settings

def make_parser() -> argparse.ArgumentParser:
    """Every flag with its unit and default."""
    parser = argparse.ArgumentParser("train.py", description="Pretrain a GPT on text. Defaults in "
                                     "brackets.")
    add = parser.add_argument_group("files").add_argument
    add("--data", nargs="+", metavar="FILE", help="text (.txt, .jsonl, a folder) or token ids "
        "(.npy, one or many) [the plays of Shakespeare]")
    add("--val_data", nargs="+", metavar="FILE", help="the same, to validate on [the last tenth of "
        "--data, which is then not trained on]")
    add("--model", metavar="DIR", help="a model to go on with, instead of a new one")
    add = parser.add_argument_group("a new model").add_argument
    add("--vocab_size", type=int, help="tokens that bpe.py learns [4096]")
    add("--n_layer", type=int, help="layers: the one dial, the rest follows [3]")
    add("--n_embd", type=int, help="width [64 per layer]")
    add("--n_head", type=int, help="query heads [one per 64 of width]")
    add("--n_kv_head", type=int, help="key-value heads [half of --n_head where that is even]")
    add = parser.add_argument_group("size of the run").add_argument
    add("--block_size", type=int, default=256, help="tokens in a row: how far back the model sees "
        "[%(default)s]")
    add("--batch_tokens", type=int, help="target tokens per step [by the size of the run]")
    add("--lr", type=float, help="peak learning rate [by the size of the run]")
    add("--max_steps", type=int, help="updates of the weights [20 tokens per parameter, "
        "but no more than two epochs of the text]")
    add("--eval_tokens", type=int, default=32768, help="held-out tokens at an evaluation; at the "
        "end: all [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, help="let torch.compile fuse the step "
        "[on a GPU, and in long runs on a CPU, where it works and is faster]")
    add_flags(parser)
    return parser


def settle(argv):
    """Flags -> (settings, tensors of the run to resume or None, what that run noted)."""
    args, tensors, noted = read_flags(make_parser(), argv)
    shape = ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head")
    for name in shape if args.model else ():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for a new model; that of --model has its own")
    if not args.model:
        args.vocab_size, args.n_layer = args.vocab_size or 4096, args.n_layer or 3
        make_config(args, args.vocab_size)      # a shape that does not fit is refused here
    return args, tensors, noted


def check_batch(args, processes: int):
    """Refuse a batch that can't be cut as asked for. What is not given yet will fit."""
    T, rows = args.block_size, (args.batch_tokens or 0) // args.block_size
    if args.batch_tokens and (args.batch_tokens % T or rows % processes):
        nearest = max(1, round(args.batch_tokens / (T * processes))) * T * processes
        raise ValueError(f"--batch_tokens {args.batch_tokens} is not a whole number of rows of "
                         f"--block_size {T} for each of {processes} process(es); the nearest that "
                         f"is: {nearest}")
    if rows and args.micro_batch != "auto" and rows // processes % args.micro_batch:
        raise ValueError(f"--micro_batch {args.micro_batch} does not divide the "
                         f"{rows // processes} rows of {T} that --batch_tokens {args.batch_tokens} "
                         "makes for each process")


def make_config(args, vocab_size: int) -> GPTConfig:
    return GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_embd, args.n_head,
                     args.n_kv_head, dropout=args.dropout)


# ---------------------------------------------------------------- data

def data_name(args) -> str:
    return Path(args.data[0]).stem if args.data else "shakespeare"


def token_files(args) -> tuple[list[Path], list[Path]]:
    """The token ids of --data and --val_data: files, made by bpe.py where they are not there yet.

    Those of a text are in data/tokens/NAME-SIZE-KEY. KEY is a digest of all that they depend on:
    the text files (name, size, time of change), the vocabulary (its size, or the tokenizer of
    --model), and bpe.py itself. Whatever changes, the key changes: nothing stale can be found.
    """
    data, val = args.data, args.val_data
    if data is None:
        # The second is the text that data/shakespeare.py falls back to.
        folders = [HERE / "data" / name for name in ("shakespeare", "manual")]
        if not any(folder.exists() for folder in folders):
            run("data/shakespeare.py")
        folder = next(folder for folder in folders if folder.exists())
        data, val = [folder / "train"], [folder / "val"]
    data, val = ([nearby(Path(path)) for path in paths or []] for paths in (data, val))
    everything = data + val
    for path in everything:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if any(path.suffix == ".npy" for path in everything):
        if {path.suffix for path in everything} != {".npy"}:
            raise ValueError("give text, or .npy files of tokens (also for --val_data); not both")
        return data, val

    given = Path(args.model, "tokenizer.json") if args.model else None
    if given and not given.exists():
        raise ValueError(f"{args.model} holds no tokenizer.json: give token ids (.npy), not text")
    facts = [(HERE / "bpe.py").read_bytes(), given.read_bytes() if given else args.vocab_size,
             len(data)]
    for path in everything:
        files = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path]
        facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    size = args.vocab_size or Path(args.model).name
    folder = nearby(HERE / "data" / "tokens" / f"{data_name(args)}-{size}-{key}")
    part = {"train": [] if val else ["--part", "0:0.9"], "val": [] if val else ["--part", "0.9:1"]}
    # bpe.py writes each file whole, and these last: what is there is complete.
    if not given and not (folder / "tokenizer_config.json").exists():
        # GPT-2's split keeps a line's end apart from what stands before it. In newer ones ":\n" can
        # be one token, and after a prompt that ends in "ROMEO:" the model is in a place where it
        # never was.
        run("bpe.py", "train", *data, *part["train"], "--vocab_size", args.vocab_size,
            "--pattern", "gpt2", "--out", folder)
    for name, texts in ("train", data), ("val", val or data):
        if not (folder / f"{name}.json").exists():
            run("bpe.py", "encode", *texts, *part[name], "--tokenizer",
                nearby(given.parent) if given else folder, "--out", folder / f"{name}.npy")
    return [folder / "train.npy"], [folder / "val.npy"]


class Tokens:
    """The ids of several files as one long row. Memory holds only what is looked at."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, places: slice) -> np.ndarray:
        first, last, _ = places.indices(len(self))
        number, found = int(np.searchsorted(self.starts, first, "right")) - 1, []
        while number < len(self.parts) and self.starts[number] < last:
            begin = self.starts[number]
            found.append(self.parts[number][max(first - begin, 0):last - begin])
            number += 1
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def open_tokens(paths: list[Path]) -> tuple[Tokens, dict]:
    """-> (ids; what bpe.py noted about them in the .json files beside, or {} if not about all)."""
    parts, about = [], []
    for path in paths:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of token ids: {error}") from None
        if part.ndim != 1 or part.dtype.kind not in "iu":
            raise ValueError(f"{path} holds {part.dtype} of shape {part.shape}, not a row of ids")
        beside = path.with_suffix(".json")
        noted = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        if noted and noted.get("tokens") != len(part):
            raise ValueError(f"{path} has {len(part)} tokens, but {beside.name} says "
                             f"{noted.get('tokens')}: delete both and encode again")
        parts.append(part)
        about.append(noted)
    if len({noted.get("tokenizer") for noted in about}) > 1:
        raise ValueError(f"the files with {paths[0]} were made by different tokenizers")
    together = dict(about[0], bytes=sum(noted["bytes"] for noted in about)) if all(about) else {}
    return Tokens(parts), together


def batch(tokens, first: int, rows: int, T: int, seed: int):
    """Rows of training text: tokens (B, T) and, one place later, targets (B, T). `first` counts the
    rows from the beginning of the run, so that step and process number say which are whose.

    The text is cut into windows of T tokens. An epoch takes each of them once, in an order of its
    own, and cut at places of its own, so that the model meets new beginnings.
    """
    n = max(1, len(tokens) // T - 1)        # one window less than there are: room for the shift
    starts = []
    for epoch, i in (divmod(row, n) for row in range(first, first + rows)):
        shift = mix(seed, epoch) % min(T, len(tokens) - n * T)
        starts.append(shift + T * shuffled(i, n, seed, epoch))
    both = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
    return both[:, :-1], both[:, 1:]


@torch.no_grad()
def evaluate(model, tokens, T: int, rows: int, device, autocast, at_most: int) -> tuple[float, int]:
    """Mean loss on held-out text, in nats per token, over windows of T tokens side by side, and the
    number of tokens it was computed on.

    Each token but the first is predicted once, from what its window holds before it; `rows` windows
    are computed at once. If there are more than at_most tokens, it takes evenly spread windows with
    about that many together.
    """
    starts = range(0, len(tokens) - 1, T)[:: math.ceil(len(tokens) / at_most)]
    total, count = 0.0, 0
    for i in range(0, len(starts), rows):
        # -100 is no target: the last window may be shorter.
        ids = np.full((len(starts[i:i + rows]), T + 1), -100, dtype=np.int64)
        for row, start in zip(ids, starts[i:i + rows]):
            window = tokens[start:start + T + 1]
            row[:len(window)] = window
        ids = torch.from_numpy(ids).to(device)
        found = int((ids[:, 1:] != -100).sum())
        with autocast():
            total += model(ids[:, :-1].clamp(min=0), ids[:, 1:]).item() * found
        count += found
    return total / count, count


# ---------------------------------------------------------------- the story

def scale_run(args, model, text: int, processes: int):
    """Fill in what was not asked for: batch, steps and learning rate, by the sizes of the model and
    of the text (in tokens).

    Steps: 20 tokens for each parameter, where a training budget is spent best (arXiv:2203.15556,
    table 3), but each token of the text at most twice: more pays off until about four times
    (arXiv:2305.16264), and the first run should be over soon.
    Batch and rate: the more computing, the larger the one and the lower the other, with the powers
    of DeepSeek LLM (arXiv:2401.02954, eq. 1). Its constants are for runs of 1e17 operations and
    more; ours are such that the first run, of 4e13, has what it was found to learn most with.
    """
    tokens = min(20 * model.count_parameters(), 2 * text)
    operations = tokens * model.flops_per_token(args.block_size)
    if args.batch_tokens is None:
        rows = 0.073 * operations ** 0.3271 / args.block_size
        args.batch_tokens = args.block_size * processes * max(
            1, 2 ** round(math.log2(max(1, rows / processes))))
    if args.lr is None:
        args.lr = float(f"{0.1 * operations ** -0.125:.1e}")
    if args.max_steps is None:
        args.max_steps = max(1, round(tokens / args.batch_tokens))


def train(argv=None) -> int:
    """Run it all. Returns the exit code; raises ValueError or OSError, one line, for bad input."""

    # ---- 1. What is asked for. What can be refused is refused before anything is written.
    args, tensors, noted = settle(argv)
    device = pick_device(args.device)
    rank, processes = join_processes(device), process_count()
    check_batch(args, processes)
    out = out_folder(args, data_name(args)) if rank == 0 else Path(os.devnull)
    T = args.block_size
    size = f"{args.n_layer} layers" if not args.model else f"the model {nearby(Path(args.model))}"
    print(f"Getting the text, cutting it into tokens, training {size} on them, saving to {out}, "
          "letting the model speak.")

    # ---- 2. Text becomes token ids: once, while the other processes wait.
    if rank == 0:
        token_files(args)
    add_up(0)
    train_files, val_files = token_files(args)
    train_tokens, about = open_tokens(train_files)
    if val_files:
        val_tokens, val_about = open_tokens(val_files)
        if val_about.get("tokenizer") != about.get("tokenizer"):
            raise ValueError(f"{train_files[0]} and {val_files[0]} were made by different "
                             "tokenizers")
    else:       # the last tenth of each file
        cuts = [(part, len(part) * 9 // 10) for part in train_tokens.parts]
        train_tokens = Tokens([part[:cut] for part, cut in cuts])
        val_tokens, val_about = Tokens([part[cut:] for part, cut in cuts]), {}
    for kind, tokens in ("training", train_tokens), ("held-out", val_tokens):
        if len(tokens) < T + 1:
            raise ValueError(f"the {kind} text has {len(tokens)} tokens, less than one row of "
                             f"--block_size {T} and its next token: more text, or a lower number")
    parts = train_tokens.parts + val_tokens.parts
    vocab_size = about.get("vocab_size") or 1 + max(int(part.max()) for part in parts if len(part))
    if not about and min(int(part.min()) for part in parts if len(part)) < 0:
        raise ValueError(f"{train_files[0]} holds negative numbers: those are no token ids")
    data = {"tokens": len(train_tokens), "tokenizer": about.get("tokenizer")}
    if args.resume and noted["data"] != data:
        raise ValueError(f"the text has changed since {out} was begun: {noted['data']} then, "
                         f"{data} now; put it back, or start a new run")
    # Bits per byte compares models whatever their tokenizers: nats per token, divided by bytes per
    # token of the held-out text, in bits. For ids of an unknown text there is none.
    bits = (len(val_tokens) - 1) / val_about["bytes"] / math.log(2) if val_about else None

    # ---- 3. The model, and how long a run it deserves.
    torch.manual_seed(args.seed)
    if args.model:
        model = open_for_training(args.model, args.dropout)
        if vocab_size > model.config.vocab_size or T > model.config.block_size:
            raise ValueError(f"{args.model} has {model.config.vocab_size} tokens and sees "
                             f"{model.config.block_size}; asked for are {vocab_size} and "
                             f"--block_size {T}")
    else:
        model = GPT(make_config(args, vocab_size))
    model = model.to(device)
    scale_run(args, model, len(train_tokens), processes)
    rows = args.batch_tokens // T           # of the whole batch
    mine = rows // processes                # of this process
    check_batch(args, processes)
    micro_batch = args.micro_batch
    if micro_batch == "auto":               # as many as make 16384 tokens, for a start
        micro_batch = next(n for n in range(mine, 0, -1)
                           if mine % n == 0 and n * T <= max(T, 16384))
    if args.resume and noted["step"] > args.max_steps:
        raise ValueError(f"{out} has done {noted['step']} steps already, more than --max_steps "
                         f"{args.max_steps}")
    c, parameters = model.config, model.count_parameters()
    if args.fsdp and processes > 1:
        shard(model)
    dtype = pick_dtype(device, args.dtype)
    # Noted by name, so that a resumed run multiplies in the same type without asking again.
    args.dtype = next(name for name, known in DTYPES.items() if known == dtype)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"data    {len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out; "
          f"vocabulary {vocab_size:,}\n"
          f"model   {parameters:,} parameters: {c.n_layer} layers, {c.n_embd} wide, "
          f"{c.n_head} heads ({c.n_kv_head} for keys and values), "
          f"{model.flops_per_token(T) / 1e6:,.0f} million operations a token\n"
          f"batch   {args.batch_tokens:,} tokens = {micro_batch} rows at once of {T} tokens, "
          f"{mine // micro_batch} times, by {processes} process{'es' * (processes > 1)}\n"
          f"steps   {args.max_steps:,} = "
          f"{args.max_steps * args.batch_tokens / len(train_tokens):.1f} epochs, at a learning "
          f"rate of up to {args.lr:.2g}")

    # ---- 4. A trial: how long does a step take, and does torch.compile shorten it?
    def learn(step: int, scaler, forward, rows_now: int) -> dict:
        """Add the gradient of this process's rows of the step to the weights' .grad."""
        nonlocal micro_batch
        tokens, targets = batch(train_tokens, step * rows + rank * mine, rows_now, T, args.seed)

        def share_of(first, last):
            with autocast():
                loss = forward(tokens[first:last].to(device), targets[first:last].to(device))
            return loss * (last - first) / rows     # all rows have T targets
        loss, micro_batch = accumulate_gradients(model, share_of, rows_now, micro_batch, scaler)
        return {"loss": loss, "tokens": args.batch_tokens,
                "flops": args.batch_tokens * model.flops_per_token(T)}

    def trial(forward) -> float:
        """Seconds per step."""
        times, unscaled = [], torch.amp.GradScaler(device.type, enabled=False)
        for _ in range(4):      # the first time warms up; of the others the least disturbed counts
            start = time.perf_counter()
            learn(0, unscaled, forward, micro_batch)
            times.append(time.perf_counter() - start)
        model.zero_grad()
        return min(times[1:]) * mine / micro_batch
    steps_left = args.max_steps - noted.get("step", 0)
    forward, per_step = model, trial(model)
    # On a CPU compiling takes about a minute and wins a tenth to a third of a step.
    patient = device.type == "cuda" or per_step * steps_left > 900      # seconds
    if args.compile or (args.compile is None and patient and not args.fsdp):
        start = time.perf_counter()
        try:
            compiled = torch.compile(model, dynamic=False)
            compiled_step = trial(compiled)
            print(f"compile {time.perf_counter() - start:.0f} s once, then "
                  f"{per_step / compiled_step:.2f} times as fast")
            if args.compile or compiled_step < 0.95 * per_step:
                forward, per_step = compiled, compiled_step
        except Exception as error:      # no C++ compiler, a platform without Triton, ...
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"compile not possible here, going on without: {reason}")
    args.compile = forward is not model
    print(f"run     on {device.type}, products in {args.dtype}: about "
          f"{clock(per_step * steps_left)}; Ctrl-C saves and stops", flush=True)

    # ---- 5. The run.
    def learn_all(step, scaler):
        learned = learn(step, scaler, forward, mine)
        return learned | {"loss": add_up(learned["loss"])}

    def measure(last):
        loss, count = evaluate(model, val_tokens, T, micro_batch, device, autocast,
                               args.eval_tokens)
        row = {"val_loss": loss}
        if last:
            row["comparable"] = loss
            if count < len(val_tokens) - 1:
                loss, count = evaluate(model, val_tokens, T, micro_batch, device, autocast,
                                       len(val_tokens))
            row |= {"val_loss": loss, "val_tokens": count}
        words = f"{loss:.4f} nats per token"
        if bits:
            row["val_bpb"] = loss * bits
            words += f", {row['val_bpb']:.4f} bits per byte"
        return row, words + (f", over all {count:,} tokens" if last else "")
    code = fit(args, out, model, dtype, learn_all, measure, tensors, noted,
               {"script": "train.py", "data": data},
               train_files[0].parent if not args.model else Path(args.model))
    if rank == 0 and code == 0 and (out / "tokenizer.json").exists():
        run("sample.py", out, "--max_new_tokens", 150)
        print(f'\nNow you:  python sample.py {shlex.quote(str(out))} --prompt "ROMEO:"')
    return code


def main(argv=None) -> int:
    return exit_code("train.py", train, argv)


if __name__ == "__main__":
    sys.exit(main())

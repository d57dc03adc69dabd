# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Pretraining: from text to a language model, in one command.

    python train.py                                     # Shakespeare; minutes on two CPU cores
    python train.py --data book.txt --vocab_size 1024   # any text: .txt, .jsonl, folders
    python train.py --data tokens.npy --n_layer 12 --block_size 1024     # token ids made before
    python train.py --model DIR --data more.txt         # continue training an existing model
    python train.py --resume                            # continue the newest run, after any stop
    torchrun --standalone --nproc_per_node 8 train.py ...       # the same run on eight GPUs
    python train.py --help                              # every flag, its unit and its default

Everything from a batch to a saved checkpoint is in this file, in the order in which it happens.
gpt.py has the model, and functions of tensors, models and files; none of them prints or keeps a
state. Four promises decide how this script is written:

- A batch is a pure function of (seed, step), whatever the number of ranks. So a resumed run is the
  same run, and there is no position in the data to save.
- The loss is a sum over target tokens divided by the number of target tokens in the whole batch. So
  it does not depend on how the batch is cut into micro-batches and divided among ranks.
- When memory runs out, the step is repeated with smaller micro-batches, and the batch stays.
- A checkpoint replaces the one before atomically. Killed at any moment, a run resumes and computes
  the losses that it would have computed: on a CPU in fp32 to the last bit, elsewhere to rounding.
  (With --dropout, another number of ranks or another --micro_batch draws other masks.)

This script reads token ids, not text. Where there are none yet, it runs bpe.py to make them, and
prints the command, so that you can run it alone. OUT becomes a model directory that transformers
opens, with metrics.jsonl (one JSON object a line), curves.svg, checkpoint.pt, and in OUT/best the
model of the evaluation with the lowest loss. Left out on purpose: anything but plain next-token
prediction, and splitting a single matrix product over devices.

Reading order: settings, data, evaluation, then train(), the story from first line to last.
finetune.py has the same order and loop: `diff train.py finetune.py` shows what finetuning changes.
Letters as in gpt.py: B rows in a batch, T tokens in a row.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from gpt import (DTYPES, GPT, GPTConfig, all_sum, full_state, init_distributed, insist,
                 keep_freed_memory, learning_rate, leave, load_checkpoint, make_optimizers,
                 move_to_device, out_of_memory, pick_device, pick_dtype, read_json, restore,
                 save_checkpoint, sum_gradients)

HERE = Path(__file__).resolve().parent
# Held-out tokens that an evaluation takes. The last evaluation takes all.
EVAL_TOKENS = 32768

# ---------------------------------------------------------------- settings

class Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse itself would print its whole usage first
        raise ValueError(f"{message}; see --help")

def make_parser() -> Parser:
    """Every flag with its unit and default."""
    parser = Parser("train.py", description="Pretrain a GPT on text. Defaults in brackets.")
    add = parser.add_argument_group("files").add_argument
    files = {"nargs": "+", "metavar": "FILE", "type": os.path.abspath}
    add("--data", **files, help="text: .txt, .jsonl, folders; or ids: .npy [Shakespeare's plays]")
    add("--val_data", **files, help="the same, to validate on [the last tenth of --data]")
    add("--model", metavar="DIR", type=os.path.abspath, help="train this model further [a new one]")
    add("--out", metavar="DIR", help="where the run goes [out/NAME, numbered if taken]")
    add("--resume", action="store_true", help="continue the run in --out [the newest], or begin it")
    add = parser.add_argument_group("a new model").add_argument
    add("--vocab_size", type=int, help="tokens that bpe.py learns [4096]")
    add("--n_layer", type=int, help="layers: the one dial, the rest follows [3]")
    add("--n_embd", type=int, help="width [64 per layer]")
    add("--n_head", type=int, help="query heads [one per 64 of width]")
    add("--n_kv_head", type=int, help="key-value heads [half of --n_head where that is even]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--block_size", type=int, default=256, help="tokens in a row [%(default)s]")
    add("--batch_tokens", type=int, help="target tokens per step [by the size of the run]")
    add("--max_steps", type=int, help="updates [20 tokens per parameter, at most three epochs]")
    add("--lr", type=float, help="peak learning rate [by the size of the run]")
    add("--warmup_steps", type=int, default=30, help="steps until --lr is reached [%(default)s]")
    add("--schedule", choices=("wsd", "cosine"), default="wsd",
        help="how the learning rate falls: in the last fifth, or all the way [%(default)s]")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon learns more from each batch, and needs torch 2.9 [%(default)s]")
    add("--weight_decay", type=float, default=0.1, help="of matrices [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="the longest gradient norm [%(default)s]")
    add("--dropout", type=float, default=0.0, help="more if the held-out loss rises [%(default)s]")
    add("--seed", type=int, default=1, help="of first weights, batches, dropout [%(default)s]")
    add = parser.add_argument_group("running").add_argument
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=tuple(DTYPES), help="to compute in [the fastest safe one here]")
    add("--micro_batch", type=int, help="rows at once: fewer need less memory, and change nothing "
        "else [as many as make 16384 tokens, fewer when memory runs out]")
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile [on a GPU]")
    add("--fsdp", action="store_true", help="shard the weights over the ranks of torchrun")
    add("--eval_every", type=int, help="steps between evaluations [a tenth of the run]")
    add("--save_every", type=int, help="steps between saves, and every half hour [as --eval_every]")
    add("--log_every", type=int, default=10, help="steps between log lines [%(default)s]")
    return parser

# What a resumed run may change: where and how it computes, and its length, which the learning rate
# follows. Anything else would make it another run than the one that stopped.
MAY_CHANGE = {"out", "resume", "max_steps", "device", "dtype", "micro_batch", "compile", "fsdp",
              "eval_every", "save_every", "log_every"}

def read_flags(argv) -> tuple:
    """Flags -> (settings, the checkpoint to resume or None). Raises ValueError, one line, for what
    no data could make right."""
    parser = make_parser()
    args, saved = parser.parse_args(argv), None
    if args.resume and not args.out:
        runs = [path for path in Path("out").glob("*/checkpoint.pt")
                if load_checkpoint(path).get("script") == parser.prog]
        insist(runs, f"nothing to resume: out/ holds no run of {parser.prog}; name one by --out")
        args.out = str(max(runs, key=os.path.getmtime).parent)
    if args.resume and Path(args.out, "checkpoint.pt").exists():
        out, saved = args.out, load_checkpoint(Path(args.out, "checkpoint.pt"))
        insist(saved.get("script") == parser.prog, f"{out} is a run of {saved.get('script')}")
        # A flag that is given again wins over the saved value.
        parser.set_defaults(**saved["args"])
        args = parser.parse_args(argv)
        for name, value in saved["args"].items():
            insist(name in MAY_CHANGE or getattr(args, name) == value, f"--{name} was {value} in "
                   f"{out} and can't change: leave it out, or start a new run")
        args.out = out
    for name, value in vars(args).items():
        low = 0 if name in ("seed", "dropout", "weight_decay", "warmup_steps") else 1e-30
        insist(type(value) not in (int, float) or low <= value < math.inf, f"--{name} is {value}; "
               f"it must be {'above' if low else 'at least'} 0, and finite")
    insist(args.data or not args.val_data, "--val_data without --data")
    insist(not args.fsdp or args.optimizer == "adamw", "--optimizer muon needs matrices whole, and "
           "--fsdp cuts them: use adamw")
    return args, saved

def out_folder(args, name: str) -> Path:
    """Where the run goes. A new run never overwrites an old one."""
    out, number = Path(args.out or f"out/{name}"), 2
    while not args.out and out.exists():
        out, number = Path(f"out/{name}-{number}"), number + 1
    insist(args.resume or not any(out.rglob("*.safetensors")), f"{out} holds a model: continue it "
           "with --resume, or choose another --out")
    return out

# ---------------------------------------------------------------- data

def run(script: str, *arguments):
    """Run another script of this project, after printing the command. Its errors are its own."""
    command = [str(part).removeprefix(os.getcwd() + os.sep) for part in (HERE / script, *arguments)]
    print("$ python " + shlex.join(command), flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code and script != "sample.py":      # a finished run stays finished if it can't be shown
        leave(code)

def token_files(args) -> tuple[list[Path], list[Path]]:
    """The token ids of --data and --val_data: files, made by bpe.py where they do not exist yet.
    Those of a text are in data/tokens/NAME-SIZE-KEY. KEY is a digest of all that they depend on:
    the text files (name, size, time of change), the vocabulary (its size, or the tokenizer of
    --model), and bpe.py itself. Whatever changes, the key changes: nothing stale can be found."""
    data, val = args.data, args.val_data or []
    if data is None:        # the plays, or the text that data/shakespeare.py falls back to
        folders = [HERE / "data" / name for name in ("shakespeare", "manual")]
        if not any(folder.exists() for folder in folders):
            run("data/shakespeare.py")
        folder = folders[0] if folders[0].exists() else folders[1]
        data, val = [folder / "train"], [folder / "val"]
    data, val = ([Path(path) for path in paths] for paths in (data, val))
    endings = {path.suffix for path in data + val}
    if ".npy" in endings:
        insist(endings == {".npy"}, "give text, or .npy files (then also for --val_data); not both")
        return data, val

    model = Path(args.model) if args.model else None
    vocabulary = (model / "tokenizer.json").read_bytes() if model else args.vocab_size
    facts = [(HERE / "bpe.py").read_bytes(), vocabulary, len(data)]
    files = [file for path in data + val for file in sorted(path.rglob("*")) or [path]]
    facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    made_for = model.name if model else args.vocab_size
    folder = HERE / "data" / "tokens" / f"{data[0].stem}-{made_for}-{key}"
    parts = ((0, 1), (0, 1)) if val else ((0, 0.9), (0.9, 1))
    # bpe.py writes these files last: if one is there, all is complete.
    if not model and not (folder / "tokenizer.json").exists():
        # GPT-2's split keeps the end of a line apart from what stands before it. Newer ones can
        # merge ":\n"; then a prompt that ends in ":" is unlike all that was trained on.
        run("bpe.py", "train", *data, "--part", *parts[0], "--vocab_size", args.vocab_size,
            "--pattern", "gpt2", "--out", folder)
    for name, texts, part in ("train", data, parts[0]), ("val", val or data, parts[1]):
        if not (folder / f"{name}.npy.json").exists():
            run("bpe.py", "encode", *texts, "--part", *part, "--tokenizer", model or folder,
                "--out", folder / f"{name}.npy")
    return [folder / "train.npy"], [folder / "val.npy"]

def open_tokens(paths: list[Path]) -> tuple[np.ndarray, list[dict]]:
    """-> (the ids of all files as one row, what is known of each file: its number of tokens, a
    digest, the size of its vocabulary, the tokenizer, and what else bpe.py noted beside it)"""
    parts, notes = [], []
    for path in paths:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            insist(part.ndim == 1 and part.dtype.kind in "iu" and len(part) and part[0] >= 0,
                   f"it has {part.dtype} of shape {part.shape}")
            # If bpe.py did not make it, all that is known is read off the ids.
            noted = (read_json(f"{path}.json") if Path(f"{path}.json").exists() else
                     {"tokens": len(part), "tokenizer": None, "vocab_size": int(part.max()) + 1,
                      "digest": hashlib.sha256(part).hexdigest()})
            insist(noted["tokens"] == len(part), f"it has {len(part)} tokens, but {path}.json says "
                   f"{noted['tokens']}: encode the text again")
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{path} can't be used as a row of token ids: {error}") from None
        parts, notes = [*parts, part], [*notes, noted]
    # One file is read from the disk as needed. Several are copied into memory.
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)), notes

@lru_cache(2)       # a batch can lie across the end of an epoch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n). RandomState and not default_rng: only its stream is frozen (NEP
    19), and a run that is resumed with a newer numpy must find the same order."""
    return np.random.RandomState([seed, epoch]).permutation(n)

def batch(data: np.ndarray, step: int, rows: int, T: int, seed: int):
    """All rows of a step, for all ranks: tokens (rows, T) and, shifted by one, targets (rows, T).
    The text is cut into windows of T tokens. An epoch takes each window once, in its own order,
    and cuts from its own offset, so that the model meets new beginnings."""
    n = max(1, len(data) // T - 1)          # one less than fit: room for the offset
    places = [divmod(row, n) for row in range(step * rows, (step + 1) * rows)]
    cuts = {epoch: np.random.RandomState([seed, epoch]).randint(min(T, len(data) - n * T))
            for epoch in {epoch for epoch, _ in places}}
    starts = [cuts[epoch] + T * epoch_order(n, seed, epoch)[i] for epoch, i in places]
    # T + 1 ids give T tokens and T targets: the target at each position is the token after it.
    ids = torch.from_numpy(np.stack([data[start:start + T + 1] for start in starts]).astype(int))
    return ids[:, :-1], ids[:, 1:]

# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, data: np.ndarray, T: int, at_most: int, micro_batch: int, rank: int,
             world_size: int, autocast) -> dict:
    """Mean loss on held-out text, in nats per token, over windows of T tokens side by side.
    Each token but the first is predicted once, from those before it in its window. If there are
    more than at_most tokens, evenly spread windows with about that many are taken. Every rank
    computes its share of them. A collective."""
    device = next(model.parameters()).device
    starts = np.arange(0, len(data) - 1, T)
    starts = starts[::math.ceil(len(data) / at_most)].tolist()
    # Under FSDP a forward pass is a collective: all ranks must make the same number of them.
    starts = (starts + [len(data)] * (-len(starts) % world_size))[rank::world_size]
    ids = np.full((len(starts), T + 1), -100)       # -100 is no target: the last window is shorter
    for row, start in zip(ids, starts):
        window = data[start:start + T + 1]
        row[:len(window)] = window
    total, count = 0.0, 0
    for piece in torch.from_numpy(ids).split(micro_batch):
        tokens, targets = piece[:, :-1].clamp(min=0).to(device), piece[:, 1:].to(device)
        with autocast():
            total += model(tokens, targets, reduction="none").sum().item()
        count += (targets != -100).sum().item()
    total, count = all_sum([total, count]).tolist()
    return {"val_loss": total / count, "val_tokens": int(count)}

# ---------------------------------------------------------------- the story

def scale_run(args, model, text: int):
    """Fill in what was not asked for: batch, steps and learning rate, by the sizes of the model and
    of the text (in tokens), whatever the number of ranks.
    Steps: 20 tokens for each parameter are the best use of a training budget (arXiv:2203.15556,
    table 3). But each token of the text is seen at most three times: up to four would pay off
    (arXiv:2305.16264), but the first run should be over soon.
    Batch and rate: more computing, larger batch, lower rate, by the exponents of
    DeepSeek LLM (arXiv:2401.02954, eq. 1). Its constants are for runs of 1e17 operations and more;
    ours give the first run, of 6e13, the values that it learned most with."""
    tokens = min(20 * model.count_parameters(), 3 * text)
    operations = tokens * model.flops_per_token(args.block_size)
    rows = 2 ** round(math.log2(max(1, 0.073 * operations ** 0.3271 / args.block_size)))
    args.batch_tokens = args.batch_tokens or rows * args.block_size
    args.lr = args.lr or float(f"{0.1 * operations ** -0.125:.1e}")
    args.max_steps = args.max_steps or max(1, round(tokens / args.batch_tokens))

signals = []        # those that came since the loop began
def note_signal(number, frame):
    """A signal is only noted when it comes, and answered after the step. A rank that left in the
    middle of a step would make the others wait for its gradients."""
    if signals and number == signal.SIGINT:
        raise KeyboardInterrupt         # Ctrl-C, twice: stop at once
    signals.append(number)

def train(argv=None) -> int:
    """Run it all. Returns the exit code; raises ValueError or OSError, one line, for bad input."""
    # ---- 1. What is asked for. What can be refused is refused before anything is written.
    args, saved = read_flags(argv)
    device = pick_device(args.device)
    # Under torchrun several processes run this function, each on its own share of every batch.
    # `rank` is the number of this process. All print the same lines; rank 0 prints them for all.
    rank, world_size = init_distributed(device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if device.type == "cpu":
        keep_freed_memory()
    T = args.block_size
    shape = {name: getattr(args, name) for name in ("block_size", "n_layer", "n_embd", "n_head",
                                                    "n_kv_head", "dropout")}
    if not args.model:
        args.vocab_size, shape["n_layer"] = args.vocab_size or 4096, args.n_layer or 3
        GPTConfig(args.vocab_size, **shape)         # refuses a shape that does not fit
    out = out_folder(args, Path(args.data[0] if args.data else "shakespeare").stem)
    print(f"Getting the text, cutting it into tokens, training on them, saving to {out}.")

    # ---- 2. Text becomes token ids: once, while the other ranks wait.
    if rank == 0:
        token_files(args)
    all_sum([0])
    train_files, val_files = token_files(args)
    train_data, notes = open_tokens(train_files)
    if val_files:
        val_data, val_notes = open_tokens(val_files)
    else:       # token ids without --val_data
        cut = len(train_data) * 9 // 10
        train_data, val_data, val_notes = train_data[:cut], train_data[cut:], []
    for kind, data in ("training", train_data), ("held-out", val_data):
        insist(len(data) > T, f"the {kind} text has {len(data)} tokens, less than one row of "
               f"--block_size {T} and its next token: more text, or a lower number")
    digest = [noted["digest"] for noted in notes + val_notes]
    insist(not saved or saved["digest"] == digest, f"the text has changed since {out} was begun: "
           "put it back, or start a new run")
    # The tokenizer that made the ids goes beside the model. Is it where it should be?
    tokenizer = Path(args.model or train_files[0].parent)
    file = tokenizer / "tokenizer.json"
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    made_by = {noted["tokenizer"] for noted in notes + val_notes}
    insist(len(made_by) == 1 and (not args.model or made_by <= {None, found}), "not all token ids "
           "were made by the same tokenizer, which must be that of --model if there is one")
    if found is None or (made_by != {found} and not args.model):
        print(f"no tokenizer of {train_files[0]} is beside it: the model will know only numbers")
        tokenizer = None

    # ---- 3. The model, and how long a run it deserves. Its first weights follow from the seed.
    torch.manual_seed(args.seed)
    vocab_size = max(noted["vocab_size"] for noted in notes + val_notes)
    if args.model:
        pretrained = GPT.from_pretrained(args.model, dtype=torch.get_default_dtype())   # fp32
        model = GPT(replace(pretrained.config, dropout=args.dropout))
        # Copies. The opened weights are mapped from the file, and a matrix product can depend, in
        # the last bit, on how its memory is aligned. A resumed run would then differ.
        model.load_state_dict(pretrained.state_dict())
        del pretrained
    else:
        model = GPT(GPTConfig(vocab_size, **shape))
    c, parameters, flops = model.config, model.count_parameters(), model.flops_per_token(T)
    insist(vocab_size <= c.vocab_size and T <= c.block_size, f"{args.model} has {c.vocab_size} "
           f"tokens and sees {c.block_size}; needed are {vocab_size} and --block_size {T}")
    for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head") if args.model else ():
        insist(getattr(args, name) in (None, getattr(c, name)), f"--{name} is for a new model; "
               f"{args.model} has {getattr(c, name)}")
    scale_run(args, model, len(train_data))
    rows, unit = args.batch_tokens // T, T * world_size
    insist(args.batch_tokens % unit == 0, f"--batch_tokens {args.batch_tokens} must be a multiple "
           f"of {unit}, which is --block_size {T} times {world_size} rank(s)")
    micro_batch = min(rows // world_size, args.micro_batch or max(1, 16384 // T))
    args.dtype = args.dtype or pick_dtype(device)
    sharded = args.fsdp and world_size > 1
    model = move_to_device(model, device, args.dtype, sharded)
    # Under autocast torch computes matrix products in the short type, and what needs range or
    # precision, such as softmax and losses, in fp32.
    def autocast():
        return torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32")
    print(f"data    {len(train_data):,} tokens to train on, {len(val_data):,} held out\n"
          f"model   {parameters:,} parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} "
          f"heads ({c.n_kv_head} for keys and values), vocabulary {c.vocab_size:,}\n"
          f"batch   {rows} rows of {T} tokens, {micro_batch} at once, on {world_size} rank(s)\n"
          f"steps   {args.max_steps:,}: {args.max_steps * args.batch_tokens / len(train_data):.1f} "
          f"epochs of {flops / 1e6:,.0f} million operations a token, lr up to {args.lr:.2g}\n"
          f"run     on {device.type}, in {args.dtype}; Ctrl-C saves and stops", flush=True)
    compiling = device.type == "cuda" if args.compile is None else args.compile
    if compiling:
        try:        # something small: is there a C++ compiler, and does Triton know this GPU?
            torch.compile(torch.square)(torch.ones(9, device=device))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            insist(not args.compile, f"--compile does not work here: {reason}")
            print(f"torch.compile does not work here, so the run is slower: {reason}")
            compiling = False
    forward = torch.compile(model, dynamic=False) if compiling else model
    V = c.vocab_size
    expected = f"to guess among {V} tokens costs ln {V} = {math.log(V):.4f}"
    # 0 unless bpe.py made them all and counted.
    val_bytes = all("bytes" in noted for noted in val_notes) and sum(
        noted["bytes"] for noted in val_notes)
    gzip_bpb = val_notes[0]["gzip_bpb"] if val_bytes else None

    # ---- 4. The optimizer, and what a resumed run brings along.
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    # Small gradients become 0 in fp16. The scaler multiplies the loss by a large number and divides
    # the gradients by it again. Disabled, it changes nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    # All that a run must remember besides tensors. There is no position in the data, because a
    # batch follows from the step, and no state of a random generator, for the same reason.
    done = {"steps": 0, "tokens": 0, "seconds": 0.0, "best": math.inf, "metrics_bytes": 0}
    if saved:
        restore(saved, model, optimizers)
        if saved["scaler"]:     # empty where it was disabled
            scaler.load_state_dict(saved["scaler"])
        done = saved["done"]
    args.eval_every = args.eval_every or math.ceil(args.max_steps / 10)
    if rank == 0:       # the only one that writes
        out.mkdir(parents=True, exist_ok=True)
        for left_over in out.rglob("*.part"):       # of a process that was killed while it wrote
            left_over.unlink()
        # A killed run has logged steps after its last checkpoint. They will be taken again, so
        # their lines go. Without a buffer each line is written at once and whole.
        metrics = open(out / "metrics.jsonl", "ab", buffering=0)
        metrics.truncate(min(done["metrics_bytes"], metrics.tell()))

    # ---- 5. The loop.
    signals.clear()
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note_signal)
    skipped = 0
    # Two clocks: `since` the last log line, for the speed; `started` for the whole run, as if it
    # had never been interrupted.
    since, since_tokens = time.perf_counter(), done["tokens"]
    started = since - done["seconds"]
    model.train()
    for step in range(done["steps"], args.max_steps):
        # ---- One step. Its batch is a pure function of (seed, step). Every rank makes all of it
        # and takes its own rows; it need not ask the others how many targets they have.
        tokens, targets = batch(train_data, step, rows, T, args.seed)           # (rows, T) each
        count = (targets != -100).sum().item()          # target tokens, of all ranks together
        mine = [x[rank::world_size].to(device) for x in (tokens, targets)]
        # Dropout follows from the step, too, but no two ranks should drop the same units.
        dropout_seed = np.random.SeedSequence([args.seed, step, rank]).generate_state(1)

        # Forward and backward, micro_batch rows at a time; backward() adds to .grad. Each part is a
        # SUM over its target tokens, divided by the number in the WHOLE batch. So the gradients add
        # up to that of the mean over the batch, however it is cut. If each part were its own mean,
        # a token would count for more in a part with fewer targets.
        while True:
            loss = 0.0
            torch.manual_seed(int(dropout_seed[0]))
            try:
                for i in range(0, rows // world_size, micro_batch):
                    piece = [x[i:i + micro_batch] for x in mine]
                    # Matrix products in bf16 or fp16, but weights, gradients and losses in fp32.
                    with autocast():
                        part = forward(*piece, reduction="none").sum()
                    scaler.scale(part / count).backward()
                    loss += part.detach() / count       # detached, or it would keep the graph
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Memory ran out. Repeat the step with smaller micro-batches, which changes the gradient
            # by rounding only. (Not under FSDP: there the other ranks wait in a collective.) The
            # graph of the failed pass must go first, because it holds most of the memory. The error
            # held it until the except block ended; `part` still does. And the parts before the
            # failed one have already added to .grad.
            part = None
            model.zero_grad()
            insist(micro_batch > 1 and not sharded, "out of memory with --micro_batch "
                   f"{micro_batch}: try a smaller one, or a smaller --block_size or model")
            args.micro_batch = micro_batch = (micro_batch + 1) // 2
            print(f"out of memory; from now on --micro_batch {micro_batch}", file=sys.stderr)

        # Each rank has the gradient of its own rows; the sum over ranks is that of the whole batch.
        sum_gradients(model, sharded)
        # Clip, because a single strange batch can have a gradient a hundred times longer than
        # usual. Undo the scaler's factor first: --grad_clip is meant without it.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        grad_norm = (norm.full_tensor() if sharded else norm).item()
        # Update, unless the gradient holds inf or nan: one such step would ruin the weights. All
        # ranks see the same norm, so all skip the step or none does. The learning rate is set by
        # hand, because it is a function of the step; a scheduler would be one more state to save.
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1
        lr = learning_rate(step, args.lr, args.warmup_steps, args.max_steps, args.schedule)
        for optimizer in optimizers if not skipped else ():
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        # One message: the loss of the whole batch; was any rank asked to stop; is another half hour
        # over for rank 0? All must stop after the same step, or one that goes on waits forever.
        now = time.perf_counter()
        late = rank == 0 and (now - started) // 1800 > done["seconds"] // 1800
        loss, stopping, late = all_sum([float(loss), len(signals), late]).tolist()

        # ---- Once in a while: log, evaluate, save, stop. The last step does all of it. The step in
        # which a signal came is saved, so that nothing is lost.
        done |= {"steps": step + 1, "tokens": done["tokens"] + count, "seconds": now - started}
        last = step + 1 == args.max_steps
        evaluating = last or (step + 1) % args.eval_every == 0
        saving = last or stopping or late or (step + 1) % (args.save_every or args.eval_every) == 0
        logging = evaluating or (step + 1) % args.log_every == 0
        row = {"step": step + 1, "tokens": done["tokens"], "seconds": round(done["seconds"], 3),
               "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if step == 0:
            print(f"step     0  loss {loss:.4f} ({expected})")
        # In fp16 a few skipped steps are normal, until the scaler has found its factor. Many in a
        # row mean that the weights have left the region where the loss is finite.
        if skipped:
            print(f"step {step + 1}: the gradient is not finite; step skipped, {skipped} in a row")
        insist(skipped < 20, "20 such steps in a row: try a lower --lr, or --dtype fp32")
        if logging:
            speed = (done["tokens"] - since_tokens) / (now - since)
            left = timedelta(seconds=round(done["seconds"] * (args.max_steps / (step + 1) - 1)))
            print(f"step {step + 1:>5}/{args.max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
                  f"grad_norm {grad_norm:5.2f}  {speed:>7,.0f} tokens/s  {left} left", flush=True)
        # Where a small text is read many times, the held-out loss turns upwards before the end. So
        # the model with the lowest held-out loss is kept, too, in OUT/best.
        better = False
        if evaluating:
            model.eval()        # no dropout
            how = micro_batch, rank, world_size, autocast
            found = evaluate(model, val_data, T, EVAL_TOKENS, *how)
            better = found["val_loss"] < done["best"]
            done["best"] = min(found["val_loss"], done["best"])
            if last:            # at the end, over all that is held out
                found = evaluate(model, val_data, T, len(val_data), *how)
            model.train()
            row |= found
            said = f"{found['val_loss']:.4f} nats per token over {found['val_tokens']:,} tokens"
            if val_bytes:       # bits per byte compares models whatever their tokenizers
                row["val_bpb"] = found["val_loss"] * (len(val_data) - 1) / val_bytes / math.log(2)
                said += f", {row['val_bpb']:.4f} bits per byte (gzip needs {gzip_bpb:.2f})"
            print(f"step {step + 1:>5}  held out: {said}", flush=True)
        # Every rank takes part in collecting the tensors. What can fail on rank 0 alone comes after
        # it, or the others would wait in a collective that rank 0 never enters.
        if saving or better:
            state = full_state(model, optimizers)
        if rank == 0:
            try:
                if logging:
                    # JSON has no nan or inf, and other programs refuse a file that holds them.
                    row = {k: value if math.isfinite(value) else None for k, value in row.items()}
                    metrics.write(json.dumps(row).encode() + b"\n")
                if better:
                    model.save_pretrained(out / "best", state["model"], tokenizer)
                if saving:
                    # The checkpoint comes last. So once it says that the run is finished, the model
                    # beside it is the finished one, and all lines of the log are on the disk.
                    model.save_pretrained(out, state["model"], tokenizer)
                    os.fsync(metrics.fileno())
                    done["metrics_bytes"] = os.fstat(metrics.fileno()).st_size
                    save_checkpoint(out / "checkpoint.pt", state, script="train.py", done=done,
                                    args=vars(args), digest=digest, scaler=scaler.state_dict())
            except OSError as error:
                # A full disk should not end a run of days: somebody may make room in time.
                print(f"could not write all of {out}, where the last whole checkpoint still "
                      f"stands: {error}", flush=True)
                if last or stopping:
                    return 2
        if stopping and not last:
            print(f"stopped after step {step + 1}, which is saved; to continue:\n"
                  f"    python train.py --resume --out {shlex.quote(str(out))}", flush=True)
            # The code that a shell reports for a program ended by a signal. Schedulers read it.
            return 128 + (signals or [signal.SIGTERM])[0]
        if logging or saving:
            # Start the clock again, so that tokens/s leaves out evaluating and saving. And drop the
            # copies of all tensors that were saved: three times the size of the model.
            state, since, since_tokens = None, time.perf_counter(), done["tokens"]

    # ---- 6. What came out of it.
    torch.cuda.empty_cache()        # sample.py may need it; without a GPU this does nothing
    if rank == 0:
        run("sample.py", "--curves", out)
        if tokenizer:
            run("sample.py", out, "--max_new_tokens", 150)
            prompt = "--prompt " + ("TEXT" if args.data else '"ROMEO:"')
            print(f"\nNow you:  python sample.py {shlex.quote(str(out))} {prompt}")
    return 0

def main(argv=None) -> int:
    """Errors in what people type or supply become one line. Anything else is a bug, and keeps its
    traceback."""
    try:
        return train(argv)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the first step, or asked for twice
        print("interrupted; the last checkpoint, if there is one, is whole", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

if __name__ == "__main__":
    leave(main())

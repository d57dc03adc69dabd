# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Pretraining: from text to a language model, in one command.

    python train.py                                     # Shakespeare; minutes on two CPU cores
    python train.py --data book.txt --vocab_size 1024   # any text: .txt, .jsonl, folders
    python train.py --data tokens.npy --n_layer 12 --block_size 1024     # token ids made before
    python train.py --resume                            # go on with the newest run, after any stop
    python train.py --help                              # every flag, its unit and its default

The loop is short: take a batch of token rows, ask the model for the loss of each next token, follow
the gradient a small step downhill. The rest of this file keeps that honest and unbreakable:

- A batch is a pure function of the text, the seed and the step. There is no "where we were" to
  save.
- The loss of a step is a sum over target tokens divided by their number in the whole batch, however
  the batch is cut into pieces to fit the memory.
- A checkpoint is one file, OUT/trainer_state.safetensors, replaced in one step: killed at any
  moment, a run resumes and gives the losses it would have given (CPU, fp32: to the last bit).
- This script knows no text. bpe.py makes the token files; the commands are printed, so that you can
  run each alone.

OUT becomes a model directory that transformers opens (config.json, model.safetensors,
tokenizer.json, ...), with metrics.jsonl (one JSON object a line), loss.svg and
trainer_state.safetensors.
Left out on purpose: several processes, and anything but plain next-token prediction.

Reading order: settings, data, checkpoints, then train(), the story from first line to last.
Letters as in gpt.py: B rows in a batch, T tokens in a row.
"""
import argparse
import hashlib
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gpt import (DTYPES, GPT, GPTConfig, accumulate_gradients, draw_losses, learning_rate,
                 make_optimizers, pick_device, pick_dtype, read_safetensors, write_safetensors,
                 write_whole)

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- settings

def wrong_flag(message: str):
    """argparse would print its whole usage; one line is what a person reads."""
    raise ValueError(f"{message}; see --help")


def make_parser() -> argparse.ArgumentParser:
    """Every flag with its unit and default. The defaults are those of the Shakespeare run."""
    parser = argparse.ArgumentParser(description="Pretrain a GPT on text. Defaults in brackets.")
    parser.error = wrong_flag
    add = parser.add_argument_group("files").add_argument
    add("--data", nargs="+", metavar="FILE", help="text (.txt, .jsonl, a folder) or token ids "
        "(.npy) [the plays of Shakespeare]")
    add("--val_data", nargs="+", metavar="FILE", help="the same, to validate on [the last tenth of "
        "--data, which is then not trained on]")
    add("--out", metavar="DIR", help="where the run goes [out/NAME, numbered if taken]")
    add("--resume", action="store_true", help="go on with the run in --out [the newest one]")
    add = parser.add_argument_group("model").add_argument
    add("--vocab_size", type=int, default=4096, help="tokens that bpe.py learns [%(default)s]")
    add("--block_size", type=int, default=256, help="tokens in a row: how far back the model sees "
        "[%(default)s]")
    add("--n_layer", type=int, default=3, help="layers: the one dial, the rest follows "
        "[%(default)s]")
    add("--n_embd", type=int, help="width [64 per layer]")
    add("--n_head", type=int, help="query heads [one per 64 of width]")
    add("--n_kv_head", type=int, help="key-value heads [half of --n_head where that is even]")
    add("--dropout", type=float, default=0.0, help="raise it when a small text is seen many times "
        "and the held-out loss turns upwards [%(default)s]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--max_steps", type=int, default=1000, help="updates of the weights [%(default)s]")
    add("--batch_tokens", type=int, default=2048, help="target tokens per step [%(default)s]")
    add("--micro_batch", type=int, help="rows computed at once; lower it when memory runs out: the "
        "optimisation stays the same [as many as make 16384 tokens]")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns more from "
        "each batch, and needs torch 2.9 [%(default)s]")
    add("--lr", type=float, default=2e-3, help="peak learning rate [%(default)s]")
    add("--weight_decay", type=float, default=0.1, help="of the matrices, times the learning rate "
        "[%(default)s]")
    add("--warmup_steps", type=int, default=30, help="steps until --lr is reached [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; a longer one "
        "is scaled down to it [%(default)s]")
    add("--seed", type=int, default=1, help="of first weights, batches, dropout [%(default)s]")
    add = parser.add_argument_group("running").add_argument
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=tuple(DTYPES), help="of products [the best one here]")
    add("--compile", action=argparse.BooleanOptionalAction, help="let torch.compile fuse the step "
        "[on a GPU, and in long runs on a CPU, where it works and is faster]")
    add("--eval_every", type=int, help="steps between evaluations [a tenth of the run]")
    add("--eval_tokens", type=int, default=32768, help="held-out tokens then; at the end: all "
        "[%(default)s]")
    add("--save_every", type=int, help="steps between checkpoints [as --eval_every]")
    add("--log_every", type=int, default=10, help="steps between log lines [%(default)s]")
    return parser


# What a resumed run may change: nothing that would make it another run than the one that stopped,
# but for its length (which moves the learning rate from then on) and where and how it computes.
MAY_CHANGE = {"out", "resume", "max_steps", "micro_batch", "device", "dtype", "compile",
              "eval_every", "eval_tokens", "save_every", "log_every"}


def parse(parser, argv) -> argparse.Namespace:
    """Flags, with whole paths for the data, so that a run can be resumed from another folder."""
    args = parser.parse_args(argv)
    if args.val_data and not args.data:
        raise ValueError("--val_data without --data: the plays have held-out ones of their own")
    for name in "data", "val_data":
        if getattr(args, name):
            setattr(args, name, [str(Path(path).resolve()) for path in getattr(args, name)])
    return args


def settle(argv):
    """Flags -> (settings, tensors of the run to resume or None, what that run noted)."""
    parser = make_parser()
    args, tensors, noted = parse(parser, argv), None, {}
    if args.resume:
        states = sorted(Path("out").glob("*/trainer_state.safetensors"),
                        key=lambda file: file.stat().st_mtime)
        out = Path(args.out) if args.out else states[-1].parent if states else Path("out")
        if not (out / "trainer_state.safetensors").is_file():
            raise ValueError(f"nothing to resume: {out} holds no trainer_state.safetensors")
        tensors, noted = read_safetensors(out / "trainer_state.safetensors")
        noted = {name: json.loads(text) for name, text in noted.items()}
        if "args" not in noted:
            raise ValueError(f"{out / 'trainer_state.safetensors'} is not the state of a run")
        parser.set_defaults(**noted["args"])    # a flag given again wins over the saved value
        args = parse(parser, argv)
        args.out = str(out)
        for name, value in noted["args"].items():
            if name not in MAY_CHANGE and getattr(args, name) != value:
                raise ValueError(f"--{name} was {value} in {out} and can't become "
                                 f"{getattr(args, name)} now: leave it out, or start a new run")
    for name in ("block_size", "max_steps", "batch_tokens", "micro_batch", "lr", "grad_clip",
                 "eval_every", "eval_tokens", "save_every", "log_every"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be above 0")
    if args.batch_tokens % args.block_size:
        nearest = max(1, round(args.batch_tokens / args.block_size)) * args.block_size
        raise ValueError(f"--batch_tokens {args.batch_tokens} is not a whole number of rows of "
                         f"--block_size {args.block_size}; the nearest that is: {nearest}")
    rows = args.batch_tokens // args.block_size
    if args.micro_batch and rows % args.micro_batch:
        raise ValueError(f"--micro_batch {args.micro_batch} does not divide the {rows} rows that "
                         f"--batch_tokens {args.batch_tokens} makes")
    make_config(args, args.vocab_size)          # a shape that does not fit is refused here
    return args, tensors, noted


def make_config(args, vocab_size: int) -> GPTConfig:
    return GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_embd, args.n_head,
                     args.n_kv_head, dropout=args.dropout)


# ---------------------------------------------------------------- data

def run(script: str, *arguments):
    """Run another script of this project, after printing the command. Its errors are its own."""
    arguments = [str(argument) for argument in arguments]
    print("$ python " + shlex.join([str(nearby(HERE / script)), *arguments]), flush=True)
    code = subprocess.run([sys.executable, str(HERE / script), *arguments]).returncode
    if code:
        sys.exit(code)


def data_name(args) -> str:
    return Path(args.data[0]).stem if args.data else "shakespeare"


def token_files(args) -> tuple[Path, Path | None]:
    """The token ids of --data and --val_data: files, made by bpe.py where they are not there yet.

    Those of a text are in data/tokens/NAME-SIZE-KEY. KEY is a digest of all that they depend on:
    the text files (name, size, time of change), the size of the vocabulary, and bpe.py itself.
    Whatever changes, the key changes, so that nothing stale can be found.
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
        if len(data) > 1 or len(val) > 1 or {path.suffix for path in everything} != {".npy"}:
            raise ValueError("give text, or one .npy file of tokens (and one for --val_data)")
        return data[0], val[0] if val else None

    facts = [(HERE / "bpe.py").read_bytes(), args.vocab_size, len(data)]
    for path in everything:
        files = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path]
        facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = nearby(HERE / "data" / "tokens" / f"{data_name(args)}-{args.vocab_size}-{key}")
    part = {"train": [] if val else ["--part", "0:0.9"], "val": [] if val else ["--part", "0.9:1"]}
    # bpe.py writes each file whole, and these last: what is there is complete.
    if not (folder / "tokenizer_config.json").exists():
        # GPT-2's split keeps a line's end apart from what stands before it. In newer ones ":\n" can
        # be one token, and after a prompt that ends in "ROMEO:" the model is in a place where it
        # never was.
        run("bpe.py", "train", *data, *part["train"], "--vocab_size", args.vocab_size,
            "--pattern", "gpt2", "--out", folder)
    for name, texts in ("train", data), ("val", val or data):
        if not (folder / f"{name}.json").exists():
            run("bpe.py", "encode", *texts, *part[name], "--tokenizer", folder,
                "--out", folder / f"{name}.npy")
    return folder / "train.npy", folder / "val.npy"


def nearby(path: Path) -> Path:
    """The short way to write a path, where there is one."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def open_tokens(path: Path) -> tuple[np.ndarray, dict]:
    """-> (ids, as a view of the file; what bpe.py noted about them in the .json beside, or {})."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of token ids: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not a row of ids")
    beside = path.with_suffix(".json")
    noted = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    if noted and noted.get("tokens") != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens, but {beside.name} says "
                         f"{noted.get('tokens')}: delete both and encode again")
    return tokens, noted


def mix(*numbers: int) -> int:
    """A number below 2^63 for each tuple of numbers: random-looking, and the same everywhere."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(i: int, n: int, *key: int) -> int:
    """Where i goes in the key's shuffle of range(n), without a table of n entries.

    A Feistel network: the halves of i's bits are mixed into each other in turn, which could be
    undone step by step, so no two i meet. It shuffles the numbers below the next power of 4; one
    that lands at n or above is shuffled again.
    """
    half = (max(1, (n - 1).bit_length()) + 1) // 2
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(right, turn, *key) & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


def batch(tokens: np.ndarray, step: int, rows: int, T: int, seed: int):
    """Rows of training text for a step: tokens (B, T) and, one place later, targets (B, T).

    The text is cut into windows of T tokens. An epoch takes each of them once, in an order of its
    own, and cut at places of its own, so that the model meets new beginnings.
    """
    n = max(1, len(tokens) // T - 1)        # one window less than there are: room for the shift
    starts = []
    for epoch, i in (divmod(row, n) for row in range(step * rows, (step + 1) * rows)):
        shift = mix(seed, epoch) % min(T, len(tokens) - n * T)
        starts.append(shift + T * shuffled(i, n, seed, epoch))
    both = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
    return both[:, :-1], both[:, 1:]


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, T: int, rows: int, device, autocast, at_most: int) -> dict:
    """Mean loss on held-out text, in nats per token, over windows of T tokens side by side.

    Each token but the first is predicted once, from what its window holds before it; `rows` windows
    are computed at once. If there are more than at_most tokens, it takes evenly spread windows with
    about that many together.
    """
    starts = range(0, len(tokens) - 1, T)[:: math.ceil(len(tokens) / at_most)]
    total, count = 0.0, 0
    model.eval()
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
    model.train()
    return {"val_loss": total / count, "val_tokens": count}


# ---------------------------------------------------------------- checkpoints

def save(out: Path, model, optimizers, notes: dict, extra: dict):
    """Replace the checkpoint, then the model for others, each in one step. Raises OSError.

    trainer_state.safetensors holds all that resuming needs, the weights too, so that a kill between
    the two does no harm: model.safetensors is one save behind at worst.
    """
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    write_safetensors(out / "trainer_state.safetensors", tensors,
                      {name: json.dumps(value) for name, value in notes.items()})
    model.save_pretrained(out, **extra)


def restore(tensors: dict, model, optimizers):
    """Put a checkpoint back. Tensors are copied, because a product of matrices can differ in the
    last bit with the alignment of its memory, and views of a file are aligned otherwise."""
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()
                           if name.startswith("model.")})
    for number, optimizer in enumerate(optimizers):
        state = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                *_, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor.clone()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def copy_tokenizer(folder: Path, out: Path) -> dict:
    """Put the tokenizer beside the model; return what config.json says of it ({}: none there)."""
    if not (folder / "tokenizer_config.json").exists():
        return {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with write_whole(out / name) as file:
            file.write((folder / name).read_bytes())
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    extra = {f"{kind}_token_id": ids[names[f"{kind}_token"]] for kind in ("bos", "eos")
             if names.get(f"{kind}_token") in ids}
    with write_whole(out / "generation_config.json") as file:
        file.write(json.dumps(extra, indent=2).encode())
    return extra


def rewind(metrics: Path, step: int):
    """Drop the lines after `step`: a killed run has measured what it then lost."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with write_whole(metrics) as file:
            file.write("".join(kept).encode())


def draw(out: Path):
    """OUT/loss.svg from OUT/metrics.jsonl."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    draw_losses(out / "loss.svg", {
        "training": [(row["step"], row["loss"]) for row in rows if row["loss"] is not None],
        "held out": [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss")],
    }, "step", "loss, nats per token")


# ---------------------------------------------------------------- the story

def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def train(argv=None) -> int:
    """Run it all. Returns the exit code; raises ValueError or OSError, one line, for bad input."""

    # ---- 1. What is asked for. What can be refused is refused before anything is written.
    args, tensors, noted = settle(argv)
    device = pick_device(args.device)
    name, number = data_name(args), 2
    out = Path(args.out or f"out/{name}")
    while not args.out and out.exists():        # a new run never overwrites an old one
        out, number = Path(f"out/{name}-{number}"), number + 1
    if not args.resume and any(out.glob("*.safetensors")):
        raise ValueError(f"{out} holds a model: go on with it by --resume, or choose another --out")
    T, rows = args.block_size, args.batch_tokens // args.block_size
    micro_batch = args.micro_batch or next(n for n in range(rows, 0, -1)
                                           if rows % n == 0 and n * T <= max(T, 16384))
    print(f"Getting the text, cutting it into tokens, training {args.n_layer} layers on them for "
          f"{args.max_steps} steps, saving to {out}, letting the model speak.")

    # ---- 2. Text becomes token ids.
    train_file, val_file = token_files(args)
    train_tokens, about = open_tokens(train_file)
    if val_file:
        val_tokens, val_about = open_tokens(val_file)
        if val_about.get("tokenizer") != about.get("tokenizer"):
            raise ValueError(f"{train_file} and {val_file} were made by different tokenizers")
    else:
        cut = len(train_tokens) * 9 // 10
        train_tokens, val_tokens, val_about = train_tokens[:cut], train_tokens[cut:], {}
    for kind, tokens in ("training", train_tokens), ("held-out", val_tokens):
        if len(tokens) < T + 1:
            raise ValueError(f"the {kind} text has {len(tokens)} tokens, less than one row of "
                             f"--block_size {T} and its next token: more text, or a lower number")
    vocab_size = about.get("vocab_size") or int(max(train_tokens.max(), val_tokens.max())) + 1
    if not about and min(train_tokens.min(), val_tokens.min()) < 0:
        raise ValueError(f"{train_file} holds negative numbers: those are no token ids")
    data = {"tokens": len(train_tokens), "tokenizer": about.get("tokenizer")}
    if args.resume and noted["data"] != data:
        raise ValueError(f"the text has changed since {out} was begun: {noted['data']} then, "
                         f"{data} now; put it back, or start a new run")
    # Bits per byte compares models whatever their tokenizers: nats per token, divided by bytes per
    # token of the held-out text, in bits. For ids of an unknown text there is none.
    bits = (len(val_tokens) - 1) / val_about["bytes"] / math.log(2) if val_about else None

    # ---- 3. The model and its optimizers.
    torch.manual_seed(args.seed)
    model = GPT(make_config(args, vocab_size)).to(device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    dtype = pick_dtype(device, args.dtype)
    # Noted by name, so that a resumed run multiplies in the same type without asking again.
    args.dtype = next(name for name, known in DTYPES.items() if known == dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step, seconds_before, skipped = 0, 0.0, 0
    if args.resume:
        restore(tensors, model, optimizers)
        tensors = None      # lets go of the file, which is about to be replaced
        if noted["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(noted["scaler"])
        step, seconds_before = noted["step"], noted["seconds"]
        if step > args.max_steps:
            raise ValueError(f"{out} has done {step} steps already, more than --max_steps "
                             f"{args.max_steps}")
    c = model.config
    print(f"data    {len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out; "
          f"vocabulary {vocab_size:,}\n"
          f"model   {model.count_parameters():,} parameters: {c.n_layer} layers, {c.n_embd} wide, "
          f"{c.n_head} heads ({c.n_kv_head} for keys and values), "
          f"{model.flops_per_token() / 1e6:,.0f} million operations a token\n"
          f"batch   {args.batch_tokens:,} tokens = {rows} rows of {T}, {micro_batch} at once; "
          f"{args.max_steps:,} steps = "
          f"{args.max_steps * args.batch_tokens / len(train_tokens):.1f} epochs")

    # ---- 4. A trial: how long does a step take, and does torch.compile shorten it?
    def trial(forward) -> float:
        tokens, targets = batch(train_tokens, 0, micro_batch, T, args.seed)
        times = []
        for _ in range(4):      # the first time warms up; of the others the least disturbed counts
            start = time.perf_counter()
            accumulate_gradients(forward, tokens, targets, micro_batch, device, autocast, scaler)
            times.append(time.perf_counter() - start)
        model.zero_grad()
        return min(times[1:]) * rows / micro_batch
    forward, per_step = model, trial(model)
    # On a CPU compiling takes about a minute and wins a tenth to a third of a step.
    patient = device.type == "cuda" or per_step * (args.max_steps - step) > 900     # seconds
    if args.compile or (args.compile is None and patient):
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
          f"{clock(per_step * (args.max_steps - step))}; Ctrl-C saves and stops", flush=True)

    # ---- 5. From here on things are written.
    args.eval_every = args.eval_every or max(1, math.ceil(args.max_steps / 10))
    args.save_every = args.save_every or args.eval_every
    out.mkdir(parents=True, exist_ok=True)
    extra = copy_tokenizer(train_file.parent, out)
    rewind(out / "metrics.jsonl", step)
    metrics = open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1)   # whole lines
    stopped_by = []         # filled by a signal, looked at once a step

    def stop(number, frame):
        if stopped_by:
            raise KeyboardInterrupt     # asked twice: at once
        stopped_by.append(number)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # On a terminal the line of a step replaces the one before.
    again, newline, end = ("\r", "\n", "") if sys.stdout.isatty() else ("", "", "\n")
    begin = time.perf_counter()
    since, since_step = begin, step

    stopping = False
    while step < args.max_steps and not stopping:
        # ---- One step.
        torch.manual_seed(mix(args.seed, step))     # dropout, too, is a function of the step
        lr = learning_rate(step, args.lr, args.warmup_steps, args.max_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        tokens, targets = batch(train_tokens, step, rows, T, args.seed)
        loss = accumulate_gradients(forward, tokens, targets, micro_batch, device, autocast, scaler)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        if math.isfinite(grad_norm):
            skipped = 0
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:       # to take such a step would ruin the weights
            skipped += 1
            print(f"{newline}step {step + 1}: the gradient is not finite, weights left as they are")
            if skipped == 20:
                raise ValueError("20 such steps in a row: try a lower --lr, or --dtype fp32")
        scaler.update()
        model.zero_grad()
        step += 1

        # ---- Once in a while: say where we are, evaluate, save.
        last, stopping, now = step == args.max_steps, bool(stopped_by), time.perf_counter()
        evaluating = last or step % args.eval_every == 0
        saving = last or stopping or step % args.save_every == 0
        logging = evaluating or step % args.log_every == 0
        row = {"step": step, "tokens": step * args.batch_tokens,
               "seconds": round(seconds_before + now - begin, 3), "loss": loss, "lr": lr,
               "grad_norm": grad_norm}
        if logging:
            speed = (step - since_step) / (now - since)     # steps per second, of late
            print(f"{again}step {step:>5}/{args.max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
                  f"grad_norm {grad_norm:5.2f}  {speed * args.batch_tokens:>7,.0f} tokens/s  "
                  f"{clock((args.max_steps - step) / speed)} left ", end=end, flush=True)
        if evaluating:
            at_most = len(val_tokens) if last else args.eval_tokens
            row |= evaluate(model, val_tokens, T, micro_batch, device, autocast, at_most)
            words = f"held out: {row['val_loss']:.4f} nats per token"
            if bits:
                row["val_bpb"] = row["val_loss"] * bits
                words += f", {row['val_bpb']:.4f} bits per byte"
            words += f", over all {row['val_tokens']:,} tokens" if last else ""
            print(f"{newline}step {step:>5}  {words}", flush=True)
        try:
            if logging:     # JSON has no nan
                metrics.write(json.dumps({key: value if math.isfinite(value) else None
                                          for key, value in row.items()}) + "\n")
            if saving:
                save(out, model, optimizers, {
                    "args": vars(args), "step": step, "seconds": row["seconds"], "data": data,
                    "scaler": scaler.state_dict()}, extra)
                draw(out)
        except OSError as error:
            print(f"{newline}could not write all of {out}, where the last whole checkpoint still "
                  f"stands: {error}", flush=True)
            if last or stopping:
                return 2
        if logging or saving:
            since, since_step = time.perf_counter(), step

    # ---- 6. The end, or a stop on the way.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    quoted = shlex.quote(str(out))
    if step < args.max_steps:
        print(f"{newline}stopped after step {step}, which is saved; to go on:\n"
              f"    python train.py --resume --out {quoted}")
        return 128 + stopped_by[0]
    if extra:
        run("sample.py", out, "--max_new_tokens", 150)
        print(f'\nNow you:  python sample.py {quoted} --prompt "ROMEO:"')
    return 0


def main(argv=None) -> int:
    try:
        return train(argv)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the first step, or asked for twice
        print("\ninterrupted; the last checkpoint, if there is one, stands", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Pretraining: from text to a language model, in one command.

    python train.py                                   # Shakespeare, minutes on a laptop's CPU
    python train.py --data book.txt --vocab_size 1024     # any text: .txt, .jsonl, folders
    python train.py --data tokens.npy --n_layer 12 --block_size 1024      # token ids made before
    python train.py --resume                          # go on with the newest run, after any stop
    python train.py --help                            # every flag, its unit and its default

The loop is short: take a batch of token rows, ask the model for the loss of each next token, follow
the gradient a small step downhill. The rest of this file is what keeps that honest and unbreakable:

- A batch is a pure function of (seed, step). Nothing about "where we were" needs to be saved.
- The loss of a step is a sum over target tokens divided by their number in the whole batch, however
  the batch is cut into pieces to fit the memory.
- A checkpoint is one file, OUT/trainer_state.safetensors, replaced in one step: killed at any
  moment, a run resumes and gives the losses it would have given (on a CPU in fp32: to the last bit).
- This script knows no text. bpe.py makes the token files; the commands are printed, to be run alone.

What appears in OUT: a model directory that transformers opens (config.json, model.safetensors,
tokenizer.json, ...), metrics.jsonl (one JSON object a line), loss.svg, trainer_state.safetensors.

Reading order: settings, data, checkpoints, then train(), which is the story from the first line to the last.
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

from gpt import (GPT, GPTConfig, accumulate_gradients, draw_losses, learning_rate, make_optimizers,
                 pick_device, pick_dtype, read_safetensors, write_safetensors, write_whole)

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- settings

def wrong_flag(message: str):
    """argparse would print its whole usage; one line is what a person reads."""
    raise ValueError(f"{message}; see --help")


def read_flags() -> argparse.ArgumentParser:
    """Every flag with its unit and default. The defaults are those of the Shakespeare run."""
    parser = argparse.ArgumentParser(
        description="Pretrain a GPT on text.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = wrong_flag
    add = parser.add_argument
    where = parser.add_argument_group("files").add_argument
    where("--data", nargs="+", metavar="FILE", help="text (.txt, .jsonl, a folder) or token ids (.npy);"
          " default: the plays of Shakespeare")
    where("--val_data", nargs="+", metavar="FILE", help="the same, for validation; default: the last"
          " tenth of --data, which is then not trained on")
    where("--out", metavar="DIR", help="where the run goes; default: out/NAME, numbered if taken")
    where("--resume", action="store_true", help="go on with the run in --out, or with the newest one")
    model = parser.add_argument_group("model (what is not given follows from --n_layer)").add_argument
    model("--vocab_size", type=int, default=4096, help="tokens in the vocabulary that bpe.py learns")
    model("--block_size", type=int, default=256, help="tokens in a row: how far back the model sees")
    model("--n_layer", type=int, default=4, help="layers; width and heads grow with them")
    for name in ("n_embd", "n_head", "n_kv_head", "n_inner"):
        model(f"--{name}", type=int, help="see GPTConfig in gpt.py")
    model("--dropout", type=float, default=0.0, help="raise when the text is small and the held-out"
          " loss turns upwards")
    step = parser.add_argument_group("optimisation").add_argument
    step("--max_steps", type=int, default=600, help="updates of the weights")
    step("--batch_tokens", type=int, default=8192, help="target tokens per step, over all pieces")
    step("--micro_batch", type=int, help="rows computed at once; default: what 16384 tokens make."
         " Lower it when memory runs out: the result stays the same")
    step("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns more from each"
         " token, and needs torch 2.9")
    step("--lr", type=float, default=3e-3, help="peak learning rate")
    step("--weight_decay", type=float, default=0.1, help="of the matrices")
    step("--warmup_steps", type=int, default=30, help="steps until --lr is reached")
    step("--grad_clip", type=float, default=1.0, help="longest gradient, as a vector of all weights")
    step("--seed", type=int, default=1, help="of the first weights, the batches and dropout")
    run = parser.add_argument_group("running").add_argument
    run("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest one here")
    run("--dtype", choices=("fp32", "bf16", "fp16"), help="to multiply in; default: the best one here")
    run("--compile", action=argparse.BooleanOptionalAction, help="let torch.compile fuse the step;"
        " default: where it works and the run is long enough to win the wait back")
    run("--eval_every", type=int, help="steps between evaluations; default: a tenth of the run")
    run("--eval_tokens", type=int, default=32768, help="held-out tokens then; at the end: all")
    run("--save_every", type=int, help="steps between checkpoints; default: as --eval_every")
    run("--log_every", type=int, default=10, help="steps between log lines")
    return parser


# What a resumed run may change: nothing that would make it another run than the one that stopped,
# but for its length (which moves the learning rate from then on) and the device.
MAY_CHANGE = {"out", "resume", "max_steps", "device", "eval_every", "save_every", "log_every"}


def newest_run(parent: Path) -> Path:
    """The run in `parent` that was saved last. Raises ValueError if there is none."""
    states = sorted(parent.glob("*/trainer_state.safetensors"), key=lambda f: f.stat().st_mtime)
    if not states:
        raise ValueError(f"nothing to resume: {parent} holds no run; start one without --resume")
    return states[-1].parent


def free_name(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2, -3, ...: a new run never overwrites an old one."""
    number = 1
    while (parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return parent / (name if number == 1 else f"{name}-{number}")


def settle(argv: list[str]):
    """Flags -> (settings, tensors of the run to resume or None, what it noted)."""
    parser = read_flags()
    args = parser.parse_args(argv)
    for name in ("max_steps", "batch_tokens", "micro_batch", "log_every", "eval_every", "save_every",
                 "eval_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not args.resume:
        return args, None, {}
    out = Path(args.out) if args.out else newest_run(Path("out"))
    if not (out / "trainer_state.safetensors").is_file():
        raise ValueError(f"nothing to resume: {out} holds no trainer_state.safetensors")
    tensors, noted = read_safetensors(out / "trainer_state.safetensors")
    noted = {name: json.loads(text) for name, text in noted.items()}
    before = noted["args"]
    parser.set_defaults(**before)           # flags that are given again win over the saved ones
    args = parser.parse_args(argv)
    for name, value in before.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise ValueError(f"--{name} was {value} in {out} and can't become {getattr(args, name)} "
                             "now: leave it out, or start a new run")
    args.out = str(out)
    return args, tensors, noted


# ---------------------------------------------------------------- data

def run(script: str, *arguments):
    """Run another script of this project, after printing the command. Its errors are its own."""
    words = [script, *map(str, arguments)]
    print("$ python " + shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]]).returncode
    if code:
        sys.exit(code)


def nearby(path: Path) -> Path:
    """The short way to write a path, for printing."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def shakespeare() -> tuple[Path, Path]:
    """The folders of the default text: training, validation. Fetched once."""
    names = ("shakespeare", "manual")       # the second is what data/shakespeare.py falls back to
    if not any((HERE / "data" / name).exists() for name in names):
        run("data/shakespeare.py")
    folder = next(HERE / "data" / name for name in names if (HERE / "data" / name).exists())
    return nearby(folder / "train"), nearby(folder / "val")


def token_files(args) -> tuple[Path, Path | None]:
    """Where the token ids of --data and --val_data are, made by bpe.py where they are not yet.

    Texts go to data/tokens/NAME-SIZE-KEY, where KEY is a digest of all that the tokens depend on:
    the files (name, size, time of change), the vocabulary's size and bpe.py itself. Whatever
    changes, the key changes, and nothing stale can be found.
    """
    data, val = args.data, args.val_data
    if data is None:
        data, val = ([str(folder)] for folder in shakespeare())
    missing = [name for name in data + (val or []) if not Path(name).exists()]
    if missing:
        raise ValueError(f"{missing[0]} does not exist")
    kinds = {Path(name).suffix == ".npy" for name in data + (val or [])}
    if kinds == {True} and len(data) == 1 and len(val or [0]) == 1:
        return Path(data[0]), Path(val[0]) if val else None
    if True in kinds:
        raise ValueError("give either text or one .npy file of tokens (and one for --val_data)")

    facts = [(HERE / "bpe.py").read_bytes().hex(), args.vocab_size, bool(val)]
    for name in data + (val or []):
        files = [f for f in sorted(Path(name).rglob("*")) if f.is_file()] or [Path(name)]
        facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = nearby(HERE / "data" / "tokens" / f"{data_name(args)}-{args.vocab_size}-{key}")
    # Each file is written whole, and its .json last: what is there is complete.
    if not (folder / "tokenizer_config.json").exists():
        run("bpe.py", "train", *data, "--vocab_size", args.vocab_size, "--out", folder,
            *([] if val else ["--part", "0:0.9"]))
    for file, names, part in (("train", data, "0:0.9"), ("val", val or data, "0.9:1")):
        if not (folder / f"{file}.json").exists():
            run("bpe.py", "encode", *names, "--tokenizer", folder, "--out", folder / f"{file}.npy",
                *([] if val else ["--part", part]))
    return folder / "train.npy", folder / "val.npy"


def data_name(args) -> str:
    return Path(args.data[0]).resolve().stem if args.data else "shakespeare"


def open_tokens(path: Path) -> tuple[np.ndarray, dict]:
    """-> (ids, as a view of the file; what bpe.py noted about them in the .json beside, or {})."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of token ids: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not a row of token ids")
    beside = path.with_suffix(".json")
    noted = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    if noted and noted["tokens"] != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens but {beside.name} says {noted['tokens']}: "
                         "delete both and encode again")
    return tokens, noted


def mix(*numbers: int) -> int:
    """A fixed random-looking number below 2^64 for each row of numbers, everywhere the same."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def shuffled(i: int, n: int, *key: int) -> int:
    """Where i goes in the key's shuffle of range(n), without a table of n entries.

    A Feistel network: halves of the bits of i are mixed into each other in turn, which can be
    undone, so no two i meet. It shuffles a power of 4; what lands at n or above goes round again.
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
    own, and with cuts at places of its own, so that the model meets new beginnings.
    """
    n = max(1, len(tokens) // T - 1)
    starts = []
    for epoch, i in (divmod(row, n) for row in range(step * rows, (step + 1) * rows)):
        shift = mix(seed, epoch) % min(T, len(tokens) - n * T)
        starts.append(shift + T * shuffled(i, n, seed, epoch))
    both = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
    return both[:, :-1], both[:, 1:]


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, T: int, device, autocast, at_most: int | None = None) -> dict:
    """Mean loss on held-out text, in nats per token, over windows of T tokens side by side.

    Each token but the first is predicted once, from what its window holds before it. With at_most,
    evenly spread windows of together about that many tokens.
    """
    starts = range(0, len(tokens) - 1, T)
    if at_most and at_most < len(tokens):
        starts = starts[:: math.ceil(len(starts) * T / at_most)]
    total, count, model = 0.0, 0, model.eval()
    for i in range(0, len(starts), 16):
        ids = np.zeros((len(starts[i:i + 16]), T + 1), np.int64) - 100
        for row, s in zip(ids, starts[i:i + 16]):
            row[:len(tokens[s:s + T + 1])] = tokens[s:s + T + 1]     # the last may be shorter
        ids = torch.from_numpy(ids).to(device)
        found = int((ids[:, 1:] != -100).sum())
        with autocast():
            total += model(ids[:, :-1].clamp(min=0), ids[:, 1:]).item() * found
        count += found
    model.train()
    return {"val_loss": total / count, "val_tokens": count}


# ---------------------------------------------------------------- checkpoints

def save(out: Path, model, optimizers, scaler, args, step: int, seconds: float, extra: dict):
    """Replace the two files of a checkpoint, each in one step. Raises OSError (disk full, ...).

    trainer_state.safetensors holds all that resuming needs, the weights too, so a kill between the
    two files does no harm: model.safetensors is for others, and one save behind at worst.
    """
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
    noted = {"args": vars(args), "step": step, "seconds": seconds, "scaler": scaler.state_dict()}
    write_safetensors(out / "trainer_state.safetensors", tensors,
                      {name: json.dumps(value) for name, value in noted.items()})
    model.save_pretrained(out, **extra)


def restore(tensors: dict, noted: dict, model, optimizers, scaler):
    """Put a checkpoint back. Copies, because products of matrices can differ in the last bit with
    the alignment of their memory, and views of a file are aligned otherwise."""
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
    scaler.load_state_dict(noted["scaler"])


def copy_tokenizer(tokens_folder: Path, out: Path) -> dict:
    """Put the tokenizer beside the model; return its entries for config.json ({} if there is none)."""
    if not (tokens_folder / "tokenizer.json").exists():
        return {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with write_whole(out / name) as file:
            file.write((tokens_folder / name).read_bytes())
    config = json.loads((tokens_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = json.loads((tokens_folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    extra = {f"{name}_token_id": ids[config[f"{name}_token"]] for name in ("bos", "eos")
             if config.get(f"{name}_token") in ids}
    with write_whole(out / "generation_config.json") as file:
        file.write(json.dumps(extra, indent=2).encode())
    return extra


# ---------------------------------------------------------------- the story

def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:02} s"


def shape(args, vocab_size: int) -> dict:
    """The flags that make a GPTConfig."""
    return {"vocab_size": vocab_size} | {name: getattr(args, name) for name in
            ("block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "n_inner", "dropout")}


def train(argv=None) -> int:
    """Run it all. Returns the exit code; raises ValueError or OSError, one line, for bad input."""
    # ---- 1. What is asked for. All that can be refused is refused before anything is written.
    args, tensors, noted = settle(argv)
    T = args.block_size
    GPTConfig(**shape(args, args.vocab_size))
    device = pick_device(args.device)
    if args.batch_tokens % T:
        raise ValueError(f"--batch_tokens {args.batch_tokens} is not a whole number of rows of "
                         f"--block_size {T}; the nearest: {max(1, round(args.batch_tokens / T)) * T}")
    rows = args.batch_tokens // T
    micro_batch = args.micro_batch or max(1, min(rows, 16384 // T))
    out = Path(args.out) if args.out else free_name(Path("out"), data_name(args))
    if (out / "trainer_state.safetensors").exists() and not args.resume:
        raise ValueError(f"{out} holds a run: go on with it by --resume, or choose another --out")
    print(f"Get the text, cut it into tokens, train {args.n_layer} layers on them for {args.max_steps} "
          f"steps, save to {out}, and let the model speak.")

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
    for name, tokens in ("training", train_tokens), ("validation", val_tokens):
        if len(tokens) < T + 1:
            raise ValueError(f"the {name} text has {len(tokens)} tokens, less than one row of "
                             f"--block_size {T} and its next token: give more text or a lower number")
    vocab_size = about.get("vocab_size") or int(max(train_tokens.max(), val_tokens.max())) + 1
    # Bits per byte compares models with different tokenizers: nats per token, times tokens per
    # byte of the held-out text, in bits. Of tokens without a known text there is none.
    bytes_per_token = val_about["bytes"] / (len(val_tokens) - 1) if val_about else None

    # ---- 3. The model and its optimizer.
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(**shape(args, vocab_size))).to(device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    if args.dtype is None:      # noted in args, as what was picked, so that a resumed run does the same
        dtype = pick_dtype(device)
        args.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    dtype = pick_dtype(device, args.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step, seconds_before = 0, 0.0
    if tensors:
        restore(tensors, noted, model, optimizers, scaler)
        step, seconds_before = noted["step"], noted["seconds"]
    print(f"data    {len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out; vocabulary "
          f"{vocab_size:,}")
    c = model.config
    print(f"model   {model.count_parameters():,} parameters: {c.n_layer} layers, {c.n_embd} wide, "
          f"{c.n_head} heads ({c.n_kv_head} for keys and values), {T} tokens of context")
    print(f"batch   {args.batch_tokens:,} tokens = {rows} rows of {T}, computed {micro_batch} at once; "
          f"{args.max_steps:,} steps = {args.max_steps * args.batch_tokens / len(train_tokens):.1f} epochs")

    # ---- 4. A trial: how long does a step take, and does torch.compile shorten it?
    def trial(forward) -> float:
        tokens, targets = batch(train_tokens, 0, min(rows, micro_batch), T, args.seed)
        for _ in range(2):      # the first time warms up; the second is measured
            start = time.perf_counter()
            accumulate_gradients(forward, tokens, targets, micro_batch, device, autocast, scaler)
        model.zero_grad()
        return (time.perf_counter() - start) * rows / min(rows, micro_batch)
    forward, per_step = model, trial(model)
    patient = device.type == "cuda" or per_step * (args.max_steps - step) > 150     # seconds
    if args.compile or args.compile is None and patient:
        start = time.perf_counter()
        try:
            fused = torch.compile(model, dynamic=False)
            fused_step = trial(fused)
            print(f"compile {time.perf_counter() - start:.0f} s once, then {per_step / fused_step:.2f} "
                  "times as fast")
            if args.compile or fused_step < 0.95 * per_step:
                forward, per_step = fused, fused_step
        except Exception as error:      # no C++ compiler, a platform without Triton, ...
            print(f"compile not possible here, going on without: {str(error).strip().splitlines()[0]}")
    args.compile = forward is not model
    print(f"run     on {device.type}, products in {args.dtype}{', compiled' if args.compile else ''}: about "
          f"{clock(per_step * (args.max_steps - step))}; Ctrl-C saves and stops", flush=True)

    # ---- 5. From here on things are written.
    args.eval_every = args.eval_every or max(1, math.ceil(args.max_steps / 10))
    args.save_every = args.save_every or args.eval_every
    out.mkdir(parents=True, exist_ok=True)
    extra = copy_tokenizer(train_file.parent, out)
    rewind(out / "metrics.jsonl", step)
    metrics = open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1)   # whole lines
    stopped_by = []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: stopped_by.append(number))
    live = sys.stdout.isatty()
    start, counted_from = time.perf_counter(), (time.perf_counter(), step)

    while step < args.max_steps and not stopped_by:
        # ---- One step.
        torch.manual_seed(mix(args.seed, step) % 2**63)     # dropout, too, is a function of the step
        lr = learning_rate(step, args.lr, args.warmup_steps, args.max_steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        tokens, targets = batch(train_tokens, step, rows, T, args.seed)
        loss = accumulate_gradients(forward, tokens, targets, micro_batch, device, autocast, scaler)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        # A gradient with inf or nan would ruin the weights for good; without it, only a step is lost.
        if math.isfinite(grad_norm):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        step += 1

        # ---- Once in a while: say where we are, evaluate, save.
        last = step == args.max_steps
        now = time.perf_counter()
        speed = (step - counted_from[1]) / (now - counted_from[0])      # steps per second, of late
        row = {"step": step, "tokens": step * args.batch_tokens,
               "seconds": round(seconds_before + now - start, 3), "loss": loss, "lr": lr,
               "grad_norm": grad_norm}
        if last or step % args.log_every == 0 or step % args.eval_every == 0:
            line = (f"step {step:>5}/{args.max_steps}  loss {loss:.4f}  lr {lr:.2e}  grad_norm "
                    f"{grad_norm:5.2f}  {speed * args.batch_tokens:>9,.0f} tokens/s  "
                    f"{clock((args.max_steps - step) / speed)} left")
            print(("\r" if live else "") + line, end="  " if live else "\n", flush=True)
            counted_from = (now, step)
        if last or step % args.eval_every == 0:
            row |= evaluate(model, val_tokens, T, device, autocast, None if last else args.eval_tokens)
            if bytes_per_token:
                row["val_bpb"] = row["val_loss"] / bytes_per_token / math.log(2)
            print(("\n" if live else "") + f"step {step:>5}  held out: {row['val_loss']:.4f} nats per token"
                  + (f", {row['val_bpb']:.4f} bits per byte" if bytes_per_token else "")
                  + (" (all of the held-out text)" if last else ""), flush=True)
            counted_from = (time.perf_counter(), step)
        if "val_loss" in row or step % args.log_every == 0:
            metrics.write(json.dumps(row) + "\n")
        if last or stopped_by or step % args.save_every == 0:
            try:
                save(out, model, optimizers, scaler, args, step, row["seconds"], extra)
                draw(out)
            except OSError as error:
                print(f"\ncheckpoint not written, the one before still stands: {error}", flush=True)
                if last or stopped_by:
                    return 2
            counted_from = (time.perf_counter(), step)

    # ---- 6. The end, or a stop on the way.
    if step < args.max_steps:
        print(f"\nstopped after step {step}, which is saved. Go on with:  python train.py --resume "
              f"--out {out}")
        return 128 + stopped_by[0]
    if extra:
        run("sample.py", out, "--max_new_tokens", 150)
        print(f'\nNow you:  python sample.py {out} --prompt "ROMEO:"')
    return 0


def rewind(metrics: Path, step: int):
    """Drop the lines after `step`: a killed run has measured what it then lost."""
    if metrics.exists():
        kept = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= step]
        with write_whole(metrics) as file:
            file.write("".join(kept).encode())


def draw(out: Path):
    """OUT/loss.svg from OUT/metrics.jsonl."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    curves = {"training": [(row["step"], row["loss"]) for row in rows],
              "held out": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]}
    draw_losses(out / "loss.svg", curves, "step", "loss, nats per token")


def main(argv=None) -> int:
    try:
        return train(argv)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before there was anything to save
        print("\ninterrupted; no run was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Finetuning: a language model learns to answer (sft), then to prefer some answers (dpo).

    python train.py                     # a model that continues plays: out/shakespeare
    python finetune.py sft              # ... that replies to a speech, and stops: out/sft
    python finetune.py dpo              # ... and that says "thou", not "you": out/dpo
    python finetune.py sft --model DIR --data chats.jsonl --out out/mine     # any model and chats
    python finetune.py dpo --model out/mine --data prefs.jsonl --lora 8      # in less memory
    python finetune.py --resume         # continue the newest run, after any stop
    torchrun --standalone --nproc_per_node 8 finetune.py ...    # the same run on eight GPUs
    python bpe.py show chats.jsonl --tokenizer DIR      # what is learned of a chat, in green

Read train.py first: order, names and loop are the same, and so are its four promises. `diff
train.py finetune.py` shows what differs: the data, and what a row costs.

- SFT, supervised finetuning: rows are chats. Only what the assistant says costs something, and the
  token by which it stops. The loss is the mean over those tokens, in all rows of the batch.
- DPO, direct preference optimization (arXiv:2305.18290): rows are pairs of replies to one prompt.
  Reinforcement learning would need a reward model, samples and a value function. Here the model is
  its own reward model, by how much likelier it makes a reply than it did before the first step.
  That earlier model, the reference, is only one number per reply, computed before the first step.

Left out on purpose: other preference losses, averages over tokens instead of sums.
Reading order: settings, data, what a row costs, adapters, then finetune(), the story.
Letters as in gpt.py: B rows in a batch, N chats in a row (SFT 1, DPO 2), L tokens in the longest.
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
import zipfile
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gpt import (DTYPES, GPT, all_sum, full_state, init_distributed, insist,
                 keep_freed_memory, learning_rate, leave, load_checkpoint, make_optimizers,
                 move_to_device, out_of_memory, pick_device, pick_dtype, read_json, restore,
                 save_checkpoint, sum_gradients)

HERE = Path(__file__).resolve().parent
# Held-out rows that an evaluation takes. The last evaluation takes all.
EVAL_ROWS = 512

# ---------------------------------------------------------------- settings

class Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse itself would print its whole usage first
        raise ValueError(f"{message}; see --help")

def make_parser() -> Parser:
    """Every flag with its unit and default."""
    parser = Parser("finetune.py", description="Finetune a GPT. Defaults in brackets.")
    parser.add_argument("method", nargs="?", choices=("sft", "dpo"), help="learn to answer, prefer")
    add = parser.add_argument_group("files").add_argument
    files = {"nargs": "+", "metavar": "FILE", "type": os.path.abspath}
    add("--data", **files, help="chats or pairs: .jsonl; or one .npz of ids [Shakespeare's plays]")
    add("--val_data", **files, help="the same, to validate on [the last tenth of --data]")
    add("--model", metavar="DIR", type=os.path.abspath, help="[out/shakespeare; for dpo: out/sft]")
    add("--out", metavar="DIR", help="where the run goes [out/NAME, numbered if taken]")
    add("--resume", action="store_true", help="continue the run in --out [the newest], or begin it")
    add = parser.add_argument_group("optimisation").add_argument
    add("--beta", type=float, default=0.5, help="of dpo: lower lets it go further [%(default)s]")
    add("--lora", type=int, default=0, help="rank of adapters that learn [0: all weights learn]")
    add("--block_size", type=int, help="tokens of a chat, at most [as many as the model can see]")
    add("--batch", type=int, default=32, help="chats, or pairs, per step [%(default)s]")
    # DPO sees few rows: the preference is soon learned, and after that other things are forgotten.
    add("--epochs", type=float, help="how often each row is seen [sft: 1; dpo: 0.25]")
    add("--max_steps", type=int, help="updates [by --epochs]")
    add("--lr", type=float, help="peak learning rate [by the size of the model]")
    add("--warmup_steps", type=int, default=10, help="steps until --lr is reached [%(default)s]")
    add("--schedule", choices=("wsd", "cosine"), default="cosine",
        help="how the learning rate falls: in the last fifth, or all the way [%(default)s]")
    # Weight decay pulls towards 0, which is not where these weights began.
    add("--weight_decay", type=float, default=0.0, help="of matrices [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="the longest gradient norm [%(default)s]")
    add("--dropout", type=float, default=0.0, help="more if the held-out loss rises [%(default)s]")
    add("--seed", type=int, default=1, help="of adapters, batches, dropout [%(default)s]")
    add = parser.add_argument_group("running").add_argument
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=tuple(DTYPES), help="to compute in [the fastest safe one here]")
    add("--micro_batch", type=int, help="rows at once: fewer need less memory, and change nothing "
        "else [as many as make 4096 tokens, fewer when memory runs out]")
    add("--fsdp", action="store_true", help="shard the weights over the ranks of torchrun")
    add("--eval_every", type=int, help="steps between evaluations [a tenth of the run]")
    add("--save_every", type=int, help="steps between saves, and every half hour [as --eval_every]")
    add("--log_every", type=int, default=10, help="steps between log lines [%(default)s]")
    return parser

# What a resumed run may change: where and how it computes, and its length, which the learning rate
# follows. Anything else would make it another run than the one that stopped.
MAY_CHANGE = {"out", "resume", "max_steps", "device", "dtype", "micro_batch", "fsdp",
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
        low = 0 if name in ("seed", "dropout", "weight_decay", "warmup_steps", "lora") else 1e-30
        insist(type(value) not in (int, float) or low <= value < math.inf, f"--{name} is {value}; "
               f"it must be {'above' if low else 'at least'} 0, and finite")
    insist(args.data or not args.val_data, "--val_data without --data")
    insist(args.method, "say what to do: python finetune.py sft, or dpo")
    epochs, base = {"sft": (1.0, "out/shakespeare"), "dpo": (0.25, "out/sft")}[args.method]
    args.epochs, args.model = args.epochs or epochs, args.model or os.path.abspath(base)
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

def token_files(args) -> tuple[Path, Path, Path]:
    """The token ids of --data and --val_data: files, made by bpe.py where they do not exist yet.
    And the folder of the tokenizer that made them.
    Those of chats are in data/tokens/NAME-MODEL-KEY, with the model's tokenizer made ready for
    chats. KEY is a digest of all that they depend on: the files (name, size, time of change), the
    tokenizer, and bpe.py itself. Whatever changes, the key changes: nothing stale can be found."""
    data, val = args.data, args.val_data or []
    if data is None:
        folder = HERE / "data" / "shakespeare" / {"sft": "chat", "dpo": "prefs"}[args.method]
        if not folder.exists():
            run("data/shakespeare.py")
        insist(folder.exists(), "the plays could not be had: give --data")
        data, val = [folder / "train.jsonl"], [folder / "val.jsonl"]
    data, val = ([Path(path) for path in paths] for paths in (data, val))
    if data[0].suffix == ".npz":
        insist(len(data) == len(val) == 1, "give one .npz, and another one for --val_data")
        return data[0], val[0], Path(args.model)
    model = Path(args.model)
    insist((model / "tokenizer.json").exists(), f"there is no model with a tokenizer in {model}: "
           "train one with python train.py, or name one by --model")
    facts = [(HERE / "bpe.py").read_bytes(), (model / "tokenizer.json").read_bytes(), len(data)]
    files = [file for path in data + val for file in sorted(path.rglob("*")) or [path]]
    facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = HERE / "data" / "tokens" / f"{data[0].stem}-{model.name}-{key}"
    parts = ((0, 1), (0, 1)) if val else ((0, 0.9), (0.9, 1))
    # bpe.py writes these files last: if one is there, all is complete.
    if not (folder / "generation_config.json").exists():
        run("bpe.py", "chat", "--tokenizer", model, "--out", folder)
    for name, texts, part in ("train", data, parts[0]), ("val", val or data, parts[1]):
        if not (folder / f"{name}.npz.json").exists():
            run("bpe.py", "encode", *texts, "--part", *part, "--tokenizer", folder,
                "--out", folder / f"{name}.npz")
    return folder / "train.npz", folder / "val.npz", folder

@dataclass
class Rows:
    """Chats (N = 1), or pairs of a chosen and a rejected reply to the same prompt (N = 2)."""
    ids: np.ndarray         # of all chats, one after the other
    mask: np.ndarray        # where a token is to be learned
    spans: np.ndarray       # (rows, N, 2): where each chat begins and ends
    lengths: np.ndarray     # (rows,) of the longest chat of each, in tokens
    reference: np.ndarray   # (rows, N) for DPO: log-probabilities before the first step
    left_out: int           # rows with nothing to learn
    cut: int                # chats that lost their end
    def __len__(self):
        return len(self.spans)

def open_rows(path: Path, kind: str, T: int) -> tuple[Rows, dict]:
    """-> (the rows of a file, chats or pairs; what bpe.py noted beside it). Each chat is cut to
    T + 1 ids: T tokens and, shifted by one, T targets. Rows in which then nothing is to be learned
    are left out, and pairs whose two replies are the same."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, mask, offsets = file["ids"], file["mask"] != 0, file["offsets"]
        noted = read_json(f"{path}.json")
        insist(noted["kind"] == kind, f"it holds {noted['kind']}, and needed are {kind}")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}, of bpe.py encode, can't be used: {error}") from None
    begins, ends = offsets[:-1], np.minimum(offsets[1:], offsets[:-1] + T + 1)
    # A chat also ends after its last target: nothing that is learned depends on what follows.
    last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))[ends - 1]
    spans = np.stack([begins, last + 1], axis=1).reshape(-1, {"chats": 1, "pairs": 2}[kind], 2)
    lengths = np.diff(spans)[..., 0] - 1        # (rows, N); not above 0 where nothing is learned
    keep = (lengths > 0).all(axis=1)
    if kind == "pairs":
        keep &= [not np.array_equal(ids[a:b], ids[c:d]) for (a, b), (c, d) in spans.tolist()]
    insist(keep.any(), f"{path} has no {kind} to use: all {len(keep)} have nothing to learn within "
           f"{T} tokens, or two equal replies")
    spans, reference = spans[keep], np.zeros((keep.sum(), spans.shape[1]), np.float32)
    return Rows(ids, mask, spans, lengths[keep].max(axis=1), reference, int((~keep).sum()),
                int((ends < offsets[1:]).sum())), noted

@lru_cache(2)       # a batch can lie across the end of an epoch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n). RandomState and not default_rng: only its stream is frozen (NEP
    19), and a run that is resumed with a newer numpy must find the same order."""
    return np.random.RandomState([seed, epoch]).permutation(n)

def batch(data: Rows, step: int, rows: int, seed: int):
    """All rows of a step, for all ranks: tokens (rows, N, L), targets (rows, N, L), reference
    (rows, N). An epoch takes each row once, in an order of its own.
    Rows of similar length stand together, so that a micro-batch holds little padding. The longest
    come first, so that memory runs out at once or never. Each rank will take every world_size-th
    of them, so that all have about the same number of tokens."""
    n = len(data)
    numbers = [epoch_order(n, seed, epoch)[i]
               for epoch, i in (divmod(row, n) for row in range(step * rows, (step + 1) * rows))]
    numbers.sort(key=lambda number: -data.lengths[number])
    return *pad(data, numbers), torch.from_numpy(data.reference[numbers])

def pad(data: Rows, numbers):
    r"""Rows of these numbers -> tokens (B, N, L), targets (B, N, L).

        ids         <|im_start|> user \n Gone! <|im_end|> \n ... assistant \n Ay <|im_end|>
        mask              0        0   0   0       0       0         0      0  1      1
        tokens      <|im_start|> user \n Gone! <|im_end|> \n ... assistant \n Ay
        targets          -100     -100 ...                         -100    Ay <|im_end|>

    Shorter chats are padded on the right, where causal attention never looks: no mask is needed."""
    spans = data.spans[numbers]                                                     # (B, N, 2)
    tokens = torch.zeros(*spans.shape[:2], int(data.lengths[numbers].max()), dtype=torch.long)
    targets = torch.full_like(tokens, -100)
    for row, n in np.ndindex(spans.shape[:2]):
        begin, end = spans[row, n]
        chat, mask = data.ids[begin:end].astype(int), data.mask[begin + 1:end]
        tokens[row, n, :end - begin - 1] = torch.from_numpy(chat[:-1])
        targets[row, n, :end - begin - 1] = torch.from_numpy(np.where(mask, chat[1:], -100))
    return tokens, targets

# ---------------------------------------------------------------- what a row costs

def nll(model, tokens, targets) -> torch.Tensor:
    """Negative log-likelihood of each chat's targets, summed: (B, N, L), (B, N, L) -> (B, N)."""
    # Cut what is padding in all of these rows, before they go to the GPU, which can't tell at once.
    L = int((targets != -100).flatten(0, 1).any(0).nonzero().max()) + 1
    rows = (x[..., :L].flatten(0, 1).to(model.lm_head.weight.device) for x in (tokens, targets))
    return model(*rows, reduction="none").sum(-1).view(tokens.shape[:2])

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float):
    """-> (losses, rewards of the chosen, rewards of the rejected), each (B,).
    In: log-probabilities of replies given their prompt, (B,), summed over the tokens of a reply, by
    the model and by the reference. beta: 0.1 to 0.5 is usual; lower lets the model go further."""
    # A reply's reward: how much likelier the model makes it than the reference did (section 4).
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    # Equation 7: sigmoid(margin) is the probability, by Bradley and Terry, that the chosen reply is
    # preferred. A model that equals its reference has the margin 0 and the loss ln 2.
    losses = -F.logsigmoid(reward_chosen - reward_rejected)
    return losses, reward_chosen.detach(), reward_rejected.detach()

# Whether DPO works: the margin should grow, and the reward of the chosen replies should not fall
# far below 0, which would mean that they become less likely, too. SFT has only its loss.
LOGGED = "rewards_chosen", "rewards_rejected", "margin", "accuracy"

def cost(nll, reference, beta: float):
    """nll, reference (B, N) -> the loss, summed over target tokens (N = 1: SFT) or over pairs (N =
    2: DPO), and for DPO the sums of what LOGGED names. Sums and not means, because only the caller
    knows how many rows the whole batch has."""
    if nll.shape[1] == 1:
        return nll.sum(), np.zeros(0)
    losses, good, bad = dpo_loss(*(-nll).unbind(1), *reference.to(nll.device).unbind(1), beta)
    logged = torch.stack([good, bad, good - bad, (good > bad).to(good.dtype)])
    return losses.sum(), logged.sum(1).cpu().numpy()

@torch.no_grad()
def log_probabilities(model, data: Rows, numbers, micro_batch, rank, world_size, autocast):
    """Of the targets of each chat of these rows, summed: (len(numbers), N) in fp64. A collective:
    each rank computes its share."""
    order = np.argsort(-data.lengths[numbers], kind="stable")
    # Under FSDP a forward pass is a collective: all ranks must make the same number of them. So
    # some take a row that another has, too, and what they find is dropped at the end.
    places = np.arange(-(-len(order) // world_size) * world_size)
    logps = torch.zeros(len(places), data.spans.shape[1], dtype=torch.float64)
    for piece in torch.from_numpy(places[rank::world_size]).split(micro_batch):
        tokens, targets = pad(data, numbers[order[piece.numpy() % len(order)]])
        with autocast():
            logps[piece] = -nll(model, tokens, targets).cpu().double()
    return all_sum(logps)[np.argsort(order)]        # from the order of lengths to that of numbers

def evaluate(model, data: Rows, beta: float, at_most: int, *how) -> dict:
    """Means over held-out rows: over their target tokens (SFT) or over the pairs (DPO). If there
    are more than at_most rows, it takes rows spread evenly over all lengths. A collective."""
    numbers = np.argsort(data.lengths, kind="stable")[::math.ceil(len(data) / at_most)]
    logps = log_probabilities(model, data, numbers, *how)
    loss, logged = cost(-logps, torch.from_numpy(data.reference[numbers]), beta)
    targets = sum(data.mask[begin + 1:end].sum() for begin, end in data.spans[numbers, 0])
    count = int(targets) if logps.shape[1] == 1 else len(numbers)
    return {"val_loss": loss.item() / count,
            **{f"val_{name}": value / count for name, value in zip(LOGGED, logged)}}

# ---------------------------------------------------------------- adapters

LORA_ALPHA = 32
class LoRA(nn.Linear):
    """y = x (W + s B A)^T + b with W and b frozen: A (r, in) and B (out, r) learn
    (arXiv:2106.09685, equation 3). So gradients and optimizer state are small. s = alpha / r makes
    the best learning rate about the same for each rank r, and ten times that for all weights
    (https://thinkingmachines.ai/blog/lora)."""
    def forward(self, x):
        more = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + more * (LORA_ALPHA / len(self.lora_a))

class Adapted(GPT):
    """A GPT with adapters. What it saves for others has none: W + s B A is a matrix like W."""
    def save_pretrained(self, directory, weights: dict | None = None, tokenizer=None):
        merged = dict(self.state_dict() if weights is None else weights)
        for name in [name for name in merged if name.endswith("lora_a")]:
            a, b = merged.pop(name), merged.pop(name[:-1] + "b")
            name = name.removesuffix("lora_a") + "weight"
            merged[name] = merged[name] + LORA_ALPHA / len(a) * b @ a
        super().save_pretrained(directory, merged, tokenizer)

def add_lora(model: GPT, rank: int):
    """Put adapters on all matrices of the layers, and freeze everything else. A begins at random
    and B at 0, so that the model begins as it was."""
    model.requires_grad_(False)
    model.__class__ = Adapted
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__, limit = LoRA, module.in_features ** -0.5
            a = module.weight.new_empty(rank, module.in_features).uniform_(-limit, limit)
            module.lora_a = nn.Parameter(a)
            module.lora_b = nn.Parameter(module.weight.new_zeros(module.out_features, rank))

# ---------------------------------------------------------------- the story

def grow(model: GPT, new: int, known: int):
    """Rows for `new` tokens, after the `known` ones: the mean of those. So the model expects them
    about as much as any token, and not, as with random rows, perhaps more than all that it knows
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    for matrix in {model.model.embed_tokens, model.lm_head}:
        rows = matrix.weight.data
        mean = rows[:known].mean(dim=0).expand(new, -1)     # rows to spare may follow already
        matrix.weight = nn.Parameter(torch.cat([rows[:known], mean, rows[known + new:]]))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.vocab_size = len(model.lm_head.weight)

def scale_run(args, model, rows: int):
    """Fill in what was not asked for: learning rate and steps, by the sizes of model and data.
    The larger the model, the lower the rate: the powers go through what was found good for the 2
    million parameters of the first run (1e-3 for SFT, 1e-4 for DPO) and what is usual for 7 billion
    (2e-5 and 5e-7)."""
    scale, power = {"sft": (1.45, -1 / 2), "dpo": (1.65, -2 / 3)}[args.method]
    rate = scale * model.count_parameters() ** power * (10 if args.lora else 1)
    args.lr = args.lr or float(f"{rate:.2g}")
    args.max_steps = args.max_steps or max(1, round(args.epochs * rows / args.batch))

signals = []        # those that came since the loop began
def note_signal(number, frame):
    """A signal is only noted when it comes, and answered after the step. A rank that left in the
    middle of a step would make the others wait for its gradients."""
    if signals and number == signal.SIGINT:
        raise KeyboardInterrupt         # Ctrl-C, twice: stop at once
    signals.append(number)

def finetune(argv=None) -> int:
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
    out = out_folder(args, args.method)
    rows, kind = args.batch, {"sft": "chats", "dpo": "pairs"}[args.method]
    insist(rows % world_size == 0, f"--batch {rows} can't be divided among {world_size} rank(s)")
    print(f"Cutting {kind} into tokens, training {args.model} on them, saving to {out}.")

    # ---- 2. Text becomes token ids: once, while the other ranks wait.
    if rank == 0:
        token_files(args)
    all_sum([0])
    train_file, val_file, tokenizer = token_files(args)
    pretrained = GPT.from_pretrained(args.model, dtype=torch.get_default_dtype())   # fp32
    sees = pretrained.config.block_size
    T = args.block_size = args.block_size or sees
    insist(T <= sees, f"--block_size {T}: {args.model} sees {sees}")
    (train_data, noted), (val_data, val_noted) = (open_rows(file, kind, T)
                                                  for file in (train_file, val_file))
    digest = [noted["digest"], val_noted["digest"]]
    insist(not saved or saved["digest"] == digest, f"the data has changed since {out} was begun: "
           "put it back, or start a new run")
    found = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    insist(noted["tokenizer"] == val_noted["tokenizer"] == found, f"{train_file} and {val_file} "
           f"were not encoded with the tokenizer in {tokenizer}")
    # It has the tokens of the model's own tokenizer, and after them the new ones of chats.
    known = len(read_json(Path(args.model, "tokenizer.json")).get("added_tokens", ()))
    new = len(read_json(tokenizer / "tokenizer.json").get("added_tokens", ())) - known

    # ---- 3. The model, and how long a run it deserves. Its adapters follow from the seed.
    torch.manual_seed(args.seed)
    if new:
        grow(pretrained, new, noted["vocab_size"] - new)
    # Copies. The opened weights are mapped from the file, and a matrix product can depend, in the
    # last bit, on how its memory is aligned. A resumed run would then differ.
    model = GPT(replace(pretrained.config, dropout=args.dropout))
    model.load_state_dict(pretrained.state_dict())
    del pretrained
    c, parameters = model.config, model.count_parameters()
    insist(noted["vocab_size"] <= c.vocab_size, f"{args.model} has {c.vocab_size} tokens; needed "
           f"are {noted['vocab_size']}")
    scale_run(args, model, len(train_data))
    if args.lora:
        add_lora(model, args.lora)
        if new:         # what is new knows nothing yet, so its matrices learn in any case
            model.model.embed_tokens.requires_grad_(True), model.lm_head.requires_grad_(True)
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    row_tokens = train_data.spans.shape[1] * train_data.lengths.mean()
    micro_batch = min(rows // world_size, args.micro_batch or max(1, int(4096 / row_tokens)))
    args.dtype = args.dtype or pick_dtype(device)
    sharded = args.fsdp and world_size > 1
    model = move_to_device(model, device, args.dtype, sharded)
    # Under autocast torch computes matrix products in the short type, and what needs range or
    # precision, such as softmax and losses, in fp32.
    def autocast():
        return torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32")
    print(f"data    {len(train_data):,} {kind} to train on ({train_data.left_out:,} left out, "
          f"{train_data.cut:,} cut to {T} tokens), {len(val_data):,} held out\n"
          f"model   {parameters:,} parameters, {learning:,} learn"
          f"{', the whole embedding among them' if args.lora and new else ''}; {new} new tokens\n"
          f"batch   {rows} {kind}, {micro_batch} at once, on {world_size} rank(s)\n"
          f"steps   {args.max_steps:,}: {args.max_steps * rows / len(train_data):.2f} epochs, "
          f"lr up to {args.lr:.2g}\n"
          f"run     on {device.type}, in {args.dtype}; Ctrl-C saves and stops", flush=True)
    how, V = (micro_batch, rank, world_size, autocast), c.vocab_size
    expected = f"to guess among {V} tokens costs ln {V} = {math.log(V):.4f}"
    # In a resumed run, too, the model is here what it was before the first step: the reference.
    model.eval()        # no dropout
    if args.method == "dpo":
        expected = f"a model that equals its reference has ln 2 = {math.log(2):.4f}"
        used = epoch_order(len(train_data), args.seed, 0)[:args.max_steps * rows]
        for data, numbers in (train_data, used), (val_data, np.arange(len(val_data))):
            data.reference[numbers] = log_probabilities(model, data, numbers, *how).float()
    elif not saved:
        found = evaluate(model, val_data, args.beta, EVAL_ROWS, *how)
        print(f"step     0  held out: loss {found['val_loss']:.4f}", flush=True)

    # ---- 4. The optimizer, and what a resumed run brings along.
    optimizers = make_optimizers(model, "adamw", args.lr, args.weight_decay)
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
        tokens, targets, reference = batch(train_data, step, rows, args.seed)   # (rows, N, L)
        learned = (targets != -100).sum().item()        # target tokens, of all ranks together
        count = rows if args.method == "dpo" else learned       # what the loss is a mean over
        mine = [x[rank::world_size] for x in (tokens, targets, reference)]
        # Dropout follows from the step, too, but no two ranks should drop the same units.
        dropout_seed = np.random.SeedSequence([args.seed, step, rank]).generate_state(1)

        # Forward and backward, micro_batch rows at a time; backward() adds to .grad. Each part is a
        # SUM over its target tokens, divided by the number in the WHOLE batch. So the gradients add
        # up to that of the mean over the batch, however it is cut. If each part were its own mean,
        # a token would count for more in a part with fewer targets.
        while True:
            loss = sums = 0.0
            torch.manual_seed(int(dropout_seed[0]))
            try:
                for i in range(0, rows // world_size, micro_batch):
                    piece = [x[i:i + micro_batch] for x in mine]
                    # Matrix products in bf16 or fp16, but weights, gradients and losses in fp32.
                    with autocast():
                        part, logged = cost(nll(model, *piece[:2]), piece[2], args.beta)
                    scaler.scale(part / count).backward()
                    loss += part.detach() / count       # detached, or it would keep the graph
                    sums += logged / count
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
        loss, stopping, late, *sums = all_sum([float(loss), len(signals), late, *sums]).tolist()

        # ---- Once in a while: log, evaluate, save, stop. The last step does all of it. The step in
        # which a signal came is saved, so that nothing is lost.
        done |= {"steps": step + 1, "tokens": done["tokens"] + learned, "seconds": now - started}
        last = step + 1 == args.max_steps
        evaluating = last or (step + 1) % args.eval_every == 0
        saving = last or stopping or late or (step + 1) % (args.save_every or args.eval_every) == 0
        logging = evaluating or (step + 1) % args.log_every == 0
        row = {"step": step + 1, "tokens": done["tokens"], "seconds": round(done["seconds"], 3),
               "loss": loss, "lr": lr, "grad_norm": grad_norm, **dict(zip(LOGGED, sums))}
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
            found = evaluate(model, val_data, args.beta, EVAL_ROWS, *how)
            better = found["val_loss"] < done["best"]
            done["best"] = min(found["val_loss"], done["best"])
            if last:            # at the end, over all that is held out
                found = evaluate(model, val_data, args.beta, len(val_data), *how)
            model.train()
            row |= found
            said = "  ".join(f"{name[4:]} {value:.4f}" for name, value in found.items())
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
                    save_checkpoint(out / "checkpoint.pt", state, script="finetune.py", done=done,
                                    args=vars(args), digest=digest, scaler=scaler.state_dict())
            except OSError as error:
                # A full disk should not end a run of days: somebody may make room in time.
                print(f"could not write all of {out}, where the last whole checkpoint still "
                      f"stands: {error}", flush=True)
                if last or stopping:
                    return 2
        if stopping and not last:
            print(f"stopped after step {step + 1}, which is saved; to continue:\n"
                  f"    python finetune.py --resume --out {shlex.quote(str(out))}", flush=True)
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
        if args.data is None:       # does it reply, and how often does it say thou, and you?
            run("sample.py", args.model, out, "--count",
                "(?i)th(ou|ee|y|ine|yself)", "(?i)ye|you(r|rs|rself|rselves)?",
                "--eval", HERE / "data" / "shakespeare" / "chat" / "val.jsonl")
        print(f"\nNow you:  python sample.py {shlex.quote(str(out))} --chat")
    return 0

def main(argv=None) -> int:
    """Errors in what people type or supply become one line. Anything else is a bug, and keeps its
    traceback."""
    try:
        return finetune(argv)
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the first step, or asked for twice
        print("interrupted; the last checkpoint, if there is one, is whole", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

if __name__ == "__main__":
    leave(main())

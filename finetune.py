# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Finetuning: a language model learns to answer (sft), then to prefer some answers (dpo).

    python train.py                     # a model that goes on writing plays: out/shakespeare
    python finetune.py sft              # ... that replies to a speech, and stops: out/sft
    python finetune.py dpo              # ... and that says "thou", not "you": out/dpo
    python finetune.py sft --model DIR --data chats.jsonl --out out/mine     # any model and chats
    python finetune.py dpo --model out/mine --data prefs.jsonl --lora 8      # in less memory
    python finetune.py --resume         # go on with the newest run, after any stop
    torchrun --nproc_per_node 8 finetune.py ...         # the same run on eight GPUs
    python bpe.py show chats.jsonl --tokenizer DIR      # what is learned of a chat, in green

Read it beside train.py: the order and the names are the same (`diff train.py finetune.py`), the
loop is the same function. What differs is a page: which tokens cost something, and how much.

- SFT, supervised finetuning: rows are chats; only what the assistant says costs something, and the
  token by which it stops. The loss stays the mean over those tokens, in all rows of a batch.
- DPO, direct preference optimization (arXiv:2305.18290): rows are pairs of replies to one prompt.
  What reinforcement learning would need (a reward model, samples, a value function) is left out:
  the model is its own reward model, by how much likelier it makes a reply than it did when it
  began. That beginning, the reference, is needed only as one number per token of each reply,
  computed once and kept in a file: no second model in memory.

Rows are of any length. Those computed at once stand one after the other in one packed row, in which
they don't see each other (GPT.forward, lengths): nothing is padded but inside attention.
What is longer than --block_size loses its end; a chat that has then nothing left to learn, and a
pair whose two replies are the same, is left out. Both are counted.
Left out on purpose: other preference losses, averages over tokens instead of sums.

Reading order: settings, data, what a row costs, adapters, then finetune(), the story.
Letters as in gpt.py: B rows in a batch, T tokens.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gpt import (DTYPES, GPT, Linear, accumulate_gradients, add_flags, add_up, exit_code, fit,
                 join_processes, nearby, open_for_training, out_folder, pick_device, pick_dtype,
                 process_count, process_number, read_flags, run, shard, shuffled, write_whole)

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- settings

def make_parser() -> argparse.ArgumentParser:
    """Every flag with its unit and default."""
    parser = argparse.ArgumentParser("finetune.py", description="Finetune a GPT on chats or on "
                                     "preferences. Defaults in brackets.")
    parser.add_argument("method", nargs="?", choices=("sft", "dpo"), help="learn to answer, or to "
                        "prefer")
    add = parser.add_argument_group("files").add_argument
    add("--data", nargs="+", metavar="FILE", help="chats, or preferences for dpo: .jsonl, or .npz "
        "of bpe.py encode [replies in the plays of Shakespeare]")
    add("--val_data", nargs="+", metavar="FILE", help="the same, to validate on; for dpo chats, "
        "too, whose loss is then watched [the last tenth of --data]")
    add("--model", metavar="DIR", help="the model to start from [out/shakespeare; dpo: out/sft]")
    add = parser.add_argument_group("size of the run").add_argument
    add("--block_size", type=int, help="tokens of a row, at most [as many as the model can see]")
    add("--batch", type=int, default=32, help="chats, or pairs, per step [%(default)s]")
    add("--lr", type=float, help="peak learning rate [by the size of the model]")
    add("--epochs", type=float, help="how often each row is seen [sft: 1; dpo: a quarter, because "
        "what is preferred is soon learned, and after that other things are forgotten]")
    add("--max_steps", type=int, help="updates of the weights [by --epochs]")
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=float, default=0.5, help="dpo: how strongly it is held to where it began; "
        "lower lets it go further, 0.1 to 0.5 is usual [%(default)s]")
    add("--label_smoothing", type=float, default=0.0, help="dpo: the share of pairs that you "
        "believe to be the wrong way round [%(default)s]")
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank instead "
        "of all weights [0: all weights]")
    add("--recompute", action=argparse.BooleanOptionalAction, default=False, help="compute layers "
        "again in the backward pass: less memory, a third more time")
    add_flags(parser)
    # Weight decay pulls towards 0, which is not where these weights began.
    parser.set_defaults(weight_decay=0.0, warmup_steps=10)
    return parser


def settle(argv):
    """Flags -> (settings, tensors of the run to resume or None, what that run noted)."""
    args, tensors, noted = read_flags(make_parser(), argv)
    if args.method is None:
        raise ValueError("say what to do: python finetune.py sft, or dpo")
    if args.lora < 0 or not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"--lora {args.lora} must be at least 0, --label_smoothing "
                         f"{args.label_smoothing} at least 0 and less than 0.5")
    args.epochs = args.epochs or (1.0 if args.method == "sft" else 0.25)
    args.model = args.model or str(
        Path("out", "shakespeare" if args.method == "sft" else "sft").resolve())
    for path in [args.model, *(args.data or []), *(args.val_data or [])]:
        if not Path(path).exists():
            raise ValueError(f"{nearby(Path(path))} does not exist")
    return args, tensors, noted


# ---------------------------------------------------------------- data

def chat_tokenizer(model: Path) -> tuple[dict, dict, int]:
    """-> tokenizer.json and tokenizer_config.json of a model made ready for chats, and how many
    tokens that took: <|im_start|> and <|im_end|>, where it lacks them; their ids are the last.

    The configuration tells others how chats were written, and what ends a reply.
    """
    from bpe import CHAT_TEMPLATE, CHAT_TOKENS      # how chats are written is said there, once
    if not (model / "tokenizer.json").exists():
        raise ValueError(f"{nearby(model)} holds no tokenizer.json: give token ids (.npz), "
                         "not chats")
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    config = model / "tokenizer_config.json"
    config = json.loads(config.read_text("utf-8")) if config.exists() else {}
    known = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first = 1 + max([*tokenizer["model"]["vocab"].values(), *known.values()])
    new = [name for name in CHAT_TOKENS if name not in known]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [{"id": first + i, "content": name, "special": True} | flags
                                  for i, name in enumerate(new)]
    if isinstance(config.get("bos_token"), dict):       # the way of older files
        config["bos_token"] = config["bos_token"]["content"]
    config |= {"chat_template": CHAT_TEMPLATE, "eos_token": CHAT_TOKENS[1]}
    return tokenizer, config, len(new)


def token_files(args) -> tuple[list[Path], list[Path], Path, int]:
    """The token ids of --data and --val_data: files, made by bpe.py where they are not there yet.
    Besides, the folder with the tokenizer that the result gets, and how many tokens are new in it.

    They are in data/tokens/NAME-MODEL-KEY. KEY is a digest of all that they depend on: the files
    (name, size, time of change), the tokenizer, and bpe.py itself. Whatever changes, the key
    changes: nothing stale can be found.
    """
    data, val, model = args.data, args.val_data, Path(args.model)
    if data is None:
        folder = HERE / "data" / "shakespeare"
        if not (folder / "prefs").exists():
            run("data/shakespeare.py")
        if not (folder / "prefs").exists():
            raise ValueError("the plays could not be had: give --data")
        data, val = [folder / "chat/train.jsonl"], [folder / "chat/val.jsonl"]
        if args.method == "dpo":
            data, val = [folder / "prefs/train.jsonl"], [folder / "prefs/val.jsonl", *val]
    data, val = ([nearby(Path(path)) for path in paths or []] for paths in (data, val))
    if any(path.suffix == ".npz" for path in data + val):
        if not val or {path.suffix for path in data + val} != {".npz"}:
            raise ValueError("give .jsonl, or .npz files of tokens (then also for --val_data)")
        return data, val, model, 0

    tokenizer, config, new = chat_tokenizer(model)
    facts = [(HERE / "bpe.py").read_bytes(), tokenizer, config, len(data)]
    facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in data + val]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = nearby(HERE / "data" / "tokens" / f"{data[0].stem}-{model.name}-{key}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ("tokenizer", tokenizer), ("tokenizer_config", config):
        if not (folder / f"{name}.json").exists():
            with write_whole(folder / f"{name}.json") as file:
                file.write(json.dumps(content, ensure_ascii=False).encode())
    made, parts = [], ("0:1", "0:1") if val else ("0:0.9", "0.9:1")
    for name, texts, part in ("train", data, parts[0]), ("val", val or data, parts[1]):
        made.append([folder / f"{name}{i}.npz" for i in range(len(texts))])
        for text, file in zip(texts, made[-1]):
            # bpe.py writes each file whole, and the .json last: what is there is complete.
            if not file.with_suffix(".json").exists():
                run("bpe.py", "encode", text, "--part", part, "--tokenizer", folder, "--out", file)
    return *made, folder, new


@dataclass
class Rows:
    """Chats or pairs, as bpe.py encode makes them."""
    ids: np.ndarray         # of all chats, one after the other
    mask: np.ndarray        # 1 where a token is to be learned
    spans: np.ndarray       # (rows, chats in a row: 1 or 2, 2): where each begins and ends
    tokens: np.ndarray      # (rows,) how many tokens the model reads
    targets: np.ndarray     # (rows,) how many of those that come next it learns
    dropped: int            # rows left out
    cut: int                # chats that lost their end

    def __len__(self):
        return len(self.spans)


def open_tokens(paths: list[Path], kind: str, T: int) -> Rows:
    """Those of the files that hold `kind`, chats or pairs; rows as the header of this file says."""
    ids, mask, spans, length = [np.zeros(0, np.int64)], [np.zeros(0, bool)], [], 0
    for path in paths:
        try:
            file = np.load(path, allow_pickle=False)
            found, learned, offsets = file["ids"], file["mask"], file["offsets"]
            noted = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (ValueError, EOFError, KeyError, IndexError, OSError) as error:
            raise ValueError(f"{path} is no .npz file of bpe.py encode: {error}") from None
        if noted["kind"] == kind:
            spans.append(np.stack([offsets[:-1], offsets[1:]], axis=1) + length)
            ids, mask, length = ids + [found], mask + [learned != 0], length + len(found)
    ids, mask = np.concatenate(ids), np.concatenate(mask)
    spans = np.concatenate(spans or [np.zeros((0, 2), np.int64)])
    # T tokens and, one place later, T targets: T + 1 ids.
    ends = np.minimum(spans[:, 1], spans[:, 0] + T + 1)
    cut, spans[:, 1] = int((ends < spans[:, 1]).sum()), ends
    spans = spans.reshape(-1, 2 if kind == "pairs" else 1, 2)
    before = np.append(0, np.cumsum(mask))      # targets before each place
    targets = before[spans[..., 1]] - before[spans[..., 0] + 1]
    kept = targets.all(axis=1)
    if kind == "pairs":
        kept &= [not np.array_equal(ids[a:b], ids[c:d]) for (a, b), (c, d) in spans.tolist()]
    spans, targets = spans[kept], targets[kept].sum(axis=1)
    return Rows(ids, mask, spans, (np.diff(spans)[..., 0] - 1).sum(axis=1), targets,
                int((~kept).sum()), cut)


def batch(first: int, count: int, rows: Rows, seed: int) -> np.ndarray:
    """The numbers of `count` rows. `first` counts the rows from the beginning of the run, so that
    step and process number say which are whose. An epoch takes each row once, in its own order."""
    n = len(rows)
    return np.array([shuffled(i, n, seed, epoch)
                     for epoch, i in (divmod(row, n) for row in range(first, first + count))])


# ---------------------------------------------------------------- what a row costs

def log_probabilities(model, rows: Rows, numbers, device, autocast):
    """-> log p of each token that the chats of these rows say next, (T,), and 0 where there is
    nothing to learn; where these tokens are in rows.ids, (T,); how many each chat has, a list.

        rows.ids     <|im_start|> user \n Gone! <|im_end|> \n ... assistant \n Ay <|im_end|> \n
        rows.mask          0        0   0   0       0       0         0      0  1      1      0
        tokens       <|im_start|> user \n Gone! <|im_end|> \n ... assistant \n Ay <|im_end|>
        targets           -100     -100 ...                         -100    Ay <|im_end|> -100
    """
    spans = rows.spans[numbers].reshape(-1, 2).tolist()
    places = np.concatenate([np.arange(begin + 1, end) for begin, end in spans])
    targets = np.where(rows.mask[places], rows.ids[places], -100).astype(np.int64)
    tokens, targets = (torch.from_numpy(row)[None].to(device)
                       for row in (rows.ids[places - 1].astype(np.int64), targets))
    lengths = [end - begin - 1 for begin, end in spans]
    with autocast():
        losses = model(tokens, targets, lengths=lengths, reduction="none")
    return -losses[0], places, lengths


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0):
    """-> (losses, rewards of the chosen, rewards of the rejected), each (B,).

    In: log-probabilities of replies given their prompt, (B,), summed over the tokens of a reply, by
    the model and by the reference.
    """
    # A reply's reward: how much likelier the model makes it than the reference did (section 4).
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    # Equation 7: sigmoid(margin) is the probability, after Bradley and Terry, that the chosen wins.
    # Where a share of the pairs is the wrong way round, so is that share of the loss
    # (https://ericmitchell.ai/cdpo.pdf, equation 3).
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, reward_chosen.detach(), reward_rejected.detach()


def compare(logps, refs, learned, lengths: list[int], beta: float, label_smoothing: float):
    """-> the loss, summed over pairs, and sums over pairs of what to log.

    logps, refs (T,): log-probabilities by the model and by the reference. learned (T,): where
    there is something to learn. lengths: of a chosen chat, of a rejected one, and so on.
    """
    def sums(values):       # over each reply: (T,) -> (B,) of the chosen, (B,) of the rejected
        return torch.stack([part.sum() for part in values.split(lengths)]).view(-1, 2).unbind(1)
    (chosen, rejected), (long, short) = sums(logps), sums(learned.float())
    losses, good, bad = dpo_loss(chosen, rejected, *sums(refs), beta, label_smoothing)
    # How far is the model from the reference? Half the squared log-ratios of a reply's tokens
    # estimate the KL divergence, were they drawn from it (k2 in joschu.net/blog/kl-approx.html).
    # And how much likelier is the last of them, by which it ends?
    drift = logps.detach() - refs
    ends = [part[those][-1] for part, those in zip(drift.split(lengths), learned.split(lengths))]
    return losses.sum(), {name: value.sum().item() for name, value in {
        "rewards_chosen": good, "rewards_rejected": bad, "margin": good - bad,
        "accuracy": (good > bad).float(), "likelier": (chosen > rejected).float(),
        "logps_chosen": chosen.detach(), "logps_rejected": rejected.detach(),
        "length_chosen": long, "length_rejected": short, "kl": sum(sums(drift**2 / 2)) / 2,
        "end": torch.stack(ends) / 2}.items()}


@torch.no_grad()
def load_reference(model, rows: Rows, at_once: int, device, autocast, facts: list) -> np.ndarray:
    """log p of each of rows.ids that is to be learned, by the model as it is now; from a file, if
    it was computed before. The file's name is a digest of the facts that it depends on (of files:
    their contents), so a stale one is never found."""
    digest = hashlib.sha256()
    for fact in facts:
        if isinstance(fact, Path):
            with open(fact, "rb") as file:
                fact = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(repr(fact).encode())
    path = HERE / "data" / "tokens" / f"reference-{digest.hexdigest()[:16]}.npy"
    if add_up(path.exists()) == process_count():
        return np.load(path)
    reference = np.zeros(len(rows.ids), np.float32)
    rank = process_number()
    mine = np.arange(rank, len(rows), process_count())      # each process does its share
    for i in range(0, len(mine), at_once):
        logps, places, _ = log_probabilities(model, rows, mine[i:i + at_once], device, autocast)
        reference[places] = logps.float().cpu()
    if process_count() > 1:
        total = torch.from_numpy(reference).to(device)
        torch.distributed.all_reduce(total)
        reference = total.cpu().numpy()
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as file:
            np.save(file, reference)
    return reference


@torch.no_grad()
def evaluate(cost, rows: Rows, reference, at_once: int, at_most: int) -> dict:
    """Means over held-out rows, evenly spread over all lengths: of at_most, if there are more."""
    order = np.argsort(rows.tokens, kind="stable")[::math.ceil(len(rows) / at_most)]
    total, sums = 0.0, {}
    for i in range(0, len(order), at_once):
        loss, logged = cost(rows, order[i:i + at_once], reference)
        total += loss.item()
        sums = {name: sums.get(name, 0.0) + value for name, value in logged.items()}
    count = len(order) if reference is not None else rows.targets[order].sum().item()
    return {"val_loss": total / count,
            **{f"val_{name}": value / count for name, value in sums.items()}}


def in_words(row: dict, before: dict, beta: float) -> str:
    """An evaluation as a line to read, with what it was before, and what should make one think."""
    words = f"loss {row['val_loss']:.4f} ({before['val_loss']:.4f} before)"
    if "val_margin" in row:
        words += (f", margin {row['val_margin']:.3f}, right {row['val_accuracy']:.1%}; chosen "
                  f"likelier in {row['val_likelier']:.1%} ({before['val_likelier']:.1%})")
        if row["val_rewards_chosen"] < -beta:       # a nat per reply
            words += (f"\n    the chosen replies become less likely, too (reward "
                      f"{row['val_rewards_chosen']:.2f}), only more slowly than the rejected: "
                      "fewer steps, a lower --lr or a higher --beta keep more of them")
        if abs(row["val_end"]) > 0.5:
            words += (f"\n    a reply's end has become {math.exp(row['val_end']):.2f} times as "
                      f"likely: expect {'longer' if row['val_end'] < 0 else 'shorter'} replies")
    if "val_sft_loss" in row:
        words += (f"; chats {row['val_sft_loss']:.4f} nats per token "
                  f"({before['val_sft_loss']:.4f})")
    return words


# ---------------------------------------------------------------- adapters

LORA_ALPHA = 32


class LoRA(Linear):
    """y = x (W + s B A)^T + b with W and b frozen: A (r, in) and B (out, r) learn
    (arXiv:2106.09685, equation 3). So gradients and optimizer state are small.

    B begins at 0, and the model as it was. s = alpha / r makes the best learning rate about the
    same for each rank, ten times that for all weights (https://thinkingmachines.ai/blog/lora).
    """

    def __init__(self, linear: Linear, rank: int):
        with torch.device("meta"):      # no memory: the weights are those of `linear`
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.bias = linear.weight, linear.bias
        limit = linear.in_features ** -0.5
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.uniform_(self.lora_a, -limit, limit)

    def forward(self, x):
        more = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + more * (LORA_ALPHA / len(self.lora_a))


class Adapted(GPT):
    """A GPT with adapters. What it saves for others has none: W + s B A is a matrix like W."""

    def save_pretrained(self, directory, weights: dict | None = None, **extra):
        merged = self.state_dict() if weights is None else weights
        merged = {name: weight.float() for name, weight in merged.items()}
        for name in [name for name in merged if name.endswith("lora_a")]:
            a, b = merged.pop(name), merged.pop(name[:-1] + "b")
            name = name.removesuffix("lora_a") + "weight"
            merged[name] = merged[name] + LORA_ALPHA / len(a) * b @ a
        super().save_pretrained(directory, merged, **extra)


def add_lora(model: GPT, rank: int):
    """Put adapters on all matrices of the layers, and freeze everything else."""
    model.requires_grad_(False)
    for layer in model.layers:
        for part in layer.self_attn, layer.mlp:
            for name, linear in list(part.named_children()):
                if isinstance(linear, Linear):
                    setattr(part, name, LoRA(linear, rank))
    model.__class__ = Adapted


def shrink(model: GPT, dtype):
    """Keep what does not learn in the type of the products, where that loses nothing: most models
    come in bf16 and need fp32 only to take small steps."""
    for weight in model.parameters():
        if not weight.requires_grad and torch.equal(weight, weight.to(dtype).float()):
            weight.data = weight.data.to(dtype)


# ---------------------------------------------------------------- the story

def grow(model: GPT, new: int, known: int):
    """Rows for `new` tokens, after the `known` ones: the mean of those. So the model expects them
    about as much as any token, and not, as with random rows, perhaps more than all that it knows
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    for matrix in {model.embed_tokens, model.head}:
        rows = matrix.weight.data
        mean = rows[:known].mean(dim=0).expand(new, -1)     # rows to spare may follow already
        matrix.weight = nn.Parameter(torch.cat([rows[:known], mean, rows[known + new:]]))
    model.config.vocab_size = len(model.head.weight)


def scale_run(args, model, rows: int, noted: dict):
    """Fill in what was not asked for: learning rate and steps, by the sizes of model and data.

    The larger the model, the lower the rate: the powers go through what was found good for the 2
    million parameters of the first run (1e-3 for SFT, 1e-4 for DPO) and what is usual for 7 billion
    (2e-5 and 5e-7).
    """
    if args.lr is None:
        scale, power = (1.45, -1 / 2) if args.method == "sft" else (1.65, -2 / 3)
        args.lr = scale * model.count_parameters() ** power * (10 if args.lora else 1)
    if args.max_steps is None or noted and noted["args"]["epochs"] != args.epochs:
        args.max_steps = max(1, round(args.epochs * rows / args.batch))


def finetune(argv=None) -> int:
    """Run it all. Returns the exit code; raises ValueError or OSError, one line, for bad input."""

    # ---- 1. What is asked for. What can be refused is refused before anything is written.
    args, tensors, noted = settle(argv)
    device = pick_device(args.device)
    rank, processes = join_processes(device), process_count()
    if args.batch % processes:
        raise ValueError(f"--batch {args.batch} can't be divided among {processes} processes")
    out = out_folder(args, args.method) if rank == 0 else Path(os.devnull)
    kind = "chats" if args.method == "sft" else "pairs"
    torch.manual_seed(args.seed)
    model = open_for_training(args.model, args.dropout)
    T = args.block_size = args.block_size or model.config.block_size
    if T > model.config.block_size:
        raise ValueError(f"--block_size {T}: the model sees {model.config.block_size}")
    print(f"Cutting {kind} into tokens, training {nearby(Path(args.model))} on them, saving to "
          f"{out}.")

    # ---- 2. Text becomes token ids: once, while the other processes wait.
    if rank == 0:
        token_files(args)
    add_up(0)
    train_files, val_files, tokenizer, new = token_files(args)
    train_rows, val_rows = (open_tokens(files, kind, T) for files in (train_files, val_files))
    val_chats = open_tokens(val_files, "chats", T)
    for part, rows in ("train on", train_rows), ("validate on", val_rows):
        if not len(rows):
            raise ValueError(f"{args.method} has no {kind} to {part} ({rows.dropped} are left out: "
                             f"nothing to learn within {T} tokens, or two replies that are equal)")
    largest = 1 + max(int(rows.ids.max()) for rows in (train_rows, val_rows, val_chats)
                      if len(rows))
    if new:
        grow(model, new, largest - new)
    if largest > model.config.vocab_size:
        raise ValueError(f"the data has the token {largest - 1}; the model knows only "
                         f"{model.config.vocab_size}")
    data = {"rows": len(train_rows), "tokens": train_rows.tokens.sum().item(),
            "targets": train_rows.targets.sum().item()}
    if args.resume and noted["data"] != data:
        raise ValueError(f"the data has changed since {out} was begun: {noted['data']} then, "
                         f"{data} now; put it back, or start a new run")

    # ---- 3. The model, its reference, and how long a run it deserves.
    model = model.to(device)
    model.recompute = args.recompute
    scale_run(args, model, len(train_rows), noted)
    if args.resume and noted["step"] > args.max_steps:
        raise ValueError(f"{out} has done {noted['step']} steps already, more than --max_steps "
                         f"{args.max_steps}")
    mine = args.batch // processes          # rows of this process
    length = data["tokens"] / len(train_rows)
    micro_batch = args.micro_batch
    if micro_batch == "auto":               # as many as make 4096 tokens, for a start
        micro_batch = min(mine, max(1, int(4096 / length)))
    dtype = pick_dtype(device, args.dtype)
    # Noted by name, so that a resumed run multiplies in the same type without asking again.
    args.dtype = next(name for name, known in DTYPES.items() if known == dtype)

    def autocast():
        # Copies of weights in this type are not kept for the next use, because there is none.
        return torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=False)
    train_reference = val_reference = None
    if kind == "pairs":         # before there are adapters: the reference is the model without
        facts = [*sorted(Path(args.model).glob("model*.safetensors")),
                 Path(args.model, "config.json"), T, args.dtype]
        train_reference, val_reference = (
            load_reference(model, rows, micro_batch, device, autocast, facts + files)
            for rows, files in ((train_rows, train_files), (val_rows, val_files)))
    parameters = model.count_parameters()
    if args.lora:
        add_lora(model, args.lora)
    if new:                     # these rows know nothing yet, so they learn in any case
        model.embed_tokens.requires_grad_(True), model.head.requires_grad_(True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if args.fsdp and processes > 1:
        shard(model)
    else:
        shrink(model, dtype)
    print(f"data    {len(train_rows):,} {kind} to train on, with {data['tokens']:,} tokens, "
          f"{data['targets']:,} of them to be learned; {len(val_rows):,} held out\n"
          f"        {train_rows.dropped} and {val_rows.dropped} more left out; {train_rows.cut} "
          f"and {val_rows.cut} cut to {T} tokens\n"
          f"model   {parameters:,} parameters; {trained:,} learn ({trained / parameters:.1%})\n"
          f"batch   {args.batch} {kind}, {micro_batch} at once, by {processes} "
          f"process{'es' * (processes > 1)}\n"
          f"steps   {args.max_steps:,} = {args.max_steps * args.batch / len(train_rows):.1f} "
          f"epochs, at a learning rate of up to {args.lr:.2g}\n"
          f"run     on {device.type}, products in {args.dtype}; Ctrl-C saves and stops", flush=True)

    # ---- 4. The run.
    def cost(rows, numbers, reference):
        """The loss of these rows, summed, and sums of what to log."""
        logps, places, lengths = log_probabilities(model, rows, numbers, device, autocast)
        if reference is None:
            return -logps.sum(), {}
        # Both replies to a prompt went through the model together.
        refs, learned = (torch.from_numpy(of[places]).to(device) for of in (reference, rows.mask))
        return compare(logps.float(), refs, learned, lengths, args.beta, args.label_smoothing)

    def learn(step, scaler):
        """Add the gradient of this process's rows of the step to the weights' .grad."""
        nonlocal micro_batch
        numbers = batch(step * args.batch + rank * mine, mine, train_rows, args.seed)
        tokens = int(add_up(train_rows.tokens[numbers].sum()))
        # What the loss is a mean over, in the whole batch: tokens for SFT, pairs for DPO.
        count = args.batch if kind == "pairs" else add_up(train_rows.targets[numbers].sum())
        pieces = {}

        def share_of(first, last):
            loss, pieces[first] = cost(train_rows, numbers[first:last], train_reference)
            return loss / count
        loss, micro_batch = accumulate_gradients(model, share_of, mine, micro_batch, scaler)
        means = {name: add_up(sum(pieces[first][name] for first in range(0, mine, micro_batch)))
                 / count for name in pieces[0]}
        shown = {name: means.pop(name) for name in ("margin", "accuracy") if means}
        return {"loss": add_up(loss), **shown, "more": means, "tokens": tokens,
                "flops": tokens * model.flops_per_token(round(length))}

    def measure(last):
        def held_out(at_most):
            row = evaluate(cost, val_rows, val_reference, micro_batch, at_most)
            if kind == "pairs" and len(val_chats):
                chats = evaluate(cost, val_chats, None, micro_batch, at_most)
                row["val_sft_loss"] = chats["val_loss"]
            return row
        row = held_out(512)
        if last:
            row["comparable"] = row["val_loss"]
            if max(len(val_rows), len(val_chats)) > 512:
                row |= held_out(10**9)
        return row, in_words(row, before or row, args.beta)
    before = noted.get("before")
    if before is None:
        before, words = measure(True)
        print(f"step     0  held out: {words}", flush=True)
    code = fit(args, out, model, dtype, learn, measure, tensors, noted,
               {"script": "finetune.py", "data": data, "before": before}, tokenizer)
    if rank == 0 and code == 0 and (out / "tokenizer.json").exists():
        if args.data is None:
            run("data/shakespeare.py", "thou", args.model, out)
        print(f"\nNow you:  python sample.py {shlex.quote(str(out))} --chat")
    return code


def main(argv=None) -> int:
    return exit_code("finetune.py", finetune, argv)


if __name__ == "__main__":
    sys.exit(main())

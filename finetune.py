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

from gpt import (DTYPES, GPT, Linear, accumulate_gradients, add_flags, add_up, fit, join_processes,
                 nearby, out_folder, pick_device, pick_dtype, process_count, read_flags, run, shard,
                 shuffled, write_whole)

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
    add("--epochs", type=float, default=1.0, help="how often each row is seen [%(default)s]")
    add("--max_steps", type=int, help="updates of the weights [by --epochs]")
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=float, default=0.1, help="dpo: how strongly it is held to where it began; "
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
    if args.val_data and not args.data:
        raise ValueError("--val_data without --data: the plays have held-out ones of their own")
    if args.fsdp and args.optimizer == "muon":
        raise ValueError("--fsdp cuts matrices in parts, and muon needs them whole: use adamw")
    if args.lora < 0 or not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"--lora {args.lora} must be at least 0, --label_smoothing "
                         f"{args.label_smoothing} at least 0 and less than 0.5")
    if not args.model:
        args.model = str(Path("out", {"sft": "shakespeare", "dpo": "sft"}[args.method]).resolve())
    for path in [args.model, *(args.data or []), *(args.val_data or [])]:
        if not Path(path).exists():
            raise ValueError(f"{nearby(Path(path))} does not exist")
    return args, tensors, noted


# ---------------------------------------------------------------- data

def chat_tokenizer(model: Path) -> tuple[dict, dict, list[int]]:
    """-> tokenizer.json and tokenizer_config.json of a model made ready for chats, and the ids of
    the tokens that this took: <|im_start|> and <|im_end|>, where it lacks them.

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
    config |= {"chat_template": CHAT_TEMPLATE, "eos_token": CHAT_TOKENS[1]}
    if isinstance(config.get("bos_token"), dict):       # the way of older files
        config["bos_token"] = config["bos_token"]["content"]
    return tokenizer, config, list(range(first, first + len(new)))


def token_files(args) -> tuple[list[Path], list[Path], Path, list[int]]:
    """The token ids of --data and --val_data: files, made by bpe.py where they are not there yet.
    Besides, the folder with the tokenizer that the result gets, and the ids that are new in it.

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
        chats, prefs = ([folder / kind / f"{part}.jsonl" for part in ("train", "val")]
                        for kind in ("chat", "prefs"))
        data, val = chats[:1], chats[1:]
        if args.method == "dpo":
            data, val = prefs[:1], prefs[1:] + chats[1:]
    data, val = ([nearby(Path(path)) for path in paths or []] for paths in (data, val))
    if any(path.suffix == ".npz" for path in data + val):
        if {path.suffix for path in data + val} != {".npz"}:
            raise ValueError("give .jsonl, or .npz files of tokens (also for --val_data); not both")
        return data, val, model, []

    tokenizer, config, new = chat_tokenizer(model)
    facts = [(HERE / "bpe.py").read_bytes(), tokenizer, config, len(data)]
    facts += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in data + val]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    folder = nearby(HERE / "data" / "tokens" / f"{data[0].stem}-{model.name}-{key}")
    if not folder.exists():
        folder.mkdir(parents=True)
    for name, content in ("tokenizer", tokenizer), ("tokenizer_config", config):
        with write_whole(folder / f"{name}.json") as file:
            file.write(json.dumps(content, ensure_ascii=False).encode())
    made, parts = [], ["0:1", "0:1"] if val else ["0:0.9", "0.9:1"]
    for name, texts, part in ("train", data, parts[0]), ("val", val or data, parts[1]):
        made.append([folder / f"{name}{i}.npz" for i in range(len(texts))])
        for text, file in zip(texts, made[-1]):
            # bpe.py writes each file whole, and the one beside last: what is there is complete.
            if not file.with_suffix(".json").exists():
                run("bpe.py", "encode", text, "--part", part, "--tokenizer", folder, "--out", file)
    return *made, folder, new


@dataclass
class Rows:
    """Chats or pairs, as bpe.py encode makes them."""
    ids: np.ndarray         # of all chats, one after the other
    mask: np.ndarray        # 1 where a token is to be learned
    spans: np.ndarray       # (rows, chats in a row: 1 or 2, 2): where each begins and ends
    dropped: int            # rows left out
    cut: int                # chats that lost their end

    def __len__(self):
        return len(self.spans)

    def count(self, rows) -> tuple[int, int]:
        """-> how many tokens these rows have, and how many of them are to be learned."""
        spans = self.spans[rows].reshape(-1, 2)
        return (int((spans[:, 1] - spans[:, 0] - 1).sum()),
                sum(int(self.mask[begin + 1:end].sum()) for begin, end in spans))


def open_tokens(paths: list[Path], kind: str, T: int) -> Rows:
    """Those of the files that hold `kind`, chats or pairs; rows as the header of this file says."""
    ids, mask, spans = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)], []
    for path in paths:
        try:
            file = np.load(path, allow_pickle=False)
            found = [file[name] for name in ("ids", "mask", "offsets")]
            noted = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (ValueError, EOFError, KeyError, OSError) as error:
            raise ValueError(f"{path} is no .npz file of bpe.py encode: {error}") from None
        if noted["kind"] == kind:
            spans.append(np.stack([found[2][:-1], found[2][1:]], axis=1) + sum(map(len, ids)))
            ids, mask = ids + found[:1], mask + found[1:2]
    ids, mask = np.concatenate(ids), np.concatenate(mask)
    spans = np.concatenate(spans or [np.zeros((0, 2), np.int64)])
    # T tokens and, one place later, T targets: T + 1 ids.
    end = np.minimum(spans[:, 1], spans[:, 0] + T + 1)
    cut, spans = int((end < spans[:, 1]).sum()), np.stack([spans[:, 0], end], axis=1)
    spans = spans.reshape(-1, 2 if kind == "pairs" else 1, 2)

    def worth(chats) -> bool:
        learned = [mask[begin + 1:end].any() for begin, end in chats]
        return all(learned) and (len(chats) == 1 or not np.array_equal(*(
            ids[begin:end] for begin, end in chats)))
    kept = [worth(chats) for chats in spans]
    return Rows(ids, mask, spans[kept], len(kept) - sum(kept), cut)


def batch(rows: Rows, first: int, count: int, seed: int) -> np.ndarray:
    """The numbers of `count` rows. `first` counts the rows from the beginning of the run, so that
    step and process number say which are whose. An epoch takes each row once, in its own order."""
    n = len(rows)
    return np.array([shuffled(i, n, seed, epoch)
                     for epoch, i in (divmod(row, n) for row in range(first, first + count))])


def pack(rows: Rows, numbers, device):
    """The chats of these rows as one long row: tokens (1, T), targets (1, T), lengths.

        ids      <|im_start|> user \\n Who calls? <|im_end|> ... assistant \\n  I    <|im_end|>
        mask          0        0   0      0           0     ...     0      0   1       1
        tokens   <|im_start|> user \\n Who calls? <|im_end|> ... assistant \\n  I
        targets     -100     -100 ...                            -100      I <|im_end|>
    """
    spans = rows.spans[numbers].reshape(-1, 2)
    tokens = np.concatenate([rows.ids[begin:end - 1] for begin, end in spans]).astype(np.int64)
    targets = np.concatenate([np.where(rows.mask[begin + 1:end], rows.ids[begin + 1:end], -100)
                              for begin, end in spans.tolist()]).astype(np.int64)
    return (torch.from_numpy(tokens)[None].to(device), torch.from_numpy(targets)[None].to(device),
            (spans[:, 1] - spans[:, 0] - 1).tolist())


# ---------------------------------------------------------------- what a row costs

def chat_loss(model, rows: Rows, numbers, device, autocast):
    """The loss of these chats, summed over what is to be learned of them; nats."""
    tokens, targets, lengths = pack(rows, numbers, device)
    with autocast():
        return model(tokens, targets, lengths=lengths, reduction="none").sum()


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0):
    """-> (losses, rewards of the chosen, rewards of the rejected), each (B,).

    In: log-probabilities of replies given their prompt, (B,), summed over the tokens of a reply, by
    the model and by the reference.
    """
    # How much likelier the model makes a reply than the reference did; the paper, section 4.
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    # Equation 7: sigmoid(margin) is the probability, after Bradley and Terry, that the chosen wins.
    # If a share of the labels is wrong, so is that share of the loss (ericmitchell.ai/cdpo.pdf,
    # equation 3).
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, reward_chosen.detach(), reward_rejected.detach()


@torch.no_grad()
def make_reference(model, rows: Rows, at_once: int, device, autocast) -> np.ndarray:
    """log p of each token to be learned, by the model as it is now; one number per id."""
    reference = np.zeros(len(rows.ids), np.float32)
    # Each process does its share: rank, rank + processes, ...
    rank = torch.distributed.get_rank() if process_count() > 1 else 0
    mine = range(rank, len(rows), process_count())
    for i in range(0, len(mine), at_once):
        numbers = list(mine[i:i + at_once])
        tokens, targets, lengths = pack(rows, numbers, device)
        with autocast():
            logps = -model(tokens, targets, lengths=lengths, reduction="none")[0].float().cpu()
        for (begin, end), part in zip(rows.spans[numbers].reshape(-1, 2), logps.split(lengths)):
            reference[begin + 1:end] = part
    if process_count() > 1:
        total = torch.from_numpy(reference).to(device)
        torch.distributed.all_reduce(total)
        reference = total.cpu().numpy()
    return reference


def load_reference(folder: Path, facts: list, make) -> np.ndarray:
    """What make() returns, kept in a file. Its name is a digest of the facts that it depends on,
    files among them by their contents: if one of them changes, it is made anew."""
    digest = hashlib.sha256()
    for fact in facts:
        if isinstance(fact, Path):
            with open(fact, "rb") as file:
                fact = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(repr(fact).encode())
    path = folder / f"reference-{digest.hexdigest()[:12]}.npy"
    found = add_up(path.exists()) == process_count()    # make() needs all processes, or none
    reference = np.load(path) if found else make()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not found and (process_count() == 1 or torch.distributed.get_rank() == 0):
        with write_whole(path) as file:
            np.save(file, reference)
    return reference


def compare(model, pairs: Rows, numbers, reference, beta, label_smoothing, device, autocast):
    """Sums over these pairs: the loss, and what to log. Chosen and rejected go through the model
    together, so that each weight is read once."""
    tokens, targets, lengths = pack(pairs, numbers, device)
    with autocast():
        logps = -model(tokens, targets, lengths=lengths, reduction="none")[0].float()
    spans = pairs.spans[numbers].reshape(-1, 2)
    refs = np.concatenate([reference[begin + 1:end] for begin, end in spans])
    refs = torch.from_numpy(refs).to(device)

    def sums(values):       # (T,) -> of each reply -> (B,) of the chosen, (B,) of the rejected
        return torch.stack([part.sum() for part in values.split(lengths)]).view(-1, 2).unbind(1)
    (chosen, rejected), (ref_chosen, ref_rejected) = sums(logps), sums(refs)
    losses, rewards_chosen, rewards_rejected = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    length_chosen, length_rejected = sums((targets[0] != -100).float())
    # How far is the model from the reference? Half the squared log-ratio of each token estimates
    # the KL divergence (k2 in http://joschu.net/blog/kl-approx.html), if replies are like theirs.
    drift = logps.detach() - refs
    kl = torch.stack(sums(drift**2 / 2)).mean(dim=0)
    # The last target of a reply is its end.
    ends = [int(part.nonzero()[-1]) for part in (targets[0] != -100).split(lengths)]
    ends = torch.stack([part[end] for part, end in zip(drift.split(lengths), ends)])
    logged = {"rewards_chosen": rewards_chosen, "rewards_rejected": rewards_rejected,
              "margin": rewards_chosen - rewards_rejected,
              "accuracy": (rewards_chosen > rewards_rejected).float(),
              "likelier": (chosen > rejected).float(), "logps_chosen": chosen.detach(),
              "logps_rejected": rejected.detach(), "length_chosen": length_chosen,
              "length_rejected": length_rejected, "kl": kl, "end": ends.view(-1, 2).mean(dim=1)}
    return losses.sum(), {name: value.sum().item() for name, value in logged.items()}


def spread(rows: Rows, at_once: int, at_most: int | None = None):
    """Rows in portions, by length, so that little is padded; if there are more than at_most, as
    many as that, of all lengths."""
    order = np.argsort(np.diff(rows.spans).sum(axis=(1, 2)), kind="stable")
    order = order[::math.ceil(len(order) / (at_most or len(order) or 1)) or 1]
    return [order[i:i + at_once] for i in range(0, len(order), at_once)]


@torch.no_grad()
def evaluate(model, pairs, reference, chats, args, at_once: int, device, autocast, at_most) -> dict:
    """What to log of held-out pairs (if there are any) and chats, at most at_most rows of each."""
    row, loss, count = {}, 0.0, 0
    for numbers in spread(chats, at_once, at_most):
        loss += chat_loss(model, chats, numbers, device, autocast).item()
        count += chats.count(numbers)[1]
    if count:
        row["val_loss"] = loss / count
    if pairs is None:
        return row
    if row:
        row = {"val_sft_loss": row["val_loss"]}
    sums, count = {}, 0
    for numbers in spread(pairs, at_once, at_most):
        loss, logged = compare(model, pairs, numbers, reference, args.beta, args.label_smoothing,
                               device, autocast)
        for name, value in (logged | {"loss": loss.item()}).items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + value
        count += len(numbers)
    return row | {name: value / count for name, value in sums.items()}


def in_words(row: dict, before: dict, beta: float) -> str:
    """An evaluation as a line to read, and what should make one think."""
    if "val_margin" not in row:
        return f"{row['val_loss']:.4f} nats per token of replies, {before['val_loss']:.4f} before"
    words = (f"loss {row['val_loss']:.4f}, margin {row['val_margin']:.3f}, "
             f"right {row['val_accuracy']:.1%}; chosen likelier in {row['val_likelier']:.1%}, "
             f"{before['val_likelier']:.1%} before")
    if "val_sft_loss" in row:
        words += (f"; chats {row['val_sft_loss']:.4f} nats per token, "
                  f"{before['val_sft_loss']:.4f} before")
    if row["val_rewards_chosen"] < -beta:       # one nat a reply
        words += (f"\n    the chosen replies, too, become less likely (reward "
                  f"{row['val_rewards_chosen']:.2f}), only more slowly than the rejected ones; "
                  "fewer steps, a lower --lr or a higher --beta keep more of them")
    if abs(row["val_end"]) > 0.5:
        words += (f"\n    the end of a reply is {math.exp(row['val_end']):.2f} times as likely as "
                  f"it was: replies become {'longer' if row['val_end'] < 0 else 'shorter'}")
    return words


# ---------------------------------------------------------------- adapters

class LoRA(Linear):
    """y = x (W + s B A)^T + b with W and b frozen: A (r, in) and B (out, r) learn
    (arXiv:2106.09685, equation 3). Gradients and optimizer state are then needed for a hundredth of the weights.

    B begins at 0, so the model begins as it was. s = 32 / r makes the best learning rate about the
    same for each rank, ten times that of the whole (https://thinkingmachines.ai/blog/lora).
    """

    def __init__(self, linear: Linear, rank: int):
        with torch.device("meta"):      # no memory: the weights are those of `linear`
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.bias, self.s = linear.weight, linear.bias, 32 / rank
        limit = linear.in_features ** -0.5
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-limit, limit))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return super().forward(x) + self.s * F.linear(F.linear(x, self.lora_a), self.lora_b)


class Adapted(GPT):
    """A GPT whose layers have adapters. What it saves for others has none: W + s B A is one matrix,
    and that is what is written."""

    def save_pretrained(self, directory, weights: dict | None = None, **extra):
        merged = dict(self.state_dict() if weights is None else weights)
        for name in [name for name in merged if name.endswith("lora_a")]:
            a, b = merged.pop(name), merged.pop(name[:-1] + "b")
            name = name.removesuffix("lora_a") + "weight"
            merged[name] = merged[name] + 32 / len(a) * b @ a
        super().save_pretrained(directory, merged, **extra)


def add_lora(model: GPT, rank: int):
    """Put adapters on all matrices of the layers, and freeze the rest."""
    for weight in model.parameters():
        weight.requires_grad = False
    for layer in model.layers:
        for part in layer.self_attn, layer.mlp:
            for name, linear in list(part.named_children()):
                if isinstance(linear, Linear):
                    setattr(part, name, LoRA(linear, rank))
    model.__class__ = Adapted


# ---------------------------------------------------------------- the story

def grow(model: GPT, new: list[int]):
    """Give the model rows for new tokens: the mean of those it has. So it expects them about as
    much as any token, and not, as with rows of small random numbers, more than all that it knows
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    for matrix in dict.fromkeys([model.embed_tokens, model.head]):
        rows = matrix.weight.data[:new[0]]
        more = rows.mean(dim=0).expand(len(new), -1)
        rest = matrix.weight.data[new[0] + len(new):]       # to spare: round sizes are fast
        matrix.weight = nn.Parameter(torch.cat([rows, more, rest]))
    model.config.vocab_size = len(model.embed_tokens.weight)


def scale_run(args, model, rows: int, noted: dict):
    """Fill in what was not asked for: learning rate and steps, by the sizes of model and data.

    The larger the model, the lower the rate: the powers go through what was found best for the 2
    million parameters of the first run (1e-3 and 1e-4) and what is usual for 7 billion (2e-5 and
    5e-7). DPO's is lower because a pair says little about what a good reply is, and far less where
    to stop.
    """
    if args.lr is None:
        count = sum(weight.numel() for weight in model.parameters() if not hasattr(weight, "lora"))
        rate = 1.45 * count ** -0.5 if args.method == "sft" else 1.65 * count ** (-2 / 3)
        args.lr = float(f"{rate * (10 if args.lora else 1):.1e}")
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
    kind = {"sft": "chats", "dpo": "pairs"}[args.method]
    print(f"Cutting {kind} into tokens, training {nearby(Path(args.model))} on them, saving to "
          f"{out}.")

    # ---- 2. The model, and text becomes token ids: once, while the other processes wait.
    torch.manual_seed(args.seed)
    model = GPT.from_pretrained(args.model, dtype=torch.float32)
    if rank == 0:
        token_files(args)
    add_up(0)
    train_files, val_files, tokenizer, new = token_files(args)
    if new and new[-1] >= model.config.vocab_size - len(new) + 1:
        grow(model, new)
    T = args.block_size = args.block_size or model.config.block_size
# ---------------------------------------------------------------- the story

def grow(model: GPT, new: list[int]):
    """Give the model rows for new tokens: the mean of those it has. So it expects them about as
    much as any token, and not, as with rows of random numbers, perhaps more than all that it knows
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    for matrix in dict.fromkeys([model.embed_tokens, model.head]):
        rows = matrix.weight.data[:new[0]]
        more = rows.mean(dim=0).expand(len(new), -1)
        rest = matrix.weight.data[new[0] + len(new):]       # to spare: round sizes are fast
        matrix.weight = nn.Parameter(torch.cat([rows, more, rest]))
    model.config.vocab_size = len(model.embed_tokens.weight)


def scale_run(args, parameters: int, rows: int, noted: dict):
    """Fill in what was not asked for: learning rate and steps, by the sizes of model and data.

    The larger the model, the lower the rate: the powers go through what was found good for the 2
    million parameters of the first run (1e-3 for SFT, 1e-4 for DPO) and what is usual for 7 billion
    (2e-5 and 5e-7).
    """
    if args.lr is None:
        rate = 1.45 * parameters ** -0.5 if args.method == "sft" else 1.65 * parameters ** (-2 / 3)
        args.lr = float(f"{rate * (10 if args.lora else 1):.1e}")
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
    kind = {"sft": "chats", "dpo": "pairs"}[args.method]
    print(f"Cutting {kind} into tokens, training {nearby(Path(args.model))} on them, saving to "
          f"{out}.")

    # ---- 2. Text becomes token ids: once, while the other processes wait.
    torch.manual_seed(args.seed)
    model = GPT.from_pretrained(args.model, dtype=torch.float32)
    T = args.block_size = args.block_size or model.config.block_size
    if T > model.config.block_size:
        raise ValueError(f"--block_size {T}: the model sees {model.config.block_size}")
    if rank == 0:
        token_files(args)
    add_up(0)
    train_files, val_files, tokenizer, new = token_files(args)
    train_rows, val_rows = open_tokens(train_files, kind, T), open_tokens(val_files, kind, T)
    val_chats = open_tokens(val_files, "chats", T)
    for name, rows in ("train on", train_rows), ("validate on", val_rows):
        if not len(rows):
            raise ValueError(f"no {kind} to {name} with {args.method} ({rows.dropped} left out: "
                             f"nothing to learn in {T} tokens, or two replies that are the same)")
    if new:
        grow(model, new)
    largest = max(int(rows.ids.max()) for rows in (train_rows, val_rows, val_chats) if len(rows))
    if largest >= model.config.vocab_size:
        raise ValueError(f"the token {largest} is there, but the model has only "
                         f"{model.config.vocab_size}")
    data = {"rows": len(train_rows), "tokens": train_rows.count(slice(None))[0]}
    if args.resume and noted["data"] != data:
        raise ValueError(f"the data has changed since {out} was begun: {noted['data']} then, "
                         f"{data} now; put it back, or start a new run")

    # ---- 3. The model, its reference, and how long a run it deserves.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    for weight in model.parameters():       # a copy in memory, as in restore_run
        weight.data = weight.data.clone()
    model, parameters = model.to(device), model.count_parameters()
    model.recompute = args.recompute
    scale_run(args, parameters, len(train_rows), noted)
    mine = args.batch // processes          # rows of this process
    length = data["tokens"] / len(train_rows)
    micro_batch = args.micro_batch
    if micro_batch == "auto":               # as many as make 4096 tokens, for a start
        micro_batch = min(mine, max(1, int(4096 / length)))
    if args.resume and noted["step"] > args.max_steps:
        raise ValueError(f"{out} has done {noted['step']} steps already, more than --max_steps "
                         f"{args.max_steps}")
    dtype = pick_dtype(device, args.dtype)
    # Noted by name, so that a resumed run multiplies in the same type without asking again.
    args.dtype = next(name for name, known in DTYPES.items() if known == dtype)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"data    {len(train_rows):,} {kind} to train on, {data['tokens']:,} tokens, "
          f"{train_rows.count(slice(None))[1]:,} to be learned; {len(val_rows):,} held out\n"
          f"        left out: {train_rows.dropped} and {val_rows.dropped}; cut to {T} tokens: "
          f"{train_rows.cut} and {val_rows.cut}")
    train_reference = val_reference = None
    if kind == "pairs":
        # Adapters come later: begun at 0, they would change nothing.
        weights = sorted(Path(args.model).glob("*.safetensors"))
        weights = [path for path in weights if path.name.startswith("model")]
        train_reference, val_reference = (load_reference(
            HERE / "data" / "tokens",
            [Path(args.model, "config.json"), *weights, *files, args.dtype, T],
            lambda: make_reference(model, rows, micro_batch, device, autocast))
            for files, rows in ((train_files, train_rows), (val_files, val_rows)))
    if args.lora:
        add_lora(model, args.lora)
        model.to(device)
    if new:     # frozen or not, these know nothing yet
        for matrix in model.embed_tokens, model.head:
            matrix.weight.requires_grad = True
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if args.fsdp and processes > 1:
        shard(model)
    print(f"model   {parameters:,} parameters; {trained:,} are trained ({trained / parameters:.1%})"
          f"\nbatch   {args.batch} {kind}, about {args.batch * length:,.0f} tokens = "
          f"{micro_batch} at once, by {processes} process{'es' * (processes > 1)}\n"
          f"steps   {args.max_steps:,} = {args.max_steps * args.batch / len(train_rows):.1f} "
          f"epochs, at a learning rate of up to {args.lr:.2g}\n"
          f"run     on {device.type}, products in {args.dtype}; Ctrl-C saves and stops", flush=True)

    # ---- 4. The run.
    def learn(step, scaler):
        """Add the gradient of this process's rows of the step to the weights' .grad."""
        nonlocal micro_batch
        numbers = batch(train_rows, step * args.batch + rank * mine, mine, args.seed)
        tokens, targets = map(add_up, train_rows.count(numbers))
        sums = {}

        def share_of(first, last):
            some = numbers[first:last]
            if kind == "chats":
                return chat_loss(model, train_rows, some, device, autocast) / max(targets, 1)
            loss, logged = compare(model, train_rows, some, train_reference, args.beta,
                                   args.label_smoothing, device, autocast)
            if first == 0:      # also where the step was begun again, for want of memory
                sums.clear()
            sums.update({name: sums.get(name, 0) + value for name, value in logged.items()})
            return loss / args.batch
        loss, micro_batch = accumulate_gradients(model, share_of, mine, micro_batch, scaler)
        means = {name: add_up(value) / args.batch for name, value in sums.items()}
        return {"loss": add_up(loss), "tokens": int(tokens),
                "flops": tokens * model.flops_per_token(round(length)),
                **{name: means.pop(name) for name in ("margin", "accuracy") if means},
                "more": means}

    def measure(last):
        """Of evenly spread held-out rows; in the end of all of them."""
        def held_out(at_most):
            return evaluate(model, val_rows if kind == "pairs" else None, val_reference, val_chats,
                            args, micro_batch, device, autocast, at_most)
        row = held_out(512)
        if last and max(len(val_rows), len(val_chats)) > 512:
            row = held_out(None) | {"comparable": row["val_loss"]}
        return row, in_words(row, before or row, args.beta)
    before = noted.get("before")
    if before is None:
        before, words = measure(True)
        print(f"before  {words}")
    code = fit(args, out, model, dtype, learn, measure, tensors, noted,
               {"script": "finetune.py", "data": data, "before": before}, tokenizer)
    if rank == 0 and code == 0 and (out / "tokenizer.json").exists():
        if args.data is None:
            run("data/shakespeare.py", "thou", args.model, out)
        print(f"\nNow you:  python sample.py {shlex.quote(str(out))} --chat")
    return code


def main(argv=None) -> int:
    try:
        return finetune(argv)
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the first step, or asked for twice
        print("\ninterrupted; the last checkpoint, if there is one, stands", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

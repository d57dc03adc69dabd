# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Talk to a model, measure it, look inside it.

    python sample.py --prompt "ROMEO:"                      # the newest run in out/ continues
    python sample.py out/mine --prompt @letter.txt --num_samples 3 --seed 7 > three.txt
    python sample.py out/sft --chat --system "You are a king."           # in the terminal
    python sample.py out/a out/b --eval val.txt             # how good? side by side
    python sample.py out/mine --explain "To be, or not to be"            # what surprised it?
    python sample.py --curves out/a out/b                   # how they learned, as a picture

DIR is any directory that GPT.from_pretrained in gpt.py opens, with a tokenizer.json in it. Results
go to standard output, so that they can be piped; remarks and speed go to standard error.
What a person types or a file holds is only text. "<|endoftext|>" in it is encoded as thirteen
ordinary characters, and never becomes the special token of that name. Special tokens come only from
this script, before a document, and from the chat template, around turns.

What --eval measures depends on what FILE holds. Figures come with their 95% intervals in brackets.

    .txt, or .npy of bpe.py encode              nats per token, perplexity, bits per byte
    .jsonl of "context", "choices", "answer"    acc, acc_norm: share of questions answered rightly
    .jsonl of "prompt", "chosen", "rejected"    acc: share of pairs in which chosen is likelier
    .jsonl of "prompt", "answer"                exact: share of prompts that the model answers so
    .jsonl of "messages"                        nats per token of what the assistant says; or, with
                                                --count REGEX, words of the model's own replies

A prompt that is a list of messages goes through the chat template; a string is only text. The first
two kinds give the figures of EleutherAI's lm-evaluation-harness.
Left out on purpose: a server (README.md names some that serve the same directory), examples before
a question (write them into "context"), and any judge of answers but equality.
Reading order: a model with its tokenizer, text in and out, chat, evaluation, looking inside,
curves, the command line.
"""
import codecs
import hashlib
import json
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bpe import CHAT_TOKENS, DIVIDERS, Parser, Tokenizer, conversations, encode_chat
from gpt import DTYPES, GPT, KVCache, insist, pick_device, quantize, read_json, write_whole

# ---------------------------------------------------------------- a model with its tokenizer

class Speaker:
    """A model with its tokenizer, and how to draw its tokens (sampling: arguments of generate()).
    Raises ValueError or OSError, one line, if the directory can't be used."""
    def __init__(self, directory: Path, device, dtype=None, context=None, seed=None, **sampling):
        self.seed, self.sampling = seed, sampling
        self.model = GPT.from_pretrained(directory, device, DTYPES.get(dtype))
        if self.model.lm_head.weight.dtype == torch.float16 and device.type == "cpu":
            self.model.float()          # fp16 is a type for GPUs: few CPUs can multiply in it
        if dtype == "int8":
            quantize(self.model)
        self.directory, self.device, self.tokenizer = directory, device, Tokenizer.load(directory)
        config, special = self.model.config, self.tokenizer.special_tokens
        insist(len(self.tokenizer.vocab) <= config.vocab_size, f"{directory}: the tokenizer has "
               f"{len(self.tokenizer.vocab)} tokens, the model only {config.vocab_size}")
        # The number of tokens that the model sees at once. The memory of the KV cache grows with
        # it, and some models are trained on 131,072: therefore not more than 8192 by default.
        self.context = context or min(8192, config.block_size)
        insist(self.context <= config.block_size, f"--context {context}: {directory} was trained "
               f"on {config.block_size} tokens at once")
        # In training, a divider came before each document. [] if the tokenizer has none.
        divider = self.tokenizer.divider
        self.begin = [special[divider]] if divider else []
        self.ends = find_ends(directory, special)

    def bytes_of(self, i: int) -> bytes:
        """The bytes of a token, or b"" for an id that has none. A model can have more ids than its
        tokenizer, because round sizes are fast; now and then it draws one that nothing trained."""
        return (i < len(self.tokenizer.vocab) and self.tokenizer.vocab[i]) or b""

def find_ends(directory: Path, special: dict[str, int]) -> set[int]:
    """The ids that end a text. The model's own files say which, in the order of transformers:
    eos_token_id is an id or a list of ids, eos_token a name. special: the ids of special tokens."""
    files = "generation_config.json", "config.json", "tokenizer_config.json"
    for entries in [read_json(directory / name) for name in files if (directory / name).exists()]:
        ends, name = entries.get("eos_token_id"), entries.get("eos_token")
        if ends is None:
            ends = special.get(str(name.get("content") if isinstance(name, dict) else name))
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    # None of them says it. The best guess is what separates documents or turns.
    return {special[name] for name in (*DIVIDERS, *CHAT_TOKENS) if name in special}

# ---------------------------------------------------------------- text in, text out

def remark(text: str):
    print(text, file=sys.stderr)

def speak(speaker: Speaker, prompt: list[int], number: int, cache=None, show=False,
          one_line=False, **changes) -> tuple[list[int], str, str]:
    """Let the model continue a prompt. -> ids and text, without the token that ended them, and why
    it stopped: "ended", "cut", or "stopped" by Ctrl-C (if shown; else it is raised as usual).
    number: added to the seed. cache: positions in it are not computed again. show: print text as it
    is drawn, then the speed. one_line: stop after a line."""
    sampling = speaker.sampling | changes
    size = min(speaker.context, len(prompt) + sampling["max_new_tokens"])
    cache = cache or KVCache(speaker.model, 1, size)
    seed = None if speaker.seed is None else speaker.seed + number
    # A character can be several tokens. The decoder keeps half a character to itself until the rest
    # comes, or until the end turns it into U+FFFD.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, text, why, start = [], "", "cut", time.perf_counter()
    try:
        for step in speaker.model.generate([prompt], seed=seed, cache=cache, **sampling):
            if step.item() in speaker.ends:
                why = "ended"
                break
            ids.append(step.item())
            piece = decoder.decode(speaker.bytes_of(ids[-1]))
            text += piece
            if show:
                print(piece, end="", flush=True)
            if one_line and "\n" in text.lstrip():
                break
    except KeyboardInterrupt:
        if not show:
            raise
        why = "stopped"
    rest = decoder.decode(b"", final=True)
    if show:
        print(rest)
        rate = len(ids) / (time.perf_counter() - start)
        remark(f"({why} after {len(ids)} tokens, {rate:.0f} tokens/s)")
    return ids, text + rest, why

def continue_text(speaker: Speaker, text: str, count: int):
    """Print `count` continuations of a text, as they are made."""
    prompt = speaker.tokenizer.encode(text) or speaker.begin
    insist(prompt, "this tokenizer has no token to begin a text with: give a --prompt")
    if len(prompt) > speaker.context:
        remark(f"the prompt has {len(prompt)} tokens; the model sees the last {speaker.context}")
    for number in range(count):
        print("-" * 60 + "\n" if number else "", text, sep="", end="", flush=True)
        if speak(speaker, prompt, number, show=True)[2] == "stopped":
            raise KeyboardInterrupt

# ---------------------------------------------------------------- chat

HELP = r"""A line is a turn; one that ends in \ continues in the next. Ctrl-C stops an answer.
/reset forgets all, /save FILE writes all that was said, /quit (or Ctrl-D) leaves."""

def read_turns():
    """Yield what the person types, turn by turn, until /quit or the end of the input."""
    text, ask = "", "\n> " if sys.stdin.isatty() else ""
    while text.strip() != "/quit":
        if text.strip():
            yield text
        try:
            text = input(ask)
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input()
        except KeyboardInterrupt:       # drops what was typed, and asks again
            text = ""
        except EOFError:
            return

def newest_turns(head: list[int], turns: list[list[int]], limit: int) -> list[list[int]]:
    """The turns; if they and the head have more than `limit` tokens, only the newest of them.
    The oldest go two at a time, because a history begins with the user, until half of `limit` is
    free: after that all of the history is read again, because it begins elsewhere, and this should
    be rare."""
    if len(head) + sum(map(len, turns)) > limit:
        while len(turns) > 2 and len(head) + sum(map(len, turns)) > limit // 2:
            turns = turns[2:]
    return turns

def chat(speaker: Speaker, system: str):
    """A conversation, until the input ends.

    A turn does not read the history again, unless turns had to be forgotten. One KV cache stays
    from turn to turn, with the keys and values of all tokens so far, and generate() computes only
    the positions that it does not hold: the new turn. For that, the history must stay the same ids.
    So an answer is kept as the ids that were drawn: its text, encoded again, could give others.
    """
    encode, context = partial(encode_chat, speaker.tokenizer), speaker.context
    end = speaker.tokenizer.special_tokens.get(CHAT_TOKENS[1])
    insist(end in speaker.ends, f"this model has not learned to end a turn with {CHAT_TOKENS[1]}: "
           "python finetune.py sft teaches it")
    messages = first = [{"role": "system", "content": system}] if system else []
    head, opening = encode(first)[0], encode([], reply=True)[0]
    closing = encode([{"role": "assistant", "content": ""}])[0][len(opening):]
    # Room for the answer: as much as was asked for, but at most half of the context.
    limit = context - min(speaker.sampling["max_new_tokens"], context // 2)
    cache, turns = KVCache(speaker.model, 1, context), []
    remark(HELP)
    for text in read_turns():
        said = [{"role": "user", "content": text}]
        new = encode(said, reply=True)[0]
        kept = newest_turns(head, [*turns, new], limit)
        prompt, forgotten = head + sum(kept, []), len(turns) + 1 - len(kept)
        if text.strip() == "/reset":
            messages, turns = first, []
        elif text.startswith("/save"):      # as a line of the .jsonl that finetune.py learns from
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            try:
                Path(text[5:].strip()).write_text(line + "\n", "utf-8")
            except OSError as error:
                remark(f"not saved: {error}")
        elif len(prompt) > limit:
            remark(f"not read: {len(new)} tokens, and there is room for {limit - len(head)}")
        else:
            if forgotten:
                remark(f"(the oldest {forgotten} turns no longer fit and are forgotten)")
            room = min(speaker.sampling["max_new_tokens"], context - len(prompt))
            ids, answer, _ = speak(speaker, prompt, len(messages), cache, show=True,
                                   max_new_tokens=room)
            turns = [*kept, ids + closing]
            messages = [*messages, *said, {"role": "assistant", "content": answer}]

# ---------------------------------------------------------------- evaluation

def progress(items):
    """Yield the items. In a terminal, show how many are done, and how long the others will take."""
    start = time.perf_counter()
    for done, item in enumerate(items):
        if done and sys.stderr.isatty():
            left = (time.perf_counter() - start) / done * (len(items) - done)
            print(f"{done} of {len(items)}, {left:.0f} s left  ", end="\r", file=sys.stderr)
        yield item

@torch.inference_mode()
def nll(speaker: Speaker, ids, mask) -> float:
    """Negative log-likelihood of the tokens that mask marks (never the first), given all before
    them, in nats. A row that is longer than the context loses its beginning."""
    ids, mask = (torch.tensor(np.array(part[-speaker.context - 1:], int), device=speaker.device)
                 for part in (ids, mask))                                       # (T + 1,)
    targets = ids[1:].where(mask[1:] != 0, -100)                                # (T,)
    losses = speaker.model(ids[None, :-1], targets[None], reduction="none")     # (1, T)
    return losses.cpu().double().sum().item()       # on the CPU: Macs have no fp64 on their GPU

def interval(values, weights) -> list[float]:
    """sum(values) / sum(weights), a mean if all weights are 1, and the ends of its 95% interval.
    The bootstrap (Efron 1979, doi.org/10.1214/aos/1176344552): draw as many rows as there are, with
    replacement, a thousand times; the interval holds the middle 95% of the results. It says what
    other rows of the same kind could have given, and nothing about other kinds."""
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    drawn = np.random.RandomState(0).randint(len(values), size=(1000, len(values)))
    results = [values[rows].sum() / max(1, weights[rows].sum()) for rows in drawn]
    return [values.sum() / max(1, weights.sum()), *np.quantile(results, (0.025, 0.975)).tolist()]

def measure_text(speaker: Speaker, path: Path) -> dict:
    """Each token but the first, a divider, is predicted once. As in the harness, the text is cut
    into windows side by side, so the first tokens of a window see little before them.

    Bits per byte are all the nats / ln 2 / the number of UTF-8 bytes of the text: what a perfect
    compressor that uses the model would need for a byte. Nats per token can't compare models with
    different tokenizers, since a longer token costs more. Bytes are the same for all.
    """
    tokenizer, context, note = speaker.tokenizer, speaker.context, Path(f"{path}.json")
    if path.suffix == ".txt":
        text = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        ids, size = speaker.begin + tokenizer.encode(text.decode()), len(text)
    else:
        ids = np.load(path, mmap_mode="r")
        insist(ids.ndim == 1 and ids.dtype.kind in "iu", "it is not a row of token ids")
        digest = hashlib.sha256((speaker.directory / "tokenizer.json").read_bytes()).hexdigest()
        insist(not note.exists() or read_json(note).get("tokenizer") == digest,
               f"it was encoded with another tokenizer than {speaker.directory}'s")
        dividers = np.isin(ids, list(tokenizer.special_tokens.values()))
        size = len(tokenizer.decode_bytes(ids[~dividers].tolist()))
    # The tokens of a window depend on each other, so the bootstrap draws windows.
    windows = [ids[i:i + context + 1] for i in range(0, len(ids) - 1, context)]
    insist(windows, "there is nothing to predict")
    costs = [nll(speaker, window, np.arange(len(window))) for window in progress(windows)]
    mean = np.array(interval(costs, [len(window) - 1 for window in windows]))
    bits = mean * (len(ids) - 1) / max(1, size) / math.log(2)
    return {"tokens": len(ids) - 1, "bytes": size, "context": context, "nats_per_token":
            mean.tolist(), "perplexity": np.exp(mean).tolist(), "bits_per_byte": bits.tolist()}

def encode_pair(speaker: Speaker, context: str, text: str):
    """-> ids of context and text, and a mask that marks those of the text. As in the harness, white
    space between the two belongs to the text, because tokens begin with it; and both are encoded
    together, then cut at the length of the context's ids. If a token spans the cut, this is
    approximate; if nothing is left of the text, the last token counts as the text."""
    ids = speaker.tokenizer.encode(context + text)
    cut = min(len(speaker.tokenizer.encode(context.rstrip())), len(ids) - 1)
    if cut <= 0:
        ids, cut = speaker.begin + ids, len(speaker.begin)
    insist(0 < cut < len(ids), "there is no text, or no token to begin it with")
    return ids, [0] * cut + [1] * (len(ids) - cut)

# The next four functions measure a row of a .jsonl each. They return {figure: (value, weight)}. The
# figure of the file is the sum of the values divided by the sum of the weights.

def measure_choices(speaker: Speaker, context: str, choices: list[str], right: int) -> dict:
    """acc: is the right choice the likeliest? That favours short ones, since each token makes a
    text less likely. So acc_norm divides the log-likelihood of each choice by its length in
    characters (as in the harness; not in bytes or tokens)."""
    insist(isinstance(choices, list) and all(isinstance(text, str) for text in [context, *choices])
           and all(choices) and type(right) is int and 0 <= right < len(choices),
           '"choices" must be a list of strings, and "answer" the number of one, from 0')
    # A blank goes between the two, unless there is white space.
    gaps = ["" if context[-1:].isspace() or text[0].isspace() else " " for text in choices]
    costs = np.array([nll(speaker, *encode_pair(speaker, context, gap + text))
                      for gap, text in zip(gaps, choices)])
    by_length = costs / [len(text) for text in choices]
    return {"acc": (costs.argmin() == right, 1), "acc_norm": (by_length.argmin() == right, 1)}

def measure_preference(speaker: Speaker, prompt, chosen, rejected) -> dict:
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        pairs = [encode_pair(speaker, prompt, reply) for reply in (chosen, rejected)]
    else:
        chats = conversations({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        pairs = [encode_chat(speaker.tokenizer, *chat) for chat in chats]
    costs = [nll(speaker, *pair) for pair in pairs]
    return {"acc": (costs[0] < costs[1], 1)}

def measure_answer(speaker: Speaker, prompt, wanted: str) -> dict:
    """exact: does the model at temperature 0 give the answer, up to white space around it? A base
    model does not stop after an answer. So if it continues a text, and the answer is one line, only
    one line is compared. A reply in a chat ends by itself and is compared whole."""
    insist(isinstance(wanted, str), '"answer" must be a string')
    if is_text := isinstance(prompt, str):
        ids = speaker.tokenizer.encode(prompt) or speaker.begin
    else:
        [(messages, _)] = conversations({"messages": prompt})
        ids, _ = encode_chat(speaker.tokenizer, messages, reply=True)
    one_line = is_text and "\n" not in wanted.strip()
    _, said, _ = speak(speaker, ids, 0, one_line=one_line, temperature=0.0)
    said = said.strip().split("\n")[0] if one_line else said
    return {"exact": (said.strip() == wanted.strip(), 1)}

def measure_chat(speaker: Speaker, messages, patterns, number: int) -> dict:
    """What the assistant's turns cost. Or, with patterns, let the model reply in place of the last
    turn: does it end by itself, how many words does it say, and how many of them match?"""
    [(messages, first)] = conversations({"messages": messages})
    if not patterns:
        ids, mask = (part[-speaker.context - 1:]        # all that nll() looks at
                     for part in encode_chat(speaker.tokenizer, messages, first))
        return {"nats_per_token": (nll(speaker, ids, mask), sum(mask[1:]))}
    prompt, _ = encode_chat(speaker.tokenizer, messages[:-1], reply=True)
    _, said, why = speak(speaker, prompt, number)
    words = re.findall(r"\w+", said)
    figures = {"ended": (why == "ended", 1), "words": (len(words), 1)}
    for pattern in patterns:
        matches = [word for word in words if pattern.fullmatch(word)]
        figures[f"{pattern.pattern} in words"] = (len(matches), len(words))
    return figures

KINDS = {("context", "choices", "answer"): measure_choices, ("messages",): measure_chat,
         ("prompt", "chosen", "rejected"): measure_preference, ("prompt", "answer"): measure_answer}

def evaluate(speaker: Speaker, path: Path, patterns, count: int) -> dict:
    """-> {figure: a number, or [value, low, high]}. ValueError that names the file and the line."""
    where, rows = path, []
    try:
        if path.suffix in (".txt", ".npy"):
            return measure_text(speaker, path)
        lines = [row for row in enumerate(path.read_bytes().split(b"\n"), 1) if row[1].strip()]
        if patterns:        # replies take long: as many as asked for, spread evenly over the file
            count = min(count, len(lines))
            lines = [lines[i * len(lines) // count] for i in range(count)]
        insist(lines, "it is empty")
        for number, line in progress(lines):
            where = f"{path}, line {number}"
            row = json.loads(line)
            insist(isinstance(row, dict), "it is not an object")
            kinds = [keys for keys in KINDS if set(keys) <= row.keys()]
            # Some preferences repeat the chosen reply as "messages".
            kinds = [keys for keys in kinds if "chosen" in keys] or kinds
            insist(len(kinds) == 1, f"it has {', '.join(row)}; it must have just one kind of keys: "
                   f"{' or '.join(map(', '.join, KINDS))}")
            more = [patterns, len(rows)] if "messages" in kinds[0] else []
            rows.append(KINDS[kinds[0]](speaker, *map(row.get, kinds[0]), *more))
            insist(rows[-1].keys() == rows[0].keys(), "it is of another kind than those before it")
    except (ValueError, RecursionError) as error:       # RecursionError: 100,000 brackets
        raise ValueError(f"{where}: {error}") from None
    return {"rows": len(rows)} | {
        name: interval(*zip(*(row[name] for row in rows))) for name in rows[0]}

def print_table(columns: dict[str, dict]):
    """{title: {figure: value}} -> figures down, titles across."""
    table = [["", *next(iter(columns.values()))]]
    for title, column in columns.items():
        table.append([title, *("{:.4f} [{:.4f}, {:.4f}]".format(*value) if isinstance(value, list)
                               else f"{value:,}" for value in column.values())])
    widths = [max(map(len, column)) for column in table]
    for first, *rest in zip(*table):
        print(first.ljust(widths[0]), *map(str.rjust, rest, widths[1:]), sep="   ")

# ---------------------------------------------------------------- looking inside

@torch.inference_mode()
def explain(speaker: Speaker, text: str) -> list[tuple]:
    """For each token of a text, and for what comes after it (None): the token, what the model paid
    for it (-ln p, in nats), the likeliest three and their probabilities, the guess of each layer.

    A layer's guess is the token that it would predict if it were the last layer: the final norm and
    the output matrix, applied to what it hands on (the "logit lens", nostalgebraist 2020, on
    lesswrong.com). Early layers were not trained to be read so: take theirs as a hint.
    """
    model, ids = speaker.model, (speaker.begin + speaker.tokenizer.encode(text))[-speaker.context:]
    insist(ids, "there is no text to explain")
    guesses = []                                            # a list of T ids per layer

    def look(layer, inputs, x):                             # x (1, T, C)
        guesses.append(model.lm_head(model.model.norm(x[0])).argmax(dim=-1).tolist())
    hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
    logps = model(torch.tensor([ids], device=speaker.device))[0].float().log_softmax(dim=-1)
    for hook in hooks:
        hook.remove()

    def spell(i):
        return speaker.bytes_of(i).decode("utf-8", "backslashreplace") or f"[{i}]"
    nats = [-row[i].item() for row, i in zip(logps, ids[1:])]
    p, i = (part.tolist() for part in logps.exp().topk(3))                          # (T, 3)
    likeliest = [list(zip(map(spell, i_t), p_t)) for i_t, p_t in zip(i, p)]
    layers = [list(map(spell, guess)) for guess in zip(*guesses)]
    # Nothing came before the first token, so there is no guess for it.
    return [(spell(ids[0]), None, [], []),
            *zip([*map(spell, ids[1:]), None], [*nats, None], likeliest, layers)]

def print_positions(positions: list[tuple]):
    """A table of them. In a terminal, tokens go from white (expected) to red (8 nats and more)."""
    quote = partial(json.dumps, ensure_ascii=False)
    print(" nats  token             likeliest" + " " * 41 + "guess from layer")
    for token, nats, likeliest, guesses in positions:
        cell, cost = f"{'(next)' if token is None else quote(token):16}", nats or 0.0
        if sys.stdout.isatty():         # in one of a terminal's 256 colours
            cell = f"\033[30;48;5;{(231, 224, 217, 210, 203)[min(4, int(cost / 2))]}m{cell}\033[0m"
        top = "  ".join(f"{quote(name)} {p:.0%}" for name, p in likeliest)
        changes = "  ".join(f"{layer} {quote(guess)}" for layer, (guess, before) in enumerate(
            zip(guesses, [None, *guesses]), 1) if guess != before)
        print(f"{'' if nats is None else f'{nats:.2f}':>5}  {cell}  {top:48}  {changes}")

# ---------------------------------------------------------------- curves

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" font-family="sans-serif"
font-size="12" text-anchor="end"><style>svg{background:#fff;color:#222}text{fill:currentColor}
line{stroke:currentColor;opacity:.2}polyline{fill:none}
@media(prefers-color-scheme:dark){svg{background:#161616;color:#ddd}}</style>"""

def draw_curves(folders: list[Path], by: str) -> Path:
    """Training loss (thin) and held-out loss (thick) of some runs as one SVG, for any browser, on
    light and dark screens. -> its path: curves.svg in the first folder."""
    curves, units = {}, set()
    for folder in folders:
        text = (folder / "metrics.jsonl").read_text("utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        # Bits per byte are nats per token times a constant of the run, where the run knows it.
        factors = [row["val_bpb"] / row["val_loss"] for row in rows if row.get("val_bpb")]
        units.add("bits per byte" if factors else "nats per token")
        for name, key in ("training", "loss"), ("held out", "val_loss"):
            points = [(row[by], row[key] * [*factors, 1][0]) for row in rows if row.get(key)]
            curves |= {(folder, name): points} if points else {}
    insist(curves, f"{folders[0] / 'metrics.jsonl'} has no losses yet")
    insist(len(units) == 1, "some of these runs know their bits per byte and some do not")
    xs, ys = zip(*sum(curves.values(), []))
    right, low, high = max(xs) or 1, min(ys), max(*ys, min(ys) + 1e-3)

    def place(x, y):            # on the picture, where y grows downwards
        return round(60 + 520 * x / right, 1), round(20 + 300 * (high - y) / (high - low), 1)
    parts = [SVG, f'<text x="320" y="360">{by}</text>',
             f'<text transform="translate(14 120) rotate(-90)">loss, {units.pop()}</text>']
    for i in range(5):          # five grid lines, and the numbers on both axes
        x, y = right * i / 4, low + (high - low) * i / 4
        px, py = place(x, y)
        parts += [f'<line x1="60" x2="580" y1="{py}" y2="{py}"/>',
                  f'<text x="54" y="{py + 4}">{y:.2f}</text><text x="{px}" y="338">{x:,.0f}</text>']
    for i, ((folder, name), curve) in enumerate(curves.items()):
        line = " ".join("{},{}".format(*place(x, y)) for x, y in curve)
        hue, width = 210 + 137 * folders.index(folder), 1 if name == "training" else 2
        title = f"{folder}: {name} {curve[-1][1]:.3f}".replace("&", "&amp;").replace("<", "&lt;")
        parts += [f'<g color="hsl({hue} 60% 50%)"><text x="574" y="{36 + 18 * i}">{title}</text>',
                  f'<polyline points="{line}" stroke="currentColor" stroke-width="{width}"/></g>']
    with write_whole(folders[0] / "curves.svg") as file:
        file.write("\n".join([*parts, "</svg>"]).encode())
    return folders[0] / "curves.svg"

# ---------------------------------------------------------------- command line

def text_of(flag: str) -> str:
    """What a flag means: TEXT itself, the contents of @FILE, or for - standard input."""
    if flag == "-":
        return sys.stdin.read()
    return Path(flag[1:]).read_text("utf-8") if flag.startswith("@") else flag

def run(argv=None):
    """Do what the flags say. Raises ValueError or OSError, one line, for bad input."""
    parser = Parser("sample.py", description="Talk to a model, measure it, look inside it.")
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("models", nargs="*", metavar="DIR", type=Path, help="model or run [the newest in out/]")
    mode("--prompt", default="", metavar="TEXT", help="continue TEXT, @FILE or - (standard input)")
    mode("--chat", action="store_true", help="talk, turn by turn")
    mode("--eval", metavar="FILE", type=Path, help="measure models on a .txt, .npy or .jsonl")
    mode("--explain", metavar="TEXT", help="show what each token cost and what was expected")
    mode("--curves", action="store_true", help="draw the losses of runs to DIR/curves.svg")
    add("--system", default="", metavar="TEXT", help="--chat: who the model is to be")
    add("--count", nargs="+", default=[], metavar="REGEX",
        help="--eval of chats: let the model reply, and count the words that match")
    add("--num_samples", type=int, metavar="N", help="continuations, or replies [1; --count: 200]")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="of each [%(default)s]")
    add("--temperature", type=float, default=0.8, metavar="X",
        help="0: always the likeliest token; above 1.5: nonsense [%(default)s]")
    add("--top_k", type=int, metavar="K", help="draw among the K likeliest; lower is safer [all]")
    add("--top_p", type=float, default=1.0, metavar="P",
        help="among the likeliest that have probability P together; lower is safer [%(default)s]")
    add("--min_p", type=float, default=0.0, metavar="P",
        help="among those at least P times as likely as the likeliest; higher: safer [%(default)s]")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text [a new one]")
    add("--context", type=int, metavar="N", help="tokens seen at once [as in training, up to 8192]")
    add("--by", choices=("step", "seconds"), default="step", help="--curves: axis [%(default)s]")
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=(*DTYPES, "int8"), help="of weights; int8 is smallest [as in the file]")
    args = parser.parse_args(argv)
    for name in "num_samples", "max_new_tokens", "context":
        insist(getattr(args, name) is None or getattr(args, name) > 0, f"--{name} must be above 0")
    try:
        patterns = [re.compile(pattern) for pattern in args.count]
    except re.error as error:
        raise ValueError(f"--count: {error}") from None
    newest = sorted(Path("out").glob("*/model.safetensors"), key=os.path.getmtime)[-1:]
    models = args.models or [file.parent for file in newest]
    insist(models, "out/ holds no model yet: train one with python train.py, or name a directory")
    insist(len(models) == 1 or args.eval or args.curves, "only --eval and --curves compare models")
    # Not every terminal and pipe can write every character; that is no reason to stop.
    sys.stdout.reconfigure(errors="replace")
    sampling = {name: getattr(args, name)
                for name in ("temperature", "max_new_tokens", "top_k", "top_p", "min_p")}
    seed = 0 if args.eval and args.seed is None else args.seed
    speakers = (Speaker(directory, pick_device(args.device), args.dtype, args.context, seed,
                        **sampling) for directory in models)    # opened one after the other
    if args.curves:
        print(draw_curves(models, args.by))
    elif args.chat:
        chat(next(speakers), args.system)
    elif args.explain is not None:
        print_positions(explain(next(speakers), text_of(args.explain)))
    elif args.eval:
        print_table({str(speaker.directory): evaluate(
            speaker, args.eval, patterns, args.num_samples or 200) for speaker in speakers})
    else:
        continue_text(next(speakers), text_of(args.prompt), args.num_samples or 1)

def main(argv=None) -> int:
    try:
        run(argv)
        sys.stdout.flush()
    except BrokenPipeError:         # whoever reads has enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, EOFError) as error:        # EOFError: of an empty .npy
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())

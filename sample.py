# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Talk to a model, measure it, look inside it.

    python sample.py --prompt "ROMEO:"                      # the newest run in out/ continues
    python sample.py out/mine --prompt "Dear Sir," --num_samples 3 --seed 7 > three.txt
    python sample.py out/sft --chat --system "You are a king."           # in the terminal
    python sample.py out/a out/b --eval val.txt             # how good? side by side
    python sample.py out/mine --explain "To be, or not to be"            # what surprised it?
    python sample.py --curves out/a out/b                   # how they learned, as a picture

DIR is any directory that GPT.from_pretrained in gpt.py opens, with a tokenizer.json in it. Results
go to standard output, so that they can be piped. Remarks and speeds go to standard error.
What a person types or a file holds is only text. "<|endoftext|>" in it is encoded as thirteen
ordinary characters, and never becomes the special token of that name. Special tokens come only from
this script, before a document, and from the chat template, around turns.

A model sees at most --context tokens at once. Of a longer text, --prompt and --explain read only
the end. --eval cuts a .txt into windows, and reads only the end of a line of a .jsonl. A chat
forgets its older half, but never the system message. If the context fills up while the model
continues a prompt, generate() in gpt.py forgets the older half, and goes on.

What --eval measures depends on what FILE holds. Figures come with their 95% intervals in brackets.

    .txt                                        nats per token, perplexity, bits per byte
    .jsonl of "context", "choices", "answer"    acc, acc_norm: share of questions answered rightly
    .jsonl of "prompt", "chosen", "rejected"    acc: share of pairs in which chosen is likelier
    .jsonl of "messages"                        nats per token of what the assistant says; with
                                                --count, the model's own replies are measured

The first two give the figures of EleutherAI's lm-evaluation-harness, but for a text's last window.
Left out on purpose: a server, examples before a question (write them into "context"), any judge of
replies but equality and word counts. Reading order: a model with its tokenizer, text in and out,
chat, evaluation, looking inside, curves, the command line.
"""
import codecs
import itertools
import json
import math
import os
import re
import sys
import time
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import torch

from bpe import CHAT_TOKENS, DIVIDERS, Parser, Tokenizer, conversations, encode_chat
from gpt import DTYPES, GPT, KVCache, insist, pick_device, quantize, read_json

# ---------------------------------------------------------------- a model with its tokenizer

class Speaker:
    """A model, its tokenizer, and how to draw tokens (sampling: arguments of generate()).
    Raises ValueError or OSError, one line, if the directory can't be used."""
    def __init__(self, directory: Path, device, dtype=None, context=None, seed=None, **sampling):
        self.device, self.sampling = device, sampling
        self.model = GPT.from_pretrained(directory, device, DTYPES.get(dtype))
        if dtype == "int8":
            quantize(self.model)
        self.tokenizer = Tokenizer.load(directory)
        config, vocab = self.model.config, self.tokenizer.vocab
        insist(len(vocab) <= config.vocab_size, f"{directory}: the tokenizer has {len(vocab)} "
               f"tokens, the model only {config.vocab_size}")
        # The bytes of each id. A model can have more ids than its tokenizer, because round sizes
        # are fast. Now and then it draws one of the additional ids, which have no bytes.
        self.bytes_of = [token or b"" for token in vocab] + [b""] * (config.vocab_size - len(vocab))
        # The number of tokens that the model sees at once. The memory of the KV cache grows with
        # it, and some models are trained on 131,072. Therefore it is at most 8192 by default.
        self.context = context or min(8192, config.block_size)
        insist(self.context <= config.block_size, f"--context {context}: {directory} was trained "
               f"on {config.block_size} tokens at once")
        # In training, a divider came before each document. [] if the tokenizer has none.
        special, divider = self.tokenizer.special_tokens, self.tokenizer.divider
        self.begin = [special[divider]] if divider else []
        self.ends = find_ends(directory, special)
        # Each text that is drawn takes the next seed. With one seed for all, several continuations
        # of a prompt would be the same text.
        self.seeds = itertools.repeat(None) if seed is None else itertools.count(seed)

def find_ends(directory: Path, special: dict[str, int]) -> set[int]:
    """A text ends when the model draws one of these ids. The model's files say which they are, as
    in transformers: one id, or a list. special: name -> id of the tokenizer's special tokens."""
    for path in directory / "generation_config.json", directory / "config.json":
        ends = read_json(path).get("eos_token_id") if path.exists() else None
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    # Neither says it. The best guess is what separates documents or turns.
    return {special[name] for name in (*DIVIDERS, *CHAT_TOKENS) if name in special}

# ---------------------------------------------------------------- text in, text out

def remark(text: str):
    print(text, file=sys.stderr)

def speak(speaker: Speaker, prompt: list[int], cache=None, show=False, **changes):
    """Let the model continue a prompt -> the new ids, their text, and why it stopped:
    "ended"     the model drew one of speaker.ends, which is not part of the ids and the text
    "cut"       it wrote max_new_tokens tokens
    "stopped"   Ctrl-C, if the text is shown; if it is not, KeyboardInterrupt is raised as usual

    cache: the KVCache of an earlier call; positions that it holds are not computed again. show:
    print the text as it is drawn, then the speed. changes: of the speaker's sampling."""
    sampling = speaker.sampling | changes
    size = min(speaker.context, len(prompt) + sampling["max_new_tokens"])
    cache = cache or KVCache(speaker.model, 1, size)
    # A character can be several tokens. The decoder holds its bytes back until all are there. If
    # the text ends before that, it gives U+FFFD.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, why, start = [], "cut", time.perf_counter()
    try:
        for step in speaker.model.generate([prompt], seed=next(speaker.seeds), cache=cache,
                                           **sampling):
            if step.item() in speaker.ends:
                why = "ended"
                break
            ids.append(step.item())
            if show:
                print(decoder.decode(speaker.bytes_of[ids[-1]]), end="", flush=True)
    except KeyboardInterrupt:
        if not show:
            raise
        why = "stopped"
    if show:
        print(decoder.decode(b"", final=True))
        rate = len(ids) / (time.perf_counter() - start)
        remark(f"({why} after {len(ids)} tokens, {rate:.0f} tokens/s)")
    return ids, b"".join(speaker.bytes_of[i] for i in ids).decode("utf-8", "replace"), why

def continue_text(speaker: Speaker, text: str, count: int):
    """Print `count` continuations of a text, as they are made."""
    prompt = speaker.tokenizer.encode(text) or speaker.begin
    insist(prompt, "this tokenizer has no token to begin a text with: give a --prompt")
    if len(prompt) > speaker.context:
        remark(f"the prompt has {len(prompt)} tokens; the model sees the last {speaker.context}")
    for number in range(count):
        print("-" * 60 + "\n" if number else "", text, sep="", end="", flush=True)
        if speak(speaker, prompt, show=True)[2] == "stopped":
            raise KeyboardInterrupt

# ---------------------------------------------------------------- chat

def read_turns():
    """Yield what the person types, turn by turn, until the end of the input."""
    while True:
        try:
            text = input("\n> " if sys.stdin.isatty() else "")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input()
        except KeyboardInterrupt:       # drops what was typed
            continue
        except EOFError:
            return
        if text.strip():
            yield text

def chat(speaker: Speaker, system: str):
    """A conversation, until the input ends.

    A turn does not read the history again. One KV cache stays from turn to turn. It holds the keys
    and values of all tokens so far, which is all that attention needs of them. The cache compares
    the prompt with the tokens that it holds, and computes only the positions after the first
    difference: the new turn. For that, the history must stay the same ids. So an answer is kept as
    the ids that were drawn. Its text, encoded again, could give others.

    When the context is full, the older half of the exchanges is forgotten, and the rest is read
    again, because its positions have changed. If only the oldest exchange were forgotten, this
    would happen at each turn from then on. A turn that is too long by itself is not read.
    """
    encode, special = partial(encode_chat, speaker.tokenizer), speaker.tokenizer.special_tokens
    insist(special.get(CHAT_TOKENS[1]) in speaker.ends, "this model has not learned to end a turn "
           f"with {CHAT_TOKENS[1]}: python finetune.py sft teaches it")
    head, _ = encode([{"role": "system", "content": system}] if system else [])
    # What the template puts after an answer: an empty answer, without what opens it.
    opening, _ = encode([], reply=True)
    closing = encode([{"role": "assistant", "content": ""}])[0][len(opening):]
    # An answer gets at most half of the context. The rest is for the history and the new turn.
    room = min(speaker.sampling["max_new_tokens"], speaker.context // 2)
    limit = max(0, speaker.context - room - len(head))
    cache = KVCache(speaker.model, 1, speaker.context)
    exchanges = []              # of each: the ids of what the person said, and of the answer
    remark("A line is a turn; one that ends in \\ continues in the next. Ctrl-C stops an answer.\n"
           "/reset forgets all. Ctrl-D (on Windows: Ctrl-Z, Enter) leaves.")
    for text in read_turns():
        if text.strip() == "/reset":
            exchanges = []
            continue
        new, _ = encode([{"role": "user", "content": text}], reply=True)
        if len(new) > limit:
            remark(f"not read: {len(new)} tokens, and there is room for {limit}")
            continue
        while sum(map(len, exchanges)) + len(new) > limit:
            exchanges = exchanges[(len(exchanges) + 1) // 2:]
            remark("(the older half of the conversation no longer fits, and is forgotten)")
        prompt = sum(exchanges, head) + new
        ids, _, _ = speak(speaker, prompt, cache, show=True, max_new_tokens=room)
        exchanges.append(new + ids + closing)

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
def nll(speaker: Speaker, ids: list[int], mask: list[int]) -> tuple[float, int]:
    """Negative log-likelihood, in nats, of the tokens that mask marks (never the first), given all
    before them; and how many they are. A question is given, and only its answer is predicted. So
    the mask marks the answer, and the tokens of the question cost nothing. A row that is longer
    than the context loses its beginning."""
    ids, mask = (torch.tensor(part[-speaker.context - 1:], device=speaker.device)
                 for part in (ids, mask))                                       # (T + 1,)
    targets = ids[1:].where(mask[1:] != 0, -100)                                # (T,)
    losses = speaker.model(ids[None, :-1], targets[None], reduction="none")     # (1, T)
    # Summed on the CPU: Macs have no fp64 on their GPU.
    return losses.cpu().double().sum().item(), int(mask[1:].sum())

def interval(values, weights) -> list[float]:
    """sum(values) / sum(weights), a mean if all weights are 1, and the ends of its 95% interval.
    The bootstrap (Efron 1979, doi.org/10.1214/aos/1176344552): draw as many rows as there are, with
    replacement, a thousand times; the interval holds the middle 95% of the results. It says what
    other rows of the same kind could have given, and nothing about other kinds."""
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    random = np.random.RandomState(0)
    drawn = (random.randint(len(values), size=len(values)) for _ in range(1000))
    results = [values[rows].sum() / max(1, weights[rows].sum()) for rows in drawn]
    return [values.sum() / max(1, weights.sum()), *np.quantile(results, (0.025, 0.975)).tolist()]

def measure_text(speaker: Speaker, path: Path) -> dict:
    """Each token but the first, a divider, is predicted once. As in the harness (but for the last)
    windows stand side by side, so the first tokens of a window see little before them.

    Bits per byte are all the nats / ln 2 / the number of UTF-8 bytes of the text: what a perfect
    compressor that uses the model would need for a byte. Nats per token can't compare models with
    different tokenizers, since a longer token costs more. Bytes are the same for all.
    """
    text, context = path.read_bytes().decode("utf-8-sig"), speaker.context
    ids, size = speaker.begin + speaker.tokenizer.encode(text), len(text.encode())
    windows = [ids[i:i + context + 1] for i in range(0, len(ids) - 1, context)]
    insist(windows, "there is nothing to predict")
    # The tokens of a window depend on each other, so the bootstrap draws windows.
    costs = [nll(speaker, window, [1] * len(window)) for window in progress(windows)]
    mean = np.array(interval(*zip(*costs)))
    bits = mean * (len(ids) - 1) / size / math.log(2)
    return {"tokens": len(ids) - 1, "bytes": size, "context": context, "nats_per_token":
            mean.tolist(), "perplexity": np.exp(mean).tolist(), "bits_per_byte": bits.tolist()}

def encode_pair(speaker: Speaker, context: str, text: str) -> tuple[list[int], list[int]]:
    """-> ids of context and text, and a mask that marks those of the text. As in the harness, white
    space between the two belongs to the text, because tokens begin with it. Both are encoded
    together, and cut where the ids of the context alone would end. If a token spans the cut, this
    is approximate. If nothing is left of the text, the last token counts as the text."""
    ids = speaker.tokenizer.encode(context + text)
    cut = min(len(speaker.tokenizer.encode(context.rstrip())), len(ids) - 1)
    if cut <= 0:
        ids, cut = speaker.begin + ids, len(speaker.begin)
    insist(text and 0 < cut < len(ids), "there is no text, or no token to begin it with")
    return ids, [0] * cut + [1] * (len(ids) - cut)

# The next four functions measure a row of a .jsonl each. They return {figure: (value, weight)}. The
# figure of the file is the sum of the values divided by the sum of the weights.

def measure_choices(speaker: Speaker, context: str, choices: list[str], right: int) -> dict:
    """The model writes nothing. It reads each choice after the context, and the choice's nll says
    how unlikely it is. acc: is the right choice the likeliest? That favours short ones, since each
    token makes a text less likely. So acc_norm divides each nll by the length of the choice in
    characters (as in the harness; not in bytes or tokens)."""
    insist(isinstance(choices, list) and all(isinstance(text, str) for text in [context, *choices])
           and all(choices) and type(right) is int and 0 <= right < len(choices),
           '"choices" must be a list of strings, and "answer" the number of one, from 0')
    # A blank goes between the two, unless there is white space.
    gaps = ["" if context[-1:].isspace() or text[0].isspace() else " " for text in choices]
    costs = np.array([nll(speaker, *encode_pair(speaker, context, gap + text))[0]
                      for gap, text in zip(gaps, choices)])
    by_length = costs / [len(text) for text in choices]
    return {"acc": (costs.argmin() == right, 1), "acc_norm": (by_length.argmin() == right, 1)}

def measure_preference(speaker: Speaker, prompt, chosen, rejected) -> dict:
    """acc: is the chosen reply likelier than the rejected one?"""
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        pairs = [encode_pair(speaker, prompt, reply) for reply in (chosen, rejected)]
    else:
        chats = conversations({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        pairs = [encode_chat(speaker.tokenizer, *chat) for chat in chats]
    costs = [nll(speaker, *pair)[0] for pair in pairs]
    return {"acc": (costs[0] < costs[1], 1)}

def measure_chat(speaker: Speaker, messages) -> dict:
    """What the assistant's turns cost, per token of theirs. The turns of others are only read."""
    [(messages, first)] = conversations({"messages": messages})
    cost, n = nll(speaker, *encode_chat(speaker.tokenizer, messages, first))
    insist(n, "the assistant says nothing in it")
    return {"nats_per_token": (cost, n)}

def measure_reply(patterns, speaker: Speaker, messages) -> dict:
    """Let the model reply in place of the last turn. Does the reply end by itself, is it exactly
    that turn, how many words has it, and which share of them does each pattern match?"""
    [(messages, _)] = conversations({"messages": messages})
    prompt, _ = encode_chat(speaker.tokenizer, messages[:-1], reply=True)
    _, said, why = speak(speaker, prompt)
    same, words = said.strip() == messages[-1]["content"].strip(), re.findall(r"\w+", said)
    figures = {"ended": (why == "ended", 1), "exact": (same, 1), "words": (len(words), 1)}
    for pattern in patterns:
        matches = [word for word in words if re.fullmatch(pattern, word)]
        figures[f"{pattern} in words"] = (len(matches), len(words))
    return figures

# The first kind whose keys a row has is its kind. Preferences are first, because some of them
# repeat the chosen reply as "messages".
KINDS = {("prompt", "chosen", "rejected"): measure_preference,
         ("context", "choices", "answer"): measure_choices,
         ("messages",): measure_chat}

def evaluate(speaker: Speaker, path: Path, patterns, count: int) -> dict:
    """-> {figure: a number, or [value, low, high]}. patterns: None, or those of --count; then the
    model replies to at most `count` chats. Raises ValueError that names the file and the line."""
    where, rows, kinds = path, [], KINDS
    try:
        if path.suffix == ".txt":
            return measure_text(speaker, path)
        lines = [row for row in enumerate(path.read_bytes().split(b"\n"), 1) if row[1].strip()]
        insist(lines, "it is empty")
        if patterns is not None:
            kinds = {("messages",): partial(measure_reply, patterns)}
            # Replies take long: only as many as asked for, spread evenly over the file.
            count = min(count, len(lines))
            lines = [lines[i * len(lines) // count] for i in range(count)]
        for number, line in progress(lines):
            where = f"{path}, line {number}"
            row = json.loads(line)
            insist(isinstance(row, dict), "it is not an object")
            keys = next((keys for keys in kinds if row.keys() >= set(keys)), None)
            insist(keys, f"it has {', '.join(row)}; it must have "
                   f"{' or '.join(map(', '.join, kinds))}")
            rows.append(kinds[keys](speaker, *map(row.get, keys)))
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
        return speaker.bytes_of[i].decode("utf-8", "backslashreplace") or f"[{i}]"
    positions = [(spell(ids[0]), None, [], [])]         # nothing is before it: there is no guess
    for t, logp in enumerate(logps, 1):                                             # (V,)
        token, nats = (spell(ids[t]), -logp[ids[t]].item()) if t < len(ids) else (None, None)
        best = [(spell(i), logp[i].exp().item()) for i in logp.topk(3).indices.tolist()]
        positions.append((token, nats, best, [spell(guess[t - 1]) for guess in guesses]))
    return positions

def print_positions(positions: list[tuple]):
    """A table of them. A layer's guess is shown where it differs from that of the layer before."""
    quote = partial(json.dumps, ensure_ascii=False)
    print(" nats  token             likeliest" + " " * 41 + "guess from layer")
    for token, nats, likeliest, guesses in positions:
        cost = "" if nats is None else f"{nats:.2f}"
        name = "(next)" if token is None else quote(token)
        top = "  ".join(f"{quote(other)} {p:.0%}" for other, p in likeliest)
        changes = "  ".join(f"{layer} {quote(guess)}" for layer, (guess, before) in enumerate(
            zip(guesses, [None, *guesses]), 1) if guess != before)
        print(f"{cost:>5}  {name:16}  {top:48}  {changes}")

# ---------------------------------------------------------------- curves

def draw_curves(folders: list[Path], by: str) -> Path:
    """Training loss (thin) and held-out loss (thick) of some runs, as an SVG for any browser. ->
    its path: curves.svg in the first folder. In bits per byte, which compare runs whatever their
    tokenizers, if all runs know them; else as in the log, in nats per token (of DPO: per pair)."""
    logs = [list(map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines()))
            for folder in folders]
    bits = [next((row["val_bpb"] / row["val_loss"] for row in log if row.get("val_bpb")), 0)
            for log in logs]                # in a unit of the loss; 0: not known
    curves = []                 # title, colour, width of the line, points (x, loss)
    for i, (folder, log) in enumerate(zip(folders, logs)):
        for width, name, key in (1, "training", "loss"), (2, "held out", "val_loss"):
            points = [(row[by], row[key] * (bits[i] if all(bits) else 1))
                      for row in log if row.get(key)]
            if points:
                title = escape(f"{folder}: {name} {points[-1][1]:.3f}")
                curves.append((title, f"hsl({210 + 137 * i},60%,45%)", width, points))
    insist(curves, f"{folders[0] / 'metrics.jsonl'} has no losses yet")
    xs, ys = zip(*(point for *_, points in curves for point in points))
    right, low, high = max(xs), min(ys), max(ys)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-size="12" '
             'font-family="sans-serif" text-anchor="end" style="background:white">'
             f'<text x="90" y="11">{"bits per byte" if all(bits) else "loss"}</text>'
             f'<text x="340" y="356">{by}</text>']
    for i in range(5):          # five grid lines, and the numbers on both axes
        x, y = 60 + 130 * i, 320 - 75 * i           # y grows downwards
        parts += [f'<path d="M60 {y}H580" stroke="lightgray"/>'
                  f'<text x="54" y="{y + 4}">{low + (high - low) * i / 4:.2f}</text>'
                  f'<text x="{x}" y="338">{right * i / 4:,.0f}</text>']
    for i, (title, colour, width, points) in enumerate(curves):
        line = " ".join(f"{np.interp(x, (0, right), (60, 580)):.1f},"
                        f"{np.interp(y, (low, high), (320, 20)):.1f}" for x, y in points)
        parts += [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"'
                  f'/><text x="574" y="{36 + 18 * i}" fill="{colour}">{title}</text>']
    path = folders[0] / "curves.svg"
    path.write_text("\n".join([*parts, "</svg>"]), "utf-8")
    return path

# ---------------------------------------------------------------- command line

def run(argv=None):
    """Do what the flags say. Raises ValueError or OSError, one line, for bad input."""
    parser = Parser("sample.py", description="Talk to a model, measure it, look inside it.")
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("models", nargs="*", metavar="DIR", type=Path, help="model or run [the newest in out/]")
    mode("--prompt", default="", metavar="TEXT", help="continue TEXT")
    mode("--chat", action="store_true", help="talk, turn by turn")
    mode("--eval", metavar="FILE", type=Path, help="measure models on a .txt or .jsonl")
    mode("--explain", metavar="TEXT", help="show what each token cost and what was expected")
    mode("--curves", action="store_true", help="draw the losses of runs to DIR/curves.svg")
    add("--system", default="", metavar="TEXT", help="--chat: who the model is to be")
    add("--count", nargs="*", metavar="REGEX",
        help="after DIR: in --eval of chats the model replies; count its words, those that match")
    add("--num_samples", type=int, metavar="N", help="continuations, or replies [1; --count: 200]")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="of each [%(default)s]")
    # The model gives each token a probability. Text made of the likeliest tokens alone repeats
    # itself. If tokens are drawn among all, an unlikely one is drawn now and then, and the text
    # goes astray from there (arXiv:1904.09751). The next four flags choose between the two.
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
        for pattern in args.count or []:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--count: {error}") from None
    newest = sorted(Path("out").glob("*/model.safetensors"), key=os.path.getmtime)[-1:]
    models = args.models or [file.parent for file in newest]
    insist(models, "out/ holds no model yet: train one with python train.py, or name a directory")
    insist(len(models) == 1 or args.eval or args.curves, "only --eval and --curves compare models")
    sys.stdout.reconfigure(errors="replace")        # not every terminal has every character
    seed = 0 if args.eval and args.seed is None else args.seed      # --eval: the same each time
    names = "max_new_tokens", "temperature", "top_k", "top_p", "min_p"
    speaker_of = partial(Speaker, device=pick_device(args.device), dtype=args.dtype, seed=seed,
                         context=args.context, **{name: getattr(args, name) for name in names})
    if args.curves:
        print(draw_curves(models, args.by))
    elif args.eval:             # one model after the other, so that one at a time is in memory
        print_table({str(directory): evaluate(speaker_of(directory), args.eval, args.count,
                                              args.num_samples or 200) for directory in models})
    elif args.chat:
        chat(speaker_of(models[0]), args.system)
    elif args.explain is not None:
        print_positions(explain(speaker_of(models[0]), args.explain))
    else:
        continue_text(speaker_of(models[0]), args.prompt, args.num_samples or 1)

def main(argv=None) -> int:
    try:
        run(argv)
        sys.stdout.flush()
    except BrokenPipeError:         # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remark("")
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "numpy"]
# ///
"""Talk to a model, measure it, look inside it.

    python sample.py --prompt "ROMEO:"                      # the newest run in out/ goes on
    python sample.py out/mine --prompt @letter.txt --num_samples 3 --seed 7 > three.txt
    python sample.py out/sft --chat --system "You are a king."           # in the terminal
    python sample.py out/a out/b --eval val.txt             # how good? side by side
    python sample.py out/mine --explain "To be, or not to be"            # what surprised it?

DIR is anything that GPT.from_pretrained in gpt.py opens, with its tokenizer.json beside. Results go
to standard output, so that they can be piped; speed and remarks go to standard error.

What --eval measures depends on what the FILE holds (brackets are 95% intervals):

    .txt, or .npy of bpe.py encode               nats per token, perplexity, bits per byte
    .jsonl of "context", "choices", "answer"     acc, acc_norm: share of questions answered rightly
    .jsonl of "prompt", "chosen", "rejected"     acc: share of pairs in which chosen is likelier
    .jsonl of "prompt", "answer"                 pass@k: chance that one of k tries is the answer

A prompt that is a list of messages goes through the chat template, a string is only text. The first
two compute what EleutherAI's lm-evaluation-harness does, and give its figures.

Left out on purpose: a server (README.md names those that serve the same directory), examples before
a question (write them into "context"), and answers judged otherwise than letter by letter.
Reading order: text in and out, chat, evaluation, looking inside, the command line.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bpe import CHAT_TOKENS, Tokenizer, conversations, encode_chat
from gpt import DTYPES, GPT, Cache, pick_device, wrong_flag


# ---------------------------------------------------------------- text in, text out

def open_model(directory, device, dtype: str | None):
    """A directory -> model, tokenizer. ValueError or OSError, one line, if they can't be used."""
    model = GPT.from_pretrained(directory, device, (DTYPES | {"int8": torch.int8}).get(dtype))
    if dtype is None and device.type == "cpu" and model.norm.weight.dtype == torch.float16:
        model.float()           # fp16 is a type for GPUs: few CPUs multiply in it
    if not (Path(directory) / "tokenizer.json").exists():
        raise ValueError(f"{directory} holds no tokenizer.json: its model knows only numbers")
    tokenizer = Tokenizer.load(directory)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only "
                         f"{model.config.vocab_size}; they don't belong together")
    return model, tokenizer


def newest_model(parent: Path) -> Path:
    """The directory in `parent` whose model was saved last. Raises ValueError if there is none."""
    models = sorted(parent.glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not models:
        raise ValueError(f"{parent} holds no model yet: train one with python train.py, or name a "
                         "directory")
    return models[-1].parent


def read_text(text: str) -> str:
    """What a flag means: TEXT itself, the contents of @FILE, or for - standard input."""
    if text == "-":
        return sys.stdin.read()
    return Path(text[1:]).read_text("utf-8") if text.startswith("@") else text


def token_bytes(tokenizer, i: int) -> bytes:
    """b"" for an id without a token. Models can have more ids than their tokenizers, because round
    vocabulary sizes are fast; now and then one that nothing was ever learned about is drawn."""
    return (tokenizer.vocab[i] or b"") if i < len(tokenizer) else b""


def begin(tokenizer) -> list[int]:
    """The divider, after which in training every document began. [] if there is none."""
    return [tokenizer.special_tokens[tokenizer.divider]] if tokenizer.divider else []


def end_tokens(tokenizer) -> set[int]:
    """The ids that nothing of the same text or turn can follow."""
    names = {tokenizer.divider, *CHAT_TOKENS} & tokenizer.special_tokens.keys()
    return {tokenizer.special_tokens[name] for name in names}


class Answer:
    """What a model says after a prompt. Iterate over it once, for pieces of text, each as soon as
    it is certain: a character can be several tokens. Then, even if that was stopped midway:

    ids, what was said, less the token that ended it; ended, whether there was one; waited, seconds
    to the first token, and seconds, to the last.
    """

    def __init__(self, model, tokenizer, prompt: list[int], seed: int | None, cache, **how):
        self.new = model.generate([prompt], seed=seed, cache=cache, **how)
        self.tokenizer = tokenizer
        self.ids, self.ended, self.waited, self.seconds = [], False, 0.0, 0.0

    def __iter__(self):
        return self.tokenizer.decode_stream(
            i for i in self.draw() if token_bytes(self.tokenizer, i))

    def draw(self):
        ends, start = end_tokens(self.tokenizer), time.perf_counter()
        for step in self.new:
            self.seconds = time.perf_counter() - start
            self.waited = self.waited or self.seconds
            if step.item() in ends:
                self.ended = True
                return
            self.ids.append(step.item())
            yield step.item()

    def speed(self) -> str:
        # The first token costs what the prompt costs; the others tell the speed of writing.
        count = len(self.ids) + self.ended
        rate = (count - 1) / (self.seconds - self.waited) if count > 1 else 0
        return f"{count} tokens, {rate:.0f} tokens/s, the first after {self.waited:.2f} s"


def continue_text(model, tokenizer, text: str, context: int, args, how: dict):
    """Print num_samples continuations of a text, as they are made."""
    prompt = tokenizer.encode(text) or begin(tokenizer)
    if not prompt:
        raise ValueError("this tokenizer has no token to begin a text with: give a --prompt")
    if len(prompt) > context:
        print(f"the prompt has {len(prompt)} tokens; the model sees the last {context}",
              file=sys.stderr)
    # One cache for all samples: the prompt is read once.
    cache = Cache(model, 1, min(context, len(prompt) + args.max_new_tokens))
    for i in range(args.num_samples):
        seed = None if args.seed is None else args.seed + i
        answer = Answer(model, tokenizer, prompt, seed, cache, **how)
        if args.json:
            print(json.dumps({
                "prompt": text, "text": "".join(answer), "prompt_tokens": len(prompt),
                "tokens": len(answer.ids), "ended": answer.ended, "seed": seed,
                "waited": answer.waited, "seconds": answer.seconds}), flush=True)
            continue
        print("-" * 60 + "\n" if i else "", text, sep="", end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print()
        print(answer.speed(), file=sys.stderr)


# ---------------------------------------------------------------- chat

HELP = r"""A line is a turn; one that ends in \ goes on in the next. Ctrl-C stops an answer.
/reset forgets all, /save FILE writes all that was said, /quit (or Ctrl-D) leaves."""


def read_turn() -> str:
    """What the person says next. EOFError if that was all."""
    ask, more = ("\n> ", "  ") if sys.stdin.isatty() else ("", "")
    text = input(ask)
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(more)
    return text


def fit(head: list[int], turns: list[list[int]], limit: int) -> list[list[int]]:
    """The turns; if they and the head are longer than limit, without the oldest: two at a time,
    since a history begins with the user, and down to half of limit, so that not every turn from
    then on moves all others, which would have to be computed again."""
    if len(head) + sum(map(len, turns)) > limit:
        while len(turns) > 2 and len(head) + sum(map(len, turns)) > limit // 2:
            turns = turns[2:]
    return turns


def chat(model, tokenizer, system: str, context: int, seed: int | None, how: dict):
    """A conversation, until the input ends.

    The history is kept in ids, one list a turn, an answer's as they were drawn: its text encoded
    anew could give others, which the cache doesn't hold. So a turn computes only what is new: the
    template's text after the last answer, and itself. What a person types is only text to
    encode_chat: "<|im_end|>" in it is ten characters, and ends nothing.
    """
    if not set(CHAT_TOKENS) <= tokenizer.special_tokens.keys():
        raise ValueError(f"this model can't chat: its tokenizer has no {' and '.join(CHAT_TOKENS)} "
                         "(python finetune.py sft adds them and teaches their use)")

    def encode(role, text):
        return encode_chat(tokenizer, [{"role": role, "content": text}])[0]
    opening = encode_chat(tokenizer, [], reply=True)[0]
    closing = encode("assistant", "")[len(opening):]
    first = [{"role": "system", "content": system}] if system else []
    head = encode("system", system) if system else []
    # An answer may have the room that it is allowed, as long as half is left to history.
    limit = context - min(how["max_new_tokens"], context // 2)
    cache, turns, messages = Cache(model, 1, context), [], []
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = read_turn()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        command, _, name = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns, messages = [], []
            continue
        if command == "/save":          # a line of the JSONL that bpe.py and finetune.py read
            line = json.dumps({"messages": first + messages}, ensure_ascii=False)
            try:
                Path(name).write_text(line + "\n", "utf-8")
            except OSError as error:
                print(f"not saved: {error}", file=sys.stderr)
            continue
        if not text.strip():
            continue
        new = encode("user", text) + opening
        if len(head) + len(new) > limit:
            print(f"not read: that is {len(new)} tokens, and there is room for "
                  f"{limit - len(head)}", file=sys.stderr)
            continue
        kept = fit(head, [*turns, new], limit)
        if len(kept) <= len(turns):
            print(f"(the oldest {len(turns) + 1 - len(kept)} turns no longer fit and are "
                  "forgotten)", file=sys.stderr)
        prompt = head + sum(kept, [])
        room = min(how["max_new_tokens"], context - len(prompt))
        answer = Answer(model, tokenizer, prompt, None if seed is None else seed + len(messages),
                        cache, **how | {"max_new_tokens": room})
        said = ""
        try:
            for piece in answer:
                said += piece
                print(piece, end="", flush=True)
            note = "" if answer.ended else f"cut after {room} tokens: "
        except KeyboardInterrupt:
            note = "stopped: "
        print()
        print(f"({note}{answer.speed()})", file=sys.stderr)
        turns = [*kept, answer.ids + closing]
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]


# ---------------------------------------------------------------- evaluation

def progress(left: int):
    if sys.stderr.isatty():
        print(f"\r{left:8} to go \r", end="", file=sys.stderr, flush=True)


@torch.inference_mode()
def nats(model, rows, context: int) -> np.ndarray:
    """What a model pays, -ln p, for the marked tokens of each row, given all before them.

    rows: (ids, mask) each, mask not 0 at the marked tokens (never the first); -> (len(rows),).
    Of a row longer than context + 1 the model sees the end.
    """
    device, costs = model.norm.weight.device, np.zeros(len(rows))
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while waiting:
        # Rows of about the same length side by side, some 4096 tokens at once.
        size = max(1, 4096 // min(context, len(rows[waiting[-1]][0])))
        some, waiting = waiting[-size:], waiting[:-size]
        inputs, targets = [], []
        for i in some:
            ids, mask = (np.asarray(part)[-context - 1:].astype(np.int64) for part in rows[i])
            inputs.append(torch.from_numpy(ids[:-1]))
            targets.append(torch.from_numpy(np.where(mask[1:], ids[1:], -100)))     # -100: no cost
        lengths = [len(row) for row in inputs]
        packed, target = (torch.cat(part)[None].to(device) for part in (inputs, targets))
        paid = model(packed, target, lengths=lengths, reduction="none")[0].double()
        costs[some] = [row.sum().item() for row in paid.split(lengths)]
        progress(len(waiting))
    return costs


def interval(values, weights=None) -> list[float]:
    """sum(values) / sum(weights), or the mean of values, and the ends of its 95% interval.

    The bootstrap (Efron 1979, doi.org/10.1214/aos/1176344552): draw as many rows as there are, with
    replacement, a thousand times; the interval holds the middle 95% of the outcomes. It says what
    other rows of the same kind could have given, and nothing about other kinds.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    random, outcomes = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = random.integers(len(values), size=len(values))
        outcomes.append(values[drawn].sum() / weights[drawn].sum())
    return [values.sum() / weights.sum(), *np.quantile(outcomes, (0.025, 0.975)).tolist()]


def windows(tokens, context: int, stride: int) -> list:
    """Cut a long text into rows for nats(), so that each token but the first is marked in one.

    The first row holds context + 1 tokens; each further one ends stride later (the last less) and
    marks what is new. So all but the first few tokens see at least context - stride others.
    """
    rows, done, last = [], 0, len(tokens) - 1
    while done < last:
        end = min(last, done + (stride if done else context))
        row = tokens[max(0, end - context):end + 1]
        rows.append((row, np.arange(len(row)) >= len(row) - (end - done)))
        done = end
    return rows


def measure_text(model, tokenizer, directory: Path, path: Path, context: int, stride: int) -> dict:
    """Of a .txt every token is predicted, the first from the divider; of a .npy all but the first,
    which is a divider."""
    V = model.config.vocab_size
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r")
        row = tokens.ndim == 1 and tokens.dtype.kind in "iu"
        if not row or np.any((tokens < 0) | (tokens >= V)):
            raise ValueError(f"{path} is not a row of ids below {V}, the model's vocabulary")
        if path.with_suffix(".json").exists():              # written by bpe.py encode
            made_with = json.loads(path.with_suffix(".json").read_text("utf-8")).get("tokenizer")
            if made_with != hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest():
                raise ValueError(f"{path} was encoded with another tokenizer than {directory}'s; "
                                 "encode its text anew, or give that as .txt")
        sizes = np.array([len(token_bytes(tokenizer, i)) for i in range(V)])
        sizes[list(tokenizer.special_tokens.values())] = 0              # dividers are no text
        size = sizes @ np.bincount(tokens[1:], minlength=V)
    else:
        text = path.read_bytes()
        tokens, size = np.array(begin(tokenizer) + tokenizer.encode(text.decode())), len(text)
    rows = windows(tokens, context, stride)
    if not rows:
        raise ValueError(f"{path} holds nothing to predict")
    # The tokens of a window depend on each other, so the bootstrap draws windows.
    mean = np.array(interval(nats(model, rows, context), [mask.sum() for _, mask in rows]))
    count = len(tokens) - 1
    return {"tokens": count, "bytes": int(size), "context": context, "stride": stride,
            "nats_per_token": mean.tolist(), "perplexity": np.exp(mean).tolist(),
            "bits_per_byte": (mean * count / max(1, size) / math.log(2)).tolist()}


def encode_pair(tokenizer, context: str, text: str):
    """-> ids, and a mask that marks text. White space at the seam is the text's: tokens begin with
    it. The harness's way: the ids of the context, then of those of both all after that many."""
    before = tokenizer.encode(context.rstrip())
    after = tokenizer.encode(context + text)[len(before):]
    before = before or begin(tokenizer)
    if not before or not after:
        raise ValueError("no token to begin with, or none to predict")
    return before + after, [0] * len(before) + [1] * len(after)


def read_test(tokenizer, row) -> tuple:
    """A row of JSONL -> ("choices", rows for nats(), their texts, which is right), the same for
    "preferences", or ("answers", ids of the prompt, answer, whether the prompt is only text)."""
    keys = row.keys() if isinstance(row, dict) else set()
    if {"context", "choices", "answer"} <= keys:
        context, choices, right = row["context"], row["choices"], row["answer"]
        if not (isinstance(choices, list) and all(isinstance(c, str) for c in [context, *choices])
                and all(choices) and type(right) is int and 0 <= right < len(choices)):
            raise ValueError('"context" must be a string, "choices" a list of strings, and '
                             '"answer" the number of one of them, counted from 0')
        # A blank goes between the two, unless there is white space.
        gaps = ["" if context[-1:].isspace() or c[0].isspace() else " " for c in choices]
        pairs = [encode_pair(tokenizer, context, gap + c) for gap, c in zip(gaps, choices)]
        return "choices", pairs, choices, right
    if {"prompt", "chosen", "rejected"} <= keys:
        texts = [row[key] for key in ("prompt", "chosen", "rejected")]
        if all(isinstance(text, str) for text in texts):
            return "preferences", [encode_pair(tokenizer, texts[0], t) for t in texts[1:]], "", 0
        return "preferences", [encode_chat(tokenizer, *c) for c in conversations(row)], "", 0
    if {"prompt", "answer"} <= keys and isinstance(row["answer"], str):
        if isinstance(row["prompt"], str):
            ids = tokenizer.encode(row["prompt"]) or begin(tokenizer)
            return "answers", ids, row["answer"].strip(), True
        messages = conversations({"messages": row["prompt"]})[0][0]
        ids = encode_chat(tokenizer, messages, reply=True)[0]
        return "answers", ids, row["answer"].strip(), False
    raise ValueError('needed are "context", "choices", "answer" or "prompt", "chosen", "rejected" '
                     f'or "prompt" and a string "answer"; there is {list(keys)}')


def measure_choices(model, tests, context: int) -> dict:
    """acc: the likeliest choice is right. That favours short ones, so acc_norm divides ln p by the
    number of characters (as the harness does; not of bytes). Of a preference acc alone."""
    costs = iter(nats(model, [pair for _, pairs, *_ in tests for pair in pairs], context))
    hits = {"acc": [], "acc_norm": []}
    for _, pairs, texts, right in tests:
        cost = np.array([next(costs) for _ in pairs])
        hits["acc"].append(cost.argmin() == right)
        if texts:
            hits["acc_norm"].append((cost / list(map(len, texts))).argmin() == right)
    return {"rows": len(tests)} | {name: interval(hit) for name, hit in hits.items() if hit}


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that at least one of k tries is right, from n tries: 1 less the share of the ways
    to choose k of them that take only wrong ones (arXiv:2107.03374, eq. 1). The obvious
    1 - (1 - right / n)^k would on average be too low."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def measure_answers(model, tokenizer, tests, n: int, seed: int, how: dict) -> dict:
    """Write n answers to each prompt; one is right that equals the answer but for blanks around.

    Who goes on with a text does not stop after the answer. So there, if that is a single line, the
    end of the first line is the end; in a chat, where turns end, all counts.
    """
    ends = end_tokens(tokenizer)
    newlines = {i for i in range(len(tokenizer)) if b"\n" in token_bytes(tokenizer, i)}
    right = []                                              # how many of n, for each prompt
    for _, prompt, answer, is_text in tests:
        stop, count = ends | (newlines if is_text and "\n" not in answer else set()), 0
        steps = model.generate([prompt] * n, stop=stop, seed=seed + len(right), **how)
        for ids in torch.stack(list(steps), dim=1).tolist():            # n rows
            end = next((t for t, i in enumerate(ids) if i in stop), len(ids))
            said = b"".join(token_bytes(tokenizer, i) for i in ids[:end + 1] if i not in ends)
            count += answer == said.decode("utf-8", "replace").strip()
        right.append(count)
        progress(len(tests) - len(right))
    ks = [2**j for j in range(n.bit_length())]
    return {"rows": len(tests), "samples": n, "temperature": how["temperature"]} | {
        f"pass@{k}": interval([pass_at(k, n, count) for count in right]) for k in ks}


def evaluate(model, tokenizer, directory: Path, path: Path, context: int, args, how) -> dict:
    """-> {name: a number, or [value, low, high]}"""
    if path.suffix in (".txt", ".npy"):
        stride = args.stride or max(1, context // 2)
        return measure_text(model, tokenizer, directory, path, context, stride)
    tests = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                tests.append(read_test(tokenizer, json.loads(line)))
            if tests and tests[-1][0] != tests[0][0]:
                raise ValueError(f"{tests[-1][0]} in a file of {tests[0][0]}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not tests:
        raise ValueError(f"{path} is empty")
    if tests[0][0] == "answers":
        return measure_answers(model, tokenizer, tests, args.num_samples, args.seed or 0, how)
    return measure_choices(model, tests, context)


def print_table(columns: dict[str, dict]):
    """{title: {name: value}} -> names down, titles across."""
    table = [["", *columns]]
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        table.append([name, *("{:.4f} [{:.4f}, {:.4f}]".format(*value) if isinstance(value, list)
                              else f"{value:,}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *rest in table:
        print(first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:])), sep="   ")


# ---------------------------------------------------------------- looking inside

@torch.inference_mode()
def explain(model, tokenizer, text: str, context: int) -> list[dict]:
    """For each token of a text, and for the one after its end:

    nats, what the model paid for it, -ln p; the three likeliest tokens at that place and their
    probabilities; and the guess of each layer, had it been the last: the final norm and the output
    matrix applied to what it hands on (the "logit lens", nostalgebraist 2020, on lesswrong.com).
    Early layers were never trained to be read so: theirs are glimpses, not thoughts.
    """
    ids = (begin(tokenizer) + tokenizer.encode(text))[-context:]
    if not ids:
        raise ValueError("there is no text to explain")

    def spell(i):
        return token_bytes(tokenizer, i).decode("utf-8", "backslashreplace") or f"[{i}]"

    def logits(x):              # (1, T, C) -> (V,) T times; by 256, for V is large
        for part in x[0].split(256):
            yield from model.head(model.norm(part)).float()
    last, guesses = None, []                                # guesses[layer][place]

    def look(layer, inputs, output):
        nonlocal last
        last = output
        guesses.append([spell(row.argmax().item()) for row in logits(output)])
    hooks = [layer.register_forward_hook(look) for layer in model.layers]
    try:
        model.hidden(torch.tensor([ids], device=model.norm.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    places = [{"token": spell(ids[0])}]                     # nothing came before: no guess
    for t, row in enumerate(logits(last), 1):
        row = row.log_softmax(dim=-1)
        place = {"token": spell(ids[t]), "nats": -row[ids[t]].item()} if t < len(ids) else {}
        top = zip(*(part.tolist() for part in row.topk(3)))
        places.append(place | {"likeliest": [[spell(i), math.exp(value)] for value, i in top],
                               "layers": [guess[t - 1] for guess in guesses]})
    return places


def print_places(places, color: bool):
    """explain() for people: the text, from white (expected) to red, then a table."""
    if color:
        shades = (231, 230, 223, 216, 209, 202)             # of the 256 colours of a terminal
        for place in places[:-1]:
            shade = shades[min(len(shades) - 1, int(place.get("nats", 0)) // 2)]
            token = place["token"].replace("\n", "↵\033[0m\n")
            print(f"\033[30;48;5;{shade}m{token}", end="\033[0m")
        print(f"\n\nwhite: less than 2 nats; a shade darker every 2, up to {2 * len(shades) - 2}\n")

    def quote(text):
        return json.dumps(text, ensure_ascii=False)
    print(f"{'nats':>5}  {'token':16}  {'likeliest':48}  guess of layer")
    for place in places:
        top = "  ".join(f"{quote(token)} {p:.0%}" for token, p in place.get("likeliest", ()))
        layers, end = [], 0
        for token, same in itertools.groupby(place.get("layers", ())):
            start, end = end + 1, end + len(list(same))
            layers.append(f"{start if start == end else f'{start}-{end}'} {quote(token)}")
        cost = f"{place['nats']:5.2f}" if "nats" in place else " " * 5
        token = quote(place["token"]) if "token" in place else "(next)"
        print(f"{cost}  {token:16}  {top:48}  {'  '.join(layers)}")


# ---------------------------------------------------------------- command line

def number(kind, low, high=math.inf):
    """For argparse: a number of that kind from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__          # in "invalid int value"
    return parse


def read_flags(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Talk to a model, measure it, look inside it.")
    parser.error = wrong_flag
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    add("models", nargs="*", metavar="DIR",
        help="the model, for --eval also several; default: the newest in out/")
    modes.add_argument("--prompt", default="", metavar="TEXT", help="go on from TEXT, from what is "
                       "in @FILE, or - from standard input; the default is to begin a new document")
    modes.add_argument("--chat", action="store_true", help="talk, turn by turn")
    modes.add_argument("--eval", metavar="FILE", type=Path, help="measure on .txt, .npy or .jsonl")
    modes.add_argument("--explain", metavar="TEXT", help="show costs and guesses of each token")
    add("--system", default="", metavar="TEXT", help="--chat: who the model is to be")
    add("--num_samples", type=number(int, 1), default=1, metavar="N",
        help="continuations, or for --eval answers to each prompt (%(default)s)")
    add("--max_new_tokens", type=number(int, 1), default=200, metavar="N",
        help="length of each in tokens, at most (%(default)s)")
    add("--temperature", type=number(float, 0), metavar="X", help="0: always the likeliest token; "
        "higher: more surprising, above 1.5 nonsense (0.8, but 0 for --eval of one sample)")
    add("--top_k", type=number(int, 1), metavar="K", help="draw among the K likeliest tokens only; "
        "lower is safer")
    add("--top_p", type=number(float, 1e-6, 1), metavar="P", help="among the likeliest that "
        "together have probability P; lower is safer")
    add("--min_p", type=number(float, 0, 1), metavar="P", help="among those at least P times as "
        "likely as the likeliest; higher is safer")
    add("--repetition_penalty", type=number(float, 1e-6), default=1.0, metavar="X",
        help="above 1: less of what was already said (%(default)s)")
    add("--seed", type=number(int, 0, 2**32), metavar="N",
        help="the same seed gives the same text; default: a new one each time, for --eval 0")
    add("--context", type=number(int, 1), metavar="N", help="tokens that the model sees at once; "
        "default: as many as it was trained on, but at most 8192, for the memory")
    add("--stride", type=number(int, 1), metavar="N", help="--eval of text: tokens from one window "
        "to the next; lower: each sees more before it, and it takes longer (context / 2)")
    add("--json", action="store_true", help="for programs: one object a line")
    add("--color", action="store_true", help="--explain: colours even if this is no terminal")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest one here")
    add("--dtype", choices=(*DTYPES, "int8"), help="of the weights; int8: smallest, a little off. "
        "Default: as in the file, so that nothing is converted and figures are those of training")
    add("--compile", action="store_true", help="first spend ten seconds on faster code for a CPU")
    args = parser.parse_args(argv)
    if len(args.models) > 1 and not args.eval:
        wrong_flag(f"{len(args.models)} models can be compared by --eval only")
    if args.chat and args.json:
        wrong_flag("--chat is for people; --json goes with the other modes")
    if args.temperature is None:
        args.temperature = 0.0 if args.eval and args.num_samples == 1 else 0.8
    return args


def run(argv=None):
    """Do what the flags say. Raises ValueError or OSError, one line, for bad input."""
    args = read_flags(argv)
    how = {name: getattr(args, name) for name in (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    # Not every terminal and pipe can write every character; that is no reason to stop.
    sys.stdout.reconfigure(errors="replace")
    device, columns = pick_device(args.device), {}
    for directory in args.models or [newest_model(Path("out"))]:
        model, tokenizer = open_model(directory, device, args.dtype)
        if args.compile:
            model.compile_decoding()
        context = args.context or min(8192, model.config.block_size)
        if context > model.config.block_size:
            raise ValueError(f"--context {context}: {directory} was trained on "
                             f"{model.config.block_size} tokens at once")
        if args.chat:
            chat(model, tokenizer, args.system, context, args.seed, how)
        elif args.explain is not None:
            places = explain(model, tokenizer, read_text(args.explain), context)
            if args.json:
                print(*map(json.dumps, places), sep="\n")
            else:
                print_places(places, args.color or sys.stdout.isatty())
        elif args.eval:
            columns[str(directory)] = evaluate(model, tokenizer, Path(directory), args.eval,
                                               context, args, how)
        else:
            continue_text(model, tokenizer, read_text(args.prompt), context, args, how)
    if args.json:
        for name, results in columns.items():
            print(json.dumps({"model": name, "file": str(args.eval)} | results))
    elif columns:
        print_table(columns)


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

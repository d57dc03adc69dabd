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

DIR is anything that GPT.from_pretrained in gpt.py opens, with its tokenizer.json beside. Results go
to standard output, so that they can be piped; speed and remarks go to standard error.

What --eval measures depends on what the FILE holds (brackets are 95% intervals):

    .txt, or .npy of bpe.py encode              nats per token, perplexity, bits per byte
    .jsonl of "context", "choices", "answer"    acc, acc_norm: share of questions answered rightly
    .jsonl of "prompt", "chosen", "rejected"    acc: share of pairs in which chosen is likelier
    .jsonl of "prompt", "answer"                exact: share of prompts that the model answers so
    .jsonl of "messages"                        nats per token of the assistant's turns; or, with
                                                --count REGEX, what the model says in their place

A prompt that is a list of messages goes through the chat template; a string is only text. The first
two compute what EleutherAI's lm-evaluation-harness does, and give its figures.

Left out on purpose: a server (README.md names those that serve the same directory), examples before
a question (write them into "context"), and answers judged otherwise than letter by letter.
Reading order: text in and out, chat, evaluation, looking inside, curves, the command line.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bpe import CHAT_TOKENS, Tokenizer, conversations, encode_chat
from gpt import DTYPES, GPT, KVCache, insist, pick_device, quantize, read_json, write_whole

# ---------------------------------------------------------------- text in, text out

class Speaker:
    """A model with its tokenizer, opened for generation."""

    def __init__(self, directory, device, dtype: str | None, context: int | None):
        """Raises ValueError or OSError, one line, if the directory can't be used."""
        directory = Path(directory)
        self.model = model = GPT.from_pretrained(directory, device, DTYPES.get(dtype))
        if dtype is None and device.type == "cpu" and model.lm_head.weight.dtype == torch.float16:
            model.float()           # fp16 is a type for GPUs: few CPUs multiply in it
        if dtype == "int8":
            quantize(model)
        insist((directory / "tokenizer.json").exists(), f"{directory} holds no tokenizer.json: its "
               "model knows only numbers")
        self.directory, self.tokenizer = directory, Tokenizer.load(directory)
        insist(len(self.tokenizer) <= model.config.vocab_size, f"{directory}: the tokenizer has "
               f"{len(self.tokenizer)} tokens, the model only {model.config.vocab_size}")
        # Tokens that it sees at once. By default no more than 8192, for the memory of the cache.
        self.context = context or min(8192, model.config.block_size)
        insist(self.context <= model.config.block_size, f"--context {context}: {directory} was "
               f"trained on {model.config.block_size} tokens at once")
        # The divider, after which in training every document began. [] if there is none.
        special, divider = self.tokenizer.special_tokens, self.tokenizer.divider
        self.begin = [special[divider]] if divider else []
        # What ends a text is said by the model: one id or several. If it does not say, it is what
        # separates documents or turns.
        ends = []
        for name in "config.json", "generation_config.json":
            if (directory / name).exists():
                ends = read_json(directory / name).get("eos_token_id", ends)
        names = {divider, *CHAT_TOKENS} & special.keys()
        self.ends = set(ends if isinstance(ends, list) else [ends]) or {special[n] for n in names}

    def bytes_of(self, i: int) -> bytes:
        """b"" for an id without a token. Models can have more ids than their tokenizers, because
        round vocabulary sizes are fast; now and then one that was never trained is drawn."""
        return (self.tokenizer.vocab[i] or b"") if i < len(self.tokenizer) else b""

    def encode_pair(self, context: str, text: str):
        """-> ids, and a mask that marks text. White space at the seam is the text's, because tokens
        begin with it. As the harness does it: the ids of both, cut after as many as the context
        alone has. Where one token covers the seam so that nothing is left, it is the text's."""
        whole = self.tokenizer.encode(context + text)
        cut = min(len(self.tokenizer.encode(context.rstrip())), len(whole) - 1)
        insist(whole, "there is no text")
        ids = whole if cut else self.begin + whole
        cut = cut or len(self.begin)
        insist(cut, "no token to begin with")
        return ids, np.arange(len(ids)) >= cut

class Answer:
    """What a model says after a prompt. Iterate over it once, for pieces of text, each as soon as
    it is certain: a character can be several tokens. Then, even if that was stopped midway:

    ids, what was said, less the token that ended it; ended, whether there was one; waited, seconds
    to the first token, and seconds, to the last.
    """

    def __init__(self, speaker: Speaker, prompt: list[int], seed: int | None, cache, **how):
        self.new = speaker.model.generate([prompt], seed=seed, cache=cache, **how)
        self.speaker = speaker
        self.ids, self.ended, self.waited, self.seconds = [], False, 0.0, 0.0

    def __iter__(self):
        ids = (i for i in self.draw() if self.speaker.bytes_of(i))
        return self.speaker.tokenizer.decode_stream(ids)

    def draw(self):
        start = time.perf_counter()
        for step in self.new:
            self.seconds = time.perf_counter() - start
            self.waited = self.waited or self.seconds
            self.ended = step.item() in self.speaker.ends
            if self.ended:
                return
            self.ids.append(step.item())
            yield step.item()

    def speed(self) -> str:
        # The first token costs what the prompt costs; the others tell the speed of decoding.
        count = len(self.ids) + self.ended
        rate = (count - 1) / (self.seconds - self.waited) if count > 1 else 0
        return f"{count} tokens, {rate:.0f} tokens/s, the first after {self.waited:.2f} s"

def continue_text(speaker: Speaker, text: str, args, how: dict):
    """Print num_samples continuations of a text, as they are made."""
    prompt = speaker.tokenizer.encode(text) or speaker.begin
    insist(prompt, "this tokenizer has no token to begin a text with: give a --prompt")
    if len(prompt) > speaker.context:
        print(f"the prompt has {len(prompt)} tokens; the model sees the last {speaker.context}",
              file=sys.stderr)
    # One cache for all samples: the prompt is read once.
    cache = KVCache(speaker.model, 1, min(speaker.context, len(prompt) + args.max_new_tokens))
    for i in range(args.num_samples):
        seed = None if args.seed is None else args.seed + i
        answer = Answer(speaker, prompt, seed, cache, **how)
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

HELP = r"""A line is a turn; one that ends in \ continues in the next. Ctrl-C stops an answer.
/reset forgets all, /save FILE writes all that was said, /quit (or Ctrl-D) leaves."""

def read_turn() -> str:
    """What the person says next. EOFError if that was all."""
    ask, more = ("\n> ", "  ") if sys.stdin.isatty() else ("", "")
    text = input(ask)
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(more)
    return text

def newest_turns(head: list[int], turns: list[list[int]], limit: int) -> list[list[int]]:
    """The turns; if they and the head are longer than limit, without the oldest: two at a time,
    since a history begins with the user, and down to half of limit, so that not every turn from
    then on moves all others, which would have to be computed again."""
    if len(head) + sum(map(len, turns)) > limit:
        while len(turns) > 2 and len(head) + sum(map(len, turns)) > limit // 2:
            turns = turns[2:]
    return turns

def chat(speaker: Speaker, system: str, seed: int | None, how: dict):
    """A conversation, until the input ends.

    The history is kept in ids, one list a turn, an answer's as they were drawn: its text encoded
    anew could give others, which the cache does not hold. So a turn computes only what is new: the
    template's text after the last answer, and itself. What a person types is only text to
    encode_chat: "<|im_end|>" in it is ten characters, and ends nothing.
    """
    tokenizer, context = speaker.tokenizer, speaker.context
    insist(set(CHAT_TOKENS) <= tokenizer.special_tokens.keys(), "this model can't chat: its "
           f"tokenizer has no {' and '.join(CHAT_TOKENS)} (python finetune.py sft adds them and "
           "teaches their use)")
    first = [{"role": "system", "content": system}] if system else []
    head, opening = encode_chat(tokenizer, first)[0], encode_chat(tokenizer, [], reply=True)[0]
    closing = encode_chat(tokenizer, [{"role": "assistant", "content": ""}])[0][len(opening):]
    # An answer may have the room that it is allowed, as long as half is left to history.
    limit = context - min(how["max_new_tokens"], context // 2)
    cache, turns, messages = KVCache(speaker.model, 1, context), [], []
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
        if command == "/save":          # a line of the JSONL that bpe.py and finetune.py read
            line = json.dumps({"messages": first + messages}, ensure_ascii=False)
            try:
                Path(name).write_text(line + "\n", "utf-8")
            except OSError as error:
                print(f"not saved: {error}", file=sys.stderr)
        if command in ("/reset", "/save") or not text.strip():
            continue
        new = encode_chat(tokenizer, [{"role": "user", "content": text}], reply=True)[0]
        if len(head) + len(new) > limit:
            print(f"not read: that is {len(new)} tokens, and there is room for "
                  f"{limit - len(head)}", file=sys.stderr)
            continue
        kept = newest_turns(head, [*turns, new], limit)
        if len(kept) <= len(turns):
            print(f"(the oldest {len(turns) + 1 - len(kept)} turns no longer fit and are "
                  "forgotten)", file=sys.stderr)
        prompt = head + sum(kept, [])
        room = min(how["max_new_tokens"], context - len(prompt))
        answer = Answer(speaker, prompt, None if seed is None else seed + len(messages), cache,
                        **how | {"max_new_tokens": room})
        said, note = "", "stopped: "
        try:
            for piece in answer:
                said += piece
                print(piece, end="", flush=True)
            note = "" if answer.ended else f"cut after {room} tokens: "
        except KeyboardInterrupt:
            pass
        print()
        print(f"({note}{answer.speed()})", file=sys.stderr)
        turns = [*kept, answer.ids + closing]
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

# ---------------------------------------------------------------- evaluation

def progress(left: int):
    if sys.stderr.isatty():
        print(f"\r{left:8} to go \r", end="", file=sys.stderr, flush=True)

@torch.inference_mode()
def nll(model, rows, context: int) -> np.ndarray:
    """Negative log-likelihood of the marked tokens of each row, given all before them, in nats.

    rows: (ids, mask) each, mask not 0 at the marked tokens (never the first); -> (len(rows),).
    Of a row longer than context + 1 the model sees the end.
    """
    device, costs = model.lm_head.weight.device, np.zeros(len(rows))
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while waiting:
        # Rows of about the same length side by side, some 4096 tokens at once. The shorter ones are
        # padded on the right, where causal attention never looks.
        L = min(context, len(rows[waiting[-1]][0]) - 1)
        some, waiting = waiting[-max(1, 4096 // L):], waiting[:-max(1, 4096 // L)]
        tokens, targets = torch.zeros(len(some), L, dtype=torch.long), torch.full((len(some), L), -100)
        for row, i in enumerate(some):
            ids, mask = (np.asarray(part)[-context - 1:].astype(int) for part in rows[i])
            tokens[row, :len(ids) - 1] = torch.from_numpy(ids[:-1])
            targets[row, :len(ids) - 1] = torch.from_numpy(np.where(mask[1:], ids[1:], -100))
        losses = model(tokens.to(device), targets.to(device), reduction="none")     # (B, L)
        costs[some] = losses.cpu().double().sum(dim=1).numpy()
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
    drawn = np.random.RandomState(0).randint(len(values), size=(1000, len(values)))
    outcomes = [values[row].sum() / weights[row].sum() for row in drawn]
    return [values.sum() / weights.sum(), *np.quantile(outcomes, (0.025, 0.975)).tolist()]

def measure_text(speaker: Speaker, path: Path) -> dict:
    """Of a .txt every token is predicted, the first from the divider; of a .npy all but the first,
    which is a divider. The text is cut into windows side by side, as the harness does it."""
    tokenizer, context, V = speaker.tokenizer, speaker.context, speaker.model.config.vocab_size
    if path.suffix == ".npy":
        tokens, beside = np.load(path, mmap_mode="r"), Path(f"{path}.json")
        insist(tokens.ndim == 1 and tokens.dtype.kind in "iu"
               and not np.any((tokens < 0) | (tokens >= V)), f"{path} is not a row of ids below {V}")
        digest = hashlib.sha256((speaker.directory / "tokenizer.json").read_bytes()).hexdigest()
        insist(not beside.exists() or read_json(beside).get("tokenizer") == digest, f"{path} was "
               f"encoded with another tokenizer than {speaker.directory}'s")
        sizes = np.array([len(speaker.bytes_of(i)) for i in range(V)])
        sizes[list(tokenizer.special_tokens.values())] = 0              # dividers are no text
        size = sizes @ np.bincount(tokens[1:], minlength=V)
    else:
        text = path.read_bytes()
        tokens, size = np.array(speaker.begin + tokenizer.encode(text.decode())), len(text)
    count = len(tokens) - 1
    insist(count > 0, f"{path} holds nothing to predict")
    rows = [tokens[i:i + context + 1] for i in range(0, count, context)]
    # The tokens of a window depend on each other, so the bootstrap draws windows.
    costs = nll(speaker.model, [(row, np.arange(len(row)) > 0) for row in rows], context)
    mean = np.array(interval(costs, [len(row) - 1 for row in rows]))
    return {"tokens": count, "bytes": int(size), "context": context,
            "nats_per_token": mean.tolist(), "perplexity": np.exp(mean).tolist(),
            "bits_per_byte": (mean * count / max(1, size) / math.log(2)).tolist()}

def read_test(speaker: Speaker, row) -> tuple:
    """A row of JSONL -> (what it is, how a person would name its parts, ...), see measure_tests."""
    insist(isinstance(row, dict), "it is not an object")
    kinds = {"choices": {"context", "choices", "answer"}, "answers": {"prompt", "answer"},
             "preferences": {"prompt", "chosen", "rejected"}, "chats": {"messages"}}
    kind = [kind for kind, keys in kinds.items() if keys <= row.keys()]
    insist(len(kind) == 1, 'needed are "context", "choices", "answer", or "prompt", "chosen", '
           f'"rejected", or "prompt", "answer", or "messages"; there is {list(row)}')
    tokenizer, encode_pair = speaker.tokenizer, speaker.encode_pair
    if kind == ["choices"]:
        context, choices, right = row["context"], row["choices"], row["answer"]
        insist(isinstance(choices, list) and all(isinstance(c, str) for c in [context, *choices])
               and all(choices) and type(right) is int and 0 <= right < len(choices),
               '"context" must be a string, "choices" a list of strings, and "answer" the number of '
               "one of them, counted from 0")
        # A blank goes between the two, unless there is white space.
        gaps = ["" if context[-1:].isspace() or c[0].isspace() else " " for c in choices]
        return "choices", [encode_pair(context, gap + c) for gap, c in zip(gaps, choices)], choices, right
    if kind == ["preferences"]:
        texts = [row[key] for key in ("prompt", "chosen", "rejected")]
        if all(isinstance(text, str) for text in texts):
            return "preferences", [encode_pair(texts[0], text) for text in texts[1:]], (), 0
        return "preferences", [encode_chat(tokenizer, *c) for c in conversations(row)], (), 0
    if kind == ["chats"]:
        [(messages, first)] = conversations(row)
        prompt = encode_chat(tokenizer, messages[:-1], reply=True)[0]
        return "chats", encode_chat(tokenizer, messages, first), prompt
    insist(isinstance(row["answer"], str), '"answer" must be a string')
    if isinstance(row["prompt"], str):
        ids = tokenizer.encode(row["prompt"]) or speaker.begin
        return "answers", ids, row["answer"].strip(), "\n" not in row["answer"].strip()
    messages = conversations({"messages": row["prompt"]})[0][0]
    return "answers", encode_chat(tokenizer, messages, reply=True)[0], row["answer"].strip(), False

def measure_choices(speaker: Speaker, tests) -> dict:
    """acc: the likeliest choice is right. That favours short ones, so acc_norm divides ln p by the
    number of characters (as the harness does; not of bytes). Of a preference acc alone."""
    pairs = [pair for _, pairs, *_ in tests for pair in pairs]
    costs, hits = iter(nll(speaker.model, pairs, speaker.context)), {"acc": [], "acc_norm": []}
    for _, pairs, texts, right in tests:
        cost = np.array([next(costs) for _ in pairs])
        hits["acc"].append(cost.argmin() == right)
        if texts:
            hits["acc_norm"].append((cost / list(map(len, texts))).argmin() == right)
    return {"rows": len(tests)} | {name: interval(hit) for name, hit in hits.items() if hit}

def measure_answers(speaker: Speaker, tests, seed: int, how: dict) -> dict:
    """exact: the share of prompts whose answer the model gives, letter by letter but for blanks
    around it. A base model does not stop after an answer, so a one-line answer to a text is
    compared with the first line only; a chat reply ends by itself and is compared whole."""
    hits = []
    for number, (_, prompt, wanted, one_line) in enumerate(tests):
        said = ""
        for piece in Answer(speaker, prompt, seed + number, None, **how):
            said += piece
            if one_line and "\n" in said.lstrip():
                break
        said = said.lstrip().split("\n")[0] if one_line else said
        hits.append(said.strip() == wanted)
        progress(len(tests) - len(hits))
    return {"rows": len(tests), "temperature": how["temperature"], "exact": interval(hits)}

def measure_replies(speaker: Speaker, tests, patterns, replies: int, seed: int, how: dict) -> dict:
    """Let the model reply in the place of the last turn of chats that are spread evenly over the
    file. -> the share of replies that end by themselves, their words, and the share of all words
    that match each pattern."""
    ended, words = [], []
    for number in range(min(replies, len(tests))):
        prompt = tests[number * len(tests) // min(replies, len(tests))][2]
        answer = Answer(speaker, prompt, seed + number, None, **how)
        words.append(re.findall(r"\w+", "".join(answer)))
        ended.append(answer.ended)
        progress(replies - number)
    lengths = [len(said) for said in words]
    shares = {f"{pattern} in words": interval([sum(bool(re.fullmatch(pattern, word)) for word in said)
              for said in words], lengths) for pattern in patterns}
    return {"replies": len(words), "ended": interval(ended), "words": interval(lengths)} | shares

def evaluate(speaker: Speaker, path: Path, args, how: dict) -> dict:
    """-> {name: a number, or [value, low, high]}"""
    if path.suffix in (".txt", ".npy"):
        return measure_text(speaker, path)
    tests, seed = [], args.seed or 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                tests.append(read_test(speaker, json.loads(line)))
                insist(tests[-1][0] == tests[0][0], f"{tests[-1][0]} in a file of {tests[0][0]}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    insist(tests, f"{path} is empty")
    if tests[0][0] == "answers":
        return measure_answers(speaker, tests, seed, how)
    if tests[0][0] == "chats" and args.count:
        return measure_replies(speaker, tests, args.count, args.num_samples or 200, seed, how)
    if tests[0][0] == "chats":
        rows = [row for _, row, _ in tests]
        costs, weights = nll(speaker.model, rows, speaker.context), [sum(mask) for _, mask in rows]
        return {"rows": len(rows), "nats_per_token": interval(costs, weights)}
    return measure_choices(speaker, tests)

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
def explain(speaker: Speaker, text: str) -> list[dict]:
    """For each token of a text, and for the one after its end:

    nats, what the model paid for it, -ln p; the three likeliest tokens at that position and their
    probabilities; and the guess of each layer, had it been the last: the final norm and the output
    matrix applied to what it hands on (the "logit lens", nostalgebraist 2020, on lesswrong.com).
    Early layers were never trained to be read so: theirs are glimpses, not thoughts.
    """
    model, ids = speaker.model, (speaker.begin + speaker.tokenizer.encode(text))[-speaker.context:]
    insist(ids, "there is no text to explain")
    layers = []                                             # logits (T, V) of each
    hooks = [layer.register_forward_hook(lambda layer, inputs, x: layers.append(
        model.lm_head(model.model.norm(x[0])).float())) for layer in model.model.layers]
    try:
        model.hidden(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()

    def spell(i):
        return speaker.bytes_of(i).decode("utf-8", "backslashreplace") or f"[{i}]"
    guesses = [[spell(i) for i in logits.argmax(dim=-1).tolist()] for logits in layers]
    logps = layers[-1].log_softmax(dim=-1)
    positions = [{"token": spell(ids[0])}]                  # nothing came before: no guess
    for t, row in enumerate(logps, 1):
        entry = {"token": spell(ids[t]), "nats": -row[ids[t]].item()} if t < len(ids) else {}
        likeliest = [[spell(i), math.exp(logp)] for logp, i in zip(*map(list, map(
            torch.Tensor.tolist, row.topk(3))))]
        positions.append(entry | {"likeliest": likeliest,
                                  "layers": [guess[t - 1] for guess in guesses]})
    return positions

def print_positions(positions):
    """explain() for people: in a terminal the text, from white (expected) to red; then a table."""
    if sys.stdout.isatty():
        shades = (231, 230, 223, 216, 209, 202)             # of the 256 colours of a terminal
        for entry in positions[:-1]:
            shade = shades[min(len(shades) - 1, int(entry.get("nats", 0)) // 2)]
            token = entry["token"].replace("\n", "↵\033[0m\n")
            print(f"\033[30;48;5;{shade}m{token}", end="\033[0m")
        print(f"\n\nwhite: less than 2 nats; a shade darker every 2, up to {2 * len(shades) - 2}\n")

    def quote(text):
        return json.dumps(text, ensure_ascii=False)
    print(f"{'nats':>5}  {'token':16}  {'likeliest':48}  guess of layer")
    for entry in positions:
        top = "  ".join(f"{quote(token)} {p:.0%}" for token, p in entry.get("likeliest", ()))
        layers, end = [], 0
        for token, same in itertools.groupby(entry.get("layers", ())):
            start, end = end + 1, end + len(list(same))
            layers.append(f"{start if start == end else f'{start}-{end}'} {quote(token)}")
        cost = f"{entry['nats']:5.2f}" if "nats" in entry else " " * 5
        token = quote(entry["token"]) if "token" in entry else "(next)"
        print(f"{cost}  {token:16}  {top:48}  {'  '.join(layers)}")

# ---------------------------------------------------------------- curves

COLOURS = ("#3b7dd8", "#d8643b", "#3ba55d", "#a03bd8", "#c09a1f", "#7a7a7a")

def read_curves(folder: Path, by: str) -> tuple[dict, str]:
    """metrics.jsonl -> ({"training": [(x, y), ...], "held out": ...}, the unit of y). Bits per byte
    if the run knows them: a constant factor of nats per token."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    factor = next((row["val_bpb"] / row["val_loss"] for row in rows if row.get("val_bpb")), None)
    curves = {name: [(row[by], row[key] * (factor or 1)) for row in rows if row.get(key) is not None]
              for name, key in (("training", "loss"), ("held out", "val_loss"))}
    insist(any(curves.values()), f"{folder / 'metrics.jsonl'} has no losses yet")
    return curves, "bits per byte" if factor else "nats per token"

def draw_curves(folders: list[Path], by: str) -> Path:
    """Training loss (thin) and held-out loss (dots) of some runs as one SVG, for any browser, on
    light and dark screens. -> its path: curves.svg in the first folder."""
    runs = [read_curves(folder, by) for folder in folders]
    units = {unit for _, unit in runs}
    insist(len(units) == 1, "some of these runs know their bits per byte and some do not: they can't "
           "be drawn on one scale")
    points = [point for curves, _ in runs for curve in curves.values() for point in curve]
    right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    right, high = right or 1, max(high, low + 1e-3)

    def position(x, y):
        return round(60 + 520 * x / right, 1), round(20 + 300 * (high - y) / (high - low), 1)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370" '
             'font-family="sans-serif" font-size="12">',
             "<style>svg{background:#fff;color:#222}text{fill:currentColor}line{stroke:currentColor;"
             "opacity:.2}polyline{fill:none}@media(prefers-color-scheme:dark){svg{background:#161616;"
             "color:#ddd}}</style>"]
    for i in range(5):          # five grid lines, with the numbers they stand for on both axes
        x, y = position(right * i / 4, low + (high - low) * i / 4)
        parts += [f'<line x1="60" x2="580" y1="{y}" y2="{y}"/>',
                  f'<text x="54" y="{y + 4}" text-anchor="end">{low + (high - low) * i / 4:.2f}</text>',
                  f'<text x="{x}" y="338" text-anchor="middle">{right * i / 4:,.0f}</text>']
    for i, (folder, (curves, _)) in enumerate(zip(folders, runs)):
        colour = COLOURS[i % len(COLOURS)]
        for name, curve in curves.items():
            line = " ".join(f"{x},{y}" for x, y in (position(*point) for point in curve))
            width = 0.7 if name == "training" else 2
            parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="{width}"/>')
        last = ", ".join(f"{name} {curve[-1][1]:.3f}" for name, curve in curves.items() if curve)
        title = f"{folder}: {last}".replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f'<text x="574" y="{36 + 18 * i}" text-anchor="end" style="fill:{colour}">'
                     f"{title}</text>")
    parts += [f'<text x="320" y="360" text-anchor="middle">{by}</text>',
              '<text transform="translate(14 170) rotate(-90)" text-anchor="middle">'
              f"loss, {units.pop()}</text>", "</svg>"]
    with write_whole(folders[0] / "curves.svg") as file:
        file.write("\n".join(parts).encode())
    return folders[0] / "curves.svg"

# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse itself would print its whole usage before it
        raise ValueError(f"{message}; see --help")

def newest_model(parent: Path) -> Path:
    """The directory in `parent` whose model was saved last. Raises ValueError if there is none."""
    models = sorted(parent.glob("*/model.safetensors"), key=os.path.getmtime)
    insist(models, f"{parent} holds no model yet: train one with python train.py, or name a directory")
    return models[-1].parent

def read_text(text: str) -> str:
    """What a flag means: TEXT itself, the contents of @FILE, or for - standard input."""
    if text == "-":
        return sys.stdin.read()
    return Path(text[1:]).read_text("utf-8") if text.startswith("@") else text

def read_flags(argv) -> argparse.Namespace:
    parser = Parser("sample.py", description="Talk to a model, measure it, look inside it.")
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    add("models", nargs="*", metavar="DIR", type=Path,
        help="the model, for --eval and --curves also several [the newest in out/]")
    modes.add_argument("--prompt", default="", metavar="TEXT", help="continue TEXT, what is in "
                       "@FILE, or - for standard input [begin a new document]")
    modes.add_argument("--chat", action="store_true", help="talk, turn by turn")
    modes.add_argument("--eval", metavar="FILE", type=Path, help="measure on .txt, .npy or .jsonl")
    modes.add_argument("--explain", metavar="TEXT", help="show cost and guesses of each token")
    modes.add_argument("--curves", action="store_true", help="draw losses to DIR/curves.svg")
    add("--system", default="", metavar="TEXT", help="--chat: who the model is to be")
    add("--count", nargs="+", metavar="REGEX", help="--eval of chats: let the model reply, and count "
        "the words that match")
    add("--num_samples", type=int, metavar="N", help="continuations, or replies [1; --count: 200]")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="of each [%(default)s]")
    add("--temperature", type=float, metavar="X", help="0: always the likeliest token; higher: more "
        "surprising, above 1.5 nonsense [0.8; 0 for exact answers]")
    add("--top_k", type=int, metavar="K", help="draw among the K likeliest tokens; lower is safer")
    add("--top_p", type=float, default=1.0, metavar="P", help="among the likeliest that together "
        "have probability P; lower is safer [%(default)s]")
    add("--min_p", type=float, default=0.0, metavar="P", help="among those at least P times as "
        "likely as the likeliest; higher is safer [%(default)s]")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text [a new one each "
        "time; --eval: 0]")
    add("--context", type=int, metavar="N", help="tokens that the model sees at once [as many as it "
        "was trained on, at most 8192]")
    add("--by", choices=("step", "seconds"), default="step", help="--curves: the axis [%(default)s]")
    add("--json", action="store_true", help="for programs: one object a line")
    add("--device", choices=("cpu", "cuda", "mps"), help="[the fastest one here]")
    add("--dtype", choices=(*DTYPES, "int8"), help="of the weights; int8 is smallest, a little off "
        "[as in the file, so that figures are those of training]")
    args = parser.parse_args(argv)
    insist(len(args.models) < 2 or args.eval or args.curves, f"{len(args.models)} models can be "
           "compared by --eval or --curves only")
    insist(not (args.chat and args.json), "--chat is for people; --json goes with the other modes")
    for name in "num_samples", "max_new_tokens", "context":
        insist(getattr(args, name) is None or getattr(args, name) > 0, f"--{name} must be above 0")
    return args

def run(argv=None):
    """Do what the flags say. Raises ValueError or OSError, one line, for bad input."""
    args = read_flags(argv)
    # Not every terminal and pipe can write every character; that is no reason to stop.
    sys.stdout.reconfigure(errors="replace")
    models = args.models or [newest_model(Path("out"))]
    if args.curves:
        print(draw_curves(models, args.by))
        return
    device, columns = pick_device(args.device), {}
    exact = args.eval and not args.count
    how = {name: getattr(args, name) for name in ("max_new_tokens", "top_k", "top_p", "min_p")}
    how["temperature"] = args.temperature if args.temperature is not None else 0.0 if exact else 0.8
    for directory in models:
        speaker = Speaker(directory, device, args.dtype, args.context)
        if args.chat:
            chat(speaker, args.system, args.seed, how)
        elif args.explain is not None:
            positions = explain(speaker, read_text(args.explain))
            if args.json:
                print(*map(json.dumps, positions), sep="\n")
            else:
                print_positions(positions)
        elif args.eval:
            columns[str(directory)] = evaluate(speaker, args.eval, args, how)
        else:
            args.num_samples = args.num_samples or 1
            continue_text(speaker, read_text(args.prompt), args, how)
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

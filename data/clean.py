# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# ///
"""From raw text to training text: take out what a model should not learn from, and count it.

    python data/clean.py crawl/ more.jsonl.gz --out data/clean
    python train.py --data data/clean/train --val_data data/clean/val

Reads text, .jsonl (rows with "text") and .html, each also as .gz; of folders, the .txt, .md, .jsonl
and .html files; as -, rows on standard input. OUT gets train/ and val/ with rows of "text" and
"source"; dropped.jsonl, which names every dropped document and its rule; and report.json, which is
also printed: what came in, what each rule took, with three examples, and what came out. The steps:

1 repair       broken UTF-8, control characters, markup: all other steps compare characters
2 boilerplate  lines that many documents share, so that 3 judges a page without its menu
3 documents    too short, too repetitive, no sentences: a table of rules, each on one document
4 evaluation   documents that share 13 words in a row with the files given as --against
5 personal     e-mail addresses, phone numbers and IP addresses become placeholders. Not caught:
               names, street addresses, IPv6, "me at home dot net", numbers written otherwise
6 copies       documents equal to an earlier one, and those that share most of their 5-word
               sequences with one. Late, so that the one that stays has passed all rules
7 split        by a hash of the cluster of copies: none stands on both sides, even with --without
               near-copies, and a text keeps its side when the input grows

--without RULE switches off what the report calls so. Steps 1 to 5 work on batches of 16 MB, on all
cores; step 6 compares signatures that lie on disk. So the output does not depend on the number of
cores, and memory stays below 2 GB up to 50 million documents. All is built in OUT.part, which
becomes OUT at the end; after a kill, the same command begins again. Run one at a time for one OUT.

Left out, as each took below 0.7% of 190 MB of manuals, web pages and code: mojibake; Gopher's rules
on bullets, ellipses, paragraphs, commonest sequences, sequences of 6 to 10 words; C4's on sentences
and cookies. Not measured: stop words, which depend on the language. C4: arXiv:1910.10683. Gopher:
arXiv:2112.11446, appendix A. FineWeb: arXiv:2406.17557. GPT-3: arXiv:2005.14165, appendix C.
"""
import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache
from html.parser import HTMLParser
from itertools import chain, count, islice, repeat
from pathlib import Path

import numpy as np

# Bytes of a process's work, of the longest row, of text read at once; characters of a document.
BATCH, LONGEST, PART, CUT = 1 << 24, 1 << 23, 1 << 20, 400_000

# ---------------------------------------------------------------- 1 reading and repair

def find_files(names) -> list[Path]:
    """Files, and those in folders, sorted, lest their order on the disk decides."""
    paths = [Path("/dev/stdin" if name == "-" else name) for name in names]
    inside = (path.rglob("*") if path.is_dir() else [path] for path in paths)
    return [file for files in inside for file in sorted(files) if file in paths or file.is_file()
            and re.search(r"\.(txt|md|jsonl|html?)(\.gz)?$", file.name)]

def read_file(path):
    """-> (source, kind, bytes) of every row, page or part of a text; of an empty row for a fault"""
    kind, at = path.name.removesuffix(".gz").rpartition(".")[2].replace("stdin", "jsonl"), 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            while data := file.readline(LONGEST) if kind == "jsonl" else (
                    file.read(PART) + file.readline(PART)):     # to the end of a line
                yield f"{path}@{at}", kind, data
                at += len(data)
                # Text shrinks 3 to 20 times; what grows more than 100 times is a bomb.
                if at > LONGEST + 100 * path.stat().st_size and path.suffix == ".gz":
                    raise EOFError("grows more than 100 times")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield f"{path}@{at}: {error}", "jsonl", b"{}"

def batches(paths):
    """-> lists of what read_file() yields, about BATCH bytes each: the work of one process"""
    batch, size = [], 0
    for part in chain.from_iterable(map(read_file, paths)):
        batch.append(part)
        size += len(part[2])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch

class Page(HTMLParser):
    """Collects the text of a page, without the parts that nobody reads as its text."""
    HIDDEN = set("script style template noscript svg head nav header footer aside form".split())
    INLINE = set("a abbr b code em font i kbd mark q s small span strong sub sup tt u var".split())
    hidden = None

    def handle_starttag(self, tag, attrs):
        self.hidden = self.hidden or (tag if tag in self.HIDDEN else None)
        self.handle_data("" if tag in self.INLINE else "\n")

    def handle_endtag(self, tag):
        self.hidden = self.hidden if tag != self.hidden else None
        self.handle_data("" if tag in self.INLINE else "\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)

LINE_END = re.compile("(?:(?<![ \t])[ \t]+)?(?:\r\n?|[\n\x0b\x0c\x85\u2028\u2029])")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")

def read_text(kind, data) -> str:
    """-> the text in Unicode's normal form C, with newlines and no other control characters"""
    text = data.decode("utf-8", "replace").strip("\ufeff \r\n")
    if kind == "jsonl" and text:
        text = json.loads(text)["text"] + ""
    elif kind in ("html", "htm"):
        page = Page()
        page.parts = []
        page.feed(text + "<br>")        # close() would try every open tag in turn, for hours
        text = "".join(page.parts)
    text = LINE_END.sub("\n", unicodedata.normalize("NFC", text))
    return re.sub("\n{3,}", "\n\n", CONTROL.sub("", text)).strip("\n")

# ---------------------------------------------------------------- 2 boilerplate

# A line that five documents of a batch have is taken out of the next ones. The five keep it, so no
# line is lost altogether. Lines below 20 characters, like "}" or "Usage:", belong to their texts.
REPEATS, LINE = 5, 20

def clean_lines(text, source, seen, taken) -> str:
    lines = text.split("\n")
    seen.update({line for line in lines if len(line) >= LINE})
    taken += [note("boilerplate", source, line) for line in lines if seen[line] > REPEATS]
    return "\n".join(line for line in lines if seen[line] <= REPEATS)

# ---------------------------------------------------------------- 3 documents

# A word is a run of letters and digits. Chinese and Japanese have no spaces: each character counts.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")
SENTENCE_END = re.compile("[.!?。！？…।؟][\"'”’»)]?$")

def digest(text) -> int:
    """A hash of 64 bits; Python's own differs from process to process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

def hashes_of(words, cached=lru_cache(1 << 18)(digest)) -> np.ndarray:
    """Most words come often, so their hashes are cached, and long ones cut, lest memory fills."""
    return np.array([cached(word[:64]) for word in words], np.uint64)

def sequences(codes, n) -> np.ndarray:
    """(N,) hashes of words -> (N - n + 1,) hashes of all sequences of n words"""
    total = np.zeros(max(0, len(codes) - n + 1), np.uint64)
    for i in range(n):          # the factor is odd, so a product modulo 2^64 loses nothing
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[i:i + len(total)]
    return total

def share(parts, test) -> float:
    return sum(bool(test(part)) for part in parts) / max(1, len(parts))

def again(parts, size) -> float:
    """The share, by size, of the parts that came before."""
    return 1 - sum(map(size, set(parts))) / max(1, sum(map(size, parts)))

def again_in_sequences(words, codes, n) -> float:
    """The share of the letters in sequences of n words that came before."""
    lengths, grams = np.array(list(map(len, words)), int), sequences(codes, n)
    before = np.arange(len(words) + 1) < len(grams)
    before[np.unique(grams, return_index=True)[1]] = False
    covered = np.convolve(before, np.ones(n))[:len(words)] > 0.5
    return lengths[covered].sum() / max(1, lengths.sum())

# Name, lowest and highest value that stays, source, value of (text, lines, words, their hashes).
# Cheap ones come first. A Chinese word has about 2 characters, and would have 4 letters.
RULES = (
    ("words", 50, 100_000, "Gopher", lambda t, l, w, h: len(w)),
    ("word-length", 3, 10, "Gopher", lambda t, l, w, h: sum(
        4 if word >= "\u3040" else len(word) for word in w) / max(1, len(w))),
    ("hash-signs", 0, 0.1, "Gopher: per word", lambda t, l, w, h: t.count("#") / max(1, len(w))),
    ("numbers", 0, 0.2, "Gopher: share of words", lambda t, l, w, h: share(w, str.isdigit)),
    ("not-utf-8", 0, 0.01, "here: share of characters", lambda t, l, w, h: (
        t.count("\ufffd") / max(1, len(t)))),
    ("sentence-ends", 0.12, 1, "FineWeb: share of lines",
     lambda t, l, w, h: share(l, SENTENCE_END.search)),
    ("short-lines", 0, 0.67, "FineWeb: share of lines",
     lambda t, l, w, h: share(l, lambda line: len(line) < 30)),
    ("lines-again", 0, 0.3, "Gopher: share of lines", lambda t, l, w, h: again(l, bool)),
    ("letters-again", 0, 0.1, "FineWeb: the same by size", lambda t, l, w, h: again(l, len)),
    ("5-words-again", 0, 0.15, "Gopher", lambda t, l, w, h: again_in_sequences(w, h, 5)),
)

# ---------------------------------------------------------------- 4 evaluation, 5 personal data

# Rule, pattern, and a placeholder that belongs to nobody.
PERSONAL = (
    ("e-mail", r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,24}\b", "someone@example.com"),
    ("phone", r"(?<![\w.+-])(?:\+[1-9][\d ().-]{6,16}\d|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})"
              r"(?![\w-])", "+1 202 555 0100"),
    ("ip-address", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)", "192.0.2.1"),
)

def evaluation_sequences(names) -> np.ndarray:
    """Sorted hashes of all sequences of 13 words in evaluation files; of .jsonl, in all values."""
    found = [np.array([2**64 - 1], np.uint64)]          # where the search for larger hashes ends
    for _, kind, data in chain.from_iterable(map(read_file, find_files(names))):
        text = data.decode("utf-8", "replace")
        if kind == "jsonl" and text.strip():
            text = " ".join(map(str, json.loads(text).values()))
        found.append(sequences(hashes_of(WORD.findall(text.lower())), 13))
    return np.unique(np.concatenate(found))

def contains(evaluation, hashes) -> bool:
    shared = sequences(hashes, 13)
    return (evaluation[np.searchsorted(evaluation[:-1], shared)] == shared).any()

# ---------------------------------------------------------------- 6 copies

# Two texts are near copies if their sets of 5-word sequences are alike: the Jaccard similarity J is
# the size of what both have divided by the size of what either has. Hash all sequences of both: the
# smallest hash belongs to a sequence that both have with probability J. So of 112 smallest hashes,
# under 112 hash functions, about 112 J agree, and a signature of 448 bytes stands for a text of any
# length (MinHash, Broder 1997). To avoid comparing all with all, it is cut into 14 bands of 8, and
# only texts that agree in a whole band are compared: with J = 0.8 the probability of that is
# 1 - (1 - J^8)^14 = 0.92, with 0.9 0.9996, with 0.5 0.05. FineWeb (section 3.4) drops all that meet
# so; here, as a check, 0.7 of the whole signatures must agree, too.
BANDS, ROWS, SIMILAR = 14, 8, 0.7
XOR, FACTOR = np.frombuffer(hashlib.shake_128(b"clean").digest(8 * BANDS * ROWS),
                            np.uint32).reshape(2, -1, 1)        # random numbers, (112, 1) each
WEIGHTS = np.frombuffer(hashlib.shake_128(b"bands").digest(8 * ROWS), np.uint64)

def signature(grams) -> np.ndarray:
    """(N,) hashes of sequences -> (112,), the smallest one under each of 112 hash functions"""
    smallest = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    for i in range(0, len(grams), 2048):                        # (112, 2048) fits into the cache
        hashes = (grams[i:i + 2048] >> np.uint64(32)).astype(np.uint32)
        smallest = np.minimum(smallest, ((hashes ^ XOR) * (FACTOR | 1)).min(1))
    return smallest

def root(parent, i) -> int:
    """Union-find: follow the pointers to the first document of the cluster, and shorten the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i

def find_copies(keys, signatures) -> np.ndarray:
    """(N, 15), (N, 112) -> (N,) pointers from each document to an earlier copy, or to itself; (N,)
    whether no earlier one is equal"""
    parent, new = np.arange(len(keys)), np.zeros(len(keys), bool)
    new[np.unique(keys[:, 0], return_index=True)[1]] = True
    for column in keys.T:               # the hash of the text, then those of its bands
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order[1:]] == column[order[:-1]])
        for some in np.array_split(same, 1 + len(same) // 10_000):
            a, b = order[some], order[some + 1]
            alike = (signatures[a] == signatures[b]).mean(1) >= SIMILAR
            alike |= keys[a, 0] == keys[b, 0]
            for pair in np.stack([a, b], 1)[alike].tolist():
                first, second = sorted(root(parent, i) for i in pair)
                parent[second] = first
    return parent, new

# ---------------------------------------------------------------- the whole

def note(rule, source, text):
    """What a process reports when a rule took something."""
    return rule, source, len(text.encode("utf-8", "replace")), " ".join(text[:200].split())[:80]

def clean_batch(task):
    """Steps 1 to 5 -> what they took; keys and signatures, which 6 compares"""
    (options, number, batch), taken, kept, keys, signatures, seen = task, [], [], [], [], Counter()
    evaluation = np.load(f"{options.work}/evaluation.npy", mmap_mode="r")
    rules = [*RULES, ("evaluation", 0, 0, "", lambda t, l, w, h: contains(evaluation, h))]
    for source, kind, data in batch:
        try:
            rest = read_text(kind, data)
        except (ValueError, TypeError, KeyError, RecursionError):
            taken.append(note("unreadable", source, data.decode("utf-8", "replace")))
            continue
        while rest:
            end = rest.rfind("\n", 0, CUT) + 1 or CUT if len(rest) > CUT else len(rest)
            text, rest = rest[:end], rest[end:]
            taken.append(note("in", source, text))
            taken += [note("broken-utf-8", source, text)] * ("\ufffd" in text)
            key = digest(text)
            if "boilerplate" not in options.without:
                text = clean_lines(text, source, seen, taken)
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            words = WORD.findall(text.lower())
            hashes = hashes_of(words)
            failed = next((name for name, low, high, _, value in rules if not (
                name in options.without or low <= value(text, lines, words, hashes) <= high)), None)
            if failed:
                taken.append(note(failed, source, text))
                continue
            for name, pattern, placeholder in PERSONAL:
                if name not in options.without:
                    taken += [(name, source, len(found.encode()), found[:2] + "...")
                              for found in re.findall(pattern, text)]       # not shown in full
                    text = re.sub(pattern, placeholder, text)
            kept.append((source, text))
            signatures.append(signature(sequences(hashes, max(1, min(5, len(words))))))
            keys.append([key, *signatures[-1].reshape(BANDS, ROWS).astype(np.uint64) @ WEIGHTS])
    Path(f"{options.work}/{options.pid}-{number}").write_bytes(pickle.dumps(kept))
    return taken, np.array(keys, np.uint64), np.array(signatures, np.uint32)

def parallel(options, paths):
    """The results of clean_batch() for all batches, in order, on all cores, with a live line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in paths)
    work, began, done = batches(paths), time.monotonic(), 0
    # The processes leave Ctrl-C to this one. If it is gone, they end after their batch, and what
    # they write then has its number in the name, so a new run does not read it.
    with multiprocessing.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        while some := list(islice(work, 2 * cores)):            # no more than that is in memory
            results = pool.imap(clean_batch, zip(repeat(options), count(done), some))
            for _ in some:
                yield results.next(timeout=600)                 # lest it waits for a killed process
                done += 1
                left = (time.monotonic() - began) * max(0, total / BATCH / done - 1)
                if sys.stderr.isatty():
                    print(f"\r{done * BATCH >> 20} MB, {left:.0f} s left ", end="", file=sys.stderr)

def clean(options, report) -> None:
    """All steps, with files in options.work, of which those in "out" are the result."""
    work, sizes, i = options.work, [], 0
    files = {name: open(f"{work}/{name}", "wb", buffering=0) for name in FILES}
    def add(taken):
        for rule, source, size, text in taken:
            report[rule]["times"] += 1
            report[rule]["bytes"] += size
            report[rule]["examples"] += [f"{source}: {text}"] * (len(report[rule]["examples"]) < 3)
            if rule in DROPPING:
                write("out/dropped.jsonl", rule=rule, source=source, text=text)
    def write(name, **row):
        files[name].write(json.dumps(row).encode() + b"\n")
    np.save(f"{work}/evaluation.npy", evaluation_sequences(options.against))
    for taken, keys, signatures in parallel(options, find_files(options.files)):
        add(taken)
        files["keys"].write(keys)
        files["signatures"].write(signatures)
        sizes.append(len(keys))
    if not sum(sizes):
        raise ValueError(f"no text passed the rules, of {report['in']['times']}; see --without")
    keys = np.memmap(f"{work}/keys", np.uint64, "r").reshape(-1, 1 + BANDS)
    signatures = np.memmap(f"{work}/signatures", np.uint32, "r").reshape(-1, BANDS * ROWS)
    parent, new = find_copies(keys, signatures)
    for number in range(len(sizes)):
        for source, text in pickle.loads(Path(f"{work}/{options.pid}-{number}").read_bytes()):
            first = root(parent, i)
            rule = "near-copies" if new[i] else "copies"
            if first == i or rule in options.without:
                rule = "val" if keys[first, 0] < options.val * 2**64 else "train"
                write(f"out/{rule}/text.jsonl", text=text, source=source)
            add([note(rule, source, text)])
            i += 1

FILES = "keys", "signatures", "out/dropped.jsonl", "out/train/text.jsonl", "out/val/text.jsonl"
DROPPING = [*(rule[0] for rule in RULES), "evaluation", "copies", "near-copies"]
NAMES = ["unreadable", "in", "broken-utf-8", "boilerplate", *DROPPING,
         *(rule[0] for rule in PERSONAL), "train", "val"]

def main() -> int:
    parser = argparse.ArgumentParser("clean.py", usage="clean.py FILE ... --out DIR; see --help")
    parser.add_argument("files", nargs="+", help="text, .jsonl, .html, these as .gz, folders, or -")
    parser.add_argument("--out", required=True, help="folder for train/, val/ and the report")
    parser.add_argument("--against", nargs="+", default=[], help="evaluation files")
    parser.add_argument("--val", type=float, default=0.02, help="share of documents [%(default)s]")
    parser.add_argument("--without", nargs="+", default=[], choices=NAMES, help="rules: off")
    options = parser.parse_args()
    options.work, options.pid = options.out.rstrip("/") + ".part", os.getpid()
    report = {name: {"times": 0, "bytes": 0, "examples": []} for name in NAMES}
    try:
        if os.path.exists(options.out):
            raise ValueError(f"{options.out} is there already; delete it or choose another --out")
        shutil.rmtree(options.work, ignore_errors=True)
        os.makedirs(f"{options.work}/out/train")
        os.makedirs(f"{options.work}/out/val")
        clean(options, report)
        Path(f"{options.work}/out/report.json").write_text(json.dumps(report, indent=1))
        os.rename(f"{options.work}/out", options.out)
    except (KeyboardInterrupt, multiprocessing.TimeoutError, ValueError, OSError) as error:
        print(f"\nclean.py: {error or type(error).__name__}; nothing written", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    limits = {name: f"{low} to {high} stay, {source}" for name, low, high, source, _ in RULES}
    for name, entry in report.items():
        print(f"{name:18}{entry['times']:11,}{entry['bytes']:16,} bytes"
              f"{entry['bytes'] / max(1, report['in']['bytes']):8.2%}  {limits.get(name, '')}",
              *entry["examples"], sep="\n    ")
    return 0

if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# ///
"""From raw text to training text: take out what a model should not learn from, and count it.

    python data/clean.py crawl/ more.jsonl.gz --out data/clean
    python train.py --data data/clean/train --val_data data/clean/val

Reads text, .jsonl (rows with a "text") and .html, each also as .gz, folders of these, and rows from
/dev/stdin. Writes OUT/train and OUT/val, rows of "text" and "source"; OUT/dropped.jsonl, which
names what was dropped; and OUT/report.json, also printed: what came in, what each rule took, with
three examples, and what came out. --without RULE switches a rule off. The steps:

1 repair       markup, broken UTF-8, control characters, because all else compares characters
2 boilerplate  lines that many documents share, so that step 3 judges a page without its menu
3 documents    too short, too repetitive, no sentences: a table of rules, each on one document
4 evaluation   documents that share 13 words in a row with the files given as --against
5 personal     e-mail addresses, phone numbers and IP addresses become placeholders. Not caught:
               names, street addresses, IPv6, "me at home dot net", most ways to write a number
6 copies       equal documents, and those that share most of their sequences of 5 words: the first
               in the order of the input stays. Late, so that what stays has passed the rules
7 split        by a hash of the cluster of copies, so that copies never stand on both sides

All cores work on steps 1 and 3 to 5; step 2, between them, runs in one process, because it counts
across the whole input; step 6 compares records that lie on disk. So the output does not depend on
the number of cores, and memory is 0.6 GB, 0.2 GB for each core and 60 bytes for each document. All
is built in OUT.part, which becomes OUT at the end: after a kill, run the same command again.

The rules are for prose: for source code, and for Thai, which has no full stops, use --without
sentence-ends short-lines. Left out, by what they take of 950 MB of manuals, web pages and code:
mojibake (0.03%); what took below 1% of what the others leave, Gopher's rules on bullets, ellipses,
paragraphs, commonest sequences, sequences of 6 to 10 words, FineWeb's on letters in repeated lines,
C4's on sentences and cookies. On arXiv: C4 1910.10683, CCNet 1911.00359, FineWeb 2406.17557, Gopher
(appendix A) 2112.11446, GPT-3 (appendix C) 2005.14165.
"""
import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, namedtuple
from functools import partial
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

# Bytes of a core's work at a time; of the longest row or page; of the parts of a longer text.
BATCH, LONGEST, PART = 1 << 24, 1 << 22, 400_000

# ---------------------------------------------------------------- 1 reading and repair

def read(names):
    """-> (source, kind, bytes) of rows, pages and parts of a text, up to a line end; of a row "{"
    for a fault. Shows progress. Folders are sorted: the order must not depend on the disk."""
    files, done, began = [], 0, time.monotonic()
    for path in map(Path, names):
        files += sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]
    total = sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in files)
    for path in files:
        kind, at = path.name.removesuffix(".gz").rpartition(".")[2].replace("stdin", "jsonl"), 0
        size = {"jsonl": 0, "html": LONGEST}.get(kind, PART)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            try:
                while data := file.read(size) + file.readline(size or LONGEST):
                    yield f"{path}@{at}", kind, data
                    at += len(data)
                    done += len(data)
                    if done % BATCH < len(data) and sys.stderr.isatty():    # once for each BATCH
                        left = (time.monotonic() - began) * max(0, total / done - 1)
                        print(f"\r{done >> 20} MB, {left:.0f} s left ", end="", file=sys.stderr)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield f"{path}@{at}: {error}", "jsonl", b"{"

class Page(HTMLParser):
    """Collects the text of a page, without the parts that nobody reads as its text."""
    HIDDEN = set("script style template noscript svg nav header footer aside form".split())
    INLINE = set("a abbr b code em font i kbd mark q s small span strong sub sup tt u var".split())

    def handle_starttag(self, tag, attrs, change=1):
        self.open[tag] = max(0, self.open[tag] + change)
        self.parts.append("" if tag in self.INLINE else "\n")

    def handle_endtag(self, tag):
        self.handle_starttag(tag, None, -1)

    def handle_data(self, data):
        if not any(self.open[tag] for tag in self.HIDDEN):
            self.parts.append(data if self.open["pre"] else re.sub(r"\s+", " ", data))

def decode(kind, data) -> str:
    """A part's bytes -> its text; U+FFFD stands for what is not UTF-8."""
    text = data.decode("utf-8", "replace").strip("\ufeff \r\n")
    if kind == "jsonl" and text:
        text = json.loads(text)["text"] + ""    # a TypeError if it is no text
    elif kind == "html":
        page = Page()
        page.parts, page.open = [], Counter()
        page.feed(text + "<br>")        # close() would try every open tag in turn, for hours
        text = "".join(page.parts)
    return text

def normalize(text) -> str:
    """Unicode's normal form C; no control characters but tabs and newlines"""
    lines = unicodedata.normalize("NFC", text).splitlines()     # they also end in \r, \f, \u2028
    text = re.sub("\n{3,}", "\n\n", "\n".join(map(str.rstrip, lines))).strip("\n")
    return re.sub("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]+", "", text)

# ---------------------------------------------------------------- 2 boilerplate

# A line that REPEATS documents have is taken out of all later ones, wherever in the input they are.
# C4 (section 2.2) does so with sentences and CCNet with paragraphs. The first documents keep it, so
# nothing is lost altogether. Lines below LINE characters, like "}" or "Usage:", stay. To bound the
# memory, LINES counters are halved, and those at 0 dropped: what comes less often than every 500 MB
# is missed. Counters are found by hashes of 32 bits: 1 line in 10,000 is taken for another one.
REPEATS, LINE, LINES = 5, 20, 5_000_000

def drop_boilerplate(documents, options, add):
    """(notes, source, text) of repair(), in order -> (source, text, text without boilerplate)"""
    counts = Counter()
    for notes, source, text in documents:
        lines, often = text.split("\n"), {}
        if "boilerplate" not in options.without:
            number = {line: zlib.crc32(line.encode()) for line in lines if len(line) >= LINE}
            counts.update(set(number.values()))
            often = {line: note("boilerplate", source, line)
                     for line, n in number.items() if counts[n] > REPEATS}
        if len(counts) > LINES:
            counts = Counter({n: count // 2 for n, count in counts.items() if count > 1})
        add([*notes, *often.values()])
        if text:
            yield source, text, "\n".join(line for line in lines if line not in often)

# ---------------------------------------------------------------- 3 to 5 documents

# A word is a run of letters, marks and digits. Thai, Lao, Burmese, Khmer, Japanese and Chinese have
# no spaces between words: there, each character counts as a word.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0970-\u0dff"
LETTER = f"[^\\W_{NO_SPACES}]"
WORD = re.compile(f"{LETTER}+(?:[{MARKS}]+{LETTER}*)*|[{NO_SPACES}]")
SENTENCE_END = re.compile("[.!?…。！？।؟۔።၊။។][\"'”’»)」』）]?$")

# From here on in Unicode (Thai to Korean), a character says as much as two letters or more, and the
# rules were made for English. So it counts as two letters (dense = 2), and as four if it is a word.
DENSE = "\u0e00"

def words_of(text):
    """-> the words, and (N,) hashes of them"""
    words = WORD.findall(text.lower())
    return words, np.array([zlib.crc32(word.encode()) for word in words], np.uint64)

def sequences(hashes, n) -> np.ndarray:
    """(N,) hashes of words -> (N - n + 1,) hashes of sequences of n words"""
    total = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n):          # the factor is odd, so a product modulo 2^64 loses nothing
        total = (total + hashes[i:i + len(total)]) * np.uint64(0x9E3779B97F4A7C15)
    return total

def share(parts, test) -> float:
    return sum(bool(test(part)) for part in parts) / max(1, len(parts))

def again_in_sequences(words, hashes, n) -> float:
    """The share of the letters in sequences of n words that came before."""
    lengths, grams = np.array(list(map(len, words)), int), sequences(hashes, n)
    before = np.arange(len(words) + 1) < len(grams)
    before[np.unique(grams, return_index=True)[1]] = False
    covered = np.convolve(before, np.ones(n))[:len(words)] > 0.5
    return lengths[covered].sum() / max(1, lengths.sum())

def evaluation_sequences(names) -> set[int]:
    """Hashes of all sequences of 13 words in evaluation files. What is shorter cannot be found.
    GPT-3 cuts the passage out of a document; here, the document goes."""
    found = set()
    for source, kind, data in read(names):
        if data == b"{":
            raise ValueError(f"cannot read {source}")
        text = re.sub(r"\\u([0-9a-fA-F]{4})|\\[nrt]",      # JSON's escapes would change the words
                      lambda code: chr(int(code[1] or "20", 16)), data.decode("utf-8", "replace"))
        found.update(sequences(words_of(normalize(text))[1], 13).tolist())
    return found

Document = namedtuple("Document", "text lines words hashes dense stop_words evaluation")
# Name, lowest and highest value that stays, source and unit, value. Cheap ones come first. Why: few
# words are a heading or a leftover; very long ones are data; signs, numbers, and lines that are
# short or have no full stop are tables, logs, lists and menus; what comes again was generated.
RULES = (
    ("words", 50, 100_000, "Gopher", lambda d: len(d.words)),
    ("word-length", 3, 10, "Gopher: mean", lambda d: np.mean(
        [4 if word >= DENSE else len(word) for word in d.words or [""]])),
    ("hash-signs", 0, 0.1, "Gopher: per word", lambda d: d.text.count("#") / max(1, len(d.words))),
    ("numbers", 0, 0.2, "Gopher: of words", lambda d: share(d.words, str.isdigit)),
    ("not-utf-8", 0, 0.05, "per word", lambda d: d.text.count("\ufffd") / max(1, len(d.words))),
    ("sentence-ends", 0.12, 1, "FineWeb: of lines", lambda d: share(d.lines, SENTENCE_END.search)),
    ("short-lines", 0, 0.67, "FineWeb: of lines",
     lambda d: share(d.lines, lambda line: len(line) * d.dense < 30)),
    ("lines-again", 0, 0.3, "Gopher: of lines",
     lambda d: 1 - len(set(d.lines)) / max(1, len(d.lines))),
    ("5-words-again", 0, 0.15, "Gopher: of letters",
     lambda d: again_in_sequences(d.words, d.hashes, 5 * d.dense)),
    ("stop-words", 2, 100_000, "Gopher: different ones of --stop-words",
     lambda d: len(d.stop_words & set(d.words)) if d.stop_words else 2),
    ("evaluation", 0, 0, "GPT-3: sequences of 13 words that are in --against",
     lambda d: len(d.evaluation & set(sequences(d.hashes, 13).tolist()))),
)

# Rule, pattern, and a placeholder that belongs to nobody.
PERSONAL = (
    ("e-mail", r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,24}\b", "someone@example.com"),
    ("phone", r"(?<![\w.+-])(?:\+[1-9][\d ().-]{6,16}\d|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})"
              r"(?![\w-])", "+1 202 555 0100"),
    ("ip-address", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)", "192.0.2.1"),
)

# ---------------------------------------------------------------- 6 copies

# Two texts are near copies if their sets of 5-word sequences are alike: the Jaccard similarity J is
# the size of what both have divided by the size of what either has. Hash all sequences of both: the
# smallest hash belongs to a sequence that both have with probability J. So of 112 smallest hashes,
# under 112 hash functions, about 112 J agree, and a signature of 448 bytes stands for a text of any
# length (MinHash, Broder 1997). To avoid comparing all with all, it is cut into 14 bands of 8, and
# only texts that agree in a whole band are compared: with J = 0.8 the probability of that is
# 1 - (1 - J^8)^14 = 0.92, with 0.9 0.9996, with 0.5 0.05. FineWeb (section 3.4) drops all that meet
# so; here, 0.72 of the whole signatures must agree, too, so that few with J < 0.7 are dropped.
BANDS, ROWS, SIMILAR = 14, 8, 0.72
XOR, FACTOR = np.random.RandomState(0).randint(2**32, size=(2, BANDS * ROWS, 1), dtype=np.uint32)

def signature(grams) -> np.ndarray:
    """(N,) hashes of sequences -> (112,), the smallest one under each of 112 hash functions"""
    smallest = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    for i in range(0, len(grams), 2048):                        # (112, 2048) fits into the cache
        hashes = (grams[i:i + 2048] >> np.uint64(32)).astype(np.uint32)
        smallest = np.minimum(smallest, ((hashes ^ XOR) * (FACTOR | 1)).min(1))
    return smallest

def record_of(text) -> bytes:
    """What find_copies() compares: 15 hashes, of the text and of the bands; the signature"""
    words, hashes = words_of(text)
    smallest = signature(sequences(hashes, max(1, min(5, len(words)))))
    bands = sequences(smallest.astype(np.uint64), ROWS)[::ROWS]
    key = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return key + bands.tobytes() + smallest.tobytes()

def root(parent, i) -> int:
    """Union-find: follow the pointers to the first document of the cluster, and shorten the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i

def find_copies(keys, signatures):
    """(N, 15), (N, 112) -> (N,) an earlier copy, or itself; (N,) whether no earlier one is equal"""
    parent, new = np.arange(len(keys)), np.zeros(len(keys), bool)
    new[np.unique(keys[:, 0], return_index=True)[1]] = True
    for column in keys.T:               # the hash of the text, then those of its bands
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order[1:]] == column[order[:-1]])
        for some in np.array_split(same, 1 + len(same) // 10_000):
            a, b = order[some], order[some + 1]
            alike = (signatures[a] == signatures[b]).mean(1) >= SIMILAR
            for pair in np.stack([a, b], 1)[alike].tolist():
                first, second = sorted(root(parent, i) for i in pair)
                parent[second] = first
    return parent, new

# ---------------------------------------------------------------- the whole

LIMITS = {name: f"{low} to {high} stay, {source}" for name, low, high, source, _ in RULES}
NAMES = ["unreadable", "in", "broken-utf-8", "boilerplate", *LIMITS,
         *(rule[0] for rule in PERSONAL), "copies", "near-copies", "train", "val"]

def note(rule, source, text):
    return rule, source, len(text.encode("utf-8", "replace")), " ".join(text[:200].split())[:80]

def repair(source, kind, data):
    """Step 1 -> notes, source, text"""
    try:
        text = normalize(decode(kind, data))
    except (ValueError, TypeError, KeyError, RecursionError):
        return [note("unreadable", source, data.decode("utf-8", "replace"))], source, ""
    notes = [note("in", source, text)] * (text > "")
    notes += [note("broken-utf-8", source, text)] * ("\ufffd" in text)
    return notes, source, text

def judge(options, evaluation, source, whole, text):
    """Steps 3 to 5 -> notes; if it stays, its row, and the record for step 6, of the whole text:
    copies may have lost different lines in step 2"""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words, hashes = words_of(text)
    dense = 1 + (share(words, lambda word: word >= DENSE) > 0.5)
    document = Document(text, lines, words, hashes, dense, options.stop_words, evaluation)
    for name, low, high, _, value in RULES:
        if name not in options.without and not low <= value(document) <= high:
            return [note(name, source, text)], b"", b""
    notes = []
    for name, pattern, placeholder in PERSONAL:
        if name not in options.without:
            notes += [note(name, source, found[:2] + "*" * len(found[2:]))
                      for found in re.findall(pattern, text)]
            text = re.sub(pattern, placeholder, text)
    return notes, json.dumps({"text": text, "source": source}).encode() + b"\n", record_of(whole)

def parallel(pool, cores, function, items):
    """function(*item) of items, in order, on all cores"""
    some, size = [], 0
    for item in chain(items, [None]):                       # None: the end
        if item:
            some.append(item)
            size += sum(map(len, item))
        if not item or size >= BATCH * cores:               # no more than that is in memory
            results = pool.starmap_async(function, some, 1 + len(some) // (4 * cores))
            yield from results.get(timeout=600)             # lest it waits for a killed process
            some, size = [], 0

def clean(options, out) -> dict:
    """All steps, with the result in the folder out -> the report"""
    report = {n: {"times": 0, "bytes": 0, "lengths": array("I"), "examples": []} for n in NAMES}
    def add(notes):
        for rule, source, size, text in notes:
            entry = report[rule]
            entry["times"] += 1
            entry["bytes"] += size
            entry["lengths"].append(size)
            entry["examples"] += [f"{source}: {text}"] * (len(entry["examples"]) < 3)
            if rule in LIMITS or rule.endswith("copies"):
                print(json.dumps({"rule": rule, "source": source, "text": text}), file=dropped)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (open(out / "dropped.jsonl", "w") as dropped, TemporaryFile(dir=out) as kept,
          open(out / "train/text.jsonl", "wb") as train, TemporaryFile(dir=out) as records,
          open(out / "val/text.jsonl", "wb") as val,
          # The processes leave Ctrl-C to this one.
          multiprocessing.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool):
        repaired = parallel(pool, cores, repair, read(options.files))
        documents = drop_boilerplate(repaired, options, add)
        judge_one = partial(judge, options, evaluation_sequences(options.against))
        for notes, row, record in parallel(pool, cores, judge_one, documents):
            add(notes)
            kept.write(row)
            records.write(record)
        if not kept.tell():
            raise ValueError(f"no text passed the rules, of {report['in']['times']}; see --without")
        kept.seek(0)
        records = np.memmap(records, np.uint64, "r").reshape(-1, 1 + BANDS + BANDS * ROWS // 2)
        parent, new = find_copies(records[:, :1 + BANDS], records[:, 1 + BANDS:].view(np.uint32))
        for i, row in enumerate(kept):
            first, rule = root(parent, i), "near-copies" if new[i] else "copies"
            if first == i or rule in options.without:
                rule = "val" if records[first, 0] < options.val * 2**64 else "train"
                (val if rule == "val" else train).write(row)
            add([note(rule, **json.loads(row))])
    for entry in report.values():
        entry["lengths"] = np.percentile(entry["lengths"] or [0], (10, 50, 90)).astype(int).tolist()
    return report

def main() -> int:
    parser = argparse.ArgumentParser("clean.py", usage="clean.py FILE ... --out DIR; see --help")
    parser.add_argument("files", nargs="+", help="text, .jsonl, .html, .gz of these, folders")
    parser.add_argument("--out", required=True, help="folder for train/, val/ and the report")
    parser.add_argument("--against", nargs="+", default=[], help="evaluation files")
    parser.add_argument("--val", type=float, default=0.02, help="share of documents [%(default)s]")
    parser.add_argument("--stop-words", nargs="+", default=[], help="a text must have two of these")
    parser.add_argument("--without", nargs="+", default=[], choices=NAMES, help="rules: off")
    options = parser.parse_args()
    options.stop_words, part = set(options.stop_words), Path(options.out.rstrip("/") + ".part")
    try:
        if os.path.exists(options.out):
            raise ValueError(f"{options.out} is there already; delete it or choose another --out")
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part / "train")
        os.makedirs(part / "val")
        report = clean(options, part)
        (part / "report.json").write_text(json.dumps(report, indent=1))
        part.rename(options.out)
    except (KeyboardInterrupt, multiprocessing.TimeoutError, ValueError, OSError) as error:
        print(f"\nclean.py: {error or type(error).__name__}; nothing written", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"\n{'rule':14}{'times':>11}{'bytes':>17}{'share':>8}  10, 50 and 90% of the lengths")
    for name, entry in report.items():
        times, size, lengths, examples = entry.values()
        print(f"{name:14}{times:11,}{size:17,}{size / max(1, report['in']['bytes']):8.2%}  "
              f"{lengths!s:24}{LIMITS.get(name, '')}", *examples, sep="\n    ")
    return 0

if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# ///
"""From raw text to training text: take out what a model should not learn from, and count it.

    python data/clean.py crawl/ more.jsonl.gz --out data/clean
    python train.py --data data/clean/train --val_data data/clean/val

Reads text, .jsonl (rows with a "text") and .html in UTF-8, each also as .gz, folders of these, and
rows from /dev/stdin. Writes OUT/train and OUT/val, rows of "text" and "source"; OUT/dropped.jsonl,
the documents that went; and OUT/report.json, also printed: what came in, what each rule took, with
three examples, and what came out. --without RULE switches a rule off. The steps:

1 repair       markup and control characters go; what is not UTF-8 becomes U+FFFD
2 boilerplate  lines that many documents share, so that step 3 judges a page without its menu
3 documents    too short, too repetitive, no sentences: a table of rules, each on one document
4 evaluation   documents that share 13 words in a row with the files given as --against
5 personal     e-mail addresses, phone numbers and IP addresses become placeholders. Not caught:
               names, street addresses, IPv6, "me at home dot net", most ways to write a number
6 copies       equal documents, and those that share most of their sequences of 5 words: the first
               in the order of the input stays. Late, so that what stays has passed the rules
7 split        by a hash of the cluster of copies, so on one side. Parts of a book can be on both

All cores work on steps 1 and 3 to 5, on one document at a time and in order; one process does the
rest. So the output does not depend on the number of cores. Memory is 0.6 GB, 100 bytes for each
document, and for each core 0.2 GB and 150 bytes for each word of --against. All is built in
OUT.<process id>.part, which becomes OUT at the end: after a kill, delete it and run again.
The rules are for prose: for source code, and for Thai, which has no full stops, use --without
sentence-ends short-lines. Left out, as each takes below 1% of what the others leave of 950 MB:
mojibake; six more rules of Gopher's; FineWeb's on letters in repeated lines; C4's on sentences and
cookies. (On arXiv: C4 1910.10683, CCNet 1911.00359, FineWeb 2406.17557, Gopher 2112.11446, GPT-3
2005.14165.)
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
from collections import Counter, namedtuple
from functools import partial, partialmethod
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

# Bytes of a core's work at a time; of the longest row, or part of a page; of the parts of a text.
BATCH, LONGEST, PART = 1 << 24, 1 << 22, 400_000

# ---------------------------------------------------------------- 1 reading and repair

def read(names):
    """-> (source, kind, bytes) of rows, pages and parts of a text, in an order that the disk does
    not change; of a fault, the broken row "{". Shows progress. Leaves out OUT.<process id>.part."""
    files, done, began = [], 0, time.monotonic()
    for path in map(Path, names):
        files += sorted(file for file in path.rglob("*") if file.is_file() and
                        f".part{os.sep}" not in str(file)) if path.is_dir() else [path]
    total = sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in files)
    for path in files:
        kind, at = path.name.removesuffix(".gz").rpartition(".")[2].replace("stdin", "jsonl"), 0
        size = {"jsonl": 0, "html": LONGEST}.get(kind, PART)
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                while data := file.read(size) + file.readline(size or LONGEST):
                    if data.strip():
                        yield f"{path}@{at}", kind, data
                    at += len(data)
                    done += len(data)
                    if done % BATCH < len(data) and sys.stderr.isatty():    # once for each BATCH
                        left = (time.monotonic() - began) * max(0, total / done - 1)
                        print(f"\r{done >> 20} MB, {left:.0f} s left ", end="", file=sys.stderr)
        except (OSError, EOFError, zlib.error) as error:
            yield f"{path}@{at}: {error}", "jsonl", b"{"

class Page(HTMLParser):
    """Collects the text of a page, without the parts that nobody reads as its text."""
    HIDDEN = set("script style template noscript svg nav header footer aside select button".split())
    INLINE = set("a abbr b code em font i kbd mark q s small span strong sub sup tt u var".split())

    def handle_starttag(self, tag, attrs, count=1):
        self.open[tag] = max(0, self.open[tag] + count)
        self.parts.append("" if tag in self.INLINE else "\n")

    handle_endtag = partialmethod(handle_starttag, attrs=None, count=-1)

    def handle_data(self, data):
        if not any(self.open[tag] for tag in self.HIDDEN):
            self.parts.append(data if self.open["pre"] else re.sub(r"\s+", " ", data))

def decode(kind, data) -> str:
    """A part's bytes -> its text; U+FFFD stands for what is not UTF-8."""
    text = data.decode("utf-8", "replace").strip("\ufeff \r\n")
    if kind == "jsonl":
        text = json.loads(text)["text"] + ""    # a TypeError if it is no text
    elif kind == "html":
        page = Page()
        page.parts, page.open = [], Counter()
        page.feed(text + "<br>")        # a tag flushes the last text; close() can take hours
        text = "".join(page.parts)
    return text

def normalize(text) -> str:
    """Unicode's normal form C; no control characters but tabs and newlines"""
    # NFC takes n^2 steps for n marks on a letter: of signs in a row, 1,000 stay (re is fast for 1).
    text = re.sub(r"([^\0-~\w][^\0-~\w]{999})[^\0-~\w]+", r"\1", text)
    lines = unicodedata.normalize("NFC", text).splitlines()     # ends are also \r, \f, \u2028
    text = re.sub("\n{3,}", "\n\n", "\n".join(map(str.rstrip, lines))).strip("\n")
    return re.sub("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]+", "", text)

# ---------------------------------------------------------------- 2 boilerplate

# A line that REPEATS documents have is taken out of the later ones, wherever in the input they are.
# C4 (section 2.2) does so with sentences, CCNet with paragraphs. The first documents keep the line,
# so nothing is lost altogether. Lines below LINE characters, like "}" or "Usage:", stay. To bound
# the memory, LINES counts, of about 500 MB, are halved. So a line needs 4 documents in each 500 MB
# (3 give 3, 1, 4, 2, 5, 2, 5), and 2 more may keep a known one. 60 bits of its hash stand for it.
REPEATS, LINE, LINES = 5, 20, 5_000_000         # our choice

def drop_boilerplate(documents, options, add):
    """(notes, source, text) of repair(), in order -> (source, text, text without boilerplate)"""
    counts, shortest = Counter(), float("inf") if "boilerplate" in options.without else LINE
    for notes, source, text in documents:
        lines = (text or "").split("\n")
        number = {line: hash(line) >> 4 for line in lines if len(line) >= shortest}
        counts.update(set(number.values()))
        often = {line: note("boilerplate", source, line)
                 for line, n in number.items() if counts[n] > REPEATS}
        if len(counts) > LINES:
            counts = Counter({n: count // 2 for n, count in counts.items() if count > 1})
        add([*notes, *often.values()])
        if text is not None:
            yield source, text, "\n".join(line for line in lines if line not in often)

# ---------------------------------------------------------------- 3 to 5 documents

# A word is a run of letters, marks and digits. Thai, Lao, Burmese, Khmer, Japanese and Chinese have
# no spaces: there, a character is a word, and 2n are like n words in a row (per_word = 2).
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0970-\u0dff"
LETTER = f"[^\\W_{NO_SPACES}]"
WORD = re.compile(f"{LETTER}+(?:[{MARKS}]+{LETTER}*)*|[{NO_SPACES}]")
SENTENCE_END = re.compile("[.!?…。！？।؟۔።၊။។][\"'”’»)」』）]?$")
# From here on in Unicode (Thai to Korean), a character says as much as two letters: such a word
# counts as 4 letters, and where most words are such, a line counts double (dense = 2).
DENSE = "\u0e00"

def words_of(text):
    """-> the words, and (N,) hashes of them"""
    words = WORD.findall(text.lower())
    return words, np.array([zlib.crc32(word.encode()) for word in words], np.uint64)

def sequences(hashes, n) -> np.ndarray:
    """(N,) hashes of words -> (N - n + 1,) hashes of sequences of n words"""
    total = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n):          # an odd factor modulo 2^64 never makes two different values one
        total = (total + hashes[i:i + len(total)]) * np.uint64(0x9E3779B97F4A7C15)
    return total

def share(parts, test) -> float:
    return sum(bool(test(part)) for part in parts) / max(1, len(parts))

def again_in_sequences(words, hashes, n) -> float:
    """The share of the letters in sequences of n words that came before."""
    lengths, grams = np.array(list(map(len, words)), int), sequences(hashes, n)
    # before[i]: the sequence that begins at word i came before. covered[i]: it contains word i.
    before = np.arange(len(words) + 1) < len(grams)
    before[np.unique(grams, return_index=True)[1]] = False
    covered = np.convolve(before, np.ones(n))[:len(words)] > 0.5
    return lengths[covered].sum() / max(1, lengths.sum())

def evaluation_sequences(names) -> set[int]:
    """Hashes of all sequences of 13 words, or of 26 characters without spaces, in evaluation files.
    What is shorter is not found. GPT-3 cuts the passage out; here, the document goes."""
    found = set()
    for source, kind, data in read(names):
        if data == b"{" or b"\0" in data:
            raise ValueError(f"{source} is not text, .jsonl or .html")
        text = re.sub(r"\\u([0-9a-fA-F]{4})|\\[nrt]", lambda code: chr(int(code[1] or "20", 16)),
                      decode(kind.replace("jsonl", "text"), data))  # escapes would change words
        for n in (13, 26) if re.search(f"[{NO_SPACES}]", text) else (13,):
            found.update(sequences(words_of(normalize(text))[1], n).tolist())
    return found

Document = namedtuple("Document", "text lines words hashes dense per_word stops exams")
# Name, lowest and highest value that stays, value. A new row joins --without and the report.
RULES = (
    # Gopher (appendix A). Few words are leftovers; many, long ones, signs and numbers are data.
    ("words", 50, 100_000, lambda d: len(d.words)),
    ("word-length", 3, 10, lambda d: np.mean([len(w) if w < DENSE else 4 for w in d.words or "-"])),
    ("hash-signs", 0, 0.1, lambda d: d.text.count("#") / max(1, len(d.words))),
    ("numbers", 0, 0.2, lambda d: share(d.words, str.isdigit)),
    ("not-utf-8", 0, 0.05, lambda d: d.text.count("\ufffd") / max(1, len(d.words))),        # ours
    # FineWeb. Lines that have no full stop or are short are lists and menus.
    ("sentence-ends", 0.12, 1, lambda d: share(d.lines, SENTENCE_END.search)),
    ("short-lines", 0, 0.67, lambda d: share(d.lines, lambda line: len(line) * d.dense < 30)),
    # Gopher again, and in the last row GPT-3 (appendix C). Repeated text was often generated.
    ("lines-again", 0, 0.3, lambda d: 1 - len(set(d.lines)) / max(1, len(d.lines))),
    ("5-words-again", 0, 0.15, lambda d: again_in_sequences(d.words, d.hashes, 5 * d.per_word)),
    ("stop-words", 2, 100_000, lambda d: len({*d.stops.split(",")} & {*d.words}) if d.stops else 2),
    ("evaluation", 0, 0, lambda d: len(d.exams & {*sequences(d.hashes, 13 * d.per_word).tolist()})),
)

# Rule, pattern, and a placeholder that belongs to nobody. Versions like 1.2.3.4 go, too.
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
# length (MinHash, Broder 1997). To avoid comparing all with all, it is cut into 14 bands of 8. Two
# texts share a band with probability 1 - (1 - J^8)^14: 0.92 if J = 0.8, 0.05 if J = 0.5. FineWeb
# (section 3.4) drops the second of such a pair. Here, a text is compared with the first one in its
# band, and 0.72 of the signatures must agree, too: J = 0.7 is found with probability 0.26.
BANDS, ROWS, SIMILAR = 14, 8, 0.72
XOR, FACTOR = np.random.RandomState(0).randint(2**32, size=(2, BANDS * ROWS, 1), dtype=np.uint32)

def signature(grams) -> np.ndarray:
    """(N,) hashes of sequences -> (112,), the smallest one under each of 112 hash functions"""
    smallest = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    for i in range(0, len(grams), 2048):                        # (112, 2048) fits into the cache
        hashes = (grams[i:i + 2048] >> np.uint64(32)).astype(np.uint32)     # the best mixed bits
        smallest = np.minimum(smallest, ((hashes ^ XOR) * (FACTOR | 1)).min(1))
    return smallest

def record_of(whole, text, hashes) -> bytes:
    """For find_copies(): hashes of the whole text and of its row's; bands and signature of the
    whole, as step 2 cuts later copies only. (So short pages under one long menu look alike.)"""
    smallest = signature(sequences(hashes, max(1, min(5, len(hashes)))))
    bands = sequences(smallest.astype(np.uint64), ROWS)[::ROWS]
    keys = [hashlib.blake2b(part.encode(), digest_size=8).digest() for part in (whole, text)]
    return b"".join(keys) + bands.tobytes() + smallest.tobytes()

def root(parent, i) -> int:
    """Union-find: follow the pointers to the first document of the cluster, and shorten the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i

def find_copies(keys, signatures):
    """(N, 16), (N, 112) -> (N,) pointers for root(), (N,) whether no earlier text is equal. Chains
    join: if A is like B and B like C, only A stays, even if C is less like A."""
    parent, new = np.arange(len(keys)), np.ones(len(keys), bool)
    for number, column in enumerate(keys.T):
        _, first, bucket = np.unique(column, return_index=True, return_inverse=True)
        first = first[bucket]               # (N,) for each text, the first one with the same key
        later = np.flatnonzero(first < np.arange(len(first)))
        new[later] &= number >= 2           # the first two keys are of whole texts
        for some in np.array_split(later, 1 + len(later) // 10_000):
            alike = (signatures[some] == signatures[first[some]]).mean(1) >= SIMILAR
            for pair in np.stack([first[some], some], 1)[alike | (number < 2)].tolist():
                a, b = sorted(root(parent, i) for i in pair)
                parent[b] = a
    return parent, new

# ---------------------------------------------------------------- the whole

LIMITS = {name: f"{low} to {high} stay" for name, low, high, _ in RULES}
SWITCHES = ["boilerplate", *LIMITS, *(rule[0] for rule in PERSONAL), "copies", "near-copies"]

def note(rule, source, text):
    """For the report: a rule, and of what it took, the source, the bytes and the start"""
    return rule, source, len(text.encode("utf-8", "replace")), text[:200]

def repair(source, kind, data):
    """Step 1 -> notes, source, text or None"""
    try:
        text = normalize(decode(kind, data))
    except (ValueError, TypeError, KeyError, RecursionError, AssertionError):   # last: HTMLParser
        return [note("unreadable", source, data.decode("utf-8", "replace"))], source, None
    broken = [note("broken-utf-8", source, text)] * ("\ufffd" in text)
    return [note("in", source, text), *broken], source, text

def judge(options, evaluation, source, whole, text):
    """Steps 3 to 5 -> notes; if the document stays, its row, and its record for step 6"""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words, hashes = words_of(text)
    dense = 1 + (share(words, lambda word: word[0] >= DENSE) > 0.5)
    per_word = 1 + (list(map(len, words)).count(1) > len(words) / 2)
    document = Document(text, lines, words, hashes, dense, per_word, options.stop_words, evaluation)
    for name, low, high, value in RULES:
        if name not in options.without and not low <= value(document) <= high:
            return [note(name, source, text)], b"", b""
    hashes = hashes if whole == text else words_of(whole)[1]        # step 6 compares the whole
    notes = []
    for name, pattern, placeholder in PERSONAL:
        if name not in options.without:
            notes += [note(name, source, found[0][:2].ljust(len(found[0]), "*"))
                      for found in re.finditer(pattern, text)]
            text = re.sub(pattern, placeholder, text)
    row = json.dumps({"text": text, "source": source}).encode() + b"\n"
    return notes, row, record_of(whole, text, hashes)

def parallel(pool, function, items):
    """function(*item) of items, in order, on all cores"""
    some, size, processes = [], 0, set(multiprocessing.active_children())
    for item in chain(items, [None]):                       # None: the end
        if item:
            some.append(item)
            size += sum(map(len, filter(None, item)))
        if not item or size >= BATCH * len(processes):      # no more than that is in memory
            results = pool.starmap_async(function, some, 1 + len(some) // (4 * len(processes)))
            while not results.ready():
                results.wait(1)
                if not processes <= set(multiprocessing.active_children()):
                    raise ValueError("a process was killed; did memory run out?")
            yield from results.get()
            some, size = [], 0

def clean(options, out) -> dict:
    """All steps, with the result in the folder out -> the report"""
    report = {name: {"times": 0, "bytes": 0, "examples": []}
              for name in ("unreadable", "in", "broken-utf-8", *SWITCHES, "train", "val")}
    def add(notes):
        for rule, source, size, text in notes:
            entry, drops = report[rule], rule in {"unreadable", *LIMITS, "copies", "near-copies"}
            entry["times"] += 1
            entry["bytes"] += size
            if drops or len(entry["examples"]) < 3:     # without personal data, whatever --without
                text = re.sub("|".join(pattern for _, pattern, _ in PERSONAL), "***", text)
                text = " ".join(text.split())[:80]
                entry["examples"] = [*entry["examples"], f"{source}: {text}"][:3]
            if drops:
                print(json.dumps({"rule": rule, "source": source, "text": text}), file=dropped)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # kept and records have no names, so a kill deletes them. Ctrl-C is left to this process.
    with (open(out / "dropped.jsonl", "w") as dropped, TemporaryFile(dir=out) as kept,
          open(out / "train/text.jsonl", "wb") as train, TemporaryFile(dir=out) as records,
          open(out / "val/text.jsonl", "wb") as val,
          multiprocessing.Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool):
        documents = drop_boilerplate(parallel(pool, repair, read(options.files)), options, add)
        judge_one = partial(judge, options, evaluation_sequences(options.against))
        for notes, row, record in parallel(pool, judge_one, documents):
            add(notes)
            kept.write(row)
            records.write(record)
        if not kept.tell():
            took = {rule: entry["times"] for rule, entry in report.items() if entry["times"]}
            raise ValueError(f"no text passed the rules; see --without. They took {took}")
        kept.seek(0)
        records = np.memmap(records, np.uint64, "r").reshape(-1, 2 + BANDS + BANDS * ROWS // 2)
        parent, new = find_copies(records[:, :2 + BANDS], records[:, 2 + BANDS:].view(np.uint32))
        for i, line in enumerate(kept):
            first, rule = root(parent, i), "near-copies" if new[i] else "copies"
            if first == i or rule in options.without:
                rule = "val" if records[first, 0] < options.val * 2**64 else "train"
                (val if rule == "val" else train).write(line)
            add([note(rule, **json.loads(line))])       # "text" and "source"
    return report

def main() -> int:
    parser = argparse.ArgumentParser("clean.py", usage="clean.py FILE ... --out DIR; see --help")
    parser.add_argument("files", nargs="+", help="text, .jsonl, .html, .gz of these, folders")
    parser.add_argument("--out", required=True, help="folder for train/, val/ and the report")
    parser.add_argument("--against", nargs="+", default=[], help="evaluation files")
    parser.add_argument("--val", type=float, default=0.02, help="share of documents [%(default)s]")
    parser.add_argument("--stop-words", type=str.lower, help="the,of,and: a text must have two")
    parser.add_argument("--without", nargs="+", default=[], choices=SWITCHES, help="rules: off")
    options = parser.parse_args()
    part = Path(f"{options.out.rstrip('/')}.{os.getpid()}.part")
    try:
        if os.path.exists(options.out):
            raise ValueError(f"{options.out} is there already; delete it or choose another --out")
        os.makedirs(part / "train")
        os.makedirs(part / "val")
        report = clean(options, part)
        (part / "report.json").write_text(json.dumps(report, indent=1))
        part.rename(options.out)
    except (KeyboardInterrupt, ValueError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        print(f"\nclean.py: {str(error) or type(error).__name__}; nothing written", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files need not be UTF-8
    print(f"\n{'rule':14}{'times':>11}{'bytes':>17}{'share':>8}{'each':>9}")
    for name, entry in report.items():
        times, size, examples = entry.values()
        print(f"{name:14}{times:11,}{size:17,}{size / max(1, report['in']['bytes']):8.2%}"
              f"{size / max(1, times):9,.0f}  {LIMITS.get(name, '')}", *examples, sep="\n    ")
    return 0

if __name__ == "__main__":
    sys.exit(main())

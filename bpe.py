# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# ///
r"""Byte-pair encoding: text becomes a list of small integers, all that a language model ever sees.

    python bpe.py train  plays.txt --vocab_size 4096 --out out/tokenizer
    python bpe.py encode plays.txt --tokenizer out/tokenizer --out out/tokenizer/train.npy
    python bpe.py show  "To be, or not" --tokenizer out/tokenizer    # the tokens in colours
    python bpe.py chat  --tokenizer out/tokenizer --out out/chat     # add the tokens of chats

    tokenizer = Tokenizer.load("out/tokenizer")    # or the tokenizer.json of Qwen, Llama 3, ...
    tokenizer.decode(tokenizer.encode("any text")) == "any text"

Learning starts with the 256 bytes as tokens. It joins the two neighbours that occur most often in a
text into a new token, again and again, until the vocabulary has the size that was asked for. To
encode a text, the same joins are made in the same order. As every text is a row of bytes, any text
can be encoded, and decoded again. (Exceptions: NFC, missing bytes, lone surrogates.)

Terms. *Token*: a string of bytes; its number is its *id*. *Merge*: the rule that joins two tokens
into a third; its *rank* says how early it was learned, and lower ranks are applied first. *Chunk*:
about a word of text; nothing is merged across its edges. *Special token*: a token that stands for
no text, such as <|endoftext|>, which here begins each document.

Reading order: bytes, splitting, learning, encoding: that is all of BPE. Then the files: formats of
tokenizers, chats, and texts of any size on all cores; then the command line; then faster forms of
two functions, which you can skip. Left out on purpose: other kinds of tokenizers. If a file asks
for what is not implemented, an error names it.
Sources: Sennrich et al. 2016 (arXiv:1508.07909); Radford et al. 2019 (GPT-2: bytes, splitting);
tiktoken (patterns); tokenizers (tokenizer.json, the order of ties).
"""
import argparse
import codecs
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import signal
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- bytes

# tokenizer.json is text, but tokens are bytes, and a token can be invalid UTF-8, such as a third of
# a Chinese character. GPT-2's solution, which everyone kept, writes each byte as a visible
# character. Those that are visible in Latin-1 stand for themselves. The 68 others, blanks and
# control characters, get U+0100 to U+0143.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHAR_OF_BYTE = {byte: byte for byte in VISIBLE} | {b: 256 + i for i, b in enumerate(HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}

def spell(token: bytes) -> str:
    """b" caf\\xc3\\xa9" -> "ĠcafÃ©": a blank is written Ġ, and the two bytes of é as Ã and ©."""
    return token.decode("latin-1").translate(CHAR_OF_BYTE)

def unspell(spelling: str) -> bytes:
    """The way back: "ĠcafÃ©" -> b" caf\\xc3\\xa9"."""
    return spelling.translate(BYTE_OF_CHAR).encode("latin-1")

# ---------------------------------------------------------------- splitting

# A text is first cut into chunks. Without that the commonest tokens would be "e t" and ". The".
# A chunk is a match of the pattern, whose alternatives are tried from left to right. Llama 3's are:
#   (?i:'s|'t|...)            English endings: 's 't 're 've 'm 'll 'd
#   [^\r\n\p{L}\p{N}]?\p{L}+  a word, with one space (or quote, or bracket) before it
#   \p{N}{1,3}                up to three digits, so that numbers do not fill the vocabulary
#    ?[^\s\p{L}\p{N}]+[\r\n]* punctuation, with a space before and line ends after it
#   \s*[\r\n]+                white space up to the end of a line
#   \s+(?!\S)                 white space without its last blank, which belongs to the next word
#   \s+                       what is left
# cl100k is GPT-4's, o200k GPT-4o's, which also cuts where lower case turns to upper: "camelCase".
# smollm2 is gpt2 with single digits; its file asks for it in two steps ("Digits", "ByteLevel").
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"),
    "o200k": (O200K_WORD % ("*", "+") + O200K_WORD % ("+", "*")
              + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "llama3": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "smollm2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?![^\s\p{N}])|\s+")}

# (At a first reading, go on at split().) Letters (L), numbers (N) and marks (M) are those of
# Unicode 16 on every Python, as in tiktoken and tokenizers. Listed is what changed after Unicode
# 14, which Python 3.11 has. Cn, "not assigned", undoes Unicode 17, which Python 3.15 has.
# (Source: unicode.org/Public, UnicodeData.txt.)
NEWER = {
    "Lu": "1C89 A7CB-A7CC A7DA A7DC 10D50-10D65",
    "Ll": "295 1C8A A7CD A7DB 10D70-10D85 1DF25-1DF2A",
    "Lm": "10D4E 10D6F 16D40-16D42 16D6B-16D6C 1E030-1E06D 1E4EB",
    "Lo": "105C0-105F3 10D4A-10D4D 10D4F 10EC2-10EC4 1123F-11240 11380-11389 1138B 1138E "
          "11390-113B5 113B7 113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 1342F "
          "13441-13446 13460-143FA 16100-1611D 16D43-16D6A 18CFF 1B132 1B155 1E4D0-1E4EA "
          "1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF",
    "N": "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 1CCF0-1CCF9 "
         "1D2C0-1D2D3 1E4F0-1E4F9 1E5F1-1E5FA",
    "M": "897 CF3 ECE 10D69-10D6D 10EFC-10EFF 11241 113B8-113C0 113C2 113C5 113C7-113CA "
         "113CC-113D0 113D2 113E1-113E2 1171E 11F00-11F01 11F03 11F34-11F3A 11F3E-11F42 11F5A "
         "13440 13447-13455 1611E-1612F 1E08F 1E4EC-1E4EF 1E5EE-1E5EF",
    "Cn": "88F C5C CDC 1ACF-1AEB A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EFB 11B60-11B67 "
          "11DB0-11DE9 16EA0-16ED3 16FF2-16FF6 187F8-187FF 18D09-18DF2 1E6C0-1E6FF 2B73A-2B73F "
          "2CEA2-2CEAD 323B0-33479"}
NEWER = {code: name for name, ranges in NEWER.items() for part in ranges.split()
         for code in range(int(part.split("-")[0], 16), int(part.split("-")[-1], 16) + 1)}

def category(char: str) -> str:
    """That of "A" is "Lu": a letter, upper case. Names: unicode.org/reports/tr44, table 12"""
    return NEWER.get(ord(char)) or unicodedata.category(char)

@functools.cache
def unicode_classes() -> tuple[dict[str, str], dict[str, str]]:
    r"""Python's re has no \p{L}, so list the letters, up to U+FFFF: {"L": "A-Za-zª-ªµ-µ...", ...}

    re looks up characters to U+FFFF in a table, but tries hundreds of ranges for one above. So
    split() replaces such a character by the last of its category up to U+FFFF: {"Lu": "Ｚ", ...}.
    White space is spelled out: Python's \s has U+001C to U+001F, which no other library has.
    """
    members = defaultdict(set)
    for code in range(0x10000):
        name = category(chr(code))
        members[name].add(code)
        members[name[0]].add(code)
    classes = {"s": "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    for name, codes in members.items():
        firsts = sorted(code for code in codes if code - 1 not in codes)
        lasts = sorted(code for code in codes if code + 1 not in codes)
        classes[name] = "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}"
                                for first, last in zip(firsts, lasts))
    return classes, {name: chr(max(codes)) for name, codes in members.items()}

@functools.cache
def compile_pattern(pattern: str) -> re.Pattern:
    r"""The pattern with \p{..} and \s written as ranges. ValueError unless it is one of PATTERNS:
    others can mean something else to re, take exponential time, or match across a CUT (below)."""
    if pattern not in PATTERNS.values():
        raise ValueError(f"the split pattern {pattern[:200]!r} is not in PATTERNS of bpe.py; if it "
                         "covers any text and has an edge wherever pieces() cuts, add it")
    classes, _ = unicode_classes()

    def in_class(body):             # only \p{..} and \s; found[1] is the L of \p{L}, None for \s
        return re.sub(r"\\p\{(\w+)\}|\\s", lambda found: classes[found[1] or "s"], body)

    def translate(found):                                   # [...], or \p{L} or \s alone
        return f"[{found[1] or ''}{in_class(found[2] or found[0])}]"

    return re.compile(re.sub(r"\[(\^?)((?:\\.|[^\]\\])+)\]|\\p\{\w+\}|\\s", translate,
                             pattern.replace(r"\S", r"[^\s]")))

def split(text: str, pattern: str) -> list[str]:
    r"""Cut "To be!\n" into ["To", " be", "!\n"]."""
    find_chunks = compile_pattern(pattern).findall
    units = text.encode("utf-16-le", "surrogatepass")        # a character above U+FFFF is two
    text = units.decode("utf-16-le", "replace")              # one of the two alone becomes U+FFFD
    if len(units) == 2 * len(text):                          # none is above
        return find_chunks(text)
    low = re.sub("[^\0-\uffff]", lambda found: unicode_classes()[1][category(found[0])], text)
    ends = itertools.accumulate(map(len, find_chunks(low)), initial=0)
    return [text[begin:end] for begin, end in itertools.pairwise(ends)]

# Long texts are worked on in pieces, cut only where every pattern has an edge anyway: after a
# letter or digit that white space follows, or after a line end between a visible character and a
# letter or digit. This is safe, because no chunk has white space after a letter or digit, and none
# has a letter or digit after a line end.
CUT = re.compile(r"[^\W_](?=\s)|\S\n(?=[^\W_])")

def pieces(blocks, size=1 << 16, cut_at=CUT):
    """Blocks of a text, cut anywhere -> pieces of at least size, for split() one by one. Where no
    CUT comes, all that follows is one piece, in memory."""
    text, at = "", size         # what was not yet given out, and where the search goes on
    for block in blocks:
        text += block
        begin = 0
        while cut := cut_at.search(text, at):
            yield text[begin:cut.end()]
            begin = cut.end()
            at = begin + size
        text = text[begin:]
        at = max(size, len(text) - 2)         # only the last 2 characters can still begin a CUT
    if text:
        yield text

def count_chunks(texts, pattern: str) -> Counter:
    """Count the chunks of all texts: ["to be, to"] -> {"to": 1, " be": 1, ",": 1, " to": 1}"""
    counts = Counter()
    for text in texts:
        for piece in pieces([text]):
            counts.update(split(piece, pattern))
    return counts

# ---------------------------------------------------------------- learning

def learn(counts: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """{chunk: how often it occurs} -> merges: the i-th pair of ids becomes the token 256 + i.

    {"aaab": 2, "ab": 1}, 2 -> [(97, 97), (97, 98)]: "aa" occurs 4 times and "ab" 3 times, so "aa"
    is merged first. That leaves [aa][a][b] twice and [a][b] once, and now "ab" is commonest.

    The rule (Sennrich et al. 2016, algorithm 1): merge the most frequent pair everywhere; repeat.
    Of equally frequent pairs the one with the smallest ids is first, as in tokenizers. So the
    result depends on the counts alone, and not on the order of the text or of the processes that
    counted. This form reads all chunks once per merge; learn_fast() in the last section does not.
    """
    # One character stands for one token: chr(97) for the byte 97, chr(256) for the first merge.
    # A chunk is a string of them, and merging a pair is str.replace, from left to right: "aaa" has
    # "aa" twice, but only the first is merged.
    words = {chunk.encode().decode("latin-1"): count for chunk, count in counts.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for a, b in itertools.pairwise(word):
                pairs[a + b] += count
        if not pairs:                                       # every chunk is a single token
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = chr(256 + len(merges))
        words = {word.replace(best, new): count for word, count in words.items()}
        merges.append((ord(best[0]), ord(best[1])))
    return merges

# ---------------------------------------------------------------- encoding and decoding

def merge(ids: list[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Encoding itself. Merge the pair of lowest rank, the leftmost of equals; repeat.

    merges: {pair of ids: (rank, id of the token that it makes)}
    [97, 97, 97, 98] with {(97, 97): (0, 256), (256, 97): (1, 257)} -> [257, 98]: "aaab" becomes
    [aa][a][b], then [aaa][b]. For long chunks see merge_fast() in the last section.
    """
    while found := [(merges[pair], i) for i, pair in enumerate(itertools.pairwise(ids))
                    if pair in merges]:
        (rank, made), i = min(found)                        # the lowest rank, then leftmost
        ids = [*ids[:i], made, *ids[i + 2:]]
    return ids

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
DIVIDERS = ("<|endoftext|>", "<|begin_of_text|>")           # one stands before each document

class Tokenizer:
    """Made by Tokenizer.train() or Tokenizer.load(). Bad input raises a ValueError of one line."""

    def __init__(self, vocab, merges, special_tokens, pattern, whole_first=False, nfc=False):
        self.vocab = vocab                    # list: id -> bytes, None where there is no such id
        self.merges = merges                  # dict: (id, id) -> (rank, id of what they make)
        self.special_tokens = special_tokens  # dict: name -> id
        self.pattern = pattern                # how text is split: a regular expression
        self.whole_first = whole_first        # a chunk that is in vocab is one token (tiktoken)
        self.nfc = nfc                        # compose e + ´ to é first (Qwen)
        compile_pattern(pattern)              # raises, if it is unknown
        special_ids = set(special_tokens.values())           # text never leads to one of these
        self.id_of = {token: i for i, token in enumerate(vocab)
                      if token is not None and i not in special_ids}
        # SmolLM2's vocabulary lacks 21 bytes, 0x04 for one. Like tokenizers, encoding drops them.
        self.byte_ids = [self.id_of.get(bytes([byte])) for byte in range(256)]
        self.divider = next((name for name in DIVIDERS if name in special_tokens), None)
        self.dtype = np.dtype("<u2" if len(vocab) <= 1 << 16 else "<u4")
        self.cache = {}                       # chunk -> its ids: see encode_chunk()

    def __len__(self):              # the largest id + 1: the number of rows of an embedding
        return len(self.vocab)

    @classmethod
    def train(cls, texts, vocab_size: int, special_tokens=(), pattern="llama3"):
        """texts: an iterable of str, or the counts of count_chunks().
        The ids: byte b is b, merge i is 256 + i, the special tokens are last."""
        pattern = PATTERNS.get(pattern, pattern)
        texts = [texts] if isinstance(texts, str) else texts
        counts = texts if isinstance(texts, Counter) else count_chunks(texts, pattern)
        fixed = 256 + len(special_tokens)
        merges = learn_fast(counts, max(0, vocab_size - fixed))
        if vocab_size != fixed + len(merges):
            raise ValueError(f"vocab_size {vocab_size}: bytes and special tokens need {fixed}" + (
                f"; this text allows at most {fixed + len(merges)}" if vocab_size > fixed else ""))
        vocab = [bytes([byte]) for byte in range(256)]
        for a, b in merges:
            vocab.append(vocab[a] + vocab[b])
        special = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        vocab += [name.encode() for name in special]
        return cls(vocab, {pair: (i, 256 + i) for i, pair in enumerate(merges)}, special, pattern)

    def encode(self, text: str, allowed_special=()) -> list[int]:
        """Encode a text: "To be" -> [2514, 307] with GPT-2's vocabulary. Nothing is added to it.

        Text is only text, "<|endoftext|>" 13 characters, unless allowed_special names it (or is
        "all"): then it is that one token. (The same for Qwen 3's `<think>`; not in tokenizers.)
        """
        names = self.special_tokens if allowed_special == "all" else list(allowed_special)
        if unknown := set(names) - self.special_tokens.keys():
            raise ValueError(f"{min(unknown)!r} is none of this tokenizer's special tokens")
        ids = []
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))   # longest first
        parts = re.split(f"({either})", text) if names else [text]
        for i, part in enumerate(parts):                     # text, name, text, name, text
            ids += [self.special_tokens[part]] if i % 2 else self.encode_array(part).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """encode() for much text: an array of self.dtype, no special tokens."""
        if self.nfc:
            # tokenizers composes by Unicode 9: it does not reorder marks newer than 2016
            # (U+0301 U+0899), nor compose U+11935 U+11930. Such texts get other ids there.
            text = unicodedata.normalize("NFC", text)
        get = self.cache.get
        joined = [b"".join([get(chunk) or self.encode_chunk(chunk)
                            for chunk in split(piece, self.pattern)]) for piece in pieces([text])]
        return np.frombuffer(b"".join(joined), self.dtype)

    def encode_chunk(self, chunk: str) -> bytes:
        """The ids of one chunk, as the bytes of an array of self.dtype. They are kept: of 20 chunks
        of a text, 19 have been seen before."""
        word = chunk.encode()
        if self.whole_first and word in self.id_of:
            ids = [self.id_of[word]]
        else:
            ids = [self.byte_ids[byte] for byte in word if self.byte_ids[byte] is not None]
            # merge() reads the list again for each merge: fine for 20 ids, not for a million.
            ids = (merge if len(ids) <= 20 else merge_fast)(ids, self.merges)
        found = np.array(ids, self.dtype).tobytes()
        if len(self.cache) == 1 << 20:        # some 200 MB: start again
            self.cache.clear()
        if len(chunk) < 100:
            self.cache[chunk] = found
        return found

    def decode_bytes(self, ids) -> bytes:
        """The bytes of these ids, valid UTF-8 or not."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < len(self) or self.vocab[i] is None:
                raise ValueError(f"{i} is no id of this vocabulary of {len(self)}")
        return b"".join([self.vocab[i] for i in ids])

    def decode(self, ids) -> str:
        """What a model makes up need not be valid UTF-8. What is not becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    def load(cls, path):
        """A tokenizer.json, or a directory with one."""
        path = tokenizer_file(path)
        try:
            return cls(*read_tokenizer_json(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, RecursionError) as error:        # no JSON; a million brackets
            raise ValueError(f"{path}: {error}") from None
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not built as a tokenizer.json is: {error!r}") from None

    def save(self, directory):
        """tokenizer.json; and for transformers tokenizer_config.json and generation_config.json."""
        spelled = [None if token is None else spell(token) for token in self.vocab]
        for name, i in self.special_tokens.items():
            spelled[i] = name
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        write_json(Path(directory, "tokenizer.json"), {
            "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": name, "special": True} | AS_IT_IS
                             for name, i in self.special_tokens.items()],
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}, level]},
            "decoder": level,
            "model": {
                "type": "BPE", "ignore_merges": self.whole_first,
                # with the special tokens: else tokenizers would renumber them if ids have gaps
                "vocab": {token: i for i, token in enumerate(spelled) if token is not None},
                "merges": [[spelled[a], spelled[b]]
                           for a, b in sorted(self.merges, key=self.merges.get)]}})
        config, ends = {"tokenizer_class": "PreTrainedTokenizerFast"}, {}
        if self.divider:
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), self.divider)
            ends = {name: self.special_tokens[self.divider]
                    for name in ("bos_token_id", "eos_token_id")}
        if all(name in self.special_tokens for name in CHAT_TOKENS):
            config["chat_template"] = CHAT_TEMPLATE
        write_json(Path(directory, "tokenizer_config.json"), config)
        write_json(Path(directory, "generation_config.json"), ends)

# ---------------------------------------------------------------- the files of tokenizers

# Tells tokenizers not to swallow the blanks beside an added token.
AS_IT_IS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
LARGEST_ID = 1 << 22            # ten times that of any model; a list of a billion ids fills memory

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

def tokenizer_file(path) -> Path:
    """"out/tokenizer" -> "out/tokenizer/tokenizer.json"; a file is itself."""
    return Path(path, FILES[0]) if os.path.isdir(path) else Path(path)

def read_tokenizer_json(content):
    """-> the arguments of Tokenizer(); a ValueError names what is there but not implemented.

    Entries that are not read here do not change the ids of a text. "decoder" is for decoding; what
    "post_processor" puts around the ids (a <|begin_of_text|>, say), "truncation" and "padding" are
    left to the caller.
    """
    def insist(place, part, **allowed):
        for key, values in allowed.items():
            if part.get(key) not in values:
                raise ValueError(f'{place}: "{key}": {json.dumps(part.get(key))[:60]} '
                                 "is not supported here")

    model, pre = content["model"], content.get("pre_tokenizer") or {"type": None}
    insist("top level", content, normalizer=[None, {"type": "NFC"}])
    insist("model", model, type=[None, "BPE"], dropout=[None, 0], byte_fallback=[None, False],
           continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""])
    *steps, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    insist("pre_tokenizer", last, type=["ByteLevel"], add_prefix_space=[False])
    kinds = [step["type"] for step in steps] + [last.get("use_regex", True)]
    if kinds == [True]:
        pattern = PATTERNS["gpt2"]
    elif kinds == ["Digits", True] and steps[0]["individual_digits"]:
        pattern = PATTERNS["smollm2"]
    elif kinds == ["Split", False] and "Regex" in steps[0]["pattern"] and (
            steps[0]["behavior"], steps[0].get("invert")) in (
            ("Isolated", False), ("Isolated", None), ("Removed", True)):
        # Removed, inverted: drops what lies between matches, which is nothing with our patterns.
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"pre_tokenizer: {json.dumps(pre)[:200]} is not supported here")

    special = {}
    for added in content.get("added_tokens") or []:
        insist(f"added token {added['content']!r}", added, lstrip=[None, False],
               rstrip=[None, False], single_word=[None, False])
        special[added["content"]] = added["id"]
    ids = model["vocab"] | special
    if not 0 <= min(ids.values()) <= max(ids.values()) <= LARGEST_ID:
        raise ValueError(f"ids go from {min(ids.values())} to {max(ids.values())}; the largest "
                         f"here is {LARGEST_ID}")
    vocab = [None] * (1 + max(ids.values()))
    for spelling, i in ids.items():
        if vocab[i] is not None:
            raise ValueError(f"the id {i} is there twice, the second time for {spelling!r}")
        if spelling not in special and not BYTE_OF_CHAR.keys() >= set(map(ord, spelling)):
            raise ValueError(f"the token {spelling!r} (id {i}) is not in GPT-2's byte alphabet")
        vocab[i] = spelling.encode() if spelling in special else unspell(spelling)
    if not ids.keys() - special.keys() >= set(map(chr, BYTE_OF_CHAR)):  # Tokenizer drops the rest
        insist("not all bytes have a token; model", model, unk_token=[None])
    merges = {}
    for rank, pair in enumerate(model["merges"]):
        a, b = pair.split(" ", 1) if isinstance(pair, str) else pair
        if not a or not b or not ids.keys() >= {a, b, a + b} or a + b in special:
            raise ValueError(f"merge {rank} ({a!r}, {b!r}) is not of two tokens into a third")
        merges[ids[a], ids[b]] = rank, ids[a + b]
    return (vocab, merges, special, pattern,
            model.get("ignore_merges", False), content.get("normalizer") is not None)

@contextlib.contextmanager
def whole_file(path):
    """A file that gets its name when it is complete. (kill -9 leaves the .part file: delete it.)"""
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                          # a full disk shows here at the latest
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or error, error.filename or path) from None
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, content):
    with whole_file(path) as file:      # indented, so that people can read it
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

# ---------------------------------------------------------------- chats

# ChatML, as in SmolLM2 and Qwen; but where a chat has no system message, none is made up. It is the
# only template: chats are encoded with it to learn from, and opened with it to sample.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

def encode_chat(tokenizer, messages, first_trained=0, reply=False):
    """[{"role": "user", "content": "Hi"}, ...] -> ids, mask. mask is 1 for tokens to learn: what
    the assistant says and the <|im_end|> by which it stops, from message number first_trained on,
    except in messages of "weight" 0. Contents are only text: no user can end a turn by writing
    <|im_end|>. reply opens the assistant's next turn: a prompt. It ends after a role, so roles and
    contents are always encoded apart. (transformers, with the template, joins them: where a content
    begins with blanks, ids can differ, and <|im_end|> in a content ends the turn.)"""
    if not tokenizer.special_tokens.keys() >= {*CHAT_TOKENS}:
        raise ValueError(f"this tokenizer has no {' and '.join(CHAT_TOKENS)}: see bpe.py chat")
    start, end = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    ids, mask = [], []
    for number, message in enumerate(messages):
        learned = (message["role"] == "assistant" and number >= first_trained
                   and message.get("weight") != 0)
        for tokens, counts in (([start, *tokenizer.encode(message["role"] + "\n")], False),
                               ([*tokenizer.encode(message["content"]), end], learned),
                               (tokenizer.encode("\n"), False)):
            ids += tokens
            mask += [int(counts)] * len(tokens)
    if reply:
        ids += [start, *tokenizer.encode("assistant\n")]
        mask += [0] * (len(ids) - len(mask))
    return ids, mask

ROLES = ("system", "user", "assistant", "tool")

def messages(value, role) -> list[dict]:
    """What role says, a string, or a list of messages -> the list, checked"""
    chat = [{"role": role, "content": value}] if isinstance(value, str) else value
    for message in chat if isinstance(chat, list) and chat else [None]:         # None is refused
        if not (isinstance(message, dict) and isinstance(message.get("content"), str)
                and message.get("role") in ROLES and message.get("weight") in (None, 0, 1)):
            raise ValueError(f'a chat must be a list of {{"role": {"|".join(ROLES)}, "content": '
                             f'string}}, a "weight" 0 or 1, but there is {message!r:.100}')
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError("the assistant's reply is empty")
    return chat

def conversations(row):
    """A line of .jsonl -> its text, or [(messages, first_trained)]: one chat, or the two of a pair.
    {"messages"}: learn all that the assistant says. {"prompt", "completion"} or {"prompt",
    "chosen", "rejected"}, each a string or a list of messages: learn what comes after the prompt.
    """
    if isinstance(row, dict) and "chosen" in row:   # such sets can repeat the chosen as "messages"
        row = {key: row[key] for key in row if key != "messages"}
    kinds = [names for names in (("text",), ("messages",), ("prompt", "completion"),
                                 ("prompt", "chosen", "rejected"))
             if isinstance(row, dict) and row.keys() >= {*names}]
    if len(kinds) != 1 or kinds == [("text",)] and not isinstance(row["text"], str):
        raise ValueError('expected {"text": string}, or "messages", or "prompt" and "completion", '
                         f'or "prompt", "chosen" and "rejected", but there is {row!r:.200}')
    if kinds == [("text",)]:
        return row["text"]
    prompt, *answers = (messages(row[name], "assistant" if i else "user")
                        for i, name in enumerate(kinds[0]))
    if not answers:
        return [(prompt, 0)]
    return [(answer if answer[:len(prompt)] == prompt else prompt + answer, len(prompt))
            for answer in answers]          # some data sets repeat the prompt

# ---------------------------------------------------------------- texts of any size, on all cores

SLICE = 1 << 20         # characters of a file: the work that a process is given at a time

def find_files(names, part=(0, 1)) -> list[tuple[str, int, int]]:
    """Files, or folders with .txt and .jsonl files -> (path, first byte, end) of each. part cuts by
    position over all files together: (0, 0.9) and (0.9, 1) make the whole."""
    paths = []
    for name in names:
        inside = [str(path) for path in Path(name).rglob("*") if path.suffix in (".txt", ".jsonl")]
        paths += sorted(inside) if os.path.isdir(name) else [name]
    ends = [0, *itertools.accumulate(map(os.path.getsize, paths))]
    low, high = (int(fraction * ends[-1]) for fraction in part)
    if low >= high:
        raise ValueError(f"{' '.join(names)}: no text in the part {part[0]:g} to {part[1]:g} of it "
                         "(in a folder, .txt and .jsonl count)")
    return [(path, max(low, begin) - begin, min(high, end) - begin)
            for path, begin, end in zip(paths, ends, ends[1:]) if begin < high and low < end]

def slices(files):
    """-> (path, first byte, does a document or the part begin here?, text), each of about SLICE"""
    def edge(stream, at):
        """Where the next character (.jsonl: line) begins. The parts on both sides agree on it."""
        stream.seek(max(0, at - 1))
        if at and stream.name.endswith(".jsonl"):
            return at - 1 + len(stream.readline())
        rest = stream.read(4)[1:] if at else b""
        return at + len(rest) - len(rest.lstrip(bytes(range(0x80, 0xC0))))   # 10xxxxxx: inside one

    for path, begin, end in files:
        with open(path, "rb") as stream:
            begin, end = edge(stream, begin), edge(stream, end)
            at = stream.seek(begin)
            blocks = iter(lambda: stream.read(min(SLICE, end - stream.tell())), b"")
            try:
                for text in pieces(codecs.iterdecode(blocks, "utf-8"), SLICE,
                                   re.compile("\n") if path.endswith(".jsonl") else CUT):
                    yield path, at, at == begin, text
                    at += len(text.encode())
            except UnicodeDecodeError as error:
                at = stream.tell() - len(error.object) + error.start
                raise ValueError(f"{path}: not UTF-8 at byte {at}") from None

def read_rows(path, at, begins, text):
    """A slice -> (whether a document begins here, its text or its conversations)"""
    text = text.removeprefix("\ufeff" if at == 0 else "")    # the mark that some editors begin with
    if not path.endswith(".jsonl"):
        yield begins, text
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                yield True, conversations(json.loads(line))
        except (ValueError, RecursionError) as error:
            with open(path, "rb") as stream:    # count the lines before, without a copy of them all
                blocks = iter(lambda: stream.read(min(SLICE, at - stream.tell())), b"")
                number += sum(block.count(b"\n") for block in blocks)
            raise ValueError(f"{path}, line {number}: {error}") from None

def count_slice(piece, pattern):
    """The work of one process for train: a slice -> the counts of its chunks."""
    return count_chunks((text for _, row in read_rows(*piece) for text in (
        [row] if isinstance(row, str) else [f"{message['role']}\n{message['content']}"
                                            for chat, _ in row for message in chat])), pattern)

def encode_slice(piece, tokenizer):
    """The work of one process for encode: a slice -> counts, ids, mask, length of each chat"""
    numbers, ids, mask, lengths, texts = Counter(), [[]], [], [], []
    for begins, row in read_rows(*piece):
        if isinstance(row, str):
            if not tokenizer.divider:
                raise ValueError(f"the tokenizer has no {DIVIDERS[0]} to put before a document")
            numbers["text"] += 1
            texts.append(row)
            if begins:                        # so that the first token is predicted, too
                ids.append([tokenizer.special_tokens[tokenizer.divider]])
            ids.append(tokenizer.encode_array(row))
            continue
        numbers["chats" if len(row) == 1 else "pairs"] += 1
        for chat in row:
            chat_ids, chat_mask = encode_chat(tokenizer, *chat)
            ids.append(chat_ids)
            mask += chat_mask
            lengths.append(len(chat_ids))
    ids = np.concatenate([np.asarray(some, tokenizer.dtype) for some in ids])
    raw = "".join(texts).encode("utf-8", "surrogatepass")
    numbers.update(tokens=len(ids), bytes=len(raw))
    if piece[2] and raw:                      # what gzip needs for the first MB, to compare with
        numbers.update(gzip_in=len(raw), gzip_out=len(zlib.compress(raw)))
    return numbers, ids, np.array(mask, np.uint8), np.array(lengths, np.int64)

def share(*values):
    """Begins a process: keeps what all slices need, such as a tokenizer with its cache."""
    global shared
    shared = values
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # the parent answers Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def work_on(piece):
    """What a process is asked to do: function(slice, value), with the values that share() kept."""
    function, value = shared
    return function(piece, value)

def parallel(function, value, files, verb):
    """function(slice, value) for every slice of the files, in order, on all cores, with one live
    line on stderr if it takes a while; only a few slices are in memory. 61: Windows has no more."""
    total = sum(end - begin for _, begin, end in files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    work, began, done, live = slices(files), time.monotonic(), 0, False
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)    # processes that are forked inherit this
    pool = ProcessPoolExecutor(min(cores, 61, 1 + total // SLICE), None, share, (function, value))
    try:
        pool.submit(len, ())                                # the first work starts the processes
        signal.signal(signal.SIGINT, usual)
        while some := list(itertools.islice(work, 4 * cores)):
            for (*_, text), result in zip(some, pool.map(work_on, some)):
                yield result
                done += len(text.encode())
                seconds = time.monotonic() - began
                if live := seconds > 1 and sys.stderr.isatty():
                    left = seconds * max(0, total / done - 1)
                    print(f"\r{verb} {done / 1e6:.0f} of {total / 1e6:.0f} MB, {left:.0f} s left ",
                          end="", file=sys.stderr, flush=True)
    except BrokenExecutor:
        raise ValueError("a process was killed; did memory run out?") from None
    finally:
        pool.shutdown(cancel_futures=True)
        print("\r" + " " * 60 + "\r" if live else "", end="", file=sys.stderr, flush=True)

# ---------------------------------------------------------------- command line

def train_command(args):
    """learn a tokenizer from text"""
    if any(Path(args.out).glob("*.safetensors")):
        raise ValueError(f"{args.out} holds a model, whose tokenizer this would replace")
    counts, pattern = Counter(), PATTERNS[args.pattern]
    for some in parallel(count_slice, pattern, find_files(args.files, args.part), "counted"):
        counts.update(some)
    tokenizer = Tokenizer.train(counts, args.vocab_size, (DIVIDERS[0], *CHAT_TOKENS), pattern)
    tokenizer.save(args.out)
    print(f"{args.out}: {len(tokenizer):,} tokens")

def encode_command(args):
    """turn text or chats into a file of token ids"""
    # Text -> .npy: the ids in a row, mapped into memory by np.load(path, mmap_mode="r").
    # Chats -> .npz: ids and mask (1: learn this token) in a row; chat i is at offsets[i] to
    # offsets[i + 1]. Pair i is the chats 2i (chosen) and 2i + 1 (rejected); mask is 0 in prompts.
    # OUT.json says what made the ids, their digest, and what gzip needs.
    tokenizer = Tokenizer.load(args.tokenizer)
    maker = hashlib.sha256(tokenizer_file(args.tokenizer).read_bytes()).hexdigest()
    numbers, parts, digest, sidecar = Counter(), [], hashlib.sha256(), Path(f"{args.out}.json")
    header = {"descr": tokenizer.dtype.str, "fortran_order": False, "shape": (0,)}
    with whole_file(args.out) as file:
        np.lib.format.write_array_header_1_0(file, header)
        files = find_files(args.files, args.part)
        for some, *arrays in parallel(encode_slice, tokenizer, files, "encoded"):
            numbers.update(some)
            kinds = sorted({"text", "chats", "pairs"} & numbers.keys())
            if kinds and (len(kinds) > 1 or not args.out.endswith(
                    ".npy" if kinds == ["text"] else ".npz")):
                raise ValueError(f"--out {args.out}: {' and '.join(kinds)} in these files, "
                                 "but text goes to one .npy, and chats, or pairs, to one .npz")
            for array in arrays:
                digest.update(array)
            if args.out.endswith(".npy"):
                file.write(arrays[0])
            else:
                parts.append(arrays)          # chats wait in memory: 10 bytes a token
        if not numbers["tokens"]:
            raise ValueError(f"{' '.join(args.files)}: there is no text in it")
        file.seek(0)
        if parts:
            ids, mask, lengths = map(np.concatenate, zip(*parts))
            np.savez(file, ids=ids, mask=mask, offsets=np.cumsum(np.append(0, lengths)))
        else:           # as long as the first one, because numpy leaves room for more digits
            np.lib.format.write_array_header_1_0(file, header | {"shape": (numbers["tokens"],)})
        sidecar.unlink(missing_ok=True)       # no old one beside a new file
    write_json(sidecar, {
        "kind": kinds[0], "tokens": numbers["tokens"], "bytes": numbers["bytes"],
        "digest": digest.hexdigest(), "tokenizer": maker, "vocab_size": len(tokenizer),
        "gzip_bpb": 8 * numbers["gzip_out"] / max(1, numbers["gzip_in"])})
    print(f"{args.out}: {numbers['tokens']:,} tokens of {kinds[0]}")

def chat_command(args):
    """make a tokenizer ready for chats: their tokens, their template, what ends a reply"""
    Tokenizer.load(args.tokenizer)            # refuses what is not implemented
    file = tokenizer_file(args.tokenizer)
    paths = [file, *map(file.with_name, FILES[1:])]
    tokenizer, config, generation = contents = [
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {} for path in paths]
    if not all(isinstance(content, dict) for content in contents):
        raise ValueError(f"{file.parent}: one of {', '.join(FILES)} holds no JSON object")
    added = tokenizer["added_tokens"] = tokenizer.get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}
    for name in CHAT_TOKENS:
        if name not in ids:
            ids[name] = 1 + max([*tokenizer["model"]["vocab"].values(), *ids.values()])
            tokenizer["model"]["vocab"][name] = ids[name]   # or tokenizers would choose an id
            added.append({"id": ids[name], "content": name, "special": True} | AS_IT_IS)
    end = ids[CHAT_TOKENS[1]]
    config |= {"chat_template": CHAT_TEMPLATE, "eos_token": CHAT_TOKENS[1]}
    ends = generation.get("eos_token_id")                   # an id, a list of them, or None
    ends = ends if isinstance(ends, list) else [ends]
    generation["eos_token_id"] = sorted({end, *(i for i in ends if isinstance(i, int))})
    for name, content in zip(FILES, (tokenizer, config, generation)):
        write_json(Path(args.out, name), content)
    print(f"{args.out}: a reply ends with {CHAT_TOKENS[1]} ({end})")

def show_command(args):
    """show text in tokens of two colours, or chats with what is learned in green"""
    tokenizer = Tokenizer.load(args.tokenizer)
    for name in args.files:
        found = slices(find_files([name])) if os.path.exists(name) else [("", 0, True, name)]
        for _, row in (row for piece in found for row in read_rows(*piece)):
            if isinstance(row, str):                         # colours of the background (ANSI)
                shown = [zip(tokenizer.encode(row), itertools.cycle(["30;104", "30;47"]))]
            else:
                shown = [zip(ids, ("92" if learned else "90" for learned in mask))
                         for ids, mask in (encode_chat(tokenizer, *chat) for chat in row)]
            for tokens in shown:
                for i, colour in tokens:
                    text = tokenizer.vocab[i].decode("utf-8", errors="backslashreplace")
                    print(f"\033[{colour}m" + text.replace("\n", "↵\033[0m\n"), end="\033[0m")
                print()

class Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse itself would print its whole usage before it
        raise ValueError(f"{message}; see --help")

COMMANDS = {train_command: "files --out --vocab_size --pattern --part",
            encode_command: "files --tokenizer --out --part",
            show_command: "files --tokenizer", chat_command: "--tokenizer --out"}
ARGUMENTS = {
    "files": dict(nargs="+", metavar="FILE",
                  help=".txt, .jsonl, or a folder of them; for show, also the text itself"),
    "--tokenizer": dict(required=True, metavar="DIR", help="what holds tokenizer.json"),
    "--out": dict(required=True, help="DIR; for encode FILE.npy, or for chats FILE.npz"),
    "--vocab_size": dict(type=int, required=True, help="number of tokens"),
    "--pattern": dict(default="llama3", choices=PATTERNS,
                      help="how text is split before merging [%(default)s]"),
    "--part": dict(nargs=2, default=(0, 1), metavar=("A", "B"), type=float,
                   help="only the text from fraction A to fraction B of it [0 1: all]")}

def main(argv=None) -> int:
    parser = Parser("bpe.py", description="Byte-pair encoding: from text to token ids.")
    commands = parser.add_subparsers(required=True, metavar="train|encode|show|chat")
    for function, arguments in COMMANDS.items():
        command = commands.add_parser(function.__name__.removesuffix("_command"),
                                      help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        for argument in arguments.split():
            command.add_argument(argument, **ARGUMENTS[argument])
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")    # a terminal that is not UTF-8 gets question marks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # or parallel() could not clean up
    try:
        args = parser.parse_args(argv)
        args.function(args)
        return 0
    except KeyboardInterrupt:
        print("\nbpe.py: interrupted; no file is half written", file=sys.stderr)
        return 130
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        print(f"bpe.py: {error}", file=sys.stderr)
        return 2

# ---------------------------------------------------------------- the same functions, faster

# merge_fast() returns what merge() returns, and learn_fast() what learn() returns: tests compare
# them on thousands of random texts. You can skip this section.

def merge_fast(ids: list[int], merges: dict) -> list[int]:
    """merge() in n log n steps instead of n * n: a chunk of a million bytes takes seconds.

    A heap finds the lowest rank. The tokens are a doubly linked list: position i holds a token, and
    after[i] and before[i] are its neighbours. The list is a ring, closed by one empty position, so
    that its ends need no case of their own. Example "abc": tokens [a, b, c, None], after
    [1, 2, 3, 0], before [-1, 0, 1, 2], where -1 is the last position."""
    tokens = [*ids, None]
    after = [*range(1, len(tokens)), 0]
    before = [-1, *range(len(ids))]
    merge_at = [merges.get(pair) for pair in itertools.pairwise(tokens)] + [None]
    heap = sorted((merge, i) for i, merge in enumerate(merge_at) if merge)  # sorted lists are heaps
    while heap:
        merge, i = heapq.heappop(heap)
        if merge_at[i] != merge:                            # one of the two has merged meanwhile
            continue
        j = after[i]
        tokens[i], tokens[j], merge_at[j] = merge[1], None, None
        after[i] = after[j]
        before[after[i]] = i
        for left in (before[i], i):                         # there are new pairs on both sides
            merge_at[left] = new = merges.get((tokens[left], tokens[after[left]]))
            if new:
                heapq.heappush(heap, (new, left))
    return [token for token in tokens if token is not None]

def learn_fast(counts: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """learn(), for 5 MB in a third of a second instead of minutes. Two ideas:

    1. Keep the counts up to date, and for each pair a list of the words that have it. A merge
       changes only the pairs beside it: where x a b y becomes x [ab] y, the pairs (x, a) and (b, y)
       go, and (x, [ab]) and ([ab], y) come.
    2. A heap finds the most frequent pair. A count is complete once the younger token of its pair
       has been made, and only falls from then on. So an entry of the heap is right or too high. If
       it is too high when it comes up, it goes back with the right count. If it is right, no pair
       beats it, and equal ones stand in the order of their ids, as learn() takes them.
    """
    words = [chunk.encode().decode("latin-1") for chunk in counts]       # as in learn()
    weights = [*counts.values()]
    count, words_with = defaultdict(int), defaultdict(list)              # of each pair
    for number, word in enumerate(words):
        for a, b in itertools.pairwise(word):
            count[a + b] += weights[number]
            words_with[a + b].append(number)
    heap = sorted((-n, pair) for pair, n in count.items())
    merges = []
    while heap and heap[0][0] < 0 and len(merges) < n_merges:       # 0: none is left anywhere
        n, pair = heapq.heappop(heap)
        if n != -count[pair]:
            heapq.heappush(heap, (-count[pair], pair))
            continue
        (a, b), new = pair, chr(256 + len(merges))
        merges.append((ord(a), ord(b)))
        come = defaultdict(list)                            # the words with each new pair
        for number in set(words_with.pop(pair)):
            parts = words[number].split(pair)       # only one, if another merge took all a or b
            words[number], last = new.join(parts), len(parts) - 1
            for i in range(last):                   # the pair between parts i and i + 1, and what
                x = parts[i][-1:] or (new if i else "")     # stands before: here "" is the edge
                y = parts[i + 1][:1] or (a if i + 1 < last else "")
                for stays, goes, comes in (x, x + a, x + new), (y, b + y, new + y):
                    if stays:
                        count[goes] -= weights[number]
                        count[comes] += weights[number]
                        come[comes].append(number)
        words_with.update(come)
        for pair in come:
            heapq.heappush(heap, (-count[pair], pair))
    return merges

if __name__ == "__main__":
    sys.exit(main())

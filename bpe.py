# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
# ///
"""Byte-level BPE, whole: learn a tokenizer, encode, decode, read and write the field's files.

Byte-pair encoding turns text into a short list of small integers, all that a language model ever
sees. It starts with the 256 bytes and learns from a text which two neighbours to glue into one
token, the most frequent pair first, again and again. To encode a text, glue in the same order.
Any text can be encoded, and decoding gives back exactly its bytes.

    python bpe.py train  plays.txt --vocab_size 4096 --out out/tokenizer   # 5 MB: 2 seconds
    python bpe.py encode plays.txt --tokenizer out/tokenizer --out out/train.npy
    python bpe.py show  "To be, or not" --tokenizer out/tokenizer    # cut into coloured tokens

    tokenizer = Tokenizer.load("out/tokenizer")    # or the tokenizer.json of Qwen, Llama 3, ...
    tokenizer.decode(tokenizer.encode("any text")) == "any text"

Words: a *chunk* is a piece of text, about a word, across whose edges nothing is merged; a *token*
is a string of bytes with a number, its *id*; a *merge* glues two tokens into a third, and its
*rank* says how early it was learned (lower goes first). Left out on purpose: other kinds of
tokenizers. What a file asks for and is not done here is refused by name.
Sources: Sennrich et al. 2016, arxiv.org/abs/1508.07909 (BPE on words); Radford et al. 2019,
github.com/openai/gpt-2 (bytes, splitting); github.com/openai/tiktoken (patterns, rank files);
github.com/huggingface/tokenizers (tokenizer.json, the order of equally frequent pairs).
"""

import argparse
import base64
import codecs
import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np

# ------------------------------------------------------------------------------------------ bytes

# tokenizer.json is text, tokens are bytes, and many a token is no valid UTF-8 by itself (a third of
# a Chinese character, say). GPT-2's way out, which everyone kept: each byte is written as a visible
# character. Those that are visible in Latin-1 stand for themselves, the others for U+0100 upward.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHAR_OF_BYTE = {byte: byte for byte in VISIBLE} | {b: 256 + i for i, b in enumerate(HIDDEN)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def spell(token: bytes) -> str:
    """b" caf\\xc3\\xa9" -> "ĠcafÃ©": a blank is written Ġ, and the two bytes of é as Ã and ©."""
    return token.decode("latin-1").translate(CHAR_OF_BYTE)


def unspell(spelling: str) -> bytes:
    """"ĠcafÃ©" -> b" caf\\xc3\\xa9": the way back."""
    return spelling.translate(BYTE_OF_CHAR).encode("latin-1")


# -------------------------------------------------------------------------------------- splitting

# A text is first cut into chunks. Without that the commonest tokens would be "e t" and ". The".
# The alternatives of a pattern are tried from left to right; take llama3's:
#   (?i:'s|'t|...)            English endings: 's 't 're 've 'm 'll 'd
#   [^\r\n\p{L}\p{N}]?\p{L}+  a word, with one space (or quote, or bracket) before it
#   \p{N}{1,3}                up to three digits, so that numbers do not fill the vocabulary
#    ?[^\s\p{L}\p{N}]+[\r\n]* punctuation, with a space before and line ends after
#   \s*[\r\n]+                white space up to the end of the line
#   \s+(?!\S)                 white space, less the last blank, which belongs to the next word
#   \s+                       what is left
# cl100k is GPT-4, o200k is GPT-4o: it also cuts where lower case turns to upper, as in "camelCase".
# smollm2 is gpt2 with single digits, which its file asks for in two steps ("Digits", "ByteLevel").
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
                r"|\s+(?![^\s\p{N}])|\s+"),
}


@functools.cache
def unicode_classes() -> tuple[dict[str, str], dict[str, str]]:
    r"""Python's re has no \p{L}, so list the letters, up to U+FFFF: {"L": "A-Za-zªµº...", ...}

    re finds those in a table, but would compare a character above with hundreds of ranges one by
    one. So each of these gets a stand-in, the last one of its category up to U+FFFF: {"Lu": "Ｚ"}.
    The classes are those of this Python's Unicode; the libraries in Rust have Unicode 16. A
    character that is newer than either may be split otherwise, any other is not. White space is
    spelled out, because Python's \s has U+001C to U+001F, which no one else's has.
    """
    members = defaultdict(set)
    for code in range(0x10000):
        category = unicodedata.category(chr(code))               # "Lu": letter, upper case
        members[category].add(code)
        members[category[0]].add(code)
    classes = {"s": "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    for name, codes in members.items():
        firsts = sorted(code for code in codes if code - 1 not in codes)
        lasts = sorted(code for code in codes if code + 1 not in codes)
        classes[name] = "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}"
                                for first, last in zip(firsts, lasts))
    return classes, {name: chr(max(codes)) for name, codes in members.items()}


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern:
    r"""The pattern with \p{..} and \s written as ranges."""
    classes, _ = unicode_classes()

    def translate(found):
        negated, body = found[1] or "", found[2] or found[0]     # \p{L} alone: a class of one
        if body == r"\S":
            negated, body = "^", r"\s"
        if "[" in body or re.search(r"\\[a-moqu-zA-Z]", body):
            raise re.error(f"can't translate {found[0]}")
        return f"[{negated}{re.sub(named, lambda found: classes[found[1] or 's'], body)}]"

    named = r"\\p\{(\w+)\}|\\s"
    try:
        parts = r"\[(\^?)((?:\\.|[^\]\\])+)\]|\\[a-moqsu-zA-Z]|\\[pP]\{\w+\}"
        return re.compile(re.sub(parts, translate, pattern))
    except (re.error, KeyError) as error:
        raise ValueError(f"split pattern: {error}: {pattern}") from None


def split(text: str, pattern: str) -> list[str]:
    r""""To be!\n" -> ["To", " be", "!\n"]"""
    find_chunks = compile_pattern(pattern).findall
    if text.isascii():
        return find_chunks(text)
    units = text.encode("utf-16-le", "surrogatepass")        # above U+FFFF it takes two units
    text = units.decode("utf-16-le", "replace")              # half a pair is no character: U+FFFD
    if len(units) == 2 * len(text):
        return find_chunks(text)
    _, stand_ins = unicode_classes()
    low = re.sub("[^\0-\uffff]", lambda found: stand_ins[unicodedata.category(found[0])], text)
    ends = itertools.accumulate(map(len, find_chunks(low)), initial=0)
    return [text[begin:end] for begin, end in itertools.pairwise(ends)]


# Texts of any size are worked on in pieces of about a million characters, cut where every pattern
# has an edge anyway: before a blank after a letter or digit, or after a line end between visibles.
PIECE = 1 << 20
CUT = re.compile(r"[^\W_](?=\s)|\S\n(?=[^\W_])")


def pieces(blocks):
    """The blocks of a text, wherever they were cut -> pieces that can be split each on its own."""
    text, at = "", PIECE
    for block in blocks:
        text, begin = text + block, 0
        while cut := CUT.search(text, at):
            yield text[begin:cut.end()]
            begin = cut.end()
            at = begin + PIECE
        text = text[begin:]
        at = max(PIECE, len(text) - 2)        # all before has been searched: CUT sees 3 characters
    if text:
        yield text


def count_chunks(texts, pattern: str) -> Counter:
    """["to be, to"] -> {"to": 1, " be": 1, ",": 1, " to": 1}"""
    counts = Counter()
    for text in texts:
        for piece in pieces([text]):
            counts.update(split(piece, pattern))
    return counts


# --------------------------------------------------------------------------------------- learning

def learn(counts: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """{chunk: how often} -> merges: the i-th pair of ids becomes token 256 + i.

    {"aaab": 2, "ab": 1}, 2 -> [(97, 97), (97, 98)]: "aa" stands there 4 times, "ab" 3 times; with
    aa merged, the chunks are [aa][a][b] and [a][b], and now "ab" is commonest.
    The rule: the most frequent pair; of equally frequent ones that with the smallest ids. So the
    outcome depends on the counts alone, not on the order of the text or the number of processes.

    The plain loop (count all pairs, merge the commonest everywhere) reads the text once per merge.
    Here all distinct chunks lie in a row, with a 0xFF, which no UTF-8 contains, around each, and:
    1. Counts are kept up to date: a merge changes only the pairs beside it. A pair can only come
       into being when the younger of its tokens does, so its places are written down once.
    2. About 50 merges are done at once by numpy. Walk down the pairs, the commonest first, for as
       long as none begins with a token that another ends with: such pairs can't overlap, so they
       leave each other's counts alone. A new pair, beside a merged one, is no commoner than the
       pair that stood there before. That one overlaps the merged one, so it isn't in the batch: it
       comes later in the order, and so does the new pair. Hence one by one gives the same.
    """
    chunks = [chunk.encode() for chunk in counts]
    flat = np.frombuffer(b"\xff" + b"\xff".join(chunks) + b"\xff", np.uint8)
    size = len(flat)
    token = flat.astype(np.int32)                            # at each place: its token,
    after = np.arange(1, size + 1, dtype=np.int32)           # the place of the next token,
    before = np.arange(-1, size - 1, dtype=np.int32)         # and of the one before,
    pair_at = np.zeros(size, np.int32)                       # the pair that begins here (0: none),
    weight = np.append(np.fromiter(counts.values(), np.int64, len(chunks)), 0)
    weight = weight[np.cumsum(flat == 0xFF) - 1]             # how often the chunk occurs

    # A pair has a number, in order of appearance. A merge takes away one place and makes two pairs
    # at most, so fewer than 3 * size ever appear. (Memory that is not touched costs nothing.)
    both = np.zeros(3 * size, np.int64)                      # its two ids: a << 32 | b
    count = np.zeros(3 * size, np.int64)
    start = np.zeros(3 * size, np.int64)                     # its places: places[start:next start]
    places = np.zeros(3 * size, np.int32)
    n_pairs, n_places = 1, 0

    def add_pairs(where) -> int:
        """Number and count the pairs which begin at these places; returns the first number."""
        nonlocal n_pairs, n_places
        ids = token[where].astype(np.int64) << 32 | token[after[where]]
        order = np.argsort(ids, kind="stable")
        where, ids = where[order], ids[order]
        edges = np.flatnonzero(np.diff(ids, prepend=-1))     # equal pairs are now side by side
        first, n_pairs = n_pairs, n_pairs + len(edges)
        both[first:n_pairs] = ids[edges]
        count[first:n_pairs] = np.add.reduceat(weight[where], edges) if len(edges) else 0
        start[first:n_pairs] = n_places + edges
        places[n_places:n_places + len(where)] = where
        n_places += len(where)
        start[n_pairs] = n_places
        pair_at[where] = np.repeat(np.arange(first, n_pairs), np.diff(edges, append=len(ids)))
        return first

    def entries(pairs):                                      # what the heap sorts by: the rule
        return zip((-count[pairs]).tolist(), both[pairs].tolist(), pairs.tolist())

    add_pairs(np.flatnonzero((flat[:-1] != 0xFF) & (flat[1:] != 0xFF)).astype(np.int32))
    merges, heap, floor = [], [], 0
    while len(merges) < n_merges:
        # The heap holds the pairs with a count of floor or more; empty, it takes the next few
        # thousand. Counts only fall, so an entry may be out of date: then it goes back, or below.
        if not heap:
            waiting = count[1:n_pairs]
            few = min(4096, len(waiting))
            floor = max(1, int(np.partition(waiting, -few)[-few])) if few else 1
            heap = sorted(entries(1 + np.flatnonzero(waiting >= floor)))
            if not heap:
                break                                        # nothing left to merge
        batch, firsts, seconds = [], set(), set()
        while heap and len(merges) + len(batch) < n_merges:
            negative, ids, pair = heap[0]
            now = int(count[pair])
            if now < floor:
                heapq.heappop(heap)
            elif now < -negative:
                heapq.heapreplace(heap, (-now, ids, pair))
            else:
                a, b = ids >> 32, ids & 0xFFFFFFFF
                if batch and (a in seconds or b in firsts or a == b):
                    break
                batch.append(pair)
                firsts.add(a)
                seconds.add(b)
                heapq.heappop(heap)
                if a == b:                                   # overlaps itself: a batch of its own
                    break
        if not batch:
            continue

        # Where does the batch apply? Of the places written down, those that still hold the pair.
        left = np.concatenate([places[start[pair]:start[pair + 1]] for pair in batch])
        pairs = np.array(batch)
        which = np.repeat(np.arange(len(batch)), start[pairs + 1] - start[pairs])
        holds = pair_at[left] == pairs[which]
        left, which = left[holds], which[holds]
        if firsts & seconds:                                 # aaaa: places 1 and 3, not 2
            left = np.sort(left)
            index = np.arange(len(left))
            first = np.diff(left, prepend=-1) != 0
            first[1:] = after[left[:-1]] != left[1:]         # the first of a run of a's
            odd = (index - np.maximum.accumulate(index * first)) % 2
            left, which = left[odd == 0], which[odd == 0]

        # x a b y -> x [ab] y: the pairs (x,a), (a,b), (b,y) go; (x,[ab]) and ([ab],y) come. If x is
        # the b of another merge its pair has gone already, and pair_at is 0: count[0] is for those.
        right = after[left]
        end = after[right]
        np.subtract.at(count, pair_at[right], weight[right])
        pair_at[right] = 0
        x = before[left]
        np.subtract.at(count, pair_at[x], weight[left])
        x = x[pair_at[x] > 0]
        count[pairs] = 0
        pair_at[left] = 0
        token[left] = 256 + len(merges) + which
        after[left] = end
        before[end] = left
        merges += zip((both[pairs] >> 32).tolist(), (both[pairs] & 0xFFFFFFFF).tolist())
        new = np.arange(add_pairs(np.concatenate((x, left[token[end] != 0xFF]))), n_pairs)
        for entry in entries(new[count[new] >= floor]):
            heapq.heappush(heap, entry)
    return merges


# ------------------------------------------------------------------------- encoding and decoding

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
DIVIDERS = ("<|endoftext|>", "<|begin_of_text|>")            # one stands before each document
NO_MERGE = 1 << 30                                           # a rank after all others
BLOCK = 1 << 17                                              # bytes that are merged side by side


def slot(pair):
    """Spreads pairs of ids, as numbers, over 4 million places: the top 22 bits of a product."""
    return (pair * 0x1E3779B97F4A7C15 >> 42) & 0x3FFFFF


class Tokenizer:
    """Made by Tokenizer.train() or Tokenizer.load()."""

    def __init__(self, vocab, ranks, made, special_tokens, pattern, whole_first=False, nfc=False,
                 plain=()):
        self.vocab = vocab                    # list: id -> bytes, None where there is no such id
        self.ranks = ranks                    # dict: (id, id) -> rank of their merge
        self.made = made                      # rank -> id of the token it makes
        self.special_tokens = special_tokens  # dict: name -> id
        self.pattern = pattern                # how text is split: a regular expression
        self.whole_first = whole_first        # a chunk that is a token needs no merges (tiktoken)
        self.nfc = nfc                        # compose e + ´ to é first (Qwen)
        self.plain = plain                    # those of special_tokens whose file calls them plain
        special_ids = set(special_tokens.values())           # text never leads to one of these
        self.id_of = {token: i for i, token in enumerate(vocab)
                      if token is not None and i not in special_ids}
        # SmolLM2's vocabulary lacks 21 bytes, 0x04 for one: as in tokenizers, they get no id.
        self.byte_ids = [self.id_of.get(bytes([byte])) for byte in range(256)]
        self.divider = next((name for name in DIVIDERS if name in special_tokens), None)
        self.dtype = np.dtype("<u2" if len(vocab) <= 1 << 16 else "<u4")
        self.cache, self.cached = {}, 0       # chunk -> its ids as bytes of dtype; memory it takes

    def __len__(self):
        """The largest id + 1: the number of rows of an embedding."""
        return len(self.vocab)

    @classmethod
    def train(cls, texts, vocab_size: int, special_tokens=(), pattern="llama3"):
        """texts: an iterable of str, or the counts of count_chunks().
        The ids: byte b is b, merge i is 256 + i, the special tokens are last."""
        pattern = PATTERNS.get(pattern, pattern)
        counts = texts if isinstance(texts, Counter) else count_chunks(texts, pattern)
        fixed = 256 + len(special_tokens)
        merges = learn(counts, max(0, vocab_size - fixed))
        if vocab_size != fixed + len(merges):
            raise ValueError(f"vocab_size {vocab_size}: 256 bytes and {len(special_tokens)} special"
                             f" tokens need {fixed}, and there is too little text for more than "
                             f"{fixed + len(merges)}; ask for that or less, or add text")
        vocab = [bytes([byte]) for byte in range(256)]
        for a, b in merges:
            vocab.append(vocab[a] + vocab[b])
        made = range(256, len(vocab))
        special = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        vocab += [name.encode() for name in special]
        return cls(vocab, {pair: i for i, pair in enumerate(merges)}, made, special, pattern)

    def encode(self, text: str, allowed_special=()) -> list[int]:
        """"To be" -> [2514, 307] with GPT-2's vocabulary. Nothing is added to it.

        Text is only text, "<|endoftext|>" 13 characters, unless allowed_special names it (or is
        "all"): then it is that one token. So with plain added tokens, too, like Qwen 3's <think>,
        which `tokenizers` finds in any text.
        """
        names = self.special_tokens if allowed_special == "all" else allowed_special
        for name in names:
            if name not in self.special_tokens:
                raise ValueError(f"{name!r} is none of this tokenizer's special tokens")
        ids = []
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))   # longest first
        parts = re.split(f"({either})", text) if names else [text]
        for i, part in enumerate(parts):                     # text, name, text, name, text
            ids += [self.special_tokens[part]] if i % 2 else self.encode_array(part).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """encode() for much text: an array of self.dtype, no special tokens. Of 20 chunks, 19 have
        been seen before, and each of those costs one look into a dictionary."""
        if self.nfc:
            # With the Unicode of this Python. tokenizers has Unicode 9 here: marks from later than
            # 2016 are not put in order with others beside them (U+0301 U+0899), and U+11935 U+11930
            # is not composed. Only texts with such a sequence get other ids.
            text = unicodedata.normalize("NFC", text)
        joined = []
        for piece in pieces([text]):
            chunks = split(piece, self.pattern)
            if self.cached > 1 << 28:                        # about 256 MB: start over
                self.cache, self.cached = {}, 0
            self.fill_cache(set(chunks).difference(self.cache))
            joined.append(b"".join(map(self.cache.__getitem__, chunks)))
        return np.frombuffer(b"".join(joined), self.dtype)

    def fill_cache(self, chunks: set[str]):
        """Encode chunks, in blocks of about the same length, the longest first."""
        words = sorted(map(str.encode, chunks), key=len)
        self.cached += sum(200 + 8 * len(word) for word in words)
        while words:
            block = words[-max(1, BLOCK // len(words[-1])):]
            del words[-len(block):]
            if len(block) >= 64 and None not in self.byte_ids:
                ids = self.merge_side_by_side(block)
            else:                                            # numpy isn't worth the trouble
                ids = [np.array(self.merge(word), self.dtype).tobytes() for word in block]
            self.cache.update(zip(map(bytes.decode, block), ids))
            if self.whole_first:
                self.cache.update((word.decode(), np.array(self.id_of[word], self.dtype).tobytes())
                                  for word in block if word in self.id_of)

    def merge(self, word: bytes) -> list[int]:
        """Encoding itself: merge the pair of lowest rank, of equals the leftmost; and again.

        A heap, and a list linked both ways: a word of a megabyte takes n log n steps and not n^2.
        The list is a ring, closed by an empty place: so its ends need no case of their own.
        """
        tokens = [self.byte_ids[byte] for byte in word if self.byte_ids[byte] is not None] + [None]
        size = len(tokens) - 1
        after = [*range(1, size + 1), 0]
        before = [-1, *range(size)]
        rank_at = [self.ranks.get(pair) for pair in itertools.pairwise(tokens)] + [None]
        heap = [(rank, i) for i, rank in enumerate(rank_at) if rank is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            if rank_at[i] != rank:                           # one of the two has merged meanwhile
                continue
            j = after[i]
            tokens[i], tokens[j], rank_at[j] = self.made[rank], None, None
            after[i] = after[j]
            before[after[i]] = i
            for left in (before[i], i):                      # there are new pairs on both sides
                rank_at[left] = new = self.ranks.get((tokens[left], tokens[after[left]]))
                if new is not None:
                    heapq.heappush(heap, (new, left))
        return [token for token in tokens if token is not None]

    @functools.cached_property
    def tables(self):
        """For numpy: all pairs in ascending order; their ranks; 4 million flags, of which those
        are set where slot() puts a pair; the ranks of any two bytes; self.made."""
        n = len(self.ranks)
        ids = np.fromiter(itertools.chain.from_iterable(self.ranks), np.int64, 2 * n)
        pairs = np.append(ids[0::2] << 32 | ids[1::2], 1 << 62)      # the last one is a stop
        ranks = np.append(np.fromiter(self.ranks.values(), np.int64, n), NO_MERGE)
        order = np.argsort(pairs)
        flags = np.zeros(1 << 22, bool)
        flags[slot(pairs)] = True
        every = [*self.byte_ids[:0xFF], None]                # 0xFF, which no UTF-8 contains: empty
        of_bytes = [self.ranks.get(pair, NO_MERGE) for pair in itertools.product(every, every)]
        return (pairs[order], ranks[order], flags, np.array(of_bytes).reshape(256, 256),
                np.array(self.made, np.int64))

    def rank(self, a, b):
        """Arrays of ids -> the ranks of their merges, NO_MERGE where they have none. Most have
        none, and for most of those a flag says so: that saves the search."""
        pairs, ranks, flags, _, _ = self.tables
        pair = a << 32 | b
        result = np.full(len(pair), NO_MERGE)
        maybe = np.flatnonzero(flags[slot(pair)])
        at = np.searchsorted(pairs, pair[maybe])
        result[maybe] = np.where(pairs[at] == pair[maybe], ranks[at], NO_MERGE)
        return result

    def merge_side_by_side(self, words: list[bytes]) -> list[bytes]:
        """merge() for thousands of words: in every round numpy does one merge in each of them.
        They lie in a row, after each an empty place: 0xFF as a byte, len(self) as a token."""
        _, _, _, rank_of_bytes, made = self.tables
        empty, never = len(self), NO_MERGE << 32
        text = np.frombuffer(b"\xff".join(words) + b"\xff", np.uint8)
        tokens = np.array([*self.byte_ids[:0xFF], empty])[text]
        places = np.arange(len(text))
        after, before = np.roll(places, -1), np.roll(places, 1)
        # A score: the rank of the pair that begins here, and of equal ranks the left one is lower.
        scores = rank_of_bytes[text, np.roll(text, -1)] << 32 | places
        ends = np.flatnonzero(tokens == empty)
        begins = np.append(0, ends[:-1] + 1)
        while True:
            # The best pair of each word. One in which nothing is left to do drops out: its scores
            # then count with those of the word before it, where they change nothing.
            best = np.minimum.reduceat(scores, begins)
            begins, best = begins[best < never], best[best < never]
            if not len(best):
                break
            i = best & 0xFFFFFFFF
            j = after[i]
            tokens[i], tokens[j], scores[j] = made[best >> 32], empty, never
            after[i] = after[j]
            before[after[i]] = i
            for left in (before[i], i):
                scores[left] = self.rank(tokens[left], tokens[after[left]]) << 32 | left
        there = tokens != empty
        ids = tokens[there].astype(self.dtype).tobytes()
        ends = np.cumsum(there)[ends] * self.dtype.itemsize
        return [ids[begin:end] for begin, end in itertools.pairwise([0, *ends.tolist()])]

    def decode_bytes(self, ids) -> bytes:
        """Exactly the bytes that were encoded, valid UTF-8 or not."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < len(self) or self.vocab[i] is None:
                raise ValueError(f"{i} is no id of this vocabulary of {len(self)}")
        return b"".join([self.vocab[i] for i in ids])

    def decode(self, ids) -> str:
        """What a model makes up need not be valid UTF-8: the rest of it becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Ids as they come -> text as soon as it is certain, never half a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in itertools.chain((self.decode_bytes([i]) for i in ids), [None]):
            if text := decoder.decode(token or b"", final=token is None):
                yield text

    @classmethod
    def load(cls, path, pattern=None, special_tokens=None):
        """A tokenizer.json, a directory with one, or a .tiktoken file. That has ranks only: name a
        pattern for it, and give {name: id} for special tokens."""
        path = tokenizer_file(path)
        try:
            with open(path, encoding="utf-8") as file:
                if not path.endswith(".tiktoken"):
                    return cls(*read_tokenizer_json(json.load(file)))
                if pattern is None:
                    raise ValueError(f"name its pattern: {', '.join(PATTERNS)}")
                ranks = read_ranks(file, special_tokens or {})
                return cls(*ranks, PATTERNS.get(pattern, pattern), whole_first=True)
        except ValueError as error:                          # no JSON, or no UTF-8, is one as well
            raise ValueError(f"{path}: {error}") from None
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not built as a tokenizer.json is: {error!r}") from None

    def save(self, directory):
        """tokenizer.json, and tokenizer_config.json for transformers."""
        spelled = [None if token is None else spell(token) for token in self.vocab]
        for name, i in self.special_tokens.items():
            spelled[i] = name
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        write_json(os.path.join(directory, "tokenizer.json"), {
            "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": name, "special": name not in self.plain} | flags
                             for name, i in self.special_tokens.items()],
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "decoder": level,
            "model": {
                "type": "BPE", "ignore_merges": self.whole_first,
                # with the special tokens: else, where ids have gaps, the reader numbers them anew
                "vocab": {token: i for i, token in enumerate(spelled) if token is not None},
                "merges": [[spelled[a], spelled[b]]
                           for a, b in sorted(self.ranks, key=self.ranks.get)]}})
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
        if self.divider:
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), self.divider)
        if all(name in self.special_tokens for name in CHAT_TOKENS):
            config["chat_template"] = CHAT_TEMPLATE
        write_json(os.path.join(directory, "tokenizer_config.json"), config)
        ends = self.special_tokens.get(self.divider)
        write_json(os.path.join(directory, "generation_config.json"),
                   {} if ends is None else {"bos_token_id": ends, "eos_token_id": ends})


# ---------------------------------------------------------------------------------- load and save

def tokenizer_file(path):
    """"out/tokenizer" -> "out/tokenizer/tokenizer.json"; a file is itself."""
    return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else os.fspath(path)


def read_ranks(lines, special_tokens):
    """A line of a .tiktoken file: a token in base64, a blank, its id, which is its rank as well.
    Any two tokens which together are a third can merge into it, and the lowest id goes first."""
    vocab, id_of, ranks = [], {}, {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not a token in base64 and a number") from None
        if rank != len(vocab) or token in id_of:
            raise ValueError(f"line {number}: {token} has the rank {rank}, "
                             f"but a new token with the rank {len(vocab)} is due")
        id_of[token] = rank
        vocab.append(token)
    for rank, token in enumerate(vocab):
        for cut in range(1, len(token)):
            if token[:cut] in id_of and token[cut:] in id_of:
                ranks[id_of[token[:cut]], id_of[token[cut:]]] = rank
    made = range(len(vocab))
    for name, i in special_tokens.items():
        vocab += [None] * (i + 1 - len(vocab))
        if vocab[i] is not None:
            raise ValueError(f"the id {i} of {name!r} is that of {vocab[i]}")
        vocab[i] = name.encode()
    return vocab, ranks, made, special_tokens


def read_tokenizer_json(content):
    """-> the arguments of Tokenizer(); a ValueError names what is there but not done here.

    Of the other entries none changes the ids of a text: "decoder" is the way back, and what
    "post_processor" puts around them (a <|begin_of_text|>, say) is added by whoever wants it.
    """
    def insist(place, part, **allowed):
        for key, values in allowed.items():
            if part.get(key) not in values:
                raise ValueError(f'{place}: "{key}": {json.dumps(part.get(key))[:60]} '
                                 "is not supported here")

    model, pre = content["model"], content.get("pre_tokenizer") or {"type": None}
    insist("top level", content, truncation=[None], padding=[None],
           normalizer=[None, {"type": "NFC"}])
    insist("model", model, type=[None, "BPE"], dropout=[None, 0], byte_fallback=[None, False],
           continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""])
    *steps, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    insist("pre_tokenizer", last, type=["ByteLevel"], add_prefix_space=[False])
    kinds = [step["type"] for step in steps] + [last.get("use_regex", True)]
    if kinds == [True]:
        pattern = PATTERNS["gpt2"]
    elif kinds == ["Digits", True]:
        insist("Digits", steps[0], individual_digits=[True])
        pattern = PATTERNS["smollm2"]
    elif kinds == ["Split", False] and "Regex" in steps[0]["pattern"]:
        insist("Split", steps[0], behavior=["Isolated"], invert=[None, False])
        pattern = steps[0]["pattern"]["Regex"]
    else:
        raise ValueError(f"pre_tokenizer: {json.dumps(pre)[:200]} is not supported here")

    special, plain = {}, set()
    for added in content.get("added_tokens") or []:
        insist(f"added token {added['content']!r}", added, lstrip=[None, False],
               rstrip=[None, False], single_word=[None, False])
        special[added["content"]] = added["id"]
        if not added.get("special", True):                   # as Qwen 3 says of <think>
            plain.add(added["content"])
    ids = model["vocab"] | special
    vocab = [None] * (1 + max(ids.values()))
    for spelling, i in ids.items():
        if vocab[i] is not None:
            raise ValueError(f"the id {i} is there twice, the second time for {spelling!r}")
        if spelling not in special and not BYTE_OF_CHAR.keys() >= set(map(ord, spelling)):
            raise ValueError(f"the token {spelling!r} (id {i}) is not in GPT-2's byte alphabet")
        vocab[i] = spelling.encode() if spelling in special else unspell(spelling)
    ranks, made = {}, []
    for rank, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        for part in (a, b, a + b):
            if part not in ids:
                raise ValueError(f"merge {rank} ({a!r}, {b!r}): {part!r} is not in the vocabulary")
        ranks[ids[a], ids[b]] = rank
        made.append(ids[a + b])
    return (vocab, ranks, made, special, pattern,
            model.get("ignore_merges", False), content.get("normalizer") is not None, plain)


@contextlib.contextmanager
def whole_file(path):
    """A file that gets its name when it is complete: whatever happens, nobody finds half of it."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                          # a full disk shows here at the latest
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_json(path, content):
    """Indented, so that people can read it."""
    with whole_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())


# ------------------------------------------------------------------------------------------ chats

# ChatML, as in SmolLM2 and Qwen, less the system message that they put before a chat without one.
# The only template: chats are encoded with it to learn from, and opened with it to sample.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def encode_chat(tokenizer, messages, first_trained=0, reply=False):
    """[{"role": "user", "content": "Hi"}, ...] -> ids, mask; mask is 1 where there is to learn:

    what the assistant says, and the <|im_end|> by which it stops, from message number first_trained
    on. With reply the assistant's next turn is opened: a prompt.
    Heads and contents are encoded apart, since who samples has the head alone. (transformers joins
    them: so where a content begins with blanks its ids can differ.) Contents are only text.
    """
    for name in CHAT_TOKENS:
        if name not in tokenizer.special_tokens:
            raise ValueError(f"this tokenizer has no {name}, so it can't encode chats")
    start, end = (tokenizer.special_tokens[name] for name in CHAT_TOKENS)
    ids, mask = [], []

    def add(tokens, trained=False):
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for number, message in enumerate(messages):
        add([start, *tokenizer.encode(message["role"] + "\n")])
        add([*tokenizer.encode(message["content"]), end],
            trained=message["role"] == "assistant" and number >= first_trained)
        add(tokenizer.encode("\n"))
    if reply:
        add([start, *tokenizer.encode("assistant\n")])
    return ids, mask


def conversations(row: dict) -> list[tuple[list[dict], int]]:
    """A line of chats or preferences -> (messages, first_trained): one for a chat, two for a pair.

    {"messages"}: learn all that the assistant says. {"prompt", "completion"} or {"prompt",
    "chosen", "rejected"}, each a string or a list of messages: learn what comes after the prompt.
    """
    def messages(value, role):
        value = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not (isinstance(value, list) and value and all(
                isinstance(message, dict) and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str) for message in value)):
            raise ValueError('a chat must be a list of {"role": string, "content": string}')
        return value

    def in_order(chat):
        after = {"": ("system", "user"), "system": ("user",), "user": ("assistant",),
                 "assistant": ("user", "tool"), "tool": ("tool", "assistant", "user")}
        for before, message in zip(["", *(message["role"] for message in chat)], chat):
            if message["role"] not in after[before]:
                raise ValueError(f"the roles are out of order: {message['role']!r} where there is "
                                 f"place for {' or '.join(after[before])}")
            if message["role"] == "assistant" and not message["content"].strip():
                raise ValueError("the assistant's reply is empty")
        return chat

    if "messages" in row:
        return [(in_order(messages(row["messages"], "user")), 0)]
    answers = ["completion"] if "completion" in row else ["chosen", "rejected"]
    if not {"prompt", *answers} <= row.keys():
        raise ValueError('expected "text", "messages", "prompt" and "completion", or "prompt", '
                         f'"chosen" and "rejected", but there is {list(row)}')
    prompt = messages(row["prompt"], "user")
    chats = [messages(row[answer], "assistant") for answer in answers]
    return [(in_order(chat if chat[:len(prompt)] == prompt else prompt + chat), len(prompt))
            for chat in chats]                               # some data sets repeat the prompt


# ------------------------------------------------------------------------------------------ files

def find_files(names, part="0:1") -> list[tuple[str, int, int]]:
    """Files, or folders with .txt and .jsonl files -> (path, first byte, end) of each.

    part cuts by position over all files together, "0:0.9" and "0.9:1" make the whole.
    """
    paths = []
    for name in names:
        inside = [name]
        if os.path.isdir(name):
            inside = sorted(os.path.join(folder, file) for folder, _, some in os.walk(name)
                            for file in some if file.endswith((".txt", ".jsonl")))
        paths += inside
    ends = [0, *itertools.accumulate(map(os.path.getsize, paths))]
    low, high = (int(float(fraction) * ends[-1]) for fraction in part.split(":"))
    if not 0 <= low < high <= ends[-1]:
        raise ValueError(f"{' '.join(names)}: no text in it, or in its part {part} "
                         "(in a folder, .txt and .jsonl count)")
    return [(path, max(low, begin) - begin, min(high, end) - begin)
            for path, begin, end in zip(paths, ends, ends[1:]) if begin < high and low < end]


def slices(files):
    """-> (path, first byte, whether a document begins here, text), each about PIECE long: the work.
    An end inside a character (.jsonl: a line) moves to the next, whichever side of it is asked for.
    """
    def edge(stream, at):
        """The first place from byte `at` on where a character (.jsonl: a line) begins."""
        stream.seek(max(0, at - 1))
        if at and stream.name.endswith(".jsonl"):
            return at - 1 + len(stream.readline())
        rest = stream.read(4)[1:] if at else b""
        return at + len(rest) - len(rest.lstrip(bytes(range(0x80, 0xC0))))   # 10xxxxxx: inside one

    def blocks(stream, at, end):
        while at < end:
            stop = min(edge(stream, at + PIECE), end)
            stream.seek(at)
            try:
                yield stream.read(stop - at).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{stream.name}: not UTF-8 at byte {at + error.start}") from None
            at = stop

    for path, begin, end in files:
        with open(path, "rb") as stream:
            begin = at = edge(stream, begin)
            texts = blocks(stream, begin, edge(stream, end))
            for text in texts if path.endswith(".jsonl") else pieces(texts):
                yield path, at, at == begin, text
                at += len(text.encode())


def read_rows(path, at, begins, text):
    """A slice -> (whether a document begins here, its text or its conversations)"""
    if not path.endswith(".jsonl"):
        yield begins, text
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
            if not isinstance(row, dict) or not isinstance(row.get("text", ""), str):
                raise ValueError('not an object, or its "text" is not a string')
            row = row["text"] if "text" in row else conversations(row)
        except (ValueError, RecursionError) as error:
            with open(path, "rb") as stream:
                number += stream.read(at).count(b"\n")
            raise ValueError(f"{path}, line {number}: {error}") from None
        if line.strip():
            yield True, row


def texts_of(row) -> list[str]:
    """All text in a row of read_rows(), be it a text or conversations."""
    if isinstance(row, str):
        return [row]
    return [text for messages, _ in row for message in messages
            for text in (message["role"] + "\n", message["content"])]


def count_slice(piece, pattern):
    """The work of one process for train: a slice -> the counts of its chunks."""
    return count_chunks((text for _, row in read_rows(*piece) for text in texts_of(row)), pattern)


def encode_slice(piece, tokenizer):
    """... for encode: -> numbers of bytes, documents and rows of each kind; ids, mask, lengths"""
    numbers, ids, mask, lengths = Counter(), [[]], [], []
    path, at, _, text = piece
    if at < PIECE:                            # what gzip needs for it, to compare a model with
        numbers["gzip_in"] = len(text.encode("utf-8", "replace"))
        numbers["gzip_out"] = len(zlib.compress(text.encode("utf-8", "replace")))
    for begins, row in read_rows(*piece):
        numbers["bytes"] += sum(len(text.encode("utf-8", "replace")) for text in texts_of(row))
        numbers["documents"] += begins
        if isinstance(row, str):
            numbers["text"] += 1
            if begins:                        # so that the first token, too, is predicted from one
                ids.append([tokenizer.special_tokens[tokenizer.divider]])
            ids.append(tokenizer.encode_array(row))
            continue
        numbers[("chats", "pairs")[len(row) - 1]] += 1
        for messages, first_trained in row:
            chat_ids, chat_mask = encode_chat(tokenizer, messages, first_trained)
            ids.append(chat_ids)
            mask += chat_mask
            lengths.append(len(chat_ids))
    ids = np.concatenate([np.asarray(some, tokenizer.dtype) for some in ids])
    return numbers, ids, np.array(mask, np.uint8), np.array(lengths, np.int64)


def share(value):
    """Begins a process: what all its work needs is sent once, and Ctrl-C is left to the parent."""
    global shared
    shared = value
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def call(function, piece):
    """What a process is asked to do: the work on one slice, with what it was sent at first."""
    return function(piece, shared)


def parallel(function, names, part, value, verb):
    """function(slice, value) for every slice of the files, in order, on all cores, with one live
    line on stderr if it takes a while; only a few slices are in memory."""
    files = find_files(names, part)
    total = sum(end - begin for _, begin, end in files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores, 1 + total // PIECE)
    work, began, done, line = slices(files), time.monotonic(), 0, ""
    interrupts = []                           # raised while a process is forked, it would be lost
    usual = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        with ProcessPoolExecutor(cores, initializer=share, initargs=(value,)) as pool:
            while not interrupts and (some := list(itertools.islice(work, 4 * cores))):
                results = pool.map(call, itertools.repeat(function), some)
                for (*_, text), result in zip(some, results):
                    if interrupts:
                        break
                    yield result
                    done += len(text.encode())
                    seconds = time.monotonic() - began
                    if seconds > 1 and sys.stderr.isatty():
                        line = (f"{verb} {done / 1e6:.0f} of {total / 1e6:.0f} MB, "
                                f"{seconds * max(0, total / done - 1):.0f} s left")
                        print(f"\r{line:60}", end="", file=sys.stderr, flush=True)
            pool.shutdown(cancel_futures=True)
        if interrupts:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, usual)
        print("\r" + " " * 60 + "\r" if line else "", end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- command line

def train_command(args):
    """Count the chunks of all files, learn from the counts, write the tokenizer."""
    counts = Counter()
    for some in parallel(count_slice, args.files, args.part, PATTERNS[args.pattern], "counted"):
        counts.update(some)
    special = (DIVIDERS[0], *CHAT_TOKENS)
    tokenizer = Tokenizer.train(counts, args.vocab_size, special, args.pattern)
    tokenizer.save(args.out)
    longest = max(tokenizer.id_of, key=len).decode(errors="replace")
    print(f"{args.out}: {len(tokenizer):,} tokens, the longest {longest!r}")


def encode_command(args):
    """Text -> .npy: the ids in a row, mapped into memory by np.load(path, mmap_mode="r").

    Chats -> .npz: ids and mask (1: learn this token) in a row, chat i at offsets[i]:offsets[i + 1].
    Of pairs, chat 2i is the chosen and chat 2i + 1 the rejected one; mask leaves their prompt out.
    Beside it a .json: the tokenizer's sha256, and the counts that bits per byte need.
    """
    tokenizer = Tokenizer.load(args.tokenizer)
    with open(tokenizer_file(args.tokenizer), "rb") as file:
        fingerprint = hashlib.sha256(file.read()).hexdigest()
    if not tokenizer.divider:
        raise ValueError(f"{args.tokenizer}: no {' or '.join(DIVIDERS)} to put between documents")
    numbers, parts = Counter(), []
    sidecar, digest = args.out + ".json", hashlib.sha256()
    with whole_file(args.out) as file:
        file.seek(128)                        # the header is written when all is known
        for some, *arrays in parallel(encode_slice, args.files, args.part, tokenizer, "encoded"):
            numbers.update(some)
            kinds = sorted({"text", "chats", "pairs"} & numbers.keys())
            ending = ".npy" if kinds == ["text"] else ".npz"
            if len(kinds) > 1 or not args.out.endswith(ending):
                raise ValueError(f"--out {args.out}: {' and '.join(kinds)} in these files, "
                                 "but text goes to one .npy, and chats, or pairs, to one .npz")
            numbers["tokens"] += len(arrays[0])
            for array in arrays:
                digest.update(array)
            if ending == ".npy":
                file.write(arrays[0])
            else:
                parts.append(arrays)          # chats wait in memory: 5 bytes a token at most
        if not numbers["tokens"]:
            raise ValueError(f"{' '.join(args.files)}: no text in part {args.part}")
        file.seek(0)
        if parts:
            ids, mask, lengths = map(np.concatenate, zip(*parts))
            np.savez(file, ids=ids, mask=mask, offsets=np.cumsum(np.append(0, lengths)))
        else:
            header = {"descr": tokenizer.dtype.str, "fortran_order": False,
                      "shape": (numbers["tokens"],)}
            file.write(b"\x93NUMPY\x01\x00\x76\x00" + f"{header}".ljust(117).encode() + b"\n")
        with contextlib.suppress(FileNotFoundError):
            os.remove(sidecar)                               # no old one beside a new file
    write_json(sidecar, {"tokenizer": fingerprint, "vocab_size": len(tokenizer), "kind": kinds[0],
                         "digest": digest.hexdigest(),
                         "gzip_bpb": 8 * numbers["gzip_out"] / max(1, numbers["gzip_in"]),
                         **{key: numbers[key] for key in ("tokens", "bytes", "documents")}})
    print(f"{args.out}: {numbers['tokens']:,} tokens of "
          f"{numbers['bytes'] / numbers['tokens']:.2f} bytes on average")


def chat_command(args):
    """Make a model's tokenizer ready for chats: <|im_start|> and <|im_end|>, where it lacks them,
    with the ids that follow its own; the template; and what ends a reply."""
    folder = args.tokenizer
    with open(tokenizer_file(folder), encoding="utf-8") as file:
        tokenizer = json.load(file)
    config = os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(config):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
    else:
        config = {}
    known = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = known | {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name in CHAT_TOKENS:
        if name not in ids:
            ids[name] = 1 + max([*tokenizer["model"]["vocab"].values(), *ids.values()])
            tokenizer["added_tokens"].append({"id": ids[name], "content": name, "special": True}
                                             | flags)
    write_json(os.path.join(args.out, "tokenizer.json"), tokenizer)
    write_json(os.path.join(args.out, "tokenizer_config.json"), config | {
        "chat_template": CHAT_TEMPLATE, "eos_token": CHAT_TOKENS[1]})
    write_json(os.path.join(args.out, "generation_config.json"), {
        "bos_token_id": ids.get(DIVIDERS[0], ids[CHAT_TOKENS[0]]),
        "eos_token_id": ids[CHAT_TOKENS[1]]})
    print(f"{args.out}: {len(ids) - len(known)} new tokens for chats")


def show_command(args):
    """Text in tokens of two colours by turns; of chats, the tokens to learn in green."""
    tokenizer = Tokenizer.load(args.tokenizer)
    for name in args.files:
        rows = [(True, name)]
        if os.path.exists(name):
            rows = (row for piece in slices(find_files([name])) for row in read_rows(*piece))
        for _, row in rows:
            if isinstance(row, str):
                ids = tokenizer.encode(row)
                coloured = [zip(ids, itertools.cycle(["30;104", "30;47"]))]
            else:
                chats = (encode_chat(tokenizer, *chat) for chat in row)
                coloured = [zip(ids, ("92" if m else "90" for m in mask)) for ids, mask in chats]
            for tokens in coloured:
                for i, colour in tokens:                     # an ANSI colour of background or text
                    text = tokenizer.vocab[i].decode("utf-8", errors="backslashreplace")
                    print(f"\033[{colour}m" + text.replace("\n", "↵\033[0m\n"), end="\033[0m")
                print()


class Parser(argparse.ArgumentParser):
    def error(self, message):                 # argparse itself would print its whole usage before
        raise ValueError(f"{message}; see --help")


def main():
    parser = Parser(prog="bpe.py", description="byte-level BPE tokenizer")
    commands = parser.add_subparsers(required=True, metavar="train|encode|show|chat")
    train = commands.add_parser("train", help="learn a tokenizer from text")
    encode = commands.add_parser("encode", help="text to a file of token ids")
    show = commands.add_parser("show", help="text cut into coloured tokens")
    for command, function in (train, train_command), (encode, encode_command), (show, show_command):
        command.set_defaults(function=function)
        command.add_argument("files", nargs="+", metavar="FILE", help="a .txt or .jsonl, a folder "
                             "of them, - for standard input; for show, also the text itself")
    train.add_argument("--vocab_size", type=int, required=True,
                       help="number of tokens; more: shorter encodings, larger embeddings")
    train.add_argument("--pattern", default="llama3", choices=PATTERNS,
                       help="how text is split before merging (default %(default)s)")
    chat = commands.add_parser("chat", help="make a tokenizer ready for chats")
    chat.set_defaults(function=chat_command, files=[])
    chat.add_argument("--out", required=True, help="directory for the new one")
    for command in encode, show, chat:
        command.add_argument("--tokenizer", required=True, metavar="DIR",
                             help="directory with a tokenizer.json, or such a file")
    for command, what in (train, "directory for tokenizer.json"), (encode, ".npy; for chats .npz"):
        command.add_argument("--out", required=True, help=what)
        command.add_argument("--part", default="0:1", metavar="A:B",
                             help="only the text from fraction A to B (default %(default)s, all)")
    try:
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as folder:
            if "-" in args.files:             # into a file: then it is read like any other
                json_lines = sys.stdin.buffer.peek(1)[:1] == b"{"
                path = os.path.join(folder, "standard input" + (".jsonl" if json_lines else ".txt"))
                with open(path, "wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
                args.files = [path if name == "-" else name for name in args.files]
            args.function(args)
    except KeyboardInterrupt:
        print("\nbpe.py: interrupted, nothing written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        where = getattr(error, "filename", None)
        print(f"bpe.py: {f'{where}: {error.strerror}' if where else error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

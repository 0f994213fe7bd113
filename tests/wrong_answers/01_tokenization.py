"""Plausible mistakes in the assignment of chapter 01: {grade_id of a task: [cell, ...]}."""

SPLIT = """
def split(text):
    return regex.findall(r"{pattern}", text)
"""

COUNT = """
def count_pairs(words):
    counts = Counter()
    for ids, n in words.items():
        for pair in pairwise(ids):
            counts[pair] += {weight}
    return dict(counts)
"""

MERGE = """
def merge(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        if ids[i : i + 2] == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return tuple(out)
"""

TRAIN = """
def train(pieces, n_merges):
    words = {{{start}: n for p, n in Counter(pieces).items()}}
    merges = []
    while len(merges) < n_merges:
        counts = pair_counts(words)
        if not counts:
            break
        best = {best}
        merges.append(best)
        words = {{merge_pair(word, best): n for word, n in words.items()}}
    return merges
"""
BYTES = "tuple(bytes([b]) for b in p.encode())"
GREATEST = "max(counts, key=lambda pair: (counts[pair], pair))"

FALLBACK = """
def bug_in_encode():
    return {character!r}


def bug_in_decode():
    return {tokens!r}


def fallback_encode(text, vocab):
    tokens = []
    for char in text:
        if char in vocab:
            tokens.append(char)
        else:
            tokens.extend({spelled})
    return tokens


def fallback_decode(tokens):
    data = b""
    for token in tokens:
        if {is_byte}:
            data += bytes([int(token[3:5], 16)])
        else:
            data += token.encode()
    return data.decode("utf-8", errors={errors!r})
"""
RIGHT = {
    "character": "é",
    "tokens": ["<0xC3>", "<0xA9>"],
    "spelled": 'f"<0x{byte:02X}>" for byte in char.encode()',
    "is_byte": 'len(token) == 6 and token.startswith("<0x")',
    "errors": "replace",
}

FERTILITY = """
def fertility(encode, texts):
    words = sum(len(text.split()) for text in texts)
    if words == 0:
        raise ValueError("no words")
    return {fertility}


def premium(encode, parallel, base):
    {guard}
    tokens = {{name: sum(len(encode(t)) for t in texts) for name, texts in parallel.items()}}
    return {premium}
"""
GUARD = 'if len(set(map(len, parallel.values()))) != 1: raise ValueError("not parallel")'
RATIO = "sum(len(encode(text)) for text in texts) / words"
PREMIUM = "{name: n / tokens[base] for name, n in tokens.items()}"

WRONG = {
    "t1_split": [
        # white space is dropped
        "def split(text):\n    return text.split()\n",
        # numbers of any length
        SPLIT.format(pattern=r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        # letters of ASCII only
        SPLIT.format(pattern=r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"),
        # the run of white space takes the space that belongs to the next word
        SPLIT.format(pattern=r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"),
        # any white space goes with a word, not only a space
        SPLIT.format(pattern=r"\s?\p{L}+|\s?\p{N}{1,3}|\s?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    ],
    "t2_pairs": [
        # a word counts once, however often it occurs
        COUNT.format(weight="1") + MERGE,
        # overlapping occurrences are merged twice
        COUNT.format(weight="n")
        + """
def merge(ids, pair, new_id):
    out = []
    for a, b in zip(ids, ids[1:]):
        out.append(new_id if (a, b) == pair else a)
    return tuple(out)
""",
        # stops after the first occurrence
        COUNT.format(weight="n")
        + """
def merge(ids, pair, new_id):
    for i in range(len(ids) - 1):
        if ids[i : i + 2] == pair:
            return ids[:i] + (new_id,) + ids[i + 2 :]
    return ids
""",
        # the end of one word and the start of the next are no neighbors
        """
def count_pairs(words):
    corpus = [i for ids, n in words.items() for i in ids * n]
    return dict(Counter(pairwise(corpus)))
"""
        + MERGE,
    ],
    "t3_train": [
        # ties go to the pair seen first
        TRAIN.format(start=BYTES, best="max(counts, key=counts.get)"),
        # ties go to the smallest pair
        TRAIN.format(start=BYTES, best="min(counts, key=lambda pair: (-counts[pair], pair))"),
        # ties are broken by the joined string instead of the pair
        TRAIN.format(
            start=BYTES, best="max(counts, key=lambda pair: (counts[pair], pair[0] + pair[1]))"
        ),
        # starts from characters
        TRAIN.format(start="tuple(c.encode() for c in p)", best=GREATEST),
        # counts are never refreshed
        """
def train(pieces, n_merges):
    words = {tuple(bytes([b]) for b in p.encode()): n for p, n in Counter(pieces).items()}
    counts = pair_counts(words)
    return sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)[:n_merges]
""",
    ],
    "t4_encode": [
        # the longest known string first
        """
def encode_piece(piece, merges, ids):
    data, out = piece.encode(), []
    while data:
        n = next(n for n in range(len(data), 0, -1) if data[:n] in ids)
        out.append(ids[data[:n]])
        data = data[n:]
    return out
""",
        # the leftmost pair that can be merged, whatever its rank
        """
def encode_piece(piece, merges, ids):
    known = set(merges)
    symbols = [bytes([b]) for b in piece.encode()]
    i = 0
    while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) in known:
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            i = 0
        else:
            i += 1
    return [ids[symbol] for symbol in symbols]
""",
        # characters instead of bytes: no id for é
        """
def encode_piece(piece, merges, ids):
    symbols = tuple(c.encode() for c in piece)
    for pair in merges:
        symbols = merge_pair(symbols, pair)
    return [ids.get(symbol, 0) for symbol in symbols]
""",
        # the latest merge first
        """
def encode_piece(piece, merges, ids):
    symbols = tuple(bytes([b]) for b in piece.encode())
    for pair in reversed(merges):
        symbols = merge_pair(symbols, pair)
    return [ids[symbol] for symbol in symbols]
""",
    ],
    "t5_fallback": [
        # shipped as it was, and the wrong culprit
        FALLBACK.format(
            **{**RIGHT, "character": "低", "spelled": '[f"<0x{ord(char) % 256:02X}>"]'}
        ),
        # the bugs are found but the encoder still takes code points below 256 for bytes
        FALLBACK.format(
            **{
                **RIGHT,
                "spelled": '[f"<0x{ord(char):02X}>"] if ord(char) < 256 '
                'else [f"<0x{b:02X}>" for b in char.encode()]',
            }
        ),
        # hexadecimal digits in lower case
        FALLBACK.format(**{**RIGHT, "spelled": 'f"<0x{byte:02x}>" for byte in char.encode()'}),
        # an ordinary "<" is taken for the start of a byte token
        FALLBACK.format(**{**RIGHT, "is_byte": 'token.startswith("<")'}),
        # invalid bytes vanish
        FALLBACK.format(**{**RIGHT, "errors": "ignore"}),
        # a half character is not a character
        FALLBACK.format(**{**RIGHT, "tokens": ["<0xC3>"]}),
    ],
    "t6_fertility": [
        # the mean of the texts' own ratios
        FERTILITY.format(
            fertility="sum(len(encode(t)) / max(1, len(t.split())) for t in texts) / len(texts)",
            guard=GUARD,
            premium=PREMIUM,
        ),
        # words by single spaces: an empty text has one
        """
def fertility(encode, texts):
    words = sum(len(text.split(" ")) for text in texts)
    return sum(len(encode(text)) for text in texts) / words
"""
        + FERTILITY.format(fertility=RATIO, guard=GUARD, premium=PREMIUM).partition("\n\n\n")[2],
        # nothing stops a comparison of texts that are not parallel
        FERTILITY.format(fertility=RATIO, guard="pass", premium=PREMIUM),
        # a mean of ratios between languages
        FERTILITY.format(
            fertility=RATIO,
            guard=GUARD,
            premium="{name: sum(len(encode(t)) / len(encode(b)) for t, b in "
            "zip(texts, parallel[base])) / len(texts) for name, texts in parallel.items()}",
        ),
        # upside down
        FERTILITY.format(
            fertility=RATIO,
            guard=GUARD,
            premium="{name: tokens[base] / n for name, n in tokens.items()}",
        ),
    ],
}

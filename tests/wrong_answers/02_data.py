"""Planted wrong answers for chapter 02's assignment: each must lose points in its task."""

MINHASH_RIGHT = """
def signature(members, a, b):
    if len(members) == 0:
        return np.full(len(a), PRIME)
    return ((a[:, None] * members[None, :] + b[:, None]) % PRIME).min(axis=1)
"""
SIMILARITY_RIGHT = """
def similarity(first, second):
    return float(np.mean(first == second))
"""
PAIRS_RIGHT = """
def candidate_pairs(signatures, bands):
    if signatures.shape[1] % bands:
        raise ValueError(f"{signatures.shape[1]} entries, {bands} bands")
    pairs = set()
    for band in np.split(signatures, bands, axis=1):
        buckets = {}
        for document, rows in enumerate(band.tolist()):
            buckets.setdefault(tuple(rows), []).append(document)
        for bucket in buckets.values():
            pairs.update(itertools.combinations(bucket, 2))
    return pairs
"""
RECALL_RIGHT = """
def recall(s, bands, rows):
    return 1 - (1 - s**rows) ** bands
"""
RATES_RIGHT = """
def rates(sizes, cap=None, temperature=1.0):
    if (cap is not None and cap <= 0) or temperature <= 0:
        raise ValueError(f"cap={cap}, temperature={temperature}")
    roots = {n: min(e, cap or e) ** (1 / temperature) for n, e in sizes.items()}
    return {n: root / sum(roots.values()) for n, root in roots.items()}
"""
PICK_RIGHT = """
def pick(rates, u):
    reached = 0.0
    for name, rate in rates.items():
        reached += rate
        if u < reached:
            return name
    return [name for name, rate in rates.items() if rate > 0][-1]
"""
PACK = """
def pack_rows(documents, seq_len, eos):
    flat = [token for document in documents for token in [*document, eos]]
    ids = [i for i, document in enumerate(documents) for _ in range(len(document) + 1)]
    rows = -(-len(flat) // seq_len)
    fill = rows * seq_len + 1 - len(flat)
    flat = np.array(flat + [eos] * fill, dtype=np.int64)
    ids = np.array(ids + [-1] * fill)
    mask = {mask}
    return tuple(part.reshape(rows, seq_len) for part in (flat[:-1], flat[1:], mask))
"""
LOADER = """
class Loader:
    def __init__(self, n_items, batch, seed):
        self.n_items, self.batch, self.seed = n_items, batch, seed
        self.drawn = 0
        {init}

    def __iter__(self):
        return self

    def order(self, epoch):
        return {order}

    def __next__(self):
        items = []
        while len(items) < self.batch:
            epoch, place = divmod(self.drawn, self.n_items)
            taken = self.order(epoch)[place : place + self.batch - len(items)].tolist()
            items += taken
            self.drawn += len(taken)
        return items

    def state_dict(self):
        return {state}

    def load_state_dict(self, state):
        {check}
        {load}
"""
LOADER_PARTS = {
    "init": "pass",
    "order": "np.random.default_rng([self.seed, epoch]).permutation(self.n_items)",
    "state": '{"seed": self.seed, "n_items": self.n_items, "drawn": self.drawn}',
    "check": 'if (state["seed"], state["n_items"]) != (self.seed, self.n_items): raise ValueError',
    "load": 'self.drawn = state["drawn"]',
}


def loader(**parts):
    source = LOADER
    for name, text in {**LOADER_PARTS, **parts}.items():
        source = source.replace("{" + name + "}", text)
    return source


WRONG = {
    "t1_minhash": [
        # the minimum over the hash functions instead of over the set
        MINHASH_RIGHT.replace("axis=1", "axis=0") + SIMILARITY_RIGHT,
        # no modulus: h_i is then no hash function, all minima come from the smallest member
        MINHASH_RIGHT.replace(" % PRIME", "") + SIMILARITY_RIGHT,
        # 0 for the empty set wins every minimum
        MINHASH_RIGHT.replace("np.full(len(a), PRIME)", "np.zeros(len(a), dtype=np.int64)")
        + SIMILARITY_RIGHT,
        # compares the signatures as sets: values of different hash functions are mixed up
        MINHASH_RIGHT
        + """
def similarity(first, second):
    first, second = set(first.tolist()), set(second.tolist())
    return len(first & second) / len(first | second)
""",
        # made to fit the visible examples
        """
def signature(members, a, b):
    if len(members) == 0:
        return np.array([PRIME] * len(a))
    if len(a) == 1:
        return np.array([2])
    if a[0] == 3:
        return np.array([{(4, 9): 15, (2, 9): 9, (4, 9, 2): 9}[tuple(members.tolist())],
                         min(members)])
    return np.array([5, 13])
"""
        + SIMILARITY_RIGHT,
    ],
    "t2_lsh": [
        # one dictionary for all bands: band 0 of one document meets band 1 of another
        PAIRS_RIGHT.replace("        buckets = {}\n", "").replace(
            "    pairs = set()\n", "    pairs = set()\n    buckets = {}\n"
        )
        + RECALL_RIGHT,
        # any equal entry makes a candidate
        """
def candidate_pairs(signatures, bands):
    if signatures.shape[1] % bands:
        raise ValueError
    n = len(signatures)
    return {(i, j) for i in range(n) for j in range(i + 1, n)
            if (signatures[i] == signatures[j]).any()}
"""
        + RECALL_RIGHT,
        # only neighbors in a bucket are paired
        PAIRS_RIGHT.replace("itertools.combinations(bucket, 2)", "itertools.pairwise(bucket)")
        + RECALL_RIGHT,
        # rows and bands changed places
        PAIRS_RIGHT + RECALL_RIGHT.replace("s**rows) ** bands", "s**bands) ** rows"),
        # bands that do not fit are accepted
        PAIRS_RIGHT.replace("signatures.shape[1] % bands", "False").replace(
            "np.split", "np.array_split"
        )
        + RECALL_RIGHT,
    ],
    "t3_pack": [
        # asks the model to guess how the next document begins
        PACK.replace("{mask}", "ids[1:] >= 0"),
        # does not teach the model to end: the end marker is masked
        PACK.replace("{mask}", "(ids[:-1] == ids[1:]) & (flat[1:] != eos)"),
        # counts the filling of the last row
        PACK.replace("{mask}", "ids[:-1] == ids[1:]"),
        # drops the last row when it is not full
        PACK.replace("{mask}", "(ids[:-1] == ids[1:]) & (ids[:-1] >= 0)").replace(
            "rows = -(-len(flat) // seq_len)\n",
            "rows = len(flat) // seq_len\n    flat, ids = flat[:rows * seq_len], ids[:rows * seq_len]\n",
        ),
        # shifts inside each row: the last target of a row is lost
        PACK.replace("{mask}", "(ids[:-1] == ids[1:]) & (ids[:-1] >= 0)").replace(
            "    return tuple(part.reshape(rows, seq_len) for part in (flat[:-1], flat[1:], mask))",
            """    tokens, mask = flat[:-1].reshape(rows, seq_len), mask.reshape(rows, seq_len)
    targets = np.concatenate([tokens[:, 1:], np.full((rows, 1), eos)], axis=1)
    return tokens, targets, mask""",
        ),
    ],
    "t4_mixture": [
        # caps the shares of the sum without the cap: they no longer sum to 1
        RATES_RIGHT.replace("sum(roots.values())", "sum(sizes.values())") + PICK_RIGHT,
        # the power T instead of 1/T: larger temperatures make the mixture less even
        RATES_RIGHT.replace("1 / temperature", "temperature") + PICK_RIGHT,
        # the root before the cap
        RATES_RIGHT.replace(
            "min(e, cap or e) ** (1 / temperature)", "min(e ** (1 / temperature), cap or e)"
        )
        + PICK_RIGHT,
        # an interval that contains its upper end
        RATES_RIGHT + PICK_RIGHT.replace("u < reached", "u <= reached"),
        # the last name, even if its rate is 0
        RATES_RIGHT
        + PICK_RIGHT.replace("[name for name, rate in rates.items() if rate > 0]", "list(rates)"),
        # the most likely source every time
        RATES_RIGHT + "\n\ndef pick(rates, u):\n    return max(rates, key=rates.get)\n",
    ],
    "t5_loader": [
        # the same order in every epoch
        loader(order="np.random.default_rng(self.seed).permutation(self.n_items)"),
        # one generator for all epochs, which no state holds: a resumed run sees other orders
        loader(
            init="self.rng, self.orders = np.random.default_rng(seed), {}",
            order="self.orders.setdefault(epoch, self.rng.permutation(self.n_items))",
        ),
        # every run its own order: unrepeatable
        loader(
            init="self.salt = int(np.random.default_rng().integers(2**31))",
            order="np.random.default_rng([self.salt, self.seed, epoch]).permutation(self.n_items)",
        ),
        # goes on at the beginning of the epoch
        loader(load='self.drawn = state["drawn"] // self.n_items * self.n_items'),
        # skips a batch
        loader(load='self.drawn = state["drawn"] + self.batch'),
        # hands out its own state, which goes on changing: nothing is saved
        loader(state="self.__dict__"),
        # takes any state
        loader(check="pass"),
        # the end of an epoch that does not fill a batch is dropped
        loader().replace(
            "epoch, place = divmod(self.drawn, self.n_items)",
            "epoch, place = divmod(self.drawn, self.n_items - self.n_items % self.batch)",
        ),
    ],
}

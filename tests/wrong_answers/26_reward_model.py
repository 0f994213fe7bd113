"""Planted wrong answers for chapter 26's assignment: each must lose points in its task."""

RANKING = """
def ranking_loss(scores):
    k = scores.shape[1]
    if k < 2:
        raise ValueError("k")
    i, j = torch.triu_indices(k, k, 1)
    return {loss}


def ranking_accuracy(scores):
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    better = scores[:, i] - scores[:, j]
    return {accuracy}
"""
RIGHT = {
    "loss": "-torch.nn.functional.logsigmoid(scores[:, i] - scores[:, j]).mean()",
    "accuracy": "((better > 0).double() + (better == 0).double() / 2).mean().item()",
}

HEAD = """
def read_scores(hidden, real, weight, bias):
    return {read}


def normalization(scores):
    if len(scores) < 2 or {refuse}:
        raise ValueError("scores")
    return scores.mean().item(), scores.std({how}).item()
"""
READ = {
    "read": "hidden[torch.arange(len(hidden)), real.sum(-1) - 1] @ weight + bias",
    "refuse": "not scores.isfinite().all() or (scores == scores[0]).all()",
    "how": "correction=0",
}

ELO = """
def expected(difference):
    {expected}


def elo(games, players, k=16.0, start=1000.0):
    ratings = [start] * players
    for i, j, points in games:
        if i == j or {refuse} or not 0 <= points <= 1:
            raise ValueError("game")
        {move}
    return ratings
"""
RATE = {
    "expected": "return 1 / (1 + 10 ** min(-difference / 400, 300.0))",
    "refuse": "not (0 <= i < players and 0 <= j < players)",
    "move": """moved = k * (points - expected(ratings[i] - ratings[j]))
        ratings[i] += moved
        ratings[j] -= moved""",
}
ONE_BY_ONE = """ratings[i] += k * (points - expected(ratings[i] - ratings[j]))
        ratings[j] += k * (1 - points - expected(ratings[j] - ratings[i]))"""

BEST = """
def best_of_n(p, scores, n):
    upto = ((scores <= scores[:, None]) * p).sum(-1)
    below = ((scores < scores[:, None]) * p).sum(-1)
    return {best}


def kl_from(q, p):
    return {kl}


def expected_best(proxy, wanted, n):
    count = len(proxy)
    share = [{share} for i in range(count)]
    ranked = wanted[proxy.argsort()].tolist()
    return sum(w * x for w, x in zip(share, ranked))
"""
TOP = {
    "best": "p / (upto - below) * (upto**n - below**n)",
    "kl": "torch.where(q > 0, q * (q.clamp(min=1e-300) / p).log(), 0.0).sum().item()",
    "share": "math.comb(i, n - 1) / math.comb(count, n)",
}

QUESTIONS = """
def ranked(answers, weights):
    points = [{points} for row in answers.tolist()]
    kept = []
    for i in sorted(range(len(points)), key=lambda i: -points[i]):
        if {keep}:
            kept.append(i)
    return kept if {enough} else []


def blind_pairs(answers, weights, true):
    points = [sum(w for w, yes in zip(weights, row) if yes) for row in answers.tolist()]
    pairs = [(i, j) for i, j in itertools.combinations(range(len(true)), 2){differ}]
    equal = [abs(points[i] - points[j]) < 1e-9 for i, j in pairs]
    return sum(equal) / len(equal) if equal else 0.0
"""
ASK = {
    "points": "round(sum(w for w, yes in zip(weights, row) if yes), 9)",
    "keep": "not kept or points[i] != points[kept[-1]]",
    "enough": "len(kept) > 1",
    "differ": " if true[i] != true[j]",
}


def plant(template: str, right: dict[str, str], **wrong: str) -> str:
    """The right answer with one thing replaced."""
    return template.format(**(right | wrong))


WRONG = {
    "t1_ranking": [
        # log of a sigmoid that underflows: infinite where a pair is surely wrong
        plant(RANKING, RIGHT, loss="-(scores[:, i] - scores[:, j]).sigmoid().log().mean()"),
        # only neighbors in the ranking are compared
        plant(
            RANKING,
            RIGHT,
            loss="-torch.nn.functional.logsigmoid(scores[:, :-1] - scores[:, 1:]).mean()",
        ),
        # worst first
        plant(
            RANKING,
            RIGHT,
            loss="-torch.nn.functional.logsigmoid(scores[:, j] - scores[:, i]).mean()",
        ),
        # the sum over a row's pairs, so that a ranking of four counts six times
        plant(RANKING, RIGHT, loss=f"{RIGHT['loss']} * k * (k - 1) / 2"),
        # a tie is taken as wrong
        plant(RANKING, RIGHT, accuracy="(better > 0).double().mean().item()"),
    ],
    "t2_head": [
        # the last column, which is filling in all rows but the longest
        plant(HEAD, READ, read="hidden[:, -1] @ weight + bias"),
        # the token behind the last one (or the first, by a wrong index)
        plant(
            HEAD,
            READ,
            read="hidden[torch.arange(len(hidden)), real.sum(-1) % real.shape[1]] @ weight + bias",
        ),
        # the mean over the text instead of its last token
        plant(
            HEAD,
            READ,
            read="((hidden * real[..., None]).sum(1) / real.sum(-1, keepdim=True)) @ weight + bias",
        ),
        # the sample's variance
        plant(HEAD, READ, how=""),
        # NaN goes through
        plant(HEAD, READ, refuse="(scores == scores[0]).all()"),
    ],
    "t3_elo": [
        # the second rating moves by what the first has become
        plant(ELO, RATE, move=ONE_BY_ONE),
        # base e instead of 10
        plant(ELO, RATE, expected="return 1 / (1 + math.exp(min(-difference / 400, 300.0)))"),
        # a difference of a million overflows
        plant(ELO, RATE, expected="return 1 / (1 + 10 ** (-difference / 400))"),
        # player -1 is the last one
        plant(ELO, RATE, refuse="not (i < players and j < players)"),
    ],
    "t4_best": [
        # the probability that at least one draw is this one, scaled to a sum of 1
        plant(BEST, TOP, best="(1 - (1 - p) ** n) / (1 - (1 - p) ** n).sum()"),
        # responses of equal score do not share
        plant(BEST, TOP, best="upto**n - below**n"),
        # the other direction
        plant(BEST, TOP, kl="(p * (p / q.clamp(min=1e-300)).log()).sum().item()"),
        # 0 log 0 is NaN
        plant(BEST, TOP, kl="(q * (q / p).log()).sum().item()"),
        # draws that are put back
        plant(BEST, TOP, share="((i + 1) / count) ** n - (i / count) ** n"),
    ],
    "t5_questions": [
        # rounding errors decide
        plant(QUESTIONS, ASK, points="sum(w for w, yes in zip(weights, row) if yes)"),
        # ties are ranked, by their numbers
        plant(QUESTIONS, ASK, keep="True"),
        # a single response is a ranking
        plant(QUESTIONS, ASK, enough="kept"),
        # all pairs, also those that are worth the same
        plant(QUESTIONS, ASK, differ=""),
    ],
}

"""Planted wrong answers for chapter 25's assignment: each must lose points in its task."""

CHAIN = """
def chain(a, b):
    width = {width}
    lines, carry = [], 0
    for x, y in {columns}:
        {before}
        total = int(x) + int(y) + carry
        {step}
        lines.append(f"{{x}}+{{y}}+{shown}={{total}} write {{total % 10}} carry {{total // 10}}")
        carry = total // 10
    {after}
    return "\\n".join([*lines, f"The answer is {{a + b}}."])


def prompt(shown, question):
    pieces = [f"Q: {{asked}}\\nA: {{steps}}" for asked, steps in shown{unless}]
    return "{between}".join([*pieces, f"Q: {{question}}\\nA:{end}"])
"""
ADD = {
    "width": "max(len(str(a)), len(str(b)))",
    "columns": "zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)))",
    "before": "",
    "step": "",
    "shown": "{carry}",
    "after": "",
    "unless": " if asked != question",
    "between": "\\n\\n",
    "end": "",
}

FIND = """
def find_answer(text):
    body = {body}
    marks = list(re.finditer("the answer is", body, flags={flags}))
    numbers = re.findall(NUMBER, body[{mark}.end() :] if marks else body)
    {fallback}
    if not numbers:
        return None
    number = {which}
    {value}
"""
EXACT = """whole, _, fraction = number.lstrip("-").replace(",", "").partition(".")
    value = whole.lstrip("0") or "0"
    if fraction.rstrip("0"):
        value += "." + fraction.rstrip("0")
    return "-" + value if number.startswith("-") and {sign} else value"""
READ = {
    "body": 'text.partition("\\n\\nQ:")[0]',
    "flags": "re.IGNORECASE",
    "mark": "marks[-1]",
    "fallback": "",
    "which": "numbers[0] if marks else numbers[-1]",
    "value": EXACT.format(sign='value != "0"'),
}

VOTE = """
def vote(answers, weights=None):
    sums = {{}}
    for answer, weight in zip(answers, weights or [1] * len(answers)):
        {skip}
        sums[answer] = sums.get(answer, 0) + {weight}
    return {winner}


def self_consistent(generate, prompts, samples, find):
    {texts}
    answers = [find(text) for text in texts]
    return [vote({mine}) for i in range(len(prompts))]


def vote_chance(p, n):
    total = 0.0
    for sequence in itertools.product(range(len(p)), repeat=n):
        if {wins}:
            total += math.prod(p[i] for i in sequence)
    return total
"""
COUNT = {
    "skip": "if answer is None: continue",
    "weight": "weight",
    "winner": "max(sums, key=sums.get, default=None)",
    "texts": "texts = generate([p for p in prompts for _ in range(samples)])",
    "mine": "answers[i * samples : (i + 1) * samples]",
    "wins": "vote([str(i) for i in sequence]) == '0'",
}

PARTS = """
def split(question, size):
    {check}
    terms = question.split("+")
    found = ["+".join(terms[:size])]
    for start in range(size, len(terms), {stride}):
        found.append("+".join(["so far", *terms[start : start + {stride}]]))
    return found


def least_to_most(generate, questions, split_one, find):
    todo = [split_one(question) for question in questions]
    solved = [[] for _ in questions]
    lost = set()
    for i in range(max(map(len, todo), default=0)):
        going = [n for n in range(len(questions)) if i < len(todo[n]) and n not in lost]
        if not going:
            break
        prompts = []
        for n in going:
            before = [f"Q: {{part}}\\nA: The answer is {{answer}}." for part, answer in {seen}]
            prompts.append("\\n\\n".join([{head}*before, f"Q: {{todo[n][i]}}\\nA:"]))
        texts = {texts}
        for n, text in zip(going, texts):
            answer = find(text)
            if answer is None:
                {lose}
            else:
                solved[n].append((todo[n][i], answer))
    return [{result} for n in range(len(questions))]
"""
SOLVE = {
    "check": "if size < 2: raise ValueError('size')",
    "stride": "(size - 1)",
    "seen": "solved[n]",
    "head": "questions[n], ",
    "texts": "generate(prompts)",
    "lose": "lost.add(n)",
    "result": "None if n in lost else solved[n][-1][1]",
}

STAR = """
def verify(question, text):
    table = {table}
    *steps, last = text.strip().split("\\n")
    for step in steps:
        found = re.{match}(r"(\\d+)\\+(\\d+)=(\\d+)", step)
        if found is None:
            return False
        x, y, z = found.groups()
        for taken in (x, y):
            if taken not in table:
                return False
            table.{take}(taken)
        {add}
        table.{put}(z)
    return {empty}last == f"The answer is {{{said}}}."


def star_round(generate, problems, hint, find, verify=None):
    def right(prompts, asked):
        texts = {texts}
        return {{
            {kept}: text
            for (question, answer), text, prompt in zip(asked, texts, prompts)
            if {good}
        }}

    own = right([f"Q: {{question}}\\nA:" for question, _ in problems], problems)
    left = {left}
    hinted = right([hint(*each) for each in left], left) if {again} else {{}}
    {result}
"""
FILTER = {
    "table": 'question.split("+")',
    "match": "fullmatch",
    "take": "remove",
    "add": "if z != str(int(x) + int(y)): return False",
    "put": "append",
    "empty": "len(table) == 1 and ",
    "said": "table[0]",
    "texts": "generate(prompts)",
    "kept": "question",
    "good": "find(text) == answer and (verify is None or verify(question, text))",
    "left": "[each for each in problems if each[0] not in own]",
    "again": "hint is not None and left",
    "result": "return [*own.items(), *hinted.items()]",
}
WITH_HINT = 'prompt.removeprefix("Q: ").removesuffix("\\nA:")'
IN_ORDER = "return [(q, (own | hinted)[q]) for q, _ in problems if q in own or q in hinted]"

WRONG = {
    "t1_chain": [
        CHAIN.format(**ADD | {"columns": "zip(str(a).zfill(width), str(b).zfill(width))"}),
        CHAIN.format(**ADD | {"shown": "{total // 10}"}),
        CHAIN.format(
            **ADD
            | {
                "width": "min(len(str(a)), len(str(b)))",
                "columns": "zip(reversed(str(a)), reversed(str(b)))",
            }
        ),
        CHAIN.format(**ADD | {"after": "if carry: lines.append(f'0+0+1=1 write 1 carry 0')"}),
        CHAIN.format(**ADD | {"before": "carry = carry if len(lines) < 9 else 0"}),
        CHAIN.format(**ADD | {"unless": ""}),
        CHAIN.format(**ADD | {"end": " "}),
        CHAIN.format(**ADD | {"between": "\\n"}),
    ],
    "t2_find": [
        FIND.format(**READ | {"which": "numbers[-1]"}),
        FIND.format(**READ | {"mark": "marks[0]"}),
        FIND.format(**READ | {"body": "text"}),
        FIND.format(**READ | {"body": 'text.partition("\\n\\n")[0]'}),
        FIND.format(**READ | {"flags": "0"}),
        FIND.format(**READ | {"fallback": "numbers = numbers or re.findall(NUMBER, body)"}),
        FIND.format(**READ | {"value": EXACT.format(sign="True")}),
        FIND.format(**READ | {"value": 'return f"{float(number.replace(chr(44), str())):g}"'}),
        FIND.format(**READ | {"value": 'return number.replace(",", "")'}),
        FIND.format(**READ | {"value": 'return number.replace(",", "").strip("0")'}),
    ],
    "t3_vote": [
        VOTE.format(**COUNT | {"winner": "max(reversed(sums), key=sums.get, default=None)"}),
        VOTE.format(**COUNT | {"skip": ""}),
        VOTE.format(**COUNT | {"weight": "1"}),
        VOTE.format(**COUNT | {"winner": "max(sorted(sums), key=sums.get, default=None)"}),
        VOTE.format(**COUNT | {"texts": "texts = generate(prompts * samples)"}),
        VOTE.format(
            **COUNT
            | {
                "texts": "texts = generate([p for p in prompts for _ in range(samples)])"
                "; texts = [t for p in prompts for t in generate([p] * samples)]"
            }
        ),
        VOTE.format(
            **COUNT
            | {"texts": "texts = generate(prompts * samples)", "mine": "answers[i :: len(prompts)]"}
        ),
        VOTE.format(**COUNT | {"wins": "2 * sequence.count(0) > n"}),
        VOTE.format(
            **COUNT
            | {
                "wins": "all(sequence.count(0) > sequence.count(i) for i in sequence if i)"
                " and 0 in sequence"
            }
        ),
        VOTE.format(
            **COUNT | {"wins": "all(sequence.count(0) >= sequence.count(i) for i in sequence)"}
        ),
    ],
    "t4_parts": [
        PARTS.format(**SOLVE | {"stride": "size"}),
        PARTS.format(**SOLVE | {"seen": "solved[n][-1:]"}),
        PARTS.format(**SOLVE | {"check": "if size < 2: return [question]"}),
        PARTS.format(**SOLVE | {"head": ""}),
        PARTS.format(**SOLVE | {"texts": "[generate([prompt])[0] for prompt in prompts]"}),
        PARTS.format(
            **SOLVE | {"lose": "pass", "result": "solved[n][-1][1] if solved[n] else None"}
        ),
        PARTS.format(
            **SOLVE
            | {"lose": "solved[n].append((todo[n][i], answer))", "result": "solved[n][-1][1]"}
        ),
    ],
    "t5_verify": [
        STAR.format(**FILTER | {"add": "", "good": "find(text) == answer"}),
        STAR.format(
            **FILTER | {"table": 'set(question.split("+"))', "put": "add", "said": "min(table)"}
        ),
        STAR.format(**FILTER | {"take": "index"}),
        STAR.format(**FILTER | {"empty": "", "said": "table[-1]"}),
        STAR.format(**FILTER | {"match": "match"}),
        STAR.format(**FILTER | {"add": "if int(z) != int(x) + int(y): return False"}),
        STAR.format(**FILTER | {"kept": WITH_HINT}),
        STAR.format(**FILTER | {"left": "problems"}),
        STAR.format(**FILTER | {"again": "hint is not None"}),
        STAR.format(**FILTER | {"texts": "[generate([prompt])[0] for prompt in prompts]"}),
        STAR.format(**FILTER | {"result": IN_ORDER}),
    ],
}

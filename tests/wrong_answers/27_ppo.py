"""Planted wrong answers for chapter 27's assignment: each must lose points in its task."""

REWARDS = """
def token_rewards(score, logp, ref_logp, mask, beta):
    if {refuse}:
        raise ValueError("scores")
    rewards = ({penalty}).where({where}, 0.0)
    rewards[torch.arange(len(mask)), {place}] += score
    return rewards
"""
SHAPED = {
    "refuse": "not score.isfinite().all() or not mask.any(-1).all()",
    "penalty": "-beta * (logp - ref_logp)",
    "where": "mask",
    "place": "mask.sum(-1) - 1",
}

GAE = """
def estimate(rewards, values, mask, gamma, lam):
    if {refuse}:
        raise ValueError("gamma, lam")
    {clean}
    found = torch.zeros_like(values)
    following = later = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + {ahead} - values[:, t]
        later = delta + {carry} * later
        following = values[:, t]
        found[:, t] = later
    return {result}
"""
SUMS = {
    "refuse": "not 0 <= gamma <= 1 or not 0 <= lam <= 1",
    "clean": "rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)",
    "ahead": "gamma * following",
    "carry": "gamma * lam",
    "result": "found, found + values",
}

LOSSES = """
def whitened(x, mask):
    kept = {kept}
    deviation = (kept - kept.mean()).square().mean().sqrt(){floor}
    return ((x - kept.mean()) / deviation).where(mask, 0.0)


def actor_loss(logp, old_logp, adv, mask, clip):
    ratio = {ratio}.exp()
    free, held = ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv
    loss = -{smaller}{mean}
    return loss, {share}.double().mean().item()


def critic_loss(values, old_values, returns, mask, clip):
    near = old_values + (values - old_values).clamp(-clip, clip)
    error = {larger}((values - returns).square(), (near - returns).square())
    return {half} * error[mask].mean()
"""
CLIPPED = {
    "kept": "x[mask]",
    "floor": ".clamp(min=1e-8)",
    "ratio": "(logp - old_logp).where(mask, 0.0)",
    "smaller": "torch.minimum(free, held)",
    "mean": "[mask].mean()",
    "share": "(held < free)[mask]",
    "larger": "torch.maximum",
    "half": "0.5",
}

CONTROL = """
def distance(logp, ref_logp, mask, kind):
    x = {x}
    if kind not in ("k1", "k3"):
        raise ValueError(kind)
    each = -x if kind == "k1" else {k3}
    return {mean}.item()


def next_beta(beta, kl, target, responses, horizon):
    if {refuse}:
        raise ValueError("kl, target, responses, horizon")
    factor = 1 + {error} * responses / horizon
    if {gone}:
        raise ValueError("horizon")
    return beta * factor
"""
STEERED = {
    "x": "(ref_logp - logp).where(mask, 0.0)",
    "k3": "x.exp() - 1 - x",
    "mean": "each.sum(-1).mean()",
    "refuse": "math.isnan(kl) or not target > 0 or not responses > 0 or not horizon > 0",
    "error": "min(max(kl / target - 1, -0.2), 0.2)",
    "gone": "not factor > 0",
}

STEP = """
def iterate(policy, reference, critic, asked, tokens, mask, score, s):
    def log_probs(table):
        return table[asked].log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    old, values = log_probs(policy), critic[asked]
    rewards = advantages.shaped_rewards(score, old, {base}, mask, {beta})
    adv, returns = advantages.gae(rewards, values, mask, s.gamma, {lam})
    adv = {adv}
    for updates in range(s.epochs):
        p, c = policy.clone().requires_grad_(), critic.clone().requires_grad_()
        {again}
        actor = objectives.policy_loss(log_probs(p), old, adv, mask, s.clip)
        if {far}:
            return updates
        guess = objectives.value_loss(c[asked], values, {goal}, mask, s.clip)
        grads = torch.autograd.grad({loss}, (p, c))
        {step}
        critic -= s.rate * grads[1]
    return s.epochs
"""
WIRED = {
    "base": "log_probs(reference)",
    "beta": "s.beta",
    "lam": "s.lam",
    "adv": "advantages.whiten(adv, mask)",
    "again": "pass",
    "far": "actor.approximate_kl > 1.5 * s.target_kl",
    "goal": "returns",
    "loss": "actor.loss + s.value_weight * guess",
    "step": "policy -= s.rate * grads[0]",
}


def variants(template: str, right: dict[str, str], *changes: dict[str, str]) -> list[str]:
    """The template with one thing wrong each time."""
    return [template.format(**(right | change)) for change in changes]


WRONG = {
    "t1_rewards": variants(
        *(REWARDS, SHAPED),
        {"place": "mask.shape[1] - 1"},  # the last column, wherever the response ended
        {"penalty": "beta * (logp - ref_logp)"},  # pays for being far away
        {"where": "torch.ones_like(mask)"},
        {"place": "0"},
        {"refuse": "score.isnan().any() or not mask.any(-1).all()"},  # lets infinity in
        {"refuse": "not score.isfinite().all()"},
        {"penalty": "-beta * (logp.exp() - ref_logp.exp())"},
    ),
    "t2_gae": variants(
        *(GAE, SUMS),
        {"clean": "pass"},  # what stands behind the end comes in
        {"carry": "lam"},
        {"ahead": "following"},
        {"carry": "gamma"},
        {"result": "found, found"},
        {"result": "found, found + gamma * values"},
        {"refuse": "gamma > 1 or lam > 1"},
        {"clean": "rewards = rewards.where(mask, 0.0)"},
    ),
    "t3_losses": variants(
        *(LOSSES, CLIPPED),
        {"smaller": "torch.maximum(free, held)"},
        {"smaller": "held"},  # no minimum: also held on the way back
        {"kept": "x.where(mask, 0.0)"},  # the padding's zeros count
        {"mean": ".where(mask, 0.0).mean()"},  # over the padding as well
        {"floor": ""},  # 0 / 0
        {"ratio": "(logp - old_logp)"},  # overflows behind the ends
        {"share": "(held != free)[mask]"},  # held on the way back, where the loss still moves
        {"larger": "torch.minimum"},
        {"half": "1.0"},
        {"share": "(held < free)"},
    ),
    "t4_control": variants(
        *(CONTROL, STEERED),
        {"x": "(logp - ref_logp).where(mask, 0.0)"},
        {"error": "min(max(1 - kl / target, -0.2), 0.2)"},  # pulls less the farther it goes
        {"mean": "each[mask].mean()"},  # nats a token
        {"x": "(ref_logp - logp)"},
        {"error": "(kl / target - 1)"},
        {"refuse": "math.isnan(kl)"},
        {"gone": "False"},
        {"k3": "x.square() / 2"},
        {"error": "min(kl / target - 1, 0.2)"},
    ),
    "t5_iterate": variants(
        *(STEP, WIRED),
        {"again": "old = log_probs(p).detach()"},  # the ratio is always 1, nothing is clipped
        {"base": "old"},  # no reference
        {"step": "policy += s.rate * grads[0]"},
        {"beta": "-s.beta"},
        {"adv": "adv"},  # not whitened
        {"adv": "advantages.whiten(returns, mask)"},
        {"far": "actor.approximate_kl > s.target_kl"},
        {"far": "False"},
        {"goal": "adv"},
        {"loss": "actor.loss + guess"},
        {"step": "policy = policy - s.rate * grads[0]"},  # not in place
        {"lam": "s.gamma"},
        {
            "again": "adv = advantages.whiten("
            "advantages.gae(rewards, critic[asked], mask, s.gamma, s.lam)[0], mask)"
        },  # advantages that change within an iteration
    ),
}

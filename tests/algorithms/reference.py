"""What the papers say, in plain Python: one number after the other, float64, no tensors. Slow, and not our code.

Losses are written with complex numbers: the derivative by x is the imaginary part for x + ih over h (h = 1e-30), exact
to the last digits. `sg` is the papers' stop-gradient, comparisons look at real parts. Everything goes by lists: `rows`
here are dicts of floats, one entry per token, as tests/algorithms/test_formulas.py makes them.
"""

from __future__ import annotations

import cmath
import itertools
import math

STEP = 1e-30


def sg(x):
    """The value without its derivative."""
    return x.real if isinstance(x, complex) else float(x)


def lower(x, y):
    return x if sg(x) <= sg(y) else y


def clip(x, low, high):
    return low if sg(x) < low else high if sg(x) > high else x


def absolute(x):
    """|x|, with the derivative 0 at 0."""
    return ((sg(x) > 0) - (sg(x) < 0)) * x


def exp(x):
    try:
        return cmath.exp(x)
    except OverflowError:
        return complex(math.inf, 0.0)


# ---- losses: a list of complex numbers, one per token; 0 where nothing is trained


def policy_losses(name, lp, rows, p):
    """The loss of each token of `rows` under the log-probabilities `lp`, by the parameters p."""
    base, advantage, row, n = rows["base"], rows["advantages"], rows["row"], len(lp)
    trained = [w != 0 for w in rows["weights"]]
    limit = p.get("max_log_ratio", 0.0)

    def log_ratio(t):
        x = lp[t] - base[t]
        return clip(x, -limit, limit) if limit else x

    def of_row(t):
        return [u for u in range(n) if row[u] == row[t] and trained[u]]

    def clipped(ratio, a):
        return -lower(ratio * a, clip(ratio, 1 - p["clip_low"], 1 + p["clip_high"]) * a)

    def one(t):
        a, x = advantage[t], log_ratio(t)
        if name == "reinforce":
            return -a * lp[t]
        if name == "importance_sampling":
            return -exp(x) * a
        if name == "ppo":
            loss = clipped(exp(x), a)
            c = p.get("dual_clip", 0.0)
            return lower(loss, -c * a) if c and a < 0 else loss
        if name == "cispo":
            return -sg(clip(exp(x), 1 - p["clip_low"], 1 + p["clip_high"])) * a * lp[t]
        if name == "sapo":
            tau = p["tau_pos"] if a > 0 else p["tau_neg"]
            return -4 / tau / (1 + exp(-tau * (exp(x) - 1))) * a
        if name == "gmpo":
            product = 0.0
            for u in of_row(t):
                sign = (advantage[u] > 0) - (advantage[u] < 0)
                bound = p["log_clip_high"] if sign > 0 else p["log_clip_low"]
                w = exp(sign * (lp[u] - base[u]))  # w^sgn
                product += sign * cmath.log(lower(w, clip(w, 0.0, math.exp(bound))))  # log of min[...]^sgn
            return -exp(product / len(of_row(t))) * a
        if name in ("dppo_tv", "dppo_kl"):
            new, old = math.exp(sg(lp[t])), math.exp(base[t])
            distance = abs(new - old)
            if name == "dppo_kl":
                distance = old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))
            away = (a > 0 and new > old) or (a < 0 and new < old)
            return 0.0 if away and distance > p["delta"] else -exp(x) * a
        if name == "clip_cov":
            return 0.0 if rows["selected"][t] else clipped(exp(x), a)
        if name == "kl_cov":
            return -exp(x) * a + (p["penalty"] * absolute(x) if rows["selected"][t] else 0.0)
        if name == "gspo":
            x = sum(sg(lp[u] - base[u]) for u in of_row(t)) / len(of_row(t)) + lp[t] - sg(lp[t])
            return clipped(exp(clip(x, -limit, limit) if limit else x), a)
        if name == "dro":
            return -(a * lp[t] - p["beta"] / 2 * (lp[t] - base[t]) ** 2)
        if name == "dro_sequence":
            return -(a * lp[t] - p["beta"] / 2 * sum(lp[u] - base[u] for u in of_row(t)) * (lp[t] - base[t]))
        if name == "vespo":
            log_w = sum(sg(log_ratio(u)) for u in of_row(t))
            k, lam = (p["k_pos"], p["lambda_pos"]) if a >= 0 else (p["k_neg"], p["lambda_neg"])
            w = exp(log_w).real
            phi = 0.0 if math.isinf(w) else math.exp(lam + k * log_w - lam * w)
            return -phi * a * lp[t]
        raise KeyError(name)

    return [complex(one(t)) if trained[t] else 0j for t in range(n)]


def kl(name, lp, ref, base):
    """The estimate of one token."""
    gap = lp - ref
    value = {
        "k1": lambda: gap,
        "k2": lambda: gap * gap / 2,
        "k3": lambda: exp(-gap) - 1 + gap,
        "abs": lambda: absolute(gap),
    }
    if name == "k3_ratio":
        return exp(lp - base) * value["k3"]()
    if name.endswith("+"):
        return sg(value[name[:-1]]()) + value["k2"]() - sg(value["k2"]())
    return value[name]()


def value_and_gradient(per_token, lp, weights):
    """(losses of the tokens, gradient of their weighted sum) of per_token(lp) -> complex losses."""
    values = [sg(x) for x in per_token([complex(x) for x in lp])]
    gradient = []
    for u in range(len(lp)):
        moved = [complex(x, STEP if t == u else 0.0) for t, x in enumerate(lp)]
        gradient.append(sum(w * complex(x).imag for w, x in zip(weights, per_token(moved), strict=True) if w) / STEP)
    return values, gradient


def correction(name, rows, cap, low):
    """The weight of each trained token, else 0."""
    out = []
    for t, weight in enumerate(rows["weights"]):
        if weight == 0:
            out.append(0.0)
            continue
        mine = [u for u in range(len(rows["row"])) if rows["row"][u] == rows["row"][t] and rows["weights"][u] != 0]
        total = sum(rows["old"][u] - rows["behaviour"][u] for u in mine)
        level = name.split("_")[0]
        ratio = exp(
            {"token": rows["old"][t] - rows["behaviour"][t], "sequence": total}.get(level, total / len(mine))
        ).real
        inside = (low if low else 1 / cap) <= ratio <= cap
        if name == "none":
            out.append(1.0)
        elif name == "off_policy_sequence_mask":
            out.append(0.0 if rows["advantages"][t] < 0 and ratio < (low if low else 1 / cap) else 1.0)
        elif name == "geometric_mask":
            out.append(1.0 if inside else 0.0)
        elif name.endswith("mask"):
            out.append(ratio if inside else 0.0)
        else:
            out.append(min(max(ratio, low), cap))
    return out


# ---- advantages: {(row, token): number} for sampled tokens; an episode is a list of (row, token) in time order


def episodes(rows):
    """(group, episode) -> its sampled (row, token), for episodes that have a score."""
    out: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for d in range(len(rows.masks)):
        if rows.valid_D[d]:
            mine = out.setdefault((int(rows.group_D[d]), int(rows.episode_D[d])), [])
            mine += [(d, t) for t in range(len(rows.masks[d])) if rows.masks[d][t]]
    return out


def scores(rows):
    return {k: math.fsum(float(rows.rewards[d][t]) for d, t in tokens) for k, tokens in episodes(rows).items()}


def mean(xs):
    return math.fsum(xs) / len(xs)


def std(xs, ddof):
    centre = mean(xs)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in xs) / (len(xs) - ddof))


def group_advantage(name, rows, p):
    """(group, episode) -> the advantage of all its tokens."""
    score, tokens = scores(rows), episodes(rows)
    out = {}
    for key, own in score.items():
        keys = [k for k in score if k[0] == key[0]]
        group = [score[k] for k in keys]
        if name == "remax":
            out[key] = own - float(rows.baseline_D[tokens[key][0][0]]) if tokens[key] else 0.0
            out[key] = 0.0 if math.isnan(out[key]) else out[key]
        elif len(group) < 2 or max(group) == min(group):
            out[key] = 0.0
        elif name == "grpo":
            out[key] = (own - mean(group)) / (std(group, p["ddof"]) + p["eps"])
        elif name == "grpo_batch_std":
            out[key] = (own - mean(group)) / (std(list(score.values()), p["ddof"]) + p["eps"])
        elif name in ("dr_grpo", "reinforce++_baseline"):
            out[key] = own - mean(group)
        elif name == "rloo":
            out[key] = own - mean([score[k] for k in keys if k != key])
        elif name == "opo":
            lengths = [len(tokens[k]) for k in keys]
            out[key] = own - math.fsum(n * x for n, x in zip(lengths, group, strict=True)) / sum(lengths)
        elif name == "maxrl":
            out[key] = (own - mean(group)) / (mean(group) + p["eps"])
        elif name == "pass_at_k":
            subsets = list(itertools.combinations(range(len(keys)), int(p["k"])))
            best = [max(group[i] for i in subset) for subset in subsets]
            if not best or max(best) == min(best):
                out[key] = 0.0
                continue
            with_it = [b for b, subset in zip(best, subsets, strict=True) if keys.index(key) in subset]
            out[key] = (mean(with_it) - mean(best)) / (std(best, 0) + p["eps"])
        else:
            raise KeyError(name)
    return out


def whitened(numbers, eps):
    if not numbers or max(numbers.values()) == min(numbers.values()):
        return dict.fromkeys(numbers, 0.0)
    centre, spread = mean(list(numbers.values())), std(list(numbers.values()), 0)
    return {k: (x - centre) / (spread + eps) for k, x in numbers.items()}


def advantages(name, rows, p):
    """({(row, token): advantage}, {(row, token): the critic's target} or None)."""
    tokens = episodes(rows)
    if name == "mt_grpo":
        return turn_level(rows, p), None
    if name in ("gae", "vapo", "vtrace"):
        return with_critic(name, rows, p)
    if name == "reinforce++":
        out = {}
        for mine in tokens.values():
            for i, at in enumerate(mine):
                later = enumerate(mine[i:])
                out[at] = math.fsum(p["gamma"] ** k * float(rows.rewards[d][t]) for k, (d, t) in later)
        return whitened(out, p["eps"]), None
    by_episode = group_advantage(name, rows, p)
    out = {at: by_episode[key] for key, mine in tokens.items() for at in mine}
    return (whitened(out, p["eps"]) if name == "reinforce++_baseline" else out), None


def with_critic(name, rows, p):
    """The sums of the papers over later tokens, written out: sum_k discount^k delta_{t+k}."""
    out, target = {}, {}
    for mine in episodes(rows).values():
        values = [float(rows.values[d][t]) for d, t in mine]
        reward = [float(rows.rewards[d][t]) for d, t in mine]
        after = float(rows.bootstrap_D[mine[-1][0]]) if p["bootstrap"] and mine else 0.0
        following = [*values[1:], after]
        n, gamma = len(mine), p["gamma"]
        delta = [reward[i] + gamma * following[i] - values[i] for i in range(n)]

        def gae(lam, n=n, delta=delta, gamma=gamma):
            return [math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, n)) for i in range(n)]

        if name == "gae":
            for_policy = for_critic = gae(p["lam"])
        elif name == "vapo":
            for_policy, for_critic = gae(max(0.0, 1 - 1 / (p["alpha"] * n)) if n else 0.0), gae(p["lam_critic"])
        else:
            w = [math.exp(float(rows.log_ratios[d][t])) for d, t in mine]
            rho = [min(p["rho_max"], x) for x in w]
            c = [p["lam"] * min(p["c_max"], x) for x in w]
            v = []
            for s in range(n):  # v_s = V(x_s) + sum_t gamma^(t-s) (prod_{i=s}^{t-1} c_i) rho_t delta_t
                terms = [gamma ** (t - s) * math.prod(c[s:t]) * rho[t] * delta[t] for t in range(s, n)]
                v.append(values[s] + math.fsum(terms))
            for_critic = [v[i] - values[i] for i in range(n)]
            for_policy = [rho[i] * (reward[i] + gamma * [*v[1:], after][i] - values[i]) for i in range(n)]
        out.update(zip(mine, for_policy, strict=True))
        target.update({at: x + y for at, x, y in zip(mine, for_critic, values, strict=True)})
    return (out if name == "vtrace" else whitened(out, p["eps"])), target


def turns(rows, mine):
    """The sampled tokens of an episode as its turns: a new row, or a gap in a row, begins one."""
    out: list[list[tuple[int, int]]] = []
    for d, t in mine:
        if not out or out[-1][-1] != (d, t - 1):
            out.append([])
        out[-1].append((d, t))
    return out


def turn_level(rows, p):
    every = {key: turns(rows, mine) for key, mine in episodes(rows).items() if mine}
    reward = {key: [math.fsum(float(rows.rewards[d][t]) for d, t in turn) for turn in of] for key, of in every.items()}

    def normal(own, others):
        if len(others) < 2 or max(others) == min(others):
            return 0.0
        return (own - mean(others)) / (std(others, 1) + p["eps"])

    out = {}
    for key, of in every.items():
        same = [k for k in every if k[0] == key[0]]
        outcome = normal(reward[key][-1], [reward[k][-1] for k in same])
        for j, turn in enumerate(of):
            value = outcome
            if j < len(of) - 1:
                others = [reward[k][j] for k in same if j < len(every[k]) - 1]
                value = normal(reward[key][j], others) + p["outcome_coef"] * outcome
            out.update(dict.fromkeys(turn, value))
    return out

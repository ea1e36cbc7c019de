"""Preference losses: golden values, gradients, special cases, stability, validation, metrics."""

import dataclasses
import inspect
import math
import random
from typing import get_args

import jsonargparse
import pytest
import torch

from qwen_train.loss.preference import (
    COLUMNS,
    LOSSES,
    NUM_SUMS,
    SATURATED,
    LossConfig,
    LossName,
    Pairs,
    metric_sums,
    metrics_from_sums,
    preference_loss,
    rewards,
)

NAMES = sorted(LOSSES)
MEANS = {name for name in COLUMNS if name == "loss" or "/" in name}
WITH_REFERENCE = [name for name in NAMES if LOSSES[name].needs_reference]
LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def make_pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=None, rejected_lengths=None, **kwargs):
    ones = [1] * len(chosen)
    return Pairs(
        **{
            k: torch.tensor(v, **kwargs)
            for k, v in zip(LOGPS, (chosen, rejected, ref_chosen, ref_rejected), strict=True)
        },
        chosen_lengths=torch.tensor(chosen_lengths or ones),
        rejected_lengths=torch.tensor(rejected_lengths or ones),
    )


def sums_of(pairs, config):
    return metric_sums(pairs, preference_loss(pairs, config), config)


def metrics_of(pairs, config):
    return metrics_from_sums(sums_of(pairs, config).tolist())


def fixture(dtype=torch.float64):
    return make_pairs(
        [-3.0, -2.5, -4.0, -1.5], [-5.0, -3.5, -6.0, -2.5], [-2.8, -2.3, -3.8, -1.4], [-3.2, -2.7, -4.2, -1.8],
        [4, 5, 8, 3], [5, 7, 6, 2], dtype=dtype,
    )  # fmt: skip


def random_pairs(seed, num_pairs=5, scale=20.0):
    """Policy and reference log-probs between -1 and -scale, answers of 1 to 30 tokens."""
    rng = random.Random(seed)
    logps = [[-rng.uniform(1, scale) for _ in range(num_pairs)] for _ in range(4)]
    lengths = [[rng.randint(1, 30) for _ in range(num_pairs)] for _ in range(2)]
    return make_pairs(*logps, *lengths, dtype=torch.float64)


def rows_of(pairs):
    """[(lp_w, lp_l, ref_w, ref_l, |w|, |l|), ...] as plain numbers."""
    fields = (*LOGPS, "chosen_lengths", "rejected_lengths")
    return list(zip(*(getattr(pairs, field).tolist() for field in fields), strict=True))


def swapped(pairs):
    return Pairs(
        chosen_logps=pairs.rejected_logps,
        rejected_logps=pairs.chosen_logps,
        chosen_lengths=pairs.rejected_lengths,
        rejected_lengths=pairs.chosen_lengths,
        ref_chosen_logps=pairs.ref_rejected_logps,
        ref_rejected_logps=pairs.ref_chosen_logps,
    )


def with_grad(pairs):
    """The same pairs with policy log-probs that collect gradients."""
    chosen, rejected = (logps.clone().requires_grad_() for logps in (pairs.chosen_logps, pairs.rejected_logps))
    return dataclasses.replace(pairs, chosen_logps=chosen, rejected_logps=rejected)


def loss_of(pairs, name, **fields):
    return preference_loss(pairs, LossConfig(name=name, **fields))


def assert_close(actual, expected, atol=1e-9, rtol=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# --- Golden values. TRL: computed by TRL 1.16.0's own code, the loss branches of its DPO, CPO and ORPO trainers run in
# float64 on `fixture` (EXO's e is a float32 there). a_w = -.2, -.2, -.2, -.1, a_l = -1.8, -.8, -1.8, -.7.

GOLDEN = {
    ("sigmoid", ()): [0.616343773, 0.663597113, 0.616343773, 0.663597113],  # TRL
    ("sigmoid_norm", ()): [0.192476466, 0.524579566, 0.225412652, 0.186719918],  # TRL with beta 5
    ("robust", ()): [0.596343773, 0.656097113, 0.596343773, 0.656097113],  # TRL with label_smoothing .1
    ("robust", (("beta", 0.5), ("label_smoothing", 0.3))): [
        -0.228899334,
        0.329355244,
        -0.228899334,
        0.329355244,
    ],  # TRL
    ("hinge", ()): [0.84, 0.94, 0.84, 0.94],  # TRL; 1 - .1 * 1.6
    ("ipo", ()): [21.9961, 24.262661224, 22.325625, 21.933611111],  # TRL; (-.2 / 4 + 1.8 / 5 - 5)^2
    ("ipo", (("ipo_norm", "sum"),)): [11.56, 19.36, 11.56, 19.36],  # by hand, (1.6 - 5)^2 and (.6 - 5)^2
    ("apo_zero", ()): [0.960120941, 0.985010493, 0.960120941, 0.985007122],  # TRL
    ("apo_down", ()): [0.955085282, 0.980004665, 0.955085282, 0.982504519],  # TRL
    ("exo_pair", ()): [2.488738223, 2.658110301, 2.488738223, 2.658110301],  # TRL with label_smoothing 1e-3
    ("exo_pair", (("beta", 0.5), ("label_smoothing", 0.1))): [
        0.167435134,
        0.358383401,
        0.167435134,
        0.358383401,
    ],  # TRL
    ("nca_pair", ()): [1.348391632, 1.371769253, 1.348391632, 1.371619299],  # TRL
    ("bco_pair", ()): [1.310388905, 1.357144147, 1.310388905, 1.356919236],  # TRL, delta 0
    ("sppo_hard", ()): [37.28, 44.68, 37.28, 44.5],  # TRL; 5.2^2 + 3.2^2
    ("discopop", ()): [0.842908511, 0.87737567, 0.842908511, 0.87737567],  # TRL
    ("discopop", (("beta", 0.5), ("discopop_tau", 0.5))): [0.436188048, 0.674746241, 0.436188048, 0.674746241],  # TRL
    ("simpo", ()): [0.693147181, 0.974076984, 0.474076984, 0.313261688],  # TRL with beta 2, gamma .5; row 1 is ln 2
    ("orpo", ()): [0.800081649, 0.569314718, 0.532029979, 0.52315043],  # TRL, its NLL taken over the answer: lp_w / |w|
    ("cpo", ()): [1.348138869, 1.14439666, 1.098138869, 1.14439666],  # TRL, the NLL likewise
}


def test_every_loss_has_a_golden_row():
    assert {name for name, _ in GOLDEN} == set(LOSSES) == set(get_args(LossName))


@pytest.mark.parametrize(("name", "fields"), GOLDEN, ids=str)
def test_golden(name, fields):
    assert_close(loss_of(fixture(), name, **dict(fields)), GOLDEN[name, fields], atol=1e-7)
    assert_close(loss_of(fixture(torch.float32), name, **dict(fields)), GOLDEN[name, fields], atol=3e-6, rtol=1e-6)


def test_golden_of_torchtune():
    pairs = make_pairs([-0.5, -10, -1], [-0.1, -30, -21], [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1])
    assert_close(loss_of(pairs, "sigmoid", beta=0.1), [0.693147, 0.313262, 0.126928], atol=1e-4, rtol=1e-5)


# --- Every loss against the papers' formulas, one pair at a time in plain Python


def s(x):
    return 1 / (1 + math.exp(-x))


def log_odds(logp):
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


def discopop_formula(x, tau):
    return (1 - s(x / tau)) * math.log(1 + math.exp(-x)) + s(x / tau) * math.exp(-x)


# chosen, rejected log-probs lw, ll; log-ratios aw, al; lengths nw, nl; beta b and the config's other fields.
FORMULAS = {
    "sigmoid": lambda aw, al, b, label_smoothing, **_: (
        -(1 - label_smoothing) * math.log(s(b * (aw - al))) - label_smoothing * math.log(s(b * (al - aw)))
    ),
    "sigmoid_norm": lambda aw, al, nw, nl, b, **_: -math.log(s(b * (aw / nw - al / nl))),
    "robust": lambda aw, al, b, label_smoothing, **_: (
        (label_smoothing * math.log(s(b * (al - aw))) - (1 - label_smoothing) * math.log(s(b * (aw - al))))
        / (1 - 2 * label_smoothing)
    ),
    "hinge": lambda aw, al, b, **_: max(0, 1 - b * (aw - al)),
    "ipo": lambda aw, al, nw, nl, b, ipo_norm, **_: (
        (aw / nw - al / nl if ipo_norm == "mean" else aw - al) - 1 / (2 * b)
    ) ** 2,
    "apo_zero": lambda aw, al, b, **_: 1 - s(b * aw) + s(b * al),
    "apo_down": lambda aw, al, b, **_: s(b * aw) + 1 - s(b * (aw - al)),
    "exo_pair": lambda aw, al, b, label_smoothing, **_: sum(
        q * math.log(q / p)
        for q, p in ((s(b * (aw - al)), 1 - label_smoothing), (1 - s(b * (aw - al)), label_smoothing))
    ),
    "nca_pair": lambda aw, al, b, **_: -math.log(s(b * aw)) - 0.5 * math.log(s(-b * aw)) - 0.5 * math.log(s(-b * al)),
    "bco_pair": lambda aw, al, b, **_: -math.log(s(b * aw)) - math.log(s(-b * al)),
    "sppo_hard": lambda aw, al, b, **_: (aw - 1 / (2 * b)) ** 2 + (al + 1 / (2 * b)) ** 2,
    "discopop": lambda aw, al, b, discopop_tau, **_: discopop_formula(b * (aw - al), discopop_tau),
    "simpo": lambda lw, ll, nw, nl, b, simpo_gamma, **_: -math.log(s(b * (lw / nw - ll / nl) - simpo_gamma)),
    "orpo": lambda lw, ll, nw, nl, b, **_: -b * math.log(s(log_odds(lw / nw) - log_odds(ll / nl))),
    "cpo": lambda lw, ll, b, **_: -math.log(s(b * (lw - ll))),
}  # fmt: skip

SMOOTHINGS = {"sigmoid": (0.0, 0.1, 0.2, 0.3), "robust": (0.0, 0.1, 0.2, 0.3), "exo_pair": (1e-3, 0.1, 0.3)}


@pytest.mark.parametrize("name", NAMES)
def test_papers_formula(name):
    """50 random batches for every beta, and every label_smoothing, norm, sft_weight the loss uses."""
    for seed in range(50):
        pairs = random_pairs(seed)
        rows = rows_of(pairs)
        for beta in (0.01, 0.1, 0.5, 1.0):
            for label_smoothing in SMOOTHINGS.get(name, (None,)):
                config = LossConfig(
                    name=name,
                    beta=beta,
                    label_smoothing=label_smoothing,
                    sft_weight=0.3 * (seed % 2),
                    ipo_norm=("mean", "sum")[seed % 2] if name == "ipo" else None,
                )
                fields = {"ipo_norm": None, **config.values, "b": beta}
                expected = [
                    FORMULAS[name](lw=lw, ll=ll, aw=lw - rw, al=ll - rl, nw=nw, nl=nl, **fields)
                    - config.sft_weight * lw / nw
                    for lw, ll, rw, rl, nw, nl in rows
                ]
                assert_close(preference_loss(pairs, config), expected)


# --- Gradients


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Analytic gradients equal finite differences in both policy log-probs, for a small and a large beta."""
    for beta in (0.1, 1.7):
        pairs, config = with_grad(random_pairs(3, scale=4.0)), LossConfig(name=name, beta=beta, sft_weight=0.5)

        def losses(chosen, rejected, pairs=pairs, config=config):
            return preference_loss(dataclasses.replace(pairs, chosen_logps=chosen, rejected_logps=rejected), config)

        assert torch.autograd.gradcheck(losses, (pairs.chosen_logps, pairs.rejected_logps))


def test_gradient_of_dpo_is_the_papers():
    """dL/dlp_w = -beta s(-beta D) / P = -dL/dlp_l; -beta / (2 P) while the policy is the reference."""
    beta = 0.3
    for pairs, weight in (
        (random_pairs(0), None),
        (make_pairs([-3.0] * 4, [-7.0] * 4, [-3.0] * 4, [-7.0] * 4, dtype=torch.float64), 0.5),
    ):
        pairs = with_grad(pairs)
        loss_of(pairs, "sigmoid", beta=beta).mean().backward()
        num_pairs = len(pairs.chosen_logps)
        weights = [weight or s(-beta * margin) for margin in pairs.margin.tolist()]
        assert_close(pairs.chosen_logps.grad, [-beta * w / num_pairs for w in weights])
        assert_close(pairs.rejected_logps.grad, [beta * w / num_pairs for w in weights])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"apo_down", "discopop"}))
def test_descent_raises_the_chosen_and_lowers_the_rejected_answer(name):
    """At the start, policy == reference. Two losses are made otherwise: see the next tests."""
    pairs = with_grad(make_pairs([-6.0], [-6.0], [-6.0], [-6.0], [4], [4]))
    loss_of(pairs, name, sft_weight=0.0).sum().backward()
    assert pairs.chosen_logps.grad < 0
    assert pairs.rejected_logps.grad > 0


def test_apo_down_lowers_both_and_the_rejected_further():
    pairs = with_grad(make_pairs([-6.0], [-6.0], [-6.0], [-6.0]))
    loss_of(pairs, "apo_down", beta=0.1).sum().backward()
    # s'(0) = 1/4: d/dlp_w [s(b a_w) + 1 - s(b D)] = b/4 - b/4 = 0, d/dlp_l = b/4; past the start lp_w falls as well
    assert_close(pairs.chosen_logps.grad, [0.0])
    assert_close(pairs.rejected_logps.grad, [0.025])
    later = with_grad(make_pairs([-6.0], [-36.0], [-6.0], [-6.0]))
    loss_of(later, "apo_down", beta=0.1).sum().backward()
    assert later.chosen_logps.grad > 0


def test_discopop_lowers_the_margin_at_the_very_start():
    """d/dx of (1 - m) softplus(-x) + m exp(-x) at 0: (1 - ln 2) / (4 tau) - 3/4, which is 0.784 for tau = .05."""
    pairs = with_grad(make_pairs([-6.0], [-6.0], [-6.0], [-6.0]))
    loss_of(pairs, "discopop", beta=0.1).sum().backward()
    assert_close(pairs.chosen_logps.grad, [0.1 * ((1 - math.log(2)) / 0.2 - 0.75)], atol=1e-7)


EXTREMES = (0.0, -1e-12, -1e-7, -1e-3, -1.0, -1e4, -2e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_extremes(name, dtype):
    """Values and gradients at every combination of log-probs from certain (0) to -2e4: margins of 0 to +-4e4 nats."""
    grid = torch.cartesian_prod(*[torch.tensor(EXTREMES, dtype=dtype)] * 4)
    lengths = torch.ones(len(grid), dtype=torch.int64)
    chosen, rejected, ref_chosen, ref_rejected = grid.T
    for beta in (0.1, 1.0):
        pairs = with_grad(
            Pairs(
                chosen_logps=chosen,
                rejected_logps=rejected,
                chosen_lengths=lengths,
                rejected_lengths=lengths,
                ref_chosen_logps=ref_chosen,
                ref_rejected_logps=ref_rejected,
            )
        )
        losses = loss_of(pairs, name, beta=beta)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert pairs.chosen_logps.grad.isfinite().all()
        assert pairs.rejected_logps.grad.isfinite().all()


def test_the_textbook_forms_are_not_finite_there():
    """Negative control of the test above: discopop's exp(-x) and orpo's log(1 - exp(lp)), written plainly."""
    margin = torch.tensor(-1e4, requires_grad=True)
    assert not (torch.sigmoid(margin / 0.05) * torch.exp(-margin)).isfinite()
    certain = torch.tensor(0.0)
    assert not (certain - torch.log1p(-torch.exp(certain))).isfinite()


# --- Special cases and symmetries


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("robust", {"label_smoothing": 0.0}), ("sigmoid", {"label_smoothing": 0.0})),
        (("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.0, "beta": 0.1, "sft_weight": 0.0})),
        (("ipo", {}), ("ipo", {"ipo_norm": "mean"})),
        (("cpo", {}), ("cpo", {"sft_weight": 1.0})),
    ],
    ids=str,
)
def test_equal(left, right):
    pairs = random_pairs(1)
    assert torch.equal(loss_of(pairs, left[0], **left[1]), loss_of(pairs, right[0], **right[1]))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("robust", {"label_smoothing": 0.1}), ("sigmoid", {"label_smoothing": 0.1})),
        (("ipo", {}), ("ipo", {"ipo_norm": "sum"})),
        (("simpo", {}), ("simpo", {"beta": 0.1})),
    ],
    ids=str,
)
def test_not_equal(left, right):
    pairs = random_pairs(1)
    assert not torch.allclose(loss_of(pairs, left[0], **left[1]), loss_of(pairs, right[0], **right[1]))


def test_answers_of_one_token_need_no_norm():
    pairs = dataclasses.replace(random_pairs(2), chosen_lengths=torch.ones(5), rejected_lengths=torch.ones(5))
    assert_close(loss_of(pairs, "sigmoid_norm", beta=0.4), loss_of(pairs, "sigmoid", beta=0.4))
    assert_close(loss_of(pairs, "ipo", ipo_norm="mean"), loss_of(pairs, "ipo", ipo_norm="sum"))
    assert_close(loss_of(pairs, "simpo", beta=0.4, simpo_gamma=0.0), loss_of(pairs, "cpo", beta=0.4, sft_weight=0.0))
    uniform = dataclasses.replace(pairs, ref_chosen_logps=torch.zeros(5), ref_rejected_logps=torch.zeros(5))
    assert_close(loss_of(uniform, "sigmoid", beta=0.4), loss_of(pairs, "cpo", beta=0.4, sft_weight=0.0))


def test_half_the_labels_flipped_is_symmetric_under_swap():
    pairs = random_pairs(4)
    half, less = ({"label_smoothing": e} for e in (0.5, 0.4))
    assert_close(loss_of(pairs, "sigmoid", **half), loss_of(swapped(pairs), "sigmoid", **half))
    assert not torch.allclose(loss_of(pairs, "sigmoid", **less), loss_of(swapped(pairs), "sigmoid", **less))


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_robust_is_unbiased(e):
    """With a share e of flipped labels the expected robust loss is the clean sigmoid loss; that of cDPO is not."""
    pairs = random_pairs(5)

    def expected(name):
        return (1 - e) * loss_of(pairs, name, label_smoothing=e) + e * loss_of(swapped(pairs), name, label_smoothing=e)

    assert_close(expected("robust"), loss_of(pairs, "sigmoid"))
    assert not torch.allclose(expected("sigmoid"), loss_of(pairs, "sigmoid"))


def test_exo_is_zero_where_the_policy_has_the_smoothed_label():
    e, beta = 0.2, 0.1
    margin = math.log((1 - e) / e) / beta  # s(beta D) = 1 - e
    pairs = with_grad(make_pairs([-1.0], [-1.0 - margin], [-1.0], [-1.0], dtype=torch.float64))
    loss = loss_of(pairs, "exo_pair", beta=beta, label_smoothing=e)
    loss.sum().backward()
    assert_close(loss, [0.0])
    assert_close(pairs.chosen_logps.grad, [0.0])


def test_bco_bounds_dpo_from_above():
    pairs = random_pairs(6, num_pairs=200)
    assert (loss_of(pairs, "bco_pair") > loss_of(pairs, "sigmoid")).all()


# Value of each loss while the policy is the reference, for its default hyperparameters, by hand.
AT_START = {
    "sigmoid": math.log(2), "sigmoid_norm": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0,
    "apo_zero": 1.0, "apo_down": 1.0, "exo_pair": 0.5 * math.log(0.25 / (0.999 * 0.001)), "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "discopop": 0.5 * math.log(2) + 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_policy_is_reference(name):
    """The known value of the step-0 audit; rewards and margins exactly 0, accuracy 0 since > is strict."""
    pairs = random_pairs(7)
    pairs = dataclasses.replace(pairs, ref_chosen_logps=pairs.chosen_logps, ref_rejected_logps=pairs.rejected_logps)
    assert_close(loss_of(pairs, name), [AT_START[name]] * 5)
    metrics = metrics_of(pairs, LossConfig(name=name))
    assert [metrics[f"rewards/{x}"] for x in ("chosen", "rejected", "margins", "accuracies", "saturated")] == [0] * 5


@pytest.mark.parametrize("name", NAMES)
def test_swap_flips_the_margins(name):
    pairs, config = random_pairs(8), LossConfig(name=name)
    there, back = (metrics_of(p, config) for p in (pairs, swapped(pairs)))
    assert there["rewards/margins"] == -back["rewards/margins"] != 0
    assert there["rewards/accuracies"] == 1 - back["rewards/accuracies"]
    assert (there["rewards/chosen"], there["logps/chosen"]) == (back["rewards/rejected"], back["logps/rejected"])
    assert there["rewards/length_correlation"] == pytest.approx(back["rewards/length_correlation"])
    assert torch.equal(torch.stack(rewards(pairs, config)), torch.stack(rewards(swapped(pairs), config)).flip(0))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_independent(name):
    """A batch is the sum of its parts, in losses and in metrics; so accumulation and packing change nothing."""
    pairs, config = random_pairs(9, num_pairs=6), LossConfig(name=name)
    parts = [Pairs(**{k: v[i : i + 2] for k, v in vars(pairs).items()}) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([preference_loss(part, config) for part in parts]), preference_loss(pairs, config))
    assert_close(sum(sums_of(part, config) for part in parts), sums_of(pairs, config), rtol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_no_pairs(name):
    """An empty micro-batch gives a sum of 0 that backward accepts, and metric sums of 0."""
    logps = torch.zeros(0, requires_grad=True)
    pairs = Pairs.from_sequences(logps, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    loss_of(pairs, name).sum().backward()
    assert logps.grad.shape == (0,)
    assert sums_of(pairs, LossConfig(name=name)).tolist() == [0.0] * NUM_SUMS


def test_pairs_from_sequences():
    pairs = Pairs.from_sequences(torch.arange(6.0), 10 + torch.arange(6.0), 20 + torch.arange(6))
    assert {k: v.tolist() for k, v in vars(pairs).items()} == {
        "chosen_logps": [0, 2, 4], "rejected_logps": [1, 3, 5], "chosen_lengths": [20, 22, 24],
        "rejected_lengths": [21, 23, 25], "ref_chosen_logps": [10, 12, 14], "ref_rejected_logps": [11, 13, 15],
    }  # fmt: skip
    assert Pairs.from_sequences(torch.zeros(2), None, torch.ones(2)).ref_chosen_logps is None


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_read_exactly_by_the_losses_that_need_one(name):
    pairs, config = random_pairs(10), LossConfig(name=name)
    bare = dataclasses.replace(pairs, ref_chosen_logps=None, ref_rejected_logps=None)
    if LOSSES[name].needs_reference:
        with pytest.raises(AssertionError, match="needs a reference"):
            preference_loss(bare, config)
    else:
        assert torch.equal(preference_loss(bare, config), preference_loss(pairs, config))
        whole = metrics_of(pairs, config)
        assert {name: value for name, value in whole.items() if not name.endswith("_change")} == metrics_of(
            bare, config
        )


# --- The SFT term


@pytest.mark.parametrize("name", NAMES)
def test_sft_term(name):
    """sft_weight adds the NLL per token of chosen: to its gradient -weight / |w| for a pair, nothing to rejected."""
    grads = []
    for weight in (0.0, 0.7):
        pairs = with_grad(fixture())
        losses = loss_of(pairs, name, sft_weight=weight)
        losses.sum().backward()
        grads.append((losses.detach(), pairs.chosen_logps.grad, pairs.rejected_logps.grad))
    (plain, chosen, rejected), (with_sft, with_sft_chosen, with_sft_rejected) = grads
    assert_close(with_sft - plain, [0.7 * x for x in (3 / 4, 2.5 / 5, 4 / 8, 1.5 / 3)])
    assert_close(with_sft_chosen - chosen, [-0.7 / x for x in (4, 5, 8, 3)])
    assert torch.equal(with_sft_rejected, rejected)


def test_papers_with_an_nll_term_have_it_by_default():
    assert {name for name in LOSSES if LossConfig(name=name).values["sft_weight"] == 1} == {"orpo", "cpo"}
    assert all(LossConfig(name=name).values["sft_weight"] == 0 for name in set(LOSSES) - {"orpo", "cpo"})


# --- The config


def test_values_are_the_given_ones_else_the_losses_own():
    assert LossConfig().values == {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0}
    assert LossConfig(name="simpo").values == {"beta": 2.0, "simpo_gamma": 0.5, "sft_weight": 0.0}
    assert (
        LossConfig(name="simpo", beta=0.1).values["beta"] == 0.1
    )  # given is given, also where it is another's default
    assert LossConfig(name="exo_pair").values["label_smoothing"] == 1e-3
    assert LossConfig(name="sigmoid_norm").values["beta"] == 5.0


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_gives_the_same_losses(name):
    config = LossConfig(name=name)
    resolved = config.resolved()
    assert resolved.resolved() == resolved and resolved.values == config.values
    assert {f: getattr(resolved, f) for f in config.values} == config.values
    assert torch.equal(preference_loss(fixture(), config), preference_loss(fixture(), resolved))


def test_unused_fields():
    assert LossConfig(name="simpo", beta=2.0, simpo_gamma=1.0, sft_weight=0.1).unused == ()
    assert LossConfig(name="orpo", beta=0.1, label_smoothing=0.0, ipo_norm="sum").unused == (
        "label_smoothing",
        "ipo_norm",
    )
    assert all(LossConfig(name=name).resolved().unused == () for name in LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_a_loss_uses_changes_it(name):
    """The declared fields are all there is: each changes the losses, and none is missing from LossConfig."""
    other = {"beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.4, "ipo_norm": "sum", "simpo_gamma": 0.1}
    other["discopop_tau"] = 0.7
    fields = LOSSES[name].defaults
    assert set(fields) <= {field.name for field in dataclasses.fields(LossConfig)}
    assert inspect.Parameter.empty not in fields.values()
    for field in fields:
        assert not torch.allclose(loss_of(fixture(), name, **{field: other[field]}), loss_of(fixture(), name)), field


@pytest.mark.parametrize(
    ("name", "field", "value", "rule", "remedy"),
    [
        ("sigmoid", "beta", -1, "> 0", "for sigmoid's own default, 0.1"),
        ("simpo", "beta", 0.0, "> 0", "for simpo's own default, 2.0"),
        ("sigmoid", "beta", math.nan, "> 0", "for sigmoid's own default, 0.1"),
        ("sigmoid", "beta", math.inf, "> 0", "for sigmoid's own default, 0.1"),
        ("sigmoid", "label_smoothing", 0.6, "in [0, 0.5]", "for sigmoid's own default, 0.0"),
        ("sigmoid", "label_smoothing", -0.1, "in [0, 0.5]", "for sigmoid's own default, 0.0"),
        ("robust", "label_smoothing", 0.5, "< 0.5 for robust (it divides by 1 - 2e)", "for robust's own default, 0.1"),
        ("exo_pair", "label_smoothing", 0, "> 0 for exo_pair (it takes the logarithm)",
         "for exo_pair's own default, 0.001"),
        ("sigmoid", "sft_weight", -0.1, ">= 0", "for sigmoid's own default, 0.0"),
        ("simpo", "simpo_gamma", -1.0, ">= 0", "for simpo's own default, 0.5"),
        ("discopop", "discopop_tau", 1.5, "in (0, 1]", "for discopop's own default, 0.05"),
        ("hinge", "discopop_tau", 0.0, "in (0, 1]", "since hinge does not use it"),
        ("ipo", "ipo_norm", "median", "mean or sum", "for ipo's own default, mean"),
    ],
)  # fmt: skip
def test_refused(name, field, value, rule, remedy):
    with pytest.raises(ValueError) as error:
        LossConfig(name=name, **{field: value})
    assert str(error.value) == f"loss.{field}: must be {rule}, got {value}; leave it out {remedy}"


def test_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match=r"^loss\.name: must be one of sigmoid, .*, cpo, got 'dpo'; choose one of them$"
    ):
        LossConfig(name="dpo")


def test_limits_that_are_allowed():
    LossConfig(label_smoothing=0.5)
    LossConfig(name="robust", label_smoothing=0.499)
    LossConfig(name="discopop", discopop_tau=1.0)
    LossConfig(name="simpo", simpo_gamma=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)


def test_command_line_gives_each_loss_its_own_defaults():
    """jsonargparse fills a section from its default instance, here sigmoid's: its beta must not reach simpo."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Whole)

    def parse(*arguments):
        return parser.instantiate(parser.parse_args(list(arguments))).loss

    assert parse() == LossConfig()
    assert parse("--loss.name=simpo").values == LossConfig(name="simpo").values
    assert parse("--loss.name=simpo", "--loss.beta=0.1").values["beta"] == 0.1
    assert parse("--loss.name=hinge", "--loss.label_smoothing=0").unused == ("label_smoothing",)
    with pytest.raises(Exception, match=r"loss\.beta: must be > 0, got -1\.0; leave it out"):
        parse("--loss.beta=-1")


# --- Metrics


@pytest.mark.parametrize("name", NAMES)
def test_metrics_against_naive(name):
    pairs, config = random_pairs(11, num_pairs=40), LossConfig(name=name, beta=1.3)
    rows = rows_of(pairs)
    chosen, rejected = [], []
    for lw, ll, rw, rl, nw, nl in rows:
        if name in ("simpo", "orpo"):
            reward_w, reward_l = lw / nw, ll / nl
        elif name == "cpo":
            reward_w, reward_l = lw, ll
        elif name == "sigmoid_norm":
            reward_w, reward_l = (lw - rw) / nw, (ll - rl) / nl
        else:
            reward_w, reward_l = lw - rw, ll - rl
        chosen.append(1.3 * reward_w)
        rejected.append(1.3 * reward_l)
    margins = [win - lose for win, lose in zip(chosen, rejected, strict=True)]
    longer = [row[4] - row[5] for row in rows]

    def mean(values):
        return sum(values) / len(rows)

    expected = {
        "loss": preference_loss(pairs, config).mean().item(),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([m > 0 for m in margins]),
        "rewards/saturated": mean([s(-m) < 0.01 for m in margins]),
        "logps/chosen": mean([row[0] for row in rows]),
        "logps/rejected": mean([row[1] for row in rows]),
        "logps/chosen_per_token": mean([row[0] / row[4] for row in rows]),
        "logps/rejected_per_token": mean([row[1] / row[5] for row in rows]),
        "logps/accuracies": mean([row[0] > row[1] for row in rows]),
        "logps/chosen_change": mean([row[0] - row[2] for row in rows]),
        "logps/rejected_change": mean([row[1] - row[3] for row in rows]),
        "rewards/length_correlation": torch.corrcoef(torch.tensor([margins, longer], dtype=torch.float64))[0, 1].item(),
    }
    actual = metrics_of(pairs, config)
    assert set(actual) == MEANS | {"rewards/length_correlation"}
    assert actual == pytest.approx(expected, rel=1e-9)


def test_saturated_pairs_have_under_one_percent_of_the_gradient():
    for margin, saturated in ((SATURATED - 0.01, 0), (SATURATED + 0.01, 1), (-100.0, 0)):
        pairs = with_grad(make_pairs([-1.0 + margin], [-1.0], [-1.0], [-1.0], dtype=torch.float64))
        config = LossConfig(beta=1.0)
        preference_loss(pairs, config).sum().backward()
        assert (pairs.chosen_logps.grad.abs() < 0.01 * 1.0).item() == saturated
        assert metrics_of(pairs, config)["rewards/saturated"] == saturated


def test_length_correlation_is_left_out_where_there_is_none():
    config, a = LossConfig(beta=1.0), [-1.0, -2.0, -3.0]
    same_margin = make_pairs(a, a, [-1.1] * 3, [-1.1] * 3, [1, 2, 3], [1, 1, 1])
    same_lengths = make_pairs(a, [-1.0] * 3, [-1.1] * 3, [-1.1] * 3, [9, 9, 9], [2, 2, 2])
    one_pair = make_pairs([-1.0], [-2.0], [-1.0], [-1.0], [3], [2])
    for pairs in (same_margin, same_lengths, one_pair):
        assert set(metrics_of(pairs, config)) == MEANS
    rounding, names = sums_of(same_margin, config), list(COLUMNS)
    rounding[[names.index("rewards/margins"), names.index("margins_squared")]] = torch.tensor(
        [0.3, 0.03 * (1 + 1e-13)], dtype=torch.float64
    )  # three margins of .1, nearly
    assert set(metrics_from_sums(rounding.tolist())) == MEANS
    exact = make_pairs([0.0, -1.0, -2.0], [0.0] * 3, [0.0] * 3, [0.0] * 3, [9, 8, 7], [2, 2, 2])
    assert metrics_of(exact, config)["rewards/length_correlation"] == pytest.approx(1.0)
    assert metrics_of(swapped(exact), config)["rewards/length_correlation"] == pytest.approx(1.0)


def test_metrics_are_detached():
    pairs = with_grad(fixture())
    assert not sums_of(pairs, LossConfig()).requires_grad
    assert not any(reward.requires_grad for reward in rewards(pairs, LossConfig()))
    assert preference_loss(pairs, LossConfig()).requires_grad


def test_ipo_rewards_stay_sums():
    chosen, _ = rewards(fixture(), LossConfig(name="ipo"))
    assert_close(chosen, [-0.02, -0.02, -0.02, -0.01])

"""Preference losses: pure functions of the log-probabilities of pairs of answers, one loss a pair.

Notation of shapes, docstrings and equations:
    P       pairs
    w, l    the chosen and the rejected answer (the papers' winner and loser); |w|, |l| their lengths in tokens
    lp      log pi(y|x), in nats, summed over the tokens of the answer
    a       log pi(y|x) - log pi_ref(y|x), summed likewise: the log-ratio, 0 while the policy is the reference
    D       a_w - a_l, the margin
    s, e    the logistic sigmoid; label_smoothing

A new loss is a function whose arguments after `pairs` are the LossConfig fields it uses, with its own defaults; its
name in LossName; a line in LOSSES; and a row of golden values in tests/test_preference.py.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What P pairs score: log-probabilities in nats, each summed over the tokens of one answer. All of shape [P]."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor  # tokens of the answer, >= 1
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None  # None: no reference was run, for the losses that need none
    ref_rejected_logps: Tensor | None = None

    @classmethod
    def from_sequences(cls, logps: Tensor, ref_logps: Tensor | None, lengths: Tensor) -> Self:
        """Pairs of sums over sequences [2P], in the order `pack_pairs` lays them out: 2i is chosen, 2i + 1 rejected."""
        return cls(
            chosen_logps=logps[0::2],
            rejected_logps=logps[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            ref_chosen_logps=None if ref_logps is None else ref_logps[0::2],
            ref_rejected_logps=None if ref_logps is None else ref_logps[1::2],
        )

    @property
    def chosen_logratios(self) -> Tensor:
        """a_w"""
        assert self.ref_chosen_logps is not None, "this loss needs a reference, and these pairs have none"
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """a_l"""
        assert self.ref_rejected_logps is not None, "this loss needs a reference, and these pairs have none"
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margin(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios  # D

    @property
    def margin_per_token(self) -> Tensor:
        return self.chosen_logratios / self.chosen_lengths - self.rejected_logratios / self.rejected_lengths

    @property
    def chosen_logps_per_token(self) -> Tensor:
        return self.chosen_logps / self.chosen_lengths  # lp_w / |w|

    @property
    def rejected_logps_per_token(self) -> Tensor:
        return self.rejected_logps / self.rejected_lengths  # lp_l / |l|


# --- Against a reference


def sigmoid(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7); with label_smoothing, conservative DPO (Mitchell 2023).

    -(1 - e) log s(beta D) - e log s(-beta D)        https://ericmitchell.ai/cdpo.pdf, Eq. 3
    TRL since 0.29 ignores label_smoothing here; the original code, LLaMA-Factory and torchtune have it as above.
    """
    logits = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_norm(pairs: Pairs, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO (Tulu 3, Lambert et al. 2024, arXiv:2411.15124).

    -log s(beta (a_w / |w| - a_l / |l|))
    Same as open-instruct's `dpo_norm` (beta 5) and TRL's `sigmoid_norm`, whose default beta 0.1 is meant for sums.
    """
    return -F.logsigmoid(beta * pairs.margin_per_token)


def robust(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased when a share e < 0.5 of the labels is flipped.

    [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e)        unbounded below, unlike conservative DPO
    The same in TRL and ms-swift, whose default e is 0 (which is plain DPO); the paper's is 0.1.
    """
    logits = beta * pairs.margin
    unbiased = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return unbiased / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Hinge on the log-ratios: SLiC (Zhao et al. 2023, arXiv:2305.10425) as in RSO (Liu et al. 2023, arXiv:2309.06657).

    max(0, 1 - beta D)
    The same everywhere; SLiC itself has no reference, and a margin delta = 1 / beta.
    """
    return torch.relu(1 - beta * pairs.margin)


def ipo(pairs: Pairs, beta: float = 0.1, ipo_norm: Literal["mean", "sum"] = "mean") -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17; beta is the paper's tau).

    (a_w / |w| - a_l / |l| - 1 / (2 beta))^2        ipo_norm = sum: (D - 1 / (2 beta))^2
    The mean per token is what the authors confirmed to TRL; the original DPO code takes the sum.
    """
    margin = pairs.margin_per_token if ipo_norm == "mean" else pairs.margin
    return (margin - 1 / (2 * beta)) ** 2


def apo_zero(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7): chosen up, rejected down.

    1 - s(beta a_w) + s(beta a_l)
    As in TRL; for chosen answers that are better than the model's own.
    """
    return F.sigmoid(-beta * pairs.chosen_logratios) + F.sigmoid(beta * pairs.rejected_logratios)


def apo_down(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8): both down, rejected further.

    s(beta a_w) + 1 - s(beta D)
    As in TRL (the paper leaves out the constant 1); for chosen answers that are worse than the model's own.
    """
    return F.sigmoid(beta * pairs.chosen_logratios) + F.sigmoid(-beta * pairs.margin)


def exo_pair(pairs: Pairs, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO for pairs (Ji et al. 2024, arXiv:2402.00856, Eq. 16): the reverse KL from the smoothed label to the policy.

    q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = s(beta D)        needs e > 0
    The same in TRL, where label_smoothing is 0 by default and has to be given; 1e-3 is the paper's.
    """
    logits = beta * pairs.margin
    chosen = F.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = F.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def nca_pair(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv:2402.05369): also keeps the chosen answer's likelihood from falling.

    -log s(beta a_w) - 1/2 log s(-beta a_w) - 1/2 log s(-beta a_l)
    The same in TRL and ms-swift.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """BCO for pairs (Jung et al. 2024, arXiv:2404.04656): a classifier of good and bad; an upper bound of DPO.

    -log s(beta a_w - delta) - log s(-(beta a_l - delta)),  delta = 0
    As in TRL now. The paper, LLaMA-Factory and ms-swift shift by the running mean of the rewards, which makes the loss
    of a pair depend on the pairs before it; with delta = 0 it depends on this pair alone.
    """
    return -F.logsigmoid(beta * pairs.chosen_logratios) - F.logsigmoid(-beta * pairs.rejected_logratios)


def sppo_hard(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 and 0; 1 / beta is the paper's eta).

    (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2
    The same in TRL and ms-swift.
    """
    return (pairs.chosen_logratios - 0.5 / beta) ** 2 + (pairs.rejected_logratios + 0.5 / beta) ** 2


def discopop(pairs: Pairs, beta: float = 0.1, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss (Lu et al. 2024, arXiv:2406.08414, Eq. 5).

    -(1 - m) log s(x) + m exp(-x),  x = beta D,  m = s(x / tau)
    The same in TRL and ms-swift, where exp(-x) overflows from x = -89 on; in one exponent it stays finite for tau <= 1.
    Not monotonic: at D = 0 and tau = 0.05 its slope is +0.78 beta, so the very first steps may lower the margin.
    """
    logits = beta * pairs.margin
    exponential = torch.exp(F.logsigmoid(logits / discopop_tau) - logits)
    return exponential - F.sigmoid(-logits / discopop_tau) * F.logsigmoid(logits)


# --- Without a reference


def simpo(pairs: Pairs, beta: float = 2.0, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, Eq. 6).

    -log s(beta (lp_w / |w| - lp_l / |l|) - gamma)
    TRL's default beta is 0.1, too little per token. TRL and ms-swift add 1.0 * NLL of chosen; here that is sft_weight.
    """
    return -F.logsigmoid(beta * (pairs.chosen_logps_per_token - pairs.rejected_logps_per_token) - simpo_gamma)


def orpo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """ORPO's odds-ratio term (Hong et al. 2024, arXiv:2403.07691, Eq. 4 and 7; beta is the paper's lambda).

    -beta log s(logodds_w - logodds_l),  logodds = log(p / (1 - p)),  log p = lp / |y|
    The paper's loss adds the NLL of chosen: sft_weight is 1 by default. TRL's NLL counts the prompt's tokens too.
    """
    return -beta * F.logsigmoid(_log_odds(pairs.chosen_logps_per_token) - _log_odds(pairs.rejected_logps_per_token))


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0; from p = 1 - 1e-6 on it stays constant, where the true one grows to infinity."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


def cpo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """CPO's preference term (Xu et al. 2024, arXiv:2401.08417, Eq. 3): DPO with a uniform reference.

    -log s(beta (lp_w - lp_l))
    The paper's loss adds the NLL of chosen: sft_weight is 1 by default (TRL: cpo_alpha, a token mean).
    """
    return -F.logsigmoid(beta * (pairs.chosen_logps - pairs.rejected_logps))


# --- The table, the config, the loss


@dataclass(frozen=True)
class Loss:
    """One line of LOSSES."""

    function: Callable[..., Tensor]  # (pairs, and the fields of the config that it uses) -> losses [P]
    needs_reference: bool = True
    rewards_per_token: bool = False  # for the losses that compare log-probs per token: see `rewards`
    sft_weight: float = 0.0  # default of the config's field

    @property
    def defaults(self) -> dict[str, Any]:
        """The LossConfig fields this loss uses, as its signature says, each with the loss's own default."""
        parameters = [p for p in inspect.signature(self.function).parameters.values() if p.name != "pairs"]
        return {p.name: p.default for p in parameters} | {"sft_weight": self.sft_weight}


LossName = Literal[
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "discopop", "simpo", "orpo", "cpo",
]  # fmt: skip

LOSSES: dict[LossName, Loss] = {
    "sigmoid": Loss(sigmoid),
    "sigmoid_norm": Loss(sigmoid_norm, rewards_per_token=True),
    "robust": Loss(robust),
    "hinge": Loss(hinge),
    "ipo": Loss(ipo),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "exo_pair": Loss(exo_pair),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "discopop": Loss(discopop),
    "simpo": Loss(simpo, needs_reference=False, rewards_per_token=True),
    "orpo": Loss(orpo, needs_reference=False, rewards_per_token=True, sft_weight=1.0),
    "cpo": Loss(cpo, needs_reference=False, sft_weight=1.0),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which preference loss, and its hyperparameters; one that is not given takes the chosen loss's own default."""

    name: LossName = "sigmoid"
    """Preference loss. simpo, orpo and cpo run no reference."""
    beta: float | None = None
    """Strength of the pull towards the reference, > 0, per nat (orpo: weight of the odds ratio). Default: 0.1; 2.0 for
    simpo and 5.0 for sigmoid_norm, which compare log-probs per token."""
    label_smoothing: float | None = None
    """Assumed share of flipped labels, 0 to 0.5. Used by sigmoid (default 0), robust (0.1; below 0.5) and exo_pair
    (0.001; above 0)."""
    sft_weight: float | None = None
    """Weight, >= 0, of the added negative log-likelihood of the chosen answer: nats per token, mean over the pairs of
    the step. Default: 0; 1.0 for orpo and cpo."""
    ipo_norm: Literal["mean", "sum"] | None = None
    """Used by ipo: log-ratios per token (mean, the default) or per answer (sum)."""
    simpo_gamma: float | None = None
    """Used by simpo: target margin of the rewards, >= 0. Default: 0.5."""
    discopop_tau: float | None = None
    """Used by discopop: temperature of the modulation, in (0, 1]. Default: 0.05."""

    def __post_init__(self):
        if self.name not in LOSSES:
            raise ValueError(f"loss.name: must be one of {', '.join(LOSSES)}, got {self.name!r}; choose one of them")
        name, own = self.name, LOSSES[self.name].defaults
        for field, is_valid, rule in (
            ("beta", lambda x: 0 < x < math.inf, "> 0"),
            ("label_smoothing", lambda e: 0 <= e <= 0.5, "in [0, 0.5]"),
            ("label_smoothing", lambda e: name != "robust" or e < 0.5, "< 0.5 for robust (it divides by 1 - 2e)"),
            ("label_smoothing", lambda e: name != "exo_pair" or e > 0, "> 0 for exo_pair (it takes the logarithm)"),
            ("sft_weight", lambda x: 0 <= x < math.inf, ">= 0"),
            ("ipo_norm", lambda x: x in ("mean", "sum"), "mean or sum"),
            ("simpo_gamma", lambda x: 0 <= x < math.inf, ">= 0"),
            ("discopop_tau", lambda x: 0 < x <= 1, "in (0, 1]"),
        ):
            value = getattr(self, field)
            if value is not None and not is_valid(value):
                remedy = f"for {name}'s own default, {own[field]}" if field in own else f"since {name} does not use it"
                raise ValueError(f"loss.{field}: must be {rule}, got {value}; leave it out {remedy}")

    @property
    def values(self) -> dict[str, Any]:
        """Every field the loss uses: as given, else the loss's own default."""
        own = LOSSES[self.name].defaults
        return own | {field: getattr(self, field) for field in own if getattr(self, field) is not None}

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields that were given although the loss does not use them."""
        given = (field for field, value in vars(self).items() if field != "name" and value is not None)
        return tuple(field for field in given if field not in self.values)

    def resolved(self) -> "LossConfig":
        """The same config with every used field written out, as a run records it."""
        return replace(self, **self.values)


def preference_loss(pairs: Pairs, config: LossConfig) -> Tensor:
    """Losses [P]: the chosen loss plus sft_weight * -lp_w / |w|. The loop sums them and divides by the step's pairs.

    So the SFT term is the mean over pairs of the NLL per token, whatever the micro-batches: LLaMA-Factory's pref_ftx is
    alike; TRL's `sft` and ms-swift's rpo_alpha weigh tokens alike within a micro-batch, so long answers count more.
    """
    values = config.values
    sft_weight = values.pop("sft_weight")
    losses = LOSSES[config.name].function(pairs, **values)
    return losses - sft_weight * pairs.chosen_logps_per_token


# --- Metrics

SATURATED = math.log(99)
"""Reward margin, 4.6, from which on the gradient of `sigmoid`, s(-margin), is under 1 % of its largest."""


@torch.no_grad()
def rewards(pairs: Pairs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and of the rejected answers, [P] each, without gradient: beta a.

    Losses without a reference: beta lp, as TRL. Losses that compare log-probs per token: divided by the length, as TRL
    does for simpo and orpo (for sigmoid_norm TRL logs the sum, whose sign may differ from the loss's own margin).
    """
    loss, beta = LOSSES[config.name], config.values["beta"]
    if loss.needs_reference:
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    else:
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    if loss.rewards_per_token:
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    return beta * chosen, beta * rejected


@dataclass(frozen=True)
class _Scored:
    """Pairs with their losses and rewards, all of shape [P], the rewards in float64."""

    pairs: Pairs
    losses: Tensor
    chosen: Tensor
    rejected: Tensor

    @cached_property
    def margins(self) -> Tensor:
        return self.chosen - self.rejected

    @cached_property
    def longer(self) -> Tensor:
        """|w| - |l|"""
        return self.pairs.chosen_lengths - self.pairs.rejected_lengths

    def change(self, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """Of log-probabilities since the start; nan without a reference."""
        return torch.full_like(self.losses, math.nan) if ref_logps is None else logps - ref_logps


COLUMNS: dict[str, Callable[[_Scored], Tensor]] = {
    "num_pairs": lambda scored: torch.ones_like(scored.losses),
    "loss": lambda scored: scored.losses,
    "rewards/chosen": lambda scored: scored.chosen,
    "rewards/rejected": lambda scored: scored.rejected,
    "rewards/margins": lambda scored: scored.margins,
    "rewards/accuracies": lambda scored: scored.margins > 0,
    "rewards/saturated": lambda scored: scored.margins > SATURATED,
    "logps/chosen": lambda scored: scored.pairs.chosen_logps,
    "logps/rejected": lambda scored: scored.pairs.rejected_logps,
    "logps/chosen_per_token": lambda scored: scored.pairs.chosen_logps_per_token,
    "logps/rejected_per_token": lambda scored: scored.pairs.rejected_logps_per_token,
    "logps/accuracies": lambda scored: scored.pairs.chosen_logps > scored.pairs.rejected_logps,
    "logps/chosen_change": lambda scored: scored.change(scored.pairs.chosen_logps, scored.pairs.ref_chosen_logps),
    "logps/rejected_change": lambda scored: scored.change(scored.pairs.rejected_logps, scored.pairs.ref_rejected_logps),
    "longer": lambda scored: scored.longer,
    "margins_squared": lambda scored: scored.margins**2,
    "longer_squared": lambda scored: scored.longer.double() ** 2,
    "margins_times_longer": lambda scored: scored.margins * scored.longer,
}
"""What is summed over pairs: their number, the metrics, and four moments for rewards/length_correlation."""
MOMENTS = ("longer", "margins_squared", "longer_squared", "margins_times_longer")
NUM_SUMS = len(COLUMNS)


@torch.no_grad()
def metric_sums(pairs: Pairs, losses: Tensor, config: LossConfig) -> Tensor:
    """Sums of the COLUMNS over pairs, float64 [NUM_SUMS]. Add over micro-batches and ranks."""
    scored = _Scored(pairs, losses, *(reward.double() for reward in rewards(pairs, config)))
    return torch.stack([column(scored).double() for column in COLUMNS.values()]).sum(dim=1)


def metrics_from_sums(sums: Sequence[float]) -> dict[str, float]:
    """Means over the pairs (at least one) that `metric_sums` summed, and rewards/length_correlation.

    The latter is the correlation (-1 to 1) of the reward margin with |w| - |l|: near 1 the policy learns length. It is
    left out where there is none, because all margins or all length differences are equal; and so is every metric that
    is nan, as changes are without a reference, but the loss.
    """
    totals = dict(zip(COLUMNS, sums, strict=True))
    num_pairs = totals.pop("num_pairs")
    metrics = {name: total / num_pairs for name, total in totals.items()}
    longer, margin_sq, longer_sq, product = (metrics.pop(name) for name in MOMENTS)
    margin = metrics["rewards/margins"]
    margin_var, longer_var = margin_sq - margin**2, longer_sq - longer**2
    if margin_var > 1e-9 * margin_sq and longer_var > 1e-9 * longer_sq:  # else they are rounding
        metrics["rewards/length_correlation"] = (product - margin * longer) / math.sqrt(margin_var * longer_var)
    return {name: value for name, value in metrics.items() if not math.isnan(value) or name == "loss"}

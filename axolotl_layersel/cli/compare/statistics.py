"""The statistics of a comparison: paired differences over seeds, their intervals, and the standing of each arm.

Every arm is trained with the same seeds. An arm's loss at a seed is modelled as an effect of the arm, an effect of the
seed, and noise of one variance for all arms: two or three seeds say too little about the variance of a single arm. The
variance is that of the residuals of this two-way layout. An arm that draws its layers at random trains other layers
with each seed, so its losses scatter more, and it has a variance of its own.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Final

from axolotl_layersel.cli.compare.figures import LORA, RANDOM, CurvePoint

LEVEL: Final = 0.95

# The loss of each arm by seed.
Losses = Mapping[str, Mapping[int, float]]

# The standings of an arm.
BETTER: Final = "better"  # the whole claim is below plain LoRA, and for an arm that chooses also below a random choice
CHANCE: Final = "as random"  # the whole claim is below plain LoRA, and a random choice may be as good
UNCONTROLLED: Final = "no control"  # the whole claim is below plain LoRA, and no random choice was measured
OPEN: Final = "open"  # the claim includes 0
WORSE: Final = "worse"  # the whole claim is above plain LoRA
UNKNOWN: Final = "unknown"  # there is no interval, because fewer than two seeds are shared
# An arm with one of these may be used. Whether a random choice is as good does not decide it: a few unlucky draws make
# that open, also where the arm is far below plain LoRA.
BELOW: Final = (BETTER, CHANCE, UNCONTROLLED)


@dataclass(frozen=True)
class Spread:
    """An estimate of a variance, and its degrees of freedom."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Interval:
    """An interval of the difference of two losses."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean of the paired differences of two arms' losses over the seeds that both have.

    Attributes:
        mean: the mean difference; below 0 if the first arm is better.
        pairs: the number of seeds.
        reference: the mean loss of the second arm over these seeds.
        interval: the 95 % interval; None with fewer than two seeds.
        claim: the interval of the same level for all comparisons together (Bonferroni); None with the other.
    """

    mean: float
    pairs: int
    reference: float
    interval: Interval | None = None
    claim: Interval | None = None


@dataclass(frozen=True)
class Judgement:
    """What the losses say about an arm.

    Attributes:
        to_lora: the difference to plain LoRA; None without a shared seed.
        to_random: the difference to a random choice; None for an arm that does not choose, or without a shared seed.
        standing: one of the constants of this module.
    """

    to_lora: Difference | None
    to_random: Difference | None
    standing: str


# --- Variances --------------------------------------------------------------------------------------------------------


def find_quantile(freedom: float, comparisons: int = 1) -> float:
    """Return the quantile of Student's t for two-sided intervals that hold together at ``LEVEL`` (Bonferroni)."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - (1 - LEVEL) / (2 * comparisons)))


def pool(losses: Losses) -> Spread | None:
    """Return the variance of the residuals of the two-way layout of arms and seeds; None without any freedom.

    If no cell is missing, the A arms and S seeds leave (A − 1)(S − 1) degrees of freedom.
    """
    import numpy

    cells = [(arm, seed, loss) for arm, by_seed in losses.items() for seed, loss in by_seed.items()]
    arms = {arm: column for column, arm in enumerate(losses)}
    seeds = {seed: len(arms) + column for column, seed in enumerate(sorted({seed for _, seed, _ in cells}))}
    design = numpy.zeros((len(cells), len(arms) + len(seeds)))
    for row, (arm, seed, _) in enumerate(cells):
        design[row, [arms[arm], seeds[seed]]] = 1
    values = numpy.array([loss for _, _, loss in cells])
    if not cells:
        return None
    values = values - values.mean()  # all losses are close to each other
    effects, _, rank, _ = numpy.linalg.lstsq(design, values, rcond=None)
    freedom = len(cells) - int(rank)
    return Spread(float(((values - design @ effects) ** 2).sum() / freedom), freedom) if freedom else None


@dataclass
class Noise:
    """The variances of the losses of a comparison.

    Attributes:
        losses: the loss of each arm by seed.
        drawn: the arms that draw their layers at random.
        steady: the variance of the noise of the other arms; None if it cannot be estimated.
    """

    losses: Losses
    drawn: Collection[str]
    steady: Spread | None = field(init=False)

    def __post_init__(self) -> None:
        self.steady = pool({arm: by_seed for arm, by_seed in self.losses.items() if arm not in self.drawn})

    def find_spread(self, arm: str, other: str) -> Spread | None:
        """Return the variance of the difference of two arms at one seed; None if it cannot be estimated."""
        drawn = [each for each in (arm, other) if each in self.drawn]
        if not drawn:
            return Spread(2 * self.steady.variance, self.steady.freedom) if self.steady else None
        parts: list[Spread] = []
        for each in drawn:
            own, complete = self.find_own_spread(each)
            if own is None:
                return None
            parts.append(own)
            # The mean of the complete arms, from which the drawn arm's differences are taken, has noise as well.
            share = 1 - 1 / complete
            if len(drawn) == 1 and share and self.steady:
                parts.append(Spread(self.steady.variance * share, self.steady.freedom))
        return add_spreads(parts)

    def find_own_spread(self, arm: str) -> tuple[Spread | None, int]:
        """Return the variance of a drawn arm's difference from the mean of the arms with all of its seeds.

        It is independent of the residuals among these arms. The second value is their number.
        """
        steady = [by_seed for name, by_seed in self.losses.items() if name not in self.drawn]
        seeds = [seed for seed in self.losses[arm] if seed in self.losses.get(LORA, {})]
        complete = [by_seed for by_seed in steady if seeds and by_seed.keys() >= set(seeds)]
        if len(seeds) < 2:
            return None, len(complete)
        distances = [self.losses[arm][seed] - fmean(by_seed[seed] for by_seed in complete) for seed in seeds]
        own = variance(distances)
        if self.steady:  # drawing layers adds to the noise of training, and never takes from it
            own = max(own, self.steady.variance * (1 + 1 / len(complete)))
        return Spread(own, len(seeds) - 1), len(complete)


def add_spreads(parts: Sequence[Spread]) -> Spread:
    """Return the sum of independent variances, with the degrees of freedom by Welch and Satterthwaite."""
    total = sum(part.variance for part in parts)
    if total == 0:
        return Spread(0.0, min(part.freedom for part in parts))
    return Spread(total, total**2 / sum(part.variance**2 / part.freedom for part in parts))


# --- Decision ---------------------------------------------------------------------------------------------------------


def differ(noise: Noise, arm: str, other: str, comparisons: int = 1) -> Difference | None:
    """Return the difference of an arm's loss from another arm's; None without a shared seed.

    ``comparisons``: the number of intervals that ``claim`` holds together with.
    """
    first, second = noise.losses.get(arm, {}), noise.losses.get(other, {})
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    mean, reference = fmean(first[seed] - second[seed] for seed in seeds), fmean(second[seed] for seed in seeds)
    spread = noise.find_spread(arm, other) if len(seeds) > 1 else None
    if spread is None:
        return Difference(mean, len(seeds), reference)
    error = (spread.variance / len(seeds)) ** 0.5
    halves = [find_quantile(spread.freedom, number) * error for number in (1, comparisons)]
    interval, claim = (Interval(mean - half, mean + half) for half in halves)
    return Difference(mean, len(seeds), reference, interval, claim)


def judge(losses: Losses, choosing: Collection[str] = (), drawn: Collection[str] = (RANDOM,)) -> dict[str, Judgement]:
    """Return what the losses say about each arm but ``lora``.

    Args:
        losses: the finite loss of each arm by seed; an arm without any counts as a comparison too.
        choosing: the arms that choose layers by the data, which are compared with ``random`` as well.
        drawn: the arms that draw their layers at random.
    """
    noise = Noise(losses, drawn)
    others = [arm for arm in losses if arm != LORA]
    judgements = {}
    for arm in others:
        to_lora = differ(noise, arm, LORA, len(others))
        to_random = differ(noise, arm, RANDOM) if arm in choosing else None
        judgements[arm] = Judgement(to_lora, to_random, find_standing(to_lora, to_random, arm in choosing))
    return judgements


def find_standing(to_lora: Difference | None, to_random: Difference | None, chooses: bool) -> str:
    """Return the standing of an arm."""
    if to_lora is None or to_lora.claim is None:
        return UNKNOWN
    if to_lora.claim.low > 0:
        return WORSE
    if to_lora.claim.high >= 0:
        return OPEN
    if not chooses:
        return BETTER
    if to_random is None or to_random.interval is None:
        return UNCONTROLLED
    return BETTER if to_random.interval.high < 0 else CHANCE


def find_best(judgements: Mapping[str, Judgement]) -> str:
    """Return the arm with the lowest loss of those whose whole claim is below plain LoRA, or ``lora``."""
    gains = {arm: each.to_lora.mean for arm, each in judgements.items() if each.standing in BELOW and each.to_lora}
    return min(gains, key=lambda arm: gains[arm], default=LORA)


# --- Time -------------------------------------------------------------------------------------------------------------


def find_loss_at(curve: Sequence[CurvePoint], seconds_choosing: float, seconds: float) -> float | None:
    """Return the validation loss of a cell ``seconds`` after its start, between evaluations by a straight line.

    Until layers are chosen, it is the loss before training. None if the curve does not reach so far.
    """
    times = [seconds_choosing + point.seconds for point in curve]
    after = bisect_left(times, seconds)
    if after == len(curve):
        return None
    if after == 0:
        return curve[0].validation_loss if curve[0].step == 0 or times[0] == seconds else None
    part = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return (1 - part) * curve[after - 1].validation_loss + part * curve[after].validation_loss

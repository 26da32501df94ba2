"""How much of the base model's quality a compressed model keeps, with confidence bounds."""

import math
from dataclasses import dataclass

import torch

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """One measurement of one or two models.

    Attributes:
        name: of the text or task.
        unit: `perplexity`, of which less is better, or the name of a score of which more is better.
        count: windows or questions.
        value: of the judged model.
        base: of its base; None without one.
        recovery: share of the base's quality that is kept: the base's perplexity over the model's, or the model's score
            over the base's; NaN where the base's score is 0.
        low: end of the interval that holds the recovery on other samples of this kind with a probability of LEVEL.
        high: the other end.
    """

    name: str
    unit: str
    count: int
    value: float
    base: float | None = None
    recovery: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all measured values are numbers."""
        return all(math.isfinite(v) for v in (self.value, self.base) if v is not None)


def compared(name: str, unit: str, values: torch.Tensor, base: torch.Tensor | None) -> Row:
    """The row of a text or task.

    Both models are measured on the same samples, so the interval is that of a paired bootstrap.

    Args:
        name: of the text or task.
        unit: as of `Row`.
        values: float64 [count], of each window its loss in nats per token, or of each question its score.
        base: the same of the base.
    """
    of_losses = unit == "perplexity"

    def total(mean: torch.Tensor) -> torch.Tensor:
        return mean.exp() if of_losses else mean

    value = total(values.mean()).item()
    if base is None:
        return Row(name, unit, len(values), value)
    pairs = torch.stack([values, base], -1)

    def recovery(means: torch.Tensor) -> torch.Tensor:
        mine, theirs = total(means[..., 0]), total(means[..., 1])
        return theirs / mine if of_losses else mine / theirs

    generator = torch.Generator().manual_seed(0)
    means = [pairs[torch.randint(len(pairs), (len(pairs),), generator=generator)].mean(0) for _ in range(DRAWS)]
    spread = recovery(torch.stack(means))
    ends = spread.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=spread.dtype))
    low, high = ends.tolist()
    return Row(name, unit, len(values), value, total(base.mean()).item(), recovery(pairs.mean(0)).item(), low, high)


def table(rows: list[Row]) -> list[str]:
    """The lines of a table."""
    width = max(len(f"{row.name}, {row.unit}") for row in rows)
    lines = [f"{'':{width}}  {'samples':>7}  {'base':>9}  {'compressed':>10}  {'recovery':>8}  95 % interval"]
    for row in rows:
        base = "" if row.base is None else f"{row.base:9.4g}"
        kept = "" if row.recovery is None else f"{row.recovery:8.1%}"
        bounds = "" if row.low is None else f"{row.low:.1%} to {row.high:.1%}"
        name = f"{row.name}, {row.unit}"
        lines.append(f"{name:{width}}  {row.count:7}  {base:>9}  {row.value:10.4g}  {kept:>8}  {bounds}".rstrip())
    return lines

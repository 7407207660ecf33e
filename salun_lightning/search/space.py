"""Where good values of options are looked for."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from salun_lightning.comparison.settings import EMPTY

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_EDGE = 0.05


@dataclass(frozen=True)
class Choices:
    """A list of values.

    Args:
        values: The values.
    """

    values: tuple[Any, ...]

    @property
    def size(self) -> float:
        """The number of values."""
        return len(self.values)

    @property
    def all(self) -> tuple[Any, ...]:
        """The values."""
        return self.values

    def at(self, fraction: float) -> Any:
        """The value at a fraction of the way, from 0 to 1."""
        return self.values[min(int(fraction * len(self.values)), len(self.values) - 1)]

    def reaching(self, values: Sequence[Any]) -> "Choices":
        """The list with further values that are not in it."""
        longer = list(self.values)
        for value in values:
            if value not in longer:
                longer.append(value)
        return Choices(tuple(longer))

    def sampled(self, value: Any) -> Any:
        """What a value stands for that Optuna has drawn."""
        return json.loads(value)

    def drawn(self, value: Any) -> Any:
        """The reverse: Optuna takes neither lists nor dictionaries. What is equal, such as 10 and 10.0, is the same."""
        return json.dumps(next(known for known in self.values if known == value))

    def distribution(self) -> "BaseDistribution":
        """The same, for Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([json.dumps(value) for value in self.values])


@dataclass(frozen=True)
class Range:
    """A range of numbers.

    Args:
        low: The smallest.
        high: The largest.
        log: Whether it is the logarithm that is spread evenly.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def size(self) -> float:
        """The number of values."""
        return self.high - self.low + 1 if self.whole else math.inf

    @property
    def all(self) -> tuple[Any, ...]:
        """The values, if they are whole numbers."""
        return tuple(range(int(self.low), int(self.high) + 1))

    def reaching(self, values: Sequence[float]) -> "Range":
        """The range with its ends moved out to values that lie outside."""
        fitting = [value for value in values if isinstance(value, int | float) and (value > 0 or not self.log)]
        return replace(self, low=min(self.low, *fitting), high=max(self.high, *fitting))

    def at(self, fraction: float) -> Any:
        """The value at a fraction of the way, from 0 to 1."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        value = low + fraction * (high - low)
        return self.sampled(min(max(math.exp(value) if self.log else value, self.low), self.high))

    def sampled(self, value: Any) -> Any:
        """A value as it is written: three digits are enough for a range."""
        if self.whole:
            return round(value)
        digits = 2 - math.floor(math.log10(abs(value) if self.log else self.high - self.low))
        return min(max(round(float(value), digits), self.low), self.high)

    def drawn(self, value: Any) -> Any:
        """The reverse."""
        return value

    def distribution(self) -> "BaseDistribution":
        """The same, for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def widened(self, value: float) -> "Range":
        """The range with the end moved out that a value lies at: tenfold where it is logarithmic, else the range is doubled.

        What is not negative stays so, and what lies between 0 and 1 stays there: such ranges are fractions and rates. A value
        lies at an end within 5 % of the range.
        """
        low, high, at = self._scaled(self.low), self._scaled(self.high), self._scaled(value)
        width = high - low
        down, up = (self.low / 10, self.high * 10) if self.log else (self.low - width, self.high + width)
        if not self.log and self.low >= 0:
            down, up = max(down, 0), min(up, 1) if self.high <= 1 else up
        if self.whole:
            down, up = max(math.ceil(down), 1 if self.low >= 1 else -math.inf), math.floor(up)  # 0 epochs are no training
        if at <= low + _EDGE * width:
            return replace(self, low=down)
        return replace(self, high=up) if at >= high - _EDGE * width else self

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


Space = dict[str, Choices | Range]
"""What is tried of each option."""


def read_space(found: Any, defaults: Mapping[str, Any]) -> Space:
    """The space that a configuration describes under ``search``. The default of each option belongs to it.

    Args:
        found: Of each option a list of values, or ``{low, high, log}``.
        defaults: The values of all options of ``fit`` by name, where nothing is searched.

    Raises:
        ValueError: It describes none.
    """
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            "It has no search space. Add a line `search: {option: [values], option: {low: ..., high: ..., log: true}}`."
        )
    space: Space = {}
    for option, values in found.items():
        default = default_of(option, values, defaults)
        if isinstance(values, list) and values:
            space[option] = Choices(()).reaching([default, *values])
        elif isinstance(values, Mapping) and {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
            space[option] = _range(option, values, default)
        else:
            raise ValueError(f"Its search space for '{option}' is '{values}'. Give a list of values, or low, high and log.")
    return space


def default_of(option: str, values: Any, defaults: Mapping[str, Any]) -> Any:
    """The default of an option.

    Args:
        option: Its name.
        values: What is tried of it: if these are lists, what is empty is one, too.
        defaults: By name; of a list each element is there (``option.0``).

    Raises:
        ValueError: There is no such option, or it is neither a value nor a list of values.
    """
    if option in defaults:
        lists = isinstance(values, list) and any(isinstance(value, list) for value in values)
        return [] if lists and defaults[option] == EMPTY else defaults[option]
    inside = [name for name in defaults if name.startswith(f"{option}.")]
    if not inside:
        raise ValueError(f"Its search space names '{option}', which is no option of this run. Correct it under 'search'.")
    if inside != [f"{option}.{number}" for number in range(len(inside))]:
        raise ValueError(f"Its search space names '{option}', which holds further options: {', '.join(inside[:3])}. Name one.")
    return [defaults[name] for name in inside]


def _range(option: str, given: Mapping[str, Any], default: Any) -> Range:
    low, high, log = given["low"], given["high"], given.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in (low, high))
    if not numbers or not low < high or not isinstance(log, bool) or (log and not low > 0):
        raise ValueError(
            f"Its range for '{option}' is {dict(given)}. Give numbers, low below high, and above 0 where log is true."
        )
    if not isinstance(default, int | float) or isinstance(default, bool) or (log and not default > 0):
        raise ValueError(f"The default of '{option}' is {default}, which no such range holds. Give a list of values.")
    whole = all(isinstance(number, int) for number in (low, high, default))
    return Range(min(low, default), max(high, default), log, whole)


def reaching(space: Space, settings: Sequence[Mapping[str, Any]]) -> Space:
    """The space with ranges and lists that hold these settings, too.

    Args:
        space: The space.
        settings: Values of all its options.
    """
    return {option: part.reaching([values[option] for values in settings]) for option, part in space.items()}


def size(space: Space) -> float:
    """How many settings there are."""
    return math.prod(part.size for part in space.values())


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """All settings of a finite space."""
    for values in itertools.product(*(part.all for part in space.values())):
        yield dict(zip(space, values, strict=True))


def spread(space: Space, number: int) -> dict[str, Any]:
    """One of a sequence of settings that is spread evenly, however many are taken of it.

    It is the additive recurrence with the powers of the number that solves :math:`x^{d+1} = x + 1`, the golden ratio in one
    dimension.

    Args:
        space: The space, of d options.
        number: Which one, from 0.
    """
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (len(space) + 1))
    return {
        option: part.at((0.5 + (number + 1) * ratio**-power) % 1) for power, (option, part) in enumerate(space.items(), start=1)
    }


def planned(space: Space, budget: int) -> list[dict[str, Any]]:
    """What is tried after the default settings, before there is anything to learn from."""
    return list(grid(space)) if size(space) <= budget else [spread(space, number) for number in range((budget - 1) // 2)]


def wider(space: Space, best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ranges whose best value lies at one of their ends, as they are when they are widened there."""
    ranges = {option: (part, part.widened(best[option])) for option, part in space.items() if isinstance(part, Range)}
    return {option: vars(wider) for option, (part, wider) in ranges.items() if wider != part}

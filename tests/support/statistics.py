"""Does a sample fit its distribution?"""

from __future__ import annotations

import math
from collections.abc import Mapping


def chi_squared_fits(counts: Mapping[int, int], expected: Mapping[int, float]) -> bool:
    """Pearson's test at 1 in 10,000. Ids that are expected less than five times count as one; any id that is not expected fails."""
    draws = sum(counts.values())
    if not counts.keys() <= expected.keys():
        return False
    cells = [(counts.get(number, 0), draws * p) for number, p in expected.items() if draws * p >= 5]
    rest = (draws - sum(seen for seen, _ in cells), draws - sum(mean for _, mean in cells))
    cells += [rest] if rest[1] >= 5 else []
    squared = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the point that 1 in 10,000 exceeds.
    return squared < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3

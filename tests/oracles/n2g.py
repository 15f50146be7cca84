"""What N2G's patterns predict, by comparing every pattern with every place."""

WILDCARD = -1


def predict(patterns: list[tuple[int, ...]], values: list[float], text: list[int], at: int) -> float:
    """The value of the pattern that ends at `at`; 0 if none does.

    A walk from the last token backwards that tries exact tokens before wildcards meets patterns in lexicographic order
    of their (is a wildcard, ...) read backwards, in which a shorter one comes before those it begins.
    """
    fitting = []
    for number, (pattern, value) in enumerate(zip(patterns, values, strict=True)):
        n = len(pattern)
        if n > at + 1:
            continue
        window = text[at + 1 - n : at + 1]
        if all(p in (WILDCARD, t) for p, t in zip(pattern, window, strict=True)):
            fitting.append(([p == WILDCARD for p in reversed(pattern)], number, value))
    return min(fitting)[2] if fitting else 0.0

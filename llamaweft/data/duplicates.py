"""Rows that are there more than once: word for word, or nearly."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamaweft.data.leakage import ngrams
from llamaweft.errors import UserError

SHINGLE_WORDS = 5
FOUND_SHARE = 0.9
"""Of the pairs exactly as alike as the threshold, how many the search must come upon."""


def repeated(keys: np.ndarray) -> np.ndarray:
    """A mask over `keys` (64-bit hashes in the order of the rows): True for all but the first of
    equal ones."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    mask = np.zeros(len(keys), bool)
    mask[order[1:][ordered[1:] == ordered[:-1]]] = True
    return mask


class NearDuplicates:
    """Finds rows that nearly repeat an earlier one: of the runs of five words that two texts have,
    they share at least `threshold` (Jaccard). Case and punctuation do not count.

    The share is estimated from `num_perm` minimal hashes of each text (A. Broder, "On the
    resemblance and containment of documents", 1997), with a standard error of
    sqrt(threshold (1 - threshold) / num_perm) at most: 0.035 for 0.8 and 128. Pairs are come upon
    by bands of these hashes, and each is then held against the threshold. A row that repeats an
    earlier one is not compared with later ones.

    Raises UserError when the library of these hashes is not installed.
    """

    def __init__(self, threshold: float, num_perm: int = 128, seed: int = 0) -> None:
        try:
            import rensa
        except ImportError:
            raise UserError(
                "data.clean: the step near_duplicates needs rensa; install it with "
                "pip install 'llamaweft[clean]'"
            ) from None
        self._num_perm, self._seed = num_perm, seed
        self._bands = _bands(threshold, num_perm)
        self._rensa: Any = rensa
        self._rows = rensa.RMinHashDeduplicator(threshold, num_perm, True, self._bands, seed)

    def add(self, index: int, text: str) -> int | None:
        """The first of the earlier rows that this one nearly repeats, or None: then later rows are
        compared with it too."""
        signature = self._rensa.RMinHash(self._num_perm, self._seed)
        signature.update(_shingles(text))
        earlier = self._rows.get_duplicates(signature)
        if earlier:
            return min(map(int, earlier))
        self._rows.add(str(index), signature)
        return None

    def estimate_bytes(self, rows: int) -> int:
        """What the search takes for so many rows at most, none of them removed; the length of their
        texts plays no part. Fitted to the growth of resident memory, which is greatest just after
        the tables of the bands have doubled: 3,110 bytes a row for 128 hashes in 16 bands."""
        return rows * (4 * self._num_perm + 130 * self._bands + 520)

    def announce(self, rows: int, free_bytes: int) -> str:
        """A sentence on the memory that the search takes. Raises UserError when it is not free."""
        needed = f"near-duplicate search over {rows:,} rows will take about "
        needed += _amount(self.estimate_bytes(rows))
        if self.estimate_bytes(rows) > free_bytes:
            raise UserError(
                f"{needed}, and {_amount(free_bytes)} are free; remove the step near_duplicates "
                "from data.clean, or give fewer rows or more memory"
            )
        return needed


def _shingles(text: str) -> list[bytes]:
    """Runs of five words, each as a hash of 8 bytes; a shorter text as a whole."""
    hashes = ngrams(text, SHINGLE_WORDS).tobytes()
    if not hashes:  # no words at all
        return [text.strip().encode("utf-8", "surrogatepass")]
    return [hashes[i : i + 8] for i in range(0, len(hashes), 8)]


def _bands(threshold: float, num_perm: int) -> int:
    """The fewest bands that come upon FOUND_SHARE of the pairs that are as alike as the threshold:
    b bands of r hashes find 1 - (1 - threshold^r)^b of them. Each band costs memory."""
    divisors = [bands for bands in range(1, num_perm + 1) if num_perm % bands == 0]
    return next(
        (b for b in divisors if 1 - (1 - threshold ** (num_perm // b)) ** b >= FOUND_SHARE),
        num_perm,
    )


def _amount(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.1f} {name}"

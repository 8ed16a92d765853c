"""Best fit leaves gaps where only short documents are left; exchanging documents closes them and saves whole rows."""

from bisect import bisect_right, insort

import numpy as np

from controlllm.data.pack import Bins, best_fit

ROUNDS = 3


def tighten(lengths: np.ndarray, bins: Bins, capacity: int) -> Bins:
    """The same documents in fewer bins where that is found, else `bins`; a function of its arguments alone.

    Some bins, spread over all, are taken apart. In every other one with a gap, a document is exchanged for one that is
    longer by the gap, or nearly, so that what was taken apart gets shorter; then it is packed again.
    """
    for _ in range(ROUNDS):
        tighter = _round(lengths, bins, capacity)
        if len(tighter) == len(bins):
            break
        bins = tighter
    return bins


def _round(lengths: np.ndarray, bins: Bins, capacity: int) -> Bins:
    surplus = len(bins) + int(-lengths.sum() // capacity)  # over what the tokens need
    count = min(2 * surplus + 2, len(bins) // 2)
    if surplus == 0 or count == 0:
        return bins
    documents = np.split(bins.items, bins.offsets[1:-1])
    apart = set(np.linspace(0, len(bins) - 1, count).astype(int).tolist())
    pool = _Pool(np.concatenate([documents[b] for b in sorted(apart)]), lengths)
    kept = [pool.close(documents[b], capacity) for b in range(len(bins)) if b not in apart]
    left = np.array(pool.documents(), np.int64)
    again = best_fit(lengths[left], capacity)
    if len(again) >= len(apart):
        return bins
    kept += np.split(left[again.items], again.offsets[1:-1])
    return Bins(np.cumsum([0, *map(len, kept)]), np.concatenate(kept))


class _Pool:
    """Documents to exchange for, by length."""

    def __init__(self, documents: np.ndarray, lengths: np.ndarray):
        self.lengths = lengths
        self.by_length: dict[int, list[int]] = {}
        for document in documents.tolist():
            self.by_length.setdefault(int(lengths[document]), []).append(document)
        self.sorted = sorted(self.by_length)

    def documents(self) -> list[int]:
        return [document for length in self.sorted for document in self.by_length[length]]

    def close(self, documents: np.ndarray, capacity: int) -> np.ndarray:
        """The bin with its gap closed as far as one document for another can do it, again and again."""
        sizes = self.lengths[documents].tolist()
        gap = capacity - sum(sizes)
        if not gap:
            return documents
        inside = documents.tolist()
        while gap and (found := self._best(sizes, gap)):
            place, longer = found
            gap -= longer - sizes[place]
            inside[place], sizes[place] = self._exchange(inside[place], sizes[place], longer), longer
        return np.array(inside, np.int64)

    def _best(self, sizes: list[int], gap: int) -> tuple[int, int] | None:
        """(place in the bin, length in the pool) of the exchange that closes most of the gap."""
        best, found = 0, None
        for size in dict.fromkeys(sizes):
            place = bisect_right(self.sorted, size + gap) - 1
            if place >= 0 and self.sorted[place] - size > best:
                best, found = self.sorted[place] - size, (sizes.index(size), self.sorted[place])
                if best == gap:
                    break
        return found

    def _exchange(self, document: int, length: int, longer: int) -> int:
        """Takes a document of length `longer` out and puts `document` in."""
        out = self.by_length[longer].pop()
        if not self.by_length[longer]:
            del self.by_length[longer]
            self.sorted.remove(longer)
        if length not in self.by_length:
            insort(self.sorted, length)
        self.by_length.setdefault(length, []).append(document)
        return out

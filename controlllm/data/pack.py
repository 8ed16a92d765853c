"""Exact best-fit-decreasing: whole documents into rows of a fixed length, with next to no padding."""

from bisect import bisect_left, insort


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of document indices; no bin holds more than `capacity` tokens, every document is in exactly one.

    Longest first, each into the fullest bin that still holds it; equal lengths keep their order, so that the result
    is a function of the lengths alone.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if not 0 < length <= capacity:
            raise ValueError(f"document {document} has {length} tokens; a row holds 1..{capacity}")
        place = bisect_left(room, (length, 0))
        if place < len(room):
            free, index = room.pop(place)
        else:
            free, index = capacity, len(bins)
            bins.append([])
        bins[index].append(document)
        if free > length:
            insort(room, (free - length, index))
    return bins

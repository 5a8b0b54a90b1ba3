"""When are chunks used again? Learnt while it happens, per class of chunks, for those that were evicted as well."""

from __future__ import annotations

from typing import NamedTuple

#: Classes are numbers below this.
CLASSES = 16
_CLASS_BITS = 4

#: Ages are counted in buckets: four to each doubling.
_PER_OCTAVE = 4
BUCKETS = _PER_OCTAVE * 48

#: Evidence that stands against what was seen: so many chunks that are used again with a chance that falls with age.
_PRIOR = 50.0
_PRIOR_HAZARD = 0.05 / _PER_OCTAVE
#: Uses again that must have been seen before anything is concluded.
_ENOUGH = 256
#: What has ended counts half once it weighs more than so many times what is still waited for: the load changes.
_MEMORY = 16
#: Those that are waited for are counted by class and time; the times get coarser when there are more counts than this.
_MAX_CELLS = 2048
_LEAST_INTERVAL = 1024


def bucket(age: int) -> int:
    """The bucket of an age of 1 or more (and below 2**48)."""
    octave = age.bit_length() - 1
    return octave * _PER_OCTAVE + (age << 2 >> octave & 3)


def _edge(number: int) -> float:
    """The age at which a bucket begins."""
    octave, quarter = divmod(number, _PER_OCTAVE)
    return float((1 << octave) * (_PER_OCTAVE + quarter)) / _PER_OCTAVE


_WIDTHS = [_edge(number + 1) - _edge(number) for number in range(BUCKETS)]


class _Evidence(NamedTuple):
    """What ``ReuseTimes`` had seen at a time, see there: what its conclusions are drawn from."""

    now: int
    used: list[list[float]]
    lost: list[list[float]]
    waiting: dict[int, int]
    coarse: int


class ReuseTimes:
    """The distribution of the time to the next use, per class, and what follows: how much a place is worth.

    ``worth[class][bucket(age)]`` is the Gittins index of something of this class and age: the best rate of hits per
    time that its place can bring, max over T of P(used again within T) / E[time until then, T at most]. Those that are
    still waited for are counted as having waited so far (they are censored), so nothing is biased towards short times.
    While too little is known it is one over the age: least recently used is worth least.
    """

    def __init__(self) -> None:
        self._worth = [[1.0 / _edge(number) for number in range(BUCKETS)]] * CLASSES
        #: What ``_worth`` is to be drawn from; None: it has been.
        self._evidence: _Evidence | None = None
        self.learnt = False
        #: Time from which on ``learn`` should be called.
        self.due = _LEAST_INTERVAL
        self._used = [[0.0] * BUCKETS for _ in range(CLASSES)]
        self._lost = [[0.0] * BUCKETS for _ in range(CLASSES)]
        self._waiting: dict[int, int] = {}  # by time >> _coarse, then class
        self._coarse = 0
        self._seen = 0

    @property
    def worth(self) -> list[list[float]]:
        """See above, as of the last ``learn``. The first to ask after one waits for it, about a millisecond: who only
        uses chunks never asks."""
        if self._evidence is not None:
            self._worth, self._evidence = _conclusions(self._evidence), None
        return self._worth

    def began(self, number: int, now: int) -> None:
        """Something of class ``number`` was used at ``now`` and is waited for."""
        cell = now >> self._coarse << _CLASS_BITS | number
        waiting = self._waiting
        if cell in waiting:
            waiting[cell] += 1
            return
        waiting[cell] = 1
        if len(waiting) > _MAX_CELLS:
            self._coarsen()

    def again(self, number: int, following: int, since: int, now: int, count: int) -> None:
        """``count`` of class ``number`` were used again and are waited for in class ``following``: the first began at
        ``since`` and was used at ``now``, and each of the others one later than the one before it, both times."""
        self._used[number][bucket(now - since)] += count
        self._seen += count
        waiting, end, coarse = self._waiting, now + count, self._coarse
        last = (1 << coarse) - 1
        if not last and since + count <= now:  # of one use each: those that it took go, and as many new ones come
            cells = range(since << _CLASS_BITS | number, since + count << _CLASS_BITS | number, CLASSES)
            if len(waiting) + count - sum(map(waiting.__contains__, cells)) <= _MAX_CELLS:
                for cell in cells:
                    waiting.pop(cell, None)
                waiting.update(dict.fromkeys(range(now << _CLASS_BITS | following, end << _CLASS_BITS, CLASSES), 1))
                return
        while now < end:
            cell, into = since >> coarse << _CLASS_BITS | number, now >> coarse << _CLASS_BITS | following
            known, some = into in waiting, 1
            if last and (known or (cell != into and len(waiting) < _MAX_CELLS)):  # so many are of the same two cells
                some = min(end - now, (since | last) + 1 - since, (now | last) + 1 - now)
            since += some
            now += some
            if cell == into and known:
                continue
            left = waiting.pop(cell, 0)
            if left > some:
                waiting[cell] = left - some
            if known:
                waiting[into] += some
                continue
            waiting[into] = some
            if len(waiting) > _MAX_CELLS:
                self._coarsen()
                waiting, coarse = self._waiting, self._coarse
                last = (1 << coarse) - 1

    def used(self, number: int, since: int, now: int) -> None:
        """What began at ``since`` was used again, and is not waited for yet."""
        self._used[number][bucket(now - since)] += 1.0
        self._seen += 1
        cell = since >> self._coarse << _CLASS_BITS | number
        waiting = self._waiting
        left = waiting.get(cell, 0)
        if left > 1:
            waiting[cell] = left - 1
        elif left:
            del waiting[cell]

    def lost(self, number: int, since: int, now: int) -> None:
        """What began at ``since`` is waited for no longer."""
        self._lost[number][bucket(max(1, now - since))] += 1.0
        cell = since >> self._coarse << _CLASS_BITS | number
        left = self._waiting.get(cell, 0)
        if left > 1:
            self._waiting[cell] = left - 1
        elif left:
            del self._waiting[cell]

    def learn(self, now: int) -> None:
        """Conclusions are to be drawn, from what was seen until now, when ``worth`` is asked for next."""
        waiting = sum(self._waiting.values())
        self.due = now + max(_LEAST_INTERVAL, waiting // 16)
        if self._seen < _ENOUGH:
            return
        self.learnt = True
        used, lost = list(map(list, self._used)), list(map(list, self._lost))
        self._evidence = _Evidence(now, used, lost, dict(self._waiting), self._coarse)
        if sum(map(sum, used)) + sum(map(sum, lost)) > _MEMORY * waiting:
            for columns in (self._used, self._lost):
                for number, counts in enumerate(columns):
                    columns[number] = [count / 2 for count in counts]

    def _coarsen(self) -> None:
        while len(self._waiting) > _MAX_CELLS // 2:
            self._coarse += 1
            merged: dict[int, int] = {}
            for cell, count in self._waiting.items():
                time, number = cell >> _CLASS_BITS + 1, cell & CLASSES - 1
                cell = time << _CLASS_BITS | number
                merged[cell] = merged.get(cell, 0) + count
            self._waiting = merged


def _conclusions(seen: _Evidence) -> list[list[float]]:
    """The index of every class at every age. O(classes x buckets)."""
    top = min(bucket(seen.now) + 2 * _PER_OCTAVE, BUCKETS)
    risks = _at_risk(seen, top)
    used = [sum(column) for column in zip(*seen.used, strict=True)]
    risk = [sum(column) for column in zip(*risks, strict=True)]
    common = [(used[at] + _PRIOR * _PRIOR_HAZARD) / (risk[at] + _PRIOR) for at in range(top)]
    unknown = _indices([0.0] * top, [0.0] * top, common)
    return [
        _indices(counts, risks[number], common) if risks[number][0] else unknown
        for number, counts in enumerate(seen.used)
    ]


def _at_risk(seen: _Evidence, top: int) -> list[list[float]]:
    """Per class and bucket: how many came to this age. Those who ended in it without a use count half."""
    ended = [lost[:top] for lost in seen.lost]
    coarse = seen.coarse
    now = seen.now - (1 << coarse >> 1)
    for cell, count in seen.waiting.items():
        age = now - (cell >> _CLASS_BITS << coarse)
        if age < 1:
            age = 1
        octave = age.bit_length() - 1
        at = octave * _PER_OCTAVE + (age << 2 >> octave & 3)
        ended[cell & CLASSES - 1][at if at < top else -1] += count
    risks = []
    for used, others in zip(seen.used, ended, strict=True):
        risk = [0.0] * top
        risks.append(risk)
        if not any(used) and not any(others):
            continue
        beyond = 0.0
        for at in range(top - 1, -1, -1):
            beyond += used[at] + others[at]
            risk[at] = beyond - others[at] / 2
    return risks


def _indices(used: list[float], risk: list[float], common: list[float]) -> list[float]:
    """The index at each age: the steepest way up from it on the curve of hits over time held.

    ``hits`` and ``held`` are for one that begins; given that it came to an age, both grow by one factor beyond.
    The steepest ways are the tangents of the curve's upper hull, found from its end backwards.
    """
    points = [(0.0, 0.0)]
    x, y, alive = 0.0, 0.0, 1.0
    for seen, at_risk, shared, width in zip(used, risk, common, _WIDTHS, strict=False):
        hazard = (seen + _PRIOR * shared) / (at_risk + _PRIOR)
        if hazard > 1.0:
            hazard = 1.0
        x += alive * (1.0 - hazard / 2) * width
        y += alive * hazard
        alive *= 1.0 - hazard
        points.append((x, y))
    top_x, top_y = points.pop()  # of the hull; what it rests on is below
    hull: list[tuple[float, float]] = []
    worth = [0.0] * len(common)
    for at in range(len(common) - 1, -1, -1):
        x, y = points[at]
        steepest = (top_y - y) / (top_x - x) if top_x > x else 0.0
        while hull:
            to_x, to_y = hull[-1]
            other = (to_y - y) / (to_x - x) if to_x > x else 0.0
            if other < steepest:
                break
            top_x, top_y = hull.pop()
            steepest = other
        worth[at] = steepest
        hull.append((top_x, top_y))
        top_x, top_y = x, y
    return worth + [worth[-1]] * (BUCKETS - len(common))

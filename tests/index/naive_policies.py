"""Naive models of the eviction policies, in lists and dicts. The compiled policies must give the same results."""

import itertools
from collections.abc import Mapping, Sequence


class NaiveLRU:
    """LRU: slots by last use, coldest first."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def insert(self, slots: Sequence[int], evicted: Sequence[bool] = ()) -> None:
        self.remove(slots)
        self.order += list(dict.fromkeys(slots))[::-1]

    def access(self, slots: Sequence[int]) -> None:
        self.insert([slot for slot in slots if slot in self.order])

    def weigh(self, slots: Sequence[int], nbytes: Sequence[int]) -> None:
        pass

    def remove(self, slots: Sequence[int]) -> None:
        self.order = [slot for slot in self.order if slot not in slots]

    def pop_coldest(self, target: int, nbytes: Mapping[int, int], busy: set[int]) -> list[int]:
        popped: list[int] = []
        while sum(nbytes[slot] for slot in popped if slot not in busy) < target and self.order:
            popped.append(self.order.pop(0))
        return popped

    def __len__(self) -> int:
        return len(self.order)


class NaiveTwoQueues:
    """What S3-FIFO and ARC have in common: the queue of each held slot, parents, and what counts as a use.

    Queue 0 is S3-FIFO's small queue and ARC's T1; queue 1 is the main queue and T2. `ghosts` are the ghosts of each.
    """

    def __init__(self) -> None:
        self.queue: dict[int, int] = {}  # held slots -> 0 or 1
        self.parked: dict[int, int] = {}
        self.ghosts: tuple[list[int], list[int]] = ([], [])  # oldest first
        self.size: dict[int, int] = {}  # held, parked and ghosts
        self.parent: dict[int, int] = {}
        self.age: dict[int, int] = {}  # held and parked
        self.last: dict[int, str] = {}
        self.arrivals = 0

    def children(self, slot: int) -> list[int]:
        return [child for child in self.queue if self.parent.get(child) == slot]

    def held_bytes(self, queue: int) -> int:
        return sum(self.size[slot] for slot, own in self.queue.items() if own == queue)

    def ghost_bytes(self, queue: int) -> int:
        return sum(self.size[slot] for slot in self.ghosts[queue])

    def insert(self, slots: Sequence[int], evicted: Sequence[bool] = ()) -> None:
        fresh = set()
        for position, slot in enumerate(slots):
            if slot in self.parked:
                self.hold(slot, self.parked.pop(slot))
                self.last[slot] = "loaded"
            elif slot not in self.queue:
                ghost = self.ghost_of(slot) if evicted and evicted[position] else None
                if ghost is not None:
                    self.learn(slot, ghost)
                self.forget(slot)
                fresh.add(slot)
                self.arrivals += 1
                self.age[slot], self.size[slot], self.last[slot] = self.arrivals, 0, "saved"
                self.hold(slot, 0 if ghost is None else 1)
        self.use(slots, fresh, "loaded")

    def access(self, slots: Sequence[int]) -> None:
        self.use(slots, set(), "saved")

    def use(self, slots: Sequence[int], fresh: set[int], not_after: str) -> None:
        held = [slot for slot in slots if slot in self.queue]
        for parent, child in itertools.pairwise(held):
            if child not in self.parent and self.age[parent] < self.age[child]:
                self.parent[child] = parent
                self.became_parent(parent)
        for position in reversed(range(len(held))):
            slot = held[position]
            used = slot not in fresh and self.last[slot] != not_after
            if slot not in fresh and not_after == "loaded":
                self.last[slot] = "saved"
            elif slot not in fresh:
                self.last[slot] = "idle" if self.last[slot] == "saved" else "loaded"
            self.used(slot, used, any(self.queue[other] for other in held[position + 1 :]))

    def weigh(self, slots: Sequence[int], nbytes: Sequence[int]) -> None:
        for slot, size in zip(slots, nbytes, strict=True):
            if slot in self.size:
                self.size[slot] = size

    def remove(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot in self.queue:
                self.part(slot)
            self.parked.pop(slot, None)
            self.forget(slot)

    def ghost_of(self, slot: int) -> int | None:
        return next((queue for queue in (0, 1) if slot in self.ghosts[queue]), None)

    def forget(self, slot: int) -> None:
        for queue in (0, 1):
            if slot in self.ghosts[queue]:
                self.ghosts[queue].remove(slot)
        self.size.pop(slot, None)
        self.orphan(slot)

    def orphan(self, slot: int) -> None:
        self.age.pop(slot, None)
        self.parent = {child: parent for child, parent in self.parent.items() if slot not in (child, parent)}

    def pop_coldest(self, target: int, nbytes: Mapping[int, int], busy: set[int]) -> list[int]:
        popped: list[int] = []
        self.begin()
        while sum(nbytes[slot] for slot in popped if slot not in busy) < target and self.queue:
            slot = self.choose()
            queue = self.queue[slot]
            popped.append(slot)
            self.part(slot)
            if slot in busy:
                self.parked[slot] = queue
                continue
            self.orphan(slot)
            self.leave_ghost(slot, queue)
        self.trim()
        return popped

    def __len__(self) -> int:
        return len(self.queue)


class NaiveS3FIFO(NaiveTwoQueues):
    def __init__(self) -> None:
        super().__init__()
        self.ends: tuple[list[int], list[int]] = ([], [])  # slots without children, coldest first
        self.uses: dict[int, int] = {}

    def hold(self, slot: int, queue: int) -> None:
        self.queue[slot] = queue
        if slot in self.age and slot not in self.uses:
            self.uses[slot] = 0
        if not self.children(slot):
            self.ends[queue].append(slot)
        if slot in self.parent:
            self.became_parent(self.parent[slot])

    def became_parent(self, slot: int) -> None:
        for end in self.ends:
            if slot in end:
                end.remove(slot)

    def part(self, slot: int) -> None:
        queue = self.queue.pop(slot)
        if slot in self.ends[queue]:
            self.ends[queue].remove(slot)
        parent = self.parent.get(slot)
        if parent in self.queue and not self.children(parent):
            self.ends[self.queue[parent]].insert(0, parent)

    def orphan(self, slot: int) -> None:
        super().orphan(slot)
        self.uses.pop(slot, None)

    def learn(self, slot: int, ghost: int) -> None:
        pass

    def used(self, slot: int, used: bool, behind: bool) -> None:
        if self.queue[slot] == 1:
            self.uses[slot] = min(3, self.uses[slot] + used)
        elif used or behind:
            self.queue[slot] = 1
            if slot in self.ends[0]:
                self.ends[0].remove(slot)
                self.ends[1].append(slot)

    def begin(self) -> None:
        self.capacity = self.held_bytes(0) + self.held_bytes(1)

    def choose(self) -> int:
        small, main = self.ends
        while True:
            a_tenth = 10 * self.held_bytes(0) >= self.held_bytes(0) + self.held_bytes(1)
            if small and (a_tenth or not main):
                return small[0]
            if not self.uses[main[0]]:
                return main[0]
            self.uses[main[0]] -= 1
            main.append(main.pop(0))

    def leave_ghost(self, slot: int, queue: int) -> None:
        if queue == 0:
            self.ghosts[0].append(slot)
        else:
            del self.size[slot]

    def trim(self) -> None:
        while self.ghost_bytes(0) > self.capacity:
            self.forget(self.ghosts[0][0])


class NaiveARC(NaiveTwoQueues):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []  # all held slots, coldest first
        self.target = self.capacity = 0

    def hold(self, slot: int, queue: int) -> None:
        self.queue[slot] = queue
        self.order.append(slot)

    def became_parent(self, slot: int) -> None:
        pass

    def part(self, slot: int) -> None:
        del self.queue[slot]
        self.order.remove(slot)

    def learn(self, slot: int, ghost: int) -> None:
        step = self.size[slot] * max(1.0, self.ghost_bytes(1 - ghost) / max(self.ghost_bytes(ghost), 1))
        self.target = int(min(max(self.target + (-step if ghost else step), 0), self.capacity))

    def used(self, slot: int, used: bool, behind: bool) -> None:
        if used or behind:
            self.queue[slot] = 1
        self.order.remove(slot)
        self.order.append(slot)

    def begin(self) -> None:
        self.capacity = self.held_bytes(0) + self.held_bytes(1)

    def choose(self) -> int:
        ends = [next((slot for slot in self.order if self.queue[slot] == queue), None) for queue in (0, 1)]
        if self.held_bytes(0) <= self.target:
            ends.reverse()
        wanted, other = ends
        if wanted is None or (other is not None and self.children(wanted) and not self.children(other)):
            wanted = other
        assert wanted is not None
        return wanted

    def leave_ghost(self, slot: int, queue: int) -> None:
        self.ghosts[queue].append(slot)

    def trim(self) -> None:
        while self.held_bytes(0) + self.ghost_bytes(0) > self.capacity and self.ghosts[0]:
            self.forget(self.ghosts[0][0])
        while self.ghost_bytes(0) + self.ghost_bytes(1) > self.capacity and self.ghosts[1]:
            self.forget(self.ghosts[1][0])


NAIVE = {"arc": NaiveARC, "lru": NaiveLRU, "s3fifo": NaiveS3FIFO}

"""One seed: an owner and its clients, which die, lose each other and come back; checks what each client sees."""

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from kvortex.errors import OwnerError
from kvortex.types import SaveOutcome
from tests.simulation.owner_machine import Link, MachineLoop, MachineProcess
from tests.simulation.owner_player import Player
from tests.simulation.owner_pool import SimulatedOwner, SlowStore
from tests.simulation.owner_record import Record
from tests.simulation.owner_scenario import Scenario, shape_of
from tests.simulation.seeded_world import SeededWorld, order_of

LONGEST_LIFE_S = 3000.0
REST_S = 40.0  # in which all transfers settle, all that is dead ends, and all clients connect again
ASK_INTERVAL_S = 0.02  # of clients that wait for a tier: ten times as long as in earnest, and so ten times as fast
FIRST_RETRY_S = 0.1  # of clients that have lost their connection: so they have more of their short lives
PROBES = 8
MAX_PLAYERS = 8


class OwnerWorld(SeededWorld):
    """Owners that follow each other, and their clients."""

    runner = "tests.simulation.owner_run"
    _loop: MachineLoop

    def __init__(self, seed: int) -> None:
        self.scenario = Scenario.drawn(random.Random(f"{seed}/owner scenario"))
        loop = MachineLoop(shuffle=order_of(seed, shuffled=self.scenario.shuffled))
        super().__init__(seed, loop, self.scenario)
        self.record = Record()
        self._dice = random.Random(f"{seed}/owner")
        self._tokens = self._pids = 0
        self._owner: SimulatedOwner | None = None
        self._players: list[Player] = []
        self._lives: dict[Player, asyncio.Task[None]] = {}
        self._spawned: set[asyncio.Task[None]] = set()
        digests = [shape_of(number).digest for number in range(2)]
        nbytes = 1024 * self.scenario.store_blocks
        self._stores = {digest: SlowStore(nbytes, digest, random.Random(f"{seed}/store")) for digest in digests}

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Nothing of the real machine decides anything: neither clocks nor processes nor random numbers."""
        dice = random.Random(f"{self.seed}/salts")
        with contextlib.ExitStack() as patches:
            for name, value in (
                ("os.pidfd_open", self._loop.pidfd_open),
                ("os.urandom", dice.randbytes),
                ("kvortex.tiers.uses.time", SimpleNamespace(time=self._loop.time)),
                ("kvortex.owner.tiering.ASK_INTERVAL_S", ASK_INTERVAL_S),
                ("kvortex.owner.client.FIRST_RETRY_S", FIRST_RETRY_S),
            ):
                patches.enter_context(mock.patch(name, value))
            yield

    def _check(self) -> None:
        if self._loop.time() > 1000.0 + LONGEST_LIFE_S:
            self.complain("it does not come to an end")
        if self._owner is not None:
            self._owner.check()

    def _let_go(self) -> None:
        self._loop.close_descriptors()
        if self._owner is not None:
            self._owner._memory.close()

    def _may_log(self, text: str) -> bool:
        return "cannot be used" in text and "tier" in text

    # -- what players need -------------------------------------------------------------------------

    async def accept(self, process: MachineProcess, number: int) -> Link:
        """A connection to the owner that there is now.

        Raises:
            ConnectionRefusedError: there is none.
        """
        if self._owner is None or self._owner.is_over:
            raise ConnectionRefusedError("nobody listens")
        return await self._owner.accept(process, number)

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task."""
        task = self._loop.create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def new_token(self) -> int:
        """See `PlayersWorld`."""
        self._tokens += 1
        return self._tokens

    # -- life --------------------------------------------------------------------------------------

    async def _main(self) -> None:
        for store in self._stores.values():
            await store.open()
        self._start_owner()
        for _ in range(self.scenario.num_players):
            self._add_player()
        await self._let_things_happen()
        await self._come_to_rest()
        await self._end()
        self._complain_of_tasks()

    def _start_owner(self) -> None:
        dice = random.Random(self._dice.getrandbits(64))
        self._owner = SimulatedOwner(self.scenario, self._stores, self.record, dice, self.complain, self.tally)
        self.note("an owner begins")

    def _new_process(self) -> MachineProcess:
        self._pids += 1
        return MachineProcess(self._pids, self._loop)

    def _add_player(self) -> None:
        dice = self._dice
        number = len(self._players)
        living = [player for player in self._players if not player.is_dead]
        process = dice.choice(living).process if living and dice.random() < 0.2 else self._new_process()
        writer = self._new_process() if self.scenario.has_writers and dice.random() < 0.8 else process
        namespace = number % self.scenario.num_namespaces
        name = f"player {number}"
        player = Player(self, name, namespace, process, writer, random.Random(dice.getrandbits(64)))  # type: ignore[arg-type]
        self._players.append(player)
        self._lives[player] = self.spawn(self._live(player))

    async def _live(self, player: Player) -> None:
        await self._join(player)
        await player.live()

    async def _join(self, player: Player) -> None:
        while not player.is_in or player.client.is_replaced:
            try:
                await player.join()
            except (ConnectionRefusedError, OwnerError):
                await asyncio.sleep(0.2)

    async def _let_things_happen(self) -> None:
        dice, of = self._dice, self.scenario
        while running := [life for life in self._lives.values() if not life.done()]:
            await asyncio.wait(running, timeout=dice.uniform(0.02, 0.5))
            living = [player for player in self._players if not player.is_dead]
            if living and dice.random() < of.kills:
                self._kill(dice.choice(living))
            joined = [player for player in living if player.is_in and not player.is_dead]
            if joined and dice.random() < of.cuts:
                player = dice.choice(joined)
                self.note(f"{player.name} loses its connection")
                self.tally["connections lost"] += 1
                player.client.link.cut()
            if dice.random() < of.owner_ends:
                await self._replace_owner()
        for life in self._lives.values():
            if not life.cancelled() and (error := life.exception()) is not None:
                raise error

    def _kill(self, victim: Player) -> None:
        dice = self._dice
        for player in self._players:
            if player.process is victim.process and not player.is_dead:
                self.note(f"{player.name} dies")
                self.tally["deaths"] += 1
                player.die()
                self._lives[player].cancel()
                self._loop.call_later(dice.uniform(0.0, 1.5), player.end_writer)
        self._loop.call_later(dice.uniform(0.0, 1.0), victim.process.end)
        if len(self._players) < MAX_PLAYERS:
            self._add_player()

    async def _replace_owner(self) -> None:
        owner, dice = self._owner, self._dice
        assert owner is not None
        is_killed = dice.random() < 0.5
        self.note("the owner is killed" if is_killed else "the owner ends")
        self.tally["owners that were killed" if is_killed else "owners that ended"] += 1
        await owner.end(is_killed=is_killed)
        await asyncio.sleep(dice.uniform(0.0, 1.0))
        self._start_owner()

    # -- its end -----------------------------------------------------------------------------------

    async def _come_to_rest(self) -> None:
        """With the faults gone the owner works as if nothing had been."""
        self.note("rest")
        self.scenario = replace(self.scenario, lost=0.0, harm=0.0)
        living = [player for player in self._players if not player.is_dead]
        owner = self._owner
        assert owner is not None
        for tier in owner.tiers.values():
            tier.is_sound = True
        for player in living:
            player.client.lost = 0.0
            player.control.figures()  # it may not know yet that its connection is lost
        await asyncio.sleep(REST_S)
        for player in living:
            await self._join(player)
        for tier in owner.tiers.values():
            tier.is_sound = True  # those that came with the last client
        await owner.flush(REST_S)
        await asyncio.sleep(REST_S)
        for player in living:
            if not player.client.is_connected:
                self.complain(f"{player.name} has not connected again")
        owner.check_at_rest()
        self._check_ranks(living)
        for player in living[:2]:
            await self._probe(player)

    def _check_ranks(self, living: list[Player]) -> None:
        """Whoever says something has said it to this owner, and nobody has said anything else."""
        assert self._owner is not None
        for cache in self._owner.caches:
            every = [p for p in self._players if shape_of(p.namespace).digest == cache.namespace.tobytes()]
            for what, found, unset in (("priority", cache.priority, 0), ("quota", cache.quota_bytes, None)):
                said = {getattr(player, what) for player in every} - {None}
                must = {getattr(player, what) for player in every if player in living} - {None}
                if found not in said and (must or found != unset):
                    self.complain(f"a cache has {what} {found}, and its clients have said {said}")

    async def _probe(self, player: Player) -> None:
        keys, groups = player.blocks(0, 1)
        player.control.invalidate(keys)
        saved: set[SaveOutcome] = set()
        for _ in range(PROBES):  # what is evicted for one try may leave holes that are too small
            saved = set(await player.save_blocks(keys, groups))
            if SaveOutcome.NO_SPACE not in saved:
                break
            await asyncio.sleep(1.0)  # what was evicted may have to be written first
        if not saved <= {SaveOutcome.STORED, SaveOutcome.ALREADY_STORED}:
            self.complain(f"a client of an idle owner cannot save: {sorted(saved)}")
        loaded = await player.load_blocks(keys)
        if loaded != [None] * len(keys):
            self.complain(f"a client of an idle owner cannot load: {loaded}")

    async def _end(self) -> None:
        owner = self._owner
        assert owner is not None
        for player in self._players:
            if not player.is_dead:
                await player.leave()
        await asyncio.sleep(1.0)
        if owner.num_clients or owner.num_abandoned:
            self.complain(f"of {owner.num_clients} clients that are gone {owner.num_abandoned} extents are left")
        await owner.end(is_killed=False)
        self.tally["evicted"] += owner.control.index.evicted_blocks

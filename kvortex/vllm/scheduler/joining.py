"""Joining the owner of a pool: the scheduler half plans in it once every worker has mapped its memory."""

from collections.abc import Sequence

from kvortex.codecs import Codec, Encodings
from kvortex.config import OwnerConfig
from kvortex.groups import GroupSet
from kvortex.hashing import namespace_of_parts
from kvortex.layout.canonical import CanonicalCache
from kvortex.owner import OwnerClient, RemoteControl
from kvortex.types import BlockSizes
from kvortex.vllm.plans import OwnedHandshake, WorkerHandshake


class Members:
    """The workers that have joined an owner. Ranks that hold the same KV have one part of the blocks together.

    Args:
        num_workers: how many there are.
        owner: the section of the settings. If it names no socket, the workers join an owner that they have started.
    """

    def __init__(self, num_workers: int, owner: OwnerConfig) -> None:
        self._num_workers = num_workers
        self._owner = owner
        self._owned: dict[str, OwnedHandshake] = {}  # by writer, of the owner that was joined last

    def add(self, handshakes: Sequence[WorkerHandshake]) -> OwnedHandshake | None:
        """Take in handshakes; returns that of the first part once all workers have joined the same owner."""
        for owned in (handshake.owned for handshake in handshakes):
            if owned is not None:
                self._owned = {name: other for name, other in self._owned.items() if other.pool == owned.pool}
                self._owned[owned.writer] = owned
        if len(self._owned) < self._num_workers:
            return None
        return min(self._owned.values(), key=lambda member: member.part)

    def connect(self, sizes: tuple[BlockSizes, ...], groups: GroupSet) -> RemoteControl:
        """A control plane over the owner's, for blocks of all members together.

        Args:
            sizes: bytes of a block in the pool, for each group.
            groups: the groups of the cache.

        Raises:
            OwnerError, ConfigError: there is no owner, or it refuses this cache.
        """
        of_parts = {member.part: member for member in self._owned.values()}
        first = of_parts[0]
        encodings = Encodings(first.payloads, map(Codec, first.codecs))
        namespace = namespace_of_parts([of_parts[part].namespace for part in range(first.num_parts)])
        client, owner = self.client(first), self._owner
        try:
            return RemoteControl(
                client,
                namespace,
                sizes,
                encodings,
                groups,
                num_parts=first.num_parts,
                canonical=canonical_of([of_parts[part] for part in range(first.num_parts)]),
                writers=list(self._owned),
                priority=owner.priority,
                quota_bytes=owner.quota,
            )
        except BaseException:
            client.close()
            raise

    def client(self, first: OwnedHandshake) -> OwnerClient:
        """A connection to the owner that the members have joined.

        Raises:
            OwnerError, ConfigError: there is no owner, or it refuses this process.
        """
        return OwnerClient(first.socket, self._owner.deadline_s)


def canonical_of(members: Sequence[OwnedHandshake]) -> CanonicalCache | str:
    """How blocks that these ranks fill together become canonical, or why they do not.

    Args:
        members: one for each part of a block, in the order of the parts.
    """
    of_members, namespaces = [], []
    for member in members:
        if isinstance(member.canonical, str) or member.canonical_namespace is None:
            return str(member.canonical)
        of_members.append(member.canonical)
        namespaces.append(member.canonical_namespace)
    # The ranks of a pipeline stage have one namespace.
    in_tier = namespace_of_parts(list(dict.fromkeys(namespaces)))
    parts = (tuple(part for part in of_form if part is not None) for of_form in zip(*of_members, strict=True))
    return CanonicalCache(in_tier, tuple(parts))

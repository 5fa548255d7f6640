"""Parity in the simulation: buffers, the network between daemons, and what of it is true (see `ledger_simulation`).

Images and parities are real bytes: a parity is compared with what the images give when it is sealed, and what recovery
says is decoded with the real code and compared with the lost image.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable

import numpy as np
from simulated_daemons import Daemons
from simulated_world import Buffer, Node, Violation

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.erasure import ReedSolomon
from holdfast.erasure.gf256 import PRODUCTS
from holdfast.erasure.groups import Grouping, form_groups
from holdfast.erasure.matrices import cauchy
from holdfast.erasure.redundancy import Redundancy
from holdfast.snapshot import chain, ledger
from holdfast.snapshot import exchange_events as events
from holdfast.snapshot.coding import CodedImage, CodedVersion, HeldParity, Rebuild, Stream, degraded_reads

CHUNK_BYTES = 64


@functools.cache
def code(num_data: int, num_parity: int) -> ReedSolomon:
    """The real code."""
    return ReedSolomon(num_data, num_parity)


@functools.lru_cache(maxsize=4096)
def image_bytes(version: Version, rank: int, size: int) -> bytes:
    """The image of a rank."""
    return random.Random(f"{version} {rank}").randbytes(size)


class Exchanging(Daemons):
    """Everything that has to do with parity."""

    # --- what is true of a generation

    def _form_groups(self) -> Grouping:
        domains = {node.rank: f"host{node.rank}" for node in self.nodes}
        return form_groups(domains, Redundancy.parse(self.plan.redundancy))

    def _size(self, rank: int) -> int:
        return self.plan.sizes[rank % len(self.plan.sizes)]

    def _ranks_of(self, generation: GenerationId, node_rank: int) -> range:
        per_node = self.per_node[generation]
        return range(node_rank * per_node, (node_rank + 1) * per_node)

    def _stream(self, version: Version, node_rank: int) -> Stream:
        """What the stream of a node is, by the shape of the job."""
        generation = version.generation
        nodes = tuple(range(self.worlds[generation] // self.per_node[generation]))
        m = self.groups[generation].group_of(node_rank).num_parity
        images = []
        for rank in self._ranks_of(generation, node_rank):
            size = self._size(rank)
            shared = self.plan.shared and len(nodes) >= m + 1 and size > 64
            ranges = ((0, 64),) if shared else ((0, size),) if size else ()
            first = node_rank - node_rank % 2
            holders = (first, first + 1) if m == 1 and first + 1 < len(nodes) else nodes
            copies = (holders,) if shared else ()
            images.append(CodedImage(global_rank=rank, size_bytes=size, ranges=ranges, copies=copies))
        return Stream(node_rank, tuple(images))

    def _stream_bytes(self, version: Version, stream: Stream) -> bytes:
        return b"".join(
            image_bytes(version, image.global_rank, image.size_bytes)[start:stop]
            for image in stream.images
            for start, stop in image.ranges
        )

    def _rank_then(self, node: Node, version: Version) -> int | None:
        """The rank that a node had in the generation of a version."""
        return node.ranks_then.get(version.generation)

    def _holds_images(self, node: Node, version: Version) -> bool:
        """All images that the node had of a version are physically clean there."""
        rank = self._rank_then(node, version)
        if rank is None:
            return False
        clean = {file.rank for file in node.files.values() if file.clean and file.version == version}
        return clean >= set(self._ranks_of(version.generation, rank))

    def _holds_parity(self, node: Node, version: Version) -> bool:
        return any(buffer.whole and buffer.coded.version == version for buffer in node.buffers.values())

    def _retrievable(self, version: Version) -> bool:
        """Whether the living nodes hold enough, worked out from files and buffers alone."""
        generation = version.generation
        living = {self._rank_then(node, version): node for node in self.nodes if not node.lost}
        there = {rank for rank, node in living.items() if rank is not None and self._holds_images(node, version)}
        parity = {rank for rank, node in living.items() if rank is not None and self._holds_parity(node, version)}
        num_nodes = self.worlds[generation] // self.per_node[generation]
        for rank in set(range(num_nodes)) - there:
            group = self.groups[generation].group_of(rank)
            if not parity & set(group.members):
                return False
            record = CodedVersion(
                version=version,
                world_size=self.worlds[generation],
                group=group,
                streams=tuple(self._stream(version, member) for member in group.members),
            )
            for shard in range(group.num_data):
                stripe = group.stripe_of(rank, shard)
                if not record.shard_range(stripe, shard):
                    continue
                data = [s for s in range(group.num_data) if record.shard_node(stripe, s) in there]
                empty = [s for s in range(group.num_data) if not record.shard_range(stripe, s)]
                nodes = [record.shard_node(stripe, group.num_data + p) for p in range(group.num_parity)]
                if len({*data, *empty}) + sum(node in parity for node in nodes) < group.num_data:
                    return False
            copies = [nodes for image in record.stream_of(rank).images for nodes in image.copies]
            if any(not there.intersection(nodes) for nodes in copies):
                return False
        return True

    # --- nodes

    def _do_power_off(self, node: Node) -> None:
        """It and all its memory are gone at once, and says no goodbye."""
        if node.lost:
            return
        self.power_left -= 1
        self.seen["node lost"] += 1
        if node.exchange is not None and node.exchange.running is not None:
            self.seen["node lost in an exchange"] += 1
        if any(one.decided and not one.workers for one in self.nodes) or self.starting:
            self.seen["node lost in a recovery"] += 1
        if node.leading is not None:
            for other in self.nodes:
                self._cut(other)
        self._cut(node)
        for worker in (*node.workers, *node.zombies):
            worker.alive, worker.intent, worker.copying = False, None, None
            worker.bells.clear()
        node.zombies = []
        for local, slot in list(node.files):
            self._set_file(node, local, slot, None)
        node.lost, node.ledger, node.exchange, node.leading = True, None, None, None
        node.buffers, node.persisting = {}, []
        node.jobs.clear()
        self.duties.pop(node, None)
        self.former[1].pop(node, None)
        if self.newest is not None and not self._is_whole(self.newest):
            self.newest = None
            self.seen["newest lost"] += 1
        if self.newest is None:
            promised = self.promise is not None and self._retrievable(self.promise)
            self.floor = self.promise.step if promised and self.promise is not None else 0
            self.seen["loss survived by parity" if promised else "loss not covered"] += 1

    def _replace_lost(self) -> None:
        """The agents found the new generation: with newcomers, without, in another order."""
        living = [node for node in self.nodes if not node.lost]
        for _ in range(len(self.nodes) - len(living)):
            if not living or self.rng.random() < 0.6:
                living.insert(self.rng.randint(0, len(living)), Node(-1))
                self.seen["newcomer"] += 1
            else:
                self.seen["shrunk"] += 1
        if self.plan.coded and self.rng.random() < 0.15:
            self.rng.shuffle(living)
            self.seen["ranks moved"] += 1
        self.nodes = living
        for rank, node in enumerate(self.nodes):
            node.rank = rank

    # --- the exchange of a node

    def _begin_exchange(self, node: Node) -> None:
        """The restore is decided, or the daemon is restarted after that."""
        if not self.plan.coded or node.generation is None:
            return
        if node.exchange is None:
            node.exchange = self.machines.exchange(chunk_bytes=CHUNK_BYTES, window=self.rng.choice((1, 2, 8)))
        while node.jobs:
            self._do_work(node)
        for index, buffer in list(node.buffers.items()):
            if not buffer.whole and node.exchange.running is None:
                node.garbage[index] = bytes(buffer.data)
                del node.buffers[index]
        finished = tuple(events.Finished(i, one.coded) for i, one in node.buffers.items() if one.whole)
        self._tell(
            node,
            events.ExchangeStarted(
                generation=node.generation,
                node_rank=node.rank,
                group=self.groups[node.generation].group_of(node.rank),
                world_size=self.worlds[node.generation],
                finished=finished,
            ),
        )

    def _exchange_actions(self, node: Node) -> list[tuple[object, ...]]:
        actions: list[tuple[object, ...]] = []
        if node.exchange is None:
            return actions
        if node.jobs:
            actions += [("work", node)] * 4
        if not node.room_known and node.decided:
            actions += [("room", node)] * 3
        if node.exchange.running is not None and self.rng.random() < 0.15:
            actions.append(("nudge", node))
        return actions

    def _do_room(self, node: Node) -> None:
        if node.ledger is None or node.room_known or node.generation is None:
            return
        node.room_known = True
        available = not (self.plan.no_room and node.rank == 0)
        self._feed(node, ledger.ParityAvailable(generation=node.generation, available=available))

    def _do_nudge(self, node: Node) -> None:
        if node.exchange is None:
            return
        if not self.chaos or self.rng.random() < 0.5:
            self._tell(node, events.Nudged())
        for other in self.nodes if not self.chaos else self.rng.sample(self.nodes, 1):
            self._tell(node, events.SourceReset(node_rank=other.rank))

    def _protect(self, node: Node, version: Version) -> None:
        self.seen["protect ordered"] += 1
        if node.exchange is None:
            return
        if version not in self.completed:
            raise Violation(f"protect: {version} is not complete")
        if not self._holds_images(node, version):
            raise Violation(f"protect: node {node.rank} does not hold {version} any more")
        self._tell(node, events.ProtectWanted(version=version, stream=self._stream(version, node.rank)))

    def _keep(self, node: Node, version: Version | None) -> None:
        node.protected = version
        if node.exchange is not None:
            self._tell(node, events.KeepParity(version=version))

    def _tell(self, node: Node, event: events.ExchangeEvent, data: bytes = b"") -> None:
        assert node.exchange is not None
        for instruction in node.exchange.handle(event):
            match instruction:
                case events.SendStream():
                    self._send(node, instruction.node_rank, "stream", instruction.version, instruction.stream)
                case events.AskStream():
                    self._send(node, instruction.node_rank, "ask", instruction.version)
                case events.Fetch():
                    self._send(
                        node,
                        instruction.node_rank,
                        "fetch",
                        instruction.version,
                        instruction.chunk,
                        instruction.offset,
                        instruction.length,
                        instruction.node_rank,
                    )
                case _:
                    node.jobs.append((instruction, data))

    def _do_work(self, node: Node) -> None:
        """The lane of the exchange carries out one instruction."""
        if not node.jobs or node.exchange is None:
            return
        instruction, data = node.jobs.popleft()
        match instruction:
            case events.DeclareDone(version=version):  # as in the daemon, never within what the ledger carries out
                if node.ledger is not None:
                    self._feed(node, ledger.ParityDone(version=version))
            case events.ReserveParity(buffer=index, coded=coded, node_rank=rank):
                if self.promise is not None and index in node.buffers:
                    self._check_duty(node, index)
                size = coded.buffer_bytes(rank)
                old = node.garbage.get(index, b"") + bytes([0xA5]) * size
                node.buffers[index] = Buffer(coded, rank, bytearray(old[:size]))
                self._tell(node, events.ParityReserved(version=coded.version))
            case events.Absorb():
                self._absorb(node, instruction, data)
                self._tell(node, events.ChunkAbsorbed(version=instruction.version, chunk=instruction.chunk))
            case events.SealParity(buffer=index, coded=coded):
                node.buffers[index].whole = True
                self._check_parity(node, node.buffers[index])
                self._tell(node, events.ParitySealed(version=coded.version))
            case events.DropParity(buffer=index):
                if index in node.buffers:
                    node.garbage[index] = bytes(node.buffers.pop(index).data)

    def _absorb(self, node: Node, order: events.Absorb, data: bytes) -> None:
        buffer = node.buffers[order.buffer]
        if buffer.coded.version != order.version or buffer.whole:
            raise Violation(f"write hole: {order} into {buffer.coded.version}")
        parity = buffer.coded.parities(buffer.rank)[order.parity]
        if len(data) != order.length or order.offset + order.length + order.clear > parity.size_bytes:
            raise Violation(f"absorb: {order} of {len(data)} bytes")
        group = buffer.coded.group
        factor = cauchy(group.num_data, group.num_parity)[parity.number, order.chunk.shard]
        product = PRODUCTS[factor][np.frombuffer(data, np.uint8)]
        at = parity.offset + order.offset
        if order.first:
            buffer.data[at : at + order.length + order.clear] = product.tobytes() + bytes(order.clear)
        else:
            known = np.frombuffer(bytes(buffer.data[at : at + order.length]), np.uint8)
            buffer.data[at : at + order.length] = (known ^ product).tobytes()

    # --- the network between daemons

    def _send(self, node: Node, rank: int, *message: object) -> None:
        """By the ranks of the generation in which the daemon is, whatever the agents know already."""
        assert node.generation is not None
        members = self.members[node.generation]
        if rank < len(members):
            self.wire.append((node, members[rank], node.ranks_then[node.generation], message))

    def _do_net(self) -> None:
        """Any message in flight arrives, or does not, or twice."""
        if not self.wire:
            return
        number = self.rng.randrange(len(self.wire)) if self.rng.random() < 0.3 else 0
        source, target, rank, message = self.wire.pop(number)
        if self.chaos and self.rng.random() < self.plan.lossy:
            self.seen["message lost"] += 1
            return
        if self.chaos and self.rng.random() < self.plan.lossy:
            self.seen["message twice"] += 1
            self.wire.append((source, target, rank, message))
        if self.parted is not None and (source in self.parted) != (target in self.parted):
            return
        if target.exchange is None or target.lost:
            return
        kind, version, *rest = message
        assert isinstance(version, Version)
        match kind:
            case "stream":
                self._tell(target, events.StreamReceived(version=version, stream=rest[0]))
            case "ask":
                self._tell(target, events.StreamAsked(version=version, node_rank=rank))
            case "fetch":
                self._serve(target, source, version, rest)
            case "chunk":
                self._tell(target, events.ChunkArrived(version=version, chunk=rest[0]), rest[1])
            case "refused":
                self._tell(target, events.ChunkRefused(version=version, chunk=rest[0]))

    def _serve(self, node: Node, asker: Node, version: Version, request: list[object]) -> None:
        chunk, offset, length, asked = request
        then = self._rank_then(node, version)
        answer: tuple[object, ...] = ("refused", version, chunk)
        current = version.generation == node.generation and asked == then
        if then is not None and current and self._holds_images(node, version):
            data = self._stream_bytes(version, self._stream(version, then))[offset : offset + length]
            answer = ("chunk", version, chunk, data)
        self.wire.append((node, asker, -1, answer))

    def _do_part(self) -> None:
        """The network falls apart, or is one again."""
        self.seen["partition"] += 1
        self.parted = None
        if self.chaos and self.rng.random() < 0.6:
            self.parted = set(self.rng.sample(self.nodes, self.rng.randint(1, len(self.nodes))))

    # --- checks

    def _check_parity(self, node: Node, buffer: Buffer) -> None:
        """A whole parity is what the images of all members give."""
        coded, version = buffer.coded, buffer.coded.version
        group = self.groups[version.generation].group_of(buffer.rank)
        if coded.group != group or coded.streams != tuple(self._stream(version, one) for one in group.members):
            raise Violation(f"parity: the record of {version} on node {node.rank} is wrong: {coded}")
        for parity in coded.parities(buffer.rank):
            wanted = np.zeros(parity.size_bytes, np.uint8)
            for shard in range(group.num_data):
                cut = coded.shard_range(parity.stripe, shard)
                stream = coded.stream_of(coded.shard_node(parity.stripe, shard))
                data = np.frombuffer(self._stream_bytes(version, stream)[cut.start : cut.stop], np.uint8)
                factor = cauchy(group.num_data, group.num_parity)[parity.number, shard]
                wanted[: len(data)] ^= PRODUCTS[factor][data]
            if bytes(buffer.data[parity.offset : parity.offset + parity.size_bytes]) != wanted.tobytes():
                raise Violation(f"parity: {parity} of {version} on node {node.rank} is sealed and wrong")
        self.seen["parity sealed"] += 1

    def _check_duty(self, node: Node, index: int) -> None:
        if self.duties.get(node) and node.buffers[index].coded.version == self.promise and node.buffers[index].whole:
            raise Violation(f"write hole: node {node.rank} reuses the parity of {self.promise}")

    def _promise(self, version: Version) -> None:
        """A version is declared protected: from now on every node that has a part of it keeps it."""
        self.seen["protected"] += 1
        self.former = (self.promise, self.duties)
        self.promise = version
        self.duties = {}
        for node in self.nodes:
            if not node.lost:
                group = self.groups[version.generation].group_of(node.rank)
                self.duties[node] = (True, group.num_parity > 0)
        self._check_promise()

    def _carry_promise(self, choice: chain.Choice) -> None:
        """A generation starts; what it takes over as protected stays where it is."""
        before = self.promise
        if before is not None and self._retrievable(before) and choice.tier == "memory" and choice.protected is None:
            raise Violation(f"protect: {before} is forgotten by {choice}")
        self.promise, self.duties, self.former = choice.protected, {}, (None, {})
        if self.promise is not None:
            for node in self.nodes:
                if not node.lost:
                    self.duties[node] = (self._holds_images(node, self.promise), self._holds_parity(node, self.promise))

    def _check_promise(self) -> None:
        if self.promise is None:
            return
        for node, (images, parity) in self.duties.items():
            if images and not self._holds_images(node, self.promise):
                raise Violation(f"write hole: node {node.rank} gave up its images of {self.promise}")
            if parity and not self._holds_parity(node, self.promise):
                raise Violation(f"write hole: node {node.rank} gave up its parity of {self.promise}")

    def _check_orders(self, protected: Version | None) -> None:
        """What the leader orders to keep is what is promised."""
        if not self.plan.coded or protected == self.promise or any(node.lost for node in self.nodes):
            return
        if protected is None and (self.plan.num_slots < 3 or not self._protects()):
            self.seen["protection given up"] += 1
            self.promise, self.duties = None, {}
            return
        told = any(node.protected == self.promise for node in self.nodes)
        if not told and protected == self.former[0]:  # the leader died before it could tell anybody
            self.seen["protected, and nobody was told"] += 1
            self.promise, self.duties = self.former
            return
        raise Violation(f"protect: orders name {protected}, {self.promise} is protected")

    def _check_rebuilds(self, rebuilds: Iterable[Rebuild]) -> None:
        """What recovery says gives the lost image, byte for byte."""
        for rebuild in rebuilds:
            self.seen["image decoded"] += 1
            version, rank = rebuild.coded.version, rebuild.global_rank
            truth = image_bytes(version, rank, self._size(rank))
            got = bytearray(len(truth))
            coded = [(start, stop) for start, stop in rebuild.image.ranges]
            reads = degraded_reads(rebuild, 0, len(truth))
            if reads is None:
                raise Violation(f"choice: {rank} of {version} cannot be decoded")
            for read in reads:
                shards = {
                    one.shard: self._read_shard(rebuild, read.stripe, one, read.shard_offset) for one in read.sources
                }
                out = np.zeros(read.length, np.uint8)
                group = rebuild.coded.group
                code(group.num_data, group.num_parity).decode(shards, {read.shard: out})
                got[read.offset : read.offset + read.length] = out.tobytes()
            if any(got[start:stop] != truth[start:stop] for start, stop in coded):
                raise Violation(f"choice: rank {rank} of {version} decodes to other bytes")

    def _read_shard(self, rebuild: Rebuild, stripe: int, source: object, offset: int) -> np.ndarray:
        coded = rebuild.coded
        if source.node_rank < 0:
            return np.zeros(0, np.uint8)
        node = self.nodes[source.node_rank]
        if source.shard < coded.group.num_data:
            then = self._rank_then(node, coded.version)
            if then is None or not self._holds_images(node, coded.version):
                raise Violation(f"choice: node {node.rank} has no images of {coded.version}")
            data = self._stream_bytes(coded.version, coded.stream_of(then))
            cut = coded.shard_range(stripe, source.shard)
            data = data[cut.start : cut.stop]
        else:
            buffer = next(one for one in node.buffers.values() if one.coded.version == coded.version and one.whole)
            parity = next((one for one in coded.parities(buffer.rank) if one.stripe == stripe), None)
            if parity is None or parity.number != source.shard - coded.group.num_data:
                raise Violation(f"choice: node {node.rank} does not hold shard {source.shard} of stripe {stripe}")
            data = bytes(buffer.data[parity.offset : parity.offset + parity.size_bytes])
        return np.frombuffer(data[offset : offset + source.length], np.uint8)

    def _held_parity(self, node: Node) -> tuple[HeldParity, ...]:
        return tuple(HeldParity(coded=one.coded, holder=one.rank) for one in node.buffers.values() if one.whole)

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.erasure import ReedSolomon
from holdfast.erasure.groups import Group, Grouping, chunk_ranges, form_groups, lower_parity, needs_parity
from holdfast.erasure.redundancy import Redundancy, Scheme
from holdfast.errors import UsageError

specs = st.sampled_from(["auto", "mirror", "none", "1+1", "2+1", "2+2", "4+2", "6+2", "1+3", "12+4"])


def hosts(num_nodes: int) -> dict[int, str]:
    return {node: f"host-{node:04d}" for node in range(num_nodes)}


def shapes(num_nodes: int, spec: str) -> list[str]:
    groups = form_groups(hosts(num_nodes), Redundancy.parse(spec)).groups
    return sorted((f"{len(group.members)}:{group.num_data}+{group.num_parity}" for group in groups), reverse=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", Redundancy(Scheme.AUTO)),
        (" None ", Redundancy(Scheme.NONE)),
        ("mirror", Redundancy(Scheme.CODE, 1, 1)),
        ("4+2", Redundancy(Scheme.CODE, 4, 2)),
        ("251+4", Redundancy(Scheme.CODE, 251, 4)),
    ],
)
def test_redundancy_is_read_from_text_and_back(text: str, expected: Redundancy) -> None:
    assert Redundancy.parse(text) == expected
    assert Redundancy.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "4+", "+2", "0+1", "4+0", "-1+2", "4 + 2", "4+2+1", "252+4", "99999+1", "raid5", "4+٢2"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="redundancy"):
        Redundancy.parse(text)


@pytest.mark.parametrize(
    ("num_nodes", "expected"),
    [
        (1, ["1:1+0"]),
        (2, ["2:1+1"]),
        (3, ["3:2+1"]),
        (4, ["4:3+1"]),
        (5, ["5:3+2"]),
        (8, ["8:6+2"]),
        (9, ["5:3+2", "4:2+2"]),
        (17, ["6:4+2", "6:4+2", "5:3+2"]),
    ],
)
def test_auto_follows_the_number_of_nodes(num_nodes: int, expected: list[str]) -> None:
    assert shapes(num_nodes, "auto") == expected


@pytest.mark.parametrize(
    ("num_nodes", "spec", "expected"),
    [
        (4, "mirror", ["2:1+1", "2:1+1"]),
        (3, "mirror", ["3:1+1"]),
        (5, "mirror", ["3:1+1", "2:1+1"]),
        (4, "2+2", ["4:2+2"]),
        (6, "4+2", ["6:4+2"]),
        (9, "4+2", ["5:3+2", "4:2+2"]),
        (5, "4+2", ["5:3+2"]),
        (7, "2+2", ["4:2+2", "3:1+2"]),
        (5, "1+3", ["5:1+3"]),
        (2, "2+2", ["2:1+1"]),
        (3, "none", ["1:1+0", "1:1+0", "1:1+0"]),
    ],
)
def test_a_code_that_was_asked_for_is_never_made_weaker_than_nodes_allow(
    num_nodes: int, spec: str, expected: list[str]
) -> None:
    assert shapes(num_nodes, spec) == expected


def test_no_nodes_make_no_groups() -> None:
    assert form_groups({}, Redundancy.parse("auto")) == Grouping(())


def test_less_parity_than_asked_is_said() -> None:
    grouping = form_groups(hosts(2), Redundancy.parse("2+2"))
    assert grouping.notes == ("redundancy 2+2 needs 3 nodes: only 1 may be lost at a time",)
    assert form_groups(hosts(1), Redundancy.parse("2+2")).notes == ("one node: nothing in memory survives its loss",)
    assert form_groups(hosts(3), Redundancy.parse("2+2")).notes == ()


def test_auto_separates_domains_by_making_more_groups() -> None:
    racks = {node: f"rack-{node // 2}" for node in range(8)}
    grouping = form_groups(racks, Redundancy.parse("auto"))
    assert sorted(len(group.members) for group in grouping.groups) == [4, 4]
    assert grouping.notes == ()
    for rack in range(4):
        assert grouping.survives({2 * rack, 2 * rack + 1})


def test_domains_that_cannot_be_separated_are_named() -> None:
    crowded = form_groups({0: "a", 1: "a", 2: "a", 3: "b"}, Redundancy.parse("auto"))
    assert crowded.notes == (
        "failure domain 'a' has 3 nodes in one group, which may lose 1: its loss would lose state",
    )
    survivable = form_groups({node: "ab"[node // 2 % 2] + str(node // 4) for node in range(6)}, Redundancy.parse("4+2"))
    assert "which may lose 2: its loss is survived" in survivable.notes[0]
    alone = form_groups(dict.fromkeys(range(4), "laptop"), Redundancy.parse("auto"))
    assert alone.notes == ("all 4 nodes are in failure domain 'laptop': its loss takes all memory",)


@settings(max_examples=200, deadline=None)
@given(domains=st.dictionaries(st.integers(0, 200), st.sampled_from("abcdefgh"), min_size=1, max_size=40), spec=specs)
def test_every_node_is_in_one_group_and_sizes_and_domains_are_even(domains: dict[int, str], spec: str) -> None:
    grouping = form_groups(domains, Redundancy.parse(spec))
    sizes = [len(group.members) for group in grouping.groups]
    assert sorted(node for group in grouping.groups for node in group.members) == sorted(domains)
    assert max(sizes) - min(sizes) <= 1
    for domain, count in Counter(domains.values()).items():
        shares = [sum(domains[node] == domain for node in group.members) for group in grouping.groups]
        assert sum(shares) == count
        assert max(shares) <= -(-count // len(sizes))
    for group in grouping.groups:
        assert group.num_data >= 1
        assert group.num_data + group.num_parity <= len(group.members)
        assert grouping.group_of(group.members[-1]) == group


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(11)), spec=specs)
def test_grouping_does_not_depend_on_the_order_of_the_question(order: list[int], spec: str) -> None:
    domains = {node: f"rack-{node % 4}" for node in range(11)}
    redundancy = Redundancy.parse(spec)
    assert form_groups({node: domains[node] for node in order}, redundancy) == form_groups(domains, redundancy)


def all_groups() -> list[Group]:
    groups = {
        group
        for n in range(2, 12)
        for spec in ("auto", "mirror", "2+2", "4+2", "1+3")
        for group in form_groups(hosts(n), Redundancy.parse(spec)).groups
    }
    return sorted(groups, key=lambda group: (len(group.members), group.num_data, group.num_parity, group.members))


@pytest.mark.parametrize(
    "group", all_groups(), ids=lambda g: f"{len(g.members)}:{g.num_data}+{g.num_parity}@{g.members[0]}"
)
def test_rotation_gives_every_member_the_same_share(group: Group) -> None:
    stripes = group.stripes()
    assert len(stripes) == len(group.members)
    chunks = Counter((node, shard) for stripe in stripes for shard, node in enumerate(stripe.data))
    assert chunks == {(node, chunk): 1 for node in group.members for chunk in range(group.num_data)}
    held = Counter(node for stripe in stripes for node in stripe.parity)
    assert held == dict.fromkeys(group.members, group.num_parity)
    for stripe in stripes:
        assert len({*stripe.data, *stripe.parity}) == group.num_data + group.num_parity
        assert all(group.stripe_of(node, shard) == stripe.index for shard, node in enumerate(stripe.data))


@pytest.mark.parametrize(
    "group", all_groups(), ids=lambda g: f"{len(g.members)}:{g.num_data}+{g.num_parity}@{g.members[0]}"
)
def test_any_m_members_may_be_lost_and_no_more(group: Group) -> None:
    for lost in itertools.combinations(group.members, group.num_parity):
        assert group.survives(lost)
    if len(group.members) == group.num_data + group.num_parity:
        for lost in itertools.combinations(group.members, group.num_parity + 1):
            assert not group.survives(lost)
    assert not group.survives(group.members)


def test_a_lost_member_is_rebuilt_through_its_stripes() -> None:
    """The rotation and the code together, with members of different sizes."""
    grouping = form_groups(hosts(5), Redundancy.parse("auto"))
    (group,) = grouping.groups
    state = {node: bytes((node * 37 + i) % 251 for i in range(500 + 97 * node)) for node in group.members}
    ranges = {node: chunk_ranges(len(state[node]), group.num_data) for node in group.members}
    code = ReedSolomon(group.num_data, group.num_parity)
    lost = {1, 3}
    rebuilt = {node: bytearray(len(state[node])) for node in lost}
    parity_held = dict.fromkeys(group.members, 0)
    for stripe in group.stripes():
        shards = [
            state[node][ranges[node][chunk].start : ranges[node][chunk].stop] for chunk, node in enumerate(stripe.data)
        ]
        parity = [bytearray(max(map(len, shards))) for _ in stripe.parity]
        code.encode(shards, parity)
        for node in stripe.parity:
            parity_held[node] += len(parity[0])
        owners = [*stripe.data, *stripe.parity]
        available = {shard: block for shard, block in enumerate([*shards, *parity]) if owners[shard] not in lost}
        wanted = {
            chunk: memoryview(rebuilt[node])[ranges[node][chunk].start : ranges[node][chunk].stop]
            for chunk, node in enumerate(stripe.data)
            if node in lost
        }
        code.decode(available, wanted)
    assert {node: bytes(block) for node, block in rebuilt.items()} == {node: state[node] for node in lost}
    assert group.parity_bytes({node: len(block) for node, block in state.items()}) == parity_held


def test_alike_members_hold_m_over_k_of_their_state_as_parity() -> None:
    group = Group(tuple(range(6)), 4, 2)
    assert group.parity_bytes(dict.fromkeys(range(6), 1 << 20)) == dict.fromkeys(range(6), (1 << 20) // 2)


@given(size=st.integers(0, 10_000), num_data=st.integers(1, 30))
def test_chunks_cover_the_state_without_gap(size: int, num_data: int) -> None:
    ranges = chunk_ranges(size, num_data)
    assert len(ranges) == num_data
    assert [byte for chunk in ranges for byte in chunk] == list(range(size))
    assert all(chunk.start % 64 == 0 for chunk in ranges if len(chunk))


def test_unprotected_group_survives_only_the_loss_of_others() -> None:
    group = Group((3,), 1, 0)
    assert group.survives({1, 2})
    assert not group.survives({3})
    assert group.stripes() == ()
    assert group.parity_bytes({3: 100}) == {3: 0}


def test_unknown_node_has_no_group() -> None:
    with pytest.raises(KeyError):
        form_groups(hosts(3), Redundancy.parse("auto")).group_of(7)


def test_pieces_that_m_plus_one_domains_hold_need_no_parity() -> None:
    assert [needs_parity(domains, 2) for domains in (1, 2, 3, 4)] == [True, True, False, False]


def test_fewer_parities_leave_groups_and_stripes_as_wide_and_hold_less() -> None:
    formed = form_groups({node: f"host{node}" for node in range(9)}, Redundancy.parse("3+2"))
    lowered = lower_parity(formed, 1)
    for before, after in zip(formed.groups, lowered.groups, strict=True):
        assert after.members == before.members
        assert after.num_parity == 1
        assert after.num_data + after.num_parity == before.num_data + before.num_parity
        state = dict.fromkeys(after.members, 6400)
        assert sum(after.parity_bytes(state).values()) < sum(before.parity_bytes(state).values()) / 2
        assert all(after.survives([node]) for node in after.members)
        assert not after.survives(after.members[:2])
    assert lower_parity(lowered, 1) == lowered == lower_parity(lowered, 5)

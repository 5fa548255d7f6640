"""What a generation starts from: the chain, the candidates, and a reason for each that is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.version import GenerationId
from holdfast.erasure.groups import Group
from holdfast.snapshot import chain
from holdfast.snapshot.chain import ChainQuestion, StoredStep, choose
from holdfast.snapshot.coding import CodedImage, CodedVersion, HeldParity, Stream
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage, Member, Parentage
from holdfast.snapshot.reports import Pin


def generation(number, incarnation=1):
    return GenerationId(incarnation=incarnation, nonce="00000abc", generation=number)


G1, G2, G3, G4 = (generation(number) for number in (1, 2, 3, 4))


def image(version, rank=0, world=1):
    return CleanImage(
        version=version, global_rank=rank, world_size=world, path="slot-1-0-0", offset=4096, size_bytes=10
    )


def inventory(*images, node=0, parents=(), history="h", newest=0, pinned=()):
    return Inventory(
        generation=G4,
        node_rank=node,
        clean=images,
        parents=tuple(
            Parentage(generation=one, parent=parent, step=parent.step if parent else 0) for one, parent in parents
        ),
        history=history,
        newest_step=newest,
        pinned=pinned,
    )


def ask(*inventories, stored=(), resume="auto", fresh=False, history="h", **more):
    return choose(
        ChainQuestion(
            generation=G4,
            fresh=fresh,
            resume=resume,
            inventories=inventories,
            stored=tuple(stored),
            history=history,
            **more,
        )
    )


def on_disk(version, tag=None):
    return StoredStep(step=version.step, version=version, path=f"/runs/step-{version.step:08d}", tag=tag)


def reasons(choice):
    return " | ".join(one.reason for one in choice.rejected)


def test_nothing_anywhere_starts_from_nothing():
    assert ask(inventory()).tier == "none"


def test_the_newest_complete_version_in_memory_wins_and_says_what_is_lost():
    choice = ask(inventory(image(G1.at(7)), image(G1.at(8)), newest=9))
    assert (choice.tier, choice.version, choice.step, choice.steps_lost) == ("memory", G1.at(8), 8, 1)


def test_a_version_counts_only_when_every_rank_of_its_world_is_clean_somewhere():
    first = inventory(image(G1.at(8), 0, 2), image(G1.at(9), 0, 2))
    second = inventory(image(G1.at(8), 1, 2), node=1)
    choice = ask(first, second)
    assert choice.version == G1.at(8)
    assert "the image of rank 1 is nowhere" in reasons(choice)


def test_images_that_name_different_worlds_are_refused():
    choice = ask(inventory(image(G1.at(8), 0, 1), image(G1.at(8), 1, 2)))
    assert choice.tier == "none"
    assert "different world sizes" in reasons(choice)


def test_what_a_generation_made_after_its_successor_started_is_off_the_chain():
    parents = ((G1, None), (G2, G1.at(5)))
    choice = ask(inventory(image(G1.at(5)), image(G1.at(6)), parents=parents))
    assert choice.version == G1.at(5)
    assert "step 6 is off the chain" in reasons(choice)


def test_the_chain_skips_a_generation_that_nobody_started_from():
    parents = ((G1, None), (G2, G1.at(5)), (G3, G1.at(5)))
    choice = ask(inventory(image(G1.at(5)), image(G2.at(9)), parents=parents))
    assert choice.version == G1.at(5)
    assert f"generation {G2} is off the chain" in reasons(choice)


def test_storage_wins_when_its_step_is_newer_and_memory_on_ties():
    assert ask(inventory(image(G1.at(8))), stored=[on_disk(G1.at(9))]).tier == "storage"
    assert ask(inventory(image(G1.at(8))), stored=[on_disk(G1.at(8))]).tier == "memory"


def test_a_stored_step_off_the_chain_of_a_known_generation_is_refused():
    parents = ((G1, None), (G2, G1.at(5)))
    choice = ask(inventory(image(G1.at(5)), parents=parents), stored=[on_disk(G1.at(9))])
    assert choice.tier == "memory"
    assert "step 9 is off the chain" in reasons(choice)


def test_a_stored_step_of_an_unknown_generation_is_taken():
    assert ask(inventory(), stored=[on_disk(generation(7).at(9))]).step == 9


def test_a_generation_that_started_from_storage_keeps_that_step_as_a_candidate():
    parents = ((G1, None), (G2, G1.at(5)))
    assert ask(inventory(parents=parents), stored=[on_disk(G1.at(5))]).step == 5


def test_memory_of_another_history_is_refused():
    choice = ask(inventory(image(G1.at(8)), history="old"), history="new", fresh=True)
    assert choice.tier == "none"
    assert "belongs to the checkpoint history old" in reasons(choice)


def test_an_incarnation_that_runs_keeps_its_memory_when_the_checkpoint_directory_is_removed():
    assert ask(inventory(image(G1.at(8)), history="old"), history=None).step == 8


def test_excluded_candidates_give_way_to_the_next():
    images = inventory(image(G1.at(7)), image(G1.at(8)))
    assert ask(images, excluded=(G1.at(8),)).version == G1.at(7)
    choice = ask(images, stored=[on_disk(G1.at(6))], excluded=(G1.at(8), G1.at(7)))
    assert choice.path == "/runs/step-00000006"
    assert ask(stored=[on_disk(G1.at(6))], excluded_paths=("/runs/step-00000006",)).tier == "none"


def test_resume_never_step_and_path_decide_a_first_generation():
    images, stored = inventory(image(G1.at(8))), [on_disk(G1.at(6), tag="best"), on_disk(G1.at(7))]
    assert ask(images, stored=stored, resume="never", fresh=True).tier == "none"
    assert ask(images, stored=stored, resume="step:7", fresh=True).path == "/runs/step-00000007"
    assert ask(images, stored=stored, resume="step:8", fresh=True).tier == "memory"
    assert ask(images, stored=stored, resume="path:best", fresh=True).step == 6
    assert ask(images, stored=stored, resume="path:/runs/step-00000007/", fresh=True).step == 7
    assert ask(images, stored=stored, resume="path:step-00000007", fresh=True).step == 7


def test_resume_is_ignored_after_the_first_generation():
    assert ask(inventory(image(G1.at(8))), resume="never").step == 8


@pytest.mark.parametrize("resume", ["step:9", "path:worst"])
def test_a_resume_point_that_is_not_there_is_an_error_that_lists_what_is(resume):
    choice = ask(inventory(image(G1.at(8))), stored=[on_disk(G1.at(6))], resume=resume, fresh=True)
    assert choice.tier == "error"
    assert "/runs/step-00000006" in choice.reason


def test_what_a_former_leader_of_the_generation_chose_stands():
    parents = ((G1, None), (G4, G1.at(7)))
    images = inventory(image(G1.at(7)), image(G1.at(8)), parents=parents)
    assert ask(images).version == G1.at(7)
    assert ask(images, excluded=(G1.at(7),)).version == G1.at(8)


def test_a_node_with_all_images_restores_from_memory_others_from_peers():
    first, second = inventory(image(G1.at(8), 0, 2), image(G1.at(8), 1, 2)), inventory(image(G1.at(8), 1, 2), node=1)
    choice = ask(first, second)
    one, other = member(0, 0, 1), member(1, 1, 1)
    assert chain.tier_of(choice, (first, second), one, 2) == "memory"
    assert chain.tier_of(choice, (second, first), member(1, 0, 2), 2) == "peers"
    assert chain.tier_of(choice, (first, second), other, 2) == "memory", "rank 1 has its own image at home"
    assert chain.tier_of(choice, (first, second), member(1, 1, 2), 3) == "peers", "another world wants other boxes"


def member(node_rank: int, first: int, ranks: int) -> Member:
    return Member(node_rank=node_rank, daemon="tcp://127.0.0.1:1", first_global_rank=first, num_ranks=ranks)


def test_image_sources_names_a_node_for_each_rank():
    first, second = inventory(image(G1.at(8), 0, 2)), inventory(image(G1.at(8), 1, 2), node=1)
    sources = chain.image_sources(G1.at(8), (second, first))
    assert {rank: node for rank, (node, _) in sources.items()} == {0: 0, 1: 1}


def test_persists_at_or_below_the_parent_go_on_and_others_do_not():
    pins = tuple(Pin(version=G1.at(step)) for step in (6, 8, 9))
    here = inventory(image(G1.at(6)), image(G1.at(8)), pinned=pins)
    carried = chain.carried_persists((here,), ask(here), generation=G4)
    assert [pin.version for pin in carried] == [G1.at(6), G1.at(8)]
    older = ask(here, excluded=(G1.at(8),))
    assert [pin.version for pin in chain.carried_persists((here,), older, generation=G4)] == [G1.at(6)]


def test_a_persist_goes_on_where_the_image_of_a_lost_node_can_be_decoded():
    images = tuple(CodedImage(global_rank=rank, size_bytes=10, ranges=((0, 10),)) for rank in range(3))
    coded = CodedVersion(
        version=G1.at(8),
        world_size=3,
        group=Group((0, 1, 2), 2, 1),
        streams=tuple(Stream(rank, (images[rank],)) for rank in range(3)),
    )
    pins = (Pin(version=G1.at(8)),)
    held = [HeldParity(coded=coded, holder=node) for node in range(3)]
    nodes = [inventory(image(G1.at(8), node, 3), node=node, pinned=pins) for node in range(3)]
    whole = [msgspec.structs.replace(one, parity=(held[one.node_rank],)) for one in nodes]
    choice = ask(*whole[:2])
    assert [pin.version for pin in chain.carried_persists(whole[:2], choice, generation=G4)] == [G1.at(8)]
    assert [one.global_rank for one in chain.lost_images(G1.at(8), whole[:2])] == [2]
    assert chain.lost_images(G1.at(8), whole) == ()
    assert chain.carried_persists(nodes[:2], choice, generation=G4) == ()
    assert chain.carried_persists(whole[:1], choice, generation=G4) == ()


@given(
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 1)), max_size=12),
    cuts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stored=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=4),
)
def test_the_choice_is_whole_on_the_chain_and_the_newest(steps, cuts, stored):
    parents = ((G1, None), (G2, G1.at(cuts[0])), (G3, G2.at(max(cuts))))
    images = {(generation(number).at(step), rank) for number, step, rank in steps}
    nodes = [
        inventory(*(image(version, one, 2) for version, one in images if one == rank), node=rank, parents=parents)
        for rank in (0, 1)
    ]
    ends = {G1: cuts[0], G2: max(cuts), G3: 99}
    whole = {version for version, _ in images if {(version, 0), (version, 1)} <= images}
    memory = [version.step for version in whole if version.step <= ends[version.generation]]
    disk = [step for number, step in stored if step <= ends[generation(number)]]
    choice = ask(*nodes, stored=[on_disk(generation(number).at(step)) for number, step in stored])
    assert choice.step == max([*memory, *disk], default=0)
    if choice.tier == "memory":
        assert choice.version in whole
    assert (choice.tier == "memory") == (bool(memory) and max(memory) >= max(disk, default=0))


def test_a_version_of_a_session_over_some_ranks_is_whole_with_their_images():
    record = Parentage(generation=G1, parent=None, step=0, session_ranks=(0, 2))
    images = (image(G1.at(7), 0, 4), image(G1.at(7), 2, 4))
    assert ask(inventory(*images)).tier == "none"
    whole = msgspec.structs.replace(inventory(*images), parents=(record,))
    assert ask(whole).step == 7
    part = msgspec.structs.replace(inventory(images[0]), parents=(record,))
    assert "the image of rank 2 is nowhere" in reasons(ask(part))

"""Simulated jobs for tests of membership: how one begins, and what is asked about it."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.launcher.limits import Limits
from holdfast.launcher.wire import AgentMessage, NodeInfo, Plan
from support.membership_simulation import Chaos, Simulation

LOST_S = 5.0
"""A lost node is missed within 2.5 s, its leader's successor waits for one more, workers take a second to end."""


def calm(nodes: int, **settings: object) -> Simulation:
    return Simulation(1, nodes=nodes, chaos=Chaos(until_s=0.0), **settings)  # type: ignore[arg-type]


def running(nodes: int, *, smallest: int | None = None, largest: int | None = None, **settings: object) -> Simulation:
    """A job whose first generation runs."""
    limits = Limits(
        min_nodes=smallest if smallest is not None else nodes,
        max_nodes=largest or nodes,
        join_timeout_s=40,
        last_call_s=3,
        node_multiple=settings.pop("multiple", 1),  # type: ignore[arg-type]
        grow_s=settings.pop("grow_s", 600.0),  # type: ignore[arg-type]
    )
    simulation = calm(nodes, limits=limits, **settings)
    simulation.run_until(simulation.whole_generations, 10)
    return simulation


def with_sessions(simulation: Simulation) -> Simulation:
    """Restarted, now with Sessions."""
    simulation.session = True
    simulation.fail_worker(next(iter(simulation.agents.values())))
    simulation.run(5)
    assert len(simulation.whole_generations()) == 1
    return simulation


def growing(agreed_after_s: float, **settings: object) -> Simulation:
    """Three nodes in Sessions, a fourth has come: the world has been asked to grow, and agrees on a step so late."""
    simulation = with_sessions(running(3, smallest=2, largest=4, grow_s=0.0, **settings))
    simulation.agreed_after_s = agreed_after_s
    simulation.boot(3)
    simulation.run_until(lambda: simulation.asked_to_regroup, 3)
    return simulation


def split_before_news(simulation: Simulation, missed_by: Iterable[int], *sides: Iterable[int]) -> None:
    """The network will fall apart into `sides` just before the nodes `missed_by` would hear of another generation."""
    known = {None, *simulation.whole_generations()}
    nodes = set(missed_by)

    def loses(sender: int, receiver: int, message: AgentMessage) -> bool:
        news = isinstance(message, Plan) and (message.proposed is not None or message.generation not in known)
        if not news or receiver not in nodes:
            return False
        simulation.split(*sides)
        simulation.loses = lambda sender, receiver, message: False
        return True

    simulation.loses = loses


def restart_counts(simulation: Simulation) -> set[int]:
    return {a.workers.plan.restart_count for a in simulation.agents.values() if a.workers is not None}


def leading_node(simulation: Simulation) -> int:
    (node,) = [agent.node for agent in simulation.agents.values() if agent.leads]
    return node


def by_rank(simulation: Simulation) -> list[int]:
    """Nodes of the generation that runs, by node rank."""
    whole = simulation.whole_generations()
    assert len(whole) == 1, simulation.describe()
    hosts = {f"host{agent.node}": agent.node for agent in simulation.agents.values()}
    return [hosts[place.host] for place in simulation.plans[whole[0]].places]


def goes_on(simulation: Simulation, nodes: int, within_s: float) -> float:
    """Seconds until a generation of so many nodes runs."""
    return simulation.run_until(lambda: simulation.world() == [nodes], within_s)


def kinds(simulation: Simulation) -> list[str]:
    """How agents have left."""
    return [agent.left.kind for agent in simulation.ended if agent.left]


def node_info(name: str, rank_hint: int | None = None) -> NodeInfo:
    return NodeInfo(
        node_id=name, job="", host=name, pid=1, role="default", num_workers=1, rank_hint=rank_hint, address=name
    )

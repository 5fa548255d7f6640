"""How likely a grouping keeps the state in memory, by formulas (checked by simulation in the tests).

Nodes fail independently. With q the probability that a node is lost before the group has protected its state anew,

    group:  P = sum for i <= m of C(n, i) q^i (1 - q)^(n - i)          job:  the product over groups

and, where exactly f of N nodes are lost at random, the number of survivable patterns over C(N, f). A node lives for t
with probability exp(-(t / scale)^shape) (Weibull; shape 1: exponential, scale = mean time between failures).

Survival when f random nodes are lost, and parity memory as a share of the state:

    nodes  f   mirror (1+1)   3+1      7+1      4+2      6+2      12+4
    16     2   0.9333         0.8000   0.5333   1.0000   1.0000   1.0000
    16     3   0.8000         0.4571   0.0000   0.9286   0.8000   1.0000
    128    2   0.9921         0.9764   0.9449   1.0000   1.0000   1.0000
    128    3   0.9764         0.9299   0.8399   0.9988   0.9974   1.0000
    1024   3   0.9971         0.9912   0.9796   1.0000   1.0000   1.0000
    memory     1              0.33     0.14     0.50     0.33     0.33

(Groups of the sizes that `holdfast.erasure.groups` makes: 4+2 over 16 nodes is 6 + 5 + 5.) One parity is weaker than
a mirror and cheaper; two parities beat a mirror at a third to a half of its memory. The formulas are exact where a
group's size is k + m, else a lower bound.
"""

from __future__ import annotations

import math

from holdfast.erasure.groups import Grouping


def node_survival(time_s: float, scale_s: float, shape: float = 1.0) -> float:
    """Probability that a node lives for `time_s`, Weibull with the given scale and shape."""
    return math.exp(-((time_s / scale_s) ** shape))


def group_survival(size: int, num_parity: int, loss: float) -> float:
    """Probability that at most `num_parity` of `size` nodes are lost, each with probability `loss`."""
    return math.fsum(
        math.comb(size, lost) * loss**lost * (1 - loss) ** (size - lost) for lost in range(min(size, num_parity) + 1)
    )


def job_survival(grouping: Grouping, loss: float) -> float:
    """Probability that no group loses more nodes than it has parities, each node being lost with probability `loss`."""
    return math.prod(group_survival(len(group.members), group.num_parity, loss) for group in grouping.groups)


def survival_of_losses(grouping: Grouping, num_lost: int) -> float:
    """Probability that the state survives when exactly `num_lost` nodes, picked at random, are lost at once.

    Counts survivable patterns as the coefficient of x^num_lost in the product over groups of the polynomials
    sum for i <= m of C(n, i) x^i. Exact integers, so it holds for thousands of nodes.
    """
    patterns = [1] + [0] * num_lost
    for group in grouping.groups:
        ways = [math.comb(len(group.members), lost) for lost in range(group.num_parity + 1)]
        patterns = [
            sum(ways[lost] * patterns[total - lost] for lost in range(min(total, group.num_parity) + 1))
            for total in range(num_lost + 1)
        ]
    num_nodes = sum(len(group.members) for group in grouping.groups)
    return patterns[num_lost] / math.comb(num_nodes, num_lost) if num_lost <= num_nodes else 0.0

"""Erasure coding of state in memory: GF(2^8), Reed-Solomon codes, kernels, groups of nodes and their rotation.

Torch-free, except `holdfast.erasure.cuda`.
"""

from holdfast.erasure.blocks import Block, BlockTransform
from holdfast.erasure.reed_solomon import Recovery, ReedSolomon

__all__ = ["Block", "BlockTransform", "Recovery", "ReedSolomon"]

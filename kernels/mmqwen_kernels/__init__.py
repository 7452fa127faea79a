"""Fusion op of mmqwen: project ragged rows and place them in a token-embedding buffer.

Knows no Qwen, no vLLM and no pack; needs torch, and triton for its CUDA backend.
"""

from mmqwen_kernels.ops import fuse_embeddings, project_rows, warm_up
from mmqwen_kernels.plan import HostRows, RowPlan, plan_rows
from mmqwen_kernels.reference import ACTIVATIONS, NORM_EPS, NORMS, Norm, Projector
from mmqwen_kernels.select import BackendChoice, select_backend
from mmqwen_kernels.tiles import LaunchConfig, TileConfig, choose_config

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "NORM_EPS",
    "BackendChoice",
    "HostRows",
    "LaunchConfig",
    "Norm",
    "Projector",
    "RowPlan",
    "TileConfig",
    "choose_config",
    "fuse_embeddings",
    "plan_rows",
    "project_rows",
    "select_backend",
    "warm_up",
]

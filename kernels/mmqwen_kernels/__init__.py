"""Fusion op of mmqwen: project ragged rows and place them in a token-embedding buffer.

Knows no Qwen and no vLLM; needs torch, and triton for its CUDA backend.
"""

from mmqwen_kernels.launch import LaunchConfig, TileConfig, choose_config
from mmqwen_kernels.ops import (
    BackendChoice,
    fuse_embeddings,
    project_rows,
    select_backend,
    warm_up,
)
from mmqwen_kernels.packing import PackError, directory, pack_rows
from mmqwen_kernels.plan import RowPlan, plan_rows
from mmqwen_kernels.reference import Projector

__all__ = [
    "BackendChoice",
    "LaunchConfig",
    "PackError",
    "Projector",
    "RowPlan",
    "TileConfig",
    "choose_config",
    "directory",
    "fuse_embeddings",
    "pack_rows",
    "plan_rows",
    "project_rows",
    "select_backend",
    "warm_up",
]

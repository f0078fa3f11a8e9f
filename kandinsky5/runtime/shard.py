"""Weights spread over ranks: each keeps a share of every weight, and a block has its weights whole only while it runs.

This is PyTorch's `fully_shard` (FSDP2). It gathers the weights of a block from all ranks when its turn comes, those of
the next one meanwhile, and frees them behind it; in training it averages gradients and leaves each rank its share.
Layers that compute in float32 whatever the others do are groups of their own, as a group has one precision.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kandinsky5.checkpoint import cast, map_weights
from kandinsky5.dit import Float32Linear
from kandinsky5.tensor_files import Weights

SPREADS_INT8 = torch.__version__ >= "2.13"  # fully_shard of 2.11 is for floating-point weights alone


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of `model` over the ranks of a mesh of one dimension, in place; it is called as before.

    Groups are each block, each float32 layer, and each other part. Raises ValueError for int8 weights and an older
    PyTorch.
    """
    if not SPREADS_INT8 and not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError(
            f"int8 weights are spread over ranks from PyTorch 2.13 on, and this is {torch.__version__}: update it, or "
            "leave out one of the two"
        )
    # Nothing here adds in place to what such a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in [module for module in model.modules() if isinstance(module, Float32Linear)]:
        fully_shard(module, mesh=mesh)
    for part in model.children():
        for group in part if isinstance(part, nn.ModuleList) else [part]:
            if not isinstance(group, Float32Linear) and any(True for _ in group.parameters()):
                fully_shard(group, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load_shards(
    model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh,
    writable: bool = False,
) -> nn.Module:  # fmt: skip
    """`checkpoint.load_weights`, but each rank of `mesh` reads only its rows of each weight, and keeps only these.

    writable: copy them, for training; else they may stay views of the file, where a write ends the process.
    """
    views = map_weights(model, weights, dtype)
    shard(model, mesh)
    state = {}
    for key, target in model.state_dict().items():
        rows = own_rows(len(target), mesh) if isinstance(target, DTensor) else slice(None)
        own = cast(views[key][rows] if target.ndim else views[key], target.dtype, dtype).to(device, copy=writable)
        state[key] = place(own, target) if isinstance(target, DTensor) else own
    model.load_state_dict(state, assign=True)
    return model


def own_rows(count: int, mesh: DeviceMesh) -> slice:
    """The rows of a weight with `count` rows that this rank keeps: those of `torch.chunk`."""
    size = -(-count // mesh.size())
    return slice(size * mesh.get_local_rank(), size * (mesh.get_local_rank() + 1))


def place(own: Tensor, target: DTensor) -> DTensor:
    """A sharded weight like `target` whose share on this rank is `own`."""
    return DTensor.from_local(
        own, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def agree_on_least(value: int, mesh: DeviceMesh) -> int:
    """The least of what the ranks of a mesh have: they must plan alike, as each waits for all shares of a weight."""
    found = torch.tensor(value, device=mesh.device_type)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=mesh.get_group())
    return int(found)

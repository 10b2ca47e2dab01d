"""torch.compile for training."""

from typing import Any

import torch._functorch.config
import torch._inductor.config
from accelerate.utils import compare_versions
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# The partitioner's rules of thumb; not public names: a torch without them compiles as by default.
RULES = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)
LONGEST_ROW = 1024  # that a kernel of the compiler holds
aten = torch.ops.aten
# What an embedding's gradient becomes: (into, mask, indices, values); before torch 2.13
# (into, indices, values, accumulate).
MASKED_PUT = aten._unsafe_masked_index_put_accumulate.default
PUT = aten.index_put.default


def compile_in_place(
    module: nn.Module, *, less_memory: bool = False, max_autotune: bool = False, **options: Any
) -> None:
    """Compile the module's forward and backward; the names in its state dict stay as they are.

    Between the two passes the compiler keeps what matrix products and attention need, and by its
    rules of thumb much that is cheap to compute again: normalized rows, and every GELU's output,
    the largest tensor of a block. With `less_memory` it keeps the inputs of these only. Measured on
    a CPU: for the 124M model a third less to keep, at the same speed. A GPU, by arithmetic, reads
    and writes for them 3 to 4 % of its time. `options` are torch.compile's.

    On CPUs tanh is computed from exp: a GELU takes a third of the time. It is off by 1e-7 for
    arguments of any size, which x (1 + tanh) / 2 does not see beyond rounding.
    """
    config = torch._functorch.config
    less_memory = less_memory or _reads_back(module)
    for rule in RULES:
        if hasattr(config, rule):
            setattr(config, rule, not less_memory)
    torch._inductor.config.cpp.use_decompose_tanh = True
    torch._inductor.config.post_grad_custom_pre_pass = ScatterIntoSum()
    if max_autotune:  # CUDA graphs would hold a step's memory apart, and the host is not the limit
        options["mode"] = "max-autotune-no-cudagraphs"
    module.compile(**options)


def _reads_back(module: nn.Module) -> bool:
    """Whether a kernel would store a normalized row and read it again, waiting for nothing between.

    A row of more than 1,024 numbers is too long for a kernel to hold. It comes back to other
    threads than stored it, and before 2.14 torch has no barrier there (pytorch/pytorch#190517): on
    a GPU one that is early reads what was there before. Who computes again reads no such row.
    """
    norms = (part for part in module.modules() if isinstance(part, nn.LayerNorm))
    wide = any(norm.normalized_shape[-1] > LONGEST_ROW for norm in norms)
    return wide and compare_versions("torch", "<", "2.14")


class ScatterIntoSum(CustomGraphPass):
    """Write sum + scatter(zeros, rows) as scatter(sum, rows).

    The gradient of a GPT-2's tied weight is such a sum: the head's, and the embedding's, which is
    zero but for the rows of the tokens that occur. The compiler fills a matrix of the vocabulary's
    size (154 MB for GPT-2) with zeros, adds those rows, and then adds all of it to the head's. For
    one graph: under DDP the compiler cuts it where gradients are sent, and head and embedding lie
    in different parts.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            for scattered, other in (add.args, add.args[::-1]):
                if _is_scattered_like(scattered, other) and not add.kwargs:
                    with graph.inserting_before(add):
                        arguments = other, *scattered.args[1:]
                        into = graph.call_function(scattered.target, arguments, scattered.kwargs)
                    into.meta.update(add.meta)
                    add.replace_all_uses_with(into)
                    graph.erase_node(add)
                    graph.erase_node(scattered)
                    break

    def uuid(self) -> Any:
        """What the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def _is_scattered_like(node: Any, other: Any) -> bool:
    """Whether `node` is rows among zeros, needed once, of the shape and type of `other`."""
    if not (isinstance(node, fx.Node) and isinstance(other, fx.Node)) or node is other:
        return False
    if not _accumulates(node):
        return False
    zeros, value = node.args[0], other.meta["val"]
    assert isinstance(zeros, fx.Node)
    is_like = (zeros.meta["val"].shape, zeros.meta["val"].dtype) == (value.shape, value.dtype)
    is_zero = zeros.target == aten.full.default and zeros.args[1] == 0
    return bool(is_zero and is_like and len(node.users) == 1)


def _accumulates(node: fx.Node) -> bool:
    """Whether it adds rows to a matrix, and does not put them in place of what is there."""
    return node.target == MASKED_PUT or (node.target == PUT and node.args[3:] == (True,))

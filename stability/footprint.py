"""What the instruments take of a device's memory beside the weights in training, counted before a run begins."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config
from model import GPT, uses_chunked
from stability.probes import STEPS, _at, _Linearised


class Held(TorchDispatchMode):
    """Inside, counts the bytes of all new tensors that still exist, `now`, and the most that ever did, `most`.

    On the meta device this takes neither memory nor time. known: tensors that are not new.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now, self.most = 0, 0
        self.known = [x.untyped_storage() for x in known]  # kept, since a name is used again when its owner is gone
        self.names = set(map(id, self.known))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            if id(storage) not in self.names:
                self.names.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._drop, id(storage), storage.nbytes())
        return out

    def _drop(self, name: int, size: int):
        self.names.discard(name)
        self.now -= size


def of_jacobians(block: nn.Module, x: Tensor, positions: Sequence[int] = ()) -> int:
    """Bytes that the Jacobians of one block at x (B, T, d) take, without its weights; `positions` as in `jacobians`."""
    with Held([*block.parameters(), x]) as held:
        linearised = _Linearised([block], [x])
        at = _at(linearised, [block], positions)
        v = at.z[0].new_empty(1, len(at.z[0]), at.z[0][0].numel())
        for product in (at.matvec, at.rmatvec):
            product(v, [0])
    return held.most + (2 * STEPS + 1) * v.nbytes


def of_activations(model: GPT, tokens: Tensor) -> int:
    """Bytes that the attention weights of one block, or else the logits, take while they are summed up."""
    x = tokens.new_empty(*tokens.shape, model.cfg.d_model, dtype=torch.float32)
    with torch.no_grad(), Held(model.parameters()) as held:
        model.logits(x).logsumexp(-1)
        for block in model.blocks:
            torch.special.entr(torch.softmax(block.attn.logits(block.attn_norm(x)), -1)).sum(-1)
    return held.most


def of_spectrum(matrices: Iterable[Tensor]) -> int:
    """Bytes that the largest of the spectra takes: the matrix in fp32 and fp64, and its Gram matrix three times."""
    return max(12 * m * n + 24 * min(m, n) ** 2 for m, n in (W.shape[-2:] for W in matrices))


def needs(cfg: Config, device: torch.device, sharded: bool) -> Iterator[tuple[str, int]]:
    """(the field to change, bytes) of each kind of measurement on the process that takes it, one after the other.

    A sharded model is lent to it block by block. A CPU linearises all blocks at once, as `jacobians` does.
    """
    with torch.device("meta"):
        kinds = 2 if cfg.attention == "alternating" else 1  # of blocks; one of each is counted
        model = GPT(replace(cfg, n_layer=min(cfg.n_layer, kinds), theory_every=0, recompute=0))
        tokens = torch.empty(cfg.probe_batch, cfg.block_size, dtype=torch.long)
        # the experts' share of tokens depends on values: in their place one MLP is as wide as those that a token uses
        width = cfg.d_ff * (cfg.top_k if cfg.n_experts else 1)
        dense = GPT(replace(model.cfg, n_experts=0, vocab_size=2, d_ff=width))
        x = torch.empty(*tokens.shape, cfg.d_model)
    if any(uses_chunked(cfg.attn_kernel, block.attn.d_qk, device) for block in dense.blocks):
        for block in dense.blocks:
            block.attn.kernel = "chunked"
    block, total = (4 * sum(p.numel() for p in part.parameters()) for part in (model.blocks[0], model))
    lent = total - (len(model.blocks) - 2) * block if sharded else 0  # two blocks and what is outside blocks
    first = "probe_batch" if cfg.probe_batch > 1 else ""
    if cfg.probe_every or cfg.msign_probe:
        every = "probe_every" if cfg.probe_every else "msign_probe"
        yield every, of_spectrum(p for p in model.blocks.parameters() if p.ndim > 1)
        yield first or every, lent + of_activations(model, tokens)
    if cfg.jacobian_every or cfg.msign_probe:
        every = "jacobian_every" if cfg.jacobian_every else "msign_probe"
        one = max(of_jacobians(block, x, range(cfg.jacobian_positions)) for block in dense.blocks)
        yield first or every, lent + one * (cfg.n_layer if device.type == "cpu" else 1)

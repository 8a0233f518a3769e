"""A block of the network by compiled code: one code for all blocks, the mixture of experts between its parts.

torch's compiler fuses what lies between matrix products: norms, modulation, gates, activations. A network is its
blocks, which differ by their weights alone, so only a block is compiled, and all of them share its code. The
mixture stays outside: on a CPU the sizes of its products depend on where tokens are routed to, everywhere it keeps
what each layer's balance loss is made of, and DeepSpeed may have put another in its place. The part before it is
compiled, and what adds its result.

The code is made for the shapes that it is asked with, and for no others: what is computed of a batch does not
depend on which batches came before.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ditmoe.model.compiling.folder import compile_into_own_folder
from ditmoe.model.dit import Block, DiT, call_block
from ditmoe.model.errors import UserError
from ditmoe.model.layers import add_gated

MOST_SHAPES: Final = 64
"""Codes of one part of a block that a process holds, each of its own shapes or number type."""
OPTIONS: Final[dict[str, Any]] = {
    # torch 2.10 to 2.13 on GPUs: wrong gradients of what is cut from one modulation, without a word, of some ten
    # thousand tokens and more (pytorch #193061).
    "triton.mix_order_reduction": False,
}
"""Of torch's compiler, beside its defaults."""


class CompiledBlocks:
    """Computes blocks in place of their own `forward`; given to a network as its `compute_block`.

    Parameters keep their names and places: nothing is wrapped. Hooks of modules within a compiled part are not
    called.
    """

    def __init__(self, with_gradients: bool) -> None:
        """Compile nothing yet.

        Args:
            with_gradients: where gradients are asked for, and not elsewhere, a block is computed by compiled code;
                False: the other way round. So a run that trains draws its previews as ever.
        """
        self.seconds = 0.0
        """Spent by `prepare` so far."""
        self._with_gradients = with_gradients
        self._attend = _compiled(Block.attend)
        self._add_gated = _compiled(add_gated)
        self._mlp = _compiled(_mlp)
        self._prepared: set[tuple[Any, ...]] = set()
        self._preparing = threading.Lock()

    def __call__(self, block: Block, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        """`[B, T, D]`, `[B, D]` → `[B, T, D]`."""
        # A dispatch mode, such as one that counts what a step sends, looks at operators: compiled code has none.
        if torch.is_grad_enabled() != self._with_gradients or is_in_torch_dispatch_mode():
            return call_block(block, x_BTD, condition_BD)
        # The first block's tokens come as channels of an image, transposed: of those, the compiler of torch 2.13
        # makes wrong gradients on CPUs, without a word.
        x_BTD, condition_BD = x_BTD.contiguous(), condition_BD.contiguous()
        with record_function("ditmoe: attention"):
            x_BTD, modulated_BTD, gate_B1D = self._attend(block, x_BTD, condition_BD)
        if not hasattr(block, "moe"):
            with record_function("ditmoe: MLP"):
                out_BTD: Tensor = self._mlp(block, x_BTD, modulated_BTD, gate_B1D)
                return out_BTD
        mixed_BTD = block.moe(modulated_BTD).contiguous()
        with record_function("ditmoe: norms and modulation"):
            out_BTD = self._add_gated(x_BTD, gate_B1D, mixed_BTD)
            return out_BTD

    def __deepcopy__(self, memo: object) -> "CompiledBlocks":
        """A copy of a network has the code in common with it."""
        return self

    def prepare(self, network: DiT, images: int) -> float:
        """Compile for batches of so many images, unless that was done.

        Nothing of the network is changed: gradients go nowhere.

        Args:
            network: its first block stands for all of them.

        Returns:
            Seconds that it took; 0: it was done before.

        Raises:
            UserError: the compiler failed, with what it said.
        """
        block = next(iter(network.blocks.values()))
        assert isinstance(block, Block)
        weight = next(block.parameters())
        config = network.config
        shape = (config.hidden, config.heads, config.attention, bool(config.experts), config.tokens)
        key = (*shape, images, weight.dtype, weight.device, torch.get_num_threads())
        with self._preparing:
            if key in self._prepared:
                return 0.0
            begun = time.perf_counter()
            with telling_failure():
                self._run_once(block, images, config.tokens, config.hidden, weight)
            self._prepared.add(key)
            seconds = time.perf_counter() - begun
            self.seconds += seconds
            return seconds

    def _run_once(self, block: Block, images: int, tokens: int, hidden: int, like: Tensor) -> None:
        """All that is compiled of a block, forward and, with gradients, backward."""
        with torch.enable_grad() if self._with_gradients else nullcontext():
            x_BTD, condition_BD = (
                like.new_zeros(shape).requires_grad_(self._with_gradients)
                for shape in ((images, tokens, hidden), (images, hidden))
            )
            after_BTD, modulated_BTD, gate_B1D = self._attend(block, x_BTD, condition_BD)
            if hasattr(block, "moe"):
                out_BTD = self._add_gated(after_BTD, gate_B1D, modulated_BTD)
            else:
                out_BTD = self._mlp(block, after_BTD, modulated_BTD, gate_B1D)
            if self._with_gradients:
                # Of what goes in alone: those of weights would be kept, and told to whoever waits for them.
                torch.autograd.grad(out_BTD.sum(), (x_BTD, condition_BD))
        if like.is_cuda:
            torch.cuda.synchronize(like.device)


def _mlp(block: Block, x_BTD: Tensor, modulated_BTD: Tensor, gate_B1D: Tensor) -> Tensor:
    """What follows attention in a block of a dense network."""
    return add_gated(x_BTD, gate_B1D, block.mlp(modulated_BTD))


@cache
def compiled_blocks(with_gradients: bool) -> CompiledBlocks:
    """The one that all networks of this process share; codes of networks of one shape are then made once."""
    compile_into_own_folder()
    from torch._inductor import config

    # Not for each core of the machine: its other processes compile too.
    config.compile_threads = max(1, min(config.compile_threads or 1, torch.get_num_threads()))
    if with_gradients:
        # DeepSpeed's pipeline goes through a stage's graph twice, for the tokens and for the condition: a backward
        # pass must leave what it was given as it is.
        torch._functorch.config.donated_buffer = False
    return CompiledBlocks(with_gradients)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph, or an error; made for given shapes."""
    made: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # torch's stub lacks the last two
        function,
        fullgraph=True,
        dynamic=False,
        options=OPTIONS,
        recompile_limit=MOST_SHAPES,
        isolate_recompiles=True,
    )
    return made


@contextmanager
def telling_failure() -> Iterator[None]:
    """Where the machine's compiler fails, or what it made cannot be loaded, say so in a message of one line.

    A fault of torch or of this program stays what it is.
    """
    try:
        yield
    except Exception as error:
        cause = _cause_on_the_machine(error)
        if cause is None:
            raise
        raise UserError(
            f"torch.compile: this machine cannot compile a block: {cause}; expected a working C++ compiler (CXX"
            " names it), Python's headers, and a temporary folder from which programs may be loaded (TMPDIR names"
            " it); or leave compiling out"
        ) from error


def _cause_on_the_machine(error: BaseException | None) -> str | None:
    """What an error says that came from the compiler, the loader or the disk; None: none of them failed."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    while error is not None:
        if isinstance(error, CppCompileError | InvalidCxxCompiler | OSError | ImportError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = next((line for line in lines if "error:" in line), lines[0] if lines else "")
            return told[:300] or type(error).__name__
        error = getattr(error, "inner_exception", None) or error.__cause__  # the former where torch wraps one
    return None

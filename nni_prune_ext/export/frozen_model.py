"""The model as an exporter should see it, for the length of a ``with`` block; afterwards it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from nni_prune_ext.errors import ExportError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode, no gradients, no fused attention and no TF32, and back, also when something raises.

    The fused path of `nn.MultiheadAttention` has no ONNX equivalent, and TF32 convolutions differ from float32 by
    about 1e-3, which would drown a parity check on a GPU.
    """
    training = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_tf32())
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, mode in training.items():
                module.training = mode


@contextmanager
def exportable_form(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the model with every submodule that offers ``for_export()`` replaced by what that method returns.

    A stand-in that pruning put in (a frozen 0/1 convolution for a shortcut, say) can so turn back into plain
    tensor operations. Submodules are put back at the end; the model's own ``for_export()`` is asked first.
    """
    root = _offered(model)
    if root is not None:
        yield root.eval()
        return
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            # Not named_children(), which leaves out the second name of a module that is used twice.
            for name, child in list(parent._modules.items()):
                substitute = None if child is None else _offered(child)
                if child is not None and substitute is not None:
                    replaced.append((parent, name, child))
                    setattr(parent, name, substitute.eval())
        yield model
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _offered(module: nn.Module) -> nn.Module | None:
    """Returns what the module offers for export, or None if it does not have the capability."""
    for_export = getattr(module, "for_export", None)
    if not callable(for_export):
        return None
    substitute = for_export()
    if not isinstance(substitute, nn.Module):
        raise ExportError(
            f"{type(module).__name__}.for_export() returned {type(substitute).__name__}, expected a torch.nn.Module "
            "that computes the same. Return one, or rename the method."
        )
    return substitute


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Computes float32 convolutions and matrix products in float32 on GPUs; does nothing without one."""
    if not torch.cuda.is_available():
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution

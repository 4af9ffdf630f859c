"""The interpolation path, theta_t = (1 - t) A + t B': one function, for the writer and the evaluator alike."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_lmc.errors import InputError, MismatchError
from hf_moe_lmc.runtime.memory import cast, like

NATIVE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # torch rounds these once
AT_ONCE = 1 << 19  # elements of one step of `interpolate_into`, whose float32 copies stay in the cache
AT_ONCE_THERE = 1 << 25  # on an accelerator, where each step waits for its start


def interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b in float32 (float64 stays), not cast back; exactly a at t = 0 and b at t = 1.

    Where a and b are equal the result equals them at every t. Integers have to be equal.

    Raises:
        MismatchError: integers that differ.
    """
    if not a.dtype.is_floating_point:
        if not torch.equal(a, b.to(a.dtype)):
            raise MismatchError("integers that differ between A and B cannot be interpolated")
        return a
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if t == 0:
        return cast(a, dtype)
    if t == 1:
        return cast(b, dtype)
    a, b = cast(a, dtype), cast(b, dtype)
    return torch.lerp(a, b, t, out=like(a))


def interpolate_into(out: Tensor, a: Tensor, b: Tensor, t: float) -> None:
    """`interpolate` written to `out` (which may be a), in its dtype and on its device, rounded once.

    Where all three have one dtype no wider copy is made: torch computes in float32 and rounds once, too. Elsewhere AT_ONCE
    elements are in float32 at a time, AT_ONCE_THERE where a is on an accelerator.

    Raises:
        MismatchError: integers that differ.
    """
    alike = out.dtype == a.dtype == b.dtype and out.device == a.device == b.device
    if a.dtype.is_floating_point and t in (0, 1):
        out.copy_((a, b)[int(t)])
    elif alike and a.dtype in NATIVE:
        torch.lerp(a, b, t, out=out)
    elif a.numel() <= (step := AT_ONCE if a.device.type == "cpu" else AT_ONCE_THERE) or a.ndim == 0:
        out.copy_(interpolate(a, b, t))
    elif rows := step // (a.numel() // len(a)):
        for parts in zip(out.split(rows), a.split(rows), b.split(rows), strict=True):
            parts[0].copy_(interpolate(*parts[1:], t))
    else:
        for parts in zip(out, a, b, strict=True):
            interpolate_into(*parts, t)


def check_t(t: float) -> None:
    """Raises InputError unless 0 <= t <= 1."""
    if not 0 <= t <= 1:
        raise InputError(f"t = {t}: expected a number from 0 (A) to 1 (B)")


def exact(t: float) -> str:
    """The shortest decimal number that is `t`.

    Example:
        >>> [exact(t) for t in (0.5, 1.0, 1e-7)]
        ['0.5', '1', '1e-07']
    """
    return repr(float(t)).removesuffix(".0")

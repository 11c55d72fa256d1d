"""Launches of Triton kernels without Triton's look at each argument, which takes longer than many a kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class DirectLaunch:
    """A kernel that is compiled by its first launch of each kind, and launched at once by all later ones.

    Launches are captured in graphs or rare elsewhere; those of prompts are neither, and the device waits for them. A
    process has one device. In Triton's interpreter nothing is compiled, and all launches are Triton's own.
    """

    def __init__(self, kernel: Any) -> None:
        """
        Args:
            kernel: a function with `triton.jit`.
        """
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], kind: Hashable, *arguments: Any, **options: Any) -> None:
        """Launches the kernel on the current stream.

        Args:
            kind: equal for launches that the same compiled kernel serves: it has the dtypes, the `tl.constexpr`s, and
                the numbers that the kernel is specialized on. Tensors that it is specialized on begin at multiples of
                16 bytes.
            arguments: of the kernel, all of them, in order.
            options: of the compilation, such as `num_warps`.
        """
        compiled = self._compiled.get(kind)
        if compiled is None:
            self._compiled[kind] = self._kernel[grid](*arguments, **options)
        else:
            compiled[grid](*arguments)

"""How values lie in memory, for kernels that take them as two axes."""

from torch import Tensor


class Layout:
    """How values lie in memory, as two axes: channels, and the values of each in the order of their addresses.

    Args:
        x: the values.
        scale: the step, with as many axes: one for all, or one per channel.
    """

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        strides, self.channels = x.stride(), scale.numel()
        axes = list(range(x.dim()))
        self.plain = x.is_contiguous() and (self.channels == 1 or scale.shape[0] > 1)
        if not self.plain:
            axes.sort(key=lambda axis: -strides[axis])
            if self.channels > 1:
                axes.sort(key=lambda axis: scale.shape[axis] == 1)  # stable: the channels come first
        self.axes = axes
        self.shape = [x.shape[axis] for axis in axes]
        self.order = sorted(range(len(axes)), key=axes.__getitem__)

    def flat(self, x: Tensor) -> Tensor:
        """Values as ``(channels, values)``: a view, or a copy where they lie in another order."""
        return (x if self.plain else x.permute(self.axes)).detach().reshape(self.channels, -1)

    def restored(self, flat: Tensor) -> Tensor:
        """A view of them in their shape, each where it was."""
        return flat.view(self.shape) if self.plain else flat.view(self.shape).permute(self.order)

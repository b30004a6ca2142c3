"""peft's LoRA layer with its product masked like the weight beside it. Imports peft."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class MaskedLinear(Linear):
    """W + s (BA) ⊙ M instead of W + s BA, where M is 1 where W is not zero: it has the zeros of W, so merging is exact.

    The mask is read off the weight at every forward and stored nowhere. The product takes as much memory as the weight
    while it is in use. Dropout is that of peft, on the adapter's input.

    Source: the masked product of MaskLoRA (PERP, arXiv 2312.15230).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        super().__init__(
            base_layer, adapter_name, config=config, is_target_conv_1d_layer=isinstance(base_layer, Conv1D), **options
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The product ``s (BA) ⊙ M``, laid out like the weight."""
        weight: Any = self.get_base_layer().weight
        return super().get_delta_weight(adapter).masked_fill(weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with every active adapter masked."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                down: Any = self.lora_A[adapter]
                inputs = self._cast_input_dtype(x, down.weight.dtype)
                product = self.get_delta_weight(adapter)
                product = product.t() if self.fan_in_fan_out else product
                result = result + nn.functional.linear(self.lora_dropout[adapter](inputs), product).to(result.dtype)
        return result


def masked(config: LoraConfig) -> LoraConfig:
    """The configuration, with layers that mask their product. It is saved as if they were ordinary ones."""
    config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
    return config

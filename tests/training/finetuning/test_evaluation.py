import pytest
import torch
from torch import Tensor, nn

from nnssl_ext.training.finetuning.evaluation import _Predictor


class _Network(nn.Module):
    seen: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = nn.functional.conv3d(x, torch.ones(2, 1, 1, 1, 1))
        self.seen = result.dtype
        return result


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_validation_computes_in_the_precision_of_its_training(dtype: torch.dtype | None) -> None:
    predictor = _Predictor(0.5, True, False, False, torch.device("cpu"), False, False, False)
    predictor.amp_dtype, predictor.network, predictor.allowed_mirroring_axes = dtype, _Network(), None
    logits = predictor._internal_maybe_mirror_and_predict(torch.rand(1, 1, 2, 3, 4))
    assert predictor.network.seen is (dtype or torch.float32)
    assert logits.dtype is torch.float32  # windows are added up at least as exactly as nnU-Net does

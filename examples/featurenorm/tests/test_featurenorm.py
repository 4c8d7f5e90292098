"""What the method does, and the promises that it must keep to be compared with others."""

import pytest
import torch
from featurenorm import FeatureNorm

from visionselector_eval.baselines import InputError, VisualTokens, available, build
from visionselector_eval.models.checks import check


def test_the_longest_tokens_are_kept() -> None:
    features = torch.diag(torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]))
    kept = FeatureNorm().compress(VisualTokens(features=features, grid=(1, 1, 5)), 3).kept
    assert kept.tolist() == [0, 2, 4]


def test_its_name_is_known_and_its_option_is_checked() -> None:
    assert "featurenorm" in available()
    assert build("featurenorm", power=1.0) == FeatureNorm(power=1.0)
    with pytest.raises(InputError, match="power"):
        build("featurenorm", power=0.0)


def test_it_keeps_the_promises_of_a_compressor() -> None:
    assert not check(build("featurenorm"))

import pytest

from edm_deploy.errors import InputError
from edm_deploy.runtime.capabilities import capabilities_of
from engines.common.precision import supported_precision


def test_without_a_request_it_is_the_first_that_the_backend_supports():
    assert supported_precision(None, capabilities_of("cuda")) == "fp16"
    assert supported_precision("bf16", capabilities_of("cuda")) == "bf16"


def test_another_is_refused_with_the_supported_ones():
    with pytest.raises(InputError, match=r"--precision 'bf61': openvino has fp32 and bf16\. Did you mean 'bf16'"):
        supported_precision("bf61", capabilities_of("openvino"))

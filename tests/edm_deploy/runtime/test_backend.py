import pytest

import engines
from edm_deploy import registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.backend import BuildOptions


def test_an_option_that_a_backend_has_not_is_refused_with_those_it_has():
    backend = registry.load(engines, "ort", "BACKEND")
    with pytest.raises(UnsupportedError, match=r"ort has no option --gpu\. Leave it out; its options: .*--threads"):
        backend.refuse_foreign_options(BuildOptions(gpu="rtx3090"))


def test_the_default_options_suit_every_backend():
    for name in registry.names(engines):
        registry.load(engines, name, "BACKEND").refuse_foreign_options(BuildOptions())

import pytest

import engines
from edm_deploy import lookup
from edm_deploy.errors import UnsupportedError
from edm_deploy.session import BuildOptions


def test_an_option_that_a_backend_has_not_is_refused_with_those_it_has():
    backend = lookup.load(engines, "ort", "BACKEND")
    with pytest.raises(UnsupportedError, match=r"ort has no option --gpu\. Leave it out; its options: .*--threads"):
        backend.refuse_foreign_options(BuildOptions(gpu="rtx3090"))


def test_the_default_options_suit_every_backend():
    for name in lookup.names(engines):
        lookup.load(engines, name, "BACKEND").refuse_foreign_options(BuildOptions())

from __future__ import annotations

import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy_tools.common.machine import check_versions, machine, versions


def test_the_machine_has_a_processor_cores_and_memory():
    facts = machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gb"] > 0


def test_versions_include_the_packages_that_compute():
    assert {"edm-deploy", "torch", "diffusers"} <= set(versions())


def test_a_process_with_other_versions_is_refused():
    check_versions({"torch": "2.0"}, {"torch": "2.0", "more": "1"}, where="The worker")
    with pytest.raises(
        UnsupportedError, match=r"The worker has torch none, this process 2\.0\. Install the same versions on every machine"
    ):
        check_versions({"torch": "2.0"}, {}, where="The worker")

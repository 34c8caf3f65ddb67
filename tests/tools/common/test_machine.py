from __future__ import annotations

from edm_deploy_tools.common.machine import machine, versions


def test_the_machine_has_a_processor_cores_and_memory():
    facts = machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gb"] > 0


def test_versions_include_the_packages_that_compute():
    assert {"edm-deploy", "torch", "diffusers"} <= set(versions())

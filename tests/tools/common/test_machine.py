from __future__ import annotations

from edm_deploy_tools.common.machine import machine, versions


def test_the_machine_has_a_processor_cores_and_memory():
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0


def test_versions_name_what_computes():
    assert {"edm-deploy", "torch", "diffusers"} <= set(versions())

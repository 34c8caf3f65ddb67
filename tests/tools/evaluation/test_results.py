from __future__ import annotations

from edm_deploy_tools.evaluation.results import agreement_json
from edm_deploy_tools.evaluation.site_agreement import SiteAgreement


def test_agreement_is_summed_over_the_sites():
    sites = [
        SiteAgreement(site="a", codes=90, ties=1, differ=0, output_error=0.1),
        SiteAgreement(site="b", codes=10, ties=0, differ=4, output_error=0.3),
    ]
    totals = agreement_json(sites)
    assert (totals["codes"], totals["ties"], totals["beyond_a_tie"]) == (100, 1, 4)
    assert totals["flip_rate"] == 0.05
    assert totals["mean_output_error"] == 0.2

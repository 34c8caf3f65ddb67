import json
import shutil
from dataclasses import replace

import pytest
import torch

from calibration import Interrupted, RunOptions, fit, recipes
from calibration.base_pass import PassContext, SitePrice, check_passes
from calibration.observers.sensitivity import Sensitivity
from calibration.passes.allocate import Allocate
from calibration.passes.pcr import Pcr
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.minmax import MinMax
from calibration.recipes.qdiff import QDiff
from calibration.student.quantization_spec import LayerSpec
from edm_deploy import registry
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.layer_costs import model_work
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import tiny_source

QUICK = MinMax(weight_bits=4, act_bits=4, rows=3, calibration_samples=2)
TRAINED = EfficientDM(rows=2, calibration_samples=2, steps=3, batch=2, rank=2)


def allocate(**settings):
    return Allocate(rows=2, samples=2, **settings)


def work_of(artifact):
    return {name: site.macs for name, site in model_work(artifact.family_object, artifact.config, artifact.structure).sites.items()}


def int4_share(artifact):
    macs = work_of(artifact)
    return sum(macs[name] for name, site in artifact.sites.items() if site.scheme == "W4A4") / sum(macs.values())


@pytest.fixture(scope="module")
def halved():
    """Half of the work in INT4, and relaxed timesteps."""
    return fit(tiny_source(), QUICK, RunOptions(), passes=[allocate(budget="int4=0.5"), Pcr()])


def test_the_share_of_int4_work_is_kept_and_used_up(halved):
    assert {site.scheme for site in halved.sites.values()} == {"W4A4", "W8A8"}
    macs = work_of(halved)
    largest = max(macs[name] for name, site in halved.sites.items() if site.scheme == "W4A4") / sum(macs.values())
    assert 0.5 <= int4_share(halved) <= 0.5 + 2 * largest


def test_it_composes_with_relaxed_timesteps(halved):
    assert halved.relaxed_bits == 8
    assert all((site.relaxed_activation is None) == (site.activation.bits == 8) for site in halved.sites.values())


def test_the_allocation_is_in_the_artifact_and_its_provenance(halved, tmp_path):
    loaded = Artifact.load(halved.save(tmp_path / "a"))
    assert loaded.digest == halved.digest
    family = loaded.family_object
    raised = {name for name, site in loaded.sites.items() if site.scheme == "W8A8" and family.placement(name) == "quantize"}
    saved = json.loads((tmp_path / "a" / "artifact.json").read_text())["provenance"]["allocation"]
    assert saved == {name: {"weight_bits": 8, "act_bits": 8, "symmetric": True} for name in raised}


def test_the_average_of_the_input_bits_is_kept_by_the_groups_of_most_gain(monkeypatch):
    """The measured gains are those of this list; the sites that lose most are raised, q, k and v of one attention together."""
    wanted = ("down_blocks.1.attentions.0.to_q", "up_blocks.0.resnets.0.conv1")

    def measure(self, context, planned, groups):
        return [Sensitivity(sites=sites, error=1.0 if sites[0] in wanted else 0.0, raised_error=0.0) for sites in groups]

    monkeypatch.setattr(Allocate, "measure", measure)
    source = tiny_source()
    context = PassContext(
        source=source, recipe=QUICK, conditioner=Conditioner(source.family_object, source.config), device=torch.device("cpu")
    )
    family = source.family_object
    planned = {name: QUICK.layer_spec(name, family.placement(name)) for name in family.sites(source.model)}
    specs = allocate(budget="avg_act_bits=7.5", weights=False).specs(context, planned)
    changed = {name: spec for name, spec in specs.items() if spec != planned[name]}
    assert set(changed) == {"up_blocks.0.resnets.0.conv1", *(f"down_blocks.1.attentions.0.to_{each}" for each in "qkv")}
    assert set(changed.values()) == {LayerSpec(4, 8, symmetric=True)}
    with pytest.raises(
        InputError, match=r"No allocation meets allocate\.budget avg_act_bits=4\. Set allocate\.budget=avg_act_bits=4\.\d+, the"
    ):
        allocate(budget="avg_act_bits=4").specs(context, planned)


def test_a_budget_of_time_takes_its_prices_from_the_caller(monkeypatch):
    seen = []

    def prices(work, gpu, batch):
        seen.append((gpu, batch))
        return {name: SitePrice(int4=0.5 * site.macs, int8=1.0 * site.macs) for name, site in work.sites.items()}

    chosen = allocate(budget="time=0.8x", gpu="a100", batch=2)
    artifact = fit(tiny_source(), QUICK, RunOptions(), passes=[chosen], prices=prices)
    assert seen == [("a100", 2)]
    assert 0.4 <= int4_share(artifact) < 0.8  # half the time where it is INT4: 1 - 0.5 share <= 0.8
    with pytest.raises(InputError, match=r"No allocation meets allocate\.budget time=0\.3x\. Set allocate\.budget=time=0\.\d+x"):
        fit(tiny_source(), QUICK, RunOptions(), passes=[allocate(budget="time=0.3x")], prices=prices)
    with pytest.raises(InputError, match=r"time=0\.8x needs expected times of layers"):
        fit(tiny_source(), QUICK, RunOptions(), passes=[chosen])


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (MinMax(act_bits=16), "int4=0.75", "'allocate' does not compose with act_bits 16"),
        (MinMax(weight_bits=4), "int4=0.75", "has nothing to raise: act_bits is 8"),
        (MinMax(weight_bits=4, act_bits=6), "int4=0.75", r"at W4A6 no work is in INT4.*or a budget of avg_act_bits"),
        (MinMax(weight_bits=6, act_bits=4), "time=0.9x", r"at W6A4 no work is in INT4"),
    ],
)
def test_recipes_without_anything_to_allocate_are_refused(recipe, budget, message):
    with pytest.raises(InputError, match=message):
        check_passes([Allocate(budget=budget)], recipe)
    check_passes([Allocate(budget="avg_act_bits=7")], MinMax(weight_bits=4, act_bits=6))


@pytest.mark.parametrize(
    ("recipe", "found"),
    [(QUICK, "recipe 'minmax' does not train"), (QDiff(weight_bits=4, act_bits=4), "recipe 'qdiff' reconstructs blocks")],
)
def test_dual_variables_of_recipes_without_a_training_of_the_whole_network_are_refused(recipe, found):
    with pytest.raises(InputError, match=rf"allocate\.sensitivity dual: {found}; expected .* Set allocate\.sensitivity=forward"):
        check_passes([Allocate(sensitivity="dual")], recipe)
    check_passes([Allocate()], recipe)


def test_settings_of_the_measurement_outside_their_range_are_refused():
    with pytest.raises(
        InputError, match=r"allocate\.sensitivity is 'backward'; expected forward or dual\. Set another allocate\.sensitivity"
    ):
        Allocate(sensitivity="backward")
    with pytest.raises(InputError, match=r"allocate\.dual_steps is 0; expected at least 1"):
        Allocate(dual_steps=0)


def test_dual_variables_allocate_within_the_budget_and_are_measured_before_the_training():
    seen = []
    chosen = allocate(budget="int4=0.5", sensitivity="dual", dual_steps=2)
    artifact = fit(tiny_source(), TRAINED, RunOptions(), passes=[chosen], on_progress=seen.append)
    stages = [progress.stage for progress in seen]
    assert stages.count("sensitivity") == 2 and stages.count("finetune") == 3
    assert stages.index("sensitivity") < stages.index("finetune")
    assert len(artifact.provenance["allocation"]) > 0
    assert 0.5 <= int4_share(artifact) < 1
    assert (artifact.provenance["passes"]["allocate"]["sensitivity"], artifact.provenance["settings"]["steps"]) == ("dual", 3)


DISTILLED = [name for name in registry.names(recipes) if registry.load(recipes, name, "RECIPE").distills]


# In the quick run not mpq-dm, whose mixed bits by channel take most of its time, nor quest.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] if name in ("mpq-dm", "quest") else []) for name in DISTILLED]
)
def test_every_recipe_that_distills_has_dual_variables(name):
    recipe = registry.load(recipes, name, "RECIPE")(rows=2, calibration_samples=2, steps=1, batch=2, act_bits=4)
    chosen = allocate(budget="int4=0.3", sensitivity="dual", dual_steps=1)
    assert len(fit(tiny_source(), recipe, RunOptions(), passes=[chosen]).provenance["allocation"]) > 0


def test_a_resumed_run_keeps_the_allocation_of_its_checkpoint_without_measuring_it_again(tmp_path, monkeypatch):
    whole = fit(tiny_source(), TRAINED, RunOptions(), passes=[allocate(budget="int4=0.5")])
    assert len(whole.provenance["allocation"]) > 0
    checkpoint = RunOptions(checkpoint=tmp_path / "c", checkpoint_every=1)

    def stop(progress):
        if progress.stage == "finetune" and progress.step == 1:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(tiny_source(), TRAINED, checkpoint, passes=[allocate(budget="int4=0.5")], on_progress=stop)
    monkeypatch.setattr(Allocate, "measure", None)
    damaged = shutil.copytree(tmp_path / "c", tmp_path / "damaged") / "checkpoint.json"
    description = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(description | {"identity": description["identity"] | {"allocation": {"conv_in": 4}}}))
    damaged_options = RunOptions(checkpoint=tmp_path / "damaged", resume=True)
    with pytest.raises(ArtifactError, match="is the checkpoint of another run: conv_in is 4 there and None here"):
        fit(tiny_source(), TRAINED, damaged_options, passes=[allocate(budget="int4=0.5")])
    resumed = fit(tiny_source(), TRAINED, replace(checkpoint, resume=True), passes=[allocate(budget="int4=0.5")])
    assert resumed.digest == whole.digest
    assert resumed.provenance["allocation"] == whole.provenance["allocation"]

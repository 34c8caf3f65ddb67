"""What holds for the engines of SDXL and of every transformer family: every planned site in integers, and exact from the reference's own input."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import engines
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from tests.conftest import artifact_by_hand, tiny_inputs, tiny_model
from tests.this_cpu import openvino_executes

KINDS = ["sdxl", "dit", "pixart", "sd3", "flux"]
HALF = (
    "sd3",
    "sdxl",
)  # built for a GPU in float16, as one would; the others from the graph that is there already: drawing one takes seconds
# With every kind in cuda and every transformer in ort, OpenVINO and TensorRT-RTX take the one whose graph is the smallest; the others are `extended`.
SMALL = ("flux",)
LONG_BUILDS = ("openvino", "trt-rtx")
LONG_TRACES = ("sdxl",)
SIZES = {"batch": ShapeRange(1, 2, 4), "tokens": ShapeRange(1, 512, 512), "image_tokens": ShapeRange(16, 16, 64)}


@dataclass(frozen=True)
class Subject:
    """A W4A4 artifact, what graph inputs it is judged on, and a directory for what is made of it."""

    kind: str
    artifact: Artifact
    inputs: dict
    folder: Path

    def options(self, **asked) -> BuildOptions:
        """A profile that the inputs fit in."""
        dims = {dim for declared in self.artifact.family_object.inputs(self.artifact.config) for dim in declared.dims}
        return BuildOptions(profile={dim: size for dim, size in SIZES.items() if dim in dims}, **asked)

    def exported(self, dtype: str) -> Path:
        """The directory of its graph."""
        path = self.folder / f"onnx-{dtype}"
        if not path.is_dir():
            onnx_from_artifact(self.artifact, path, dtype=dtype)
        return path

    def built(self, backend: str):
        """The manifest of its engine; for a GPU, of an RTX 3090."""
        asked = {"gpu": "sm_86"} if backend in ("trt-rtx", "cuda") else {}
        if backend == "cpu" and self.kind not in SMALL:
            asked = {"precision": "fp16"}  # cuda's, whose trace is there already; the default, bfloat16, for the smallest
        source = self.folder / "artifact"
        if engines.backend_named(backend).builds_from == "onnx":
            source = self.exported("fp16" if backend == "trt-rtx" and self.kind in HALF else "fp32")
        elif not source.is_dir():
            self.artifact.save(source)
        if not (self.folder / backend).is_dir():
            engines.build_engine(source, self.folder / backend, backend=backend, options=self.options(**asked))
        return Manifest.read(self.folder / backend, kind="engine")


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory):
    artifact = artifact_by_hand(request.param)
    return Subject(request.param, artifact, tiny_inputs(request.param, batch=4), tmp_path_factory.mktemp(request.param))


def is_long(kind, backend):
    """Whether a case takes more than five seconds."""
    return (kind not in SMALL and backend in LONG_BUILDS) or (kind in LONG_TRACES and backend not in ("cuda", "cpu"))


def on_every_kind(*backends):
    """Each kind with each backend; kinds that take long to build for one are `extended`."""
    cases = [pytest.param(kind, name, marks=[pytest.mark.extended] if is_long(kind, name) else []) for kind in KINDS for name in backends]
    return pytest.mark.parametrize(("subject", "name"), cases, indirect=["subject"])


@on_every_kind("ort", "openvino", "cuda", "cpu")
def test_at_every_site_the_codes_are_those_of_the_reference(name, subject):
    pytest.importorskip({"ort": "onnxruntime", "openvino": "openvino"}.get(name, "torch"))
    engine = subject.built(name)
    dtype = engines.backend_named(name).site_dtype(engine)
    cut = cut_from_inputs(subject.artifact, subject.inputs, subject.folder / f"cut-{dtype}", dtype=dtype)
    sites = agreement(cut, engine, device="cpu")
    assert {site.site for site in sites} == set(subject.artifact.sites)
    assert [site.site for site in sites if site.differ] == []
    assert sum(site.ties for site in sites) <= 2  # float32 products of 1e5 values; none is expected, two may be
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-5
    assert max(site.output_error for site in sites) <= rounding


@on_every_kind("openvino", "trt-rtx", "cuda", "cpu")
def test_every_planned_site_is_computed_in_integers(name, subject):
    pytest.importorskip({"openvino": "openvino", "trt-rtx": "tensorrt_rtx"}.get(name, "torch"))
    engine = subject.built(name)
    assert {plan.executed for plan in engine.plan.values()} == {
        "openvino": {openvino_executes()},
        "trt-rtx": {"int8"},
        "cuda": {"int4", "int8"},
        "cpu": {"int8"},
    }[name]
    kept = sum(subject.artifact.family_object.placement(site) == "w8a8" for site in subject.artifact.sites)
    assert Counter(plan.stored for plan in engine.plan.values()) == {"W4A4": len(subject.artifact.sites) - kept, "W8A8": kept}
    if name == "trt-rtx":
        assert engine.build["sites_in_integer_layers"] == len(subject.artifact.sites)
        assert [warning for warning in engine.build["warnings"] if "export with --dtype fp16" not in warning] == []


@pytest.mark.parametrize("name", ["cuda", "cpu"])
@pytest.mark.parametrize("subject", KINDS, indirect=True)
def test_its_integer_kernels_run_the_whole_model(name, subject):
    """float16, or bfloat16, between the sites: no further from the float model than twice as far as the reference is."""
    from edm_deploy.runtime.load import load_denoiser

    subject.built(name)
    family, _, model = tiny_model(subject.kind)
    exact, expected = family.forward(model, subject.inputs), Reference(subject.artifact)(subject.inputs)
    found = load_denoiser(subject.folder / name, device="cpu").run(subject.inputs)
    assert (found - exact).norm() <= 2 * (expected - exact).norm()

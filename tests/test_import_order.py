"""The layout of the repository: order of imports, one home for each vendor package, small folders, files and signatures, a test for each file."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = {
    "edm_deploy": "edm_deploy",
    "calibration": "calibration",
    "engines": "engines",
    "tools": "edm_deploy_tools",
}  # folder -> package
BELOW = {"edm_deploy": set(), "calibration": {"edm_deploy"}, "engines": {"edm_deploy"}, "tools": {"edm_deploy", "calibration", "engines"}}
# Inside a package: a folder or file imports only from those in earlier groups. `__init__` stands for the package's own file.
ORDER = {
    "edm_deploy": (
        ("errors",),
        ("registry",),
        ("storage", "numerics"),
        ("native",),
        ("network",),
        ("models",),
        ("artifact",),
        ("adapters",),
        ("pipelines",),
        ("runtime",),
        ("export", "serving", "__init__"),
    ),
    "calibration": (
        ("run", "data"),
        ("student",),
        ("recipe",),
        ("base_pass",),
        ("start",),
        ("training", "observers"),
        ("reconstruction",),
        ("recipes", "passes"),
        ("__init__",),
    ),
    "engines": (
        ("__init__", "kernels"),
        ("performance",),
        ("common",),
        ("torch_graph", "openvino_graph"),
        ("nvidia", "from_artifact"),
        ("ort", "openvino", "trt", "trt_rtx", "cuda", "cpu"),
    ),
    "tools": (
        ("__init__",),
        ("common", "images"),
        ("inspection", "benchmarks", "triton"),
        ("generation",),
        ("evaluation", "serving"),
        ("comparison",),
        (
            "bench_gpu",
            "bench_kernels",
            "bench_outliers",
            "bench_scale",
            "convert_inception",
            "families",
            "roofline",
            "soak",
            "soak_server",
            "train_features",
            "train_reference",
        ),
        ("commands",),
        ("cli",),
        ("__main__",),
    ),
}
ONLY_HERE = {  # third-party package -> the only places that may import it
    "tensorrt": ("engines/trt.py", "engines/kernels/tensorrt_plugin.py"),
    "cuda": ("engines/kernels/",),
    "tensorrt_rtx": ("engines/trt_rtx.py",),
    "onnxruntime": ("engines/ort.py",),
    "openvino": ("engines/openvino.py",),
    "onnx": ("edm_deploy/export/",),
    "onnx_ir": ("edm_deploy/export/",),
    "onnxscript": ("edm_deploy/export/",),
    "diffusers": ("edm_deploy/models/", "edm_deploy/pipelines/", "tools/"),
    "polygraphy": ("tools/inspection/polygraphy_folder.py",),
    "accelerate": ("calibration/run/processes.py",),
    "tensorboard": ("tools/images/tensorboard_report.py",),
    "typer": ("tools/",),
    "rich": ("tools/",),
    "PIL": ("tools/", "edm_deploy/pipelines/"),
    "pyarrow": ("tools/images/dataset.py", "tools/images/shards.py"),
    "ray": ("tools/common/ray_cluster.py", "tools/generation/on_ray.py", "tools/serving/ray_"),
    "fastapi": ("tools/serving/app.py",),
    "starlette": ("tools/serving/",),
    "uvicorn": ("tools/serving/server.py",),
    "prometheus_client": ("tools/serving/metrics.py",),
}
MOST_FILES = 14  # on one level, `__init__.py` apart
MOST_LINES = 300
MOST_PARAMETERS = 8  # of a function; commands have one for each of their options
FILES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    """Dotted name by which a file of ours is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


MODULES = {module_of(path): path for path in FILES}


def imported(path: pathlib.Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, inside functions and for type checking too; of ours the file's own module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else node.module


IMPORTS = {module_of(path): set(imported(path)) for path in FILES}


def room_of(path: pathlib.Path) -> tuple[str, str]:
    """Package folder, and the folder or file directly below it, of a file."""
    folder, below = path.relative_to(ROOT).parts[:2]
    return folder, below.removesuffix(".py")


def test_imports_follow_the_order_of_packages_and_rooms():
    wrong = []
    for module, names in IMPORTS.items():
        folder, room = room_of(MODULES[module])
        rank = {name: number for number, group in enumerate(ORDER[folder]) for name in group}
        assert room in rank, f"{folder}/{room} has no place in ORDER"
        for name in names & set(MODULES):
            other_folder, other_room = room_of(MODULES[name])
            allowed = (rank[other_room] < rank[room] or other_room == room) if other_folder == folder else other_folder in BELOW[folder]
            if not allowed:
                wrong.append(f"{module} imports {name}")
        for name in names:
            homes = ONLY_HERE.get(name.split(".")[0])
            here = str(MODULES[module].relative_to(ROOT))
            if homes is not None and not here.startswith(homes):
                wrong.append(f"{here} imports {name}, which only {homes} may")
    assert wrong == []


def test_no_file_imports_itself_around_a_corner():
    ours = {module: {name for name in names if name in MODULES and name != module} for module, names in IMPORTS.items()}
    while leaves := [module for module, names in ours.items() if not names]:
        for leaf in leaves:
            del ours[leaf]
        for names in ours.values():
            names.difference_update(leaves)
    assert ours == {}, "these files import each other, or import from ones that do"


def test_the_top_level_is_the_one_that_was_agreed():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"edm_deploy", "calibration", "engines", "tools", "tests"}


def test_folders_and_files_stay_small():
    folders = {path.parent for path in FILES}
    crowded = {
        str(folder.relative_to(ROOT)): len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders
    }
    assert {folder: count for folder, count in crowded.items() if count > MOST_FILES} == {}
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_functions_take_few_parameters():
    crowded = []
    for path in FILES:
        text = path.read_text()
        if "import typer" in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in given if name not in ("self", "cls")]) > MOST_PARAMETERS:
                    crowded.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert crowded == []


def test_every_source_file_has_its_test():
    """tests/ mirrors the tree; underscored files are tested through those that use them."""
    sources = [path.relative_to(ROOT) for path in FILES if not path.name.startswith("_")]
    assert [str(path) for path in sources if not (ROOT / "tests" / path.parent / f"test_{path.name}").is_file()] == []


def test_importing_the_package_stays_light():
    """A deployment machine needs no onnx, no diffusers pipelines and no calibration to open an engine."""
    code = "import sys, edm_deploy; print(*[m for m in ('onnx', 'onnx_ir', 'diffusers', 'calibration', 'engines', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
